//! The warm tier of one shard: the authoritative copy of its keys and values, in host memory.
//!
//! Rows lie in order of position. A semantic page is then a list of rows rather than a run; in return appending is a
//! write at the end, truncation is a cut, and the exact path streams through memory.

use floe_cuda::{KvElem, KvRows, append_kv};
use half::{bf16, f16};

use crate::error::Result;
use crate::ids::TokenPos;
use crate::shape::{KvDtype, PAGE_TOKENS, PageShape};
use crate::view::{Elems, TensorView};

/// Pages of one allocation: 16 pages of 16 tokens are 128 KiB at d = 128 bf16, small enough that a short sequence over
/// 256 shards wastes little, long enough to stream.
const SLAB_PAGES: usize = 16;
const SLAB_ROWS: usize = SLAB_PAGES * PAGE_TOKENS;

/// Rows of one element type, `[num_rows, 2, head_dim]` over slabs. Growth never moves a stored row.
#[derive(Debug)]
pub struct PageSlabs<E> {
    head_dim: usize,
    slabs: Vec<Box<[E]>>,
    num_rows: usize,
}

impl<E: KvElem> PageSlabs<E> {
    fn new(head_dim: usize) -> Self {
        Self { head_dim, slabs: Vec::new(), num_rows: 0 }
    }

    fn append<S: KvElem>(&mut self, k: &[S], v: &[S]) -> Result<()> {
        let row_elems = 2 * self.head_dim;
        if self.num_rows == self.slabs.len() * SLAB_ROWS {
            self.slabs.push(vec![E::zeroed(); SLAB_ROWS * row_elems].into_boxed_slice());
        }
        let start = self.num_rows % SLAB_ROWS * row_elems;
        let slab = &mut self.slabs[self.num_rows / SLAB_ROWS];
        append_kv(k, v, self.head_dim, &mut slab[start..start + row_elems])?;
        self.num_rows += 1;
        Ok(())
    }

    fn truncate(&mut self, num_rows: usize) {
        if num_rows < self.num_rows {
            self.num_rows = num_rows;
            self.slabs.truncate(num_rows.div_ceil(SLAB_ROWS));
        }
    }

    fn widen_row(&self, row: usize, key: &mut [f32], value: &mut [f32]) {
        let (k, v) = self.run(row)[..2 * self.head_dim].split_at(self.head_dim);
        key.iter_mut().zip(k).for_each(|(o, x)| *o = x.to_f32());
        value.iter_mut().zip(v).for_each(|(o, x)| *o = x.to_f32());
    }
}

impl<E: KvElem> KvRows for PageSlabs<E> {
    type Elem = E;

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_rows(&self) -> usize {
        self.num_rows
    }

    fn run(&self, first: usize) -> &[E] {
        &self.slabs[first / SLAB_ROWS][first % SLAB_ROWS * 2 * self.head_dim..]
    }
}

/// Stored keys and values of one shard, whatever their element type.
#[derive(Debug)]
pub enum ShardPages {
    /// bfloat16 rows
    Bf16(PageSlabs<bf16>),
    /// binary16 rows
    F16(PageSlabs<f16>),
    /// binary32 rows
    F32(PageSlabs<f32>),
}

/// Evaluates an expression with the typed rows of a [`ShardPages`].
macro_rules! with_rows {
    ($pages:expr, $rows:ident => $body:expr) => {
        match $pages {
            $crate::page::ShardPages::Bf16($rows) => $body,
            $crate::page::ShardPages::F16($rows) => $body,
            $crate::page::ShardPages::F32($rows) => $body,
        }
    };
}
pub(crate) use with_rows;

impl ShardPages {
    /// No rows yet.
    #[must_use]
    pub fn new(shape: PageShape) -> Self {
        match shape.dtype() {
            KvDtype::Bf16 => Self::Bf16(PageSlabs::new(shape.head_dim())),
            KvDtype::F16 => Self::F16(PageSlabs::new(shape.head_dim())),
            KvDtype::F32 => Self::F32(PageSlabs::new(shape.head_dim())),
        }
    }

    /// Layout of the rows.
    #[must_use]
    pub fn shape(&self) -> PageShape {
        let dtype = match self {
            Self::Bf16(_) => KvDtype::Bf16,
            Self::F16(_) => KvDtype::F16,
            Self::F32(_) => KvDtype::F32,
        };
        PageShape::new(with_rows!(self, rows => rows.head_dim()), dtype)
    }

    /// Tokens stored.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        with_rows!(self, rows => rows.num_rows())
    }

    /// Host bytes allocated.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        with_rows!(self, rows => rows.slabs.len()) * SLAB_PAGES * self.shape().page_bytes()
    }

    /// Key and value of the token at `pos`, widened to f32, `[head_dim]` each.
    ///
    /// # Panics
    /// When no token is stored at `pos` or a slice has another length.
    pub fn widen_row(&self, pos: TokenPos, key: &mut [f32], value: &mut [f32]) {
        with_rows!(self, rows => rows.widen_row(pos as usize, key, value));
    }

    /// Appends head `head` of every token of `k` and `v`, `[tokens, heads, head_dim]` of the same shape.
    pub(crate) fn append(&mut self, k: &TensorView<'_>, v: &TensorView<'_>, head: usize) -> Result<()> {
        for token in 0..k.shape()[0] {
            let (k, v) = (k.row(token, head), v.row(token, head));
            with_rows!(self, rows => match (k, v) {
                (Elems::Bf16(k), Elems::Bf16(v)) => rows.append(k, v)?,
                (Elems::F16(k), Elems::F16(v)) => rows.append(k, v)?,
                (Elems::F32(k), Elems::F32(v)) => rows.append(k, v)?,
                (k, v) => return Err(crate::Error::shape("v", k.dtype().to_string(), v.dtype().to_string())),
            });
        }
        Ok(())
    }

    /// Forgets the tokens at and after `num_tokens`.
    pub(crate) fn truncate(&mut self, num_tokens: usize) {
        with_rows!(self, rows => rows.truncate(num_tokens));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages_of(n: usize, dim: usize) -> ShardPages {
        let data: Vec<f32> = (0..n * dim).map(|x| x as f32).collect();
        let view = TensorView::contiguous(&data[..], [n, 1, dim]).unwrap();
        let mut pages = ShardPages::new(PageShape::new(dim, KvDtype::F32));
        pages.append(&view, &view, 0).unwrap();
        pages
    }

    #[test]
    fn rows_keep_their_place_across_slabs_and_truncation() {
        let (n, dim) = (SLAB_ROWS * 2 + 3, 4);
        let mut pages = pages_of(n, dim);
        let (mut k, mut v) = (vec![0.0; dim], vec![0.0; dim]);
        for pos in [0, SLAB_ROWS - 1, SLAB_ROWS, n - 1] {
            pages.widen_row(pos as u32, &mut k, &mut v);
            assert_eq!(k[0], (pos * dim) as f32);
            assert_eq!(k, v);
        }
        pages.truncate(SLAB_ROWS);
        assert_eq!(pages.num_tokens(), SLAB_ROWS);
        assert_eq!(pages.size_bytes(), SLAB_PAGES * pages.shape().page_bytes());
        let again = [7.0f32; 4];
        let view = TensorView::contiguous(&again[..], [1, 1, dim]).unwrap();
        pages.append(&view, &view, 0).unwrap();
        pages.widen_row(SLAB_ROWS as u32, &mut k, &mut v);
        assert_eq!(k, again);
    }
}
