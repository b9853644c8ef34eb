//! The answer of a search: the selected tokens and what stands for all others.

use crate::index::Hit;

/// Caller-owned answer of `KeyIndex::search`; reuse it so that nothing is allocated after warm-up.
#[derive(Debug, Default)]
pub struct Found {
    /// Selected tokens, best first.
    pub tokens: Vec<Hit>,
    /// Pages whose summaries were scored.
    pub pages_opened: usize,
    /// Summaries scored at every level, pages included.
    pub nodes_scored: usize,
    /// Bytes of summaries, codes and scales that the search read.
    pub index_bytes_read: usize,
    /// Bytes that `tail` reads for this answer.
    pub tail_bytes_read: usize,
}
