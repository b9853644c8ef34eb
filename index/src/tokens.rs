//! Exact scan of every token at full precision: what every other index is measured against, and the right choice for a few
//! hundred tokens. Selection, mass and tail are exact; search and tail read all keys and all values.

use crate::check;
use crate::error::IndexError;
use crate::export::PageView;
use crate::flat::check_dim;
use crate::found::Found;
use crate::index::{Batch, KeyId, KeyIndex, MemoryReport, Query, SearchParams, TailOut};
use crate::rows::Rows;
use crate::scratch::Scratch;
use crate::simd::Isa;
use crate::snapshot::{Kind, Reader, Writer};

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct FlatTokens {
    isa: Isa,
    rows: Rows,
}

impl FlatTokens {
    /// An empty index over keys of `dim` elements.
    ///
    /// # Errors
    /// `Config` when `dim` is 0 or above `MAX_DIM`.
    pub fn new(dim: usize) -> Result<Self, IndexError> {
        check_dim(dim)?;
        Ok(Self { isa: Isa::detect(), rows: Rows::new(dim) })
    }

    /// The index that `snapshot` wrote.
    ///
    /// # Errors
    /// `Snapshot` for any other bytes.
    pub fn restore(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut from = Reader::new(bytes, Kind::Tokens)?;
        let rows = Rows::read_from(&mut from)?;
        from.finish()?;
        Ok(Self { isa: Isa::detect(), rows })
    }
}

impl KeyIndex for FlatTokens {
    fn dim(&self) -> usize {
        self.rows.dim
    }

    fn len(&self) -> usize {
        self.rows.map.len()
    }

    fn build(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        if !self.is_empty() {
            return Err(IndexError::NotEmpty { len: self.len() });
        }
        self.insert(batch)
    }

    fn insert(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        self.rows.check(batch)?;
        self.rows.extend(batch);
        Ok(())
    }

    fn remove(&mut self, ids: &[KeyId]) -> Result<usize, IndexError> {
        Ok(ids.iter().filter(|&&id| self.rows.remove(id).is_some()).count())
    }

    fn search(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        scratch: &mut Scratch,
        found: &mut Found,
    ) -> Result<(), IndexError> {
        self.rows.begin(query, exclude, params, found)?;
        let rows = &self.rows;
        scratch.candidates.clear();
        let there =
            |row: &u32| rows.live[*row as usize] && exclude.binary_search(&rows.ids[*row as usize]).is_err();
        scratch.candidates.extend((0..rows.num_rows() as u32).filter(there));
        rows.score(self.isa, query, scratch, found);
        rows.select(query, params, scratch, found);
        found.frontier.rows.clear();
        found.frontier.rows.extend_from_slice(&scratch.candidates);
        found.tail_bytes_read = found.tail_tokens() * rows.dim * 4;
        Ok(())
    }

    fn tail(
        &self,
        query: &Query<'_>,
        _exclude: &[KeyId],
        found: &Found,
        _scratch: &mut Scratch,
        state: TailOut<'_>,
    ) -> Result<(), IndexError> {
        let (dim, group) = (self.rows.dim, query.group);
        check::query(query, dim)?;
        check::tail_out(state.out, state.lse, group, dim)?;
        let frontier = &found.frontier;
        if frontier.stamp != self.rows.stamp || frontier.group != group {
            return Err(IndexError::StaleFound);
        }
        state.out.fill(0.0);
        state.lse.fill(f32::NEG_INFINITY);
        if !frontier.answers {
            return Ok(());
        }
        for (head, (out, lse)) in state.out.chunks_exact_mut(dim).zip(state.lse).enumerate() {
            let left = || {
                let rows = frontier.logits.iter().skip(head).step_by(group).zip(&frontier.rows);
                rows.zip(&frontier.rest).filter(|x| *x.1 > 0.0).map(|x| x.0)
            };
            let max = left().fold(f32::NEG_INFINITY, |m, x| m.max(*x.0));
            let sum: f64 = left().map(|(&l, _)| f64::from(l - max).exp()).sum();
            if sum == 0.0 {
                continue;
            }
            *lse = max + sum.ln() as f32;
            for (&logit, &row) in left() {
                let weight = (f64::from(logit - max).exp() / sum) as f32;
                let value = &self.rows.values[row as usize * dim..][..dim];
                for (o, &v) in out.iter_mut().zip(value) {
                    *o += weight * v;
                }
            }
        }
        Ok(())
    }

    fn pages(&self) -> Option<PageView<'_>> {
        None
    }

    fn memory(&self) -> MemoryReport {
        self.rows.memory()
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut to = Writer::new(Kind::Tokens);
        self.rows.write_to(&mut to);
        to.finish()
    }
}
