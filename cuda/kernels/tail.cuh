// The state of what was not selected, in one pass over mean values and value codes:
//   sum over pages  W_page * mean_value        W_page = sum of its units' weights, weight = e^(score - lse)
//   sum over tokens weight * value_scale * R^-1 level
//
// Selected units have score -inf by now and weigh nothing. Weights are relative to a known log-sum-exp, so no running maximum is
// needed. A warp takes 16 pages at a time: their mean values are one k-step of an ordinary product (weights as a high and a low
// part, so that they keep 16 bits and more), their value codes are 256 rows of a product of bits: weights times value scales are
// rounded to eight bits relative to the largest of the 256, and taken apart into planes. Everything is copied to shared memory
// one tile ahead. The last block of an item joins the partial states in order.
#pragma once
#include "bits.cuh"
#include "rotate.cuh"
#include "summary.cuh"

namespace floe {

// What weighs: a page's own score (with ln count), or its tokens with 0, 1 or 2 bits of value.
enum class Unit { Page = -1, Token0 = 0, Token1 = 1, Token2 = 2 };

// Mirrored by `ops::sweep::tail::TailParams`.
struct TailParams {
    const float *scores;      // [pages / 16, group, 16]
    const __half *residuals;  // tokens: [pages, group, 16]
    const float *lse;         // [items, group]
    const void *values;       // mean values [pages, D] E
    const uint32_t *lines;    // value codes [pages, bits, D / 32, 16]
    const __half *scales;     // [pages, 16]
    const uint32_t *first;    // [items] first page, a multiple of 16
    const uint32_t *end;      // [items]
    float *part_out;          // [items, blocks.x, group, D]
    float *part_sum;          // [items, blocks.x, group]
    uint32_t *arrived;        // [items, 2] zero before and after
    float *out;               // [items, group, D]
    float *out_lse;           // [items, group]
    RotationParams rotation;
    uint32_t group, num_pages;
};

// Of a weight that a product takes: keeps the low part out of f16's smallest numbers. Weights sum to at most 1.
constexpr float WEIGHT_UNIT = 4096.f;
constexpr int TAIL_STAGES = 2;
// A block of attention, 128 threads of 188 registers, fits beside 256 threads of 160.
constexpr int tail_registers(int d, Unit unit, int heads) { return d <= 128 && heads == 1 && unit != Unit::Token2 ? 160 : 255; }

template <typename E> __device__ __forceinline__ float rounded(float x);
template <> __device__ __forceinline__ float rounded<__nv_bfloat16>(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
template <> __device__ __forceinline__ float rounded<__half>(float x) { return __half2float(__float2half_rn(x)); }

template <typename E, int D, Unit U, int HEADS> struct Tail {
    static constexpr int WIDTH = 4 * HEADS;              // heads of a block
    static constexpr int BITS = U == Unit::Page || U == Unit::Token0 ? 0 : int(U);
    static constexpr bool TOKENS = U != Unit::Page;
    static constexpr int PIECES = D / 8, ROW = D == 96 ? 16 : PIECES; // 16-byte pieces of a row or plane, places for them
    static constexpr int TILES = D / 16, SLABS = (D + 63) / 64;
    static constexpr int CODE_TILES = 4 * SLABS;
    // Shared memory of a stage, in 16-byte pieces.
    static constexpr int AT_CODES = 16 * ROW, AT_RESIDUALS = AT_CODES + BITS * 16 * ROW;
    static constexpr int AT_SCORES = AT_RESIDUALS + (TOKENS ? 16 * WIDTH * 2 : 0), AT_SCALES = AT_SCORES + WIDTH * 4;
    static constexpr int STAGE = AT_SCALES + (BITS ? 32 : 0);
    // Beside the stages of a warp: page weights [16, WIDTH] f32, planes of weights [16, WIDTH] 16 bytes.
    static constexpr int AT_WEIGHTS = TAIL_STAGES * STAGE, AT_PLANES = AT_WEIGHTS + 4 * WIDTH;
    static constexpr int WARP = AT_PLANES + (BITS ? 16 * WIDTH : 0);
    static constexpr int JOIN = 2 * WIDTH * D / 4;       // what a warp hands over at the end
    static_assert(JOIN <= WARP);

    const TailParams &p;
    uint4 *mine;
    uint32_t head0;
    int heads, lane, g, q;

    // Pieces of a row are moved about so that rows an even number apart fall into different banks.
    __device__ __forceinline__ static int place(int row, int piece) { return row * ROW + (piece ^ (row & 6)); }

    // Values and codes, which were there before the units were scored and selected.
    __device__ __forceinline__ void load_values(uint32_t page, int stage) const {
        const uint32_t to = shared_address(mine + stage * STAGE);
        const uint4 *values = static_cast<const uint4 *>(p.values) + uint64_t(page) * PIECES;
#pragma unroll
        for (int i = 0; i < 16 * PIECES / 32; i++) {
            const int at = i * 32 + lane;
            copy16_async(to + place(at / PIECES, at % PIECES) * 16, values + at, 16);
        }
        if constexpr (BITS > 0) {
            // A plane of codes has as many pieces as a row of values.
            const uint4 *lines = reinterpret_cast<const uint4 *>(p.lines) + uint64_t(page) * BITS * PIECES;
#pragma unroll
            for (int i = 0; i < 16 * BITS * PIECES / 32; i++) {
                const int at = i * 32 + lane, row = at / (BITS * PIECES), bit = at / PIECES % BITS;
                copy16_async(to + (AT_CODES + bit * 16 * ROW + place(row, at % PIECES)) * 16, lines + at, 16);
            }
            copy16_async(to + (AT_SCALES + lane) * 16, reinterpret_cast<const uint4 *>(p.scales) + uint64_t(page) * 2 + lane, 16);
        }
    }

    __device__ __forceinline__ void load_scores(uint32_t page, int stage) const {
        const uint32_t to = shared_address(mine + stage * STAGE);
        if constexpr (TOKENS) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const int at = i * 32 + lane, row = at / (2 * WIDTH), piece = at % (2 * WIDTH);
                const bool there = piece < 2 * heads;
                const __half *from = p.residuals + (uint64_t(page + row) * p.group + head0) * 16 + (there ? piece * 8 : 0);
                copy16_async(to + (AT_RESIDUALS + at) * 16, from, there ? 16 : 0);
            }
        }
        if (lane < 4 * WIDTH) {
            const bool there = lane < 4 * heads;
            const float *from = p.scores + (uint64_t(page / 16) * p.group + head0) * 16 + (there ? lane * 4 : 0);
            copy16_async(to + (AT_SCORES + lane) * 16, from, there ? 16 : 0);
        }
    }

