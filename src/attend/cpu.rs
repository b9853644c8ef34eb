//! Attention on the CPU, straight from the warm tier.

use floe_cuda::{Isa, Rows, dense_decode, sparse_decode};

use super::causal::attend_causal;
use super::{AttendScratch, AttentionBackend, CausalQueries, Tokens};
use crate::error::Result;
use crate::page::{ShardPages, with_rows};
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
        let AttendScratch { rows: list, splits, part, .. } = scratch;
        part.reset(query.group, pages.shape().head_dim());
        with_rows!(pages, rows => {
            let attend = query.over(self.isa, rows);
            match tokens {
                Tokens::Range(r) => dense_decode(&attend, r.start as usize..r.end as usize, splits, part.as_mut())?,
                Tokens::List(tokens) => sparse_decode(&attend, Rows::List(tokens), list, part.as_mut())?,
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
