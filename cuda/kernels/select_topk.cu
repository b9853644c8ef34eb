// The best units of each item: keys by the largest normalised score of the group, in 4095 steps of 1/128 nat; equal keys by index.
//
// Few units: one block an item does everything, keys in shared memory. Else three launches: keys and their histogram (the last block of an item finds the threshold), counts per block above and at the
// threshold (the last block turns them into places), and the list. All sums are of integers, so the list never depends on timing.
#include "summary.cuh"

namespace floe {

constexpr uint32_t BINS = 4096, SELECT_THREADS = 512, SELECT_UNITS = 4096; // units of a block

constexpr float KEY_LOW = -24.f, KEY_STEPS = 128.f;                         // keys span [-24, 8) nats

// Mirrored by `ops::select_topk::SelectParams`.
struct SelectParams {
    void *scores;          // T, tiles [group, 16]; selected units become -inf
    const float *lse;      // [items, group] subtracted from scores, or null
    const uint32_t *first; // [items] first unit, a multiple of 16
    const uint32_t *end;   // [items] one past the last unit
    const uint32_t *ids;   // [units] what the list says of a unit, or null = the unit's number
    uint16_t *keys;        // [units]
    uint32_t *histogram;   // [items, BINS] zero before and after
    uint32_t *counts;      // [items, blocks.x, 2] above, at the threshold; becomes places
    uint32_t *threshold;   // [items, 2] lowest key that is selected whole; units above
    uint32_t *arrived;     // [2, items] zero before and after
    const uint32_t *list_first; // [items] where the item's list begins
    uint32_t *list_end;    // [items] where it ends
    uint32_t *list;        // budget entries an item
    uint32_t group, budget, num_units, list_len;
    uint32_t units_max;    // of an item: what the keys in shared memory have room for
};

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }

// Exclusive sum over the block's threads; `total` for everyone.
__device__ __forceinline__ uint32_t scan(uint32_t x, uint32_t &total) {
    __shared__ uint32_t sums[SELECT_THREADS / 32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t y = x;
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t z = __shfl_up_sync(~0u, y, d);
        if (lane >= d) y += z;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = y;
    __syncthreads();
    uint32_t before = 0;
    total = 0;
    for (uint32_t w = 0; w < SELECT_THREADS / 32; w++) {
        if (w < warp) before += sums[w];
        total += sums[w];
    }
    return before + y - x;
}

// Whether this block is the last of its item; then it sees what the others wrote.
__device__ __forceinline__ bool last_of_item(uint32_t *arrived) {
    __shared__ uint32_t last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return last;
}

// Key 0 is never selected; everything else has at least 1.
template <typename T>
__device__ __forceinline__ uint32_t key_of(const SelectParams &p, const T *scores, uint32_t unit, const float (&lse)[16]) {
    float best = -INFINITY;
#pragma unroll
    for (int g = 0; g < 16; g++)
        if (g < p.group) best = fmaxf(best, wide(scores[score_at(unit / 16, p.group, g, unit % 16)]) - lse[g]);
    return best > -INFINITY ? uint32_t(fminf(fmaxf((best - KEY_LOW) * KEY_STEPS, 1.f), float(BINS - 1))) : 0;
}

template <typename T> __device__ __forceinline__ void select_keys(const SelectParams &p) {
    __shared__ uint32_t bins[BINS];
    const uint32_t item = blockIdx.y, first = p.first[item], end = min(p.end[item], p.num_units);
    for (uint32_t i = threadIdx.x; i < BINS; i += SELECT_THREADS) bins[i] = 0;
    float lse[16];
#pragma unroll
    for (int g = 0; g < 16; g++) lse[g] = p.lse && g < p.group ? p.lse[item * p.group + g] : 0;
    __syncthreads();
    const T *scores = static_cast<const T *>(p.scores);
    const uint32_t begin = first + blockIdx.x * SELECT_UNITS, stop = min(begin + SELECT_UNITS, end);
    for (uint32_t unit = begin + threadIdx.x; unit < stop; unit += SELECT_THREADS) {
        const uint32_t key = key_of(p, scores, unit, lse);
        p.keys[unit] = uint16_t(key);
        if (key) atomicAdd(bins + key, 1);
    }
    __syncthreads();
    uint32_t *histogram = p.histogram + item * BINS;
    for (uint32_t i = threadIdx.x; i < BINS; i += SELECT_THREADS)
        if (bins[i]) atomicAdd(histogram + i, bins[i]);
    if (!last_of_item(p.arrived + item)) return;
    // Thread i holds the bins from the top: the number above a bin is the sum of those before it.
    constexpr uint32_t EACH = BINS / SELECT_THREADS;
    const uint32_t top = BINS - 1 - threadIdx.x * EACH;
    uint32_t mine = 0, count[EACH];
    for (uint32_t i = 0; i < EACH; i++) mine += count[i] = __ldcg(histogram + top - i);
    uint32_t total, above = scan(mine, total);
    for (uint32_t i = 0; i < EACH; i++) {
        histogram[top - i] = 0;
        // The first bin that does not fit whole is the threshold; exactly one thread finds it, or none and all fit.
        if (above <= p.budget && above + count[i] > p.budget) {
            p.threshold[2 * item] = top - i + 1;
            p.threshold[2 * item + 1] = above;
        }
        above += count[i];
    }
    if (threadIdx.x == 0 && total <= p.budget) p.threshold[2 * item] = 1, p.threshold[2 * item + 1] = total;
}

// Exclusive sum over `N` threads; `total` for everyone.
template <uint32_t N> __device__ __forceinline__ uint32_t scan_wide(uint32_t x, uint32_t &total) {
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
    uint32_t w = lane < N / 32 ? sums[lane] : 0;
    const uint32_t own = w;
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t z = __shfl_up_sync(~0u, w, d);
        if (lane >= d) w += z;
    }
    total = __shfl_sync(~0u, w, 31);
    return __shfl_sync(~0u, w - own, warp) + y - x;
}

