//! The gate of one query head at one rung: how large may the predicted error be?
//!
//! Every measurement is a pair: the error that was predicted for a reuse and the error it has, or would have had. The
//! threshold is the largest prediction `t` for which, among the newest measurements predicted at most `t`,
//!
//! ```text
//! (1 + number with an error above the bound) / (1 + number) <= 1/20
//! ```
//!
//! which is the count that split conformal prediction allows (Vovk et al. 2005, section 4.2; the one more in both places
//! is the step to come). So at least nineteen good measurements come before the first reuse. The rule presumes that a step to come
//! is like the measured ones. Most of those are steps that were *refused*, which are harder than reused ones: that errs on the
//! safe side. The lottery and the steps that make anchors measure regardless of the prediction, so the reused region is never blind.

use super::bytes::{Reader, Writer};

/// Measurements allowed to be above the bound, as one in so many.
const ONE_IN: usize = 20;

/// Measurements between two computations of the threshold.
const STRIDE: usize = 4;

/// Predicted and true error of one reuse, relative.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Label {
    pub(super) predicted: f32,
    pub(super) error: f32,
}

/// Newest labels of one (rung, head) and the threshold they give.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    /// A ring; `next` is the place that is overwritten next.
    labels: Vec<Label>,
    next: usize,
    since: usize,
    threshold: f32,
}

impl Gate {
    pub(super) fn new() -> Self {
        Self { labels: Vec::new(), next: 0, since: 0, threshold: f32::NEG_INFINITY }
    }

    /// Whether a reuse with this predicted error may be given out.
    pub(super) fn admits(&self, predicted: f32) -> bool {
        predicted <= self.threshold
    }

    /// Largest admitted prediction; minus infinity = none.
    pub(super) fn threshold(&self) -> f32 {
        self.threshold
    }

    pub(super) fn labels(&self) -> &[Label] {
        &self.labels
    }

    /// Notes a measurement; at most `keep` are kept. `order` is scratch.
    pub(super) fn learn(&mut self, label: Label, (keep, bound): (usize, f32), order: &mut Vec<Label>) {
        if self.labels.len() < keep {
            self.labels.push(label);
        } else {
            self.labels[self.next] = label;
        }
        self.next = (self.next + 1) % keep;
        self.since += 1;
        if self.since >= STRIDE {
            self.since = 0;
            order.clear();
            order.extend_from_slice(&self.labels);
            self.threshold = threshold(order, bound);
        }
    }

    pub(super) fn write(&self, bytes: &mut Writer) {
        bytes.word(self.next as u64);
        bytes.word(self.since as u64);
        bytes.floats(&[self.threshold]);
        bytes.floats(&self.labels.iter().flat_map(|l| [l.predicted, l.error]).collect::<Vec<_>>());
    }

    /// `None` where the bytes end early or hold more than `keep` labels.
    pub(super) fn read(bytes: &mut Reader<'_>, keep: usize) -> Option<Self> {
        let (next, since) = (usize::try_from(bytes.word()?).ok()?, usize::try_from(bytes.word()?).ok()?);
        let [threshold] = bytes.floats()?[..] else { return None };
        let pairs = bytes.floats()?;
        let label = |pair: &[f32; 2]| Label { predicted: pair[0], error: pair[1] };
        let labels: Vec<Label> = pairs.as_chunks().0.iter().map(label).collect();
        let whole = pairs.len() == 2 * labels.len() && labels.len() <= keep && next < keep;
        (whole && (labels.len() == keep || next == labels.len())).then_some(Self {
            labels,
            next,
            since,
            threshold,
        })
    }

    /// Forgets everything learnt.
    pub(super) fn clear(&mut self) {
        *self = Self { labels: std::mem::take(&mut self.labels), ..Self::new() };
        self.labels.clear();
    }
}

/// The threshold that `labels` give for `bound`; reorders them.
fn threshold(labels: &mut [Label], bound: f32) -> f32 {
    labels.sort_unstable_by(|a, b| a.predicted.total_cmp(&b.predicted));
    let (mut bad, mut best) = (0, f32::NEG_INFINITY);
    for (i, label) in labels.iter().enumerate() {
        // An error that is not a number counts as too large.
        bad += usize::from(label.error.partial_cmp(&bound) != Some(std::cmp::Ordering::Less));
        if (1 + bad) * ONE_IN <= i + 2 {
            best = label.predicted;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    fn labels(n: usize, error: impl Fn(f32) -> f32) -> Vec<Label> {
        (0..n)
            .map(|i| i as f32 / n as f32)
            .map(|predicted| Label { predicted, error: error(predicted) })
            .collect()
    }

    #[test]
    fn threshold_needs_nineteen_good_labels_and_stops_before_the_bad_ones() {
        assert_eq!(threshold(&mut labels(18, |_| 0.0), 0.05), f32::NEG_INFINITY);
        assert!(threshold(&mut labels(19, |_| 0.0), 0.05) > 0.9);
        // Errors equal their prediction: of 1000 labels the 50 below .05 are good, and two more bad ones fit.
        let t = threshold(&mut labels(1000, |p| p), 0.05);
        assert!((0.049..0.053).contains(&t), "{t}");
        assert_eq!(threshold(&mut labels(1000, |_| f32::NAN), 0.05), f32::NEG_INFINITY);
    }

    #[test]
    fn admitted_errors_keep_the_bound_on_later_labels_of_the_same_kind() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let mut draw = || {
            let predicted: f32 = rng.random_range(0.0..0.3);
            Label { predicted, error: predicted * rng.random_range(0.2f32..1.8) }
        };
        let (mut gate, mut order) = (Gate::new(), Vec::new());
        let (mut admitted, mut bad) = (0, 0);
        for i in 0..40_000 {
            let label = draw();
            if i > 1000 && gate.admits(label.predicted) {
                admitted += 1;
                bad += usize::from(label.error > 0.05);
            } else {
                gate.learn(label, (256, 0.05), &mut order);
            }
        }
        assert!(admitted > 1000, "{admitted}");
        // Reused steps teach nothing here, so the labels thin out below the threshold; the rule stays on the safe side.
        assert!(bad as f64 <= 1.1 / 20.0 * f64::from(admitted), "{bad} of {admitted}");
    }

    #[test]
    fn a_bound_that_cannot_be_met_admits_nothing() {
        let (mut gate, mut order) = (Gate::new(), Vec::new());
        for label in labels(500, |p| 0.2 + p) {
            gate.learn(label, (256, 0.05), &mut order);
        }
        assert!(!gate.admits(0.0));
    }
}
