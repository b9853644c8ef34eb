//! 256-bit version: two registers hold one number of all sixteen entries.

use std::arch::x86_64::*;

use super::{EXP_MIN, EXP_POLY, LN2_HIGH, LN2_LOW, LOGIT_MAX, Part, Scales, scalar};
use crate::blocks::LANES;
use crate::quant::{QUAD, QuantQuery};

/// Bytes of a quad.
const LINE: usize = LANES * QUAD;
/// Entries of a register.
const HALF: usize = 8;

#[target_feature(enable = "avx2,fma")]
fn load(x: &[f32], half: usize) -> __m256 {
    assert!(x.len() >= (half + 1) * HALF);
    // SAFETY: eight f32 are there.
    unsafe { _mm256_loadu_ps(x.as_ptr().add(half * HALF)) }
}

#[target_feature(enable = "avx2,fma")]
fn store(x: &mut [f32], half: usize, v: __m256) {
    assert!(x.len() >= (half + 1) * HALF);
    // SAFETY: room for eight f32 is there.
    unsafe { _mm256_storeu_ps(x.as_mut_ptr().add(half * HALF), v) }
}

/// Sums of products of the sixteen entries' codes with one signed row: `word(quad)` gives four bytes of it.
#[target_feature(enable = "avx2,fma")]
fn dot_line(keys: &[u8], word: impl Fn(usize) -> i32) -> [__m256i; 2] {
    // Each register collects two partial sums for four entries; bytes times bytes fit 16 x 16 -> 32 bits exactly.
    let mut sums = [_mm256_setzero_si256(); 4];
    for (quad, line) in keys.chunks_exact(LINE).enumerate() {
        let word = _mm256_cvtepi8_epi16(_mm_set1_epi32(word(quad)));
        for (sum, codes) in sums.iter_mut().zip(line.chunks_exact(LANES)) {
            // SAFETY: a chunk of sixteen bytes.
            let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
            let products = _mm256_madd_epi16(_mm256_cvtepu8_epi16(codes), word);
            *sum = _mm256_add_epi32(*sum, products);
        }
    }
    // hadd works within 128-bit halves: entries come out as 0 1 4 5 2 3 6 7.
    let pair = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(a, b));
    [pair(sums[0], sums[1]), pair(sums[2], sums[3])]
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn logits(keys: &[u8], scales: Scales<'_>, q: &QuantQuery, out: &mut [f32]) {
    let rows = 2 * q.group;
    for (h, out) in out.chunks_exact_mut(LANES).enumerate() {
        let high = dot_line(keys, |quad| q.words[quad * rows + h]);
        let low = dot_line(keys, |quad| q.words[quad * rows + q.group + h]);
        for half in 0..2 {
            let high = _mm256_sub_epi32(high[half], _mm256_set1_epi32(q.offset[h]));
            let low = _mm256_sub_epi32(low[half], _mm256_set1_epi32(q.offset[q.group + h]));
            let high = _mm256_mul_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(256.0));
            let whole = _mm256_add_ps(high, _mm256_cvtepi32_ps(low));
            let unit = _mm256_mul_ps(_mm256_set1_ps(q.unit[h]), load(scales.key, half));
            let spread = _mm256_mul_ps(_mm256_set1_ps(q.spread[h]), load(scales.spread, half));
            let logit = _mm256_add_ps(_mm256_mul_ps(whole, unit), spread);
            let logit = _mm256_min_ps(logit, _mm256_set1_ps(LOGIT_MAX));
            store(out, half, _mm256_max_ps(logit, _mm256_set1_ps(-LOGIT_MAX)));
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn dots(keys: &[u8], rows: &[i8], out: &mut [i32]) {
    let stride = keys.len() / LANES;
    for (row, out) in rows.chunks_exact(stride).zip(out.chunks_exact_mut(LANES)) {
        let sums = dot_line(keys, |quad| {
            let bytes = &row[quad * QUAD..][..QUAD];
            i32::from_le_bytes([bytes[0] as u8, bytes[1] as u8, bytes[2] as u8, bytes[3] as u8])
        });
        for (sum, out) in sums.into_iter().zip(out.chunks_exact_mut(HALF)) {
            // SAFETY: a chunk of eight i32.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sum) };
        }
    }
}

#[target_feature(enable = "avx2,fma")]
fn exp(x: __m256) -> __m256 {
    let kept = _mm256_cmp_ps::<_CMP_GE_OQ>(x, _mm256_set1_ps(EXP_MIN));
    let scaled = _mm256_mul_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(scaled);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-LN2_HIGH), x);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-LN2_LOW), r);
    let mut p = _mm256_set1_ps(EXP_POLY[0]);
    for &c in &EXP_POLY[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    }
    let bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(bits));
    _mm256_and_ps(kept, _mm256_mul_ps(p, power))
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn maxima(logits: &[f32], rest: &[f32], max: &mut [f32]) {
    scalar::maxima(logits, rest, max);
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn masses(logits: &[f32], rest: &[f32], max: &[f32], sums: &mut [f32]) {
    for (rows, rest) in logits.chunks_exact(max.len() * LANES).zip(rest.chunks_exact(LANES)) {
        for ((sums, row), &max) in sums.chunks_exact_mut(LANES).zip(rows.chunks_exact(LANES)).zip(max) {
            for half in 0..2 {
                let x = _mm256_sub_ps(load(row, half), _mm256_set1_ps(max));
                let weight = _mm256_mul_ps(load(rest, half), exp(_mm256_min_ps(x, _mm256_setzero_ps())));
                let sum = _mm256_add_ps(load(sums, half), weight);
                store(sums, half, sum);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn rank(part: Part<'_>, norm: &[f32], threshold: f32, best: &mut [f32; LANES]) -> u16 {
    let mut lanes = 0;
    for half in 0..2 {
        let mut top = _mm256_set1_ps(f32::NEG_INFINITY);
        for (row, &norm) in part.logits.chunks_exact(LANES).zip(norm) {
            top = _mm256_max_ps(top, _mm256_sub_ps(load(row, half), _mm256_set1_ps(norm)));
        }
        store(best, half, top);
        let there = _mm256_cmp_ps::<_CMP_GT_OQ>(load(part.rest, half), _mm256_setzero_ps());
        let above = _mm256_cmp_ps::<_CMP_GT_OQ>(top, _mm256_set1_ps(threshold));
        lanes |= _mm256_movemask_ps(_mm256_and_ps(there, above)) << (half * HALF);
    }
    lanes as u16
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn exps((logits, rest): (&[f32], &[f32]), max: &[f32], (exps, sums): (&mut [f32], &mut [f32])) {
    let size = max.len() * LANES;
    for ((rows, exps), rest) in
        logits.chunks_exact(size).zip(exps.chunks_exact_mut(size)).zip(rest.chunks_exact(LANES))
    {
        let heads = rows.chunks_exact(LANES).zip(exps.chunks_exact_mut(LANES)).zip(max);
        for (((row, exps), &max), sums) in heads.zip(sums.chunks_exact_mut(LANES)) {
            for half in 0..2 {
                let x = _mm256_sub_ps(load(row, half), _mm256_set1_ps(max));
                let e = exp(_mm256_min_ps(x, _mm256_setzero_ps()));
                store(exps, half, e);
                let sum = _mm256_add_ps(load(sums, half), _mm256_mul_ps(load(rest, half), e));
                store(sums, half, sum);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn weigh(exps: &[f32], by: (&[f32], &[f32]), weights: &mut [f32], sums: &mut [f32]) {
    scalar::weigh(exps, by, weights, sums);
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn accumulate(values: &[i8], weights: &[f32], out: &mut [f32]) {
    // The compiler vectorises the plain loop with the features enabled here; a fused multiply-add has one result.
    scalar::accumulate(values, weights, out);
}
