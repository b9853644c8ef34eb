// Pages of the host's tree, in two parts.
//
// `cache_tree` builds the pages that the host lists from the rows of their tokens, wherever these lie, and writes which token each
// place of a page holds. One block per listed page, one warp per token. What makes a page count (how many tokens, which, how far
// apart) goes to a place of its own, so that pages which stand for nothing yet can be built while steps run.
//
// `cache_announce` makes them count, and those that stand for nothing any longer not. One block per kv head.
#include "pages.cuh"
#include "sum.cuh"

namespace floe {

// What the host says of a page. Mirrored by `ops::cache::tree::TreePage`.
struct TreePage {
    uint32_t page;    // of its kv head
    uint32_t head;
    uint32_t live;    // bit t: place t holds a token; 0 = the page stands for nothing
    uint32_t used;    // pages of the kv head that steps look at from then on
    uint32_t ids[16]; // position of each place's token
};

// Mirrored by `ops::cache::tree::TreeParams`.
struct TreeParams {
    Cache cache;
    const TreePage *listed;  // [blocks]
    const void *kv;          // [rows, 2, D] E
    uint32_t *tokens;        // [pages, 16] what a list says of a place: 16 pages of the head + position
    PageOut out;             // counts, masks and spreads by place in `listed`
    uint32_t *fault;         // becomes 1 when a page or token lies outside of the sequence; the page is left as it is
    SequencePlace place;     // rows are read in host memory unless it is DENSE
    uint32_t sequence, num_pages, num_rows;
};

// Mirrored by `ops::cache::tree::AnnounceParams`.
struct AnnounceParams {
    const TreePage *listed;     // [num]
    const float *said_count;    // [num] what becomes of them
    const uint16_t *said_masks;
    const float *said_spread;
    float *log_count;           // [pages]
    uint16_t *masks;            // [pages]
    float *spread;              // [pages]
    uint32_t *tree_pages;       // [heads] of the sequence: pages that steps look at
    uint2 *spread_sums;         // [heads] of the sequence: those pages, and bits of the f32 sum of their spreads; or null
    uint32_t *fault;            // as above
    SequencePlace place;
    uint32_t num, num_pages;
};

template <typename E, int D> __device__ __forceinline__ void tree_page(const TreeParams &p) {
    constexpr int LINES = D / 32, PIECES = D / 4; // 16-byte pieces of a row
    __shared__ PageShared<D> shared;
    __shared__ TreePage listed;
    const Cache &c = p.cache;
    const uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x < sizeof(TreePage) / 4)
        reinterpret_cast<uint32_t *>(&listed)[threadIdx.x] = reinterpret_cast<const uint32_t *>(p.listed + blockIdx.x)[threadIdx.x];
    __syncthreads();
    const SequencePlace &s = p.place;
    const uint32_t head = listed.head, at = s.pages + head * s.pages_each + listed.page;
    const bool there = head < c.heads && listed.page < s.pages_each && at < p.num_pages, lives = listed.live >> token & 1;
    const uint32_t position = listed.ids[token];
    bool known = there && (!lives || position / CHUNK_ROWS < c.chunks_each);
    const uint4 *row = nullptr;
    if (known && lives) {
        if (s.slots == DENSE) {
            const uint32_t from = row_of(c, s, head, position);
            known = position < s.rows_each && from < p.num_rows;
            row = static_cast<const uint4 *>(p.kv) + uint64_t(known ? from : 0) * PIECES;
        } else {
            row = reinterpret_cast<const uint4 *>(host_row(c, p.sequence, head, position, 4 * D));
        }
    }
    const bool all_known = __syncthreads_and(known);
    if (!all_known || listed.live == 0) {
        // Nobody reads a page that stands for nothing.
        if (threadIdx.x > 0) return;
        p.out.log_count[blockIdx.x] = -INFINITY, p.out.masks[blockIdx.x] = 0, p.out.spread[blockIdx.x] = 0;
        if (!all_known) *p.fault = 1;
        return;
    }
    if (lives) {
#pragma unroll
        for (int i = 0; i < (PIECES + 31) / 32; i++) {
            const int piece = i * 32 + lane;
            if (piece >= PIECES) continue;
            const uint4 x = row[piece];
            const E *from = reinterpret_cast<const E *>(&x);
            const int which = piece / (PIECES / 2), d = piece % (PIECES / 2) * 8;
#pragma unroll
            for (int j = 0; j < 8; j++) shared.rows[which][token][d + j] = wide(from[j]);
        }
    } else {
#pragma unroll
        for (int l = 0; l < LINES; l++) shared.rows[0][token][32 * l + lane] = shared.rows[1][token][32 * l + lane] = 0;
    }
    if (lane == 0) p.tokens[uint64_t(at) * 16 + token] = lives ? token_base(s, head) + position : NONE;
    write_page<E, D>(p.out, shared, at, blockIdx.x, listed.live, true);
}

constexpr uint32_t ANNOUNCE_THREADS = 512;

__device__ __forceinline__ void announce(const AnnounceParams &p) {
    __shared__ uint32_t used;
    __shared__ float sums[ANNOUNCE_THREADS / 32];
    const uint32_t head = blockIdx.x, first = p.place.pages + head * p.place.pages_each;
    bool any = false;
    for (uint32_t i = threadIdx.x; i < p.num; i += ANNOUNCE_THREADS) {
        const TreePage &listed = p.listed[i];
        if (listed.head != head) continue;
        if (listed.page >= p.place.pages_each || first + listed.page >= p.num_pages || listed.used > p.place.pages_each) {
            *p.fault = 1;
            continue;
        }
        p.log_count[first + listed.page] = p.said_count[i];
        p.masks[first + listed.page] = p.said_masks[i];
        p.spread[first + listed.page] = p.said_spread[i];
        used = listed.used; // the same of all pages of the head
        any = true;
    }
    if (!__syncthreads_or(any)) return;
    if (threadIdx.x == 0) p.tree_pages[head] = used;
    if (!p.spread_sums) return;
    float sum = 0;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < used; i += ANNOUNCE_THREADS) sum += p.spread[first + i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = warp_sum(threadIdx.x < ANNOUNCE_THREADS / 32 ? sums[threadIdx.x] : 0);
    if (threadIdx.x == 0) p.spread_sums[head] = {used, __float_as_uint(sum)};
}

} // namespace floe

#define CACHE_TREE(TYPE, SUFFIX, D)                                                                                           \
    extern "C" __global__ void __launch_bounds__(512)                                                                         \
        cache_tree_##SUFFIX##_d##D(const __grid_constant__ floe::TreeParams p) { floe::tree_page<TYPE, D>(p); }
#define CACHE_TREE_ALL(D) CACHE_TREE(__nv_bfloat16, bf16, D) CACHE_TREE(__half, f16, D)

CACHE_TREE_ALL(64)
CACHE_TREE_ALL(96)
CACHE_TREE_ALL(128)
CACHE_TREE_ALL(256)

extern "C" __global__ void __launch_bounds__(floe::ANNOUNCE_THREADS) cache_announce(const __grid_constant__ floe::AnnounceParams p) {
    floe::announce(p);
}
