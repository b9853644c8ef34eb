//! Attention on the CPU, straight from the warm tier.

use floe_cuda::{Isa, KvElem, KvRows, Rows, dense_decode, sparse_decode};

use super::causal::attend_causal;
use super::{AttendScratch, AttentionBackend, CausalQueries, HotTokens, Tokens};
use crate::error::{Error, Result};
use crate::page::{HotRows, PageSlabs, ShardPages, SlotMemory, with_rows};
use crate::query::GroupQuery;
use crate::state::StateBuf;

/// The vector kernels of floe-cuda, with the widest instructions that the machine has.
#[derive(Clone, Copy, Debug)]
pub struct CpuBackend {
    isa: Isa,
}

impl CpuBackend {
    /// Chooses the instruction set.
    #[must_use]
    pub fn detect() -> Self {
        Self { isa: Isa::best() }
    }
}

impl AttentionBackend for CpuBackend {
    fn attend(
        &self,
        query: &GroupQuery<'_>,
        pages: &ShardPages,
        tokens: Tokens<'_>,
        scratch: &mut AttendScratch,
        state: &mut StateBuf,
    ) -> Result<()> {
        if let Tokens::Hot(hot) = tokens {
            return self.attend_hot(query, pages, hot, scratch, state);
        }
        let AttendScratch { rows: list, splits, part, .. } = scratch;
        part.reset(query.group, pages.shape().head_dim());
        with_rows!(pages, rows => {
            let attend = query.over(self.isa, rows);
            match tokens {
                Tokens::Range(r) => dense_decode(&attend, r.start as usize..r.end as usize, splits, part.as_mut())?,
                Tokens::List(tokens) => sparse_decode(&attend, Rows::List(tokens), list, part.as_mut())?,
                Tokens::Hot(_) => {}
            }
        });
        state.merge(part)
    }

    fn attend_causal(
        &self,
        queries: &CausalQueries<'_>,
        pages: &ShardPages,
        scratch: &mut AttendScratch,
        out: &mut [f32],
    ) -> Result<()> {
        with_rows!(pages, rows => attend_causal(self.isa, queries, rows, scratch, out))
    }
}

impl CpuBackend {
    fn attend_hot(
        &self,
        query: &GroupQuery<'_>,
        pages: &ShardPages,
        hot: HotTokens<'_>,
        scratch: &mut AttendScratch,
        state: &mut StateBuf,
    ) -> Result<()> {
        match (pages, hot.memory) {
            (ShardPages::Bf16(warm), SlotMemory::Bf16(memory)) => {
                self.gather(query, (warm, memory), hot, scratch)?
            }
            (ShardPages::F16(warm), SlotMemory::F16(memory)) => {
                self.gather(query, (warm, memory), hot, scratch)?
            }
            (ShardPages::F32(warm), SlotMemory::F32(memory)) => {
                self.gather(query, (warm, memory), hot, scratch)?
            }
            _ => {
                let (warm, slots) = (pages.shape().dtype(), hot.memory.dtype());
                return Err(Error::shape("slots", format!("{warm} like the pages"), slots.to_string()));
            }
        }
        state.merge(&scratch.part)
    }

    fn gather<E: KvElem>(
        &self,
        query: &GroupQuery<'_>,
        (warm, memory): (&PageSlabs<E>, &[E]),
        hot: HotTokens<'_>,
        scratch: &mut AttendScratch,
    ) -> Result<()> {
        let AttendScratch { rows: list, part, counting, .. } = scratch;
        let rows = HotRows::new(memory, warm, hot.tokens, &hot.table.places);
        let num_tokens = hot.tokens.len();
        if counting.len() < num_tokens {
            counting.extend(counting.len() as u32..num_tokens as u32);
        }
        part.reset(query.group, rows.head_dim());
        let attend = query.over(self.isa, &rows);
        Ok(sparse_decode(&attend, Rows::List(&counting[..num_tokens]), list, part.as_mut())?)
    }
}
