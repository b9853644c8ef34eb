// Scores of all pages and of all their tokens, in one pass over mean keys and key codes:
//   page   score    = q.mean_key * scale
//   token  residual = key_scale * (R q).level * scale + spread * |q|^2 scale^2 key_scale^2
// and per head the log-sum-exp of score + residual over all tokens that count.
//
// Codes go to the tensor cores as they lie in memory: a product of bits takes the token's plane of codes and a plane of the rotated
// query, which is rounded to eight bits a coordinate. 65536 pages cost 32 instructions each to turn bits into bytes, 64 to turn
// them into f16, none this way. A warp takes 16 pages at a time; their mean keys are 16 rows of an ordinary product, then the
// codes of two pages at a time are two tiles of 16 tokens. Every warp has an equal share of an item's pairs of pages, in one piece:
// shares of whole tiles would let most warps wait for a few that have one tile more.
#pragma once
#include "bits.cuh"
#include "rotate.cuh"
#include "summary.cuh"

namespace floe {

constexpr int SCAN_WARPS = 8;

// Mirrored by `ops::sweep::scores::SketchParams`.
struct SketchParams {
    const void *q;             // [items, group, D] E
    const void *keys;          // mean keys [pages, D] E
    const uint32_t *lines;     // key codes [pages, bits, D / 32, 16]
    const __half *scales;      // [pages, 16]
    const uint16_t *masks;     // [pages] bit t: token t counts; 0 = no page
    const uint32_t *first;     // [items] first page, a multiple of 16
    const uint32_t *end;       // [items] one past the last page
    float *scores;             // [pages / 16, group, 16]; -inf = no page
    __half *residuals;         // [pages, group, 16]; -inf = does not count
    float *part_lse;           // [items, blocks.x, group]
    uint32_t *arrived;         // [items, 2] zero before and after
    float *lse;                // [items, group]
    RotationParams rotation;
    float scale, spread;
    uint32_t group, num_pages;
};

// Running sum of e^x, of one lane and head.
struct Mass {
    float max = -INFINITY, sum = 0;

    __device__ __forceinline__ void add(const Mass &other) {
        const float to = fmaxf(max, other.max);
        if (to == -INFINITY) return;
        sum = sum * exp2_approx((max - to) * LOG2E) + other.sum * exp2_approx((other.max - to) * LOG2E);
        max = to;
    }
};

// Heads of a lane: 1 where a block has up to four heads, 2 up to eight. With one, columns 2 q and 2 q + 1 of a product are the
// low and the high four planes of head q's query; with two they are heads 2 q and 2 q + 1, and every plane is a product of its own.
template <int HEADS> constexpr int products_of() { return HEADS == 1 ? 4 : 8; }

template <typename E, int D, int BITS, int HEADS> struct SketchScan {
    static constexpr int LINES = D / 32, DEEP = D == 256 ? 2 : 1; // words of a token's plane that a lane holds
    static constexpr int PRODUCTS = products_of<HEADS>(), WIDTH = 4 * HEADS;
    static constexpr int PARTS = D / 32;                          // 16-byte parts of a mean key that a lane reads
    // Pairs under way beside the one in use: as registers allow.
    static constexpr int AHEAD = BITS * DEEP * HEADS == 1 ? 4 : BITS == 4 || BITS * DEEP * HEADS > 4 ? 1 : 2;

    // What two pages need: lane (g, q) has line q of tokens 4 (g % 4) to + 3 of page g / 4.
    struct Pair {
        uint4 words[BITS][DEEP];
        uint2 scales;
        uint32_t mask;
    };

    const SketchParams &p;
    int g, q, lane;

    __device__ __forceinline__ Pair read(uint32_t page, uint32_t end) const {
        Pair x;
        const uint32_t at = page + g / 4;
#pragma unroll
        for (int bit = 0; bit < BITS; bit++) {
#pragma unroll
            for (int deep = 0; deep < DEEP; deep++) {
                const int line = q + 4 * deep;
                x.words[bit][deep] = uint4{0, 0, 0, 0};
                if (LINES % 4 == 0 || line < LINES)
                    x.words[bit][deep] = __ldcs(reinterpret_cast<const uint4 *>(p.lines) + ((uint64_t(at) * BITS + bit) * LINES + line) * 4 + g % 4);
            }
        }
        x.scales = __ldcs(reinterpret_cast<const uint2 *>(p.scales) + uint64_t(at) * 4 + g % 4);
        x.mask = at < end ? uint32_t(p.masks[at]) >> (4 * (g % 4)) & 0xf : 0;
        return x;
    }

    // Sums of unit * bit for the tokens of rows g (index 0) and g + 8 (1): [token][head].
    __device__ __forceinline__ void sums(int (&to)[2][HEADS], const uint32_t (&a)[DEEP][2], const uint32_t (&b)[PRODUCTS][DEEP]) const {
        int c[PRODUCTS][4] = {};
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
            if constexpr (DEEP == 2) count_bits(c[m], a[0][0], a[0][1], a[1][0], a[1][1], b[m][0], b[m][1]);
            else count_bits(c[m], a[0][0], a[0][1], b[m][0]);
        }
#pragma unroll
        for (int token = 0; token < 2; token++) {
            if constexpr (HEADS == 1) {
                int low = c[3][2 * token], high = -c[3][2 * token + 1];
                // The top plane of an eight-bit number counts -128.
                high = 2 * high;
                low = 2 * low + c[2][2 * token], high = high + c[2][2 * token + 1];
                high = 2 * high;
                low = 2 * low + c[1][2 * token], high = high + c[1][2 * token + 1];
                high = 2 * high;
                low = 2 * low + c[0][2 * token], high = high + c[0][2 * token + 1];
                to[token][0] = low + 16 * high;
            } else {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    int x = -c[7][2 * token + h];
#pragma unroll
                    for (int m = 6; m >= 0; m--) x = 2 * x + c[m][2 * token + h];
                    to[token][h] = x;
                }
            }
        }
    }

    __device__ void run();
};

