// Gathers units (pages or rows) from host-mapped memory into slots: to[slot[i]] = host[from[i]].
//
// A warp takes 2 KiB at a time, all of whose reads are under way before the first is stored: what the link needs is many
// requests in flight. One 8 KiB page per warp took 8.9 us for 13 pages, where 205 rows, as many bytes, took 5.7. Several small rows
// to a warp gain nothing: 2048 rows took as long, 205 rows (fewer blocks) half as long again.
#include "tile.cuh"

namespace floe {

constexpr uint32_t NOWHERE = 0xffffffffu;

// Mirrored by `ops::fetch::FetchParams`.
struct FetchParams {
    const uint4 *host;    // [host_units, pieces] host-mapped
    uint4 *kv;            // [num_units, pieces]
    const uint32_t *from; // [units] unit of host, or NOWHERE = left out
    const uint32_t *slot; // [units] unit of kv, each at most once
    const uint32_t *num;  // [1] how many of the listed are valid, or null = all
    uint32_t *fault;      // becomes 1 when a unit lies outside host or kv; it is not copied
    uint32_t units, pieces, host_units, num_units;
};

__device__ __forceinline__ uint4 read_host(const uint4 *p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

} // namespace floe

extern "C" __global__ void __launch_bounds__(256) fetch(const __grid_constant__ floe::FetchParams p) {
    using namespace floe;
    constexpr uint32_t EACH = 4, PART = 32 * EACH; // pieces of a lane and of a warp
    wait_for_earlier();
    let_next_start();
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t units = p.num ? min(*p.num, p.units) : p.units;
    const uint32_t parts = (p.pieces + PART - 1) / PART;
    for (uint32_t job = blockIdx.x * 8 + threadIdx.x / 32; job < units * parts; job += gridDim.x * 8) {
        const uint32_t unit = job / parts, first = job % parts * PART + lane;
        const uint32_t from = p.from[unit], slot = p.slot[unit];
        if (from == NOWHERE) continue;
        if (from >= p.host_units || slot >= p.num_units) {
            *p.fault = 1;
            continue;
        }
        const uint4 *source = p.host + uint64_t(from) * p.pieces;
        uint4 *target = p.kv + uint64_t(slot) * p.pieces;
        uint4 x[EACH];
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            if (first + i * 32 < p.pieces) x[i] = read_host(source + first + i * 32);
        }
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            if (first + i * 32 < p.pieces) target[first + i * 32] = x[i];
        }
    }
}
