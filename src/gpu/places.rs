//! Where each open sequence lies: its rows and pages on the device, its chunks in host memory.

use std::collections::HashMap;

use floe_cuda::ops::cache::{CHUNK_ROWS, SequencePlace};

use super::host::Chunk;
use super::options::{GpuOptions, Plan};
use super::runs::Runs;
use crate::error::{Error, Result};
use crate::ids::SeqId;

/// One open sequence.
#[derive(Debug)]
pub(super) struct Open {
    /// Index in the tables.
    pub(super) index: usize,
    pub(super) place: SequencePlace,
    /// Tokens it may have.
    pub(super) capacity: usize,
    /// Tokens stored, by layer.
    pub(super) tokens: Vec<usize>,
    /// Pages built, by layer: `0..built`.
    pub(super) built: Vec<usize>,
    /// Chunks by layer.
    pub(super) chunks: Vec<Vec<Chunk>>,
    /// Added to the number of tokens for the tick of a step: truncation must not turn it back.
    pub(super) turned_back: u32,
}

impl Open {
    pub(super) fn is_dense(&self) -> bool {
        self.place.slots == SequencePlace::DENSE
    }

    /// Most tokens of any layer.
    pub(super) fn longest(&self) -> usize {
        self.tokens.iter().copied().max().unwrap_or(0)
    }
}

/// All open sequences and what is free.
#[derive(Debug)]
pub(super) struct Places {
    rows: Runs,
    /// In units of 16 pages.
    pages: Runs,
    free: Vec<usize>,
    max_tokens: usize,
    pub(super) open: HashMap<SeqId, Open>,
}

impl Places {
    pub(super) fn new(options: &GpuOptions, plan: &Plan) -> Self {
        let pages = if plan.exact { 0 } else { options.page_tokens / 256 };
        Self {
            rows: Runs::new(options.rows),
            pages: Runs::new(pages),
            free: (0..options.max_sequences).rev().collect(),
            max_tokens: options.max_tokens,
            open: HashMap::new(),
        }
    }

    /// A place for a sequence of at most `capacity` tokens.
    pub(super) fn admit(&mut self, seq: SeqId, capacity: usize, plan: &Plan, layers: usize) -> Result<()> {
        let heads = plan.shape.heads;
        let index =
            *self.free.last().ok_or(Error::NoRoom { what: "places for sequences", needed: 1, free: 0 })?;
        let pages_each = plan.pages_each(capacity) / 16;
        let pages = self.pages.take(pages_each * heads, 1).ok_or(Error::NoRoom {
            what: "tokens with summaries on the device (`page_tokens`)",
            needed: pages_each * heads * 256,
            free: self.pages.free() * 256,
        })?;
        let place = SequencePlace {
            pages: (pages * 16) as u32,
            pages_each: (pages_each * 16) as u32,
            ..SequencePlace::default()
        };
        // Pages of a tree hold any tokens, and not all of its pages may be on the device.
        let (tokens, tokens_each) = if plan.tree {
            let each = capacity_words(self.max_tokens);
            (index * heads * each, each)
        } else {
            (pages * 256, pages_each * 256)
        };
        let place = SequencePlace { tokens: tokens as u32, tokens_each: tokens_each as u32, ..place };
        // A fair share of what is free, so that places of one size follow one another without holes.
        let share = self.rows.free() / (heads * self.free.len()) / 16 * 16;
        let rows_each = share.min(capacity.next_multiple_of(16));
        let enough = rows_each >= capacity || (!plan.exact && rows_each >= plan.slot_rows());
        let rows = if enough { self.rows.take(rows_each * heads, 16) } else { None };
        let Some(rows) = rows else {
            self.pages.give(pages, pages_each * heads);
            let needed = if plan.exact { capacity } else { plan.slot_rows().min(capacity) } * heads;
            return Err(Error::NoRoom {
                what: "rows on the device (`rows`)",
                needed,
                free: self.rows.free(),
            });
        };
        self.free.pop();
        let open = Open {
            index,
            place: SequencePlace {
                rows: rows as u32,
                rows_each: rows_each as u32,
                slots: SequencePlace::DENSE,
                ..place
            },
            capacity,
            tokens: vec![0; layers],
            built: vec![0; layers],
            chunks: vec![Vec::new(); layers],
            turned_back: 0,
        };
        self.open.insert(seq, open);
        Ok(())
    }

    /// Frees everything of a sequence but its chunks, which are returned.
    pub(super) fn close(&mut self, seq: SeqId, heads: usize) -> Result<Vec<Chunk>> {
        let open = self.open.remove(&seq).ok_or(Error::UnknownSequence(seq))?;
        self.rows.give(open.place.rows as usize, open.place.rows_each as usize * heads);
        self.pages.give(open.place.pages as usize / 16, open.place.pages_each as usize / 16 * heads);
        self.free.push(open.index);
        Ok(open.chunks.into_iter().flatten().collect())
    }

    pub(super) fn get(&self, seq: SeqId) -> Result<&Open> {
        self.open.get(&seq).ok_or(Error::UnknownSequence(seq))
    }

    pub(super) fn get_mut(&mut self, seq: SeqId) -> Result<&mut Open> {
        self.open.get_mut(&seq).ok_or(Error::UnknownSequence(seq))
    }

    /// Rows free on the device.
    pub(super) fn rows_free(&self) -> usize {
        self.rows.free()
    }
}

/// Words of a kv head in tables by token, where a tree's pages hold any of them.
pub(super) const fn capacity_words(max_tokens: usize) -> usize {
    max_tokens.next_multiple_of(CHUNK_ROWS)
}

/// Chunks that hold `tokens`.
pub(super) const fn chunks_of(tokens: usize) -> usize {
    tokens.div_ceil(CHUNK_ROWS)
}