    __device__ void run(uint4 *shared);
};

template <typename E, int D, Unit U, int HEADS> __device__ void Tail<E, D, U, HEADS>::run(uint4 *shared) {
    __shared__ float sums[WIDTH], offsets[WIDTH], warp_sums[16][WIDTH], warp_offsets[16][WIDTH];
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    mine = shared + warp * WARP;
    const uint32_t item = blockIdx.y, first = p.first[item], end = min(p.end[item], p.num_pages);
    const uint32_t tiles = end > first ? (end - first + 15) / 16 : 0, stride = gridDim.x * warps;
    // Neighbouring tiles go to different blocks, so that all of them have as many, or a few more.
    uint32_t tile = warp * gridDim.x + blockIdx.x;
    if (tile < tiles) load_values(first + tile * 16, 0);
    wait_for_earlier();
    let_next_start();
    if (tile < tiles) load_scores(first + tile * 16, 0);
    copy_commit();
    // A lane makes the weights of 2 HEADS pairs of page and head: page lane / WIDTH + i * (32 / WIDTH), head lane % WIDTH.
    constexpr int PAIRS = 2 * HEADS, APART = 32 / WIDTH;
    const int head = lane % WIDTH;
    const float lse = head < heads ? p.lse[item * p.group + head0 + head] : 0;
    float weight_sum = 0, offset_sum = 0;
    float mean[TILES][4], rest[BITS ? CODE_TILES : 1][2][HEADS];
#pragma unroll
    for (int j = 0; j < TILES; j++) mean[j][0] = mean[j][1] = mean[j][2] = mean[j][3] = 0;
#pragma unroll
    for (int j = 0; j < (BITS ? CODE_TILES : 1); j++)
#pragma unroll
        for (int h = 0; h < HEADS; h++) rest[j][0][h] = rest[j][1][h] = 0;
    for (int stage = 0; tile < tiles; tile += stride, stage ^= 1) {
        if (tile + stride < tiles) {
            load_values(first + (tile + stride) * 16, stage ^ 1);
            load_scores(first + (tile + stride) * 16, stage ^ 1);
        }
        copy_commit();
        copy_wait<1>();
        __syncwarp();
        const uint4 *in = mine + stage * STAGE;
        const float *scores = reinterpret_cast<const float *>(in + AT_SCORES);
        float *weights = reinterpret_cast<float *>(mine + AT_WEIGHTS);
        float scaled[BITS ? PAIRS : 1][16], largest = 0;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int page = lane / WIDTH + i * APART;
            const bool there = head < heads && first + tile * 16 + page < end;
            const float base = there ? scores[head * 16 + page] - lse : -INFINITY;
            float sum = 0;
            if constexpr (!TOKENS) {
                sum = exp2_approx(base * LOG2E);
            } else {
                uint4 x[2] = {in[AT_RESIDUALS + (page * WIDTH + head) * 2], in[AT_RESIDUALS + (page * WIDTH + head) * 2 + 1]};
                const __half2 *r = reinterpret_cast<const __half2 *>(x);
                uint4 v[2];
                if constexpr (BITS > 0) v[0] = in[AT_SCALES + page * 2], v[1] = in[AT_SCALES + page * 2 + 1];
                const __half2 *scale = reinterpret_cast<const __half2 *>(v);
#pragma unroll
                for (int t = 0; t < 8; t++) {
                    const float2 s = __half22float2(r[t]);
                    // A page that is not there has base -inf, a token that does not count a residual of -inf; their sum is -inf.
                    const float w0 = exp2_approx((base + s.x) * LOG2E), w1 = exp2_approx((base + s.y) * LOG2E);
                    sum += w0 + w1;
                    if constexpr (BITS > 0) {
                        const float2 k = __half22float2(scale[t]);
                        scaled[i][2 * t] = w0 * k.x, scaled[i][2 * t + 1] = w1 * k.y;
                        largest = fmaxf(largest, fmaxf(scaled[i][2 * t], scaled[i][2 * t + 1]));
                    }
                }
            }
            weight_sum += sum;
            weights[page * WIDTH + head] = sum;
        }
        float unit = 0;
        if constexpr (BITS > 0) {
#pragma unroll
            for (int d = WIDTH; d < 32; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
            unit = largest * (1.f / 255.f);
            const float inverse = largest > 1e-36f ? 255.f / largest : 0.f;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const int page = lane / WIDTH + i * APART;
                uint32_t r[4] = {}, total = 0;
#pragma unroll
                for (int t = 0; t < 16; t++) {
                    // Byte i of register j: token 4 i + j, as value lines have them.
                    const uint32_t u = min(__float2uint_rn(scaled[i][t] * inverse), 255u);
                    total += u;
                    r[t % 4] |= u << (8 * (t / 4));
                }
                offset_sum += unit * float(total);
                // Transpose 4 x 4 bits in every nibble: register k then has plane k in the low nibbles, 4 + k in the high ones.
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const uint32_t x = (r[k] >> 2 ^ r[k + 2]) & 0x33333333u;
                    r[k + 2] ^= x, r[k] ^= x << 2;
                }
#pragma unroll
                for (int k = 0; k < 4; k += 2) {
                    const uint32_t x = (r[k] >> 1 ^ r[k + 1]) & 0x55555555u;
                    r[k + 1] ^= x, r[k] ^= x << 1;
                }
                mine[AT_PLANES + page * WIDTH + head] = uint4{r[0], r[1], r[2], r[3]};
            }
        }
        __syncwarp();
        // Mean values: 16 pages are the 16 rows of a k-step.
        {
            const int column = HEADS == 1 ? g / 2 : g;
            const float w[4] = {weights[(2 * q) * WIDTH + column] * WEIGHT_UNIT, weights[(2 * q + 1) * WIDTH + column] * WEIGHT_UNIT,
                                weights[(2 * q + 8) * WIDTH + column] * WEIGHT_UNIT, weights[(2 * q + 9) * WIDTH + column] * WEIGHT_UNIT};
            float high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; i++) high[i] = rounded<E>(w[i]), low[i] = w[i] - high[i];
            if (HEADS == 1 && g % 2) {
#pragma unroll
                for (int i = 0; i < 4; i++) high[i] = low[i];
            }
            const uint32_t h0 = pack2<E>(high[0], high[1]), h1 = pack2<E>(high[2], high[3]);
            const uint32_t l0 = pack2<E>(low[0], low[1]), l1 = pack2<E>(low[2], low[3]);
            auto add = [&](int j, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
                // A tile from a word of each of four rows: rows g and g + 8 of the tile are the halves of the word.
                const uint32_t a[4] = {__byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x2, x3, 0x5410),
                                       __byte_perm(x2, x3, 0x7632)};
                mma<E>(mean[j], a, h0, h1);
                if constexpr (HEADS == 2) mma<E>(mean[j], a, l0, l1);
            };
            const int r[4] = {2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9};