template <typename E, int D, int BITS, int HEADS> __device__ void SketchScan<E, D, BITS, HEADS>::run() {
    __shared__ uint32_t planes[WIDTH][8][LINES];
    __shared__ float steps[WIDTH], spreads[WIDTH], scratch[SCAN_WARPS][D];
    __shared__ int unit_sums[WIDTH];
    __shared__ Mass warp_mass[SCAN_WARPS][WIDTH];
    __shared__ uint4 query[PARTS][32]; // fragments, once a tile: registers are short
    const int warp = threadIdx.x / 32;
    const uint32_t item = blockIdx.y, head0 = blockIdx.z * 8;
    const uint32_t first = p.first[item], end = min(p.end[item], p.num_pages);
    // Pages up to the next multiple of 16 get scores too.
    const uint32_t pairs = end > first ? (end - first + 15) / 16 * 8 : 0, all_warps = gridDim.x * SCAN_WARPS;
    const uint32_t of_all = blockIdx.x * SCAN_WARPS + warp;
    uint32_t page = first + 2 * uint32_t(uint64_t(pairs) * of_all / all_warps);
    const uint32_t stop = first + 2 * uint32_t(uint64_t(pairs) * (of_all + 1) / all_warps);
    // The first tile is under way before the queries are read.
    const uint4 *keys = static_cast<const uint4 *>(p.keys);
    uint4 rows[2][PARTS];
    auto read_keys = [&](uint32_t page) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Beyond the share any row will do.
            const uint32_t at = min(page + half * 8 + g, stop - 1);
#pragma unroll
            for (int j = 0; j < PARTS; j++) rows[half][j] = __ldcs(keys + uint64_t(at) * (D / 8) + j * 4 + q);
        }
    };
    Pair pair[AHEAD];
    if (page < stop) {
        read_keys(page);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) pair[i] = read(min(page + 2 * i, stop - 2), end);
    }
    const E *queries = static_cast<const E *>(p.q) + (uint64_t(item) * p.group + head0) * D;
    const int heads = min(int(p.group - head0), WIDTH);
    for (int head = warp; head < WIDTH; head += SCAN_WARPS) {
        // A warp rotates a head's query, rounds it and takes its planes apart.
        float x[D / 32], most = 0, square = 0;
#pragma unroll
        for (int i = 0; i < D / 32; i++) x[i] = head < heads ? float(queries[head * D + i * 32 + lane]) * p.scale : 0;
        rotate<D>(x, p.rotation, scratch[warp]);
#pragma unroll
        for (int i = 0; i < D / 32; i++) most = fmaxf(most, fabsf(x[i])), square += x[i] * x[i];
        for (int d = 16; d; d /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
            square += __shfl_xor_sync(~0u, square, d);
        }
        const float inverse = most > 1e-30f ? 127.f / most : 0.f;
        int total = 0;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const int unit = __float2int_rn(x[i] * inverse);
            total += unit;
            uint32_t mine = 0;
#pragma unroll
            for (int bit = 0; bit < 8; bit++) {
                const uint32_t word = __ballot_sync(~0u, unit >> bit & 1);
                if (lane == bit) mine = word;
            }
            if (lane < 8) planes[head][lane][i] = mine;
        }
        for (int d = 16; d; d /= 2) total += __shfl_xor_sync(~0u, total, d);
        if (lane == 0) steps[head] = most * (1.f / 127.f), spreads[head] = p.spread * square, unit_sums[head] = total;
    }
    // Columns of the products: of a head's query for page scores, of its planes for tokens.
    const int column = HEADS == 1 ? g / 2 : g;
    for (int j = warp; j < PARTS; j += SCAN_WARPS) {
        const bool there = column < heads && (HEADS == 2 || g % 2 == 0);
        const uint4 *words = reinterpret_cast<const uint4 *>(queries + column * D);
        query[j][lane] = there ? words[j * 4 + q] : uint4{0, 0, 0, 0};
    }
    __syncthreads();
    uint32_t b[PRODUCTS][DEEP];
