// Summaries and sketches of pages of 16 consecutive tokens: mean key, mean value, and a few bits for every coordinate of each key's
// and value's rotated residual to them, with one scale, as `floe_index::sketch` encodes and lays them out.
//
// One block per page, one warp per token. In a step: the page, if any, whose last token leaves the window.
#include "cache.cuh"
#include "sum.cuh"

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
    uint32_t *key_lines;     // [pages, key_bits, D / 32, 16]
    __half *key_scales;      // [pages, 16]
    uint32_t *value_lines;   // [pages, value_bits, D / 32, 16]
    __half *value_scales;    // [pages, 16]
    uint16_t *masks;         // [pages], with key bits
    float *spread;           // [pages] mean square of the key residuals' coordinates, with key bits
    const float *signs;      // [D]
    uint32_t type, sequence, run_first, first_page, in_step, num_pages;
    uint32_t key_bits, value_bits; // 0, 1 or 2
};

// Code of a coordinate in steps: the sign, or a half step of four.
__device__ __forceinline__ int code_of(float x, float inverse_step, uint32_t bits) {
    return bits == 1 ? x >= 0 : int(fminf(fmaxf(x * inverse_step + 2, 0.f), 3.f));
}

// Codes of a rotated residual that the warp holds; `words[plane][line]` for everyone. Of the candidate steps the one that explains
// the most energy after its least-squares scale is kept; one bit has no step. `energy` becomes the residual's square length.
template <int LINES>
__device__ __forceinline__ __half encode(const float (&x)[LINES], uint32_t bits, uint32_t (&words)[2][LINES], float &energy) {
    constexpr float STEPS[6] = {0.70f, 0.85f, 1.0f, 1.15f, 1.35f, 1.6f};
    float size = 0;
    energy = 0;
#pragma unroll
    for (int l = 0; l < LINES; l++) energy += x[l] * x[l], size += fabsf(x[l]);
    energy = warp_sum(energy);
    float scale = warp_sum(size) / (32 * LINES);
    const float rms = sqrtf(energy / (32 * LINES));
    if (bits == 2 && rms > 0) {
        float best = -1;
#pragma unroll
        for (int i = 0; i < 6; i++) {
            const float inverse = 1 / (STEPS[i] * rms);
            float along = 0, square = 0;
#pragma unroll
            for (int l = 0; l < LINES; l++) {
                const float level = 2 * code_of(x[l], inverse, 2) - 3;
                along += x[l] * level, square += level * level;
            }
            along = warp_sum(along), square = warp_sum(square);
            if (along * along / square > best) best = along * along / square, scale = along / square;
        }
    }
    const __half stored = __float2half_rn(fminf(scale, 65504.f));
    const float used = __half2float(stored), inverse = used > 0 ? 0.5f / used : 0;
#pragma unroll
    for (int l = 0; l < LINES; l++) {
        const int code = code_of(x[l], inverse, bits);
        words[0][l] = used > 0 ? __ballot_sync(~0u, bits == 1 ? code : code >> 1) : 0;
        words[1][l] = used > 0 ? __ballot_sync(~0u, code & 1) : 0;
    }
    return stored;
}

template <typename E, int D> __device__ __forceinline__ void build_page(const PagesParams &p) {
    constexpr int LINES = D / 32;
    __shared__ float sums[2][16][D];
    __shared__ float mean[2][D];
    __shared__ uint32_t by_token[2][LINES][16];
    __shared__ float energies[16];
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
        mean[which][d] = wide(rounded);
    }
    if (threadIdx.x == 0) {
        // Sinks are always attended: a page of sinks stands for nothing.
        const bool counts = page * 16 >= c.sinks;
        p.log_count[at] = counts ? 2.772588722239781f : -INFINITY;
        if (p.masks) p.masks[at] = counts ? 0xffff : 0;
    }
    if (D == 96 || p.key_bits + p.value_bits == 0) return;
    __syncthreads();
    uint32_t words[2][LINES];
    float x[LINES], energy;
    if (p.key_bits) {
#pragma unroll
        for (int l = 0; l < LINES; l++) x[l] = (key[l] - mean[0][32 * l + lane]) * p.signs[32 * l + lane];
        hadamard<LINES>(x, lane);
        const __half scale = encode<LINES>(x, p.key_bits, words, energy);
        if (lane == 0) {
            energies[token] = energy;
            p.key_scales[uint64_t(at) * 16 + token] = scale;
#pragma unroll
            for (int plane = 0; plane < 2; plane++) {
#pragma unroll
                for (int l = 0; l < LINES; l++)
                    if (plane < p.key_bits) p.key_lines[((uint64_t(at) * p.key_bits + plane) * LINES + l) * 16 + token] = words[plane][l];
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            float sum = 0;
#pragma unroll
            for (int t = 0; t < 16; t++) sum += energies[t];
            p.spread[at] = sum / (16 * D);
        }
    }
    if (!p.value_bits) return;
#pragma unroll
    for (int l = 0; l < LINES; l++) x[l] = (value[l] - mean[1][32 * l + lane]) * p.signs[32 * l + lane];
    hadamard<LINES>(x, lane);
    const __half scale = encode<LINES>(x, p.value_bits, words, energy);
    if (lane == 0) {
        p.value_scales[uint64_t(at) * 16 + token] = scale;
#pragma unroll
        for (int plane = 0; plane < 2; plane++) {
#pragma unroll
            for (int l = 0; l < LINES; l++) by_token[plane][l][token] = words[plane][l];
        }
    }
    __syncthreads();
    // Lane c of a value line holds coordinates c and 16 + c of all tokens: bits 8 i + j and 8 i + 4 + j of token 4 i + j.
    for (uint32_t i = threadIdx.x; i < p.value_bits * LINES * 16; i += 512) {
        const uint32_t plane = i / (LINES * 16), line = i / 16 % LINES, c = i % 16;
        uint32_t word = 0;
#pragma unroll
        for (int t = 0; t < 16; t++) {
            const uint32_t from = by_token[plane][line][t], to = 8 * (t / 4) + t % 4;
            word |= (from >> c & 1) << to | (from >> (16 + c) & 1) << (to + 4);
        }
        p.value_lines[((uint64_t(at) * p.value_bits + plane) * LINES + line) * 16 + c] = word;
    }
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
