//! The contract of every index of one shard, and the values that cross it.
//!
//! A shard is one (sequence, layer, kv head). Scores are natural-log attention logits `q.k * scale`; larger is better.
//! `search` and `tail` take `&self`, are deterministic, and allocate nothing once `Scratch` and `Found` have grown.

use crate::error::IndexError;
use crate::export::PageView;
use crate::found::Found;
use crate::scratch::Scratch;

/// Name of a token, chosen by the caller (its position in the sequence); unique within one index.
pub type KeyId = u32;

/// Most elements of a key: 576 is the largest latent head in use today.
pub const MAX_DIM: usize = 1024;

/// Tokens to add. Keys are post-RoPE. Row `i` of both arrays belongs to `ids[i]`.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// `[n]`, in any order, without duplicates.
    pub ids: &'a [KeyId],
    /// `[n, dim]` f32, row-major, finite.
    pub keys: &'a [f32],
    /// `[n, dim]` f32, row-major, finite.
    pub values: &'a [f32],
}

/// The query heads that share this shard's kv head, searched together so that each summary is read once.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// `[group, dim]` f32, row-major, finite, post-RoPE.
    pub q: &'a [f32],
    /// Number of query heads, at least 1.
    pub group: usize,
    /// Softmax scale, usually `1 / sqrt(dim)`.
    pub scale: f32,
    /// `[group]` f32, natural log: mass of each head over the tokens that the caller attends anyway; `&[]` = unknown. A
    /// head that finds its mass there has less say in what is selected.
    pub attended_lse: &'a [f32],
}

/// What a search ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Pages are ranked by their mean key; tokens are taken page by page until the budget is full.
    Page,
    /// Tokens of opened pages are ranked one by one by their sketch; without a sketch the same as `Page`.
    Token,
}

/// How `tail` answers for tokens that were not selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Not at all: the tail is the empty state.
    Off,
    /// Every page stands for its own unselected tokens, whatever the search opened. Reads every page.
    Page,
    /// Opened pages stand for themselves, unopened nodes of the tree for everything below them.
    Tree,
}

/// Effort and size of a search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SearchParams {
    /// Tokens to return.
    pub budget: usize,
    /// What is ranked.
    pub unit: Unit,
    /// What `tail` will be asked for.
    pub tail: Tail,
    /// Most node summaries to score (pages, super-nodes and above); `usize::MAX` = no limit. The top level is always scored.
    pub node_budget: usize,
    /// Fraction in (0, 1] of the super-nodes that may be opened.
    pub open_fraction: f32,
    /// A node stays unopened when its average token may hold at most this many times the mass of an average token; 0 = every node
    /// may be opened.
    pub open_mass: f32,
    /// A page's tokens are told apart by their codes, for each query head, when its average token may hold more than this many times
    /// the mass of an average token; 0 = every page. Without effect when there are no codes.
    pub detail: f32,
}

/// The detail that `SearchParams::exact` asks for: a quarter. Error at 256 tokens with k2v1 on traces of Qwen2.5-Coder-1.5B at 31K, -0.5B at
/// 16K and SmolLM2-135M at 8K: .042 .052 .018 with every page told apart (0), .044 .053 .020 at 0.25, .047 .055 .023 at 0.5, .051 .059 .027
/// at 1; search and tail take 253 121 39, 135 77 23, 112 67 21 and 97 57 18 us.
pub const DETAIL: f32 = 0.25;

impl SearchParams {
    /// Every page is scored, and those that matter are told apart into tokens.
    pub fn exact(budget: usize, unit: Unit, tail: Tail) -> Self {
        let node_budget = usize::MAX;
        Self { budget, unit, tail, node_budget, open_fraction: 1.0, open_mass: 0.0, detail: DETAIL }
    }
}

/// One selected token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// The token.
    pub id: KeyId,
    /// Natural log of its estimated attention share, maximum over the query heads of the group.
    pub score: f32,
}

/// Host bytes that an index owns, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryReport {
    /// Mean keys and values of pages, with scales and counts.
    pub summaries_bytes: usize,
    /// Residual codes and their scales.
    pub codes_bytes: usize,
    /// Token ids by slot and the map back.
    pub ids_bytes: usize,
    /// Everything above the pages: super-node summaries and links.
    pub tree_bytes: usize,
    /// Tokens that are not yet in a page.
    pub young_bytes: usize,
    /// Keys, values or graph links held in full (token-level baselines).
    pub rows_bytes: usize,
}

impl MemoryReport {
    /// Sum of the parts.
    pub fn total_bytes(&self) -> usize {
        self.summaries_bytes
            + self.codes_bytes
            + self.ids_bytes
            + self.tree_bytes
            + self.young_bytes
            + self.rows_bytes
    }
}

/// Finds and summarises the keys of one shard.
///
/// Every method checks its input first: an error leaves the index as it was.
pub trait KeyIndex: Send + Sync {
    /// Elements of a key, a value, a query.
    fn dim(&self) -> usize;

    /// Tokens held.
    fn len(&self) -> usize;

    /// Whether no token is held.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills an empty index.
    ///
    /// # Errors
    /// `NotEmpty`, `Shape`, `NonFinite`, `DuplicateId`, `OverLimit`.
    fn build(&mut self, batch: &Batch<'_>) -> Result<(), IndexError>;

    /// Adds tokens; meant for 16 at a time while decoding, correct for any number.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`, `DuplicateId`, `OverLimit`.
    fn insert(&mut self, batch: &Batch<'_>) -> Result<(), IndexError>;

    /// Takes tokens out and returns how many of `ids` were held; unknown ids are skipped.
    ///
    /// # Errors
    /// None today; the signature leaves room for indexes that must refuse.
    fn remove(&mut self, ids: &[KeyId]) -> Result<usize, IndexError>;

    /// Selects at most `params.budget` tokens, best first, and remembers in `found` what stands for all others.
    /// `exclude` (strictly increasing; unknown ids allowed) is attended elsewhere: never returned and never in the tail.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`, `Config` (group, scale, open_fraction), `UnsortedExclude`.
    fn search(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        scratch: &mut Scratch,
        found: &mut Found,
    ) -> Result<(), IndexError>;

    /// Attention state over everything held that is neither selected in `found` nor excluded:
    /// `sum_c n_c exp(q.mean_key_c * scale) * (1, mean_value_c)`. `out` `[group, dim]` f32 is the weighted mean value,
    /// `lse` `[group]` f32 the natural log of the mass; an empty tail is `(0, -inf)`. `query` and `exclude` must be those of
    /// the search that filled `found`.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`, `StaleFound`.
    fn tail(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        found: &Found,
        scratch: &mut Scratch,
        state: TailOut<'_>,
    ) -> Result<(), IndexError>;

    /// The pages as plain slices; `None` for an index that has none.
    fn pages(&self) -> Option<PageView<'_>>;

    /// Host bytes owned, by part.
    fn memory(&self) -> MemoryReport;

    /// The whole index as bytes: versioned, checksummed, equal for equal contents. Each implementation restores from
    /// them by its own `restore`.
    fn snapshot(&self) -> Vec<u8>;
}

/// Where `tail` writes its state.
#[derive(Debug)]
pub struct TailOut<'a> {
    /// `[group, dim]` f32.
    pub out: &'a mut [f32],
    /// `[group]` f32, natural log.
    pub lse: &'a mut [f32],
}
