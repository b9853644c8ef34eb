// Turns the tokens that a step attends into rows of device memory, and brings those that have none from host memory. A token that has
// no row is given the slot that was not used for the longest time.
//
// With `ahead` set the tokens are wanted later: nothing is listed, they count as used a step ago, and only slots that were used before
// that are given away, as many as there are.
//
// One block per item. It asks for the first missing rows before it looks for slots, so that the link works meanwhile. The block takes
// no more registers and shared memory than a block of the tail beside it leaves of a multiprocessor, else one would wait for the other.
//
// While a multiprocessor waits for host memory its other reads hardly move: beside 64 blocks that bring rows the tail took 137 us
// instead of 58. So where there are many items they list their rows, and a few large blocks, each with a multiprocessor to itself,
// bring them: as fast, since no number of blocks gets more out of host memory.
//
// Slots are looked at in a window that moves on from step to step when there are more than SLOTS_AT_ONCE; within it the choice is
// exact up to ages of 1023 steps. Equal ages, and the order in which slots are given, go by the thread that looks at them. Nothing
// depends on timing.
#include "cache.cuh"
#include "sum.cuh"

namespace floe {

constexpr uint32_t RESOLVE_THREADS = 512, RESOLVE_WARPS = RESOLVE_THREADS / 32, SLOTS_AT_ONCE = 8192, AGES = 1024, RETRIEVED_MAX = 4096;
constexpr uint32_t RESOLVE_REGISTERS = 48, FETCH_WARPS = 32;
// Of 512 bytes, copies that a warp has under way: of a block beside the tail, and of one by itself.
constexpr uint32_t COPY_BYTES = 512, UNDER_WAY = 3, FETCH_UNDER_WAY = 8;

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
    uint32_t *list;         // [items, list_each] rows to attend; ahead: rows of the units alone
    uint32_t *list_end;     // [items]; ahead: null
    void *kv;               // [rows, row_bytes]
    uint64_t *from;         // [items * retrieved] host addresses of rows that `cache_fetch` brings, or null: they are brought here
    uint32_t *to;           // [items * retrieved] their rows
    uint32_t *num_fetch;    // [1] zero before the step's first block
    uint64_t *counters;     // [3] += rows found in their slots, rows fetched; ahead: rows fetched
    uint32_t list_each, retrieved, row_bytes, num_rows, num_tokens;
    uint32_t unit_shift;    // ln2 of the tokens of a unit: 0 or 4
    uint32_t ahead;         // 0 or 1
};

// Token `i` of an item whose units begin at `first`.
__device__ __forceinline__ uint32_t token_at(const ResolveParams &p, uint32_t first, uint32_t i) {
    return (p.found[first + (i >> p.unit_shift)] << p.unit_shift) + (i & ((1u << p.unit_shift) - 1));
}

// Rows on their way from host memory through shared memory, DEEP copies of a warp at a time. A job is 512 bytes of a row; `i` counts
// those of the warp. A lane reads back what it copied itself.
template <uint32_t DEEP> struct Copies {
    uint32_t parts, piece_of_lane, pieces, ring; // `ring`: shared address of the lane's 16 bytes of the first place

    __device__ __forceinline__ Copies(const uint4 *shared, uint32_t row_bytes)
        : parts((row_bytes + COPY_BYTES - 1) / COPY_BYTES), piece_of_lane(threadIdx.x % 32), pieces(row_bytes / 16),
          ring(shared_address(shared + threadIdx.x / 32 * DEEP * 32 + threadIdx.x % 32)) {}

    __device__ __forceinline__ uint32_t entry(uint32_t job) const { return job / parts; }
    __device__ __forceinline__ uint32_t piece(uint32_t job) const { return job % parts * 32 + piece_of_lane; }

    // Starts a copy of row `from`; without one the place is passed over.
    __device__ __forceinline__ void start(uint32_t i, uint32_t job, uint64_t from) const {
        if (from && piece(job) < pieces)
            copy16_async(ring + i % DEEP * COPY_BYTES, reinterpret_cast<const uint4 *>(from) + piece(job), 16);
        copy_commit();
    }

    // Stores the oldest copy that is under way.
    __device__ __forceinline__ void store(uint32_t i, uint32_t job, char *to) const {
        copy_wait<DEEP - 1>();
        if (piece(job) >= pieces) return;
        uint4 x;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(ring + i % DEEP * COPY_BYTES));
        reinterpret_cast<uint4 *>(to)[piece(job)] = x;
    }
};

