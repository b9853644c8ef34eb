// When and where the blocks of a step's kernels ran, in builds with FLOE_TIMELINE; otherwise nothing.
//
// Events around a kernel keep the next one from starting early. A clock read by the blocks themselves does not: each block leaves one
// record when it is done.
#pragma once
#include <cstdint>

namespace floe {

// Mirrored by `device::timeline::WORKS`.
enum class Work : uint32_t { Append, Scan, Select, Resolve, Fetch, Attend, Finish, Pages, Whole, Tail };

#ifdef FLOE_TIMELINE

// Mirrored by `device::timeline::Record`.
struct Record {
    uint64_t end;          // nanoseconds
    uint32_t start, ready; // low words of the same clock: the block's first instruction, and when what it waits for was done
    uint32_t work, multiprocessor, block, unused;
};

constexpr uint32_t RECORDS = 1 << 16;
extern "C" {
__device__ Record floe_timeline[RECORDS];
__device__ uint32_t floe_timeline_num;
}

__device__ __forceinline__ uint64_t now() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory");
    return t;
}

__device__ __forceinline__ uint32_t *timeline_marks() {
    __shared__ uint32_t marks[2];
    return marks;
}

__device__ __forceinline__ void timeline_ready() {
    if (threadIdx.x == 0) timeline_marks()[1] = uint32_t(now());
}

// Lives as long as the block's first thread works.
struct Timeline {
    Work work;
    __device__ __forceinline__ explicit Timeline(Work w) : work(w) {
        if (threadIdx.x == 0) timeline_marks()[0] = timeline_marks()[1] = uint32_t(now());
    }
    __device__ __forceinline__ ~Timeline() {
        if (threadIdx.x) return;
        const uint32_t at = atomicAdd(&floe_timeline_num, 1);
        if (at >= RECORDS) return;
        uint32_t multiprocessor;
        asm volatile("mov.u32 %0, %smid;" : "=r"(multiprocessor));
        const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        floe_timeline[at] = {now(), timeline_marks()[0], timeline_marks()[1], uint32_t(work), multiprocessor, block, 0};
    }
};

#else

__device__ __forceinline__ void timeline_ready() {}
struct Timeline {
    __device__ __forceinline__ explicit Timeline(Work) {}
};

#endif

} // namespace floe
