//! Working memory of a search, owned by the caller: one per worker thread.

use crate::blocks::LANES;
use crate::found::room_for;
use crate::hnsw::HnswScratch;
use crate::icecache::IcecacheScratch;
use crate::quant::QuantQuery;
use crate::sketch::PreparedQuery;
use crate::topk::TopK;

/// Reused by any number of searches on any index; grows to the largest and then stays.
#[derive(Debug, Default)]
pub struct Scratch {
    /// `[group, dim]` query in the frame.
    pub(crate) q: Vec<f32>,
    pub(crate) quant: QuantQuery,
    /// Excluded lanes by page entry, sorted by entry.
    pub(crate) hidden: Vec<Hidden>,
    /// Excluded tokens below the entries of each tree level, sorted by entry.
    pub(crate) hidden_above: Vec<Vec<(u32, u32)>>,
    /// Excluded young entries, sorted.
    pub(crate) hidden_young: Vec<u32>,
    pub(crate) top: TopK,
    /// `[group]` log mass attended anyway, without the centre's share; empty = unknown.
    pub(crate) attended: Vec<f32>,
    /// `[group]` log normaliser.
    pub(crate) norm: Vec<f32>,
    /// `[group, 16]` partial sums, weights.
    pub(crate) sums: Vec<f32>,
    pub(crate) weights: Vec<f32>,
    /// Rows that a token-level index considers.
    pub(crate) candidates: Vec<u32>,
    /// Blocks to open at the next level.
    pub(crate) opened: Vec<u32>,
    pub(crate) ranked: Vec<(f32, u32)>,
    /// The query as the sketch reads it.
    pub(crate) prepared: PreparedQuery,
    /// `[group]` what a token's score gains per squared scale of its code.
    pub(crate) spread: Vec<f32>,
    /// `[group]` what a page's score gains per spread before it is told apart, and the score above which it is.
    pub(crate) boost: Vec<f32>,
    pub(crate) limit: Vec<f32>,
    /// `[group]` lanes of a block told apart.
    pub(crate) masks: Vec<u16>,
    /// `[pages]` where the logit of a refined page's first head lies, and its spread.
    pub(crate) homes: Vec<u32>,
    pub(crate) of_page: Vec<f32>,
    /// `[pages, 16]` best score of each refined token over the heads, `[pages]` the best of those.
    pub(crate) best: Vec<f32>,
    pub(crate) tops: Vec<f32>,
    /// The same of pages that are up for selection.
    pub(crate) expected: Vec<f32>,
    /// `[pairs]` weight of a page that its tokens carry.
    pub(crate) carried: Vec<f32>,
    /// `[group]` mass of a tail and its inverse.
    pub(crate) masses: Vec<f64>,
    pub(crate) inverse: Vec<f32>,
    /// `[group]` mass of a page below which its values are not told apart.
    pub(crate) least: Vec<f32>,
    /// Logits and weights of a tail far below what was selected.
    pub(crate) deep: Deep,
    /// `[group, padded_dim]` sums of value residuals.
    pub(crate) residual: Vec<f32>,
    pub(crate) hnsw: HnswScratch,
    pub(crate) icecache: IcecacheScratch,
}

/// Lanes of one page that are attended elsewhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hidden {
    pub entry: u32,
    pub lanes: u16,
}

/// Exponentials of a tail, taken again relative to its own largest logit.
#[derive(Debug, Default)]
pub(crate) struct Deep {
    /// `[parts, group, 16]`
    pub logits: Vec<f32>,
    /// `[parts, group, 16]`
    pub exps: Vec<f32>,
    /// `[pairs, 16]`
    pub weights: Vec<f32>,
    /// `[group]`
    pub shift: Vec<f32>,
    /// `[group, 16]`
    pub sums: Vec<f32>,
}

impl Deep {
    /// Capacity for `pages` entries in parts, each with `group` heads: see `Refined::reserve`.
    pub fn reserve(&mut self, pages: usize, group: usize) {
        room_for(&mut self.logits, pages * group);
        room_for(&mut self.exps, pages * group);
        room_for(&mut self.weights, pages * group * LANES);
        room_for(&mut self.shift, group);
        room_for(&mut self.sums, group * LANES);
    }
}
