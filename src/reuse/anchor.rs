//! An anchor: what one step leaves behind for later ones, and how it is made.
//!
//! The tokens between the sinks and the window are ranked by the largest share of attention that a head of the group
//! gives them, and cut into **shells**: the strongest few, the next few, and so on. For every shell the anchor keeps the state
//! beyond it. A later step attends sinks, shells and everything since afresh, from the inside out, and lets the
//! anchor answer for what lies beyond the last shell it read: a **rung** of a ladder from few tokens to all of them.
//!
//! ```text
//! rung 0   | sinks | shell 0 |            beyond[0]                | recent |
//! rung 1   | sinks | shell 0 | shell 1 |       beyond[1]           | recent |
//! ...      | sinks | shell 0 | shell 1 | shell 2 | ... | beyond[L] | recent |
//! ```
//!
//! Each row tiles the context exactly: states are merged, never subtracted.

use std::ops::Range;

use floe_index::simd::{Isa, exp::exp_shifted};

use super::bytes::{Reader, Writer};
use crate::error::Result;
use crate::ids::TokenPos;
use crate::state::StateBuf;

/// One earlier step.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Anchor {
    /// Epoch of the cache in which it may be used.
    pub(super) epoch: u64,
    /// Position of the step.
    pub(super) position: TokenPos,
    /// Queries before rotary embedding, `[group, head_dim]`.
    pub(super) q_pre: Vec<f32>,
    /// Positions that shells and the rest beyond them cover.
    pub(super) covered: Range<TokenPos>,
    /// Positions of all shells, ascending within each.
    pub(super) tokens: Vec<TokenPos>,
    /// Shell `i` is `tokens[cuts[i]..cuts[i + 1]]`.
    pub(super) cuts: Vec<u32>,
    /// States of the shells.
    pub(super) inner: Vec<StateBuf>,
    /// State of what lies beyond each shell.
    pub(super) beyond: Vec<StateBuf>,
}

impl Anchor {
    pub(super) fn num_rungs(&self) -> usize {
        self.inner.len()
    }

    /// Positions of shell `i`, ascending.
    pub(super) fn shell(&self, i: usize) -> &[TokenPos] {
        &self.tokens[self.cuts[i] as usize..self.cuts[i + 1] as usize]
    }

    /// Positions beyond the last shell, ascending. `inside` is scratch.
    pub(super) fn rest(&self, inside: &mut Vec<u8>, out: &mut Vec<TokenPos>) {
        let start = self.covered.start;
        inside.clear();
        inside.resize(self.covered.len(), 0);
        self.tokens.iter().for_each(|t| inside[(t - start) as usize] = 1);
        out.clear();
        out.extend(self.covered.clone().filter(|t| inside[(t - start) as usize] == 0));
    }

    pub(super) fn size_bytes(&self) -> usize {
        let states = self.inner.iter().chain(&self.beyond).map(|s| s.out.len() + s.lse.len());
        4 * (self.q_pre.len() + self.tokens.len() + self.cuts.len() + states.sum::<usize>())
    }

    pub(super) fn write(&self, bytes: &mut Writer) {
        bytes.floats(&self.q_pre);
        bytes.words(&[self.position, self.covered.start, self.covered.end]);
        bytes.words(&self.tokens);
        bytes.words(&self.cuts);
        for state in self.inner.iter().chain(&self.beyond) {
            bytes.floats(&state.out);
            bytes.floats(&state.lse);
        }
    }

