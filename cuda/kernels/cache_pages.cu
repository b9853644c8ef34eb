// Builds pages of 16 consecutive tokens. In a step: the page, if any, whose last token leaves the window.
#include "pages.cuh"

namespace floe {

// Mirrored by `ops::cache::pages::PagesParams`.
struct PagesParams {
    Cache cache;
    const void *k, *v;       // tokens from `run_first` on, [run, heads, D]; earlier ones are read from kv
    uint64_t k_token, k_head, v_token, v_head;
    const void *kv;          // [rows, 2, D] E
    PageOut out;
    uint32_t type, sequence, run_first, first_page, in_step, num_pages;
};

template <typename E, int D> __device__ __forceinline__ void build_page(const PagesParams &p) {
    constexpr int LINES = D / 32;
    __shared__ PageShared<D> shared;
    const Cache &c = p.cache;
    const uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y % c.heads;
    uint32_t sequence = p.sequence, page = p.first_page + blockIdx.x;
    if (p.in_step) {
        const BatchEntry e = c.batch[blockIdx.y / c.heads];
        if (e.exact || e.tokens < c.window + 16 || (e.tokens - c.window) % 16 != 0) return;
        sequence = e.sequence, page = (e.tokens - c.window) / 16 - 1;
    }
    const SequencePlace s = c.sequences[sequence];
    const uint32_t at = s.pages + head * s.pages_each + page, position = page * 16 + token;
    if (page >= s.pages_each || at >= p.num_pages) return;
    if (!p.in_step && position >= p.run_first) {
        const uint64_t i = position - p.run_first;
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            shared.rows[0][token][32 * l + lane] = wide(narrow<E>(load_as(p.k, i * p.k_token + head * p.k_head + 32 * l + lane, p.type)));
            shared.rows[1][token][32 * l + lane] = wide(narrow<E>(load_as(p.v, i * p.v_token + head * p.v_head + 32 * l + lane, p.type)));
        }
    } else {
        const E *row = static_cast<const E *>(p.kv) + uint64_t(row_of(c, s, head, position)) * 2 * D;
#pragma unroll
        for (int l = 0; l < LINES; l++)
            shared.rows[0][token][32 * l + lane] = wide(row[32 * l + lane]), shared.rows[1][token][32 * l + lane] = wide(row[D + 32 * l + lane]);
    }
    // Sinks are always attended: a page of sinks stands for nothing.
    write_page<E, D>(p.out, shared, at, at, 0xffff, page * 16 >= c.sinks);
}

} // namespace floe

#define CACHE_PAGES(TYPE, SUFFIX, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(512)                                                                         \
        cache_pages_##SUFFIX##_d##D(const __grid_constant__ floe::PagesParams p) {                                                     \
        const floe::Timeline timeline(floe::Work::Pages);                                                                     \
        floe::build_page<TYPE, D>(p);                                                                                         \
    }
#define CACHE_PAGES_ALL(D) CACHE_PAGES(__nv_bfloat16, bf16, D) CACHE_PAGES(__half, f16, D)

CACHE_PAGES_ALL(64)
CACHE_PAGES_ALL(96)
CACHE_PAGES_ALL(128)
CACHE_PAGES_ALL(256)
