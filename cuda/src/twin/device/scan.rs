//! Twins of the device scans of one item: scores of pages, what they share with those of tokens, the nearest query.
//!
//! Scores here lie as [group, units]; the device's tiles are an order of the same numbers.

use crate::KvElem;

/// Scores [group, pages] of an item's pages, `q.mean_key * scale + ln count`, and their log-sum-exp `[group]`. `q` is
/// [group, head_dim], `keys` [pages, head_dim], `log_count` `[pages]` with -inf for no page.
pub fn page_scores<E: KvElem>(q: &[E], keys: &[E], log_count: &[f32], scale: f32) -> (Vec<f64>, Vec<f64>) {
    let d = keys.len().checked_div(log_count.len()).unwrap_or(1).max(1);
    let wide = |x: &E| f64::from(x.to_f32());
    let mut scores = Vec::new();
    let mut lse = Vec::new();
    for q in q.chunks(d) {
        let of_head: Vec<f64> = keys
            .chunks(d)
            .zip(log_count)
            .map(|(key, log_count)| {
                let dot: f64 = q.iter().zip(key).map(|(q, k)| wide(q) * wide(k)).sum();
                if *log_count == f32::NEG_INFINITY {
                    f64::NEG_INFINITY
                } else {
                    dot * f64::from(scale) + f64::from(*log_count)
                }
            })
            .collect();
        lse.push(log_sum_exp(&of_head));
        scores.extend(of_head);
    }
    (scores, lse)
}

pub(super) fn log_sum_exp(scores: &[f64]) -> f64 {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        max
    } else {
        max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln()
    }
}

/// Sketches of an item's tokens, as `floe_index::sketch` lays them out.
#[derive(Debug, Clone, Copy)]
pub struct HostSketches<'a> {
    /// Bits of a code.
    pub bits: usize,
    /// [pages, bits, head_dim / 32, 16].
    pub lines: &'a [u32],
    /// [pages, 16].
    pub scales: &'a [half::f16],
    /// `[pages]` bit `t`: token `t` counts.
    pub masks: &'a [u16],
}

impl HostSketches<'_> {
    /// Level of coordinate `i` of a token's key.
    pub fn level(&self, token: usize, i: usize, d: usize) -> f64 {
        let bit = |plane: usize| {
            let line = (token / 16 * self.bits + plane) * (d / 32) + i / 32;
            self.lines[line * 16 + token % 16] >> (i % 32) & 1
        };
        let code = (0..self.bits).fold(0, |code, plane| 2 * code + bit(plane));
        2.0 * f64::from(code) - f64::from((1u32 << self.bits) - 1)
    }
}

/// Units of the best keys, at most `budget`: `scores` [group, units] f32 less `lse` `[group]`, the largest over the group, in
/// steps of 1/128 nat from `low` up to 32 nats more; first those above the last step taken, then those of that step, each by number.
pub(super) fn select_by(scores: &[f32], lse: &[f32], budget: usize, low: f32) -> Vec<u32> {
    let units = scores.len().checked_div(lse.len()).unwrap_or(0);
    let mut keys: Vec<(u32, u32)> = (0..units)
        .map(|unit| {
            let best = lse
                .iter()
                .enumerate()
                .map(|(head, lse)| scores[head * units + unit] - lse)
                .fold(f32::NEG_INFINITY, f32::max);
            let key =
                if best > f32::NEG_INFINITY { ((best - low) * 128.0).clamp(1.0, 4095.0) as u32 } else { 0 };
            (key, unit as u32)
        })
        .filter(|(key, _)| *key > 0)
        .collect();
    keys.sort_by_key(|(key, unit)| (std::cmp::Reverse(*key), *unit));
    let cut = keys.get(budget).map_or(0, |(key, _)| *key);
    keys.truncate(budget);
    let (mut above, mut at): (Vec<_>, Vec<_>) = keys.into_iter().partition(|(key, _)| *key > cut);
    above.sort_by_key(|(_, unit)| *unit);
    at.sort_by_key(|(_, unit)| *unit);
    above.into_iter().chain(at).map(|(_, unit)| unit).collect()
}

/// Smallest squared distance of `q` `[dim]` to a query of `ring` [places, dim], and the place; infinite for an empty ring.
pub fn match_scan(ring: &[f32], q: &[f32]) -> (f64, u32) {
    let mut best = (f64::INFINITY, 0);
    for (place, x) in ring.chunks(q.len().max(1)).enumerate() {
        let distance: f64 = x.iter().zip(q).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        if distance < best.0 {
            best = (distance, place as u32);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selection_takes_the_best_and_breaks_ties_by_number() {
        let scores = [0.0, -1.0, -1.001, -1.0, f32::NEG_INFINITY, -30.0];
        assert_eq!(select_by(&scores, &[0.0], 2, -24.0), [0, 1]);
        assert_eq!(select_by(&scores, &[0.0], 3, -24.0), [0, 1, 3]);
        assert_eq!(select_by(&scores, &[0.0], 9, -24.0), [0, 1, 2, 3, 5]);
        assert_eq!(select_by(&scores, &[0.0], 0, -24.0), []);
    }
}