// Sum over the block, for everyone; `turn` alternates between calls, so that one barrier is enough.
__device__ __forceinline__ uint32_t block_count(uint32_t x, uint32_t turn) {
    __shared__ uint32_t sums[2][RESOLVE_WARPS];
    x = warp_count(x);
    if (threadIdx.x % 32 == 0) sums[turn % 2][threadIdx.x / 32] = x;
    __syncthreads();
    return warp_count(threadIdx.x % 32 < RESOLVE_WARPS ? sums[turn % 2][threadIdx.x % 32] : 0);
}

__device__ __forceinline__ void resolve(const ResolveParams &p) {
    __shared__ uint16_t missing[RETRIEVED_MAX]; // entries without a row
    __shared__ __align__(16) uint4 ring[RESOLVE_WARPS * UNDER_WAY * COPY_BYTES / 16];
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
    const uint32_t found = min(min((p.found_end[item] - first) << p.unit_shift, p.retrieved), p.list_each - fixed);
    const uint32_t token_base = floe::token_base(s, head);
    if (s.slots == DENSE) {
        if (p.ahead) return;
        for (uint32_t i = tid; i < found; i += RESOLVE_THREADS) p.list[list + fixed + i] = base + token_at(p, first, i) - token_base;
        if (tid == 0) p.list_end[item] = list + fixed + found;
        return;
    }
    uint32_t *rows = p.list + list + fixed;
    uint32_t num_missing = 0;
    for (uint32_t start = 0; start < found; start += RESOLVE_THREADS) {
        const uint32_t i = start + tid;
        uint32_t absent = 0;
        if (i < found) {
            const uint32_t token = token_at(p, first, i);
            const uint32_t row = token < p.num_tokens ? p.row_of_token[token] : NONE;
            absent = row >= p.num_rows;
            // An entry that finds no slot stays outside of kv: the attention leaves it out and reports it.
            rows[i] = row;
            if (!absent) p.used[row] = max(p.used[row], tick);
        }
        uint32_t total;
        const uint32_t before = exclusive_sum<RESOLVE_THREADS>(absent, total);
        if (absent) missing[num_missing + before] = uint16_t(i);
        num_missing += total;
    }
    if (tid == 0 && !p.ahead) {
        p.list_end[item] = list + fixed + found;
        atomicAdd(reinterpret_cast<unsigned long long *>(p.counters), uint64_t(found - num_missing));
        atomicAdd(reinterpret_cast<unsigned long long *>(p.counters) + 1, uint64_t(num_missing));
    }
    if (num_missing == 0) return;
    __syncthreads(); // what is missing is listed, what this step uses is marked

    const Copies<UNDER_WAY> copies(ring, p.row_bytes);
    const uint32_t warp = tid / 32;
    auto start_copy = [&](uint32_t i, uint32_t jobs) {
        const uint32_t job = warp + i * RESOLVE_WARPS;
        uint64_t from = 0;
        if (job < jobs) {
            const uint32_t token = token_at(p, first, missing[copies.entry(job)]);
            from = host_row(c, e.sequence, head, token - token_base, p.row_bytes);
        }
        copies.start(i, job, from);
    };
    // What is wanted later may find no slot: nothing is asked for in advance.
    if (!p.ahead && !p.from)
        for (uint32_t i = 0; i < UNDER_WAY; i++) start_copy(i, num_missing * copies.parts);

    // Ages of the slots in the window, two to a word, of slot `tid + 512 i` from the hand on; 0 = not to be given away.
    constexpr uint32_t EACH = SLOTS_AT_ONCE / RESOLVE_THREADS;
    const uint32_t window = min(s.slots, SLOTS_AT_ONCE), hand = p.hand[e.sequence * c.heads + head] % s.slots;
    auto row_at = [&](uint32_t i) {
        const uint32_t slot = hand + tid + i * RESOLVE_THREADS;
        return slots_at + (slot < s.slots ? slot : slot - s.slots);
    };
    uint32_t ages[EACH / 2];
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        uint32_t age = 0;
        if (tid + i * RESOLVE_THREADS < window) age = min(e.tick - p.used[row_at(i)], AGES - 1);
        // Used by this step or, ahead, by the one before.
        if (age <= p.ahead) age = 0;
        ages[i / 2] = i % 2 ? ages[i / 2] | age << 16 : age;
    }
    auto age_of = [&](uint32_t i) { return i % 2 ? ages[i / 2] >> 16 : ages[i / 2] & 0xffff; };
    // The largest age that as many slots as are missing have reached: bit by bit; 0 if there are not as many.
    uint32_t limit = 0;
