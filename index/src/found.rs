//! The answer of a search: the selected tokens and what stands for all others.

use crate::blocks::LANES;
use crate::check;
use crate::error::IndexError;
use crate::index::{Hit, Query, TailOut};
use crate::simd::codes::Pairs;
use crate::simd::dense;

/// Level of a part whose entries are young tokens.
pub(crate) const YOUNG: u8 = u8::MAX;
/// Level of a part of pages that answer in the tail but are not up for selection.
pub(crate) const SILENT: u8 = u8::MAX - 1;

/// Caller-owned answer of `KeyIndex::search`; reuse it so that nothing is allocated after warm-up.
#[derive(Debug, Default)]
pub struct Found {
    /// Selected tokens, best first.
    pub tokens: Vec<Hit>,
    /// Pages whose summaries were ranked.
    pub pages_opened: usize,
    /// Pages whose tokens were scored one by one by their codes.
    pub pages_refined: usize,
    /// Summaries scored at every level, pages included.
    pub nodes_scored: usize,
    /// Bytes of summaries, codes and scales that the search read.
    pub index_bytes_read: usize,
    /// Bytes that `tail` reads for this answer, at most.
    pub tail_bytes_read: usize,
    pub(crate) frontier: Frontier,
}

impl Found {
    /// Super-nodes whose pages were ranked, rising.
    pub fn opened(&self) -> impl Iterator<Item = usize> {
        self.frontier.parts.iter().filter(|part| part.level == 0).map(|part| part.block as usize)
    }

    /// Tokens that are represented by summaries: neither selected nor excluded.
    pub fn tail_tokens(&self) -> usize {
        self.frontier.rest.iter().map(|&r| r as usize).sum()
    }

    /// Forgets the last answer, keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        self.pages_opened = 0;
        self.pages_refined = 0;
        self.nodes_scored = 0;
        self.index_bytes_read = 0;
        self.tail_bytes_read = 0;
        self.frontier.clear();
    }
}

impl Found {
    /// Starts the answer of an index that stands for nothing but what it selects.
    pub(crate) fn begin_without_tail(&mut self, group: usize, stamp: u64) {
        self.clear();
        self.frontier.group = group;
        self.frontier.stamp = stamp;
        self.frontier.answers = false;
    }

    /// The tail of such an index: the empty state, after the checks that every tail makes.
    pub(crate) fn empty_tail(
        &self,
        query: &Query<'_>,
        (dim, stamp): (usize, u64),
        state: TailOut<'_>,
    ) -> Result<(), IndexError> {
        check::query(query, dim)?;
        check::tail_out(state.out, state.lse, query.group, dim)?;
        if self.frontier.stamp != stamp || self.frontier.group != query.group {
            return Err(IndexError::StaleFound);
        }
        state.out.fill(0.0);
        state.lse.fill(f32::NEG_INFINITY);
        Ok(())
    }
}

/// One scored block of the frontier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// 0 = pages, `l` = tree level `l`, or one of the names above.
    pub level: u8,
    pub block: u32,
}

/// Every scored block, with what of each entry is left for the tail.
///
/// Parts come in a fixed order (tree levels from the top, page blocks by index, young tokens) so that sums over them are the
/// same on every run; a search that opened everything has no tree parts and equals a flat scan bit by bit.
#[derive(Debug, Default)]
pub(crate) struct Frontier {
    pub parts: Vec<Part>,
    /// `[parts, group, 16]` logits without the centre's share.
    pub logits: Vec<f32>,
    /// `[parts, 16]` tokens of the entry that the tail must answer for.
    pub rest: Vec<f32>,
    /// `[parts, 16]` lanes of a page that are selected or excluded.
    pub taken: Vec<u16>,
    /// `[parts, group, 16]` exponentials of the logits less `shift`; 0 where a page's tokens stand for it.
    pub exps: Vec<f32>,
    /// `[group]` what exponentials are relative to.
    pub shift: Vec<f32>,
    /// Pages whose tokens stand for themselves.
    pub refined: Refined,
    /// Rows that `logits` and `rest` are about, in an index of single tokens.
    pub rows: Vec<u32>,
    pub group: usize,
    pub stamp: u64,
    /// Whether the tail is wanted at all.
    pub answers: bool,
}

