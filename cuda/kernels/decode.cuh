// Split-KV attention of one query group per item, over pages, rows, a contiguous range, or all rows wherever they lie; see
// DecodeParams.
//
// One thread block takes one split of one item; its warps take the split's tiles in turn, each with a private ring of
// asynchronous copies, so that the loop has no block barrier. The group's query heads are the 16 rows of the tensor-core
// product (padded with zeros). Warps are joined in shared memory, splits by the block that finishes last, always in the same
// order: the result does not depend on timing.
#pragma once
#include "tile.cuh"

namespace floe {

// Mirrored by `ops::decode::DecodeParams`.
struct DecodeParams {
    const void *q;         // [items, group, D] E
    const void *kv;        // [num_rows, 2, D] E; a page (slot) is 16 consecutive rows
    const uint32_t *first; // [items] first entry of the item's list, or first row of its range
    const uint32_t *end;   // [items] one past the last
    const uint32_t *entries; // pages: slots; rows: rows; range: unused
    const uint16_t *masks;   // pages: bit r = row r of the page is attended; null = all; else unused
    const uint32_t *host_pages; // fetch: page of `host` that must be brought into the slot, or RESIDENT
    const void *host;        // fetch: [host_pages, 16, 2, D] E in host-mapped memory; pages and rows: [num_host, 16 or 1, 2, D] E, or null
    const uint4 *work;       // [blocks] (item, split, number of splits of the item, first partial state of the item)
    float *part_out;         // [partial states, group, D]
    float *part_lse;         // [partial states, group]
    uint32_t *arrived;       // [items] zero before, zero after
    uint32_t *fault;         // [1] becomes 1 when an entry lies outside kv or host; such an entry is left out
    float *out;              // [items, group, D]
    float *lse;              // [items, group]
    float scale;             // factor on q.k
    float softcap;           // 0 = none
    float skip;              // ln(lambda): a tile whose scores all lie this far below the running maximum is skipped; -inf = never
    uint32_t group;          // 1 to 16
    uint32_t num_rows;
    uint32_t num_entries;
    uint32_t num_host;       // pages or rows of `host`
    uint32_t splits;         // of every item, where all have as many: `work` is then not read; else 0
    uint32_t ring;           // stages of a warp's ring in shared memory; fewer than stages_of<D>: tiles of a warp at most
    const float *join_out;   // [items, group, D] a state of other tokens, merged into the result; null = none
    const float *join_lse;   // [items, group]
    uint32_t late;           // 1: all but the state to join was there before the kernel launched just before this one
    uint32_t heads;          // whole: kv heads of a chunk
    const uint64_t *const *warm; // whole: [items] chunks that hold the item's rows, host-mapped [heads, 256, 2, D] E each, or null = in kv
};

constexpr uint32_t RESIDENT = 0xffffffffu;
constexpr uint32_t HOST_ENTRY = 0x80000000u; // of an entry of a list: the rest is a row or page of `host`
constexpr uint32_t WARM_ROWS = 256;          // of a kv head in a chunk, as in cache.cuh

enum class Source { Range, Pages, Rows, Fetch, Whole };

// Warps of a block and stages of a warp's ring: 96 KiB of shared memory a block, so that two fit on a multiprocessor. Where a warp has
// fewer tiles than stages the ring is as short, so that other kernels fit beside.
template <int D> constexpr int warps_of() { return D == 256 ? 2 : 4; }
template <int D> constexpr int stages_of() { return D == 64 ? 6 : D == 96 ? 4 : 3; }
template <int D> constexpr int decode_smem() { return warps_of<D>() * stages_of<D>() * TILE_ROWS * 4 * D; }

// One tile's place in memory, known to every lane.
struct TileSource {
    uint32_t entry;  // slot, first row of the range, or (Rows) this lane's row: lane r % 16 holds row r of the tile
    uint32_t mask;   // bit r = row r is attended
    uint32_t host;   // Fetch: page in host memory or RESIDENT
    const char *rows; // Whole: the first row
};

template <typename E, int D, Source S> struct Decode {
    static_assert(D % 32 == 0 && D <= 256, "rows must be whole 128-byte lines");
    static constexpr int WARPS = warps_of<D>();
    static constexpr int STAGES = stages_of<D>();
    static constexpr int PIECES = D / 4;              // 16-byte pieces of a row
    static constexpr int ROW_BYTES = 4 * D;
    static constexpr int TILE_BYTES = TILE_ROWS * ROW_BYTES;
    static constexpr int STEPS = D / 16;
    static constexpr bool Q_IN_SHARED = D == 256;      // 64 query registers beside 128 accumulators would spill

    const DecodeParams &p;
    uint32_t first, count; // entries or rows of the item
    int lane;
    const uint64_t *chunks = nullptr; // Whole: of the item, or null
    uint32_t kv_head = 0;

    // Where tile `t` of the item lies.
    __device__ __forceinline__ TileSource locate(uint32_t t) const {
        TileSource s{0, 0xffffu, RESIDENT, nullptr};
        if constexpr (S == Source::Pages || S == Source::Fetch) {
            s.entry = p.entries[first + t];
            if (p.masks) s.mask = p.masks[first + t];
            if constexpr (S == Source::Fetch) s.host = p.host_pages[first + t];
        } else {
            const uint32_t at = t * TILE_ROWS, left = count - at;
            if (left < TILE_ROWS) s.mask = (1u << left) - 1;
            if constexpr (S == Source::Range || S == Source::Whole) {
                s.entry = first + at;
                if constexpr (S == Source::Whole) {
                    // Sixteen rows of a chunk follow one another, and a range begins with a whole page.
                    if (chunks) s.rows = reinterpret_cast<const char *>(chunks[s.entry / WARM_ROWS]) + uint64_t(kv_head * WARM_ROWS + s.entry % WARM_ROWS) * ROW_BYTES;
                    else s.rows = static_cast<const char *>(p.kv) + uint64_t(s.entry) * ROW_BYTES;
                }
            } else {
                const uint32_t row = min(uint32_t(lane) % TILE_ROWS, left - 1);
                s.entry = p.entries[first + at + row];
            }
        }
        return s;
    }

    // Drops what lies outside the buffers and says so.
    __device__ __forceinline__ void check(TileSource &s) const {
        bool outside;
        if constexpr (S == Source::Rows) {
            const bool host = p.host && s.entry & HOST_ENTRY;
            const uint32_t bad = __ballot_sync(~0u, host ? (s.entry & ~HOST_ENTRY) >= p.num_host : s.entry >= p.num_rows) & 0xffffu;
            s.mask &= ~bad;
            outside = bad != 0;
        } else if constexpr (S == Source::Range || S == Source::Whole) {
            // The chunks of an item hold all of its tokens.
            if (S == Source::Whole && chunks) return;
            const uint32_t left = p.num_rows > s.entry ? p.num_rows - s.entry : 0;
            const uint32_t inside = left >= TILE_ROWS ? 0xffffu : (1u << left) - 1;
            outside = (s.mask & ~inside) != 0;
            s.mask &= inside;
        } else {
            const bool host = S == Source::Pages && p.host && s.entry & HOST_ENTRY;
            outside = host ? (s.entry & ~HOST_ENTRY) >= p.num_host : s.entry >= p.num_rows / TILE_ROWS;
            if constexpr (S == Source::Fetch) outside |= s.host != RESIDENT && s.host >= p.num_host;
            if (outside) s.mask = 0, s.host = RESIDENT;
        }
        if (outside && lane == 0) *p.fault = 1;
    }

    // Starts the copy of a tile. Rows that are not attended are not read (a whole page is, when it has to be stored).
    __device__ __forceinline__ void load(const TileSource &s, uint32_t tile) const {
        const char *base = static_cast<const char *>(p.kv);
        uint32_t mask = s.mask;
        if constexpr (S == Source::Pages) {
            if (p.host && s.entry & HOST_ENTRY) base = static_cast<const char *>(p.host) + uint64_t(s.entry & ~HOST_ENTRY) * TILE_BYTES;
            else base += uint64_t(s.entry) * TILE_BYTES;
        }
        if constexpr (S == Source::Fetch) base += uint64_t(s.entry) * TILE_BYTES;
        if constexpr (S == Source::Range) base += uint64_t(s.entry) * ROW_BYTES;
        if constexpr (S == Source::Whole) base = s.rows;
        if constexpr (S == Source::Fetch) {
            if (s.host != RESIDENT) {
                base = static_cast<const char *>(p.host) + uint64_t(s.host) * TILE_BYTES;
                mask = 0xffffu;
            }
        }
#pragma unroll
        for (int i = 0; i < TILE_ROWS * PIECES / 32; i++) {
            const int at = i * 32 + lane, row = at / PIECES, piece = at % PIECES;
            const char *from;
            if constexpr (S == Source::Rows) {
                const uint32_t entry = __shfl_sync(~0u, s.entry, row);
                const bool host = p.host && entry & HOST_ENTRY;
                from = host ? static_cast<const char *>(p.host) + uint64_t(entry & ~HOST_ENTRY) * ROW_BYTES + piece * 16
                            : base + uint64_t(entry) * ROW_BYTES + piece * 16;
            } else {
                from = base + at * 16;
            }
            const uint32_t bytes = (mask >> row & 1) * 16;
            // A row that is left out may lie outside the buffer: its address must not even be formed for the copy.
            copy16_async(tile + row * ROW_BYTES + ((piece ^ (row & 7)) * 16), bytes ? from : static_cast<const char *>(p.kv), bytes);
        }
    }

    // Stores an arrived host page into its slot.
    __device__ __forceinline__ void keep(const TileSource &s, const char *tile) const {
        char *to = static_cast<char *>(const_cast<void *>(p.kv)) + uint64_t(s.entry) * TILE_BYTES;
#pragma unroll
        for (int i = 0; i < TILE_ROWS * PIECES / 32; i++) {
            const int at = i * 32 + lane, row = at / PIECES, piece = at % PIECES;
            *reinterpret_cast<uint4 *>(to + at * 16) =
                *reinterpret_cast<const uint4 *>(tile + row * ROW_BYTES + ((piece ^ (row & 7)) * 16));
        }
    }

    __device__ __forceinline__ uint32_t q_pair(const E *q, int head, int dim) const {
        return head < int(p.group) ? *reinterpret_cast<const uint32_t *>(q + head * D + dim) : 0;
    }

    __device__ __forceinline__ float weigh(float dot) const {
        float s = dot * p.scale;
        if (p.softcap > 0) s = p.softcap * tanhf(s / p.softcap);
        // A score beyond f32 becomes the largest f32, so that no `inf - inf` arises; NaN stays. Base two from here on.
        return min_nan(s * LOG2E, 3.4028234e38f);
    }

    // Writes four elements of the result of head `g`, `at` counting from the item's first, joined with the other state.
    __device__ __forceinline__ void finish(uint32_t item, int g, int at, float4 x, float lse) const {
        if (p.join_out) {
            const float other = __ldcg(p.join_lse + item * p.group + g), high = fmaxf(lse, other);
            if (other > -INFINITY) {
                const float4 y = __ldcg(reinterpret_cast<const float4 *>(p.join_out + uint64_t(item) * p.group * D) + at);
                const float mine = expf(lse - high), its = expf(other - high), inverse = 1.f / (mine + its);
                const float a = mine * inverse, b = its * inverse;
                x = {a * x.x + b * y.x, a * x.y + b * y.y, a * x.z + b * y.z, a * x.w + b * y.w};
                lse = high + logf(mine + its);
            }
        }
        reinterpret_cast<float4 *>(p.out + uint64_t(item) * p.group * D)[at] = x;
        if (at % (D / 4) == 0) p.lse[item * p.group + g] = lse;
    }

    __device__ void run();
};

template <typename E, int D, Source S> __device__ void Decode<E, D, S>::run() {
    extern __shared__ __align__(128) char smem[];
    __shared__ float warp_max[WARPS][16], warp_sum[WARPS][16];
    __shared__ float whole_lse[16];
    const int warp = threadIdx.x / 32;
    const uint32_t item_if_uniform = blockIdx.x / max(p.splits, 1u);
    const uint4 work = p.splits ? uint4{item_if_uniform, blockIdx.x % p.splits, p.splits, item_if_uniform * p.splits}
                                : p.work[blockIdx.x];
    const uint32_t item = work.x, split = work.y, splits = work.z;
    first = p.first[item];
    const uint32_t end = p.end[item];
    count = end > first ? end - first : 0;
    if constexpr (S == Source::Whole) chunks = p.warm[item], kv_head = item % p.heads;
    constexpr bool LISTED = S != Source::Range && S != Source::Whole;
    if (LISTED && end > p.num_entries && count) {
        if (threadIdx.x == 0) *p.fault = 1;
        count = 0;
    }
    if constexpr (S == Source::Whole) {
        // The rule: nobody is in doubt. What waits for the places of these blocks should not wait for a join of nothing.
        if (count == 0) {
            if (split == 0)
                for (int at = threadIdx.x; at < int(p.group) * D / 4; at += WARPS * 32) finish(item, at / (D / 4), at, float4{0, 0, 0, 0}, -INFINITY);
            return;
        }
    }
    constexpr bool BY_ENTRY = S == Source::Pages || S == Source::Fetch;
    const uint32_t tiles = BY_ENTRY ? count : (count + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t share = (tiles + splits - 1) / splits;
    const uint32_t begin = min(split * share, tiles), stop = min(begin + share, tiles);

    char *ring = smem + warp * p.ring * TILE_BYTES;
    const uint32_t ring_at = shared_address(ring);

    // The first tiles are under way before the queries are read.
    const uint32_t mine = begin + warp;
    uint32_t num = mine < stop ? (stop - mine + WARPS - 1) / WARPS : 0;
    if (p.ring < STAGES && num > p.ring) {
        if (lane == 0) *p.fault = 1;
        num = p.ring;
    }
    TileSource stage[STAGES];
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (uint32_t(i) < num) stage[i] = locate(mine + i * WARPS);
    }
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (uint32_t(i) < num) {
            check(stage[i]);
            load(stage[i], ring_at + i * TILE_BYTES);
        }
        copy_commit();
    }
    TileSource next{};
    if (num > STAGES - 1) next = locate(mine + (STAGES - 1) * WARPS);

