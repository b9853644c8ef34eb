//! 512-bit version: one register holds one number of all sixteen tokens of a page.

use std::arch::x86_64::*;

use super::{Lift, Limits, RISE_MAX};
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
pub(super) fn above(
    part: Part<'_>,
    limits: Limits<'_>,
    masks: &mut [u16],
    (exps, sums): (&mut [f32], &mut [f32]),
) -> u16 {
    let (rest, reach) = (&part.rest.as_chunks().0[0], &limits.reach.as_chunks().0[0]);
    let (rest, reach) = (load(rest), load(reach));
    let there = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(rest, _mm512_setzero_ps());
    let mut any = 0;
    let rows = part.logits.as_chunks::<LANES>().0.iter().zip(exps.as_chunks_mut::<LANES>().0);
    let rows = rows.zip(sums.as_chunks_mut::<LANES>().0);
    for ((((row, exps), sums), mask), (&limit, &boost)) in
        rows.zip(masks.iter_mut()).zip(limits.limit.iter().zip(limits.boost))
    {
        let logit = _mm512_add_ps(load(row), _mm512_mul_ps(_mm512_set1_ps(boost), reach));
        *mask = _mm512_mask_cmp_ps_mask::<_CMP_GT_OQ>(there, logit, _mm512_set1_ps(limit));
        let kept = _mm512_maskz_mov_ps(!*mask, load(exps));
        store(exps, kept);
        store(sums, _mm512_add_ps(load(sums), _mm512_mul_ps(kept, rest)));
        any |= *mask;
    }
    any
}

/// `exp(min(x, RISE_MAX))`
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn weight(x: __m512) -> __m512 {
    exp(_mm512_min_ps(x, _mm512_set1_ps(RISE_MAX)))
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn lift(
    by: &Lift<'_>,
    (logits, weights): (&mut [f32], &mut [f32]),
    (tops, sums): (&mut [f32], &mut [f32]),
) {
    let (rows, weights) = (logits.as_chunks_mut::<LANES>().0, weights.as_chunks_mut::<LANES>().0);
    let (tops, sums) = (tops.as_chunks_mut::<LANES>().0, sums.as_chunks_mut::<LANES>().0);
    for (i, (page, range)) in by.pairs.iter().enumerate() {
        // SAFETY: the scales are 32 readable bytes; the load has no alignment requirement.
        let scales = unsafe { _mm256_loadu_si256(by.scales[page as usize].as_ptr().cast()) };
        let scales = _mm512_cvtph_ps(scales);
        let squares = _mm512_mul_ps(scales, scales);
        let (home, of_page, left) = (by.homes[i] as usize, by.of_page[i], by.left[i]);
        let tokens = rows[range.clone()].iter_mut().zip(&mut weights[range.clone()]);
        for (&head, (row, weights)) in by.pairs.heads[range].iter().zip(tokens) {
            let head = usize::from(head);
            let base = by.page_logits[home + head * LANES] - by.by[head] * of_page;
            let logit = _mm512_add_ps(load(row), _mm512_set1_ps(base));
            let logit = _mm512_add_ps(logit, _mm512_mul_ps(_mm512_set1_ps(by.spread[head]), squares));
            let logit = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), left, logit);
            store(row, logit);
            // The first operand is returned only where it is greater, as in the definition.
            let top = _mm512_max_ps(logit, load(&tops[head]));
            store(&mut tops[head], top);
            let weight = weight(_mm512_sub_ps(logit, _mm512_set1_ps(by.shift[head])));
            store(weights, weight);
            let sum = _mm512_add_ps(load(&sums[head]), weight);
            store(&mut sums[head], sum);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn weigh(heads: &[u16], logits: &[f32], shift: &[f32], weights: &mut [f32]) {
    let rows = logits.as_chunks::<LANES>().0.iter().zip(weights.as_chunks_mut::<LANES>().0);
    for (&head, (row, weights)) in heads.iter().zip(rows) {
        let below = _mm512_sub_ps(load(row), _mm512_set1_ps(shift[usize::from(head)]));
        store(weights, weight(below));
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
