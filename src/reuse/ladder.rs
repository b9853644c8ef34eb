//! Climbing an anchor's ladder: fresh shells from the inside out, an estimate and a predicted error at every rung.
//!
//! Two things are taken from the shell just read, of which the anchor kept its own view:
//!
//! - **The normaliser.** A new query shifts the logits of all tokens by a common amount that the kept lse does not know of.
//!   `shift = lse(shell, now) - lse(shell, then)` of the outermost shell is added to the lse beyond it. Measured against
//!   the first-order correction by the cached mean key, `(q - q_then).mean_key`, it has a third to two thirds of the error and needs neither a
//!   stored vector nor another pass over the keys (bench/README.md).
//! - **The prediction.** The kept state beyond is as wrong as the kept state of the shell turned out to be:
//!   `predicted = weight beyond * |out(shell, now) - out(shell, then)| / |out|`.

use floe_cuda::{StateMut, StateRef, merge_states};

use super::accumulate::{distance, norm, of_head};
use super::anchor::Anchor;
use super::gate::Label;
use crate::error::Result;
use crate::state::StateBuf;

/// Estimates of one step, rung by rung.
#[derive(Default)]
pub(super) struct Ladder {
    /// State of everything read so far.
    fresh: StateBuf,
    /// Estimates of the rungs reached, in order; the rest is memory for later.
    outs: Vec<StateBuf>,
    /// Predicted errors, `[rungs, group]`.
    predicted: Vec<f32>,
    reached: usize,
}

impl Ladder {
    /// Nothing read yet.
    pub(super) fn start(&mut self, group: usize, dim: usize) {
        self.fresh.reset(group, dim);
        self.predicted.clear();
        self.reached = 0;
    }

    /// Adds tokens that no anchor covers.
    pub(super) fn add(&mut self, part: &StateBuf) -> Result<()> {
        self.fresh.merge(part)
    }

    /// Adds the shell of the next rung of `anchor`, and estimates.
    pub(super) fn climb(&mut self, anchor: &Anchor, shell: &StateBuf) -> Result<()> {
        self.fresh.merge(shell)?;
        let rung = self.reached;
        self.reached += 1;
        if self.outs.len() <= rung {
            self.outs.push(StateBuf::default());
        }
        let out = &mut self.outs[rung];
        out.clone_from(&self.fresh);
        let (then, beyond) = (&anchor.inner[rung], &anchor.beyond[rung]);
        let dim = out.out.len() / out.lse.len();
        for head in 0..out.lse.len() {
            let span = head * dim..(head + 1) * dim;
            let lse = beyond.lse[head] + (shell.lse[head] - then.lse[head]);
            let head_out = StateMut { out: &mut out.out[span.clone()], lse: &mut out.lse[head..head + 1] };
            merge_states(head_out, StateRef { out: &beyond.out[span.clone()], lse: &[lse] })?;
            let weight = (lse - out.lse[head]).exp();
            let moved = distance(of_head(&shell.out, head, dim), of_head(&then.out, head, dim));
            self.predicted.push(weight * moved / norm(&out.out[span]));
        }
        Ok(())
    }

    /// Predicted errors of the rung reached last, `[group]`.
    pub(super) fn predicted(&self) -> &[f32] {
        let group = self.fresh.lse.len();
        &self.predicted[(self.reached - 1) * group..][..group]
    }

    /// Estimate of the rung reached last.
    pub(super) fn estimate(&self) -> Option<&StateBuf> {
        self.outs[..self.reached].last()
    }

    /// State of everything read.
    pub(super) fn fresh(&self) -> &StateBuf {
        &self.fresh
    }

    /// What each rung reached would have cost, were `truth` the answer: `(rung, head, label)`.
    pub(super) fn labels<'a>(
        &'a self,
        truth: &'a StateBuf,
    ) -> impl Iterator<Item = (usize, usize, Label)> + 'a {
        let group = truth.lse.len();
        let dim = truth.out.len() / group;
        self.outs[..self.reached].iter().enumerate().flat_map(move |(rung, out)| {
            (0..group).map(move |head| {
                let exact = of_head(&truth.out, head, dim);
                let error = distance(of_head(&out.out, head, dim), exact) / norm(exact);
                (rung, head, Label { predicted: self.predicted[rung * group + head], error })
            })
        })
    }

    pub(super) fn size_bytes(&self) -> usize {
        4 * (self.outs.len() + 1) * (self.fresh.out.len() + self.fresh.lse.len())
    }
}