template <typename T> __device__ __forceinline__ void select_one(const SelectParams &p, T minus_infinity) {
    constexpr uint32_t N = 1024, EACH = BINS / N;
    extern __shared__ uint16_t one_keys[]; // [units]
    __shared__ uint32_t bins[BINS];
    __shared__ uint32_t found[2];
    const uint32_t item = blockIdx.y, first = p.first[item], end = min(p.end[item], p.num_units);
    const uint32_t units = end > first ? min(end - first, p.units_max) : 0;
    for (uint32_t i = threadIdx.x; i < BINS; i += N) bins[i] = 0;
    float lse[16];
#pragma unroll
    for (int g = 0; g < 16; g++) lse[g] = p.lse && g < p.group ? p.lse[item * p.group + g] : 0;
    __syncthreads();
    T *scores = static_cast<T *>(p.scores);
#pragma unroll 4
    for (uint32_t unit = threadIdx.x; unit < units; unit += N) {
        const uint32_t key = key_of(p, scores, first + unit, lse);
        one_keys[unit] = uint16_t(key);
        if (key) atomicAdd(bins + key, 1);
    }
    __syncthreads();
    const uint32_t top = BINS - 1 - threadIdx.x * EACH;
    uint32_t mine = 0, total;
    for (uint32_t i = 0; i < EACH; i++) mine += bins[top - i];
    uint32_t above = scan_wide<N>(mine, total);
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t count = bins[top - i];
        if (above <= p.budget && above + count > p.budget) found[0] = top - i + 1, found[1] = above;
        above += count;
    }
    if (threadIdx.x == 0 && total <= p.budget) found[0] = 1, found[1] = total;
    __syncthreads();
    const uint32_t low = found[0], whole = found[1];
    if (threadIdx.x == 0) p.list_end[item] = p.list_first[item] + min(p.budget, total);
    uint32_t *list = p.list + p.list_first[item];
    const uint32_t room = p.list_len - min(p.list_first[item], p.list_len);
    // Thread i holds consecutive units, so that places follow the index.
    const uint32_t each = (units + N - 1) / N, begin = min(threadIdx.x * each, units), stop = min(begin + each, units);
    uint32_t n_above = 0, n_at = 0, ignored;
    for (uint32_t unit = begin; unit < stop; unit++) {
        const uint32_t key = one_keys[unit];
        n_above += key >= low;
        n_at += key && key + 1 == low;
    }
    uint32_t above_at = scan_wide<N>(n_above, ignored), at_at = whole + scan_wide<N>(n_at, ignored);
    if (n_above + n_at == 0) return;
    for (uint32_t unit = begin; unit < stop; unit++) {
        const uint32_t key = one_keys[unit];
        uint32_t place = p.budget;
        if (key >= low) place = above_at++;
        else if (key && key + 1 == low) place = at_at++;
        if (place >= p.budget || place >= room) continue;
        const uint32_t at = first + unit;
        list[place] = p.ids ? p.ids[at] : at;
        for (uint32_t g = 0; g < p.group; g++) scores[score_at(at / 16, p.group, g, at % 16)] = minus_infinity;
    }
}

} // namespace floe

extern "C" __global__ void __launch_bounds__(floe::SELECT_THREADS)
    select_keys_f32(const __grid_constant__ floe::SelectParams p) { floe::select_keys<float>(p); }
