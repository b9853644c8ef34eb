//! 512-bit version: one register holds one number of all sixteen tokens of a page.

use std::arch::x86_64::*;

use super::{Lift, Limits};
use crate::blocks::LANES;
use crate::simd::codes::Pairs;
use crate::simd::dense::{Part, avx512::exp};

#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32; LANES]) -> __m512 {
    // SAFETY: the array is 64 readable bytes; the load has no alignment requirement.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(x: &mut [f32; LANES], value: __m512) {
    // SAFETY: the array is 64 writable bytes; the store has no alignment requirement.
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), value) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn above(part: Part<'_>, limits: Limits<'_>, exps: &mut [f32], masks: &mut [u16]) -> u16 {
    let (rest, spread) = (&part.rest.as_chunks().0[0], &limits.spread.as_chunks().0[0]);
    let there = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(load(rest), _mm512_setzero_ps());
    let spread = load(spread);
    let mut any = 0;
    let rows = part.logits.as_chunks::<LANES>().0.iter().zip(exps.as_chunks_mut::<LANES>().0);
    for (((row, exps), mask), (&limit, &boost)) in
        rows.zip(masks.iter_mut()).zip(limits.limit.iter().zip(limits.boost))
    {
        let logit = _mm512_add_ps(load(row), _mm512_mul_ps(_mm512_set1_ps(boost), spread));
        *mask = _mm512_mask_cmp_ps_mask::<_CMP_GT_OQ>(there, logit, _mm512_set1_ps(limit));
        store(exps, _mm512_maskz_mov_ps(!*mask, load(exps)));
        any |= *mask;
    }
    any
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn lift(by: &Lift<'_>, logits: &mut [f32], tops: &mut [f32]) {
    let (rows, tops) = (logits.as_chunks_mut::<LANES>().0, tops.as_chunks_mut::<LANES>().0);
    for (i, (page, range)) in by.pairs.iter().enumerate() {
        // SAFETY: the scales are 32 readable bytes; the load has no alignment requirement.
        let scales = unsafe { _mm256_loadu_si256(by.scales[page as usize].as_ptr().cast()) };
        let scales = _mm512_cvtph_ps(scales);
        let squares = _mm512_mul_ps(scales, scales);
        for (&head, row) in by.pairs.heads[range.clone()].iter().zip(&mut rows[range]) {
            let head = usize::from(head);
            let base = by.page_logits[by.homes[i] as usize + head * LANES] - by.by[head] * by.of_page[i];
            let logit = _mm512_add_ps(load(row), _mm512_set1_ps(base));
            let logit = _mm512_add_ps(logit, _mm512_mul_ps(_mm512_set1_ps(by.spread[head]), squares));
            let logit = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), by.left[i], logit);
            store(row, logit);
            // The first operand is returned only where it is greater, as in the definition.
            let top = _mm512_max_ps(logit, load(&tops[head]));
            store(&mut tops[head], top);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn weigh(heads: &[u16], logits: &[f32], shift: &[f32], (weights, sums): (&mut [f32], &mut [f32])) {
    let rows = logits.as_chunks::<LANES>().0.iter().zip(weights.as_chunks_mut::<LANES>().0);
    let sums = sums.as_chunks_mut::<LANES>().0;
    for (&head, (row, weights)) in heads.iter().zip(rows) {
        let (shift, sum) = (shift[usize::from(head)], &mut sums[usize::from(head)]);
        let below = _mm512_sub_ps(load(row), _mm512_set1_ps(shift));
        let weight = exp(_mm512_min_ps(below, _mm512_setzero_ps()));
        store(weights, weight);
        store(sum, _mm512_add_ps(load(sum), weight));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn best(pairs: &Pairs<'_>, logits: &[f32], norm: &[f32], (best, tops): (&mut [f32], &mut [f32])) {
    let (rows, best) = (logits.as_chunks::<LANES>().0, best.as_chunks_mut::<LANES>().0);
    for (((_, range), best), top) in pairs.iter().zip(best).zip(tops) {
        let mut most = _mm512_set1_ps(f32::NEG_INFINITY);
        for (&head, row) in pairs.heads[range.clone()].iter().zip(&rows[range]) {
            most = _mm512_max_ps(_mm512_sub_ps(load(row), _mm512_set1_ps(norm[usize::from(head)])), most);
        }
        store(best, most);
        *top = _mm512_reduce_max_ps(most);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn sums(weights: &[f32], out: &mut [f32]) {
    for (row, out) in weights.as_chunks::<LANES>().0.iter().zip(out) {
        let x = load(row);
        let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        *out = _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
}