#pragma unroll
            for (int slab = 0; slab < D / 64; slab++) {
                uint4 x[4];
#pragma unroll
                for (int i = 0; i < 4; i++) x[i] = in[place(r[i], 8 * slab + g)];
                add(4 * slab, x[0].x, x[1].x, x[2].x, x[3].x);
                add(4 * slab + 1, x[0].y, x[1].y, x[2].y, x[3].y);
                add(4 * slab + 2, x[0].z, x[1].z, x[2].z, x[3].z);
                add(4 * slab + 3, x[0].w, x[1].w, x[2].w, x[3].w);
            }
            if constexpr (D == 96) {
                // The last four pieces: two words of one for each g.
                uint2 x[4];
#pragma unroll
                for (int i = 0; i < 4; i++) x[i] = reinterpret_cast<const uint2 *>(in + place(r[i], 8 + g % 4))[g / 4];
                add(4, x[0].x, x[1].x, x[2].x, x[3].x);
                add(5, x[0].y, x[1].y, x[2].y, x[3].y);
            }
        }
        if constexpr (BITS > 0) {
            // Planes of this lane's column; 32 tokens (two pages) to a word, pages 2 q, 2 q + 1 and eight further on.
            constexpr uint32_t LOW = 0x0f0f0f0fu;
            constexpr int PRODUCTS = HEADS == 1 ? 4 : 8;
            uint32_t b[PRODUCTS][2];
#pragma unroll
            for (int deep = 0; deep < 2; deep++) {
                const int column = HEADS == 1 ? g / 2 : g;
                const uint4 even4 = mine[AT_PLANES + (2 * q + 8 * deep) * WIDTH + column];
                const uint4 odd4 = mine[AT_PLANES + (2 * q + 1 + 8 * deep) * WIDTH + column];
                const uint32_t even[4] = {even4.x, even4.y, even4.z, even4.w}, odd[4] = {odd4.x, odd4.y, odd4.z, odd4.w};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    if constexpr (HEADS == 1) {
                        const int by = g % 2 * 4;
                        b[k][deep] = (even[k] >> by & LOW) | (odd[k] << (4 - by) & ~LOW);
                    } else {
                        b[k][deep] = (even[k] & LOW) | (odd[k] << 4 & ~LOW);
                        b[4 + k][deep] = (even[k] >> 4 & LOW) | (odd[k] & ~LOW);
                    }
                }
            }
            float units[HEADS];
