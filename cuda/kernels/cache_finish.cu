// Joins the partial states of a step and writes the output in the host engine's type and layout. One warp per query head.
#include "cache.cuh"

namespace floe {

constexpr int FINISH_PARTS_MAX = 4;

// Mirrored by `ops::cache::finish::FinishParams`.
struct FinishParams {
    Cache cache;
    const float *part_out[FINISH_PARTS_MAX]; // each [items, group, D]
    const float *part_lse[FINISH_PARTS_MAX]; // each [items, group]
    void *out;                               // [entries, heads * group, D], rows contiguous
    uint64_t out_entry, out_head;            // strides in elements
    uint32_t parts, type, entries, dim;
};

} // namespace floe

extern "C" __global__ void __launch_bounds__(128) cache_finish(const __grid_constant__ floe::FinishParams p) {
    using namespace floe;
    const Timeline timeline(Work::Finish);
    let_next_start();
    wait_for_earlier();
    const Cache &c = p.cache;
    const uint32_t row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, heads = c.heads * c.group;
    if (row >= p.entries * heads) return;
    const uint32_t entry = row / heads, head = row % heads;
    if (c.batch[entry].tokens == 0) return;
    float weight[FINISH_PARTS_MAX], high = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < FINISH_PARTS_MAX; i++) {
        weight[i] = i < p.parts ? p.part_lse[i][row] : -INFINITY;
        high = fmaxf(high, weight[i]);
    }
#pragma unroll
    for (int i = 0; i < FINISH_PARTS_MAX; i++) {
        weight[i] = weight[i] == -INFINITY ? 0.f : expf(weight[i] - high);
        total += weight[i];
    }
    const float inverse = total > 0 ? 1.f / total : 0.f;
    const uint64_t to = entry * p.out_entry + head * p.out_head;
    for (uint32_t d = lane; d < p.dim; d += 32) {
        float x = 0;
#pragma unroll
        for (int i = 0; i < FINISH_PARTS_MAX; i++) {
            if (i < p.parts && weight[i] > 0) x += weight[i] * inverse * p.part_out[i][uint64_t(row) * p.dim + d];
        }
        switch (Type(p.type)) {
        case Type::BF16: static_cast<__nv_bfloat16 *>(p.out)[to + d] = __float2bfloat16_rn(x); break;
        case Type::F16: static_cast<__half *>(p.out)[to + d] = __float2half_rn(x); break;
        default: static_cast<float *>(p.out)[to + d] = x;
        }
    }
}
