//! What one decode step did: caller-owned, reused from step to step.

use crate::ids::TokenPos;
use crate::page::PageTable;
use crate::plan::HeadPath;
use crate::reuse::ReuseReport;
use crate::selection::Selection;
use crate::shape::PageShape;
use crate::sim::Clock;
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
    /// Time of each stage.
    pub stages: StageTimes,
    /// What the reuse cache did.
    pub reuse: ReuseReport,
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

/// Stages of a step that are timed, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Tokens that became findable.
    Publish,
    /// The query made ready.
    Query,
    /// Match with earlier steps.
    Reuse,
    /// Sinks and window attended, index searched.
    Select,
    /// Page table.
    Table,
    /// Absent units moved.
    Fetch,
    /// Retrieved tokens attended.
    Attend,
    /// Tail formed, states merged.
    Tail,
    /// Output written.
    Commit,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Self; 9] = [
        Self::Publish,
        Self::Query,
        Self::Reuse,
        Self::Select,
        Self::Table,
        Self::Fetch,
        Self::Attend,
        Self::Tail,
        Self::Commit,
    ];

    /// Name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Query => "query",
            Self::Reuse => "reuse",
            Self::Select => "select",
            Self::Table => "page table",
            Self::Fetch => "fetch",
            Self::Attend => "attend",
            Self::Tail => "tail, merge",
            Self::Commit => "output",
        }
    }
}

/// Nanoseconds of each [`Stage`] in one step of one kv head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// In the order of [`Stage::ALL`].
    pub ns: [u64; 9],
}

/// Laps of one step.
pub(crate) struct Watch<'a> {
    clock: &'a dyn Clock,
    last_ns: u64,
    times: StageTimes,
}

impl<'a> Watch<'a> {
    pub(crate) fn start(clock: &'a dyn Clock) -> Self {
        Self { clock, last_ns: clock.now_ns(), times: StageTimes::default() }
    }

    /// Books the time since the last lap on `stage`.
    pub(crate) fn lap(&mut self, stage: Stage) {
        let now_ns = self.clock.now_ns();
        self.times.ns[stage as usize] += now_ns - self.last_ns;
        self.last_ns = now_ns;
    }

    pub(crate) fn times(&self) -> StageTimes {
        self.times
    }
}
