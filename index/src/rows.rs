//! Keys and values in full, for the indexes that work on single tokens, and the selection that they share.

use crate::check;
use crate::error::IndexError;
use crate::found::Found;
use crate::idmap::{IdMap, Place};
use crate::index::{Batch, Hit, KeyId, MAX_DIM, MemoryReport, Query, SearchParams, Tail};
use crate::scratch::Scratch;
use crate::simd::Isa;
use crate::simd::vectorise::{Kernel, dot, vectorised};
use crate::snapshot::{Reader, Writer};
use crate::topk::Ranked;

/// Tokens by row; a removed token leaves a dead row behind.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    pub dim: usize,
    pub ids: Vec<KeyId>,
    pub live: Vec<bool>,
    /// `[rows, dim]`
    pub keys: Vec<f32>,
    /// `[rows, dim]`
    pub values: Vec<f32>,
    pub map: IdMap,
    pub stamp: u64,
}

impl Rows {
    pub fn new(dim: usize) -> Self {
        Self { dim, ..Self::default() }
    }

    pub fn num_rows(&self) -> usize {
        self.ids.len()
    }

    pub fn key(&self, row: usize) -> &[f32] {
        &self.keys[row * self.dim..(row + 1) * self.dim]
    }

    /// Checks a batch without adding it.
    pub fn check(&self, batch: &Batch<'_>) -> Result<(), IndexError> {
        check::batch(batch, self.dim, self.num_rows(), |id| self.map.get(id).is_some())
    }

    /// Adds a checked batch; its rows are the last ones.
    pub fn extend(&mut self, batch: &Batch<'_>) {
        for (i, &id) in batch.ids.iter().enumerate() {
            self.map.set(id, Place::Slot(self.num_rows() + i));
        }
        self.ids.extend_from_slice(batch.ids);
        self.live.resize(self.ids.len(), true);
        self.keys.extend_from_slice(batch.keys);
        self.values.extend_from_slice(batch.values);
        self.stamp += 1;
    }

    /// Row of a live token.
    pub fn row_of(&self, id: KeyId) -> Option<usize> {
        match self.map.get(id) {
            Some(Place::Slot(row)) => Some(row),
            _ => None,
        }
    }

    /// Marks a token dead and returns its row.
    pub fn remove(&mut self, id: KeyId) -> Option<usize> {
        let row = self.row_of(id)?;
        self.map.remove(id);
        self.live[row] = false;
        self.stamp += 1;
        Some(row)
    }

    pub fn memory(&self) -> MemoryReport {
        MemoryReport {
            ids_bytes: 4 * self.ids.capacity() + self.live.capacity() + self.map.size_bytes(),
            rows_bytes: 4 * (self.keys.capacity() + self.values.capacity()),
            ..MemoryReport::default()
        }
    }

    /// Appends the live rows in order.
    pub fn write_to(&self, to: &mut Writer) {
        to.len(self.dim);
        to.len(self.map.len());
        let live = || (0..self.num_rows()).filter(|&row| self.live[row]);
        live().for_each(|row| to.u32(self.ids[row]));
        live().for_each(|row| to.f32s(self.key(row)));
        live().for_each(|row| to.f32s(&self.values[row * self.dim..(row + 1) * self.dim]));
    }

    /// What `write_to` appended.
    pub fn read_from(from: &mut Reader<'_>) -> Result<Self, IndexError> {
        let dim = from.len()?;
        from.check((1..=MAX_DIM).contains(&dim), "dimension")?;
        let len = from.len()?;
        let (ids, keys) = (from.u32s(len)?, from.f32s(len * dim)?);
        let values = from.f32s(len * dim)?;
        let mut rows = Self::new(dim);
        let batch = Batch { ids: &ids, keys: &keys, values: &values };
        rows.check(&batch).map_err(|_| from.damaged("an id occurs twice"))?;
        rows.extend(&batch);
        Ok(rows)
    }

    /// Checks the input of a search and starts an answer whose frontier is `scratch.candidates` and their logits.
    pub fn begin(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        found: &mut Found,
    ) -> Result<(), IndexError> {
        check::query(query, self.dim)?;
        check::exclude(exclude)?;
        check::params(params)?;
        found.clear();
        found.frontier.group = query.group;
        found.frontier.stamp = self.stamp;
        found.frontier.answers = params.tail != Tail::Off;
        Ok(())
    }

    /// Logits `[candidates, group]` of `scratch.candidates`.
    pub fn score(&self, isa: Isa, query: &Query<'_>, scratch: &mut Scratch, found: &mut Found) {
        let Scratch { candidates, .. } = scratch;
        let logits = &mut found.frontier.logits;
        logits.resize(candidates.len() * query.group, 0.0);
        vectorised(isa, Score { rows: self, query, candidates, logits });
        found.index_bytes_read += candidates.len() * self.dim * 4;
    }

    /// Takes the best of `scratch.candidates` by their largest share over the heads: of the mass of all candidates and of
    /// what is attended anyway.
    pub fn select(&self, query: &Query<'_>, params: &SearchParams, scratch: &mut Scratch, found: &mut Found) {
        let group = query.group;
        let Scratch { candidates, norm, top, .. } = scratch;
        let logits = &found.frontier.logits;
        norm.clear();
        for head in 0..group {
            let attended = query.attended_lse.get(head).copied().unwrap_or(f32::NEG_INFINITY);
            let of_head = || logits.iter().skip(head).step_by(group);
            let max = of_head().fold(attended, |m, &l| m.max(l));
            let sum: f64 = of_head().map(|&l| f64::from(l - max).exp()).sum();
            norm.push(max + (sum + f64::from(attended - max).exp()).ln() as f32);
        }
        top.start(params.budget);
        for (place, row) in logits.chunks_exact(group).enumerate() {
            let best = row.iter().zip(norm.iter()).fold(f32::NEG_INFINITY, |b, (l, n)| b.max(l - n));
            if best > top.threshold {
                top.offer(Ranked::new(best, place, 1));
            }
        }
        found.frontier.rest.clear();
        found.frontier.rest.resize(candidates.len(), 1.0);
        for item in top.finish() {
            let row = candidates[item.place()] as usize;
            found.frontier.rest[item.place()] = 0.0;
            found.tokens.push(Hit { id: self.ids[row], score: item.score() });
        }
        found.nodes_scored += candidates.len();
    }
}

struct Score<'a> {
    rows: &'a Rows,
    query: &'a Query<'a>,
    candidates: &'a [u32],
    logits: &'a mut [f32],
}

impl Kernel for Score<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let dim = self.rows.dim;
        for (&row, logits) in self.candidates.iter().zip(self.logits.chunks_exact_mut(self.query.group)) {
            let key = &self.rows.keys[row as usize * dim..][..dim];
            for (logit, q) in logits.iter_mut().zip(self.query.q.chunks_exact(dim)) {
                // Absurd but finite keys must not turn into infinity minus infinity.
                *logit = (dot(q, key) * self.query.scale).clamp(-1e30, 1e30);
            }
        }
    }
}
