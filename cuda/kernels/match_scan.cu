// Nearest earlier query of each head in a ring, by squared distance, before rotary position: for decode-time reuse.
//
// One block per head; a warp takes one ring entry at a time. Equal distances: the lower place.
#include "tile.cuh"

namespace floe {

// Mirrored by `ops::match_scan::MatchParams`.
struct MatchParams {
    const float *ring;        // [heads, places, dim]
    const float *q;           // [heads, dim]
    const uint32_t *num;      // [heads] places in use
    float *distance;          // [heads] smallest squared distance, inf = ring empty
    uint32_t *place;          // [heads] where
    uint32_t places, dim;
};

} // namespace floe

extern "C" __global__ void __launch_bounds__(256) match_scan(const __grid_constant__ floe::MatchParams p) {
    __shared__ float best[8];
    __shared__ uint32_t where[8];
    const uint32_t head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, num = min(p.num[head], p.places);
    const float *q = p.q + uint64_t(head) * p.dim;
    float least = INFINITY;
    uint32_t at = 0;
#pragma unroll 4
    for (uint32_t i = warp; i < num; i += 8) {
        const float *x = p.ring + (uint64_t(head) * p.places + i) * p.dim;
        float sum = 0;
        for (uint32_t d = lane; d < p.dim; d += 32) {
            const float diff = __ldg(x + d) - __ldg(q + d);
            sum += diff * diff;
        }
        for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
        if (sum < least) least = sum, at = i;
    }
    if (lane == 0) best[warp] = least, where[warp] = at;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < 8; w++)
        if (best[w] < least || (best[w] == least && where[w] < at)) least = best[w], at = where[w];
    p.distance[head] = least;
    p.place[head] = at;
}
