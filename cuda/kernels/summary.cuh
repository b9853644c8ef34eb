// How the scores of page summaries and sketches lie.
//
// Scores of an item lie in tiles of 16 units (pages, or the tokens of one page): [tiles, group, 16]. Units that do not exist
// or may not be selected have score -inf.
#pragma once
#include "tile.cuh"

namespace floe {

// Score of unit `unit` of an item whose tiles begin at `tile`.
__device__ __forceinline__ uint64_t score_at(uint32_t tile, uint32_t group, uint32_t head, uint32_t unit) {
    return (uint64_t(tile) * group + head) * 16 + unit;
}

} // namespace floe
