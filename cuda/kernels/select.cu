// The best units of each item: keys by the largest normalised score of the group, in 4095 steps of 1/128 nat; equal keys by index.
//
// The blocks of an item are a cluster; each has a part of the item's pages. A page's key is that of its best token, so the pages of
// the best keys, as many as the budget, hold at least as many tokens of no lower key: their lowest key bounds the threshold, and only
// tokens of pages above it, a few in a hundred, are looked at one by one. (A histogram of all tokens took 18 us for 128K tokens.)
// Thresholds come from histograms in shared memory that every block reads from the others. All sums are of integers, so the list
// never depends on timing. Before Hopper there are no clusters, and one block does an item.
#include <cooperative_groups.h>

#include "sum.cuh"
#include "summary.cuh"

namespace floe {

constexpr uint32_t BINS = 4096, COARSE = 256, FINE = BINS / COARSE;
constexpr uint32_t SELECT_THREADS = 1024, SELECT_WARPS = SELECT_THREADS / 32, CLUSTER_MAX = 8;
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
    const uint16_t *masks; // pages: [pages] then the budget is one of tokens, the list says ids of the tokens [pages, 16] with a bit
                           // in their page's mask, and a page's score is per token; or null
    const uint32_t *budgets;    // [items] units at most, or null = budget
    const uint32_t *list_first; // [items] where the item's list begins
    uint32_t *list_end;    // [items] where it ends
    uint32_t *list;        // budget entries an item
    uint32_t group, budget, num_pages, list_len;
    uint32_t share;        // pages of a block at most; no more are looked at
};

// Key 0 is never selected; everything else has at least 1.
__device__ __forceinline__ uint32_t key_of(float best) {
    return best > -INFINITY ? uint32_t(fminf(fmaxf((best - KEY_LOW) * KEY_STEPS, 1.f), float(BINS - 1))) : 0;
}

struct Cluster {
#if __CUDA_ARCH__ >= 900
    __device__ static uint32_t blocks() { return cooperative_groups::this_cluster().num_blocks(); }
    __device__ static uint32_t rank() { return cooperative_groups::this_cluster().block_rank(); }
    __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
    __device__ static uint32_t read(uint32_t *x, uint32_t rank) { return *cooperative_groups::this_cluster().map_shared_rank(x, rank); }
#else
    __device__ static uint32_t blocks() { return 1; }
    __device__ static uint32_t rank() { return 0; }
    __device__ static void sync() { __syncthreads(); }
    __device__ static uint32_t read(uint32_t *x, uint32_t) { return *x; }
#endif
};

// Counts of keys, with sums of 16 neighbours.
struct Histogram {
    uint32_t fine[BINS], coarse[COARSE];
};

// Where the budget ends among an item's keys.
struct Cut {
    uint32_t low, whole;                // lowest key that is taken whole; keys from there up
    uint32_t above_before, at_before;   // keys from `low` up, and at low - 1, of the blocks before this one
    uint32_t total;                     // keys above 0
};

