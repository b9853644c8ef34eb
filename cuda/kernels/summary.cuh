// Parameters of the kernels over page summaries and sketches, and what they share.
//
// Scores of an item lie in tiles of 16 units (pages, or the tokens of one page): [tiles, group, 16]. Units that do not exist
// or may not be selected have score -inf.
#pragma once
#include "tile.cuh"

namespace floe {

// Mirrored by `ops::summary::ScoreParams`.
struct ScoreParams {
    const void *q;             // page_scores: [items, group, D] E; sketch_scores: rotated and scaled, [items, group, D] f16
    const void *keys;          // page_scores: mean keys [pages, D] E; sketch_scores: key lines [pages, bits, D / 32, 16] u32
    const __half *scales;      // sketch_scores: [pages, 16]
    const float *log_count;    // [pages] ln of the tokens of the page, -inf = no page
    const uint16_t *masks;     // sketch_scores: [pages] bit r = token r may be selected or stands in the tail
    const uint32_t *first;     // [items] first page, a multiple of 16
    const uint32_t *end;       // [items] one past the last page
    const float *page_scores;  // sketch_scores: what page_scores wrote
    void *scores;              // page_scores: f32 [item tiles..]; sketch_scores: f16, a tile per page
    float *part_lse;           // page_scores: [items, blocks.x, group]
    uint32_t *arrived;         // page_scores: [items] zero before and after
    float *lse;                // [items, group]: page_scores writes it, sketch_scores takes scores relative to it
    float scale;
    uint32_t group, num_pages;
    const float *spreads;      // page_scores: [pages] added to scores, times spread |q|^2 scale^2; null = nothing is
    float spread;
};

// Score of unit `unit` of an item whose tiles begin at `tile`.
__device__ __forceinline__ uint64_t score_at(uint32_t tile, uint32_t group, uint32_t head, uint32_t unit) {
    return (uint64_t(tile) * group + head) * 16 + unit;
}

} // namespace floe
