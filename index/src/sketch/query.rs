//! Queries as the score kernel reads them.

use super::Sketch;
use crate::index::Query;
use crate::simd::Isa;
use crate::simd::codes::{self, BYTE_MAX, LINE_DIMS, QUAD_MAX, QueryCodes, TWO_DIGITS_MAX, Table, digits};

/// A group of rotated, rounded queries; reusable, allocates only while it grows.
///
/// Each head's rotated query is rounded to multiples of a step. For codes of one and two bits the step is 1/127 of the
/// largest magnitude or, where that is more, 1/253 of the largest sum of four neighbouring magnitudes; for four bits 1/16319 of the
/// largest magnitude. The score of a token with scale `h` is off by at most `h * step / 2 * sum_d |level_d|` from the dot product
/// with its decoded residual; against Gaussian queries the rounding adds less than .06 % to the energy of the codes' own error.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PreparedQuery {
    pub(super) codes: QueryCodes,
    rotated: Vec<f32>,
    units: Vec<i32>,
    bytes: Vec<i8>,
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
        let PreparedQuery { codes, rotated, units, bytes } = to;
        codes.bits = planes;
        codes.group = query.group;
        codes.lines = padded / LINE_DIMS;
        codes.offsets.clear();
        codes.steps.clear();
        rotated.clear();
        rotated.resize(query.group * padded, 0.0);
        units.clear();
        let looks_up = codes::looks_up(self.isa, planes);
        for (row, q) in rotated.chunks_exact_mut(padded).zip(query.q.chunks_exact(self.dim())) {
            let used = &mut row[..q.len()];
            used.copy_from_slice(q);
            self.rotation.apply(used);
            used.iter_mut().for_each(|x| *x *= query.scale);
            let step = step_of(row, digits(planes));
            codes.steps.push(step * scale_of_prefix(stored, planes));
            let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
            let from = units.len();
            units.extend(row.iter().map(|x| nearest(x * inverse)));
            let units = &units[from..];
            codes.offsets.push(if looks_up {
                units.iter().map(|u| u.abs()).sum()
            } else {
                units.iter().sum()
            });
        }
        codes.words.clear();
        codes.tables.clear();
        if looks_up {
            bytes.clear();
            bytes.extend(units.iter().map(|unit| *unit as i8));
            fill_tables(self.isa, bytes, codes);
        } else {
            fill_words(units, codes);
        }
    }
}

/// The step that a head's rotated query (a multiple of 32 coordinates) is rounded to; zero for a query too small to have one.
fn step_of(row: &[f32], digits: usize) -> f32 {
    // Eight running maxima, so that a step of the loop does not wait for the one before.
    let (mut most, mut quads) = ([0.0f32; 8], [0.0f32; 8]);
    let greater = |a: f32, b: f32| if a > b { a } else { b };
    for block in row.as_chunks::<LINE_DIMS>().0 {
        for (lane, quad) in block.as_chunks::<4>().0.iter().enumerate() {
            let [a, b, c, d] = quad.map(f32::abs);
            most[lane] = greater(greater(greater(a, b), greater(c, d)), most[lane]);
            quads[lane] = greater((a + b) + (c + d), quads[lane]);
        }
    }
    let (most, quad) = (most.into_iter().fold(0.0, greater), quads.into_iter().fold(0.0, greater));
    let step = if digits == 2 {
        most / TWO_DIGITS_MAX as f32
    } else {
        greater(most / BYTE_MAX as f32, quad / QUAD_MAX as f32)
    };
    // Below this the inverse leaves the range of f32.
    if step < 1e-30 { 0.0 } else { step }
}

/// Nearest integer, ties to even, of a magnitude below 2^22, without the library call that `round_ties_even` is on baseline x86-64:
/// beside 1.5 * 2^23 the last bit of an f32 counts one.
fn nearest(x: f32) -> i32 {
    const BESIDE: f32 = 12_582_912.0;
    (x + BESIDE).to_bits() as i32 - BESIDE.to_bits() as i32
}

fn fill_tables(isa: Isa, bytes: &[i8], codes: &mut QueryCodes) {
    let lines = codes.lines;
    codes.tables.resize(2 * lines * codes.group, Table([0; 64]));
    for (tables, bytes) in codes.tables.chunks_exact_mut(2 * lines).zip(bytes.chunks_exact(lines * LINE_DIMS))
    {
        codes::tables(isa, bytes, |line, nibble, table| tables[2 * line + nibble] = table);
    }
}

fn fill_words(units: &[i32], codes: &mut QueryCodes) {
    let digits = digits(codes.bits);
    for units in units.as_chunks::<LINE_DIMS>().0 {
        for digit in (0..digits).rev() {
            for bit in 0..8 {
                let byte = |i: usize| {
                    let unit = units[8 * i + bit];
                    if digits == 1 { unit as i8 } else { split(unit)[digit] }
                };
                codes.words.push(i32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)].map(|b| b as u8)));
            }
        }
    }
}

/// Low digit in -64..64 and high digit, `unit = 128 high + low`.
fn split(unit: i32) -> [i8; 2] {
    let high = (unit + 64) >> 7;
    [(unit - 128 * high) as i8, high as i8]
}

#[cfg(test)]
mod tests {
    use super::{TWO_DIGITS_MAX, split};

    #[test]
    fn digits_of_every_unit_fit_and_sum_to_it() {
        for unit in -TWO_DIGITS_MAX..=TWO_DIGITS_MAX {
            let [low, high] = split(unit).map(i32::from);
            assert_eq!(128 * high + low, unit);
            assert!((-64..64).contains(&low) && (-127..=127).contains(&high), "{unit}");
        }
    }
}
