//! What one decode step did: caller-owned, reused from step to step.

use crate::ids::TokenPos;
use crate::page::PageTable;
use crate::plan::HeadPath;
use crate::selection::Selection;
use crate::shape::PageShape;
use crate::transfer::Fetched;

/// Report of one layer's step, one entry per kv head.
#[derive(Clone, Debug, Default)]
pub struct StepReport {
    /// In order of kv heads.
    pub shards: Vec<ShardReport>,
}

/// Report of one kv head.
#[derive(Clone, Debug, Default)]
pub struct ShardReport {
    /// Path taken, with its reason.
    pub path: HeadPath,
    /// Tokens attended exactly.
    pub tokens_attended: usize,
    /// Positions that retrieval picked, ascending.
    pub retrieved: Vec<TokenPos>,
    /// Warm pages that hold the attended tokens.
    pub pages_touched: usize,
    /// Bytes of keys and values attended exactly.
    pub kv_bytes_read: usize,
    /// Bytes of summaries, codes and keys read to select and to form the tail.
    pub index_bytes_read: usize,
    /// What had to be moved first.
    pub fetched: Fetched,
    /// lse of the exactly attended tokens alone, `[group]`; `exp(exact_lse - full_lse)` is the attention mass kept.
    pub exact_lse: Vec<f32>,
}

impl ShardReport {
    pub(crate) fn fill(
        &mut self,
        path: HeadPath,
        selection: &Selection,
        table: &PageTable,
        shape: PageShape,
    ) {
        self.path = path;
        self.tokens_attended = selection.num_tokens();
        self.retrieved.clone_from(&selection.retrieved);
        self.pages_touched = table.entries().len();
        self.kv_bytes_read = table.num_rows() * shape.row_bytes();
    }
}
