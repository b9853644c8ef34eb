// The state of what was not selected, by the pages' mean values: weight of a page = sum of e^(score - lse) of its units.
//
// Selected units have score -inf by now and weigh nothing. Weights are relative to the known log-sum-exp of all pages, so no
// running maximum is needed. A block takes 128 pages at a time, as many blocks as run at once: the last block of an item
// joins their partial states in order, and that took most of the time with a block for every 128 pages (152 us at 64 K pages).
#include "summary.cuh"

namespace floe {

constexpr int TAIL_THREADS = 256, TAIL_WARPS = 8, TAIL_PAGES = 128;

// Mirrored by `ops::page_tail::TailParams`.
struct TailParams {
    const void *scores;    // T, tiles [group, 16]: f32 per page, or f16 per token (relative to lse already)
    const void *values;    // mean values [pages, D] E
    const float *lse;      // [items, group]
    const uint32_t *first; // [items] first page, a multiple of 16
    const uint32_t *end;   // [items]
    float *part_out;       // [items, blocks.x, group, D]
    float *part_sum;       // [items, blocks.x, group]
    uint32_t *arrived;     // [items] zero before and after
    float *out;            // [items, group, D]
    float *out_lse;        // [items, group]
    uint32_t group, num_pages;
};

template <typename E> __device__ __forceinline__ float2 wide2(uint32_t x);
template <> __device__ __forceinline__ float2 wide2<__nv_bfloat16>(uint32_t x) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
template <> __device__ __forceinline__ float2 wide2<__half>(uint32_t x) { return __half22float2(*reinterpret_cast<__half2 *>(&x)); }

// Weight of page `page` for head `g`.
__device__ __forceinline__ float page_weight(const TailParams &p, const float *scores, uint32_t page, uint32_t g, float lse) {
    const float s = scores[score_at(page / 16, p.group, g, page % 16)];
    return s > -INFINITY ? expf(s - lse) : 0;
}

__device__ __forceinline__ float page_weight(const TailParams &p, const __half *scores, uint32_t page, uint32_t g, float) {
    const uint4 *at = reinterpret_cast<const uint4 *>(scores + score_at(page, p.group, g, 0));
    const uint4 x[2] = {at[0], at[1]};
    const uint32_t *words = reinterpret_cast<const uint32_t *>(x);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float2 s = wide2<__half>(words[i]);
        sum += expf(s.x) + expf(s.y);
    }
    return sum;
}

template <typename E, int D, int GROUP, typename T> __device__ __forceinline__ void page_tail(const TailParams &p) {
    constexpr int PIECES = D / 8, SPAN = TAIL_THREADS / PIECES; // 16-byte pieces of a row, rows at a time
    constexpr int TURNS = (TAIL_PAGES + SPAN - 1) / SPAN, AT_ONCE = 4;
    __shared__ float weights[TAIL_PAGES][GROUP];
    __shared__ __align__(16) float joined[GROUP * D];
    __shared__ float sums[GROUP];
    __shared__ uint32_t last;
    const uint32_t item = blockIdx.y, first = p.first[item], end = min(p.end[item], p.num_pages);
    const int piece = threadIdx.x % PIECES, part = threadIdx.x / PIECES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint4 *values = static_cast<const uint4 *>(p.values);
    const T *scores = static_cast<const T *>(p.scores);
    for (int at = threadIdx.x; at < GROUP * D; at += TAIL_THREADS) joined[at] = 0;
    float acc[GROUP][8] = {};
    float weight_sum[(GROUP + TAIL_WARPS - 1) / TAIL_WARPS] = {};
    for (uint32_t begin = first + blockIdx.x * TAIL_PAGES; begin < end; begin += gridDim.x * TAIL_PAGES) {
        const uint32_t stop = min(begin + TAIL_PAGES, end);
        uint4 v[AT_ONCE] = {};
        auto read = [&](int turn) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (part < SPAN) v[i] = __ldcs(values + uint64_t(min(begin + (turn + i) * SPAN + part, stop - 1)) * PIECES + piece);
        };
        // Values are under way while the weights are made.
        read(0);
        for (int at = threadIdx.x; at < TAIL_PAGES * GROUP; at += TAIL_THREADS) {
            // Neighbouring threads take neighbouring pages of one head: their scores are neighbours.
            const uint32_t g = at / TAIL_PAGES, page = begin + at % TAIL_PAGES;
            weights[at % TAIL_PAGES][g] = g < p.group && page < stop ? page_weight(p, scores, page, g, p.lse[item * p.group + g]) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < int(sizeof(weight_sum) / sizeof(float)); i++) {
            const int g = warp + i * TAIL_WARPS;
            if (g < GROUP)
                for (int at = lane; at < TAIL_PAGES; at += 32) weight_sum[i] += weights[at][g];
        }
#pragma unroll 1
        for (int turn = 0; turn < TURNS; turn += AT_ONCE) {
            if (turn > 0) read(turn);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int row = (turn + i) * SPAN + part;
                if (part >= SPAN || row >= TAIL_PAGES) continue;
                const float2 x[4] = {wide2<E>(v[i].x), wide2<E>(v[i].y), wide2<E>(v[i].z), wide2<E>(v[i].w)};
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    const float w = weights[row][g];
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[g][2 * e] += w * x[e].x, acc[g][2 * e + 1] += w * x[e].y;
                }
            }
        }
        __syncthreads();
    }
    __syncthreads();
    // Rows of a warp by shuffles where they share it, then parts in turn: the sum has one order.
    constexpr bool PAIRED = PIECES == 16;
    if constexpr (PAIRED) {
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
#pragma unroll
            for (int e = 0; e < 8; e++) acc[g][e] += __shfl_xor_sync(~0u, acc[g][e], 16);
        }
    }
    for (int turn = 0; turn < SPAN; turn += PAIRED ? 2 : 1) {
        if (part == turn) {
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                if (g >= int(p.group)) break;
                float4 *to = reinterpret_cast<float4 *>(joined + g * D + 8 * piece);
                to[0] = {to[0].x + acc[g][0], to[0].y + acc[g][1], to[0].z + acc[g][2], to[0].w + acc[g][3]};
                to[1] = {to[1].x + acc[g][4], to[1].y + acc[g][5], to[1].z + acc[g][6], to[1].w + acc[g][7]};
            }
        }
        __syncthreads();
    }
    const uint64_t state = uint64_t(item) * gridDim.x + blockIdx.x;