    /// `None` where the bytes end early or contradict themselves.
    pub(super) fn read(bytes: &mut Reader<'_>, (group, dim, epoch): (usize, usize, u64)) -> Option<Self> {
        let q_pre = bytes.floats()?;
        let [position, start, end] = bytes.words()?[..] else { return None };
        let (tokens, cuts) = (bytes.words()?, bytes.words()?);
        let ordered = cuts.first() == Some(&0) && cuts.is_sorted() && start <= end && end <= position + 1;
        let whole = *cuts.last()? as usize == tokens.len() && q_pre.len() == group * dim;
        if !ordered || !whole || !tokens.iter().all(|t| (start..end).contains(t)) {
            return None;
        }
        let num = cuts.len() - 1;
        let mut states = Vec::with_capacity(2 * num);
        for _ in 0..2 * num {
            let state = StateBuf { out: bytes.floats()?, lse: bytes.floats()? };
            states.push(state);
            let last = states.last()?;
            if last.out.len() != group * dim || last.lse.len() != group {
                return None;
            }
        }
        let beyond = states.split_off(num);
        Some(Self { epoch, position, q_pre, covered: start..end, tokens, cuts, inner: states, beyond })
    }
}

/// The place of every candidate: 0 = shell 0, 1 = shell 1, ..., `shares.len()` = beyond all shells.
#[derive(Default)]
pub(super) struct Ranking {
    pub(super) place: Vec<u8>,
    mass: Vec<f32>,
    order: Vec<u32>,
}

impl Ranking {
    /// Ranks `candidates`, places of the rows of `logits` `[group, num]`, by the largest share that a head gives them; the first
    /// `shares[i]` of them are within shell `i`. The share is that of all `num` rows. Ties: the lower place is stronger.
    pub(super) fn rank(
        &mut self,
        logits: &mut [f32],
        group: usize,
        candidates: Range<usize>,
        shares: &[f32],
    ) {
        let num = logits.len() / group;
        let isa = Isa::detect();
        self.mass.clear();
        self.mass.resize(candidates.len(), 0.0);
        for head in logits.chunks_exact_mut(num.max(1)) {
            let max = head.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let inverse = 1.0 / exp_shifted(isa, head, max);
            let shares = self.mass.iter_mut().zip(&head[candidates.clone()]);
            shares.for_each(|(mass, p)| *mass = mass.max(p * inverse));
        }
        let mass = &self.mass;
        let stronger = |a: &u32, b: &u32| mass[*b as usize].total_cmp(&mass[*a as usize]).then(a.cmp(b));
        self.order.clear();
        self.order.extend(0..candidates.len() as u32);
        self.place.clear();
        self.place.resize(candidates.len(), shares.len() as u8);
        let mut within = candidates.len();
        for (shell, share) in shares.iter().enumerate().rev() {
            let num = (candidates.len() as f32 * share) as usize;
            if num < within && num > 0 {
                self.order[..within].select_nth_unstable_by(num - 1, stronger);
            }
            within = num.min(within);
            self.order[..within].iter().for_each(|i| self.place[*i as usize] = shell as u8);
        }
    }

    pub(super) fn size_bytes(&self) -> usize {
        self.place.capacity() + 4 * (self.mass.capacity() + self.order.capacity())
    }
}

/// The states beyond each shell, from those of the shells and of the rest.
pub(super) fn beyond(inner: &[StateBuf], rest: &StateBuf) -> Result<Vec<StateBuf>> {
    let mut beyond = Vec::with_capacity(inner.len());
    let mut outer = rest.clone();
    for shell in inner.iter().rev() {
        beyond.push(outer.clone());
        outer.merge(shell)?;
    }
    beyond.reverse();
    Ok(beyond)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_hold_the_strongest_first_and_the_shares_asked_for() {
        // Two heads; the second looks at one token only, which must be in the first shell.
        let num = 64;
        let mut logits: Vec<f32> = (0..num).map(|i| -(i as f32) * 0.1).collect();
        logits.extend((0..num).map(|i| if i == 40 { 20.0 } else { 0.0 }));
        let mut ranking = Ranking::default();
        ranking.rank(&mut logits, 2, 8..56, &[0.125, 0.25, 0.5]);
        let count = |shell| ranking.place.iter().filter(|p| **p == shell).count();
        assert_eq!([count(0), count(1), count(2), count(3)], [6, 6, 12, 24]);
        assert_eq!(ranking.place[40 - 8], 0);
        // The first head falls off with position, so what is left follows it.
        assert_eq!(&ranking.place[..5], [0; 5]);
        assert_eq!(ranking.place[47], 3);
    }
}
