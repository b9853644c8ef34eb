// Writes new keys and values as rows: row[to[i]] = (k[i], v[i]). Elements are moved bit for bit, 16 bytes at a time.
// Rows bound for NOWHERE are left out: a recorded launch covers every sequence that may be present.
#include <cstdint>

namespace floe {

constexpr uint32_t NOWHERE = 0xffffffffu;

// Mirrored by `ops::append_kv::AppendParams`.
struct AppendParams {
    const uint4 *k;     // [rows, pieces] 16-byte pieces, contiguous
    const uint4 *v;     // [rows, pieces]
    const uint32_t *to; // [rows] row of kv
    uint4 *kv;          // [num_rows, 2, pieces]
    uint32_t *fault;    // becomes 1 when a row lies outside kv; it is not written
    uint32_t rows, pieces, num_rows;
};

} // namespace floe

extern "C" __global__ void __launch_bounds__(128) append_kv(const __grid_constant__ floe::AppendParams p) {
    using namespace floe;
    const uint32_t at = blockIdx.x * 128 + threadIdx.x, width = 2 * p.pieces;
    if (at >= p.rows * width) return;
    const uint32_t row = at / width, piece = at % width, to = p.to[row];
    if (to == NOWHERE) return;
    if (to >= p.num_rows) {
        *p.fault = 1;
        return;
    }
    const uint4 x = piece < p.pieces ? p.k[uint64_t(row) * p.pieces + piece] : p.v[uint64_t(row) * p.pieces + piece - p.pieces];
    p.kv[uint64_t(to) * width + piece] = x;
}
