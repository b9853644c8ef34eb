//! Which tokens a step of [`Calibrated`] asks for, in which pieces.

use super::{CELLS, Calibrated, Role, SPARSE_SHARES, Step, Tokens, covered_end};
use crate::reuse::anchor::Anchor;
use crate::state::StateBuf;

impl Calibrated {
    /// Pieces of a climb: what no anchor covers, then the shells.
    pub(super) fn plan_climb(&mut self, anchor: &Anchor) {
        let (now, covered) = (self.step.position + 1, anchor.covered.clone());
        let pieces = &mut self.step.pieces;
        pieces.clear();
        for range in [0..covered.start, covered.end..now] {
            if !range.is_empty() {
                pieces.push((Tokens::Range(range), Role::Base));
            }
        }
        pieces.extend((0..anchor.num_rungs()).map(|i| (Tokens::Shell(i), Role::Rung)));
    }

    /// Pieces of a survey: the cells of tokens that lie in the same shell of both anchors, the old and the one being made.
    pub(super) fn plan_survey(&mut self, matched: Option<&Anchor>) {
        let (first, now) = (self.sinks, self.step.position + 1);
        let end = covered_end(now, self.window, first);
        let Step { pieces, lists, ranking, old_places, .. } = &mut self.step;
        old_places.clear();
        old_places.resize((end - first) as usize, 0);
        if let Some(anchor) = matched {
            let inside = (anchor.covered.end - first) as usize;
            old_places[..inside].fill(CELLS as u8 - 1);
            for rung in 0..anchor.num_rungs() {
                anchor.shell(rung).iter().for_each(|t| old_places[(t - first) as usize] = rung as u8 + 1);
            }
        }
        let cells = || {
            old_places.iter().zip(&ranking.place).map(|(old, new)| *old as usize * CELLS + *new as usize + 1)
        };
        let mut starts = [0usize; CELLS * CELLS + 1];
        cells().for_each(|cell| starts[cell + 1] += 1);
        (0..CELLS * CELLS).for_each(|i| starts[i + 1] += starts[i]);
        lists.clear();
        lists.resize(old_places.len(), 0);
        let mut ends = starts;
        for (token, cell) in (first..).zip(cells()) {
            lists[ends[cell]] = token;
            ends[cell] += 1;
        }
        pieces.clear();
        for range in [0..first, end..now] {
            if !range.is_empty() {
                pieces.push((Tokens::Range(range), Role::Cell { old: 0, new: 0 }));
            }
        }
        for cell in 0..CELLS * CELLS {
            if starts[cell] < starts[cell + 1] {
                let role = Role::Cell { old: cell / CELLS, new: cell % CELLS };
                pieces.push((Tokens::Listed(starts[cell]..starts[cell + 1]), role));
            }
        }
    }

    /// Pieces of the shells of a sparse step.
    pub(super) fn plan_adopt(&mut self) {
        let Step { pieces, lists, ranking, .. } = &mut self.step;
        pieces.clear();
        let mut sorted = Vec::with_capacity(lists.len());
        for shell in 0..SPARSE_SHARES.len() {
            let start = sorted.len();
            let places = lists.iter().zip(&ranking.place);
            sorted.extend(places.filter(|(_, place)| **place as usize == shell).map(|(token, _)| *token));
            pieces.push((Tokens::Listed(start..sorted.len()), Role::Cell { old: 0, new: shell + 1 }));
        }
        *lists = sorted;
    }

    /// Empty cells for a survey.
    pub(super) fn clear_cells(&mut self) {
        let (group, dim) = (self.group, self.dim);
        for cells in [&mut self.step.old, &mut self.step.new] {
            cells.resize_with(CELLS, StateBuf::default);
            cells.iter_mut().for_each(|state| state.reset(group, dim));
        }
    }
}
