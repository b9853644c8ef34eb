// Scores of all pages: q.mean_key * scale + ln(count), with spreads also spread |q|^2 scale^2 spreads[page], and per head their
// log-sum-exp.
//
// One pass over the mean keys. A warp takes 16 pages; its lanes read 16 bytes of key each, straight into the registers that the
// tensor cores take: the product does not care in which order dimensions are summed, so the queries are read in the order in
// which the keys arrive and nothing is shuffled.
#include "summary.cuh"

namespace floe {

constexpr int SCORE_WARPS = 8;

// Mirrored by `ops::sweep::scores::PageParams`.
struct PageParams {
    const void *q;             // [items, group, D] E
    const void *keys;          // mean keys [pages, D] E
    const float *log_count;    // [pages] ln of the tokens of the page, -inf = no page
    const uint32_t *first;     // [items] first page, a multiple of 16
    const uint32_t *end;       // [items] one past the last page
    float *scores;             // [item tiles, group, 16]
    float *part_lse;           // [items, blocks.x, group]
    uint32_t *arrived;         // [items] zero before and after
    float *lse;                // [items, group]
    float scale;
    uint32_t group, num_pages;
    const float *spreads;      // [pages] added to scores, times spread |q|^2 scale^2; null = nothing is
    float spread;
};

template <typename E, int D> __device__ __forceinline__ void page_scores(const PageParams &p) {
    static_assert(D % 32 == 0);
    constexpr int PARTS = D / 32; // 16-byte parts of a row that a lane reads
    __shared__ float warp_max[SCORE_WARPS][16], warp_sum[SCORE_WARPS][16];
    __shared__ uint32_t last;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
    const uint32_t item = blockIdx.y, first = p.first[item], end = min(p.end[item], p.num_pages);
    const uint32_t *q = reinterpret_cast<const uint32_t *>(static_cast<const E *>(p.q) + uint64_t(item) * p.group * D);
    uint32_t a[PARTS][2][4];
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int word = ((j * 4 + quarter) * 8 + 4 * h) / 2;
            a[j][h][0] = row < p.group ? q[row * D / 2 + word] : 0;
            a[j][h][1] = row + 8 < p.group ? q[(row + 8) * D / 2 + word] : 0;
            a[j][h][2] = row < p.group ? q[row * D / 2 + word + 1] : 0;
            a[j][h][3] = row + 8 < p.group ? q[(row + 8) * D / 2 + word + 1] : 0;
        }
    }
    float by_spread[2] = {0, 0};
    if (p.spreads) {
#pragma unroll
        for (int j = 0; j < PARTS; j++) {
#pragma unroll
            for (int w = 0; w < 8; w++) {
                const E *two = reinterpret_cast<const E *>(&a[j][w / 4][w % 4]);
                const float x = float(two[0]), y = float(two[1]);
                by_spread[w % 2] += x * x + y * y;
            }
        }
#pragma unroll
        for (int x = 0; x < 2; x++) by_spread[x] = quad_sum(by_spread[x]) * p.spread * p.scale * p.scale;
    }
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    const uint32_t tiles = end > first ? (end - first + 15) / 16 : 0;
    const uint4 *keys = static_cast<const uint4 *>(p.keys);
    float *scores = p.scores;
    // Neighbouring tiles go to different blocks, so that all of them have as many, or one more.
    for (uint32_t tile = warp * gridDim.x + blockIdx.x; tile < tiles; tile += gridDim.x * SCORE_WARPS) {
        const uint32_t page = first + tile * 16;
        uint4 b[2][PARTS];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t at = min(page + half * 8 + row, end - 1);
#pragma unroll
            for (int j = 0; j < PARTS; j++) b[half][j] = __ldcs(keys + uint64_t(at) * (D / 8) + j * 4 + quarter);
        }
        float s[2][4] = {};
