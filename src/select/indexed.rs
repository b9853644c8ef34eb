//! Policies that ask a [`KeyIndex`]: adapts one index of one shard to the engine's selection.

use std::ops::Range;

use floe_index::export::code_distortion;
use floe_index::{
    Batch, Dci, Flat, Hnsw, Icecache, IndexError, KeyIndex, Query, SearchParams, Tail, TailOut, Unit,
};

use super::{IndexOptions, SelectCost, SelectRequest, SelectScratch, Selector};
use crate::config::Config;
use crate::error::Result;
use crate::ids::TokenPos;
use crate::page::ShardPages;
use crate::query::GroupQuery;
use crate::selection::Selection;

/// Reads an index back from its snapshot.
type ReadIndex = fn(&[u8]) -> std::result::Result<Box<dyn KeyIndex>, IndexError>;

/// An index that can be read back from its snapshot.
pub(super) trait Restored: KeyIndex + Sized + 'static {
    fn read(bytes: &[u8]) -> std::result::Result<Box<dyn KeyIndex>, IndexError>;
}

macro_rules! restored {
    ($($index:ty),*) => {$(
        impl Restored for $index {
            fn read(bytes: &[u8]) -> std::result::Result<Box<dyn KeyIndex>, IndexError> {
                Ok(Box::new(<$index>::restore(bytes)?))
            }
        }
    )*};
}
restored!(Flat, Dci, Icecache, Hnsw);

/// One shard's index and how it is searched. Sinks are never given to the index: they are always attended, and as
/// outliers they would spoil the clusters they fall into.
pub(super) struct Indexed {
    index: Box<dyn KeyIndex>,
    /// Reads an index of the same kind back from its snapshot.
    read: ReadIndex,
    /// Search parameters of every step, the budget aside.
    params: SearchParams,
    /// Whether the ranking heeds the mass on sinks and window; the published page policies do not.
    heeds_attended: bool,
    /// Standard deviation in nats beyond which estimated logits are not trusted.
    max_doubt: f32,
    /// Variance of an estimated logit for `scale |q|` of 1: what codes leave of the keys' residuals, averaged over the tokens.
    code_variance: f32,
    /// First position the index may hold.
    sinks: TokenPos,
    /// Positions below this one have been published.
    published: TokenPos,
}

impl Indexed {
    /// Consecutive pages, scanned.
    pub(super) fn sequential(config: &Config, options: &IndexOptions) -> Result<Self> {
        let index = Flat::with_sketch(config.heads.head_dim(), options.sketch)?;
        Ok(Self::searched(index, config, options))
    }

    /// Pages of similar keys, in a tree.
    pub(super) fn tree(config: &Config, options: &IndexOptions) -> Result<Self> {
        let index = Dci::with_sketch(config.heads.head_dim(), options.sketch)?;
        Ok(Self::searched(index, config, options).heeding_attended())
    }

    /// An index with a tail, searched as `options` say.
    fn searched<I: Restored>(index: I, config: &Config, options: &IndexOptions) -> Self {
        let max_doubt = options.max_doubt;
        Self { params: params(options), max_doubt, ..Self::baseline(index, config) }
    }

    /// A published index: it ranks what it holds and drops the rest.
    pub(super) fn baseline<I: Restored>(index: I, config: &Config) -> Self {
        let params = SearchParams::exact(0, Unit::Token, Tail::Off);
        let (index, read) = (Box::new(index), I::read as ReadIndex);
        let sinks = config.sinks as TokenPos;
        let (max_doubt, code_variance) = (f32::INFINITY, 0.0);
        Self { index, read, params, heeds_attended: false, max_doubt, code_variance, sinks, published: 0 }
    }

    /// Tells the ranking of the mass on sinks and window: for an index that ranks tokens by their own scores.
    pub(super) fn heeding_attended(self) -> Self {
        Self { heeds_attended: true, ..self }
    }

    /// Brings `code_variance` up to date with the index.
    ///
    /// Codes err alike in all directions, because residuals are rotated before they are coded: the error of a logit has the
    /// variance `scale^2 |q|^2` times that of a coordinate, which is a fixed share of the residuals' own.
    fn measure(&mut self) {
        let codes = self.index.pages().filter(|_| self.params.tail != Tail::Off);
        let measured = codes.and_then(|codes| {
            let (bits, summaries) = (codes.key_sketches()?.bits, codes.summaries());
            let (mut spread, mut tokens) = (0.0, 0.0);
            for (&of_page, &count) in summaries.spread.iter().zip(summaries.count) {
                spread += of_page * count as f32;
                tokens += count as f32;
            }
            Some(if tokens > 0.0 { code_distortion(bits) * spread / tokens } else { 0.0 })
        });
        self.code_variance = measured.unwrap_or(0.0);
    }

