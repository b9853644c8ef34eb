//! Twins of the passes over summaries and sketches of one item: token scores, selection, the tail with value codes.

use half::f16;

use super::scan::{HostSketches, log_sum_exp, select_by};
use crate::KvElem;
use crate::twin::StateF64;

/// The rotation of sketches.
#[derive(Debug, Clone, Copy)]
pub struct HostRotation<'a> {
    /// [rounds, dim] sign / sqrt(block).
    pub signs: &'a [f32],
    /// `[dim]` what coordinate `i` takes before the second round; empty with one round.
    pub order: &'a [u32],
}

/// Start and length of the powers of two that sum to `dim`, largest first.
fn blocks(dim: usize) -> Vec<(usize, usize)> {
    let mut start = 0;
    (0..usize::BITS)
        .rev()
        .map(|bit| 1usize << bit)
        .filter(|len| dim & len != 0)
        .map(|len| {
            start += len;
            (start - len, len)
        })
        .collect()
}

/// Walsh-Hadamard transform of each block, by definition.
fn transform(x: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for (start, len) in blocks(x.len()) {
        for i in 0..len {
            y[start + i] = (0..len)
                .map(|j| if (i & j).count_ones() % 2 == 0 { x[start + j] } else { -x[start + j] })
                .sum();
        }
    }
    y
}

impl HostRotation<'_> {
    fn dim(&self) -> usize {
        if self.order.is_empty() { self.signs.len() } else { self.order.len() }
    }

    fn multiply(&self, round: usize, x: &mut [f64]) {
        let signs = &self.signs[round * x.len()..];
        x.iter_mut().zip(signs).for_each(|(x, sign)| *x *= f64::from(*sign));
    }

    /// The rotated vector.
    pub fn rotate(&self, x: &[f64]) -> Vec<f64> {
        let mut x = x.to_vec();
        self.multiply(0, &mut x);
        x = transform(&x);
        if !self.order.is_empty() {
            x = self.order.iter().map(|&from| x[from as usize]).collect();
            self.multiply(1, &mut x);
            x = transform(&x);
        }
        x
    }

    /// Undoes [`HostRotation::rotate`].
    pub fn rotate_back(&self, x: &[f64]) -> Vec<f64> {
        let mut x = x.to_vec();
        if !self.order.is_empty() {
            x = transform(&x);
            self.multiply(1, &mut x);
            let mut y = vec![0.0; x.len()];
            for (x, &to) in x.iter().zip(self.order) {
                y[to as usize] = *x;
            }
            x = y;
        }
        x = transform(&x);
        self.multiply(0, &mut x);
        x
    }
}

/// Scores of an item: pages' [group, pages], what tokens add [group, 16 pages], log-sum-exp of all tokens `[group]`.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScoresF64 {
    /// `q.mean_key * scale`, -inf where no token counts.
    pub scores: Vec<f64>,
    /// -inf where the token does not count.
    pub residuals: Vec<f64>,
    /// Over score + residual.
    pub lse: Vec<f64>,
    /// `[group]` value of one unit of the query's eight bits.
    pub steps: Vec<f64>,
}

/// `q` [group, head_dim] with its scale, `keys` [pages, head_dim]. The rotated, scaled query is rounded to 127 steps either way.
pub fn token_scores<E: KvElem>(
    (q, scale): (&[E], f32),
    keys: &[E],
    sketches: &HostSketches<'_>,
    rotation: &HostRotation<'_>,
    spread: f32,
) -> TokenScoresF64 {
    let (pages, d) = (sketches.masks.len(), rotation.dim());
    let (scale, wide) = (f64::from(scale), |x: &E| f64::from(x.to_f32()));
    let mut result =
        TokenScoresF64 { scores: Vec::new(), residuals: Vec::new(), lse: Vec::new(), steps: Vec::new() };
    for q in q.chunks(d) {
        let scaled: Vec<f64> = q.iter().map(|x| wide(x) * scale).collect();
        let rotated = rotation.rotate(&scaled);
        let step = rotated.iter().fold(0.0f64, |most, x| most.max(x.abs())) / 127.0;
        let rounded: Vec<f64> = rotated
            .iter()
            .map(|x| if step > 0.0 { (x / step).round_ties_even() * step } else { 0.0 })
            .collect();
        let square: f64 = rotated.iter().map(|x| x * x).sum();
        let mut tokens = Vec::with_capacity(pages * 16);
        for (page, key) in keys.chunks(d).enumerate() {
            let dot: f64 = q.iter().zip(key).map(|(q, k)| wide(q) * wide(k)).sum();
            let none = sketches.masks[page] == 0;
            let score = if none { f64::NEG_INFINITY } else { dot * scale };
            result.scores.push(score);
            for token in 16 * page..16 * page + 16 {
                let k = f64::from(sketches.scales[token].to_f32());
                let dot: f64 = rounded.iter().enumerate().map(|(i, q)| q * sketches.level(token, i, d)).sum();
                let counts = sketches.masks[page] >> (token % 16) & 1 == 1;
                let residual =
                    if counts { k * dot + f64::from(spread) * square * k * k } else { f64::NEG_INFINITY };
                result.residuals.push(residual);
                tokens.push(score + residual);
            }
        }
        result.lse.push(log_sum_exp(&tokens));
        result.steps.push(step);
    }
    result
}