#pragma unroll
    for (int i = 0; i < int(sizeof(weight_sum) / sizeof(float)); i++) {
        float sum = weight_sum[i];
        for (int x = 16; x; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
        const int g = warp + i * TAIL_WARPS;
        if (lane == 0 && g < int(p.group)) p.part_sum[state * p.group + g] = sum;
    }
    for (int at = threadIdx.x; at < int(p.group) * D; at += TAIL_THREADS) p.part_out[state * p.group * D + at] = joined[at];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(p.arrived + item, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    const uint64_t start = uint64_t(item) * gridDim.x;
    for (int g = warp; g < int(p.group); g += TAIL_WARPS) {
        float sum = 0;
        for (uint32_t s = lane; s < gridDim.x; s += 32) sum += __ldcg(p.part_sum + (start + s) * p.group + g);
        for (int x = 16; x; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
        if (lane == 0) {
            sums[g] = sum;
            p.out_lse[item * p.group + g] = sum > 0 ? p.lse[item * p.group + g] + logf(sum) : -INFINITY;
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < int(p.group) * D; at += TAIL_THREADS) {
        float x = 0;
#pragma unroll 16
        for (uint32_t s = 0; s < gridDim.x; s++) x += __ldcg(p.part_out + (start + s) * p.group * D + at);
        const float sum = sums[at / D];
        p.out[uint64_t(item) * p.group * D + at] = sum > 0 ? x / sum : 0;
    }
}

} // namespace floe

#define PAGE_TAIL(TYPE, SUFFIX, D, G, T, UNIT)                                                                                \
    extern "C" __global__ void __launch_bounds__(floe::TAIL_THREADS)                                                          \
        page_tail_##UNIT##_##SUFFIX##_d##D##_g##G(const __grid_constant__ floe::TailParams p) {                               \
        floe::page_tail<TYPE, D, G, T>(p);                                                                                    \
    }
#define PAGE_TAIL_ALL(D)                                                                                                      \
    PAGE_TAIL(__nv_bfloat16, bf16, D, 8, float, pages) PAGE_TAIL(__nv_bfloat16, bf16, D, 8, __half, tokens)                   \
    PAGE_TAIL(__nv_bfloat16, bf16, D, 16, float, pages) PAGE_TAIL(__nv_bfloat16, bf16, D, 16, __half, tokens)                 \
    PAGE_TAIL(__half, f16, D, 8, float, pages) PAGE_TAIL(__half, f16, D, 8, __half, tokens)                                   \
    PAGE_TAIL(__half, f16, D, 16, float, pages) PAGE_TAIL(__half, f16, D, 16, __half, tokens)

PAGE_TAIL_ALL(64)
PAGE_TAIL_ALL(96)
PAGE_TAIL_ALL(128)
PAGE_TAIL_ALL(256)
