// What the device keeps of a page: mean key, mean value, and a few bits for every coordinate of each key's and value's rotated
// residual to them, with one scale, as `floe_index::sketch` encodes and lays them out.
//
// One block of 512 threads per page, one warp per token.
#pragma once
#include "cache.cuh"
#include "rotate.cuh"
#include "sum.cuh"

namespace floe {

// Mirrored by `ops::cache::pages::PageOutParams`.
struct PageOut {
    void *mean_keys;         // [pages, D] E
    void *mean_values;       // [pages, D] E
    float *log_count;        // [pages]
    uint32_t *key_lines;     // [pages, key_bits, D / 32, 16]
    __half *key_scales;      // [pages, 16]
    uint32_t *value_lines;   // [pages, value_bits, D / 32, 16]
    __half *value_scales;    // [pages, 16]
    uint16_t *masks;         // [pages], or null
    RotationParams rotation; // of residuals
    float *spread;           // [pages] mean square of a coordinate of the key residuals, with key bits as of 16 tokens in any case; or null
    uint32_t key_bits, value_bits; // 0, 1 or 2
};

template <int D> struct PageShared {
    float rows[2][16][D]; // keys, values; zero where a token does not live
    float mean[2][D], spread[16];
    uint32_t by_token[2][D / 32][16];
};

// Code of a coordinate in steps: the sign, or a half step of four.
__device__ __forceinline__ int code_of(float x, float inverse_step, uint32_t bits) {
    return bits == 1 ? x >= 0 : int(fminf(fmaxf(x * inverse_step + 2, 0.f), 3.f));
}

// Codes of a rotated residual that the warp holds; `words[plane][line]` for everyone. Of the candidate steps the one that explains
// the most energy after its least-squares scale is kept; one bit has no step.
template <int LINES> __device__ __forceinline__ __half encode(const float (&x)[LINES], uint32_t bits, uint32_t (&words)[2][LINES]) {
    constexpr float STEPS[6] = {0.70f, 0.85f, 1.0f, 1.15f, 1.35f, 1.6f};
    float energy = 0, size = 0;
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

// Writes page `at`, whose tokens are those with a bit in `live`, their rows in `s.rows`; its count, mask and spread to place `said`. It
// stands for nothing without a token, or where these do not count.
template <typename E, int D>
__device__ __forceinline__ void write_page(const PageOut &p, PageShared<D> &s, uint32_t at, uint32_t said, uint32_t live, bool counts) {
    constexpr int LINES = D / 32;
    const uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32, count = __popc(live);
    const bool lives = live >> token & 1;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 2 * D; i += 512) {
        const uint32_t which = i / D, d = i % D;
        float sum = 0;
#pragma unroll
        for (int t = 0; t < 16; t++) sum += s.rows[which][t][d];
        const E rounded = narrow<E>(count ? sum / float(count) : 0.f);
        static_cast<E *>(which ? p.mean_values : p.mean_keys)[uint64_t(at) * D + d] = rounded;
        s.mean[which][d] = wide(rounded);
    }
    if (threadIdx.x == 0) {
        p.log_count[said] = counts && count ? logf(float(count)) : -INFINITY;
        if (p.masks) p.masks[said] = counts ? uint16_t(live) : 0;
    }
    if (p.spread) {
        __syncthreads();
        float square = 0;
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            const float x = s.rows[0][token][32 * l + lane] - s.mean[0][32 * l + lane];
            square += x * x;
        }
        square = warp_sum(square);
        if (lane == 0) s.spread[token] = lives ? square : 0;
        __syncthreads();
        if (threadIdx.x == 0) {
            float sum = 0;
#pragma unroll
            for (int t = 0; t < 16; t++) sum += s.spread[t];
            p.spread[said] = sum / float((p.key_bits ? 16 : max(count, 1u)) * D);
        }
    }
    if (p.key_bits + p.value_bits == 0) return;
    __syncthreads();
    uint32_t words[2][LINES];
    float x[LINES];
    if (p.key_bits) {
#pragma unroll
        for (int l = 0; l < LINES; l++) x[l] = lives ? s.rows[0][token][32 * l + lane] - s.mean[0][32 * l + lane] : 0;
        // From here on a token's row is its warp's alone.
        rotate<D>(x, p.rotation, s.rows[0][token]);
        const __half scale = encode<LINES>(x, p.key_bits, words);
        if (lane == 0) {
            p.key_scales[uint64_t(at) * 16 + token] = scale;
#pragma unroll
            for (int plane = 0; plane < 2; plane++) {
#pragma unroll
                for (int l = 0; l < LINES; l++)
                    if (plane < p.key_bits) p.key_lines[((uint64_t(at) * p.key_bits + plane) * LINES + l) * 16 + token] = words[plane][l];
            }
        }
    }
    if (!p.value_bits) return;
#pragma unroll
    for (int l = 0; l < LINES; l++) x[l] = lives ? s.rows[1][token][32 * l + lane] - s.mean[1][32 * l + lane] : 0;
    rotate<D>(x, p.rotation, s.rows[1][token]);
    const __half scale = encode<LINES>(x, p.value_bits, words);
    if (lane == 0) {
        p.value_scales[uint64_t(at) * 16 + token] = scale;
#pragma unroll
        for (int plane = 0; plane < 2; plane++) {
#pragma unroll
            for (int l = 0; l < LINES; l++) s.by_token[plane][l][token] = words[plane][l];
        }
    }
    __syncthreads();
    // Lane c of a value line holds coordinates c and 16 + c of all tokens: bits 8 i + j and 8 i + 4 + j of token 4 i + j.
    for (uint32_t i = threadIdx.x; i < p.value_bits * LINES * 16; i += 512) {
        const uint32_t plane = i / (LINES * 16), line = i / 16 % LINES, c = i % 16;
        uint32_t word = 0;
#pragma unroll
        for (int t = 0; t < 16; t++) {
            const uint32_t from = s.by_token[plane][line][t], to = 8 * (t / 4) + t % 4;
            word |= (from >> c & 1) << to | (from >> (16 + c) & 1) << (to + 4);
        }
        p.value_lines[((uint64_t(at) * p.value_bits + plane) * LINES + line) * 16 + c] = word;
    }
}

} // namespace floe
