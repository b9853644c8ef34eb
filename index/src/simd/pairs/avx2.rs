//! The plain loops as the compiler vectorises them for AVX2: they have one result, whatever their width.

use super::{Lift, Limits, scalar};
use crate::simd::codes::Pairs;
use crate::simd::dense::Part;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn above(
    part: Part<'_>,
    limits: Limits<'_>,
    masks: &mut [u16],
    of_part: (&mut [f32], &mut [f32]),
) -> u16 {
    scalar::above(part, limits, masks, of_part)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn lift(by: &Lift<'_>, tokens: (&mut [f32], &mut [f32]), heads: (&mut [f32], &mut [f32])) {
    scalar::lift(by, tokens, heads);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weigh(heads: &[u16], logits: &[f32], shift: &[f32], weights: &mut [f32]) {
    scalar::weigh(heads, logits, shift, weights);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn best(pairs: &Pairs<'_>, logits: &[f32], norm: &[f32], out: (&mut [f32], &mut [f32])) {
    scalar::best(pairs, logits, norm, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sums(weights: &[f32], out: &mut [f32]) {
    scalar::sums(weights, out);
}
