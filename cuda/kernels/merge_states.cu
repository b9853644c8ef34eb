// Log-sum-exp merge of several states of the same heads: out = sum_p out_p e^(lse_p - lse), lse = ln sum_p e^lse_p.
//
// One warp per head. The order of the parts is the order of the sum.
#include "tile.cuh"

namespace floe {

constexpr int MERGE_PARTS_MAX = 8;

// Mirrored by `ops::merge_states::MergeParams`.
struct MergeParams {
    const float *out[MERGE_PARTS_MAX]; // each [heads, head_dim]
    const float *lse[MERGE_PARTS_MAX]; // each [heads]; -inf with a zero out = empty
    float *into_out;                   // [heads, head_dim]; may be one of the parts
    float *into_lse;                   // [heads]
    uint32_t parts, heads, head_dim;
};

} // namespace floe

extern "C" __global__ void __launch_bounds__(128) merge_states(const __grid_constant__ floe::MergeParams p) {
    using namespace floe;
    const uint32_t head = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (head >= p.heads) return;
    float weight[MERGE_PARTS_MAX], high = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < MERGE_PARTS_MAX; i++) {
        weight[i] = i < p.parts ? p.lse[i][head] : -INFINITY;
        high = fmaxf(high, weight[i]);
    }
#pragma unroll
    for (int i = 0; i < MERGE_PARTS_MAX; i++) {
        weight[i] = weight[i] == -INFINITY ? 0.f : expf(weight[i] - high);
        total += weight[i];
    }
    const float inverse = total > 0 ? 1.f / total : 0.f;
    for (uint32_t d = lane; d < p.head_dim; d += 32) {
        const uint64_t at = uint64_t(head) * p.head_dim + d;
        float x = 0;
#pragma unroll
        for (int i = 0; i < MERGE_PARTS_MAX; i++) {
            // An empty part is left out rather than multiplied: the identity holds bit for bit.
            if (i < p.parts && weight[i] > 0) x += weight[i] * inverse * p.out[i][at];
        }
        p.into_out[at] = x;
    }
    // Every lane has read the parts before the result may overwrite one.
    __syncwarp();
    if (lane == 0) p.into_lse[head] = total == 1.f ? high : total > 0 ? high + logf(total) : -INFINITY;
}