extern "C" __global__ void __launch_bounds__(floe::SELECT_THREADS)
    select_keys_f16(const __grid_constant__ floe::SelectParams p) { floe::select_keys<__half>(p); }

// Counts of this block's units above and at the threshold.
extern "C" __global__ void __launch_bounds__(floe::SELECT_THREADS) select_count(const __grid_constant__ floe::SelectParams p) {
    using namespace floe;
    const uint32_t item = blockIdx.y, first = p.first[item], end = min(p.end[item], p.num_units);
    const uint32_t low = p.threshold[2 * item], begin = first + blockIdx.x * SELECT_UNITS, stop = min(begin + SELECT_UNITS, end);
    uint32_t above = 0, at = 0, total_above, total_at;
    for (uint32_t unit = begin + threadIdx.x; unit < stop; unit += SELECT_THREADS) {
        const uint32_t key = p.keys[unit];
        above += key >= low;
        at += key && key + 1 == low;
    }
    scan(above, total_above);
    scan(at, total_at);
    uint32_t *counts = p.counts + (uint64_t(item) * gridDim.x) * 2;
    if (threadIdx.x == 0) counts[2 * blockIdx.x] = total_above, counts[2 * blockIdx.x + 1] = total_at;
    if (!last_of_item(p.arrived + gridDim.y + item)) return;
    uint32_t before_above = 0, before_at = 0;
    for (uint32_t start = 0; start < gridDim.x; start += SELECT_THREADS) {
        const uint32_t block = start + threadIdx.x;
        const uint32_t a = block < gridDim.x ? __ldcg(counts + 2 * block) : 0, t = block < gridDim.x ? __ldcg(counts + 2 * block + 1) : 0;
        const uint32_t a_at = before_above + scan(a, total_above), t_at = before_at + scan(t, total_at);
        if (block < gridDim.x) counts[2 * block] = a_at, counts[2 * block + 1] = t_at;
        before_above += total_above;
        before_at += total_at;
    }
    if (threadIdx.x == 0) p.list_end[item] = p.list_first[item] + min(p.budget, before_above + before_at);
}

template <typename T> __device__ __forceinline__ void select_list(const floe::SelectParams &p, T minus_infinity) {
    using namespace floe;
    const uint32_t item = blockIdx.y, first = p.first[item], end = min(p.end[item], p.num_units);
    const uint32_t low = p.threshold[2 * item], whole = p.threshold[2 * item + 1];
    const uint32_t begin = first + blockIdx.x * SELECT_UNITS, stop = min(begin + SELECT_UNITS, end);
    // Thread i holds consecutive units, so that places follow the index.
    constexpr uint32_t EACH = SELECT_UNITS / SELECT_THREADS;
    const uint32_t mine = begin + threadIdx.x * EACH;
    uint32_t key[EACH], above = 0, at = 0, total;
    for (uint32_t i = 0; i < EACH; i++) {
        key[i] = mine + i < stop ? p.keys[mine + i] : 0;
        above += key[i] >= low;
        at += key[i] && key[i] + 1 == low;
    }
    const uint32_t *counts = p.counts + (uint64_t(item) * gridDim.x + blockIdx.x) * 2;
    uint32_t above_at = counts[0] + scan(above, total), at_at = counts[1] + scan(at, total);
    uint32_t *list = p.list + p.list_first[item];
    const uint32_t room = p.list_len - min(p.list_first[item], p.list_len);
    T *scores = static_cast<T *>(p.scores);
    for (uint32_t i = 0; i < EACH; i++) {
        uint32_t place = p.budget;
        if (key[i] >= low) place = above_at++;
        else if (key[i] && key[i] + 1 == low) place = whole + at_at++;
        if (place >= p.budget || place >= room) continue;
        list[place] = p.ids ? p.ids[mine + i] : mine + i;
        for (uint32_t g = 0; g < p.group; g++) scores[score_at((mine + i) / 16, p.group, g, (mine + i) % 16)] = minus_infinity;
    }
}

extern "C" __global__ void __launch_bounds__(floe::SELECT_THREADS)
    select_list_f32(const __grid_constant__ floe::SelectParams p) { select_list<float>(p, -INFINITY); }
extern "C" __global__ void __launch_bounds__(floe::SELECT_THREADS)
    select_list_f16(const __grid_constant__ floe::SelectParams p) { select_list<__half>(p, __ushort_as_half(0xfc00)); }

extern "C" __global__ void __launch_bounds__(1024)
    select_one_f32(const __grid_constant__ floe::SelectParams p) { floe::select_one<float>(p, -INFINITY); }
extern "C" __global__ void __launch_bounds__(1024)
    select_one_f16(const __grid_constant__ floe::SelectParams p) { floe::select_one<__half>(p, __ushort_as_half(0xfc00)); }
