//! Attention on the CPU, straight from the warm tier.

use std::ops::Range;

use floe_cuda::{Isa, Rows, dense_decode, merge_states, sparse_decode};

use super::causal::attend_causal;
use super::{AttendScratch, AttentionBackend, CausalQueries};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::{ShardPages, with_rows};
use crate::query::GroupQuery;
use crate::selection::Selection;
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
    fn attend_range(
        &self,
        query: &GroupQuery<'_>,
        pages: &ShardPages,
        tokens: Range<TokenPos>,
        scratch: &mut AttendScratch,
        state: &mut StateBuf,
    ) -> Result<()> {
        let range = tokens.start as usize..tokens.end as usize;
        state.reset(query.group, pages.shape().head_dim());
        with_rows!(pages, rows => {
            dense_decode(&query.over(self.isa, rows), range, &mut scratch.splits, state.as_mut())?;
        });
        Ok(())
    }

    fn attend_selection(
        &self,
        query: &GroupQuery<'_>,
        pages: &ShardPages,
        selection: &Selection,
        scratch: &mut AttendScratch,
        state: &mut StateBuf,
    ) -> Result<()> {
        let part = &mut scratch.part;
        state.reset(query.group, pages.shape().head_dim());
        part.reset(query.group, pages.shape().head_dim());
        let fixed = |r: &Range<TokenPos>| Rows::Range(r.start as usize..r.end as usize);
        with_rows!(pages, rows => {
            let attend = query.over(self.isa, rows);
            for which in [fixed(&selection.sinks), Rows::List(&selection.retrieved), fixed(&selection.window)] {
                if which.is_empty() {
                    continue;
                }
                sparse_decode(&attend, which, &mut scratch.rows, part.as_mut())?;
                merge_states(state.as_mut(), part.as_ref())?;
            }
        });
        Ok(())
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
