//! Decode reuse: may what an earlier step computed answer for a part of the context?
//!
//! A [`ReuseCache`] takes one step of one shard at a time. It says which tokens it wants attended, one set after the
//! other, is handed the state of each, and decides when it has enough:
//!
//! ```text
//! begin ──> ask ──> answer ──> ask ──> answer ──> ... ──> finish ──> Attended: the step's output
//!   │                                                        └─────> Declined: the step goes on as if there were no cache,
//!   └─ false: nothing to ask                                                   and `settle` hears of its result
//! ```
//!
//! So the caches decide and merge, and know nothing of where keys and values lie. [`Mac`] is match-amend-complete as
//! published; [`Calibrated`] reuses only where its own measurements say that the error stays below a bound.

mod accumulate;
mod anchor;
mod bytes;
mod calibrated;
mod gate;
mod ladder;
mod mac;
mod pace;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use calibrated::Calibrated;
pub use mac::Mac;

use crate::config::Config;
use crate::error::Result;
use crate::ids::TokenPos;
pub use crate::reusing::{CalibratedOptions, MacOptions, ReuseKind};
use crate::selection::Selection;
use crate::state::StateBuf;

/// What a step asks of a shard's cache.
#[derive(Clone, Copy, Debug)]
pub struct ReuseQuery<'a> {
    /// The group's queries before rotary embedding, `[group, head_dim]` f32, host memory.
    pub q_pre: &'a [f32],
    /// Position of the step, the last one stored.
    pub position: TokenPos,
}

/// Tokens that a cache wants to hear of next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask<'a> {
    /// The state of consecutive positions.
    Range(Range<TokenPos>),
    /// The state of ascending positions.
    List(&'a [TokenPos]),
    /// The logits of consecutive positions.
    Logits(Range<TokenPos>),
    /// The logits of ascending positions.
    LogitsOf(&'a [TokenPos]),
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The state is the step's answer: exact, or with reused parts as the report says.
    Attended,
    /// Nothing could be reused and the cache does not attend the rest itself.
    Declined,
}

/// A sparse step that the cache had declined, or not been asked about.
#[derive(Clone, Copy, Debug)]
pub struct SparseStep<'a> {
    /// Which tokens were attended exactly.
    pub selection: &'a Selection,
    /// State of all tokens, as far as the policy answers for them.
    pub state: &'a StateBuf,
    /// The part of it that stands for the tokens not selected.
    pub tail: &'a StateBuf,
}

/// What the cache did in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReuseReport {
    /// Whether the cache was at work at all.
    pub active: bool,
    /// Query heads that had an earlier state near enough to consider.
    pub heads_matched: usize,
    /// Query heads whose output has a reused part.
    pub heads_reused: usize,
    /// Positions between the step and the oldest state considered.
    pub lag: usize,
    /// Reused states that the oldest one stands on, itself included: 1 where nothing is chained.
    pub lineage: usize,
    /// Tokens whose keys and values were read.
    pub tokens_read: usize,
    /// Bytes read beside them: the earlier queries and states, and keys for a ranking.
    pub bytes_read: usize,
}

/// What a cache has learnt and holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReuseSummary {
    /// Earlier steps held.
    pub entries: usize,
    /// Host bytes of the cache.
    pub size_bytes: usize,
    /// Measured errors that the thresholds rest on.
    pub labels: usize,
    /// Whether reuse was found useless here and rests.
    pub resting: bool,
    /// Largest accepted prediction of the relative error, `[rungs, group]`; `NaN` = never accepted. Empty where nothing is learnt.
    pub thresholds: Vec<f32>,
}

/// A cache of earlier attention states of one shard. Everything is in host memory.
pub trait ReuseCache: Send + Sync {
    /// Starts a step. `false` = the step goes its ordinary way and nothing else is called for it but `settle`.
    fn begin(&mut self, query: &ReuseQuery<'_>) -> bool;

    /// What to attend or score next; `None` when the cache has heard enough.
    fn ask(&self) -> Option<Ask<'_>>;

    /// The state of the tokens last asked for.
    ///
    /// # Errors
    /// When its shape is not the group's.
    fn answer(&mut self, part: &StateBuf) -> Result<()>;

    /// The logits of the positions last asked for, `[group, positions]`; overwritten.
    fn answer_logits(&mut self, logits: &mut [f32]);

    /// Ends the asking; with [`Outcome::Attended`] `state` is the step's answer.
    ///
    /// # Errors
    /// When parts of different shape were given.
    fn finish(&mut self, state: &mut StateBuf) -> Result<Outcome>;

    /// Hears of a sparse step's result. `true` = there is more to ask, for later steps; `finish` then ends that too.
    ///
    /// # Errors
    /// When parts of different shape were given.
    fn settle(&mut self, step: &SparseStep<'_>) -> Result<bool>;

    /// What the last step did.
    fn report(&self) -> ReuseReport;

    /// lse of what the last attended step read with its own query, outside the span that entries cover; `[group]`.
    fn fresh_lse(&self) -> &[f32];

    /// Forgets every entry that saw a position at or after `num_tokens`. A step that is under way ends declined.
    fn truncate(&mut self, num_tokens: TokenPos);

    /// A cache with the same contents that changes on its own from here on.
    fn fork(&self) -> Box<dyn ReuseCache>;

    /// Contents as bytes for [`Self::restore`]; `None` when there is nothing to keep.
    fn snapshot(&self) -> Option<Vec<u8>>;

    /// Takes over the contents that `bytes` hold. `false` = they are of another shape or damaged, and the cache stays empty.
    fn restore(&mut self, bytes: &[u8]) -> bool;

    /// What is held and learnt.
    fn summary(&self) -> ReuseSummary;
}

/// The cache that a configuration asks for; `shard` is the place of the shard among those of the model.
#[must_use]
pub fn cache(config: &Config, shard: usize) -> Box<dyn ReuseCache> {
    match config.policy.reuse() {
        ReuseKind::Off => Box::new(Off),
        ReuseKind::Mac(options) => Box::new(Mac::new(config, *options)),
        ReuseKind::Calibrated(options) => Box::new(Calibrated::new(config, *options, shard)),
    }
}

/// Never reuses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Off;

impl ReuseCache for Off {
    fn begin(&mut self, _query: &ReuseQuery<'_>) -> bool {
        false
    }

    fn ask(&self) -> Option<Ask<'_>> {
        None
    }

    fn answer(&mut self, _part: &StateBuf) -> Result<()> {
        Ok(())
    }

    fn answer_logits(&mut self, _logits: &mut [f32]) {}

    fn finish(&mut self, _state: &mut StateBuf) -> Result<Outcome> {
        Ok(Outcome::Declined)
    }

    fn settle(&mut self, _step: &SparseStep<'_>) -> Result<bool> {
        Ok(false)
    }

    fn report(&self) -> ReuseReport {
        ReuseReport::default()
    }

    fn fresh_lse(&self) -> &[f32] {
        &[]
    }

    fn truncate(&mut self, _num_tokens: TokenPos) {}

    fn fork(&self) -> Box<dyn ReuseCache> {
        Box::new(Self)
    }

    fn snapshot(&self) -> Option<Vec<u8>> {
        None
    }

    fn restore(&mut self, _bytes: &[u8]) -> bool {
        true
    }

    fn summary(&self) -> ReuseSummary {
        ReuseSummary::default()
    }
}
