// Turns the tokens that a step attends into rows of device memory. What has no row yet is given the slot that was not used for the
// longest time, and put on the list of what `cache_fetch` has to bring.
//
// With `ahead` set the tokens are wanted later: nothing is listed, they count as used a step ago, and only slots that were used before
// that are given away, as many as there are.
//
// One block per item. Slots are looked at in a window that moves on from step to step when there are more than SLOTS_AT_ONCE;
// within it the choice is exact up to ages of 1023 steps, equal ages by place. Nothing depends on timing but the order in which
// the items' parts of the list to fetch follow one another.
#include "cache.cuh"
#include "sum.cuh"

namespace floe {

constexpr uint32_t RESOLVE_THREADS = 512, SLOTS_AT_ONCE = 8192, AGES = 1024, RETRIEVED_MAX = 4096;

// Mirrored by `ops::cache::resolve::ResolveParams`.
struct ResolveParams {
    Cache cache;
    const uint32_t *row_first, *row_end;     // [items] not empty: the item attends these rows and nothing else
    const uint32_t *found_first, *found_end; // [items] into `found`
    const uint32_t *found;  // units: tokens as 16 page + place in the page, or pages
    uint32_t *row_of_token; // [16 pages] row or NONE
    uint32_t *token_of_row; // [rows] as in `found`, or NONE
    uint32_t *used;         // [rows] tick of the last step that attended the row
    uint32_t *hand;         // [sequences, heads] first slot to look at
    uint32_t *list;         // [items, list_each] rows to attend
    uint32_t *list_end;     // [items]
    uint64_t *from;         // [items * retrieved] host addresses of the rows to fetch
    uint32_t *to;           // [items * retrieved] their rows
    uint32_t *num_fetch;    // [1] zero before the step's first block
    uint64_t *counters;     // [3] += rows found in their slots, rows to fetch; ahead: rows to fetch
    uint32_t list_each, retrieved, row_bytes, num_rows, num_tokens;
    uint32_t unit_shift;    // ln2 of the tokens of a unit: 0 or 4
    uint32_t ahead;         // 0 or 1
};

// Token `i` of an item whose units begin at `first`.
__device__ __forceinline__ uint32_t token_at(const ResolveParams &p, uint32_t first, uint32_t i) {
    return (p.found[first + (i >> p.unit_shift)] << p.unit_shift) + (i & ((1u << p.unit_shift) - 1));
}

__device__ __forceinline__ void resolve(const ResolveParams &p) {
    __shared__ uint32_t missing[RETRIEVED_MAX];   // entries without a row; then their new rows
    __shared__ uint16_t ages[SLOTS_AT_ONCE];
    __shared__ uint32_t bins[AGES];
    __shared__ uint32_t threshold[2], place;
    const Cache &c = p.cache;
    const uint32_t item = blockIdx.x, head = item % c.heads, tid = threadIdx.x;
    const BatchEntry e = c.batch[item / c.heads];
    const uint32_t list = item * p.list_each;
    if (e.tokens == 0 || (!p.ahead && p.row_end[item] > p.row_first[item])) {
        if (tid == 0 && !p.ahead) p.list_end[item] = list;
        return;
    }
    const SequencePlace s = c.sequences[e.sequence];
    const uint32_t base = s.rows + head * s.rows_each, slots_at = base + c.sinks + c.ring;
    const uint32_t full = published(c, e.tokens), sinks = min(c.sinks, e.tokens);
    const uint32_t newest = max((s.tokens_each ? full : min(full, s.pages_each)) * 16, sinks);
    const uint32_t fixed = p.ahead ? 0 : min(sinks + e.tokens - newest, p.list_each);
    const uint32_t tick = e.tick - p.ahead;
    for (uint32_t i = tid; i < fixed; i += RESOLVE_THREADS)
        p.list[list + i] = row_of(c, s, head, i < sinks ? i : newest + i - sinks);

    const uint32_t first = p.found_first[item];
    const uint32_t found = min(min((p.found_end[item] - first) << p.unit_shift, p.retrieved), p.ahead ? ~0u : p.list_each - fixed);
    const uint32_t token_base = floe::token_base(s, head);
    if (s.slots == DENSE) {
        if (p.ahead) return;
        for (uint32_t i = tid; i < found; i += RESOLVE_THREADS) p.list[list + fixed + i] = base + token_at(p, first, i) - token_base;
        if (tid == 0) p.list_end[item] = list + fixed + found;
        return;
    }
    uint32_t num_missing = 0;
    for (uint32_t start = 0; start < found; start += RESOLVE_THREADS) {
        const uint32_t i = start + tid;
        uint32_t absent = 0;
        if (i < found) {
            const uint32_t token = token_at(p, first, i);
            const uint32_t row = token < p.num_tokens ? p.row_of_token[token] : NONE;
            absent = row >= p.num_rows;
            // An entry that finds no slot stays outside of kv: the attention leaves it out and reports it.
            if (!p.ahead) p.list[list + fixed + i] = row;
            if (!absent) p.used[row] = max(p.used[row], tick);
        }
        uint32_t total;
        const uint32_t before = exclusive_sum<RESOLVE_THREADS>(absent, total);
        if (absent) missing[num_missing + before] = i;
        num_missing += total;
    }
    if (tid == 0 && !p.ahead) {
        p.list_end[item] = list + fixed + found;
        atomicAdd(reinterpret_cast<unsigned long long *>(p.counters), uint64_t(found - num_missing));
        atomicAdd(reinterpret_cast<unsigned long long *>(p.counters) + 1, uint64_t(num_missing));
        if (num_missing) place = atomicAdd(p.num_fetch, num_missing);
    }
    if (num_missing == 0) return;

    // Ages of the slots in the window; below `least` = not to be given away: 0 = in use by this step.
    const uint32_t least = 1 + p.ahead;
    const uint32_t window = min(s.slots, SLOTS_AT_ONCE), hand = p.hand[e.sequence * c.heads + head] % s.slots;
    for (uint32_t i = tid; i < AGES; i += RESOLVE_THREADS) bins[i] = 0;
    __syncthreads(); // what this step uses is marked, the bins are clear
    for (uint32_t i = tid; i < window; i += RESOLVE_THREADS) {
        const uint32_t slot = hand + i < s.slots ? hand + i : hand + i - s.slots;
        const uint32_t age = min(e.tick - p.used[slots_at + slot], AGES - 1);
        ages[i] = uint16_t(age);
        if (age >= least) atomicAdd(bins + age, 1);
    }
    __syncthreads();
    // The oldest ages that are taken whole, and how many slots they are.
    constexpr uint32_t EACH = AGES / RESOLVE_THREADS;
    uint32_t mine = 0, total;
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) mine += bins[AGES - 1 - tid * EACH - i];
    uint32_t older = exclusive_sum<RESOLVE_THREADS>(mine, total);
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t age = AGES - 1 - tid * EACH - i, count = bins[age];
        if (older < num_missing && older + count >= num_missing) threshold[0] = age, threshold[1] = older;
        older += count;
    }
    if (tid == 0 && total < num_missing) threshold[0] = least - 1, threshold[1] = total;
    if (tid == 0 && p.ahead) {
        const uint32_t given = min(num_missing, total);
        atomicAdd(reinterpret_cast<unsigned long long *>(p.counters) + 2, uint64_t(given));
        place = atomicAdd(p.num_fetch, given);
    }
    __syncthreads();
    const uint32_t limit = threshold[0], whole = threshold[1];
    // Thread i holds consecutive slots, so that places follow the slots.
    const uint32_t each = (window + RESOLVE_THREADS - 1) / RESOLVE_THREADS;
    const uint32_t begin = min(tid * each, window), stop = min(begin + each, window);
    uint32_t counts = 0;
    for (uint32_t i = begin; i < stop; i++) counts += ages[i] > limit ? 1 : ages[i] == limit && limit >= least ? 1 << 16 : 0;
    uint32_t places = exclusive_sum<RESOLVE_THREADS>(counts, total);
    for (uint32_t i = begin; i < stop; i++) {
        uint32_t at = NONE;
        if (ages[i] > limit) at = places & 0xffff, places += 1;
        else if (ages[i] == limit && limit >= least) at = whole + (places >> 16), places += 1 << 16;
        if (at >= num_missing) continue;
        const uint32_t slot = hand + i < s.slots ? hand + i : hand + i - s.slots, row = slots_at + slot;
        const uint32_t entry = missing[at], token = token_at(p, first, entry), old = p.token_of_row[row];
        if (old < p.num_tokens && p.row_of_token[old] == row) p.row_of_token[old] = NONE;
        const uint32_t position = token - token_base;
        p.token_of_row[row] = token;
        p.row_of_token[token] = row;
        p.used[row] = tick;
        if (!p.ahead) p.list[list + fixed + entry] = row;
        p.from[place + at] = host_row(c, e.sequence, head, position, p.row_bytes);
        p.to[place + at] = row;
    }
    if (tid == 0) p.hand[e.sequence * c.heads + head] = hand + window < s.slots ? hand + window : hand + window - s.slots;
}

