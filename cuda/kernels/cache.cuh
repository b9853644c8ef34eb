// Where the keys and values of many sequences lie, as the kernels of the engine's cache see it.
//
// Rows of a kv head of a sequence, in device memory:
//
//   dense    | token 0 | token 1 | ...                                     |    rows_each rows
//   slots    | sinks            | ring: token t at t % ring | slots ...    |
//   span     | ring: token t at t % ring                                    |    no sinks, no slots
//
// The ring holds the newest tokens. Of a dense sequence that is longer than its rows the first tokens have theirs. Every row also lies
// in page-locked host memory, in chunks of 256 rows a head. Pages are runs of 16 tokens; those with a token among the newest `window`
// are not published, their tokens are always attended.
#pragma once
#include "tile.cuh"

namespace floe {

constexpr uint32_t CHUNK_ROWS = 256, NONE = 0xffffffffu, DENSE = 0xffffffffu;

// Mirrored by `ops::cache::SequencePlace`.
struct SequencePlace {
    uint32_t rows;       // first row of the sequence
    uint32_t rows_each;  // rows of a kv head
    uint32_t pages;      // first page, a multiple of 16
    uint32_t pages_each; // pages of a kv head, a multiple of 16
    uint32_t slots;      // slots of a kv head, or DENSE
    uint32_t tokens;      // word of the first token in lists of tokens and tables by token
    uint32_t tokens_each; // words of a kv head; 0: 16 for each page, from the first page's on
    uint32_t unused;
};

// Mirrored by `ops::cache::BatchEntry`.
struct BatchEntry {
    uint32_t sequence; // index of its SequencePlace
    uint32_t tokens;   // the step's own included; 0 = nobody here
    uint32_t tick;     // of this step, above those before
    uint32_t exact;    // 1 = attends all tokens, of a span those in its ring; 0 = what is selected
};

// Mirrored by `ops::cache::Cache`.
struct Cache {
    const BatchEntry *batch;           // [entries]
    const SequencePlace *sequences;
    const uint64_t *chunks;            // [sequences, chunks_each] host-mapped [heads, 256, 2, D] E each
    uint32_t heads, group, sinks, window, ring, chunks_each;
};

// Type of a host engine's tensor. Mirrored by `ops::cache::TensorType`.
enum class Type : uint32_t { BF16 = 0, F16 = 1, F32 = 2 };

__device__ __forceinline__ float load_as(const void *at, uint64_t index, uint32_t type) {
    switch (Type(type)) {
    case Type::BF16: return __bfloat162float(static_cast<const __nv_bfloat16 *>(at)[index]);
    case Type::F16: return __half2float(static_cast<const __half *>(at)[index]);
    default: return static_cast<const float *>(at)[index];
    }
}

__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
template <typename E> __device__ __forceinline__ E narrow(float x);
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }

// Pages whose tokens are all older than the window before the newest token came.
__device__ __forceinline__ uint32_t published(const Cache &c, uint32_t tokens) {
    return tokens > c.window + 1 ? (tokens - 1 - c.window) / 16 : 0;
}

// Row of a token that is in its place: one of the first of a dense sequence, else a sink or one of the newest `ring`.
__device__ __forceinline__ uint32_t row_of(const Cache &c, const SequencePlace &s, uint32_t head, uint32_t token) {
    const uint32_t base = s.rows + head * s.rows_each;
    return base + (s.slots == DENSE || token < c.sinks ? token : c.sinks + token % c.ring);
}

// Whether `row_of` of a token belongs to it once `tokens` are stored.
__device__ __forceinline__ bool in_place(const Cache &c, const SequencePlace &s, uint32_t token, uint32_t tokens) {
    return s.slots == DENSE ? token < s.rows_each : token < c.sinks || token + c.ring >= tokens;
}

// Word of a kv head's first token in lists of tokens and tables by token.
__device__ __forceinline__ uint32_t token_base(const SequencePlace &s, uint32_t head) {
    return s.tokens_each ? s.tokens + head * s.tokens_each : (s.pages + head * s.pages_each) * 16;
}

// Row of a token in host memory.
__device__ __forceinline__ uint64_t host_row(const Cache &c, uint32_t sequence, uint32_t head, uint32_t token, uint32_t row_bytes) {
    const uint64_t chunk = c.chunks[uint64_t(sequence) * c.chunks_each + token / CHUNK_ROWS];
    return chunk + uint64_t(head * CHUNK_ROWS + token % CHUNK_ROWS) * row_bytes;
}

} // namespace floe
