//! Selection: which tokens a kv head attends exactly, and what stands in for the rest. One [`Selector`] per shard,
//! one implementation per policy; one selection per kv head, shared by its group.

mod dense;
mod group;
mod indexed;
mod oracle;
mod quantised;
mod quest;
mod spec;

use std::ops::Range;

use floe_index::{Hnsw, HnswConfig, Icecache};
use half::{bf16, f16};

pub(crate) use oracle::Oracle;
pub use spec::{IndexOptions, Policy, PolicyKind, SpecError};

use crate::config::Config;
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::ShardPages;
use crate::query::GroupQuery;
use crate::selection::Selection;
use crate::shape::KvDtype;

/// What one step asks of a shard's selector.
#[derive(Clone, Copy, Debug)]
pub struct SelectRequest<'a> {
    /// The group's queries.
    pub query: GroupQuery<'a>,
    /// Keys and values of the shard.
    pub pages: &'a ShardPages,
    /// Most tokens to retrieve.
    pub budget: usize,
    /// `[group]` lse of sinks and window, which are attended already. A head that finds its mass there needs little else.
    pub attended_lse: &'a [f32],
}

/// What one step read beside the exactly attended rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelectCost {
    /// Bytes of summaries, codes or keys read to choose and to form the tail.
    pub bytes_read: usize,
}

/// Scratch of one worker thread, reused over shards and steps: nothing is allocated after warm-up.
#[derive(Default)]
pub struct SelectScratch {
    pub(crate) scores: Vec<f32>,
    pub(crate) group_scores: Vec<f32>,
    pub(crate) order: Vec<u32>,
    pub(crate) exclude: Vec<u32>,
    pub(crate) attend: floe_cuda::AttendScratch,
    pub(crate) quant: floe_cuda::cpu::quant::QuantScratch,
    pub(crate) index: floe_index::Scratch,
    pub(crate) found: floe_index::Found,
}

/// A selection policy's state for one shard. `select` and `tail` take `&self`: the same inputs give the same answer.
pub trait Selector: Send + Sync {
    /// Takes note of `tokens`, which follow those published before and are complete in `pages`.
    ///
    /// # Errors
    /// When the index refuses the keys; the tokens then stay in the always-attended young region.
    fn publish(&mut self, pages: &ShardPages, tokens: Range<TokenPos>) -> Result<()>;

    /// Forgets the published tokens at and after `num_tokens`, or more, and returns how many it still knows; the others are
    /// published again.
    ///
    /// # Errors
    /// When the index cannot remove them.
    fn truncate(&mut self, num_tokens: TokenPos) -> Result<TokenPos>;

    /// Fills `selection.retrieved` with at most `request.budget` positions of `selection.candidates()`, ascending.
    ///
    /// # Errors
    /// When the index refuses the query.
    fn select(
        &self,
        request: &SelectRequest<'_>,
        scratch: &mut SelectScratch,
        selection: &mut Selection,
    ) -> Result<SelectCost>;

    /// State of the tokens that `selection` leaves out, as far as the policy answers for them; untouched `out` and
    /// `lse` mean that it drops them, as here. Called after `select` of the same step with the same scratch.
    ///
    /// # Errors
    /// When the index refuses the query.
    fn tail(
        &self,
        _query: &GroupQuery<'_>,
        _selection: &Selection,
        _scratch: &mut SelectScratch,
        _out: floe_cuda::StateMut<'_>,
    ) -> Result<SelectCost> {
        Ok(SelectCost::default())
    }

    /// Whether the policy knows that its estimates are too coarse to answer these queries; the step is exact then. A policy
    /// that drops what it does not attend, as the published ones do, has no such estimates.
    fn doubts(&self, _query: &GroupQuery<'_>) -> bool {
        false
    }

    /// Whether `select` or `tail` read rows of `pages`, beyond those that `publish` saw.
    fn reads_rows(&self) -> bool {
        false
    }

    /// A copy that changes on its own from here on.
    ///
    /// # Errors
    /// When the index cannot be copied.
    fn fork(&self) -> Result<Box<dyn Selector>>;

    /// State as bytes for [`Self::restored`]; `None`, as here, when it is built anew from the rows instead.
    fn snapshot(&self) -> Option<Vec<u8>> {
        None
    }

    /// A selector with the settings of this one and the state that `bytes` hold, which saw positions `0..published`.
    ///
    /// # Errors
    /// When the bytes are no snapshot of such a selector.
    fn restored(&self, _bytes: &[u8], _published: TokenPos) -> Result<Box<dyn Selector>> {
        self.fork()
    }

    /// Bytes kept beside the exact keys and values.
    fn size_bytes(&self) -> usize;
}

/// Builds the selector of one shard.
pub(crate) fn selector(config: &Config) -> Result<Box<dyn Selector>> {
    Ok(match config.policy.kind() {
        PolicyKind::Full => Box::new(dense::Dense::Full),
        PolicyKind::Window => Box::new(dense::Dense::Window),
        PolicyKind::Quest => Box::new(quest::Quest::new(config.heads.head_dim())),
        PolicyKind::Oracle => Box::new(Oracle::new()),
        PolicyKind::Quantised(kind) => {
            let head_dim = config.heads.head_dim();
            match config.kv_dtype {
                KvDtype::Bf16 => Box::new(quantised::Quantised::<bf16>::new(*kind, head_dim)?),
                KvDtype::F16 => Box::new(quantised::Quantised::<f16>::new(*kind, head_dim)?),
                KvDtype::F32 => Box::new(quantised::Quantised::<f32>::new(*kind, head_dim)?),
            }
        }
        PolicyKind::Icecache => {
            let index = Icecache::new(config.heads.head_dim(), config.seed)?;
            Box::new(indexed::Indexed::baseline(index, config))
        }
        PolicyKind::Hnsw => {
            let index = Hnsw::new(config.heads.head_dim(), HnswConfig::default())?;
            Box::new(indexed::Indexed::baseline(index, config).heeding_attended())
        }
        PolicyKind::PageMean(options) => Box::new(indexed::Indexed::sequential(config, options)?),
        PolicyKind::Floe(options) => Box::new(indexed::Indexed::tree(config, options)?),
    })
}
