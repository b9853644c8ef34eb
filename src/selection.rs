//! Which tokens one kv head attends exactly in one step.

use std::ops::Range;

use crate::ids::TokenPos;

/// Three disjoint parts, each sorted: the first tokens, the last tokens, and what retrieval picked in between.
///
/// ```text
/// position  0        sinks.end            window.start        num_tokens
///           |  sinks  |      candidates        |    window     |
///                        ^  ^^     ^  retrieved
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// First tokens of the sequence, always attended.
    pub sinks: Range<TokenPos>,
    /// Last tokens, the step's own included, always attended.
    pub window: Range<TokenPos>,
    /// Picked tokens, ascending, all between `sinks.end` and `window.start`.
    pub retrieved: Vec<TokenPos>,
}

impl Selection {
    /// Tokens attended exactly.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.sinks.len() + self.window.len() + self.retrieved.len()
    }

    /// Positions that retrieval may pick from.
    #[must_use]
    pub fn candidates(&self) -> Range<TokenPos> {
        self.sinks.end..self.window.start.max(self.sinks.end)
    }

    /// Whether the parts are disjoint and sorted (ARCHITECTURE invariant: a token is attended at most once a step).
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        let candidates = self.candidates();
        self.sinks.end <= self.window.start.max(self.sinks.end)
            && self.sinks.start <= self.sinks.end
            && self.window.start <= self.window.end
            && (self.window.is_empty() || self.window.start >= self.sinks.end)
            && self.retrieved.is_sorted_by(|a, b| a < b)
            && self.retrieved.first().is_none_or(|p| candidates.contains(p))
            && self.retrieved.last().is_none_or(|p| candidates.contains(p))
    }

    /// Sets the two fixed parts for a context of `num_tokens` and empties the third.
    pub fn reset(&mut self, num_tokens: TokenPos, sinks: TokenPos, window_start: TokenPos) {
        self.sinks = 0..sinks.min(num_tokens);
        self.window = window_start.clamp(self.sinks.end, num_tokens)..num_tokens;
        self.retrieved.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_disjoint_when_the_window_is_longer_than_the_context() {
        let mut s = Selection::default();
        for n in 0..100u32 {
            s.reset(n, 16, n.saturating_sub(64));
            assert!(s.is_well_formed(), "{n}: {s:?}");
            assert!(s.num_tokens() <= n as usize);
            if n <= 80 {
                assert_eq!(s.num_tokens(), n as usize);
                assert!(s.candidates().is_empty());
            }
        }
    }

    #[test]
    fn overlap_and_disorder_are_seen() {
        let ok = Selection { sinks: 0..4, window: 20..30, retrieved: vec![4, 7, 19] };
        assert!(ok.is_well_formed());
        for retrieved in [vec![3, 7], vec![7, 7], vec![9, 8], vec![20]] {
            assert!(!Selection { retrieved, ..ok.clone() }.is_well_formed());
        }
    }
}
