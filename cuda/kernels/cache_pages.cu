// Summaries and key sketches of pages of 16 consecutive tokens: mean key, mean value, and the sign of every coordinate of each key's
// rotated residual to the mean, with the residual's mean magnitude as scale.
//
// One block per page, one warp per token. In a step: the page, if any, whose last token leaves the window.
#include "cache.cuh"

namespace floe {

// Mirrored by `ops::cache::pages::PagesParams`.
struct PagesParams {
    Cache cache;
    const void *k, *v;       // tokens from `run_first` on, [run, heads, D]; earlier ones are read from kv
    uint64_t k_token, k_head, v_token, v_head;
    const void *kv;          // [rows, 2, D] E
    void *mean_keys;         // [pages, D] E
    void *mean_values;       // [pages, D] E
    float *log_count;        // [pages]
    uint32_t *lines;         // [pages, D / 32, 16] or null = no sketch
    __half *scales;          // [pages, 16]
    uint16_t *masks;         // [pages]
    const float *signs;      // [D]
    uint32_t type, sequence, run_first, first_page, in_step, num_pages;
};

template <typename E, int D> __device__ __forceinline__ void build_page(const PagesParams &p) {
    constexpr int LINES = D / 32;
    __shared__ float sums[2][16][D];
    __shared__ float mean[D];
    const Cache &c = p.cache;
    const uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y % c.heads;
    uint32_t sequence = p.sequence, page = p.first_page + blockIdx.x;
    if (p.in_step) {
        const BatchEntry e = c.batch[blockIdx.y / c.heads];
        if (e.exact || e.tokens < c.window + 16 || (e.tokens - c.window) % 16 != 0) return;
        sequence = e.sequence, page = (e.tokens - c.window) / 16 - 1;
    }
    const SequencePlace s = c.sequences[sequence];
    const uint32_t at = s.pages + head * s.pages_each + page, position = page * 16 + token;
    if (page >= s.pages_each || at >= p.num_pages) return;
    float key[LINES], value[LINES];
    if (!p.in_step && position >= p.run_first) {
        const uint64_t i = position - p.run_first;
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            key[l] = wide(narrow<E>(load_as(p.k, i * p.k_token + head * p.k_head + 32 * l + lane, p.type)));
            value[l] = wide(narrow<E>(load_as(p.v, i * p.v_token + head * p.v_head + 32 * l + lane, p.type)));
        }
    } else {
        const E *row = static_cast<const E *>(p.kv) + uint64_t(row_of(c, s, head, position)) * 2 * D;
#pragma unroll
        for (int l = 0; l < LINES; l++) key[l] = wide(row[32 * l + lane]), value[l] = wide(row[D + 32 * l + lane]);
    }
#pragma unroll
    for (int l = 0; l < LINES; l++) sums[0][token][32 * l + lane] = key[l], sums[1][token][32 * l + lane] = value[l];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 2 * D; i += 512) {
        const uint32_t which = i / D, d = i % D;
        float sum = 0;
#pragma unroll
        for (int t = 0; t < 16; t++) sum += sums[which][t][d];
        const E rounded = narrow<E>(sum / 16);
        static_cast<E *>(which ? p.mean_values : p.mean_keys)[uint64_t(at) * D + d] = rounded;
        if (!which) mean[d] = wide(rounded);
    }
    if (threadIdx.x == 0) {
        // Sinks are always attended: a page of sinks stands for nothing.
        const bool counts = page * 16 >= c.sinks;
        p.log_count[at] = counts ? 2.772588722239781f : -INFINITY;
        if (p.masks) p.masks[at] = counts ? 0xffff : 0;
    }
    if (D == 96 || !p.lines) return;
    __syncthreads();
    float x[LINES], size = 0;
#pragma unroll
    for (int l = 0; l < LINES; l++) x[l] = (key[l] - mean[32 * l + lane]) * p.signs[32 * l + lane];
    hadamard<LINES>(x, lane);
#pragma unroll
    for (int l = 0; l < LINES; l++) size += fabsf(x[l]);
#pragma unroll
    for (int d = 16; d; d /= 2) size += __shfl_xor_sync(~0u, size, d);
    const __half scale = __float2half_rn(fminf(size / D, 65504.f));
#pragma unroll
    for (int l = 0; l < LINES; l++) {
        const uint32_t word = __ballot_sync(~0u, x[l] > 0);
        if (lane == 0) p.lines[(uint64_t(at) * LINES + l) * 16 + token] = word;
    }
    if (lane == 0) p.scales[uint64_t(at) * 16 + token] = scale;
}

} // namespace floe

#define CACHE_PAGES(TYPE, SUFFIX, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(512)                                                                         \
        cache_pages_##SUFFIX##_d##D(const __grid_constant__ floe::PagesParams p) { floe::build_page<TYPE, D>(p); }
#define CACHE_PAGES_ALL(D) CACHE_PAGES(__nv_bfloat16, bf16, D) CACHE_PAGES(__half, f16, D)

CACHE_PAGES_ALL(64)
CACHE_PAGES_ALL(96)
CACHE_PAGES_ALL(128)
CACHE_PAGES_ALL(256)
