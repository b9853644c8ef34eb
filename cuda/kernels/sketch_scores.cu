// Scores of all tokens from their key sketches, relative to the pages' log-sum-exp:
//   score = (page score - ln count) + key_scale * (R q).level - lse
//
// The codes are read as `floe_index::sketch` lays them out: a page's plane is D / 32 lines, line v holds for token t (lane t) the
// bits of coordinates 32 v to 32 v + 31. A level of b planes is sum_i 2^(b-1-i) * (+-1): planes are products of their own with
// +-1 as f16, the sum so far doubled before the next plane is added. Two bits that are 16 apart become one register of two
// elements by a shift and a mask; the queries lie in the order that this gives.
#include "summary.cuh"

namespace floe {

constexpr int SKETCH_WARPS = 8;

template <int D, int BITS> __device__ __forceinline__ void sketch_scores(const ScoreParams &p) {
    // A lane holds the bits of WORDS words of a token, SPAN coordinates of each: whole words where four lanes share the
    // coordinates evenly, else a byte of every word.
    constexpr bool WHOLE = D % 128 == 0;
    constexpr int LINES = D / 32, WORDS = WHOLE ? D / 128 : LINES, STEPS = WHOLE ? 8 : 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
    const uint32_t item = blockIdx.y, first = p.first[item], end = min(p.end[item], p.num_pages);
    const __half *q = static_cast<const __half *>(p.q) + uint64_t(item) * p.group * D;
    auto pair = [&](int head, int low, int high) -> uint32_t {
        if (head >= int(p.group)) return 0;
        const __half2 x = {q[head * D + low], q[head * D + high]};
        return *reinterpret_cast<const uint32_t *>(&x);
    };
    uint32_t a[WORDS][STEPS][4];
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                // Whole: bits j and j + 16 of the lane's word. Byte: bits j and j + 4 of the lane's byte.
                const int j = 2 * t + e;
                const int low = WHOLE ? (w * 4 + quarter) * 32 + j : w * 32 + quarter * 8 + j;
                const int high = low + (WHOLE ? 16 : 4);
                a[w][t][2 * e] = pair(row, low, high);
                a[w][t][2 * e + 1] = pair(row + 8, low, high);
            }
        }
    }
    float minus_lse[2];
    for (int x = 0; x < 2; x++) minus_lse[x] = row + 8 * x < p.group ? p.lse[item * p.group + row + 8 * x] : 0;
    const uint32_t *lines = static_cast<const uint32_t *>(p.keys);
    __half *scores = static_cast<__half *>(p.scores);
    // Everything that a page needs from memory, so that the next page's is under way while this one's is used.
    struct Page {
        uint32_t words[2][BITS][WORDS];
        uint32_t scales[2];
        float count, score[2];
        uint32_t mask;
    };
    auto read = [&](uint32_t page) {
        Page x;
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int bit = 0; bit < BITS; bit++) {
#pragma unroll
                for (int w = 0; w < WORDS; w++) {
                    const int line = WHOLE ? w * 4 + quarter : w;
                    x.words[half][bit][w] = __ldcs(lines + ((uint64_t(page) * BITS + bit) * LINES + line) * 16 + half * 8 + row);
                }
            }
            x.scales[half] = __ldcs(reinterpret_cast<const uint32_t *>(p.scales) + uint64_t(page) * 8 + half * 4 + quarter);
        }
        x.count = __ldg(p.log_count + page);
        x.mask = __ldg(p.masks + page);
#pragma unroll
        for (int h = 0; h < 2; h++)
            x.score[h] = row + 8 * h < p.group ? __ldg(p.page_scores + score_at(page / 16, p.group, row + 8 * h, page % 16)) : 0;
        return x;
    };
    const uint32_t stride = gridDim.x * SKETCH_WARPS;
    uint32_t page = first + blockIdx.x * SKETCH_WARPS + warp;
    if (page >= end) return;
    Page next = read(page);
    for (; page < end; page += stride) {
        const Page now = next;
        if (page + stride < end) next = read(page + stride);
        const uint32_t mask = now.count > -INFINITY ? now.mask : 0;
        float base[2];
#pragma unroll
        for (int x = 0; x < 2; x++) base[x] = now.score[x] - now.count - minus_lse[x];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Two sums, so that products need not wait for one another.
            float even[4] = {}, odd[4] = {};
#pragma unroll
            for (int bit = 0; bit < BITS; bit++) {
#pragma unroll
                for (int e = 0; e < 4; e++) even[e] *= 2, odd[e] *= 2;
#pragma unroll
                for (int w = 0; w < WORDS; w++) {
                    uint32_t word = now.words[half][bit][w];
                    // The byte's low nibble to bits 0 to 3, its high one to bits 16 to 19: the same two-bit step as for words.
                    if constexpr (!WHOLE) word = (word >> (quarter * 8) & 0xf) | (word >> (quarter * 8) & 0xf0) << 12;
#pragma unroll
                    for (int t = 0; t < STEPS; t++) {
                        const uint32_t b0 = ((word << (15 - 2 * t)) & 0x80008000u) ^ 0xbc00bc00u;
                        const uint32_t b1 = ((word << (14 - 2 * t)) & 0x80008000u) ^ 0xbc00bc00u;
                        mma<__half>(t % 2 ? odd : even, a[w][t], b0, b1);
                    }
                }
            }
            const int column = half * 8 + quarter * 2;
            const __half2 scales = *reinterpret_cast<const __half2 *>(&now.scales[half]);
            const float k0 = __low2float(scales), k1 = __high2float(scales);
#pragma unroll
            for (int x = 0; x < 2; x++) {
                if (row + 8 * x >= p.group) continue;
                // Beyond what f16 holds a score is as good as its largest.
                float s0 = fminf(base[x] + k0 * (even[2 * x] + odd[2 * x]), 65504.f), s1 = fminf(base[x] + k1 * (even[2 * x + 1] + odd[2 * x + 1]), 65504.f);
                if (!(mask >> column & 1)) s0 = -INFINITY;
                if (!(mask >> (column + 1) & 1)) s1 = -INFINITY;
                *reinterpret_cast<__half2 *>(scores + score_at(page, p.group, row + 8 * x, column)) = __floats2half2_rn(s0, s1);
            }
        }
    }
}

} // namespace floe

#define SKETCH_SCORES(D, BITS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(floe::SKETCH_WARPS * 32, D == 256 ? 1 : 2) \
        sketch_scores_k##BITS##_d##D(const __grid_constant__ floe::ScoreParams p) {                                           \
        floe::sketch_scores<D, BITS>(p);                                                                                      \
    }
#define SKETCH_SCORES_ALL(BITS)                                                                                               \
    SKETCH_SCORES(64, BITS) SKETCH_SCORES(96, BITS) SKETCH_SCORES(128, BITS) SKETCH_SCORES(256, BITS)

SKETCH_SCORES_ALL(1)
SKETCH_SCORES_ALL(2)
SKETCH_SCORES_ALL(4)
