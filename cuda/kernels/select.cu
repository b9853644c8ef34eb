// The best units of each item: keys by the largest normalised score of the group, in 4095 steps of 1/128 nat; equal keys by index.
//
// The blocks of an item are a cluster: each makes the keys of its part and their histogram, reads the histograms of the others from
// their shared memory, finds the threshold and where its own part of the list begins, and writes it. All sums are of integers, so
// the list never depends on timing. Before Hopper there are no clusters, and one block does an item.
#include <cooperative_groups.h>

#include "summary.cuh"

namespace floe {

constexpr uint32_t BINS = 4096, SELECT_THREADS = 1024, SELECT_WARPS = SELECT_THREADS / 32, CLUSTER_MAX = 8;
constexpr float KEY_LOW = -31.5f, KEY_STEPS = 128.f; // keys span [-31.5, .5) nats

// Mirrored by `ops::sweep::select::SelectParams`.
struct SelectParams {
    float *scores;         // [pages / 16, group, 16]; pages: selected ones become -inf
    __half *residuals;     // tokens: [pages, group, 16], to be added to the page's score; selected ones become -inf; pages: null
    const float *lse;      // [items, group]
    const float *attended; // [items, group] lse of what is attended anyway, or null
    const uint32_t *first; // [items] first page, a multiple of 16
    const uint32_t *end;   // [items] one past the last page
    const uint32_t *ids;   // [units] what the list says of a unit, or null = the unit's number
    uint16_t *keys;        // [units], where they do not fit into shared memory, else null
    const uint32_t *budgets;    // [items] units at most, or null = budget
    const uint32_t *list_first; // [items] where the item's list begins
    uint32_t *list_end;    // [items] where it ends
    uint32_t *list;        // budget entries an item
    uint32_t group, budget, num_pages, list_len;
    uint32_t share;        // pages that the shared memory of a block has room for, a multiple of 16; without `keys` no more are looked at
};

// Exclusive sum over the block's threads; `total` for everyone.
__device__ __forceinline__ uint32_t scan(uint32_t x, uint32_t &total) {
    __shared__ uint32_t sums[32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t y = x;
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t z = __shfl_up_sync(~0u, y, d);
        if (lane >= d) y += z;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = y;
    __syncthreads();
    // Every warp sums the warps itself: cheaper than another barrier.
    uint32_t w = lane < SELECT_WARPS ? sums[lane] : 0;
    const uint32_t own = w;
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t z = __shfl_up_sync(~0u, w, d);
        if (lane >= d) w += z;
    }
    total = __shfl_sync(~0u, w, 31);
    return __shfl_sync(~0u, w - own, warp) + y - x;
}

// Key 0 is never selected; everything else has at least 1.
__device__ __forceinline__ uint32_t key_of(float best) {
    return best > -INFINITY ? uint32_t(fminf(fmaxf((best - KEY_LOW) * KEY_STEPS, 1.f), float(BINS - 1))) : 0;
}

struct Cluster {
#if __CUDA_ARCH__ >= 900
    __device__ static uint32_t blocks() { return cooperative_groups::this_cluster().num_blocks(); }
    __device__ static uint32_t rank() { return cooperative_groups::this_cluster().block_rank(); }
    __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
    template <typename T> __device__ static const T *of(T *x, uint32_t rank) { return cooperative_groups::this_cluster().map_shared_rank(x, rank); }
#else
    __device__ static uint32_t blocks() { return 1; }
    __device__ static uint32_t rank() { return 0; }
    __device__ static void sync() { __syncthreads(); }
    template <typename T> __device__ static const T *of(T *x, uint32_t) { return x; }
#endif
};

// Of an item with at most GROUP heads.
template <bool TOKENS, int GROUP> __device__ __forceinline__ void select(const SelectParams &p) {
    constexpr uint32_t PER_PAGE = TOKENS ? 16 : 1, EACH = BINS / SELECT_THREADS;
    extern __shared__ __align__(16) uint16_t shared_keys[];
    __shared__ __align__(16) uint32_t bins[BINS];
    __shared__ uint32_t found[2];
    const uint32_t item = blockIdx.y, rank = Cluster::rank(), blocks = Cluster::blocks();
    const uint32_t first = p.first[item], end = max(min(p.end[item], p.num_pages), first);
    // Whole tiles of 16 pages to a block.
    uint32_t share = ((end - first + 15) / 16 + blocks - 1) / blocks * 16;
    if (!p.keys) share = min(share, p.share);
    const uint32_t begin = min(first + rank * share, end), stop = min(begin + share, end), units = (stop - begin) * PER_PAGE;
    const uint32_t budget = p.budgets ? min(p.budgets[item], p.budget) : p.budget;
    uint16_t *keys = share <= p.share ? shared_keys : p.keys + uint64_t(begin) * PER_PAGE;
    float lse[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const uint32_t head = min(uint32_t(g), p.group - 1);
        lse[g] = p.lse[item * p.group + head];
        if (p.attended) {
            const float a = p.attended[item * p.group + head], high = fmaxf(a, lse[g]);
            if (high > -INFINITY) lse[g] = high + logf(expf(a - high) + expf(lse[g] - high));
        }
    }
    for (uint32_t i = threadIdx.x; i < BINS; i += SELECT_THREADS) bins[i] = 0;
    __syncthreads();
    if constexpr (TOKENS) {
        // A thread takes half a page.
#pragma unroll 2
        for (uint32_t at = threadIdx.x; at < (stop - begin) * 2; at += SELECT_THREADS) {
            const uint32_t page = begin + at / 2;
            float best[8];
#pragma unroll
            for (int t = 0; t < 8; t++) best[t] = -INFINITY;
            // Four heads under way at a time.
#pragma unroll
            for (int four = 0; four < GROUP; four += 4) {
                if (four >= p.group) break;
                uint4 r[4];
                float over[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t head = min(uint32_t(four + i), p.group - 1);
                    r[i] = reinterpret_cast<const uint4 *>(p.residuals)[(uint64_t(page) * p.group + head) * 2 + at % 2];
                    // A head that is not there repeats the last one, which changes no maximum.
                    over[i] = p.scores[score_at(page / 16, p.group, head, page % 16)] - lse[four + i];
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const __half2 *x = reinterpret_cast<const __half2 *>(&r[i]);
#pragma unroll
                    for (int t = 0; t < 4; t++) {
                        const float2 s = __half22float2(x[t]);
                        best[2 * t] = fmaxf(best[2 * t], over[i] + s.x), best[2 * t + 1] = fmaxf(best[2 * t + 1], over[i] + s.y);
                    }
                }
            }
            uint32_t key[8];
#pragma unroll
            for (int t = 0; t < 8; t++) {
                key[t] = key_of(best[t]);
                if (key[t]) atomicAdd(bins + key[t], 1);
            }
            reinterpret_cast<uint4 *>(keys)[at] = {key[0] | key[1] << 16, key[2] | key[3] << 16, key[4] | key[5] << 16, key[6] | key[7] << 16};
        }
    } else {
        for (uint32_t at = threadIdx.x; at < units; at += SELECT_THREADS) {
            const uint32_t page = begin + at;
            float best = -INFINITY;
#pragma unroll
            for (int g = 0; g < GROUP; g++)
                if (g < p.group) best = fmaxf(best, p.scores[score_at(page / 16, p.group, g, page % 16)] - lse[g]);
            const uint32_t key = key_of(best);
            keys[at] = uint16_t(key);
            if (key) atomicAdd(bins + key, 1);
        }
    }
    Cluster::sync();
    // Thread i holds EACH bins from the top, of every block of the item: what lies above a bin is the sum before it.
    const uint32_t low_bin = BINS - EACH * (threadIdx.x + 1);
    uint32_t mine[EACH] = {}, before[EACH] = {}; // of all blocks; of those before this one
#pragma unroll
    for (uint32_t b = 0; b < CLUSTER_MAX; b++) {
        if (b >= blocks) break;
        const uint4 x = *reinterpret_cast<const uint4 *>(Cluster::of(bins, b) + low_bin);
        const uint32_t count[EACH] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            mine[i] += count[i];
            if (b < rank) before[i] += count[i];
        }
    }
    uint32_t total, above = scan(mine[0] + mine[1] + mine[2] + mine[3], total);
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--) {
        // The first bin that does not fit whole; exactly one thread finds it, or none and all fit.
        if (above <= budget && above + mine[i] > budget) found[0] = low_bin + i + 1, found[1] = above;
        above += mine[i];
    }
    if (threadIdx.x == 0 && total <= budget) found[0] = 1, found[1] = total;
    __syncthreads();
    const uint32_t low = found[0], whole = found[1];
    uint32_t lower_above = 0, lower_at = 0, above_before, at_before;
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        if (low_bin + i >= low) lower_above += before[i];
        else if (low_bin + i + 1 == low && low_bin + i > 0) lower_at += before[i];
    }
    scan(lower_above, above_before);
    scan(lower_at, at_before);
    if (rank == 0 && threadIdx.x == 0) p.list_end[item] = p.list_first[item] + min(budget, total);
    // Thread i holds consecutive units, so that places follow the index: eight at a time.
    const uint32_t each = ((units + 7) / 8 + SELECT_THREADS - 1) / SELECT_THREADS * 8;
    const uint32_t from = min(threadIdx.x * each, units), to = min(from + each, units);
    uint32_t n_above = 0, n_at = 0, ignored;
    for (uint32_t unit = from; unit < to; unit += 8) {
        // Past the last unit lie keys of no unit: they are not looked at.
        const uint4 x = *reinterpret_cast<const uint4 *>(keys + unit);
        const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            const uint32_t key = word[i / 2] >> (16 * (i % 2)) & 0xffff;
            const bool there = unit + i < to;
            n_above += there && key >= low;
            n_at += there && key && key + 1 == low;
        }
    }
    uint32_t above_at = above_before + scan(n_above, ignored), at_at = whole + at_before + scan(n_at, ignored);
    if (n_above + n_at > 0) {
        uint32_t *list = p.list + p.list_first[item];
        const uint32_t room = p.list_len - min(p.list_first[item], p.list_len);
        for (uint32_t unit = from; unit < to; unit++) {
            const uint32_t key = keys[unit];
            uint32_t place = budget;
            if (key >= low) place = above_at++;
            else if (key && key + 1 == low) place = at_at++;
            if (place >= budget || place >= room) continue;
            const uint32_t at = begin * PER_PAGE + unit;
            list[place] = p.ids ? p.ids[at] : at;
            for (uint32_t g = 0; g < p.group; g++) {
                if constexpr (TOKENS) p.residuals[(uint64_t(at / 16) * p.group + g) * 16 + at % 16] = __ushort_as_half(0xfc00);
                else p.scores[score_at(at / 16, p.group, g, at % 16)] = -INFINITY;
            }
        }
    }
    // Nobody leaves while others read its histogram.
    Cluster::sync();
}

} // namespace floe

#define SELECT(NAME, TOKENS, GROUP)                                                                                           \
    extern "C" __global__ void __launch_bounds__(floe::SELECT_THREADS)                                                        \
        select_##NAME##_g##GROUP(const __grid_constant__ floe::SelectParams p) {                                              \
        floe::wait_for_earlier();                                                                                             \
        floe::let_next_start();                                                                                               \
        floe::select<TOKENS, GROUP>(p);                                                                                       \
    }

SELECT(pages, false, 4)
SELECT(pages, false, 8)
SELECT(pages, false, 16)
SELECT(tokens, true, 4)
SELECT(tokens, true, 8)
SELECT(tokens, true, 16)
