//! The plain loops as the compiler vectorises them for AVX2: they have one result, whatever their width.

use super::{Lift, Limits, scalar};
use crate::simd::codes::Pairs;
use crate::simd::dense::Part;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn above(part: Part<'_>, limits: Limits<'_>, exps: &mut [f32], masks: &mut [u16]) -> u16 {
    scalar::above(part, limits, exps, masks)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn lift(by: &Lift<'_>, logits: &mut [f32], tops: &mut [f32]) {
    scalar::lift(by, logits, tops);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weigh(heads: &[u16], logits: &[f32], shift: &[f32], out: (&mut [f32], &mut [f32])) {
    scalar::weigh(heads, logits, shift, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn best(pairs: &Pairs<'_>, logits: &[f32], norm: &[f32], out: (&mut [f32], &mut [f32])) {
    scalar::best(pairs, logits, norm, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sums(weights: &[f32], out: &mut [f32]) {
    scalar::sums(weights, out);
}
