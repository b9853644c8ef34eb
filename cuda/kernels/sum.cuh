// Sums over the threads of a warp and of a block, always in the same order.
#pragma once
#include <cstdint>

namespace floe {

// Sum of this lane's value and those of the lanes before it.
__device__ __forceinline__ uint32_t inclusive_sum(uint32_t x) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t y = __shfl_up_sync(~0u, x, d);
        if (lane >= d) x += y;
    }
    return x;
}

// Sum of the values of the block's threads before this one; `total` for everyone. Two counts in one word are summed at once as long
// as neither sum reaches 2^16.
template <uint32_t THREADS> __device__ __forceinline__ uint32_t exclusive_sum(uint32_t x, uint32_t &total) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024);
    constexpr uint32_t WARPS = THREADS / 32;
    __shared__ uint32_t sums[WARPS];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t y = inclusive_sum(x);
    __syncthreads();
    if (lane == 31) sums[warp] = y;
    __syncthreads();
    // Every warp sums the warps itself: cheaper than another barrier.
    const uint32_t own = lane < WARPS ? sums[lane] : 0, up_to = inclusive_sum(own);
    total = __shfl_sync(~0u, up_to, 31);
    return __shfl_sync(~0u, up_to - own, warp) + y - x;
}

// Sum over the warp, for everyone.
__device__ __forceinline__ uint32_t warp_count(uint32_t x) { return __reduce_add_sync(~0u, x); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

} // namespace floe
