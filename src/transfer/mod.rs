//! Movement of pages towards the attention backend.

use crate::page::{PageEntry, ShardPages};

/// What a fetch moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Pages that were absent where attention reads them.
    pub pages: usize,
    /// Bytes that crossed a link.
    pub bytes: usize,
}

/// Makes the pages of one step readable by the attention backend.
pub trait Transfer: Send + Sync {
    /// Brings every absent page of `entries` within reach before the call returns.
    fn fetch(&self, pages: &ShardPages, entries: &[PageEntry]) -> Fetched;
}

/// Attention on the CPU reads the warm tier where it lies, so nothing is ever absent and nothing moves.
#[derive(Clone, Copy, Debug, Default)]
pub struct InPlace;

impl Transfer for InPlace {
    fn fetch(&self, _pages: &ShardPages, _entries: &[PageEntry]) -> Fetched {
        Fetched::default()
    }
}
