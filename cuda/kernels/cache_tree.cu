// Pages of the host's tree: builds those that the host lists from the rows of their tokens, wherever these lie, and writes which
// token each place of a page holds. One block per listed page, one warp per token.
#include "pages.cuh"

namespace floe {

// What the host says of a page. Mirrored by `ops::cache::tree::TreePage`.
struct TreePage {
    uint32_t page;    // of its kv head
    uint32_t head;
    uint32_t live;    // bit t: place t holds a token; 0 = the page stands for nothing
    uint32_t unused;
    uint32_t ids[16]; // position of each place's token
};

// Mirrored by `ops::cache::tree::TreeParams`.
struct TreeParams {
    Cache cache;
    const TreePage *listed;  // [blocks], host-mapped
    const void *kv;          // [rows, 2, D] E
    uint32_t *tokens;        // [pages, 16] what a list says of a place: 16 pages of the head + position
    PageOut out;
    uint32_t *fault;         // becomes 1 when a page or token lies outside of the sequence; the page is left as it is
    uint32_t sequence, num_pages, num_rows;
};

template <typename E, int D> __device__ __forceinline__ void tree_page(const TreeParams &p) {
    constexpr int LINES = D / 32, PIECES = D / 4; // 16-byte pieces of a row
    __shared__ PageShared<D> shared;
    __shared__ TreePage listed;
    const Cache &c = p.cache;
    const uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32;
    // One read over the link for the block.
    if (threadIdx.x < sizeof(TreePage) / 4)
        reinterpret_cast<uint32_t *>(&listed)[threadIdx.x] = reinterpret_cast<const volatile uint32_t *>(p.listed + blockIdx.x)[threadIdx.x];
    __syncthreads();
    const SequencePlace s = c.sequences[p.sequence];
    const uint32_t head = listed.head, at = s.pages + head * s.pages_each + listed.page;
    const bool there = head < c.heads && listed.page < s.pages_each && at < p.num_pages;
    const bool lives = listed.live >> token & 1;
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
    if (!__syncthreads_and(known)) {
        if (threadIdx.x == 0) *p.fault = 1;
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
    write_page<E, D>(p.out, shared, at, listed.live, true);
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
