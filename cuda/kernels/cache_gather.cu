// Brings stored rows of consecutive tokens of one sequence back, as tensors of a host engine.
//
// Rows that lie in their place on the device are read there, all others in page-locked host memory. A warp takes 2 KiB of
// consecutive tokens of a kv head, all of whose reads are under way before the first is stored, as in fetch.cu.
#include "cache.cuh"

namespace floe {

// Mirrored by `ops::cache::gather::GatherParams`.
struct GatherParams {
    Cache cache;
    const uint4 *kv;                           // [rows, pieces]
    uint4 *k, *v;                              // [run, heads, pieces / 2], rows contiguous
    uint64_t k_token, k_head, v_token, v_head; // strides in pieces
    uint32_t *fault;                           // becomes 1 when a token lies nowhere; it is left out
    uint32_t sequence, first, run, stored, num_rows, pieces; // stored = tokens of the sequence in this layer
};

} // namespace floe

extern "C" __global__ void __launch_bounds__(256) cache_gather(const __grid_constant__ floe::GatherParams p) {
    using namespace floe;
    constexpr uint32_t EACH = 4, PART = 32 * EACH; // pieces of a lane and of a warp
    const Cache &c = p.cache;
    const SequencePlace s = c.sequences[p.sequence];
    const uint32_t lane = threadIdx.x % 32, half = p.pieces / 2;
    const uint32_t each = PART / p.pieces, groups = (p.run + each - 1) / each;
    for (uint32_t job = blockIdx.x * 8 + threadIdx.x / 32; job < groups * c.heads; job += gridDim.x * 8) {
        const uint32_t head = job / groups, start = job % groups * each, end = min(start + each, p.run) - start;
        uint4 x[EACH];
        bool found[EACH];
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            const uint32_t at = i * 32 + lane, token = p.first + start + at / p.pieces;
            found[i] = at < end * p.pieces;
            if (!found[i]) continue;
            const bool near = in_place(c, s, token, p.stored);
            const uint32_t row = near ? row_of(c, s, head, token) : 0;
            if (row >= p.num_rows || token / CHUNK_ROWS >= c.chunks_each) {
                *p.fault = 1;
                found[i] = false;
                continue;
            }
            const uint4 *from = near ? p.kv + uint64_t(row) * p.pieces
                                     : reinterpret_cast<const uint4 *>(host_row(c, p.sequence, head, token, p.pieces * 16));
            x[i] = __ldcs(from + at % p.pieces);
        }
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            if (!found[i]) continue;
            const uint32_t at = i * 32 + lane, piece = at % p.pieces;
            const uint64_t token = start + at / p.pieces;
            if (piece < half) p.k[token * p.k_token + head * p.k_head + piece] = x[i];
            else p.v[token * p.v_token + head * p.v_head + piece - half] = x[i];
        }
    }
}