/// Units of the best keys, at most `budget`, as `select_by` ranks them, keys from -31.5 to 0.5 nats.
pub fn select_units(scores: &[f32], lse: &[f32], budget: usize) -> Vec<u32> {
    select_by(scores, lse, budget, -31.5)
}

/// Value sketches of an item's tokens.
#[derive(Debug, Clone, Copy)]
pub struct HostValues<'a> {
    /// 1 or 2.
    pub bits: usize,
    /// [pages, bits, head_dim / 32, 16].
    pub lines: &'a [u32],
    /// [pages, 16].
    pub scales: &'a [f16],
}

impl HostValues<'_> {
    /// Level of coordinate `i` of a token.
    pub fn level(&self, token: usize, i: usize, d: usize) -> f64 {
        let (t, l) = (token % 16, i % 32);
        // Byte t / 4 of the word of coordinate l % 16; bit t % 4, or 4 + t % 4 for the upper sixteen coordinates.
        let shift = 8 * (t / 4) + t % 4 + 4 * (l / 16);
        let bit = |plane: usize| {
            let line = (token / 16 * self.bits + plane) * (d / 32) + i / 32;
            self.lines[line * 16 + l % 16] >> shift & 1
        };
        let code = (0..self.bits).fold(0, |code, plane| 2 * code + bit(plane));
        2.0 * f64::from(code) - f64::from((1u32 << self.bits) - 1)
    }
}

/// State of weighted tokens: `weights` [group, 16 pages] relative to `lse` `[group]`, `values` [pages, head_dim] page means, to which
/// each token adds its own residual if there are `codes`.
pub fn tail<E: KvElem>(
    weights: &[f64],
    lse: &[f64],
    values: &[E],
    codes: Option<(&HostValues<'_>, &HostRotation<'_>)>,
) -> StateF64 {
    let tokens = weights.len().checked_div(lse.len()).unwrap_or(0);
    let d = (values.len() * 16).checked_div(tokens).unwrap_or(0);
    let mut state = StateF64 { out: vec![0.0; lse.len() * d], lse: vec![f64::NEG_INFINITY; lse.len()] };
    for (head, lse) in lse.iter().enumerate() {
        let weights = &weights[head * tokens..(head + 1) * tokens];
        let sum: f64 = weights.iter().sum();
        if sum <= 0.0 {
            continue;
        }
        state.lse[head] = lse + sum.ln();
        let mut rest = vec![0.0; d];
        let out = &mut state.out[head * d..(head + 1) * d];
        for (token, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            for (o, v) in out.iter_mut().zip(&values[token / 16 * d..]) {
                *o += weight / sum * f64::from(v.to_f32());
            }
            if let Some((codes, _)) = codes {
                let scale = weight / sum * f64::from(codes.scales[token].to_f32());
                rest.iter_mut().enumerate().for_each(|(i, x)| *x += scale * codes.level(token, i, d));
            }
        }
        if let Some((_, rotation)) = codes {
            out.iter_mut().zip(rotation.rotate_back(&rest)).for_each(|(o, x)| *o += x);
        }
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_lengths_and_is_undone() {
        let signs = |dim: usize, rounds: usize| -> Vec<f32> {
            (0..rounds)
                .flat_map(|round| {
                    blocks(dim).into_iter().flat_map(move |(_, len)| {
                        (0..len).map(move |i| {
                            let size = 1.0 / (len as f32).sqrt();
                            if (i * 7 + round) % 3 == 0 { -size } else { size }
                        })
                    })
                })
                .collect()
        };
        for (dim, order) in [(64, vec![]), (96, (0..96).map(|i| (i * 5 + 7) % 96).collect::<Vec<u32>>())] {
            let signs = signs(dim, if order.is_empty() { 1 } else { 2 });
            let rotation = HostRotation { signs: &signs, order: &order };
            let x: Vec<f64> = (0..dim).map(|i| (i as f64 * 0.7).sin()).collect();
            let y = rotation.rotate(&x);
            let square = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
            assert!((square(&x) - square(&y)).abs() < 1e-5 * square(&x), "{dim}");
            for (a, b) in rotation.rotate_back(&y).iter().zip(&x) {
                assert!((a - b).abs() < 1e-5, "{dim}: {a} is not {b}");
            }
        }
    }

    #[test]
    fn value_line_of_one_token_sets_its_bit_alone() {
        // Coordinate 16 + 3 of line 1, token 9: byte 2, bit 4 + 1 of word 3.
        let mut lines = vec![0u32; 2 * 16];
        lines[16 + 3] = 1 << (8 * 2 + 4 + 1);
        let scales = [f16::ONE; 16];
        let codes = HostValues { bits: 1, lines: &lines, scales: &scales };
        for token in 0..16 {
            for i in 0..64 {
                let want = if (token, i) == (9, 32 + 16 + 3) { 1.0 } else { -1.0 };
                assert_eq!(codes.level(token, i, 64), want, "token {token} coordinate {i}");
            }
        }
    }
}
