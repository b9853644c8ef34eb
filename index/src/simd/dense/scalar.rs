//! The plain version of every dense primitive: the definition of its bits.

use super::{EXP_MIN, EXP_POLY, LN2_HIGH, LN2_LOW, LOGIT_MAX, Part, Scales};
use crate::blocks::LANES;
use crate::quant::{QUAD, QuantQuery};

pub(super) fn logits(keys: &[u8], scales: Scales<'_>, q: &QuantQuery, out: &mut [f32]) {
    let rows = 2 * q.group;
    for (h, out) in out.chunks_exact_mut(LANES).enumerate() {
        for (lane, out) in out.iter_mut().enumerate() {
            let mut dot = [0i32; 2];
            for (quad, codes) in keys.chunks_exact(LANES * QUAD).enumerate() {
                let codes = &codes[lane * QUAD..][..QUAD];
                for (part, sum) in dot.iter_mut().enumerate() {
                    let word = q.words[quad * rows + part * q.group + h].to_le_bytes();
                    for (&code, &byte) in codes.iter().zip(&word) {
                        *sum += i32::from(code) * i32::from(byte as i8);
                    }
                }
            }
            let high = (dot[0] - q.offset[h]) as f32;
            let low = (dot[1] - q.offset[q.group + h]) as f32;
            let whole = high * 256.0 + low;
            let logit = whole * (q.unit[h] * scales.key[lane]) + q.spread[h] * scales.spread[lane];
            // Written so that NaN (infinity times zero) is cut as well, as the vector minimum does.
            let logit = if logit < LOGIT_MAX { logit } else { LOGIT_MAX };
            *out = if logit > -LOGIT_MAX { logit } else { -LOGIT_MAX };
        }
    }
}

pub(super) fn dots(keys: &[u8], rows: &[i8], out: &mut [i32]) {
    let stride = keys.len() / LANES;
    for (row, out) in rows.chunks_exact(stride).zip(out.chunks_exact_mut(LANES)) {
        out.fill(0);
        for (codes, word) in keys.chunks_exact(LANES * QUAD).zip(row.chunks_exact(QUAD)) {
            for (out, codes) in out.iter_mut().zip(codes.chunks_exact(QUAD)) {
                *out += codes.iter().zip(word).map(|(&c, &x)| i32::from(c) * i32::from(x)).sum::<i32>();
            }
        }
    }
}

/// `exp(x)` for `x <= 0`: Cody-Waite reduction and a polynomial.
#[inline(always)]
pub(in crate::simd) fn exp(x: f32) -> f32 {
    if x < EXP_MIN {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_HIGH, x);
    let r = n.mul_add(-LN2_LOW, r);
    let p = EXP_POLY[1..].iter().fold(EXP_POLY[0], |p, &c| p.mul_add(r, c));
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

pub(super) fn maxima(logits: &[f32], rest: &[f32], max: &mut [f32]) {
    let group = max.len();
    for (rows, rest) in logits.chunks_exact(group * LANES).zip(rest.chunks_exact(LANES)) {
        for (max, row) in max.iter_mut().zip(rows.chunks_exact(LANES)) {
            for (&l, &r) in row.iter().zip(rest) {
                if r > 0.0 && l > *max {
                    *max = l;
                }
            }
        }
    }
}

pub(super) fn masses(logits: &[f32], rest: &[f32], max: &[f32], sums: &mut [f32]) {
    for (rows, rest) in logits.chunks_exact(max.len() * LANES).zip(rest.chunks_exact(LANES)) {
        for ((sums, row), &max) in sums.chunks_exact_mut(LANES).zip(rows.chunks_exact(LANES)).zip(max) {
            for ((s, &l), &r) in sums.iter_mut().zip(row).zip(rest) {
                *s += r * exp((l - max).min(0.0));
            }
        }
    }
}

pub(super) fn rank(part: Part<'_>, norm: &[f32], threshold: f32, best: &mut [f32; LANES]) -> u16 {
    best.fill(f32::NEG_INFINITY);
    for (row, &norm) in part.logits.chunks_exact(LANES).zip(norm) {
        for (b, &l) in best.iter_mut().zip(row) {
            *b = b.max(l - norm);
        }
    }
    let lanes = best.iter().zip(part.rest).enumerate();
    lanes.map(|(lane, (&b, &r))| u16::from(r > 0.0 && b > threshold) << lane).sum()
}

pub(super) fn exps((logits, rest): (&[f32], &[f32]), max: &[f32], (exps, sums): (&mut [f32], &mut [f32])) {
    let size = max.len() * LANES;
    for ((rows, exps), rest) in
        logits.chunks_exact(size).zip(exps.chunks_exact_mut(size)).zip(rest.chunks_exact(LANES))
    {
        let heads = rows.chunks_exact(LANES).zip(exps.chunks_exact_mut(LANES)).zip(max);
        for (((row, exps), &max), sums) in heads.zip(sums.chunks_exact_mut(LANES)) {
            for (((s, &l), &r), e) in sums.iter_mut().zip(row).zip(rest).zip(exps) {
                *e = exp((l - max).min(0.0));
                *s += r * *e;
            }
        }
    }
}

#[inline(always)]
pub(super) fn weigh(exps: &[f32], (rest, scales): (&[f32], &[f32]), weights: &mut [f32], sums: &mut [f32]) {
    let rows = exps.as_chunks::<LANES>().0.iter().zip(weights.as_chunks_mut::<LANES>().0);
    for ((exps, weights), sums) in rows.zip(sums.as_chunks_mut::<LANES>().0) {
        for lane in 0..LANES {
            let weight = exps[lane] * rest[lane];
            sums[lane] += weight;
            weights[lane] = weight * scales[lane];
        }
    }
}

pub(super) fn accumulate(values: &[i8], weights: &[f32], out: &mut [f32]) {
    let dim = values.len() / LANES;
    for (row, out) in weights.chunks_exact(LANES).zip(out.chunks_exact_mut(dim)) {
        for (&w, codes) in row.iter().zip(values.chunks_exact(dim)) {
            for (o, &code) in out.iter_mut().zip(codes) {
                *o = w.mul_add(f32::from(code), *o);
            }
        }
    }
}
