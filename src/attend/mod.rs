//! Exact attention over chosen rows of one shard.

mod causal;
mod cpu;
pub mod exact;
mod logits;

use std::ops::Range;

pub use causal::CausalQueries;
pub use cpu::CpuBackend;
pub use logits::{logits, logits_of};

use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::{HostMemory, ShardPages, SlabSource, SlotMemory, SlotTable};
use crate::query::GroupQuery;
use crate::state::StateBuf;

/// Scratch of one worker thread.
#[derive(Debug, Default)]
pub struct AttendScratch {
    rows: floe_cuda::AttendScratch,
    splits: floe_cuda::SplitScratch,
    part: StateBuf,
    /// 0, 1, 2, ...: rows of a step that lie in slots, in the order of their positions.
    counting: Vec<u32>,
    all: StateBuf,
    logits: Vec<f32>,
}

/// Tokens of one shard.
#[derive(Clone, Debug)]
pub enum Tokens<'a> {
    /// Consecutive positions.
    Range(Range<TokenPos>),
    /// Ascending positions.
    List(&'a [TokenPos]),
    /// Ascending positions, read from their slots where the table has one for them.
    Hot(HotTokens<'a>),
}

/// The tokens of one step with their page table and the memory of the slots.
#[derive(Clone, Copy, Debug)]
pub struct HotTokens<'a> {
    /// Ascending positions.
    pub tokens: &'a [TokenPos],
    /// Where they lie, one place a token.
    pub table: &'a SlotTable,
    /// Memory of the slots.
    pub memory: &'a SlotMemory,
}

/// Where attention runs. One implementation is chosen when the engine is opened.
pub trait AttentionBackend: Send + Sync {
    /// Where the slabs of the warm tier come from: memory that this backend reads best.
    fn slab_source(&self) -> Box<dyn SlabSource> {
        Box::new(HostMemory)
    }

    /// Adds the attention of `tokens` to `state`, which covers other tokens or none. Long ranges are split over the worker
    /// threads, with the same bits for any number.
    ///
    /// # Errors
    /// When a shape does not fit.
    fn attend(
        &self,
        query: &GroupQuery<'_>,
        pages: &ShardPages,
        tokens: Tokens<'_>,
        scratch: &mut AttendScratch,
        state: &mut StateBuf,
    ) -> Result<()>;

    /// Causal attention of consecutive stored tokens, on the calling thread; `out` is `[tokens, group, head_dim]`.
    ///
    /// # Errors
    /// When a shape does not fit.
    fn attend_causal(
        &self,
        queries: &CausalQueries<'_>,
        pages: &ShardPages,
        scratch: &mut AttendScratch,
        out: &mut [f32],
    ) -> Result<()>;
}