#pragma unroll
            for (int h = 0; h < HEADS; h++) units[h] = __shfl_sync(~0u, unit, q * HEADS + h);
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++) {
                int total[4][2][HEADS] = {};
#pragma unroll
                for (int bit = 0; bit < BITS; bit++) {
                    uint4 w[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int row = 2 * q + i % 2 + i / 2 * 8, piece = 8 * slab + g;
                        w[i] = in[AT_CODES + bit * 16 * ROW + place(row, D == 96 && slab == 1 ? 8 + g % 4 : piece)];
                    }
#pragma unroll
                    for (int t = 0; t < 4; t++) {
                        // Tile t: words 2 (t / 2) and + 1 of the piece, low nibbles (coordinates 0 to 15 of the line) or high ones.
                        const uint32_t x[4] = {t < 2 ? w[0].x : w[0].z, t < 2 ? w[1].x : w[1].z, t < 2 ? w[2].x : w[2].z, t < 2 ? w[3].x : w[3].z};
                        const uint32_t y[4] = {t < 2 ? w[0].y : w[0].w, t < 2 ? w[1].y : w[1].w, t < 2 ? w[2].y : w[2].w, t < 2 ? w[3].y : w[3].w};
                        auto join = [&](uint32_t even, uint32_t odd) {
                            return t % 2 ? (even >> 4 & LOW) | (odd & ~LOW) : (even & LOW) | (odd << 4 & ~LOW);
                        };
                        const uint32_t a0 = join(x[0], x[1]), a1 = join(y[0], y[1]), a2 = join(x[2], x[3]), a3 = join(y[2], y[3]);
                        int c[PRODUCTS][4] = {};
#pragma unroll
                        for (int m = 0; m < PRODUCTS; m++) count_bits(c[m], a0, a1, a2, a3, b[m][0], b[m][1]);
#pragma unroll
                        for (int r = 0; r < 2; r++) {
#pragma unroll
                            for (int h = 0; h < HEADS; h++) {
                                int s;
                                if constexpr (HEADS == 1) {
                                    int low = c[3][2 * r], high = c[3][2 * r + 1];
#pragma unroll
                                    for (int m = 2; m >= 0; m--) low = 2 * low + c[m][2 * r], high = 2 * high + c[m][2 * r + 1];
                                    s = low + 16 * high;
                                } else {
                                    s = c[7][2 * r + h];
#pragma unroll
                                    for (int m = 6; m >= 0; m--) s = 2 * s + c[m][2 * r + h];
                                }
                                total[t][r][h] = 2 * total[t][r][h] + s;
                            }
                        }
                    }
                }
#pragma unroll
                for (int t = 0; t < 4; t++) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {
#pragma unroll
                        for (int h = 0; h < HEADS; h++) rest[slab * 4 + t][r][h] += units[h] * float(total[t][r][h]);
                    }
                }
            }
        }
        __syncwarp();
    }
    copy_wait<0>();
    __syncwarp();
    // Sums of the warp: mean part [heads, D], then the rotated rest [heads, D].
    float *hand = reinterpret_cast<float *>(mine);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        const bool last32 = D == 96 && j >= 4;
        const int piece = last32 ? 8 + g % 4 : 8 * (j / 4) + g, word = last32 ? g / 4 * 2 + j % 2 : j % 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int dim = piece * 8 + word * 2 + r;
            if constexpr (HEADS == 1) {
                hand[q * D + dim] = mean[j][2 * r] + mean[j][2 * r + 1];
            } else {
                hand[2 * q * D + dim] = mean[j][2 * r];
                hand[(2 * q + 1) * D + dim] = mean[j][2 * r + 1];
            }
        }
    }
    if constexpr (BITS > 0) {
#pragma unroll
        for (int j = 0; j < CODE_TILES; j++) {
            const int piece = 8 * (j / 4) + g, t = j % 4;
            if (piece >= PIECES) continue;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int dim = piece / 4 * 32 + t % 2 * 16 + piece % 4 * 4 + t / 2 * 2 + r;
#pragma unroll
                for (int h = 0; h < HEADS; h++) hand[(WIDTH + q * HEADS + h) * D + dim] = rest[j][r][h];
            }
        }
    }
