//! Launchers of the kernels that keep the engine's cache on the device: append, ingest and gather, page summaries, slots, output.
//!
//! ```text
//! append_step ─> scores ─> select ─┬> resolve (─> fetch_listed) ─> sparse_decode ─┬> finish
//!      │                           └> tail ──────────────────────────────────────┤
//!      └─> build_pages ─> whole_decode ──────────────────────────────────────────┘
//! ```
//! All of them read lengths and places from tables in device memory ([`Tables`]), so that a recorded step can be replayed while
//! sequences grow, join and leave. An *item* is a kv head of an entry of the batch: `entry * heads + head`.

mod append;
mod finish;
mod gather;
mod ingest;
mod pages;
mod resolve;
mod tensor;
mod tree;

use bytemuck::{Pod, Zeroable};

pub use append::{AppendStep, BeyondRows, DoubtCheck, Ranges, append_step};
pub use finish::{FINISH_PARTS_MAX, FinishStart, finish};
pub use gather::{Gather, gather};
pub use ingest::{Ingest, ingest, refill};
pub use pages::{PageSketch, PageSource, Pages, build_pages};
pub use resolve::{
    Ahead, FetchList, FoundUnit, RETRIEVED_MAX, Resolve, Slots, fetch_listed, resolve, resolve_ahead,
};
pub use tensor::{DeviceTensor, TensorType};
pub use tree::{Counted, Said, TreePage, TreePages, announce_tree_pages, build_tree_pages};

use super::{check_head_dim, word};
use crate::device::{DevRef, DeviceError};

/// Rows of a kv head in one chunk of host memory.
pub const CHUNK_ROWS: usize = 256;

/// Where a sequence lies. Mirrors `floe::SequencePlace`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SequencePlace {
    /// First of its rows on the device.
    pub rows: u32,
    /// Rows of each kv head.
    pub rows_each: u32,
    /// First of its pages, a multiple of 16.
    pub pages: u32,
    /// Pages of each kv head, a multiple of 16.
    pub pages_each: u32,
    /// Slots of each kv head, or [`SequencePlace::DENSE`]; 0 where a layer attends its ring alone ([`CacheShape::of_span`]).
    pub slots: u32,
    /// Word of the first token in lists of tokens and tables by token.
    pub tokens: u32,
    /// Words of a kv head; 0: 16 for each page, from the first page's on.
    pub tokens_each: u32,
    /// Zero.
    pub unused: u32,
}

impl SequencePlace {
    /// As `slots`: the first `rows_each` tokens have their rows, in order of position.
    pub const DENSE: u32 = u32::MAX;
}

/// Who takes part in a step. Mirrors `floe::BatchEntry`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchEntry {
    /// Index of its [`SequencePlace`].
    pub sequence: u32,
    /// Tokens, the step's own included; 0 = nobody.
    pub tokens: u32,
    /// Counts steps, so that slots know when they were used: above those of earlier steps.
    pub tick: u32,
    /// 1 = attends all of its tokens, or those in the ring where it does not lie densely; 0 = what is selected.
    pub exact: u32,
}

// SAFETY: `repr(C)` of eight u32 without padding; every bit pattern is a value.
unsafe impl Zeroable for SequencePlace {}
// SAFETY: as above.
unsafe impl Pod for SequencePlace {}
// SAFETY: `repr(C)` of four u32 without padding; every bit pattern is a value.
unsafe impl Zeroable for BatchEntry {}
// SAFETY: as above.
unsafe impl Pod for BatchEntry {}

/// Heads and fixed parts of every sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Kv heads.
    pub heads: usize,
    /// Query heads of each, 1 to 16.
    pub group: usize,
    /// Dimensions of a head: 64, 96, 128 or 256.
    pub head_dim: usize,
    /// First tokens, always attended; a multiple of 16.
    pub sinks: usize,
    /// Newest tokens that no published page holds; 0 where there are no pages.
    pub window: usize,
    /// Newest tokens that keep their rows beside the slots; at least `window + 16` where there are pages.
    pub ring: usize,
}

impl CacheShape {
    /// The same heads in a layer that attends its newest `span` tokens alone: a ring of as many rows, no sinks, no pages.
    #[must_use]
    pub const fn of_span(self, span: usize) -> Self {
        Self { sinks: 0, window: 0, ring: span, ..self }
    }

    /// Refuses what no kernel takes.
    ///
    /// # Errors
    /// The first field out of range.
    pub fn check(&self) -> Result<(), DeviceError> {
        check_head_dim(self.head_dim)?;
        let wrong = |field, value, expected| Err(DeviceError::Unsupported { field, value, expected });
        match self {
            _ if !(1..=16).contains(&self.group) => wrong("group", self.group, "1 to 16"),
            _ if self.heads == 0 => wrong("heads", 0, "at least 1"),
            _ if !self.sinks.is_multiple_of(16) => wrong("sinks", self.sinks, "a multiple of 16"),
            _ if self.ring == 0 => wrong("ring", 0, "at least 1"),
            _ if self.window > 0 && self.ring < self.window + 16 => {
                wrong("ring", self.ring, "at least the window and 16")
            }
            _ => Ok(()),
        }
    }

    /// Tokens always attended in a step, at most.
    #[must_use]
    pub const fn fixed_max(&self) -> usize {
        self.sinks + self.window + 16
    }

    /// Elements of a row.
    #[must_use]
    pub const fn row_len(&self) -> usize {
        2 * self.head_dim
    }
}

/// The tables that every kernel of the cache reads; device.
#[derive(Debug, Clone, Copy)]
pub struct Tables<'a> {
    /// Heads and fixed parts.
    pub shape: CacheShape,
    /// The step's sequences.
    pub batch: DevRef<'a, BatchEntry>,
    /// All sequences.
    pub sequences: DevRef<'a, SequencePlace>,
    /// Addresses of the chunks of a layer, [sequences, chunks of each]; a chunk is host-mapped [heads, 256, 2, head_dim].
    pub chunks: DevRef<'a, u64>,
}

/// Mirrors `floe::Cache`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CacheParams {
    batch: u64,
    sequences: u64,
    chunks: u64,
    heads: u32,
    group: u32,
    sinks: u32,
    window: u32,
    ring: u32,
    chunks_each: u32,
}

impl Tables<'_> {
    /// Items of a step.
    #[must_use]
    pub fn items(&self) -> usize {
        self.batch.len() * self.shape.heads
    }

    fn params(&self) -> Result<CacheParams, DeviceError> {
        self.shape.check()?;
        let sequences = self.sequences.len();
        let chunks_each = self.chunks.len() / sequences.max(1);
        self.chunks.check("chunks", chunks_each * sequences)?;
        Ok(CacheParams {
            batch: self.batch.address(),
            sequences: self.sequences.address(),
            chunks: self.chunks.address(),
            heads: word("heads", self.shape.heads)?,
            group: word("group", self.shape.group)?,
            sinks: word("sinks", self.shape.sinks)?,
            window: word("window", self.shape.window)?,
            ring: word("ring", self.shape.ring)?,
            chunks_each: word("chunks", chunks_each)?,
        })
    }
}