    /// Positions that the index holds although the window attends them: they joined while still in the window.
    fn exclude(&self, selection: &Selection, exclude: &mut Vec<u32>) {
        exclude.clear();
        exclude.extend(selection.window.start.max(self.sinks)..self.published);
    }
}

impl Selector for Indexed {
    fn publish(&mut self, pages: &ShardPages, tokens: Range<TokenPos>) -> Result<()> {
        let fresh = tokens.start.max(self.sinks)..tokens.end;
        if !fresh.is_empty() {
            let dim = pages.shape().head_dim();
            let mut keys = vec![0.0f32; fresh.len() * dim];
            let mut values = vec![0.0f32; fresh.len() * dim];
            for (i, pos) in fresh.clone().enumerate() {
                pages.widen_row(pos, &mut keys[i * dim..][..dim], &mut values[i * dim..][..dim]);
            }
            let ids: Vec<u32> = fresh.collect();
            let batch = Batch { ids: &ids, keys: &keys, values: &values };
            if self.index.is_empty() {
                self.index.build(&batch)?;
            } else {
                self.index.insert(&batch)?;
            }
        }
        self.published = tokens.end;
        self.measure();
        Ok(())
    }

    fn truncate(&mut self, num_tokens: TokenPos) -> Result<TokenPos> {
        if num_tokens < self.published {
            let gone: Vec<u32> = (num_tokens.max(self.sinks)..self.published).collect();
            self.index.remove(&gone)?;
            self.published = num_tokens;
            self.measure();
        }
        Ok(self.published)
    }

    fn select(
        &self,
        request: &SelectRequest<'_>,
        scratch: &mut SelectScratch,
        selection: &mut Selection,
    ) -> Result<SelectCost> {
        self.exclude(selection, &mut scratch.exclude);
        let params = SearchParams { budget: request.budget, ..self.params };
        let attended_lse = if self.heeds_attended { request.attended_lse } else { &[] };
        let query = index_query(&request.query, attended_lse);
        self.index.search(&query, &scratch.exclude, &params, &mut scratch.index, &mut scratch.found)?;
        selection.retrieved.extend(scratch.found.tokens.iter().map(|hit| hit.id));
        selection.retrieved.sort_unstable();
        Ok(SelectCost { bytes_read: scratch.found.index_bytes_read })
    }

    fn tail(
        &self,
        query: &GroupQuery<'_>,
        _selection: &Selection,
        scratch: &mut SelectScratch,
        out: floe_cuda::StateMut<'_>,
    ) -> Result<SelectCost> {
        if self.params.tail == Tail::Off {
            return Ok(SelectCost::default());
        }
        let query = index_query(query, &[]);
        let state = TailOut { out: out.out, lse: out.lse };
        self.index.tail(&query, &scratch.exclude, &scratch.found, &mut scratch.index, state)?;
        Ok(SelectCost { bytes_read: scratch.found.tail_bytes_read })
    }

    fn doubts(&self, query: &GroupQuery<'_>) -> bool {
        let per_head = query.q.iter().map(|x| x * x).sum::<f32>() / query.group as f32;
        query.scale * query.scale * per_head * self.code_variance > self.max_doubt * self.max_doubt
    }

    fn fork(&self) -> Result<Box<dyn Selector>> {
        self.restored(&self.index.snapshot(), self.published)
    }

    fn snapshot(&self) -> Option<Vec<u8>> {
        Some(self.index.snapshot())
    }

    fn restored(&self, bytes: &[u8], published: TokenPos) -> Result<Box<dyn Selector>> {
        let mut restored = Self { index: (self.read)(bytes)?, published, ..*self };
        restored.measure();
        Ok(Box::new(restored))
    }

    fn size_bytes(&self) -> usize {
        self.index.memory().total_bytes()
    }
}

/// Search parameters of every step, the budget aside.
fn params(options: &IndexOptions) -> SearchParams {
    let exact = SearchParams::exact(0, options.unit, options.tail);
    let IndexOptions { open, open_mass, detail, .. } = *options;
    SearchParams { open_fraction: open, open_mass, detail, ..exact }
}

fn index_query<'a>(query: &GroupQuery<'a>, attended_lse: &'a [f32]) -> Query<'a> {
    Query { q: query.q, group: query.group, scale: query.scale, attended_lse }
}
