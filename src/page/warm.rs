//! The warm tier of one shard: the authoritative copy of its keys and values, in host memory.
//!
//! Rows lie in order of position. A semantic page is then a list of rows rather than a run; in return appending is a
//! write at the end, truncation is a cut, and the exact path streams through memory.

use std::ops::Range;
use std::sync::Arc;

use floe_cuda::{KvElem, KvRows, append_kv};
use half::{bf16, f16};

use super::cold::SlabBytes;
use super::file::Damage;
use super::{LentSlab, OwnRows, OwnSlab, Slab, WarmMemory};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::shape::{KvDtype, PAGE_TOKENS, PageShape};
use crate::view::{Elems, TensorView};

/// Pages of one allocation: 16 pages of 16 tokens are 128 KiB at d = 128 bf16, small enough that a short sequence over
/// 256 shards wastes little, long enough to stream.
const SLAB_PAGES: usize = 16;
/// Rows of one slab: row `r` of a shard is row `r % SLAB_ROWS` of slab `r / SLAB_ROWS`.
pub const SLAB_ROWS: usize = SLAB_PAGES * PAGE_TOKENS;

/// Rows of one element type, `[num_rows, 2, head_dim]` over slabs. Growth never moves a stored row.
#[derive(Clone, Debug)]
pub struct PageSlabs<E> {
    head_dim: usize,
    slabs: Vec<Slab<E>>,
    num_rows: usize,
    memory: WarmMemory,
}

impl<E: KvElem> PageSlabs<E> {
    fn new(head_dim: usize, memory: WarmMemory) -> Self {
        Self { head_dim, slabs: Vec::new(), num_rows: 0, memory }
    }

    fn append<S: KvElem>(&mut self, k: &[S], v: &[S]) -> Result<()> {
        let row_elems = 2 * self.head_dim;
        if self.num_rows == self.slabs.len() * SLAB_ROWS {
            self.slabs.push(Slab::allocate(&self.memory, SLAB_ROWS * row_elems)?);
        }
        if let Slab::Lent(lent) = &self.slabs[self.num_rows / SLAB_ROWS] {
            // It is about to be copied.
            lent.verify(u16::MAX)?;
        }
        let start = self.num_rows % SLAB_ROWS * row_elems;
        let slab = &mut self.slabs[self.num_rows / SLAB_ROWS];
        let slab = slab.elems_mut(&self.memory, SLAB_ROWS * row_elems)?;
        append_kv(k, v, self.head_dim, &mut slab[start..start + row_elems])?;
        self.num_rows += 1;
        Ok(())
    }

    /// Checks pages `pages` of lent slabs.
    fn verify(&self, pages: Range<usize>) -> Result<(), Damage> {
        for slab in pages.start / SLAB_PAGES..pages.end.div_ceil(SLAB_PAGES) {
            if let Some(Slab::Lent(lent)) = self.slabs.get(slab) {
                let first = slab * SLAB_PAGES;
                let within = pages.start.max(first) - first..pages.end.min(first + SLAB_PAGES) - first;
                lent.verify((((1u32 << within.end) - 1) & !((1u32 << within.start) - 1)) as u16)?;
            }
        }
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
        &self.slabs[first / SLAB_ROWS].elems()[first % SLAB_ROWS * 2 * self.head_dim..]
    }
}

/// Where a slab lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlabKind {
    /// In memory of our own only.
    Own,
    /// In memory of our own, and durable on disk.
    Backed,
    /// In a file.
    Lent,
}

