//! Queries as the score kernel reads them.

use super::Sketch;
use crate::index::Query;
use crate::simd::codes::{HEADS_PER_PASS, digits, query_limit};
use crate::simd::codes::{LINE_DIMS, QueryCodes};

/// A group of rotated, rounded queries; reusable, allocates only while it grows.
///
/// Each head's rotated query is rounded to multiples of its largest magnitude over 127 (codes of one and two bits) or over
/// 16319 (four bits). The score of a token with scale `h` is off by at most `h * step / 2 * sum_d |level_d|` from the dot product
/// with its decoded residual; against Gaussian queries the rounding adds less than .06 % to the energy of the codes' own error.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PreparedQuery {
    pub(super) codes: QueryCodes,
    rotated: Vec<f32>,
}

impl PreparedQuery {
    /// Number of query heads.
    pub fn group(&self) -> usize {
        self.codes.group
    }

    /// The rotated queries times the softmax scale, `[group][padded_dim]` f32.
    pub fn rotated(&self) -> &[f32] {
        &self.rotated
    }

    /// `[group]` f32: value of one unit of the rounded query, in logits per unit of residual.
    pub fn steps(&self) -> &[f32] {
        &self.codes.steps
    }
}

/// Factor from the scale of codes of `stored` bits to the least-squares scale of their first `read` planes, for Gaussian
/// coordinates: `E[x level] / E[level^2] / scale` with the thresholds of the stored codes.
fn scale_of_prefix(stored: usize, read: usize) -> f32 {
    match (stored, read) {
        (2, 1) => 1.6027,
        (4, 1) => 4.7606,
        (4, 2) => 3.5395,
        _ => 1.0,
    }
}

impl Sketch {
    /// Rotates and rounds `query`, its softmax scale included, for scoring by the first `planes` planes of the key codes.
    /// Fewer planes than stored read fewer bytes and give the estimate that a narrower code would give, nearly.
    ///
    /// # Panics
    /// When the query has another dimension, or `planes` is not 1, 2 or 4, or more than the key codes have.
    pub fn prepare(&self, query: &Query<'_>, planes: usize, to: &mut PreparedQuery) {
        let stored = self.config.k_bits();
        assert!(matches!(planes, 1 | 2 | 4) && planes <= stored, "{planes} planes of {}", self.config);
        assert_eq!(query.q.len(), query.group * self.dim(), "queries of {} heads", query.group);
        let padded = self.padded_dim();
        let limit = query_limit(planes);
        let prefix = scale_of_prefix(stored, planes);
        let PreparedQuery { codes, rotated } = to;
        codes.bits = planes;
        codes.group = query.group;
        codes.lines = padded / LINE_DIMS;
        codes.sums.clear();
        codes.steps.clear();
        rotated.clear();
        rotated.resize(query.group * padded, 0.0);
        for (row, q) in rotated.chunks_exact_mut(padded).zip(query.q.chunks_exact(self.dim())) {
            let row = &mut row[..q.len()];
            row.copy_from_slice(q);
            self.rotation.apply(row);
            row.iter_mut().for_each(|x| *x *= query.scale);
            let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            codes.steps.push(most / limit as f32);
        }
        let units = |head: usize, i: usize| round(rotated[head * padded + i], codes.steps[head], limit);
        codes.sums.extend((0..query.group).map(|head| (0..padded).map(|i| units(head, i)).sum::<i32>()));
        codes.words.clear();
        let digits = digits(planes);
        for first in (0..query.group).step_by(HEADS_PER_PASS) {
            let heads = first..(first + HEADS_PER_PASS).min(query.group);
            for line in 0..codes.lines {
                for digit in (0..digits).rev() {
                    for bit in 0..8 {
                        codes.words.extend(heads.clone().map(|head| {
                            let byte = |i: usize| {
                                let unit = units(head, LINE_DIMS * line + 8 * i + bit);
                                if digits == 1 { unit as i8 } else { split(unit)[digit] }
                            };
                            i32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)].map(|b| b as u8))
                        }));
                    }
                }
            }
        }
        codes.steps.iter_mut().for_each(|step| *step *= prefix);
    }
}

/// `x` in units of `step`.
fn round(x: f32, step: f32, limit: i32) -> i32 {
    // A query of zeros has step zero; one of tiny numbers may round past the limit.
    if step > 0.0 { ((x / step).round_ties_even() as i32).clamp(-limit, limit) } else { 0 }
}

/// Low digit in -64..64 and high digit, `unit = 128 high + low`.
fn split(unit: i32) -> [i8; 2] {
    let high = (unit + 64) >> 7;
    [(unit - 128 * high) as i8, high as i8]
}

#[cfg(test)]
mod tests {
    use super::{query_limit, split};

    #[test]
    fn digits_of_every_unit_fit_and_sum_to_it() {
        let limit = query_limit(4);
        for unit in -limit..=limit {
            let [low, high] = split(unit).map(i32::from);
            assert_eq!(128 * high + low, unit);
            assert!((-64..64).contains(&low) && (-127..=127).contains(&high), "{unit}");
        }
    }
}
