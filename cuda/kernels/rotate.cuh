// The rotation of sketches: rounds of signs and Walsh-Hadamard transforms, as `floe_index::rotate` defines it.
//
// A warp holds one vector, coordinate 32 i + lane in x[i]. Blocks are the powers of two that sum to D, largest first; every D here
// is a multiple of 32, so a block is whole registers and the first five stages are shuffles.
#pragma once
#include "tile.cuh"

namespace floe {

// Mirrored by `ops::sweep::RotationParams`.
struct RotationParams {
    const float *signs;    // [rounds, D] sign / sqrt(block)
    const uint32_t *order; // [D] before the second round coordinate i takes coordinate order[i]; null with one round
};

template <int D> __device__ __forceinline__ void hadamard(float (&x)[D / 32]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const float y = __shfl_xor_sync(~0u, x[i], d);
            x[i] = lane & d ? y - x[i] : x[i] + y;
        }
    }
    // 96 = 64 + 32: the last register is a block of its own.
    constexpr int WHOLE = D == 96 ? 2 : D / 32;
#pragma unroll
    for (int d = 1; d < WHOLE; d *= 2) {
#pragma unroll
        for (int i = 0; i < WHOLE; i++) {
            if (i & d) continue;
            const float a = x[i], b = x[i + d];
            x[i] = a + b;
            x[i + d] = a - b;
        }
    }
}

template <int D> __device__ __forceinline__ void multiply(float (&x)[D / 32], const float *by) {
#pragma unroll
    for (int i = 0; i < D / 32; i++) x[i] *= __ldg(by + i * 32 + threadIdx.x % 32);
}

// `scratch` [D] in shared memory, of this warp alone.
template <int D> __device__ __forceinline__ void rotate(float (&x)[D / 32], const RotationParams &r, float *scratch) {
    const int lane = threadIdx.x % 32;
    multiply<D>(x, r.signs);
    hadamard<D>(x);
    if (!r.order) return;
#pragma unroll
    for (int i = 0; i < D / 32; i++) scratch[i * 32 + lane] = x[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 32; i++) x[i] = scratch[__ldg(r.order + i * 32 + lane) % D];
    __syncwarp();
    multiply<D>(x, r.signs + D);
    hadamard<D>(x);
}

template <int D> __device__ __forceinline__ void rotate_back(float (&x)[D / 32], const RotationParams &r, float *scratch) {
    const int lane = threadIdx.x % 32;
    if (r.order) {
        hadamard<D>(x);
        multiply<D>(x, r.signs + D);
#pragma unroll
        for (int i = 0; i < D / 32; i++) scratch[__ldg(r.order + i * 32 + lane) % D] = x[i];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / 32; i++) x[i] = scratch[i * 32 + lane];
        __syncwarp();
    }
    hadamard<D>(x);
    multiply<D>(x, r.signs);
}

} // namespace floe
