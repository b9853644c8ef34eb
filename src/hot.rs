//! One shard's hot tier as a step uses it: directory, manager and memory together.

use crate::config::{Config, HotConfig};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::{HotTier, ShardPages, SlotMemory, SlotTable};
use crate::policy::EvictionKind;
use crate::query::GroupQuery;
use crate::shape::PageShape;
use crate::transfer::{Completion, Fetched, Link, Move, Offload, Ticket};

/// Slots of one shard in host memory.
pub(crate) struct HotShard {
    config: HotConfig,
    shape: PageShape,
    offload: Offload,
    memory: SlotMemory,
    table: SlotTable,
    /// Units of the step before, for prefetch.
    previous: Vec<u32>,
    mass: Vec<f32>,
    /// Key and value of one token while it is weighed, `[2, head_dim]`.
    row: Vec<f32>,
}

/// Copies inside host memory: complete when submitted.
struct HostCopy<'a> {
    pages: &'a ShardPages,
    memory: &'a mut SlotMemory,
    unit: crate::page::Unit,
}

impl Link for HostCopy<'_> {
    fn submit(&mut self, moves: &[Move]) -> Ticket {
        for m in moves {
            self.memory.fill(m.slot, (self.unit, m.unit), self.pages);
        }
        Ticket(0)
    }

    fn poll(&mut self, _ticket: Ticket) -> Completion {
        Completion::Done
    }

    fn wait(&mut self, _ticket: Ticket) -> Completion {
        Completion::Done
    }
}

impl HotShard {
    /// The shard's slots, or `None` when the configuration asks for none.
    pub(crate) fn new(config: &Config) -> Option<Self> {
        let shape = PageShape::new(config.heads.head_dim(), config.kv_dtype);
        (config.hot.slots > 0).then(|| Self::with_slots(config.hot, shape))
    }

    fn with_slots(config: HotConfig, shape: PageShape) -> Self {
        let tokens = config.unit.tokens();
        Self {
            config,
            shape,
            offload: Offload::new(HotTier::new(config.slots, config.eviction), tokens * shape.row_bytes()),
            memory: SlotMemory::new(config.slots * tokens, shape),
            table: SlotTable::default(),
            previous: Vec::new(),
            mass: Vec::new(),
            row: Vec::new(),
        }
    }

    /// Brings the tokens' units into slots and pins them until [`Self::finish`]. The table says where each token lies.
    pub(crate) fn demand(&mut self, tokens: &[TokenPos], pages: &ShardPages) -> Result<()> {
        self.table.resolve(self.config.unit, tokens);
        let mut link = HostCopy { pages, memory: &mut self.memory, unit: self.config.unit };
        self.offload.demand(&self.table.units, &mut link)?;
        self.table.place(self.config.unit, tokens, self.offload.slots());
        Ok(())
    }

    /// Where the step's tokens lie, and the memory of the slots.
    pub(crate) fn view(&self) -> (&SlotTable, &SlotMemory) {
        (&self.table, &self.memory)
    }

    /// Ends the step. `exact_lse` `[group]` covers all tokens attended exactly.
    pub(crate) fn finish(
        &mut self,
        query: &GroupQuery<'_>,
        tokens: &[TokenPos],
        (pages, exact_lse): (&ShardPages, &[f32]),
    ) -> Result<Fetched> {
        self.mass.clear();
        if self.config.eviction == EvictionKind::Mass {
            self.weigh(query, tokens, (pages, exact_lse));
        }
        self.previous.clone_from(&self.table.units);
        Ok(self.offload.finish(&self.mass)?)
    }

    /// Attention mass of each unit of the step, mean over the heads.
    fn weigh(&mut self, query: &GroupQuery<'_>, tokens: &[TokenPos], (pages, lse): (&ShardPages, &[f32])) {
        let dim = self.shape.head_dim();
        self.row.resize(2 * dim, 0.0);
        let (key, value) = self.row.split_at_mut(dim);
        for span in self.table.indptr.windows(2) {
            let mut mass = 0.0;
            for token in &tokens[span[0] as usize..span[1] as usize] {
                pages.widen_row(*token, key, value);
                mass += query.mass(key, lse);
            }
            self.mass.push(mass);
        }
    }

    /// Brings in what the step before used (`guess` = `None`) or what somebody guessed.
    pub(crate) fn prefetch(&mut self, guess: Option<&[TokenPos]>, pages: &ShardPages) -> Result<()> {
        let mut link = HostCopy { pages, memory: &mut self.memory, unit: self.config.unit };
        match guess {
            None => self.offload.prefetch(&self.previous, &mut link)?,
            Some(tokens) => {
                self.table.resolve(self.config.unit, tokens);
                self.offload.prefetch(&self.table.units, &mut link)?
            }
        };
        Ok(())
    }

    /// Drops what is cached of the tokens at and after `num_tokens`.
    pub(crate) fn truncate(&mut self, num_tokens: usize, pages: &ShardPages) -> Result<()> {
        let first = (num_tokens / self.config.unit.tokens()) as u32;
        let mut link = HostCopy { pages, memory: &mut self.memory, unit: self.config.unit };
        self.previous.retain(|unit| *unit < first);
        Ok(self.offload.truncate(first, &mut link)?)
    }

    /// Empties the slots.
    pub(crate) fn clear(&mut self) {
        self.offload.clear();
    }

    /// The same tier with another number of slots, empty.
    pub(crate) fn resized(&self, slots: usize) -> Option<Self> {
        (slots > 0).then(|| Self::with_slots(HotConfig { slots, ..self.config }, self.shape))
    }

    /// Pins that were not handed back: between steps, a leak.
    pub(crate) fn pins_out(&self) -> usize {
        self.offload.tier().pins_out()
    }

    /// Bytes of the slots.
    pub(crate) fn size_bytes(&self) -> usize {
        self.config.slots * self.config.unit.tokens() * self.shape.row_bytes()
    }
}