// Of the keys that all blocks of the item have counted into `h`.
__device__ __forceinline__ Cut cut(Histogram &h, uint32_t budget, uint32_t rank, uint32_t blocks) {
    __shared__ Cut result;
    __syncthreads();
    if (threadIdx.x < COARSE) {
        uint32_t sum = 0;
#pragma unroll
        for (uint32_t i = 0; i < FINE; i += 4) {
            // Starting places differ so that neighbouring threads use different banks.
            const uint4 x = *reinterpret_cast<const uint4 *>(h.fine + threadIdx.x * FINE + (i + threadIdx.x * 4) % FINE);
            sum += x.x + x.y + x.z + x.w;
        }
        h.coarse[threadIdx.x] = sum;
    }
    Cluster::sync();
    // Neighbouring threads read neighbouring bins of the other blocks.
    __shared__ uint32_t all_bins[COARSE], before_bins[COARSE];
    if (threadIdx.x < COARSE) {
        uint32_t x[CLUSTER_MAX], sum = 0, sum_before = 0;
#pragma unroll
        for (uint32_t b = 0; b < CLUSTER_MAX; b++) x[b] = b < blocks ? Cluster::read(h.coarse + threadIdx.x, b) : 0;
#pragma unroll
        for (uint32_t b = 0; b < CLUSTER_MAX; b++) sum += x[b], sum_before += b < rank ? x[b] : 0;
        all_bins[threadIdx.x] = sum, before_bins[threadIdx.x] = sum_before;
    }
    __syncthreads();
    // One warp finds it: lane i has eight coarse bins from the top, then one fine one.
    if (threadIdx.x < 32) {
        constexpr uint32_t EACH = COARSE / 32;
        const uint32_t lane = threadIdx.x, top = COARSE - 1 - lane * EACH;
        uint32_t all[EACH], before[EACH];
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) all[i] = all_bins[top - i], before[i] = before_bins[top - i];
        uint32_t mine = 0, mine_before = 0;
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) mine += all[i], mine_before += before[i];
        uint32_t above = (inclusive_sum(mine) - mine), above_before = (inclusive_sum(mine_before) - mine_before);
        const uint32_t total = __shfl_sync(~0u, above + mine, 31), total_before = __shfl_sync(~0u, above_before + mine_before, 31);
        // The coarse bin that does not fit whole, if one does not.
        uint32_t bin = 0, start = 0, start_before = 0;
        bool here = false;
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            if (above <= budget && above + all[i] > budget) here = true, bin = top - i, start = above, start_before = above_before;
            above += all[i], above_before += before[i];
        }
        const uint32_t who = __ballot_sync(~0u, here);
        if (who == 0) {
            if (lane == 0) result = {1, total, total_before, 0, total};
        } else {
            const int from = __ffs(who) - 1;
            bin = __shfl_sync(~0u, bin, from), start = __shfl_sync(~0u, start, from), start_before = __shfl_sync(~0u, start_before, from);
            uint32_t x = 0, x_before = 0;
            const uint32_t at = bin * FINE + FINE - 1 - lane;
            if (lane < FINE) {
                uint32_t y[CLUSTER_MAX];
#pragma unroll
                for (uint32_t b = 0; b < CLUSTER_MAX; b++) y[b] = b < blocks ? Cluster::read(h.fine + at, b) : 0;
#pragma unroll
                for (uint32_t b = 0; b < CLUSTER_MAX; b++) x += y[b], x_before += b < rank ? y[b] : 0;
            }
            const uint32_t a = start + (inclusive_sum(x) - x), a_before = start_before + (inclusive_sum(x_before) - x_before);
            if (lane < FINE && a <= budget && a + x > budget) result = {at + 1, a, a_before, x_before, total};
        }
    }
    __syncthreads();
    return result;
}

