//! The answer of a search: the selected tokens and what stands for all others.

use crate::blocks::LANES;
use crate::check;
use crate::error::IndexError;
use crate::index::{Hit, Query, TailOut};
use crate::simd::dense;

/// Level of a part whose entries are young tokens.
pub(crate) const YOUNG: u8 = u8::MAX;
/// Level of a part whose entries are the tokens of one page; its `block` is the page's place in the frontier.
pub(crate) const TOKENS: u8 = u8::MAX - 1;
/// Level of a part of pages that answer in the tail but are not up for selection.
pub(crate) const SILENT: u8 = u8::MAX - 2;

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

/// The same for a page that is not up for selection.
pub(crate) const SILENT_TOKENS: u8 = u8::MAX - 3;

/// One scored block of the frontier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// 0 = pages, `l` = tree level `l`, or one of the names above.
    pub level: u8,
    pub block: u32,
}

/// Every scored block, with what of each entry is left for the tail.
///
/// Parts come in a fixed order (tree levels from the top, page blocks by index, young tokens, tokens of pages) so that sums over
/// them are the same on every run; a search that opened everything has no tree parts and equals a flat scan bit by bit.
#[derive(Debug, Default)]
pub(crate) struct Frontier {
    pub parts: Vec<Part>,
    /// `[parts, group, 16]` logits without the centre's share.
    pub logits: Vec<f32>,
    /// `[parts, 16]` tokens of the entry that the tail must answer for.
    pub rest: Vec<f32>,
    /// `[parts, 16]` lanes of a page that are selected or excluded.
    pub taken: Vec<u16>,
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
