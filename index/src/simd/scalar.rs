//! The plain version of every primitive: what the vector versions are tested against, bit for bit.

use crate::blocks::LANES;
use crate::quant::{QUAD, QuantQuery};

/// Logits are cut here so that an absurd but finite key cannot turn into infinity minus infinity.
pub(crate) const LOGIT_MAX: f32 = 1e30;

/// See `Isa::logits`.
pub(crate) fn logits(keys: &[u8], scales: &[f32], q: &QuantQuery, out: &mut [f32]) {
    let rows = 2 * q.group;
    for h in 0..q.group {
        for lane in 0..LANES {
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
            let logit = whole * (q.unit[h] * scales[lane]);
            out[h * LANES + lane] = logit.clamp(-LOGIT_MAX, LOGIT_MAX);
        }
    }
}

/// `exp(x)` for `x <= 0`, zero below -87: Cody-Waite reduction and a degree-6 Taylor polynomial, error below 2 ulp.
pub(crate) fn exp(x: f32) -> f32 {
    if x < EXP_MIN {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_HIGH, x);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = EXP_POLY[0];
    for &c in &EXP_POLY[1..] {
        p = p.mul_add(r, c);
    }
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// Below this `exp` would be subnormal.
pub(crate) const EXP_MIN: f32 = -87.0;
/// ln 2 with few bits, so that its product with an exponent is exact.
pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
/// What `LN2_HIGH` leaves out.
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
/// Taylor coefficients of exp, highest power first.
pub(crate) const EXP_POLY: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// See `Isa::weigh`.
pub(crate) fn weigh(logits: &[f32], rest: &[f32], max: f32, weights: &mut [f32]) {
    for ((w, &l), &r) in weights.iter_mut().zip(logits).zip(rest) {
        *w = r * exp((l - max).min(0.0));
    }
}

/// See `Isa::accumulate`.
pub(crate) fn accumulate(values: &[i8], weights: &[f32], out: &mut [f32]) {
    let dim = values.len() / LANES;
    for (row, out) in weights.chunks_exact(LANES).zip(out.chunks_exact_mut(dim)) {
        for (&w, codes) in row.iter().zip(values.chunks_exact(dim)) {
            for (o, &code) in out.iter_mut().zip(codes) {
                *o = w.mul_add(f32::from(code), *o);
            }
        }
    }
}
