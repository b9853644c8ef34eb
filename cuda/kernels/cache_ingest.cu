// Stores a run of tokens of one sequence (a prompt, piece by piece): every row to host memory, and on the device the rows that a
// step will read there. One warp per token and kv head.
#include "cache.cuh"

namespace floe {

// Mirrored by `ops::cache::ingest::IngestParams`.
struct IngestParams {
    Cache cache;
    const void *k, *v;      // [run, heads, D], rows contiguous
    uint64_t k_token, k_head, v_token, v_head; // strides in elements
    void *kv;               // [rows, 2, D] E
    uint32_t *fault;        // becomes 1 when a token has no room; it is not stored
    uint32_t type, sequence, first, run, num_rows; // first = position of the run's first token
};

template <typename E, int D> __device__ __forceinline__ void ingest(const IngestParams &p) {
    constexpr int PIECES = D / 4;
    const Cache &c = p.cache;
    const uint32_t lane = threadIdx.x % 32, job = blockIdx.x * 8 + threadIdx.x / 32;
    if (job >= p.run * c.heads) return;
    const uint32_t i = job / c.heads, head = job % c.heads, token = p.first + i;
    const SequencePlace s = c.sequences[p.sequence];
    // Of a run longer than the ring only the newest rows stay there: two tokens must not write one row. Nor has each token of a
    // dense sequence that is longer than its rows one.
    const bool keep = in_place(c, s, token, p.first + p.run);
    const uint32_t at = keep ? row_of(c, s, head, token) : 0;
    if (token / CHUNK_ROWS >= c.chunks_each || at >= p.num_rows) {
        if (lane == 0) *p.fault = 1;
        return;
    }
    uint4 *host = reinterpret_cast<uint4 *>(host_row(c, p.sequence, head, token, 4 * D));
    for (uint32_t piece = lane; piece < PIECES; piece += 32) {
        const bool value = piece >= PIECES / 2;
        const void *from = value ? p.v : p.k;
        const uint64_t start = value ? i * p.v_token + head * p.v_head + (piece - PIECES / 2) * 8 : i * p.k_token + head * p.k_head + piece * 8;
        __align__(16) E x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = narrow<E>(load_as(from, start + j, p.type));
        const uint4 bits = *reinterpret_cast<const uint4 *>(x);
        host[piece] = bits;
        if (keep) static_cast<uint4 *>(p.kv)[uint64_t(at) * PIECES + piece] = bits;
    }
}

} // namespace floe

#define CACHE_INGEST(TYPE, SUFFIX, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                         \
        cache_ingest_##SUFFIX##_d##D(const __grid_constant__ floe::IngestParams p) { floe::ingest<TYPE, D>(p); }
#define CACHE_INGEST_ALL(D) CACHE_INGEST(__nv_bfloat16, bf16, D) CACHE_INGEST(__half, f16, D)

CACHE_INGEST_ALL(64)
CACHE_INGEST_ALL(96)
CACHE_INGEST_ALL(128)
CACHE_INGEST_ALL(256)

namespace floe {

// Mirrored by `ops::cache::ingest::RefillParams`.
struct RefillParams {
    Cache cache;
    uint4 *kv;              // [rows, pieces]
    uint32_t *fault;        // becomes 1 when a token has no row; it is left out
    uint32_t sequence, first, run, num_rows, pieces;
};

} // namespace floe

// The way back: rows of a run of tokens from host memory to where `row_of` has them.
extern "C" __global__ void __launch_bounds__(256) cache_refill(const __grid_constant__ floe::RefillParams p) {
    using namespace floe;
    const Cache &c = p.cache;
    const uint32_t lane = threadIdx.x % 32, job = blockIdx.x * 8 + threadIdx.x / 32;
    if (job >= p.run * c.heads) return;
    const uint32_t token = p.first + job / c.heads, head = job % c.heads;
    const SequencePlace s = c.sequences[p.sequence];
    const uint32_t at = row_of(c, s, head, token);
    if (token / CHUNK_ROWS >= c.chunks_each || at >= p.num_rows || (s.slots == DENSE && token >= s.rows_each)) {
        if (lane == 0) *p.fault = 1;
        return;
    }
    const uint4 *host = reinterpret_cast<const uint4 *>(host_row(c, p.sequence, head, token, p.pieces * 16));
    for (uint32_t i = lane; i < p.pieces; i += 32) p.kv[uint64_t(at) * p.pieces + i] = host[i];
}
