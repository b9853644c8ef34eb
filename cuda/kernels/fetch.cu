// Gathers units (pages or rows) from host-mapped memory into slots: to[slot[i]] = host[from[i]].
//
// A warp has 2 KiB under way before it stores the first: what the link needs is many requests in flight. One 8 KiB page per warp took
// 8.9 us for 13 pages, where 205 rows, as many bytes, took 5.7; one 512-byte row per warp reached 25 GB/s, four 32 to 44.
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

// A warp takes up to 2 KiB at a time, of one unit or of several small ones.
extern "C" __global__ void __launch_bounds__(256) fetch(const __grid_constant__ floe::FetchParams p) {
    using namespace floe;
    constexpr uint32_t EACH = 4, PART = 32 * EACH; // pieces of a lane and of a warp
    wait_for_earlier();
    let_next_start();
    const uint32_t lane = threadIdx.x % 32, warps = gridDim.x * 8, warp = blockIdx.x * 8 + threadIdx.x / 32;
    const uint32_t units = p.num ? min(*p.num, p.units) : p.units;
    // Pieces are numbered through all units: those of a warp lie in one unit or in neighbours of the list.
    const uint32_t pieces = units * p.pieces;
    for (uint32_t start = warp * PART; start < pieces; start += warps * PART) {
        uint32_t from[EACH], slot[EACH], piece[EACH];
        bool copies[EACH];
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            const uint32_t at = start + i * 32 + lane;
            copies[i] = at < pieces;
            const uint32_t unit = copies[i] ? at / p.pieces : 0;
            piece[i] = at - unit * p.pieces;
            from[i] = copies[i] ? __ldcg(p.from + unit) : NOWHERE, slot[i] = copies[i] ? __ldcg(p.slot + unit) : 0;
        }
        uint4 x[EACH];
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            copies[i] = from[i] != NOWHERE;
            if (copies[i] && (from[i] >= p.host_units || slot[i] >= p.num_units)) *p.fault = 1, copies[i] = false;
            if (copies[i]) x[i] = read_host(p.host + uint64_t(from[i]) * p.pieces + piece[i]);
        }
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++)
            if (copies[i]) p.kv[uint64_t(slot[i]) * p.pieces + piece[i]] = x[i];
    }
}
