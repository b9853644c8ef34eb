//! Quest: pages of 16 consecutive tokens, each with the elementwise minimum and maximum of its keys; a page's score is
//! the upper bound `sum_i max(q_i * min_i, q_i * max_i)` (Tang et al., ICML 2024, arXiv 2406.10774).

use std::ops::Range;

use floe_index::IndexError;

use super::group::{max_of_log_softmax, top_k};
use super::{SelectCost, SelectRequest, SelectScratch, Selector};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::ShardPages;
use crate::selection::Selection;
use crate::shape::PAGE_TOKENS;

#[derive(Clone)]
pub(super) struct Quest {
    head_dim: usize,
    /// `[pages, 2, head_dim]` f32: minimum, then maximum, of the page's published keys.
    bounds: Vec<f32>,
    /// Positions below this one are in the bounds.
    published: TokenPos,
}

impl Quest {
    pub(super) fn new(head_dim: usize) -> Self {
        Self { head_dim, bounds: Vec::new(), published: 0 }
    }

    fn grow(&mut self, pos: TokenPos, key: &[f32]) {
        let dim = self.head_dim;
        if (pos as usize).is_multiple_of(PAGE_TOKENS) {
            self.bounds.extend_from_slice(key);
            self.bounds.extend_from_slice(key);
            return;
        }
        let page = pos as usize / PAGE_TOKENS;
        let (low, high) = self.bounds[page * 2 * dim..][..2 * dim].split_at_mut(dim);
        low.iter_mut().zip(key).for_each(|(b, k)| *b = b.min(*k));
        high.iter_mut().zip(key).for_each(|(b, k)| *b = b.max(*k));
    }
}

impl Selector for Quest {
    fn publish(&mut self, pages: &ShardPages, tokens: Range<TokenPos>) -> Result<()> {
        let mut key = vec![0.0f32; self.head_dim];
        let mut value = vec![0.0f32; self.head_dim];
        for pos in tokens.clone() {
            pages.widen_row(pos, &mut key, &mut value);
            self.grow(pos, &key);
        }
        self.published = tokens.end;
        Ok(())
    }

    fn truncate(&mut self, num_tokens: TokenPos) -> Result<TokenPos> {
        // The bounds of the page that is cut keep the removed tokens: they stay upper bounds, only looser.
        if num_tokens < self.published {
            let pages = (num_tokens as usize).div_ceil(PAGE_TOKENS);
            self.bounds.truncate(pages * 2 * self.head_dim);
            self.published = num_tokens;
        }
        Ok(self.published)
    }

    fn select(
        &self,
        request: &SelectRequest<'_>,
        scratch: &mut SelectScratch,
        selection: &mut Selection,
    ) -> Result<SelectCost> {
        let SelectRequest { query, budget, .. } = *request;
        let candidates = selection.candidates();
        if candidates.is_empty() || budget == 0 {
            return Ok(SelectCost::default());
        }
        let dim = self.head_dim;
        let num_pages = self.bounds.len() / (2 * dim);
        scratch.scores.clear();
        scratch.scores.resize(query.group * num_pages, 0.0);
        for (head, scores) in query.q.chunks_exact(dim).zip(scratch.scores.chunks_exact_mut(num_pages)) {
            for (score, page) in scores.iter_mut().zip(self.bounds.chunks_exact(2 * dim)) {
                *score = upper_bound(head, &page[..dim], &page[dim..]) * query.scale;
            }
        }
        // The softmax runs over every page, so that a head that looks at sinks and window has little say in between.
        max_of_log_softmax(&scratch.scores, query.group, &mut scratch.group_scores);
        let first = candidates.start as usize / PAGE_TOKENS;
        let last = (candidates.end as usize).div_ceil(PAGE_TOKENS);
        // Pages needed at most: budget tokens from full pages, and two that the candidate range may cut.
        top_k(&scratch.group_scores[first..last], budget.div_ceil(PAGE_TOKENS) + 2, &mut scratch.order);
        for &page in &scratch.order {
            let start = (first + page as usize) * PAGE_TOKENS;
            for pos in start as TokenPos..(start + PAGE_TOKENS) as TokenPos {
                if selection.retrieved.len() < budget && candidates.contains(&pos) {
                    selection.retrieved.push(pos);
                }
            }
        }
        selection.retrieved.sort_unstable();
        Ok(SelectCost { bytes_read: size_of_val(&self.bounds[..]) })
    }

    fn fork(&self) -> Result<Box<dyn Selector>> {
        Ok(Box::new(self.clone()))
    }

    /// The bounds: those of a page that was cut and refilled cannot be had from its rows.
    fn snapshot(&self) -> Option<Vec<u8>> {
        Some(self.bounds.iter().flat_map(|bound| bound.to_le_bytes()).collect())
    }

    fn restored(&self, bytes: &[u8], published: TokenPos) -> Result<Box<dyn Selector>> {
        let (words, rest) = bytes.as_chunks::<4>();
        let bounds: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        let expected = (published as usize).div_ceil(PAGE_TOKENS) * 2 * self.head_dim;
        if bounds.len() != expected || !rest.is_empty() || bounds.iter().any(|bound| !bound.is_finite()) {
            let what = "page bounds do not fit the tokens";
            return Err(IndexError::Snapshot { what, offset: bytes.len() }.into());
        }
        Ok(Box::new(Self { bounds, published, ..*self }))
    }

    fn size_bytes(&self) -> usize {
        size_of_val(&self.bounds[..])
    }
}

/// `sum_i max(q_i * low_i, q_i * high_i)`, sixteen partial sums so that the loop vectorises.
fn upper_bound(q: &[f32], low: &[f32], high: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let whole = q.len() / LANES * LANES;
    for ((q, low), high) in q.chunks_exact(LANES).zip(low.chunks_exact(LANES)).zip(high.chunks_exact(LANES)) {
        for i in 0..LANES {
            sums[i] += (q[i] * low[i]).max(q[i] * high[i]);
        }
    }
    let rest: f32 = (whole..q.len()).map(|i| (q[i] * low[i]).max(q[i] * high[i])).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_bound_holds_for_every_key_of_the_page() {
        let dim = 19;
        let value = |i: usize| ((i * 7919 % 101) as f32 - 50.0) / 25.0;
        let keys: Vec<Vec<f32>> = (0..16).map(|t| (0..dim).map(|i| value(t * dim + i)).collect()).collect();
        let mut quest = Quest::new(dim);
        for (pos, key) in keys.iter().enumerate() {
            quest.grow(pos as u32, key);
        }
        let q: Vec<f32> = (0..dim).map(|i| value(i * 31 + 5)).collect();
        let bound = upper_bound(&q, &quest.bounds[..dim], &quest.bounds[dim..]);
        let best = keys
            .iter()
            .map(|k| k.iter().zip(&q).map(|(a, b)| a * b).sum::<f32>())
            .fold(f32::NEG_INFINITY, f32::max);
        assert!(bound >= best - 1e-4, "{bound} < {best}");
    }
}