    const E *q = static_cast<const E *>(p.q) + uint64_t(item) * p.group * D;
    const int head = lane / 4, pair = lane % 4 * 2;
    uint32_t qf[Q_IN_SHARED ? 1 : STEPS][4];
    if constexpr (!Q_IN_SHARED) {
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            qf[k][0] = q_pair(q, head, k * 16 + pair);
            qf[k][1] = q_pair(q, head + 8, k * 16 + pair);
            qf[k][2] = q_pair(q, head, k * 16 + pair + 8);
            qf[k][3] = q_pair(q, head + 8, k * 16 + pair + 8);
        }
    }
    __shared__ __align__(16) uint32_t q_shared[Q_IN_SHARED ? STEPS * 32 * 4 : 4];
    if constexpr (Q_IN_SHARED) {
        // In fragment order: one 16-byte read a step and lane.
        for (int k = warp; k < STEPS; k += WARPS) {
            uint4 f = {q_pair(q, head, k * 16 + pair), q_pair(q, head + 8, k * 16 + pair),
                       q_pair(q, head, k * 16 + pair + 8), q_pair(q, head + 8, k * 16 + pair + 8)};
            *reinterpret_cast<uint4 *>(q_shared + (k * 32 + lane) * 4) = f;
        }
        __syncthreads();
    }

    // Rows of the accumulators: heads `head` (index 0) and `head + 8` (index 1).
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    float o[D / 8][4];
#pragma unroll
    for (int j = 0; j < D / 8; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0;

    // ldmatrix addresses of this lane within a tile.
    const int m8 = lane / 8, r8 = lane % 8;
    const int k_row = (m8 >> 1) * 8 + r8, v_row = (m8 & 1) * 8 + r8;
    const uint32_t k_at = k_row * ROW_BYTES, v_at = v_row * ROW_BYTES;
    const float skip = p.skip * LOG2E;

    // The ring advances by whole turns so that stage numbers stay compile-time constants.
    for (uint32_t turn = 0; turn < num; turn += STAGES) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            const uint32_t i = turn + s;
            if (i >= num) break;
            copy_wait<STAGES - 2>();
            __syncwarp();
            {
                // The stage before this one was read in the previous round: it takes the tile STAGES - 1 ahead.
                constexpr int AHEAD = STAGES - 1;
                const int free_stage = (s + AHEAD) % STAGES;
                if (i + AHEAD < num) {
                    stage[free_stage] = next;
                    check(stage[free_stage]);
                    load(stage[free_stage], ring_at + free_stage * TILE_BYTES);
                    if (i + STAGES < num) next = locate(mine + (i + STAGES) * WARPS);
                }
                copy_commit();
            }
            const uint32_t mask = stage[s].mask;
            const uint32_t tile = ring_at + s * TILE_BYTES;
            if constexpr (S == Source::Fetch) {
                if (stage[s].host != RESIDENT) keep(stage[s], ring + s * TILE_BYTES);
                // A fetched page comes whole; what is not attended must not reach the product, where 0 * NaN is NaN.
                if (stage[s].host != RESIDENT && mask != 0xffffu) {
                    for (int r = 0; r < TILE_ROWS; r++) {
                        if (mask >> r & 1) continue;
                        for (int piece = lane; piece < PIECES; piece += 32)
                            *reinterpret_cast<uint4 *>(ring + s * TILE_BYTES + r * ROW_BYTES + piece * 16) = uint4{0, 0, 0, 0};
                    }
                    __syncwarp();
                }
            }

            // Scores, two sums each so that products need not wait for one another.
            float sc[2][2][4] = {};
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                uint32_t b[4];
                ldmatrix4(b, tile + k_at + (((k * 2 + (m8 & 1)) ^ (k_row & 7)) * 16));
                uint32_t a[4];
                if constexpr (Q_IN_SHARED) {
                    const uint4 f = *reinterpret_cast<const uint4 *>(q_shared + (k * 32 + lane) * 4);
                    a[0] = f.x, a[1] = f.y, a[2] = f.z, a[3] = f.w;
                } else {
                    a[0] = qf[k][0], a[1] = qf[k][1], a[2] = qf[k][2], a[3] = qf[k][3];
                }
                mma<E>(sc[k & 1][0], a, b[0], b[1]);
                mma<E>(sc[k & 1][1], a, b[2], b[3]);
            }
            float w[2][4]; // [columns 0-7, 8-15][element]
            float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = h * 8 + pair + (e & 1);
                    w[h][e] = mask >> row & 1 ? weigh(sc[0][h][e] + sc[1][h][e]) : -INFINITY;
                    top[e >> 1] = fmaxf(top[e >> 1], w[h][e]);
                }
            }
            top[0] = quad_max(top[0]);
            top[1] = quad_max(top[1]);
            if (__all_sync(~0u, (top[0] < max[0] + skip || head >= int(p.group)) &&
                                    (top[1] < max[1] + skip || head + 8 >= int(p.group))))
                continue;
            if (__any_sync(~0u, top[0] > max[0] || top[1] > max[1])) {
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    const float to = fmaxf(max[x], top[x]);
                    const float factor = max[x] == -INFINITY ? 0.f : exp2_approx(max[x] - to);
                    max[x] = to;
                    sum[x] *= factor;
#pragma unroll
                    for (int j = 0; j < D / 8; j++) o[j][2 * x] *= factor, o[j][2 * x + 1] *= factor;
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    // A head without any attended row so far has no maximum: its weights are zero, not NaN.
                    const float base = max[e >> 1];
                    w[h][e] = base == -INFINITY ? 0.f : exp2_approx(w[h][e] - base);
                    sum[e >> 1] += w[h][e];
                }
            }
            const uint32_t pf[4] = {pack2<E>(w[0][0], w[0][1]), pack2<E>(w[0][2], w[0][3]), pack2<E>(w[1][0], w[1][1]),
                                    pack2<E>(w[1][2], w[1][3])};
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                uint32_t b[4];
                ldmatrix4_trans(b, tile + v_at + (((D / 8 + j * 2 + (m8 >> 1)) ^ (v_row & 7)) * 16));
                mma<E>(o[2 * j], pf, b[0], b[1]);
                mma<E>(o[2 * j + 1], pf, b[2], b[3]);
            }
        }
    }
    copy_wait<0>();

    // Warps of the block, through shared memory: one tile's bytes are exactly [16, D] f32.
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
    if (lane % 4 == 0) {
        warp_max[warp][head] = max[0], warp_max[warp][head + 8] = max[1];
        warp_sum[warp][head] = sum[0], warp_sum[warp][head + 8] = sum[1];
    }
    __syncwarp();
    float *mine_o = reinterpret_cast<float *>(ring);
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        if (head < int(p.group)) *reinterpret_cast<float2 *>(mine_o + head * D + j * 8 + pair) = {o[j][0], o[j][1]};
        if (head + 8 < int(p.group)) *reinterpret_cast<float2 *>(mine_o + (head + 8) * D + j * 8 + pair) = {o[j][2], o[j][3]};
    }
    __syncthreads();
    if (splits == 1 && p.late) wait_for_earlier();
    const uint64_t state = work.w + split;
    float *out = p.part_out + state * p.group * D;
    float *lse = p.part_lse + state * p.group;
    for (int at = threadIdx.x; at < int(p.group) * D / 4; at += WARPS * 32) {
        const int g = at / (D / 4);
        float high = -INFINITY;
#pragma unroll
        for (int v = 0; v < WARPS; v++) high = fmaxf(high, warp_max[v][g]);
        float total = 0;
        float4 x = {0, 0, 0, 0};
        if (high > -INFINITY) {
#pragma unroll
            for (int v = 0; v < WARPS; v++) {
                const float factor = exp2_approx(warp_max[v][g] - high);
                const float4 y = reinterpret_cast<const float4 *>(smem + v * p.ring * TILE_BYTES)[at];
                total += factor * warp_sum[v][g];
                x.x += factor * y.x, x.y += factor * y.y, x.z += factor * y.z, x.w += factor * y.w;
            }
            const float inverse = 1.f / total;
            x.x *= inverse, x.y *= inverse, x.z *= inverse, x.w *= inverse;
        }
        const float sum_lse = high > -INFINITY ? high * LN2 + logf(total) : -INFINITY;
        if (splits == 1) {
            finish(item, g, at, x, sum_lse);
            continue;
        }
        reinterpret_cast<float4 *>(out)[at] = x;
        if (at % (D / 4) == 0) lse[g] = sum_lse;
    }
    if (splits == 1) return;

    // The last block of the item to arrive joins its splits in their order.
    if (!last_to_arrive(p.arrived + item, splits)) return;
    if (p.late) wait_for_earlier();
    float *weights = reinterpret_cast<float *>(smem); // [splits, group]
    const float *part_lse = p.part_lse + uint64_t(work.w) * p.group;
    for (int g = warp; g < int(p.group); g += WARPS) {
        float high = -INFINITY;
        for (uint32_t s = lane; s < splits; s += 32) high = fmaxf(high, __ldcg(part_lse + s * p.group + g));
        for (int x = 16; x; x /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, x));
        float total = 0;
        for (uint32_t s = lane; s < splits; s += 32) {
            const float y = high == -INFINITY ? 0.f : expf(__ldcg(part_lse + s * p.group + g) - high);
            weights[s * p.group + g] = y;
            total += y;
        }
        for (int x = 16; x; x /= 2) total += __shfl_xor_sync(~0u, total, x);
        const float inverse = total > 0 ? 1.f / total : 0.f;
        for (uint32_t s = lane; s < splits; s += 32) weights[s * p.group + g] *= inverse;
        if (lane == 0) whole_lse[g] = high == -INFINITY ? high : high + logf(total);
    }
    __syncthreads();
    const float4 *parts = reinterpret_cast<const float4 *>(p.part_out + uint64_t(work.w) * p.group * D);
    const int width = p.group * D / 4;
    for (int at = threadIdx.x; at < width; at += WARPS * 32) {
        const int g = at / (D / 4);
        float4 x = {0, 0, 0, 0};
#pragma unroll 8
        for (uint32_t s = 0; s < splits; s++) {
            const float factor = weights[s * p.group + g];
            const float4 y = __ldcg(parts + uint64_t(s) * width + at);
            x.x += factor * y.x, x.y += factor * y.y, x.z += factor * y.z, x.w += factor * y.w;
        }
        finish(item, g, at, x, whole_lse[g]);
    }
}

