//! A read-only view of an index's pages as plain slices, for mirroring them in another memory (a device), and what changed in
//! them since a mirror was made.
//!
//! Pages are numbered `0..num_pages`; a page keeps its number for life, and a freed number is used again. A page's summary lies at
//! an *entry* of the summary blocks, which moves when the tree splits a node; ids, lane masks and codes lie at the page's number.
//!
//! ```text
//! by page   ids [pages, 16]   live [pages]   entry_of [pages]   sketch: key and value lines, scales
//!                                                 │
//! by entry  key_codes, key_scale, value_codes, value_scale, spread, count
//! ```
//!
//! Summaries are stored in the index's frame: keys and values minus a centre that is fixed with the first tokens. With
//! `m` the mean key as stored, `c` the key centre and `n` the live tokens, a page's estimated log mass for a query head `q` is
//!
//! ```text
//! q.(m + c) scale + PAGE_SPREAD |q|^2 scale^2 spread + ln n
//! ```
//!
//! and that of its token `t`, told apart by its code (see `sketch`), is
//! `q.(m + c) scale + k_scale_t (R q).level_t scale + token_spread(k_bits) |q|^2 scale^2 k_scale_t^2`.

use crate::index::KeyId;
use crate::pages::Pages;
use crate::search::{NODE_SPREAD, SPREAD, code_error};
use crate::simd::codes::PageCodes;
use crate::sketch::Sketch;

/// Share of the variance of a page's logits that counts towards its weight.
pub const PAGE_SPREAD: f32 = NODE_SPREAD;

/// What a token's logit gains per `|q|^2 scale^2 k_scale^2` for codes of `k_bits` bits.
#[must_use]
pub fn token_spread(k_bits: usize) -> f32 {
    SPREAD * code_error(k_bits)
}

/// Share of a residual's variance that codes of `k_bits` bits lose, for Gaussian coordinates: `1 - 2 / pi` for signs, for 4 and 16
/// uniform levels the distortions of Max 1960; all of it without codes.
#[must_use]
pub fn code_distortion(k_bits: usize) -> f32 {
    match k_bits {
        0 => 1.0,
        1 => 1.0 - std::f32::consts::FRAC_2_PI,
        2 => 0.1188,
        _ => 0.01154,
    }
}

/// Tokens without a page in a tree of `num_tokens`, at most: see [`PageView::young`].
#[must_use]
pub fn young_max(num_tokens: usize) -> usize {
    crate::dci::young_max(num_tokens)
}

/// Changes remembered at most: more than four thousand decoded tokens make. A mirror that is further behind starts anew.
const CHANGES_MAX: usize = 256;

/// State of an index's pages, told apart from any earlier state of the same object; copies and restored indexes count by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

/// What a mirror made at some epoch must read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes<'a> {
    /// Too much changed since, or the epoch is not one of this index.
    All,
    /// These page numbers, oldest change first, possibly repeated: their ids, lane masks, means or codes changed, or they are new.
    Pages(&'a [u32]),
}

/// The last pages that changed, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Journal {
    epoch: u64,
    /// Change `i` led to epoch `epoch - pages.len() + i + 1`.
    pages: Vec<u32>,
}

impl Journal {
    /// Takes note of a changed page.
    pub fn log(&mut self, page: usize) {
        if self.pages.len() == CHANGES_MAX {
            self.pages.drain(..CHANGES_MAX / 2);
        }
        self.pages.push(page as u32);
        self.epoch += 1;
    }

    /// Takes note that all pages are new.
    pub fn log_all(&mut self) {
        self.pages.clear();
        self.epoch += 1;
    }

    fn since(&self, epoch: Epoch) -> Changes<'_> {
        let behind = self.epoch.checked_sub(epoch.0).and_then(|n| usize::try_from(n).ok());
        match behind.and_then(|n| self.pages.len().checked_sub(n)) {
            Some(known) => Changes::Pages(&self.pages[known..]),
            None => Changes::All,
        }
    }

    /// Host bytes owned.
    pub fn size_bytes(&self) -> usize {
        4 * self.pages.capacity()
    }
}

/// See the module documentation. All slices are host memory and valid until the index changes.
#[derive(Clone, Copy, Debug)]
pub struct PageView<'a> {
    pages: &'a Pages,
}

/// Summaries by entry, eight bits a coordinate. Entries beyond a page's own hold nothing.
#[derive(Clone, Copy, Debug)]
pub struct SummarySlices<'a> {
    /// `[entries / 16, dim / 4 rounded up, 16, 4]` u8: four coordinates of sixteen entries side by side; a coordinate is
    /// `(code - 128) * key_scale`.
    pub key_codes: &'a [u8],
    /// `[entries]` f32.
    pub key_scale: &'a [f32],
    /// `[entries, dim]` i8: a coordinate is `code * value_scale`.
    pub value_codes: &'a [i8],
    /// `[entries]` f32.
    pub value_scale: &'a [f32],
    /// `[entries]` f32: mean squared deviation of a coordinate of the tokens' keys from their mean.
    pub spread: &'a [f32],
    /// `[entries]` live tokens; 0 = no page.
    pub count: &'a [u32],
}

impl<'a> PageView<'a> {
    pub(crate) fn of(pages: &'a Pages) -> Self {
        Self { pages }
    }