// Of an item with at most GROUP heads.
template <bool TOKENS, int GROUP> __device__ __forceinline__ void select(const SelectParams &p) {
    extern __shared__ __align__(16) uint16_t shared_keys[]; // [share] keys of pages, then, tokens: [share] pages to be looked at
    __shared__ __align__(16) Histogram of_pages;
    __shared__ __align__(16) Histogram of_tokens;
    __shared__ float lse[GROUP];
    const uint32_t item = blockIdx.y, rank = Cluster::rank(), blocks = Cluster::blocks();
    for (uint32_t i = threadIdx.x; i < BINS; i += SELECT_THREADS) of_pages.fine[i] = 0;
    if (TOKENS)
        for (uint32_t i = threadIdx.x; i < BINS; i += SELECT_THREADS) of_tokens.fine[i] = 0;
    wait_for_earlier();
    let_next_start();
    const uint32_t first = p.first[item], end = max(min(p.end[item], p.num_pages), first);
    // Whole tiles of 16 pages to a block.
    const uint32_t share = min(((end - first + 15) / 16 + blocks - 1) / blocks * 16, p.share);
    const uint32_t begin = min(first + rank * share, end), stop = min(begin + share, end), pages = stop - begin;
    const uint32_t budget = p.budgets ? min(p.budgets[item], p.budget) : p.budget;
    if (threadIdx.x < GROUP) {
        const uint32_t head = min(threadIdx.x, p.group - 1);
        float x = p.lse[item * p.group + head];
        if (p.attended) {
            const float a = p.attended[item * p.group + head], high = fmaxf(a, x);
            if (high > -INFINITY) x = high + logf(expf(a - high) + expf(x - high));
        }
        lse[threadIdx.x] = x;
    }
    __syncthreads();
    uint16_t *keys = shared_keys, *chosen = shared_keys + p.share;
    if constexpr (TOKENS) {
        // Eight lanes take a page, sixteen bytes at a time: half of a head's tokens.
        const uint32_t lane = threadIdx.x % 8, pieces = 2 * p.group;
#pragma unroll 4
        for (uint32_t turn = threadIdx.x / 32 * 4; turn < pages; turn += SELECT_WARPS * 4) {
            const uint32_t at = turn + threadIdx.x % 32 / 8, page = begin + min(at, pages - 1);
            float best = -INFINITY;
#pragma unroll
            for (int k = 0; k < (2 * GROUP + 7) / 8; k++) {
                // A piece that is not there repeats the last, which changes no maximum.
                const uint32_t piece = min(lane + 8 * k, pieces - 1), head = piece / 2;
                const uint4 r = reinterpret_cast<const uint4 *>(p.residuals)[uint64_t(page) * pieces + piece];
                const float over = p.scores[score_at(page / 16, p.group, head, page % 16)] - lse[head];
                const __half2 *x = reinterpret_cast<const __half2 *>(&r);
                // Rounding keeps order: the best token is that of the largest residual.
                const __half2 most = __hmax2(__hmax2(x[0], x[1]), __hmax2(x[2], x[3]));
                best = fmaxf(best, over + __half2float(__hmax(__low2half(most), __high2half(most))));
            }
#pragma unroll
            for (int d = 1; d < 8; d *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, d));
            if (lane == 0 && at < pages) {
                const uint32_t key = key_of(best);
                keys[at] = uint16_t(key);
                if (key) atomicAdd(of_pages.fine + key, 1);
            }
        }
    } else {
        for (uint32_t at = threadIdx.x; at < pages; at += SELECT_THREADS) {
            const uint32_t page = begin + at;
            float best = -INFINITY;
#pragma unroll 4
            for (int g = 0; g < GROUP; g++) {
                const uint32_t head = min(uint32_t(g), p.group - 1);
                best = fmaxf(best, p.scores[score_at(page / 16, p.group, head, page % 16)] - lse[g]);
            }
            const uint32_t tokens = p.masks ? __popc(uint32_t(p.masks[page])) : 1;
            // The score has ln count.
            const uint32_t key = tokens == 0 ? 0 : key_of(p.masks ? best - logf(float(tokens)) : best);
            keys[at] = uint16_t(key);
            if (key) atomicAdd(of_pages.fine + key, tokens);
        }
    }
    Cut found = cut(of_pages, budget, rank, blocks);
    uint32_t *list = p.list + p.list_first[item];
    const uint32_t room = p.list_len - min(p.list_first[item], p.list_len);
    auto take = [&](uint32_t place, uint32_t unit) {
        if (place >= budget || place >= room) return;
        list[place] = p.ids ? p.ids[unit] : unit;
        for (uint32_t g = 0; g < p.group; g++) {
            if constexpr (TOKENS) p.residuals[(uint64_t(unit / 16) * p.group + g) * 16 + unit % 16] = __ushort_as_half(0xfc00);
            else p.scores[score_at(unit / 16, p.group, g, unit % 16)] = -INFINITY;
        }
    };
    // A page goes whole or not at all: the first that does not fit ends the list.
    auto take_page = [&](uint32_t place, uint32_t page, uint32_t tokens) {
        if (place + tokens > budget) {
            if (place <= budget) p.list_end[item] = p.list_first[item] + place;
            return;
        }
        if (place + tokens > room) return;
        // All under way before the first is stored.
        const uint32_t live = p.masks[page];
        uint4 ids[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) ids[i] = reinterpret_cast<const uint4 *>(p.ids)[page * 4 + i];
#pragma unroll
        for (uint32_t t = 0; t < 16; t++) {
            const uint32_t id = t % 4 == 0 ? ids[t / 4].x : t % 4 == 1 ? ids[t / 4].y : t % 4 == 2 ? ids[t / 4].z : ids[t / 4].w;
            if (live >> t & 1) list[place++] = id;
        }
        for (uint32_t g = 0; g < p.group; g++) p.scores[score_at(page / 16, p.group, g, page % 16)] = -INFINITY;
    };
    if constexpr (!TOKENS) {
        uint32_t above_at = found.above_before, at_at = found.whole + found.at_before;
        for (uint32_t turn = 0; turn < pages; turn += SELECT_THREADS) {
            const uint32_t at = turn + threadIdx.x, key = at < pages ? keys[at] : 0;
            const bool above = key >= found.low, level = key && key + 1 == found.low;
            if (!__syncthreads_or(above || level)) continue;
            // Both sums at once: a block has fewer than 2^16 units or tokens in a turn.
            const uint32_t weight = p.masks && (above || level) ? __popc(uint32_t(p.masks[begin + at])) : 1;
            uint32_t total;
            const uint32_t places = exclusive_sum<SELECT_THREADS>(above ? weight : level ? weight << 16 : 0, total);
            const uint32_t place = above ? above_at + (places & 0xffff) : at_at + (places >> 16);
            if (above || level) {
                if (p.masks) take_page(place, begin + at, weight);
                else take(place, begin + at);
            }
            above_at += total & 0xffff, at_at += total >> 16;
        }
    } else {
        // Pages that may hold a token that is taken, in order.
        const uint32_t least = found.total <= budget ? 1 : max(found.low - 1, 1u);
        uint32_t num = 0;
        for (uint32_t turn = 0; turn < pages; turn += SELECT_THREADS) {
            const uint32_t at = turn + threadIdx.x;
            const bool open = at < pages && keys[at] >= least;
            uint32_t total;
            const uint32_t place = exclusive_sum<SELECT_THREADS>(open, total);
            if (open) chosen[num + place] = uint16_t(at);
            num += total;
        }
        __syncthreads();
        // A thread takes a token: 64 pages a turn.
        auto key_at = [&](uint32_t at) -> uint32_t {
            if (at >= num * 16) return 0;
            const uint32_t page = begin + chosen[at / 16];
            float best = -INFINITY;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const uint32_t head = min(uint32_t(g), p.group - 1);
                const float over = p.scores[score_at(page / 16, p.group, head, page % 16)] - lse[g];
                best = fmaxf(best, over + __half2float(p.residuals[(uint64_t(page) * p.group + head) * 16 + at % 16]));
            }
            return key_of(best);
        };
        const uint32_t own = key_at(threadIdx.x);
        for (uint32_t turn = 0; turn < num * 16; turn += SELECT_THREADS) {
            const uint32_t key = turn ? key_at(turn + threadIdx.x) : own;
            if (key >= least) atomicAdd(of_tokens.fine + key, 1);
        }
        found = cut(of_tokens, budget, rank, blocks);
        uint32_t above_at = found.above_before, at_at = found.whole + found.at_before;
        for (uint32_t turn = 0; turn < num * 16; turn += SELECT_THREADS) {
            const uint32_t at = turn + threadIdx.x, key = turn ? key_at(at) : own;
            const bool above = key >= found.low, level = key && key + 1 == found.low;
            uint32_t total;
            const uint32_t places = exclusive_sum<SELECT_THREADS>(uint32_t(above) | uint32_t(level) << 16, total);
            const uint32_t unit = at < num * 16 ? (begin + chosen[at / 16]) * 16 + at % 16 : 0;
            if (above) take(above_at + (places & 0xffff), unit);
            if (level) take(at_at + (places >> 16), unit);
            above_at += total & 0xffff, at_at += total >> 16;
        }
    }
    // With masks whoever does not fit says where the list ends.
    const bool all = found.total <= budget;
    if (rank == 0 && threadIdx.x == 0 && (all || !p.masks)) p.list_end[item] = p.list_first[item] + min(budget, found.total);
    // Nobody leaves while others read its histogram.
    Cluster::sync();
}

} // namespace floe

#define SELECT(NAME, TOKENS, GROUP)                                                                                           \
    extern "C" __global__ void __launch_bounds__(floe::SELECT_THREADS, 1)                                                      \
        select_##NAME##_g##GROUP(const __grid_constant__ floe::SelectParams p) {                                              \
        const floe::Timeline timeline(floe::Work::Select);                                                                    \
        floe::select<TOKENS, GROUP>(p);                                                                                       \
    }

SELECT(pages, false, 4)
SELECT(pages, false, 8)
SELECT(pages, false, 16)
SELECT(tokens, true, 4)
SELECT(tokens, true, 8)
SELECT(tokens, true, 16)