#pragma unroll
        for (int j = 0; j < PARTS; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                mma<E>(s[half], a[j][0], b[half][j].x, b[half][j].y);
                mma<E>(s[half], a[j][1], b[half][j].z, b[half][j].w);
            }
        }
        // All under way before the first score is stored: of pages 2 quarter, the next, and eight further on.
        float extra[4], spread[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t at = page + e / 2 * 8 + quarter * 2 + e % 2;
            extra[e] = at < end ? p.log_count[at] : -INFINITY;
            spread[e] = p.spreads && at < end ? p.spreads[at] : 0;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t column = half * 8 + quarter * 2;
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float s0 = s[half][2 * x] * p.scale + (extra[2 * half] + by_spread[x] * spread[2 * half]);
                const float s1 = s[half][2 * x + 1] * p.scale + (extra[2 * half + 1] + by_spread[x] * spread[2 * half + 1]);
                if (row + 8 * x < p.group)
                    *reinterpret_cast<float2 *>(scores + score_at(first / 16 + tile, p.group, row + 8 * x, column)) = {s0, s1};
                const float to = fmaxf(max[x], fmaxf(s0, s1));
                if (to > -INFINITY) {
                    sum[x] = sum[x] * expf(max[x] - to) + expf(s0 - to) + expf(s1 - to);
                    max[x] = to;
                }
            }
        }
    }
#pragma unroll
    for (int x = 0; x < 2; x++) {
        const float high = quad_max(max[x]);
        const float total = quad_sum(high > -INFINITY ? sum[x] * expf(max[x] - high) : 0);
        if (quarter == 0) warp_max[warp][row + 8 * x] = high, warp_sum[warp][row + 8 * x] = total;
    }
    __syncthreads();
    if (threadIdx.x < p.group) {
        const int g = threadIdx.x;
        float high = -INFINITY, total = 0;
        for (int w = 0; w < SCORE_WARPS; w++) high = fmaxf(high, warp_max[w][g]);
        for (int w = 0; w < SCORE_WARPS; w++) total += high > -INFINITY ? warp_sum[w][g] * expf(warp_max[w][g] - high) : 0;
        p.part_lse[(uint64_t(item) * gridDim.x + blockIdx.x) * p.group + g] = high > -INFINITY ? high + logf(total) : -INFINITY;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(p.arrived + item, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    const float *parts = p.part_lse + uint64_t(item) * gridDim.x * p.group;
    for (int g = warp; g < int(p.group); g += SCORE_WARPS) {
        float high = -INFINITY, total = 0;
        for (uint32_t s = lane; s < gridDim.x; s += 32) high = fmaxf(high, __ldcg(parts + s * p.group + g));
        for (int x = 16; x; x /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, x));
        if (high > -INFINITY)
            for (uint32_t s = lane; s < gridDim.x; s += 32) total += expf(__ldcg(parts + s * p.group + g) - high);
        for (int x = 16; x; x /= 2) total += __shfl_xor_sync(~0u, total, x);
        if (lane == 0) p.lse[item * p.group + g] = high > -INFINITY ? high + logf(total) : -INFINITY;
    }
}

} // namespace floe

#define PAGE_SCORES(TYPE, SUFFIX, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(floe::SCORE_WARPS * 32)                                                      \
        page_scores_##SUFFIX##_d##D(const __grid_constant__ floe::PageParams p) {                                            \
        const floe::Timeline timeline(floe::Work::Scan);                                                                      \
        floe::wait_for_earlier();                                                                                             \
        floe::let_next_start();                                                                                               \
        floe::page_scores<TYPE, D>(p);                                                                                        \
    }

PAGE_SCORES(__nv_bfloat16, bf16, 64)
PAGE_SCORES(__nv_bfloat16, bf16, 96)
PAGE_SCORES(__nv_bfloat16, bf16, 128)
PAGE_SCORES(__nv_bfloat16, bf16, 256)
PAGE_SCORES(__half, f16, 64)
PAGE_SCORES(__half, f16, 96)
PAGE_SCORES(__half, f16, 128)
PAGE_SCORES(__half, f16, 256)
