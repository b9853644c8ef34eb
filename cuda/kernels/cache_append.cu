// Begins a step of a layer: stores each sequence's new key and value on the device and in host memory, copies the queries, and
// writes the ranges that the step's other kernels work on: pages to select from, or rows that are all attended.
//
// Codes err alike in all directions, because residuals are rotated before they are coded. So an estimated logit has the variance
// `scale^2 |q|^2` times that of a coordinate's error, a fixed share of the residuals' mean square. Where that variance is above the
// bound, the item attends all of its tokens.
//
// One block per (kv head, sequence).
#include "cache.cuh"
#include "sum.cuh"

namespace floe {

// Mirrored by `ops::cache::append::AppendStepParams`.
struct AppendStepParams {
    Cache cache;
    const void *q, *k, *v;  // of the host engine: [entries, heads, D], rows contiguous
    uint64_t q_entry, q_head, k_entry, k_head, v_entry, v_head; // strides in elements
    void *kv;               // [rows, 2, D] E
    void *q_out;            // [items, group, D] E
    uint32_t *page_first, *page_end, *row_first, *row_end; // [items]
    uint32_t *beyond_first, *beyond_end; // [items] tokens of an exact item that have no row on the device, or null = all have one
    const uint64_t **beyond_warm; // [items] becomes the item's chunks, or null for nobody's items
    uint32_t *num_fetch;    // [1] becomes 0, or null
    const uint32_t *tree_pages; // [sequences, heads] pages of each head's tree, or null: pages are runs of 16 tokens
    uint32_t *fault;        // becomes 1 when a sequence has no room for its token, which is not stored
    const float *spread;    // [pages] mean square of a page's key residuals, of 16 tokens in any case, or null = no item is in doubt
    uint2 *spread_sums;     // [sequences, heads] pages after the sinks that are summed up, bits of the f32 sum of their spreads
    const uint64_t **warm;  // [items] becomes the item's chunks where its rows are attended in host memory, else null
    unsigned long long *doubted; // [1] += items in doubt
    uint32_t *noticed;      // [1] host-mapped; becomes 1 with the first item in doubt
    float doubt;            // variance of an estimated logit over its bound, for |q|^2 and spread of 1
    uint32_t q_type, kv_type, num_rows;
};

// Sum of a value over the block's 128 threads, always in the same order.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[4];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    return sums[0] + sums[1] + sums[2] + sums[3];
}

// Whether logits estimated for queries of mean square length `length` over `pages` pages, or a tree's, from `first_page` on are in
// doubt: pages that hold as many tokens as `full` pages beside the sinks'. Every thread asks.
__device__ __forceinline__ bool in_doubt(const AppendStepParams &p, uint32_t kv_head, uint32_t first_page, uint32_t pages, uint32_t full, float length) {
    const uint32_t sinks = p.cache.sinks / 16;
    if (full <= sinks) return false;
    // A tree has no page of sinks.
    const uint32_t skip = p.tree_pages ? 0 : sinks, num = pages - min(skip, pages);
    // The sum is kept from step to step; pages that are new since then are added. Where a tree changes the host says that more are
    // known than there are.
    const uint2 known = p.spread_sums[kv_head];
    const bool whole = known.x <= num;
    float more = 0;
#pragma unroll 8
    for (uint32_t i = skip + (whole ? known.x : 0) + threadIdx.x; i < pages; i += blockDim.x) more += p.spread[first_page + i];
    const float sum = (whole ? __uint_as_float(known.y) : 0) + block_sum(more);
    if (threadIdx.x == 0) p.spread_sums[kv_head] = {num, __float_as_uint(sum)};
    return p.doubt * length * sum > float(full - sinks);
}