#pragma unroll 1
    for (uint32_t bit = AGES / 2, turn = 0; bit; bit /= 2, turn++) {
        uint32_t count = 0;
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) count += age_of(i) >= limit + bit;
        if (block_count(count, turn) >= num_missing) limit += bit;
    }
    // Older ones are taken whole, of those of that age as many as are left.
    uint32_t counts = 0;
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) counts += age_of(i) > limit ? 1 : age_of(i) == limit && limit ? 1 << 16 : 0;
    uint32_t total;
    uint32_t places = exclusive_sum<RESOLVE_THREADS>(counts, total);
    const uint32_t whole = total & 0xffff, given = min(num_missing, whole + (total >> 16));
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        uint32_t at = NONE;
        if (age_of(i) > limit) at = places & 0xffff, places += 1;
        else if (age_of(i) == limit && limit) at = whole + (places >> 16), places += 1 << 16;
        if (at >= num_missing) continue;
        const uint32_t row = row_at(i), entry = missing[at], token = token_at(p, first, entry), old = p.token_of_row[row];
        rows[entry] = row;
        if (old < p.num_tokens && p.row_of_token[old] == row) p.row_of_token[old] = NONE;
        p.token_of_row[row] = token;
        p.row_of_token[token] = row;
        p.used[row] = tick;
    }
    __shared__ uint32_t place;
    if (tid == 0) {
        if (p.from) place = atomicAdd(p.num_fetch, given);
        p.hand[e.sequence * c.heads + head] = hand + window < s.slots ? hand + window : hand + window - s.slots;
        if (p.ahead) atomicAdd(reinterpret_cast<unsigned long long *>(p.counters) + 2, uint64_t(given));
    }
    if (!p.from) let_next_start(); // attention, which before the tail has its places would take them, and wait
    __syncthreads(); // every row is known
    if (p.from) {
        for (uint32_t i = tid; i < given; i += RESOLVE_THREADS) {
            const uint32_t token = token_at(p, first, missing[i]);
            p.from[place + i] = host_row(c, e.sequence, head, token - token_base, p.row_bytes);
            p.to[place + i] = rows[missing[i]];
        }
        return;
    }
    const uint32_t jobs = given * copies.parts;
    if (p.ahead)
        for (uint32_t i = 0; i < UNDER_WAY; i++) start_copy(i, jobs);
    for (uint32_t i = 0; warp + i * RESOLVE_WARPS < jobs; i++) {
        const uint32_t job = warp + i * RESOLVE_WARPS, row = rows[missing[copies.entry(job)]];
        copies.store(i, job, static_cast<char *>(p.kv) + uint64_t(row) * p.row_bytes);
        start_copy(i + UNDER_WAY, jobs);
    }
    copy_wait<0>();
}

// Mirrored by `ops::cache::resolve::FetchListedParams`.
struct FetchListedParams {
    const uint64_t *from; // [num] host-mapped addresses of rows
    const uint32_t *to;   // [num] rows of kv
    const uint32_t *num;  // [1]
    void *kv;             // [rows, row_bytes]
    uint32_t row_bytes, limit;
};

} // namespace floe

extern "C" __global__ void __maxnreg__(floe::RESOLVE_REGISTERS)
    cache_resolve(const __grid_constant__ floe::ResolveParams p) {
    const floe::Timeline timeline(floe::Work::Resolve);
    // The few blocks of `cache_fetch` take multiprocessors that are free.
    if (p.from) floe::let_next_start();
    floe::wait_for_earlier();
    floe::resolve(p);
}

// Brings the listed rows. Attention does not start early: it would take places from the tail, which begins with this kernel.
extern "C" __global__ void __launch_bounds__(floe::FETCH_WARPS * 32, 1) cache_fetch(const __grid_constant__ floe::FetchListedParams p) {
    using namespace floe;
    const Timeline timeline(Work::Fetch);
    extern __shared__ __align__(16) uint4 fetch_ring[]; // [warps of the block, FETCH_UNDER_WAY, COPY_BYTES / 16]
    const Copies<FETCH_UNDER_WAY> copies(fetch_ring, p.row_bytes);
    const uint32_t of_block = blockDim.x / 32, warp = blockIdx.x * of_block + threadIdx.x / 32, warps = gridDim.x * of_block;
    wait_for_earlier();
    const uint32_t jobs = min(*p.num, p.limit) * copies.parts;
    auto start_copy = [&](uint32_t i) {
        const uint32_t job = warp + i * warps;
        copies.start(i, job, job < jobs ? p.from[copies.entry(job)] : 0);
    };
    for (uint32_t i = 0; i < FETCH_UNDER_WAY; i++) start_copy(i);
    for (uint32_t i = 0; warp + i * warps < jobs; i++) {
        const uint32_t job = warp + i * warps;
        copies.store(i, job, static_cast<char *>(p.kv) + uint64_t(p.to[copies.entry(job)]) * p.row_bytes);
        start_copy(i + FETCH_UNDER_WAY);
    }
    copy_wait<0>();
}