#pragma unroll
    for (int m = 0; m < PRODUCTS; m++) {
#pragma unroll
        for (int deep = 0; deep < DEEP; deep++) {
            const int line = q + 4 * deep, plane = HEADS == 1 ? m + 4 * (g % 2) : m;
            b[m][deep] = LINES % 4 == 0 || line < LINES ? planes[column][plane][line] : 0;
        }
    }
    float step[HEADS], spread[HEADS];
    int offset[HEADS];
    Mass mass[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        // The least code of a token is the level -(2^bits - 1).
        step[h] = steps[q * HEADS + h], spread[h] = spreads[q * HEADS + h];
        offset[h] = ((1 << BITS) - 1) * unit_sums[q * HEADS + h];
    }
    for (; page < stop; page += 16) {
        // c[2 x + h]: page g + 8 x, head h of the lane.
        float c[4] = {};
#pragma unroll
        for (int j = 0; j < PARTS; j++) {
            const uint32_t a0[4] = {rows[0][j].x, rows[1][j].x, rows[0][j].y, rows[1][j].y};
            const uint32_t a1[4] = {rows[0][j].z, rows[1][j].z, rows[0][j].w, rows[1][j].w};
            const uint4 x = query[j][lane];
            mma<E>(c, a0, x.x, x.y);
            mma<E>(c, a1, x.z, x.w);
        }
        if (page + 16 < stop) read_keys(page + 16);
        float base[2][HEADS];
#pragma unroll
        for (int x = 0; x < 2; x++) {
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const uint32_t at = page + g + 8 * x;
                base[x][h] = min_nan(c[2 * x + h] * p.scale, 3.4028234e38f);
                const bool none = at >= end || p.masks[min(at, p.num_pages - 1)] == 0;
                if (at < stop && int(q * HEADS + h) < heads)
                    p.scores[score_at(at / 16, p.group, head0 + q * HEADS + h, at % 16)] = none ? -INFINITY : base[x][h];
            }
        }
#pragma unroll 1
        for (int ahead = 0; ahead < 8; ahead += AHEAD)
#pragma unroll
        for (int slot = 0; slot < AHEAD; slot++) {
            const int i = ahead + slot;
            if (page + 2 * i >= stop) break;
            Pair &now = pair[slot];
            float score[4][HEADS];
            {
                int total[4][HEADS] = {};
#pragma unroll
                for (int bit = 0; bit < BITS; bit++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint32_t a[DEEP][2];
#pragma unroll
                        for (int deep = 0; deep < DEEP; deep++) {
                            const uint4 &w = now.words[bit][deep];
                            a[deep][0] = half ? w.z : w.x, a[deep][1] = half ? w.w : w.y;
                        }
                        int s[2][HEADS];
                        sums(s, a, b);
#pragma unroll
                        for (int t = 0; t < 2; t++) {
#pragma unroll
                            for (int h = 0; h < HEADS; h++) total[2 * half + t][h] = 2 * total[2 * half + t][h] + s[t][h];
                        }
                    }
                }
                const __half2 low = *reinterpret_cast<const __half2 *>(&now.scales.x), high = *reinterpret_cast<const __half2 *>(&now.scales.y);
                const float k[4] = {__low2float(low), __high2float(low), __low2float(high), __high2float(high)};
#pragma unroll
                for (int t = 0; t < 4; t++) {
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        const float level = step[h] * float(2 * total[t][h] - offset[h]);
                        // Beyond what f16 holds a score is as good as its largest.
                        const float r = fminf(k[t] * (level + spread[h] * k[t]), 65504.f);
                        score[t][h] = now.mask >> t & 1 ? r : -INFINITY;
                    }
                }
            }
            const uint32_t next = page + 2 * (i + AHEAD);
            if (next < stop) now = read(next, end);
            const uint32_t at = page + 2 * i + g / 4;
            const int from = ((2 * i + g / 4) % 8) * 4 + q;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float of_page = __shfl_sync(~0u, i < 4 ? base[0][h] : base[1][h], from);
                const __half2 low = __floats2half2_rn(score[0][h], score[1][h]), high = __floats2half2_rn(score[2][h], score[3][h]);
                if (int(q * HEADS + h) < heads) {
                    const uint2 both = {*reinterpret_cast<const uint32_t *>(&low), *reinterpret_cast<const uint32_t *>(&high)};
                    *reinterpret_cast<uint2 *>(p.residuals + (uint64_t(at) * p.group + head0 + q * HEADS + h) * 16 + 4 * (g % 4)) = both;
                }
                const float best = fmaxf(fmaxf(score[0][h], score[1][h]), fmaxf(score[2][h], score[3][h]));
                if (best == -INFINITY) continue;
                Mass four{of_page + best, 0};
