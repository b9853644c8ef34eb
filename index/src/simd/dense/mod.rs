//! Dense primitives over blocks of sixteen summaries: logits, exponentials, weighted sums of values.
//!
//! `scalar` is the definition. Dot products are integer sums and every floating-point step is the same IEEE operation in the
//! same order on each instruction set, so results are **bit-identical** everywhere.

mod scalar;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;

pub(super) use scalar::exp;

use super::isa::Isa;
use crate::blocks::LANES;
use crate::quant::QuantQuery;

/// Logits are cut here so that an absurd but finite key cannot turn into infinity minus infinity.
const LOGIT_MAX: f32 = 1e30;

/// Below this `exp` would be subnormal; it is taken as zero.
const EXP_MIN: f32 = -87.0;
/// ln 2 with few bits, so that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
/// What `LN2_HIGH` leaves out.
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Taylor coefficients of exp, highest power first: relative error below 2e-7 for |x| <= ln(2) / 2.
const EXP_POLY: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

macro_rules! dispatch {
    ($isa:expr, $name:ident($($arg:expr),*)) => {
        match $isa {
            Isa::Scalar => scalar::$name($($arg),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value proves that the CPU has AVX2 and FMA, which is all that the callee enables.
            Isa::Avx2(_) => unsafe { avx2::$name($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value proves that the CPU has AVX-512 F, BW, DQ, VL and VNNI, which is all that the callee enables.
            Isa::Avx512(_) => unsafe { avx512::$name($($arg),*) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2(_) | Isa::Avx512(_) => scalar::$name($($arg),*),
        }
    };
}

/// Logits `out` `[group, 16]` of one block: `keys` `[quads, 16, 4]` codes, their scale times the query plus the query's share of
/// the spread.
pub(crate) fn logits(isa: Isa, keys: &[u8], scales: Scales<'_>, q: &QuantQuery, out: &mut [f32]) {
    assert_eq!(keys.len() * 2 * q.group, q.words.len() * LANES * 4, "quads of the block and the query");
    assert_eq!((scales.key.len(), scales.spread.len()), (LANES, LANES), "one block");
    assert_eq!(out.len(), q.group * LANES, "one block");
    dispatch!(isa, logits(keys, scales, q, out));
}

/// Integer dot products `out` `[rows, 16]` of up to any number of signed rows `[rows, stride]` with the unsigned codes `keys`
/// `[stride / 4, 16, 4]`.
pub(crate) fn dots(isa: Isa, keys: &[u8], rows: &[i8], out: &mut [i32]) {
    let stride = keys.len() / LANES;
    assert_eq!(rows.len() * LANES, out.len() * stride, "rows of the block's dimension");
    dispatch!(isa, dots(keys, rows, out));
}

/// `max[h] = max(max[h], logits[p, h, lane])` over all parts `p` and lanes with `rest[p, lane] > 0`: `logits` `[parts, group, 16]`,
/// `rest` `[parts, 16]`, `max` `[group]`.
pub(crate) fn maxima(isa: Isa, logits: &[f32], rest: &[f32], max: &mut [f32]) {
    assert_eq!(logits.len(), rest.len() * max.len(), "logits of all parts");
    dispatch!(isa, maxima(logits, rest, max));
}

/// `sums[h, lane] += rest[p, lane] * exp(min(logits[p, h, lane] - max[h], 0))` over all parts, in their order: `sums` `[group, 16]`.
pub(crate) fn masses(isa: Isa, logits: &[f32], rest: &[f32], max: &[f32], sums: &mut [f32]) {
    assert_eq!(logits.len(), rest.len() * max.len(), "logits of all parts");
    assert_eq!(sums.len(), max.len() * LANES, "sums by head");
    dispatch!(isa, masses(logits, rest, max, sums));
}

/// `best[lane] = max_h(logits[h, lane] - norm[h])` of one part; returns the lanes with `rest > 0` whose best is above `threshold`.
pub(crate) fn rank(isa: Isa, part: Part<'_>, norm: &[f32], threshold: f32, best: &mut [f32; LANES]) -> u16 {
    assert_eq!((part.logits.len(), part.rest.len()), (norm.len() * LANES, LANES), "one part");
    dispatch!(isa, rank(part, norm, threshold, best))
}

/// `exps[p, h, lane] = exp(min(logits[p, h, lane] - max[h], 0))` of all parts, and `sums` as `masses` gives them.
pub(crate) fn exps(
    isa: Isa,
    (logits, rest): (&[f32], &[f32]),
    max: &[f32],
    (exps, sums): (&mut [f32], &mut [f32]),
) {
    assert_eq!((logits.len(), exps.len()), (rest.len() * max.len(), logits.len()), "logits of all parts");
    assert_eq!(sums.len(), max.len() * LANES, "sums by head");
    dispatch!(isa, exps((logits, rest), max, (exps, sums)));
}

/// Of one part: `weights[h, lane] = exps[h, lane] * rest[lane]`, added to `sums[h, lane]`, then times `scales[lane]`; `exps`, `weights` and
/// `sums` `[group, 16]`, `rest` and `scales` `[16]`.
pub(crate) fn weigh(
    isa: Isa,
    exps: &[f32],
    (rest, scales): (&[f32], &[f32]),
    weights: &mut [f32],
    sums: &mut [f32],
) {
    assert_eq!((weights.len(), sums.len()), (exps.len(), exps.len()), "one part");
    assert_eq!((rest.len(), scales.len()), (LANES, LANES), "one part");
    dispatch!(isa, weigh(exps, (rest, scales), weights, sums));
}

/// `out[h, d] += sum_e weights[h, e] * values[e, d]` in the order of `e`: `values` `[16, dim]` codes, `weights` `[group, 16]`, `out`
/// `[group, dim]`.
pub(crate) fn accumulate(isa: Isa, values: &[i8], weights: &[f32], out: &mut [f32]) {
    assert_eq!(values.len() * weights.len(), out.len() * LANES * LANES, "one block");
    dispatch!(isa, accumulate(values, weights, out));
}

/// Numbers by entry that go with a block's key codes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scales<'a> {
    /// `[16]` value of a code's unit.
    pub key: &'a [f32],
    /// `[16]` mean squared deviation of the keys that the entry stands for.
    pub spread: &'a [f32],
}

/// One block of the frontier as the kernels read it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'a> {
    /// `[group, 16]`
    pub logits: &'a [f32],
    /// `[16]`
    pub rest: &'a [f32],
}