template <typename E, int D> __device__ __forceinline__ void append_step(const AppendStepParams &p) {
    constexpr int PIECES = D / 4; // 16-byte pieces of a row
    __shared__ __align__(16) E row[2 * D];
    const Cache &c = p.cache;
    const uint32_t head = blockIdx.x, entry = blockIdx.y, item = entry * c.heads + head;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const BatchEntry e = c.batch[entry];
    if (p.num_fetch && head == 0 && entry == 0 && threadIdx.x == 0) *p.num_fetch = 0;
    if (e.tokens == 0) {
        if (threadIdx.x == 0) {
            p.page_first[item] = p.page_end[item] = 0;
            p.row_first[item] = p.row_end[item] = 0;
            if (p.spread) p.warm[item] = nullptr;
            if (p.beyond_first) p.beyond_first[item] = p.beyond_end[item] = 0, p.beyond_warm[item] = nullptr;
        }
        return;
    }
    const SequencePlace s = c.sequences[e.sequence];
    const bool dense = s.slots == DENSE;
    const uint32_t token = e.tokens - 1;
    for (uint32_t i = threadIdx.x; i < 2 * D; i += blockDim.x) {
        const bool value = i >= D;
        const uint64_t at = value ? entry * p.v_entry + head * p.v_head + i - D : entry * p.k_entry + head * p.k_head + i;
        row[i] = narrow<E>(load_as(value ? p.v : p.k, at, p.kv_type));
    }
    float squares = 0;
    for (uint32_t g = warp; g < c.group; g += blockDim.x / 32) {
        const uint64_t from = entry * p.q_entry + (head * c.group + g) * p.q_head, to = (uint64_t(item) * c.group + g) * D;
#pragma unroll
        for (int d = 0; d < D; d += 32) {
            const float x = load_as(p.q, from + d + lane, p.q_type);
            static_cast<E *>(p.q_out)[to + d + lane] = narrow<E>(x);
            squares += x * x;
        }
    }
    __syncthreads();
    const uint32_t first_page = s.pages + head * s.pages_each, full = published(c, e.tokens);
    const uint32_t known = p.tree_pages ? p.tree_pages[e.sequence * c.heads + head] : full;
    const uint32_t pages = e.exact ? 0 : min(known, s.pages_each);
    bool doubt = false;
    if (p.spread && pages) doubt = in_doubt(p, e.sequence * c.heads + head, first_page, pages, full, block_sum(squares) / c.group);
    if (threadIdx.x == 0) {
        p.page_first[item] = first_page, p.page_end[item] = first_page + (doubt ? 0 : pages);
        const bool host = doubt && !dense;
        const uint64_t *chunks = c.chunks + uint64_t(e.sequence) * c.chunks_each;
        const uint32_t first = host ? 0 : s.rows + head * s.rows_each, near = min(e.tokens, dense ? s.rows_each : c.ring);
        p.row_first[item] = first, p.row_end[item] = first + (doubt ? e.tokens : e.exact ? near : 0);
        if (p.spread) p.warm[item] = host ? chunks : nullptr;
        if (p.beyond_first) p.beyond_first[item] = near, p.beyond_end[item] = e.exact && dense ? e.tokens : near, p.beyond_warm[item] = chunks;
        if (doubt) {
            atomicAdd(p.doubted, 1);
            *p.noticed = 1;
        }
    }
    const bool keep = in_place(c, s, token, e.tokens);
    const uint32_t at = keep ? row_of(c, s, head, token) : 0;
    if (token / CHUNK_ROWS >= c.chunks_each || at >= p.num_rows || (!keep && !p.beyond_first)) {
        if (threadIdx.x == 0) *p.fault = 1;
        return;
    }
    uint4 *host = reinterpret_cast<uint4 *>(host_row(c, e.sequence, head, token, 4 * D));
    for (uint32_t i = threadIdx.x; i < PIECES; i += blockDim.x) {
        const uint4 x = reinterpret_cast<const uint4 *>(row)[i];
        if (keep) static_cast<uint4 *>(p.kv)[uint64_t(at) * PIECES + i] = x;
        host[i] = x;
    }
}

} // namespace floe

#define CACHE_APPEND(TYPE, SUFFIX, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128)                                                                         \
        cache_append_##SUFFIX##_d##D(const __grid_constant__ floe::AppendStepParams p) { \
        const floe::Timeline timeline(floe::Work::Append);                                                                    \
        floe::let_next_start();                                                                                               \
        floe::wait_for_earlier();                                                                                             \
        floe::append_step<TYPE, D>(p);                                                                                        \
    }
#define CACHE_APPEND_ALL(D) CACHE_APPEND(__nv_bfloat16, bf16, D) CACHE_APPEND(__half, f16, D)

CACHE_APPEND_ALL(64)
CACHE_APPEND_ALL(96)
CACHE_APPEND_ALL(128)
CACHE_APPEND_ALL(256)