impl Frontier {
    /// Forgets all parts.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.logits.clear();
        self.rest.clear();
        self.taken.clear();
        self.refined.clear();
        self.rows.clear();
    }

    /// Opens room for one more part and returns its number.
    pub fn push(&mut self, part: Part) -> usize {
        let at = self.parts.len();
        self.parts.push(part);
        self.logits.resize((at + 1) * self.group * LANES, 0.0);
        self.rest.resize((at + 1) * LANES, 0.0);
        self.taken.resize((at + 1) * LANES, 0);
        at
    }

    /// Logits `[group, 16]` of a part.
    pub fn logits_of(&self, part: usize) -> &[f32] {
        let size = self.group * LANES;
        &self.logits[part * size..(part + 1) * size]
    }

    /// A part as the kernels read it.
    pub fn part(&self, part: usize) -> dense::Part<'_> {
        dense::Part { logits: self.logits_of(part), rest: self.rest_of(part) }
    }

    /// Remaining tokens `[16]` of a part.
    pub fn rest_of(&self, part: usize) -> &[f32] {
        &self.rest[part * LANES..(part + 1) * LANES]
    }
}

/// Pages told apart into their tokens, each for the heads to which it matters: its pairs, in the order of the pages.
#[derive(Debug, Default)]
pub(crate) struct Refined {
    /// `[pages]` page numbers.
    pub pages: Vec<u32>,
    /// `[pages]` where their pairs end.
    pub ends: Vec<u32>,
    /// `[pairs]` heads, rising within a page.
    pub heads: Vec<u16>,
    /// `[pages]` place of the page in the frontier: part times 16 plus lane.
    pub places: Vec<u32>,
    /// `[pages]` lanes neither selected nor excluded when the page was told apart.
    pub left: Vec<u16>,
    /// `[pairs, 16]` logits without the centre's share; minus infinity where the lane is not left or was selected. Behind them
    /// those of larger searches before: filling them anew would cost as much as scoring.
    logits: Vec<f32>,
    /// `[pairs, 16]` exponentials of the logits less the frontier's `shift`, likewise.
    weights: Vec<f32>,
}

impl Refined {
    fn clear(&mut self) {
        self.pages.clear();
        self.ends.clear();
        self.heads.clear();
        self.places.clear();
        self.left.clear();
    }

    /// Makes room for as many pages, each with as many heads: how many there are differs from query to query, and no later one
    /// shall allocate. Memory that is never written costs nothing.
    pub fn reserve(&mut self, pages: usize, group: usize) {
        room_for(&mut self.pages, pages);
        room_for(&mut self.ends, pages);
        room_for(&mut self.places, pages);
        room_for(&mut self.left, pages);
        // Heads are written eight at a time.
        room_for(&mut self.heads, pages * group + 8);
        room_for(&mut self.logits, pages * group * LANES);
        room_for(&mut self.weights, pages * group * LANES);
    }

    /// Makes room for the tokens of all pairs: pairs, `left`, then logits and weights, to be written.
    pub fn tokens_mut(&mut self) -> (Pairs<'_>, &[u16], &mut [f32], &mut [f32]) {
        let len = self.heads.len() * LANES;
        if self.logits.len() < len {
            self.logits.resize(len, 0.0);
            self.weights.resize(len, 0.0);
        }
        let pairs = Pairs { pages: &self.pages, ends: &self.ends, heads: &self.heads };
        (pairs, &self.left, &mut self.logits[..len], &mut self.weights[..len])
    }

    /// Logits `[pairs, 16]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits[..self.heads.len() * LANES]
    }

    /// Weights `[pairs, 16]`.
    pub fn weights(&self) -> &[f32] {
        &self.weights[..self.heads.len() * LANES]
    }

    /// Pages and heads as the kernels read them.
    pub fn pairs(&self) -> Pairs<'_> {
        Pairs { pages: &self.pages, ends: &self.ends, heads: &self.heads }
    }

    /// Pairs of the page at `at`.
    pub fn pairs_of(&self, at: usize) -> std::ops::Range<usize> {
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        start..self.ends[at] as usize
    }

    /// Takes a token of the page at `at` out of what stands for itself.
    pub fn take(&mut self, at: usize, lane: usize) {
        for pair in self.pairs_of(at) {
            self.logits[pair * LANES + lane] = f32::NEG_INFINITY;
            self.weights[pair * LANES + lane] = 0.0;
        }
    }
}

/// Capacity for `len` elements in all.
pub(crate) fn room_for<T>(items: &mut Vec<T>, len: usize) {
    items.reserve(len.saturating_sub(items.len()));
}