// Mirrored by `ops::cache::resolve::FetchListedParams`.
struct FetchListedParams {
    const uint64_t *from; // [num] host-mapped addresses of rows
    const uint32_t *to;   // [num] rows of kv
    const uint32_t *num;  // [1]
    uint4 *kv;            // [rows, pieces]
    uint32_t pieces, limit;
};

} // namespace floe

extern "C" __global__ void __launch_bounds__(floe::RESOLVE_THREADS, 2) cache_resolve(const __grid_constant__ floe::ResolveParams p) {
    floe::let_next_start();
    floe::wait_for_earlier();
    floe::resolve(p);
}

// Brings the listed rows. A warp takes four rows at a time, all under way before the first is stored.
extern "C" __global__ void __launch_bounds__(256) cache_fetch(const __grid_constant__ floe::FetchListedParams p) {
    constexpr uint32_t AT_ONCE = 4;
    floe::let_next_start();
    floe::wait_for_earlier();
    const uint32_t lane = threadIdx.x % 32, warps = gridDim.x * 8, num = min(*p.num, p.limit);
    const uint32_t parts = (p.pieces + 31) / 32, jobs = num * parts; // 512 bytes each
    for (uint32_t job = blockIdx.x * 8 + threadIdx.x / 32; job < jobs; job += warps * AT_ONCE) {
        uint4 x[AT_ONCE];
        uint4 *target[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            target[i] = nullptr;
            const uint32_t at = job + i * warps, piece = at % parts * 32 + lane;
            if (at >= jobs || piece >= p.pieces) continue;
            const uint4 *from = reinterpret_cast<const uint4 *>(p.from[at / parts]) + piece;
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(x[i].x), "=r"(x[i].y), "=r"(x[i].z), "=r"(x[i].w) : "l"(from));
            target[i] = p.kv + uint64_t(p.to[at / parts]) * p.pieces + piece;
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++)
            if (target[i]) *target[i] = x[i];
    }
}