#pragma unroll
    for (int d = WIDTH; d < 32; d *= 2) {
        weight_sum += __shfl_xor_sync(~0u, weight_sum, d);
        offset_sum += __shfl_xor_sync(~0u, offset_sum, d);
    }
    if (lane < WIDTH) warp_sums[warp][lane] = weight_sum, warp_offsets[warp][lane] = offset_sum;
    __syncthreads();
    // Warps of the block, in order, into the place of the first one.
    if (threadIdx.x < WIDTH) {
        float sum = 0, offset = 0;
        for (int w = 0; w < warps; w++) sum += warp_sums[w][threadIdx.x], offset += warp_offsets[w][threadIdx.x];
        sums[threadIdx.x] = sum, offsets[threadIdx.x] = offset;
    }
    float *joined = reinterpret_cast<float *>(shared);
    for (int at = threadIdx.x; at < (BITS ? 2 : 1) * WIDTH * D; at += blockDim.x) {
        float x = 0;
        for (int w = 0; w < warps; w++) x += reinterpret_cast<const float *>(shared + w * WARP)[at];
        joined[at] = at < WIDTH * D ? x * (1.f / WEIGHT_UNIT) : x;
    }
    __syncthreads();
    const uint64_t state = uint64_t(item) * gridDim.x + blockIdx.x;
    for (int h = warp; h < heads; h += warps) {
        float x[D / 32];
        if constexpr (BITS > 0) {
            // A level is twice the code less the largest code.
            float *of_head = joined + (WIDTH + h) * D;
#pragma unroll
            for (int i = 0; i < D / 32; i++) x[i] = 2 * of_head[i * 32 + lane] - float((1 << BITS) - 1) * offsets[h];
            __syncwarp();
            rotate_back<D>(x, p.rotation, of_head);
        }
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const float own = joined[h * D + i * 32 + lane];
            p.part_out[(state * p.group + head0 + h) * D + i * 32 + lane] = BITS > 0 ? own + x[i] : own;
        }
        if (lane == 0) p.part_sum[state * p.group + head0 + h] = sums[h];
    }
    if (!last_to_arrive(p.arrived + 2 * item + blockIdx.z, gridDim.x)) return;
    const uint64_t start = uint64_t(item) * gridDim.x;
    for (int h = warp; h < heads; h += warps) {
        float sum = 0;
        for (uint32_t s = lane; s < gridDim.x; s += 32) sum += __ldcg(p.part_sum + (start + s) * p.group + head0 + h);
        for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0) {
            const uint32_t at = item * p.group + head0 + h;
            sums[h] = sum;
            p.out_lse[at] = sum > 0 ? p.lse[at] + logf(sum) : -INFINITY;
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < heads * D; at += blockDim.x) {
        float x = 0;
#pragma unroll 16
        for (uint32_t s = 0; s < gridDim.x; s++) x += __ldcg(p.part_out + (start + s) * p.group * D + head0 * D + at);
        const float sum = sums[at / D];
        p.out[(uint64_t(item) * p.group + head0) * D + at] = sum > 0 ? x / sum : 0;
    }
}

