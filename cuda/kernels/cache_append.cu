// Begins a step of a layer: stores each sequence's new key and value on the device and in host memory, copies the queries, and
// writes the ranges that the step's other kernels work on.
//
// One block per (kv head, sequence).
#include "cache.cuh"

namespace floe {

// Mirrored by `ops::cache::append::AppendStepParams`.
struct AppendStepParams {
    Cache cache;
    const void *q, *k, *v;  // of the host engine: [entries, heads, D], rows contiguous
    uint64_t q_entry, q_head, k_entry, k_head, v_entry, v_head; // strides in elements
    void *kv;               // [rows, 2, D] E
    void *q_out;            // [items, group, D] E
    uint32_t *page_first, *page_end, *row_first, *row_end; // [items]
    uint32_t *num_fetch;    // [1] becomes 0
    const uint32_t *tree_pages; // [sequences, heads] pages of each head's tree, or null: pages are runs of 16 tokens
    uint32_t *fault;        // becomes 1 when a sequence has no room for its token, which is not stored
    uint32_t q_type, kv_type, num_rows;
};

template <typename E, int D> __device__ __forceinline__ void append_step(const AppendStepParams &p) {
    constexpr int PIECES = D / 4; // 16-byte pieces of a row
    __shared__ __align__(16) E row[2 * D];
    const Cache &c = p.cache;
    const uint32_t head = blockIdx.x, entry = blockIdx.y, item = entry * c.heads + head;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const BatchEntry e = c.batch[entry];
    if (head == 0 && entry == 0 && threadIdx.x == 0) *p.num_fetch = 0;
    if (e.tokens == 0) {
        if (threadIdx.x == 0) {
            p.page_first[item] = p.page_end[item] = 0;
            p.row_first[item] = p.row_end[item] = 0;
        }
        return;
    }
    const SequencePlace s = c.sequences[e.sequence];
    const bool dense = s.slots == DENSE;
    if (threadIdx.x == 0) {
        const uint32_t page = s.pages + head * s.pages_each;
        const uint32_t known = p.tree_pages ? p.tree_pages[e.sequence * c.heads + head] : published(c, e.tokens);
        const uint32_t pages = e.exact ? 0 : min(known, s.pages_each);
        p.page_first[item] = page, p.page_end[item] = page + pages;
        const uint32_t first = s.rows + head * s.rows_each;
        p.row_first[item] = first, p.row_end[item] = first + (dense && e.exact ? e.tokens : 0);
    }
    const uint32_t token = e.tokens - 1;
    for (uint32_t i = threadIdx.x; i < 2 * D; i += blockDim.x) {
        const bool value = i >= D;
        const uint64_t at = value ? entry * p.v_entry + head * p.v_head + i - D : entry * p.k_entry + head * p.k_head + i;
        row[i] = narrow<E>(load_as(value ? p.v : p.k, at, p.kv_type));
    }
    for (uint32_t g = warp; g < c.group; g += blockDim.x / 32) {
        const uint64_t from = entry * p.q_entry + (head * c.group + g) * p.q_head, to = (uint64_t(item) * c.group + g) * D;
#pragma unroll
        for (int d = 0; d < D; d += 32)
            static_cast<E *>(p.q_out)[to + d + lane] = narrow<E>(load_as(p.q, from + d + lane, p.q_type));
    }
    __syncthreads();
    const uint32_t at = row_of(c, s, head, token);
    const bool room = token / CHUNK_ROWS < c.chunks_each && at < p.num_rows && (!dense || token < s.rows_each);
    if (!room) {
        if (threadIdx.x == 0) *p.fault = 1;
        return;
    }
    uint4 *host = reinterpret_cast<uint4 *>(host_row(c, e.sequence, head, token, 4 * D));
    for (uint32_t i = threadIdx.x; i < PIECES; i += blockDim.x) {
        const uint4 x = reinterpret_cast<const uint4 *>(row)[i];
        static_cast<uint4 *>(p.kv)[uint64_t(at) * PIECES + i] = x;
        host[i] = x;
    }
}

} // namespace floe

#define CACHE_APPEND(TYPE, SUFFIX, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128)                                                                         \
        cache_append_##SUFFIX##_d##D(const __grid_constant__ floe::AppendStepParams p) { \
        floe::let_next_start();                                                                                               \
        floe::wait_for_earlier();                                                                                             \
        floe::append_step<TYPE, D>(p);                                                                                        \
    }
#define CACHE_APPEND_ALL(D) CACHE_APPEND(__nv_bfloat16, bf16, D) CACHE_APPEND(__half, f16, D)

CACHE_APPEND_ALL(64)
CACHE_APPEND_ALL(96)
CACHE_APPEND_ALL(128)
CACHE_APPEND_ALL(256)