#pragma unroll
                for (int t = 0; t < 4; t++) four.sum += exp2_approx((score[t][h] - best) * LOG2E);
                mass[h].add(four);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) {
            const Mass other{__shfl_xor_sync(~0u, mass[h].max, d), __shfl_xor_sync(~0u, mass[h].sum, d)};
            mass[h].add(other);
        }
        if (g == 0) warp_mass[warp][q * HEADS + h] = mass[h];
    }
    __syncthreads();
    if (int(threadIdx.x) < heads) {
        Mass all = warp_mass[0][threadIdx.x];
        for (int w = 1; w < SCAN_WARPS; w++) all.add(warp_mass[w][threadIdx.x]);
        p.part_lse[(uint64_t(item) * gridDim.x + blockIdx.x) * p.group + head0 + threadIdx.x] =
            all.max > -INFINITY ? all.max + logf(all.sum) : -INFINITY;
    }
    if (!last_to_arrive(p.arrived + 2 * item + blockIdx.z, gridDim.x)) return;
    const float *parts = p.part_lse + uint64_t(item) * gridDim.x * p.group + head0;
    for (int head = warp; head < heads; head += SCAN_WARPS) {
        float high = -INFINITY, total = 0;
        for (uint32_t s = lane; s < gridDim.x; s += 32) high = fmaxf(high, __ldcg(parts + s * p.group + head));
        for (int x = 16; x; x /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, x));
        if (high > -INFINITY)
            for (uint32_t s = lane; s < gridDim.x; s += 32) total += expf(__ldcg(parts + s * p.group + head) - high);
        for (int x = 16; x; x /= 2) total += __shfl_xor_sync(~0u, total, x);
        if (lane == 0) p.lse[item * p.group + head0 + head] = high > -INFINITY ? high + logf(total) : -INFINITY;
    }
}

#define SKETCH_SCAN(TYPE, SUFFIX, D, BITS, HEADS)                                                                             \
    extern "C" __global__ void __launch_bounds__(floe::SCAN_WARPS * 32, (D) == 256 || (HEADS) == 2 ? 1 : 2)                             \
        sketch_scan_k##BITS##_##SUFFIX##_d##D##_h##HEADS(const __grid_constant__ floe::SketchParams p) {                      \
        const floe::Timeline timeline(floe::Work::Scan);                                                                      \
        floe::wait_for_earlier();                                                                                             \
        floe::let_next_start();                                                                                               \
        const int lane = threadIdx.x % 32;                                                                                    \
        floe::SketchScan<TYPE, D, BITS, HEADS> scan{p, lane / 4, lane % 4, lane};                                             \
        scan.run();                                                                                                           \
    }
#define SKETCH_SCAN_BITS(TYPE, SUFFIX, D, HEADS)                                                                              \
    SKETCH_SCAN(TYPE, SUFFIX, D, 1, HEADS) SKETCH_SCAN(TYPE, SUFFIX, D, 2, HEADS) SKETCH_SCAN(TYPE, SUFFIX, D, 4, HEADS)
#define SKETCH_SCAN_ALL(TYPE, SUFFIX, HEADS)                                                                                  \
    SKETCH_SCAN_BITS(TYPE, SUFFIX, 64, HEADS) SKETCH_SCAN_BITS(TYPE, SUFFIX, 96, HEADS)                                       \
    SKETCH_SCAN_BITS(TYPE, SUFFIX, 128, HEADS) SKETCH_SCAN_BITS(TYPE, SUFFIX, 256, HEADS)

} // namespace floe