#define TAIL(TYPE, SUFFIX, D, UNIT, NAME, HEADS)                                                                              \
    extern "C" __global__ void __maxnreg__(floe::tail_registers(D, floe::Unit::UNIT, HEADS))                                     \
        tail_##NAME##_##SUFFIX##_d##D##_h##HEADS(const __grid_constant__ floe::TailParams p) {                                \
        const floe::Timeline timeline(floe::Work::Tail);                                                                      \
        extern __shared__ uint4 shared[];                                                                                     \
        const int lane = threadIdx.x % 32;                                                                                    \
        const uint32_t head0 = blockIdx.z * 8;                                                                                \
        using Job = floe::Tail<TYPE, D, floe::Unit::UNIT, HEADS>;                                                             \
        Job job{p, nullptr, head0, min(int(p.group - head0), Job::WIDTH), lane, lane / 4, lane % 4};                          \
        job.run(shared);                                                                                                      \
    }
#define TAIL_UNITS(TYPE, SUFFIX, D, HEADS)                                                                                    \
    TAIL(TYPE, SUFFIX, D, Page, pages, HEADS) TAIL(TYPE, SUFFIX, D, Token0, v0, HEADS)                                        \
    TAIL(TYPE, SUFFIX, D, Token1, v1, HEADS) TAIL(TYPE, SUFFIX, D, Token2, v2, HEADS)
#define TAIL_ALL(TYPE, SUFFIX, HEADS)                                                                                         \
    TAIL_UNITS(TYPE, SUFFIX, 64, HEADS) TAIL_UNITS(TYPE, SUFFIX, 96, HEADS)                                                   \
    TAIL_UNITS(TYPE, SUFFIX, 128, HEADS) TAIL_UNITS(TYPE, SUFFIX, 256, HEADS)

} // namespace floe