#define FLOE_DECODE(NAME, TYPE, SUFFIX, D, SOURCE)                                                                            \
    extern "C" __global__ void __launch_bounds__(floe::warps_of<D>() * 32, 2)                                                 \
        NAME##_##SUFFIX##_d##D(const __grid_constant__ floe::DecodeParams p) {                                                \
        const floe::Timeline timeline((SOURCE) == floe::Source::Whole ? floe::Work::Whole : floe::Work::Attend);               \
        if (!p.late) floe::wait_for_earlier();                                                                                \
        floe::let_next_start();                                                                                               \
        floe::Decode<TYPE, D, SOURCE> decode{p, 0, 0, int(threadIdx.x % 32)};                                                 \
        decode.run();                                                                                                         \
    }

// Every model this engine meets has one of these head sizes.
#define FLOE_DECODE_ALL(NAME, SOURCE)                                                                                         \
    FLOE_DECODE(NAME, __nv_bfloat16, bf16, 64, SOURCE)                                                                        \
    FLOE_DECODE(NAME, __nv_bfloat16, bf16, 96, SOURCE)                                                                        \
    FLOE_DECODE(NAME, __nv_bfloat16, bf16, 128, SOURCE)                                                                       \
    FLOE_DECODE(NAME, __nv_bfloat16, bf16, 256, SOURCE)                                                                       \
    FLOE_DECODE(NAME, __half, f16, 64, SOURCE)                                                                                \
    FLOE_DECODE(NAME, __half, f16, 96, SOURCE)                                                                                \
    FLOE_DECODE(NAME, __half, f16, 128, SOURCE)                                                                               \
    FLOE_DECODE(NAME, __half, f16, 256, SOURCE)

} // namespace floe