/// Stored keys and values of one shard, whatever their element type.
#[derive(Clone, Debug)]
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
    /// No rows yet; slabs will be ordinary host memory.
    #[must_use]
    pub fn new(shape: PageShape) -> Self {
        Self::with_memory(shape, &WarmMemory::default())
    }

    /// No rows yet; slabs will come from `memory`.
    #[must_use]
    pub fn with_memory(shape: PageShape, memory: &WarmMemory) -> Self {
        match shape.dtype() {
            KvDtype::Bf16 => Self::Bf16(PageSlabs::new(shape.head_dim(), memory.clone())),
            KvDtype::F16 => Self::F16(PageSlabs::new(shape.head_dim(), memory.clone())),
            KvDtype::F32 => Self::F32(PageSlabs::new(shape.head_dim(), memory.clone())),
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

    /// Host bytes allocated; a slab shared with forks counts in equal parts for each, a lent one not at all.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        with_rows!(self, rows => rows.slabs.iter().map(Slab::own_bytes).sum::<f64>()).ceil() as usize
    }

    /// Key and value of the token at `pos`, widened to f32, `[head_dim]` each.
    ///
    /// # Panics
    /// When no token is stored at `pos` or a slice has another length.
    pub fn widen_row(&self, pos: TokenPos, key: &mut [f32], value: &mut [f32]) {
        with_rows!(self, rows => rows.widen_row(pos as usize, key, value));
    }

    /// Slabs that hold rows.
    pub(crate) fn num_slabs(&self) -> usize {
        self.num_tokens().div_ceil(SLAB_ROWS)
    }

    /// Rows and bytes of one slab. The caller has verified it.
    pub(crate) fn slab_bytes(&self, slab: usize) -> (u32, &[u8]) {
        let rows = SLAB_ROWS.min(self.num_tokens() - slab * SLAB_ROWS) as u32;
        (rows, with_rows!(self, rows => bytemuck::cast_slice(rows.slabs[slab].elems())))
    }

    /// Address of row 0 of a slab for the device of the backend that supplied the memory; row `i` of the slab follows at `i`
    /// times the row's bytes. `None` when there is no such slab or the device cannot read it: rows of a mapped file
    /// have to be brought to it through the host, or made warm with [`Self::make_warm`].
    #[must_use]
    pub fn device_address(&self, slab: usize) -> Option<u64> {
        with_rows!(self, rows => rows.slabs.get(slab).and_then(Slab::device_address))
    }

    /// Copies a slab that lies in a mapped file, checked, into memory of the shard's own source. One that does already stays.
    ///
    /// # Errors
    /// When the file's pages are damaged or the source has no memory left.
    ///
    /// # Panics
    /// When there is no such slab.
    pub fn make_warm(&mut self, slab: usize) -> Result<()> {
        let bytes = self.slab_size_bytes();
        with_rows!(self, rows => {
            if let Slab::Lent(lent) = &rows.slabs[slab] {
                lent.verify(u16::MAX)?;
                let own = OwnSlab::copy_of(&rows.memory, bytes, lent.bytes())?;
                rows.slabs[slab] = Slab::Own(OwnRows::new(own, Some(lent.clone())));
            }
        });
        Ok(())
    }

    /// Slab that holds a page.
    pub(crate) const fn slab_of_page(page: u32) -> usize {
        page as usize / SLAB_PAGES
    }

    /// Bytes of a slab in memory of our own.
    pub(crate) fn slab_size_bytes(&self) -> usize {
        SLAB_ROWS * self.shape().row_bytes()
    }

    /// Slabs whose rows are all there.
    pub(crate) fn num_full_slabs(&self) -> usize {
        self.num_tokens() / SLAB_ROWS
    }

    /// Where a slab lies.
    pub(crate) fn slab_kind(&self, slab: usize) -> SlabKind {
        with_rows!(self, rows => match &rows.slabs[slab] {
            Slab::Own(own) if own.backing().is_some() => SlabKind::Backed,
            Slab::Own(_) => SlabKind::Own,
            Slab::Lent(_) => SlabKind::Lent,
        })
    }

    /// A slab that lies in a file.
    pub(crate) fn lent_slab(&self, slab: usize) -> Option<Arc<dyn LentSlab>> {
        with_rows!(self, rows => match rows.slabs.get(slab) {
            Some(Slab::Lent(lent)) => Some(lent.clone()),
            _ => None,
        })
    }

    /// Rows of a slab of our own and a handle that keeps its bytes alive and unchanged.
    pub(crate) fn slab_owner(&self, slab: usize) -> Option<(u32, Box<dyn SlabBytes>)> {
        with_rows!(self, rows => match &rows.slabs[slab] {
            Slab::Own(own) => Some((SLAB_ROWS as u32, Box::new(own.owner().clone()))),
            Slab::Lent(_) => None,
        })
    }

    /// Notes that a slab of our own is durable as `lent`, if it still is the one that `written` keeps alive. Returns whether.
    pub(crate) fn back(&mut self, slab: usize, written: &dyn SlabBytes, lent: &Arc<dyn LentSlab>) -> bool {
        let full = slab < self.num_full_slabs();
        with_rows!(self, rows => match rows.slabs.get_mut(slab) {
            Some(Slab::Own(own)) if full && std::ptr::eq(own.owner().bytes(), written.bytes()) => {
                own.back(lent.clone());
                true
            }
            _ => false,
        })
    }

    /// Gives up the memory of a slab that is durable; it is read from the file from now on. Returns whether it was.
    pub(crate) fn drop_warm(&mut self, slab: usize) -> bool {
        with_rows!(self, rows => match rows.slabs.get_mut(slab) {
            Some(place) => {
                let Slab::Own(own) = &*place else { return false };
                let Some(lent) = own.backing().cloned() else { return false };
                *place = Slab::Lent(lent);
                true
            }
            None => false,
        })
    }

    /// Takes in a copy of a slab that lies in a file, if it still does. Returns whether.
    pub(crate) fn adopt(&mut self, slab: usize, lent: &Arc<dyn LentSlab>, copy: OwnSlab) -> bool {
        with_rows!(self, rows => match rows.slabs.get_mut(slab) {
            Some(place) => {
                let Slab::Lent(now) = &*place else { return false };
                if !Arc::ptr_eq(now, lent) {
                    return false;
                }
                *place = Slab::Own(OwnRows::new(copy, Some(lent.clone())));
                true
            }
            None => false,
        })
    }

    /// Rows in memory that others own, slab after slab with the rows filled in each; `None` when a size does not fit.
    pub(crate) fn from_lent(
        shape: PageShape,
        memory: &WarmMemory,
        slabs: Vec<(u32, Arc<dyn LentSlab>)>,
    ) -> Option<Self> {
        let last = slabs.len().saturating_sub(1);
        let fits = slabs.iter().enumerate().all(|(i, (rows, slab))| {
            let rows = *rows as usize;
            let full = if i < last { rows == SLAB_ROWS } else { rows > 0 && rows <= SLAB_ROWS };
            full && slab.bytes().len() == rows.div_ceil(PAGE_TOKENS) * shape.page_bytes()
        });
        let mut pages = Self::with_memory(shape, memory);
        with_rows!(&mut pages, own => {
            own.num_rows = slabs.iter().map(|(rows, _)| *rows as usize).sum();
            own.slabs = slabs.into_iter().map(|(_, slab)| Slab::Lent(slab)).collect();
        });
        fits.then_some(pages)
    }

    /// Checks the pages that hold `tokens`, where they come from a file and were not checked yet. Nothing may read a row
    /// before.
    pub(crate) fn verify(&self, tokens: Range<TokenPos>) -> Result<(), Damage> {
        if tokens.is_empty() {
            return Ok(());
        }
        let pages = tokens.start as usize / PAGE_TOKENS..(tokens.end as usize).div_ceil(PAGE_TOKENS);
        with_rows!(self, rows => rows.verify(pages))
    }

    /// [`Self::verify`] for single tokens.
    pub(crate) fn verify_tokens(&self, tokens: &[TokenPos]) -> Result<(), Damage> {
        tokens.iter().try_for_each(|token| self.verify(*token..token + 1))
    }

    /// Appends head `head` of every token of `k` and `v`, `[tokens, heads, head_dim]` of the same shape.
    ///
    /// # Errors
    /// When the element types or sizes differ, when the last page comes from a file and is damaged, or when there is no memory
    /// for another slab. Tokens before the one that failed are then stored.
    pub fn append(&mut self, k: &TensorView<'_>, v: &TensorView<'_>, head: usize) -> Result<()> {
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