    /// Elements of a key and of a value.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.pages.dim
    }

    /// Pages, free numbers included.
    #[must_use]
    pub fn num_pages(&self) -> usize {
        self.pages.num_pages()
    }

    /// `[pages, 16]` ids of the tokens; meaningful where the lane is live.
    #[must_use]
    pub fn ids(&self) -> &'a [KeyId] {
        &self.pages.ids
    }

    /// `[pages]` bit `t`: lane `t` holds a token; 0 = the number is free.
    #[must_use]
    pub fn live(&self) -> &'a [u16] {
        &self.pages.live
    }

    /// `[pages]` entry of the page's summary; meaningful where the page holds tokens. Not part of what [`PageView::changes`]
    /// reports: a page that only moved in the tree has not changed.
    #[must_use]
    pub fn entry_of(&self) -> &'a [u32] {
        &self.pages.entry_of
    }

    /// Super-node of a page that holds tokens; it changes when the tree splits one, which is no change of the page.
    #[must_use]
    pub fn super_node_of(&self, page: usize) -> usize {
        self.pages.entry_of[page] as usize / crate::blocks::LANES
    }

    /// Summaries of all pages, by entry.
    #[must_use]
    pub fn summaries(&self) -> SummarySlices<'a> {
        let blocks = &self.pages.blocks;
        SummarySlices {
            key_codes: &blocks.key_codes,
            key_scale: &blocks.key_scale,
            value_codes: &blocks.value_codes,
            value_scale: &blocks.value_scale,
            spread: &blocks.spread,
            count: &blocks.count,
        }
    }

    /// `[dim]` f32 that stored keys lack; empty while no token is held.
    #[must_use]
    pub fn key_centre(&self) -> &'a [f32] {
        &self.pages.frame.key_centre
    }

    /// `[dim]` f32 that stored values lack; empty while no token is held.
    #[must_use]
    pub fn value_centre(&self) -> &'a [f32] {
        &self.pages.frame.value_centre
    }

    /// Tokens without a page, in no particular order: they are in no slice of this view.
    #[must_use]
    pub fn young(&self) -> &'a [KeyId] {
        &self.pages.young.child[..self.pages.num_young]
    }

    /// Codes of the residuals, by page, with their rotation; `None` = the index keeps none.
    #[must_use]
    pub fn sketch(&self) -> Option<&'a Sketch> {
        self.pages.sketch.as_ref()
    }

    /// Key codes `[pages, k_bits, dim / 32 rounded up]` lines and key scales `[pages, 16]` f16 bits, in the layout that `sketch`
    /// describes; `None` = no key bits are kept.
    #[must_use]
    pub fn key_sketches(&self) -> Option<PageCodes<'a>> {
        self.sketch().map(Sketch::key_codes).filter(|codes| codes.bits > 0)
    }

    /// The same of the values.
    #[must_use]
    pub fn value_sketches(&self) -> Option<PageCodes<'a>> {
        self.sketch().map(Sketch::value_codes).filter(|codes| codes.bits > 0)
    }

    /// Writes a page's mean key in the caller's frame, as its codes refer to it, to `out` `[dim]` f32.
    ///
    /// # Panics
    /// When the page holds no token or `out` has another length.
    pub fn mean_key(&self, page: usize, out: &mut [f32]) {
        self.pages.blocks.read_key(self.entry(page, out), out);
        add(out, self.key_centre());
    }

    /// Writes a page's mean value in the caller's frame, as its codes refer to it, to `out` `[dim]` f32.
    ///
    /// # Panics
    /// When the page holds no token or `out` has another length.
    pub fn mean_value(&self, page: usize, out: &mut [f32]) {
        self.pages.blocks.read_value(self.entry(page, out), out);
        add(out, self.value_centre());
    }

    /// Mean squared deviation of a coordinate of a page's keys from their mean.
    ///
    /// # Panics
    /// When the page holds no token.
    #[must_use]
    pub fn spread(&self, page: usize) -> f32 {
        assert!(self.live()[page] != 0, "page {page} is free");
        self.pages.blocks.spread[self.entry_of()[page] as usize]
    }

    fn entry(&self, page: usize, out: &[f32]) -> usize {
        assert!(self.live()[page] != 0, "page {page} is free");
        assert_eq!(out.len(), self.dim(), "mean of {} coordinates", self.dim());
        self.entry_of()[page] as usize
    }

    /// The present state, to be kept beside a mirror of it.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.pages.journal.epoch)
    }

    /// What changed since `epoch`.
    #[must_use]
    pub fn changes(&self, epoch: Epoch) -> Changes<'a> {
        self.pages.journal.since(epoch)
    }
}

fn add(out: &mut [f32], centre: &[f32]) {
    out.iter_mut().zip(centre).for_each(|(x, c)| *x += c);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn journal_tells_what_it_still_knows_and_says_when_it_does_not() {
        let mut journal = Journal::default();
        assert_eq!(journal.since(Epoch(0)), Changes::Pages(&[]));
        assert_eq!(journal.since(Epoch(1)), Changes::All);
        let mut all = Vec::new();
        for page in 0..1000usize {
            journal.log(page * 7 % 31);
            all.push((page * 7 % 31) as u32);
            for behind in [0, 1, 20, CHANGES_MAX / 2] {
                let Some(from) = all.len().checked_sub(behind) else { continue };
                assert_eq!(journal.since(Epoch(from as u64)), Changes::Pages(&all[from..]), "after {page}");
            }
        }
        assert_eq!(journal.since(Epoch(1000 - CHANGES_MAX as u64 - 1)), Changes::All);
        assert!(journal.size_bytes() <= 4 * CHANGES_MAX);
        journal.log_all();
        assert_eq!(journal.since(Epoch(1000)), Changes::All);
        assert_eq!(journal.since(Epoch(1001)), Changes::Pages(&[]));
    }
}
