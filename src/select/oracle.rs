//! The exact top tokens by attention mass summed over the group. Reads every key: a reference, not a method.

use std::ops::Range;

use floe_cuda::{Isa, score_rows};

use super::group::{softmax_in_place, top_k};
use super::{SelectCost, SelectRequest, SelectScratch, Selector};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::{ShardPages, with_rows};
use crate::query::GroupQuery;
use crate::selection::Selection;

pub(crate) struct Oracle {
    isa: Isa,
}

impl Oracle {
    pub(crate) fn new() -> Self {
        Self { isa: Isa::best() }
    }

    /// The `k` tokens of `candidates` with the largest attention mass summed over the group, largest first, into
    /// `scratch.order` as offsets from `candidates.start`. The softmax runs over all of `0..num_tokens`, sinks and window
    /// included: a head that looks only there has little say.
    pub(crate) fn rank(
        &self,
        query: &GroupQuery<'_>,
        (pages, num_tokens): (&ShardPages, usize),
        candidates: Range<TokenPos>,
        k: usize,
        scratch: &mut SelectScratch,
    ) -> Result<()> {
        scratch.scores.clear();
        scratch.scores.resize(query.group * num_tokens, 0.0);
        with_rows!(pages, rows => {
            let attend = query.over(self.isa, rows);
            score_rows(&attend, 0..num_tokens, &mut scratch.attend, &mut scratch.scores)?;
        });
        let (start, end) = (candidates.start as usize, candidates.end as usize);
        scratch.group_scores.clear();
        scratch.group_scores.resize(end - start, 0.0);
        for head in scratch.scores.chunks_exact_mut(num_tokens) {
            let inverse = 1.0 / softmax_in_place(head);
            let mass = scratch.group_scores.iter_mut().zip(&head[start..end]);
            mass.for_each(|(m, p)| *m += p * inverse);
        }
        top_k(&scratch.group_scores, k, &mut scratch.order);
        Ok(())
    }
}

impl Selector for Oracle {
    fn publish(&mut self, _pages: &ShardPages, _tokens: Range<TokenPos>) -> Result<()> {
        Ok(())
    }

    fn truncate(&mut self, num_tokens: TokenPos) -> Result<TokenPos> {
        Ok(num_tokens)
    }

    fn select(
        &self,
        request: &SelectRequest<'_>,
        scratch: &mut SelectScratch,
        selection: &mut Selection,
    ) -> Result<SelectCost> {
        let (pages, num_tokens) = (request.pages, request.pages.num_tokens());
        let candidates = selection.candidates();
        self.rank(&request.query, (pages, num_tokens), candidates.clone(), request.budget, scratch)?;
        selection.retrieved.extend(scratch.order.iter().map(|i| candidates.start + i));
        selection.retrieved.sort_unstable();
        let shape = pages.shape();
        Ok(SelectCost { bytes_read: num_tokens * shape.head_dim() * shape.dtype().size_bytes() })
    }

    fn reads_rows(&self) -> bool {
        true
    }

    fn fork(&self) -> Result<Box<dyn Selector>> {
        Ok(Box::new(Self { isa: self.isa }))
    }

    fn size_bytes(&self) -> usize {
        0
    }
}
