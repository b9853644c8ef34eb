//! The page table of one step: which pages a selection touches, and which of their rows.

use crate::ids::TokenPos;
use crate::selection::Selection;
use crate::shape::PAGE_TOKENS;

/// One touched page of the warm tier and its attended rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    /// Page number: tokens `page * 16 .. page * 16 + 16`.
    pub page: u32,
    /// Bit `i` = row `i` of the page is attended.
    pub rows: u16,
}

/// Touched pages in ascending order. Filled anew each step; keeps its memory.
#[derive(Clone, Debug, Default)]
pub struct PageTable {
    entries: Vec<PageEntry>,
}

impl PageTable {
    /// Resolves a selection to pages and rows.
    pub fn resolve(&mut self, selection: &Selection) {
        self.entries.clear();
        self.add_range(selection.sinks.clone());
        for &pos in &selection.retrieved {
            self.add(pos);
        }
        self.add_range(selection.window.clone());
    }

    /// Touched pages, ascending.
    #[must_use]
    pub fn entries(&self) -> &[PageEntry] {
        &self.entries
    }

    /// Rows attended over all pages.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.entries.iter().map(|e| e.rows.count_ones() as usize).sum()
    }

    fn add_range(&mut self, range: std::ops::Range<TokenPos>) {
        for pos in range {
            self.add(pos);
        }
    }

    fn add(&mut self, pos: TokenPos) {
        let page = pos / PAGE_TOKENS as u32;
        let row = 1u16 << (pos % PAGE_TOKENS as u32);
        match self.entries.last_mut() {
            Some(last) if last.page == page => last.rows |= row,
            Some(_) | None => self.entries.push(PageEntry { page, rows: row }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_selected_row_appears_once() {
        let selection = Selection { sinks: 0..5, window: 40..50, retrieved: vec![6, 17, 18, 39] };
        let mut table = PageTable::default();
        table.resolve(&selection);
        let rows: Vec<u32> = table
            .entries()
            .iter()
            .flat_map(|e| (0..16).filter(|i| e.rows >> i & 1 == 1).map(|i| e.page * 16 + i))
            .collect();
        let wanted: Vec<u32> = (0..5).chain([6, 17, 18, 39]).chain(40..50).collect();
        assert_eq!(rows, wanted);
        assert_eq!(table.num_rows(), selection.num_tokens());
        assert_eq!(table.entries().iter().map(|e| e.page).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }
}
