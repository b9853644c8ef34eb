//! 512-bit version: one register holds one number of all sixteen entries, or four dimensions of them as bytes.

use std::arch::x86_64::*;

use super::{EXP_MIN, EXP_POLY, LN2_HIGH, LN2_LOW, LOGIT_MAX, Part, Scales};
use crate::blocks::LANES;
use crate::quant::{QUAD, QuantQuery};

/// Bytes of a quad: one register.
const LINE: usize = LANES * QUAD;
/// Rows that share one load of a line: eight accumulators hide the latency of four cycles at two products a cycle.
const ROWS: usize = 8;

#[target_feature(enable = "avx512f")]
fn load(x: &[f32]) -> __m512 {
    assert!(x.len() >= LANES);
    // SAFETY: sixteen f32 are there.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
fn store(x: &mut [f32], v: __m512) {
    assert!(x.len() >= LANES);
    // SAFETY: room for sixteen f32 is there.
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), v) }
}

#[target_feature(enable = "avx512f")]
fn load_line(x: &[u8]) -> __m512i {
    assert!(x.len() >= LINE);
    // SAFETY: 64 bytes are there.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn logits(keys: &[u8], scales: Scales<'_>, q: &QuantQuery, out: &mut [f32]) {
    let scales = (load(scales.key), load(scales.spread));
    let mut first = 0;
    while first < q.group {
        let heads = (q.group - first).min(ROWS / 2);
        let out = &mut out[first * LANES..];
        match heads {
            1 => logits_of::<1>(keys, scales, (q, first), out),
            2 => logits_of::<2>(keys, scales, (q, first), out),
            3 => logits_of::<3>(keys, scales, (q, first), out),
            _ => logits_of::<4>(keys, scales, (q, first), out),
        }
        first += heads;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn logits_of<const G: usize>(
    keys: &[u8],
    scales: (__m512, __m512),
    (q, first): (&QuantQuery, usize),
    out: &mut [f32],
) {
    let mut high = [_mm512_setzero_si512(); G];
    let mut low = [_mm512_setzero_si512(); G];
    for (line, words) in keys.chunks_exact(LINE).zip(q.words.chunks_exact(2 * q.group)) {
        let codes = load_line(line);
        let (words_high, words_low) =
            (&words[first..first + G], &words[q.group + first..q.group + first + G]);
        for h in 0..G {
            high[h] = _mm512_dpbusd_epi32(high[h], codes, _mm512_set1_epi32(words_high[h]));
            low[h] = _mm512_dpbusd_epi32(low[h], codes, _mm512_set1_epi32(words_low[h]));
        }
    }
    for h in 0..G {
        let at = first + h;
        let high = _mm512_sub_epi32(high[h], _mm512_set1_epi32(q.offset[at]));
        let low = _mm512_sub_epi32(low[h], _mm512_set1_epi32(q.offset[q.group + at]));
        let high = _mm512_mul_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0));
        let whole = _mm512_add_ps(high, _mm512_cvtepi32_ps(low));
        let logit = _mm512_mul_ps(whole, _mm512_mul_ps(_mm512_set1_ps(q.unit[at]), scales.0));
        let logit = _mm512_add_ps(logit, _mm512_mul_ps(_mm512_set1_ps(q.spread[at]), scales.1));
        let logit = _mm512_min_ps(logit, _mm512_set1_ps(LOGIT_MAX));
        let logit = _mm512_max_ps(logit, _mm512_set1_ps(-LOGIT_MAX));
        store(&mut out[h * LANES..], logit);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dots(keys: &[u8], rows: &[i8], out: &mut [i32]) {
    let stride = keys.len() / LANES;
    for (rows, out) in rows.chunks(ROWS * stride).zip(out.chunks_mut(ROWS * LANES)) {
        if out.len() == ROWS * LANES {
            dots_of::<ROWS>(keys, rows, out);
        } else {
            for (row, out) in rows.chunks_exact(stride).zip(out.chunks_exact_mut(LANES)) {
                dots_of::<1>(keys, row, out);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dots_of<const R: usize>(keys: &[u8], rows: &[i8], out: &mut [i32]) {
    let stride = keys.len() / LANES;
    assert!(rows.len() == R * stride && out.len() == R * LANES);
    let mut sums = [_mm512_setzero_si512(); R];
    for (quad, line) in keys.chunks_exact(LINE).enumerate() {
        let codes = load_line(line);
        for (r, sum) in sums.iter_mut().enumerate() {
            // SAFETY: row `r` has `stride` bytes, four for each line of `keys`.
            let word = unsafe { rows.as_ptr().add(r * stride + quad * QUAD).cast::<i32>().read_unaligned() };
            *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(word));
        }
    }
    for (sum, out) in sums.into_iter().zip(out.chunks_exact_mut(LANES)) {
        // SAFETY: `out` is a chunk of sixteen i32.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sum) };
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(in crate::simd) fn exp(x: __m512) -> __m512 {
    let kept = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(EXP_MIN));
    let scaled = _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E));
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(scaled);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_HIGH), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_LOW), r);
    let mut p = _mm512_set1_ps(EXP_POLY[0]);
    for &c in &EXP_POLY[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    let bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    let power = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(bits));
    _mm512_maskz_mul_ps(kept, p, power)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn maxima(logits: &[f32], rest: &[f32], max: &mut [f32]) {
    let group = max.len();
    for (h, max) in max.iter_mut().enumerate() {
        let mut best = _mm512_set1_ps(*max);
        for (rows, rest) in logits.chunks_exact(group * LANES).zip(rest.chunks_exact(LANES)) {
            let there = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(load(rest), _mm512_setzero_ps());
            best = _mm512_mask_max_ps(best, there, best, load(&rows[h * LANES..]));
        }
        *max = _mm512_reduce_max_ps(best);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn masses(logits: &[f32], rest: &[f32], max: &[f32], sums: &mut [f32]) {
    for (rows, rest) in logits.chunks_exact(max.len() * LANES).zip(rest.chunks_exact(LANES)) {
        let rest = load(rest);
        for ((sums, row), &max) in sums.chunks_exact_mut(LANES).zip(rows.chunks_exact(LANES)).zip(max) {
            let x = _mm512_min_ps(_mm512_sub_ps(load(row), _mm512_set1_ps(max)), _mm512_setzero_ps());
            let sum = _mm512_add_ps(load(sums), _mm512_mul_ps(rest, exp(x)));
            store(sums, sum);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn rank(part: Part<'_>, norm: &[f32], threshold: f32, best: &mut [f32; LANES]) -> u16 {
    let mut top = _mm512_set1_ps(f32::NEG_INFINITY);
    for (row, &norm) in part.logits.chunks_exact(LANES).zip(norm) {
        top = _mm512_max_ps(top, _mm512_sub_ps(load(row), _mm512_set1_ps(norm)));
    }
    store(best, top);
    let there = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(load(part.rest), _mm512_setzero_ps());
    _mm512_mask_cmp_ps_mask::<_CMP_GT_OQ>(there, top, _mm512_set1_ps(threshold))
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn exps((logits, rest): (&[f32], &[f32]), max: &[f32], (exps, sums): (&mut [f32], &mut [f32])) {
    let size = max.len() * LANES;
    for ((rows, exps), rest) in
        logits.chunks_exact(size).zip(exps.chunks_exact_mut(size)).zip(rest.chunks_exact(LANES))
    {
        let rest = load(rest);
        let heads = rows.chunks_exact(LANES).zip(exps.chunks_exact_mut(LANES)).zip(max);
        for (((row, exps), &max), sums) in heads.zip(sums.chunks_exact_mut(LANES)) {
            let x = _mm512_min_ps(_mm512_sub_ps(load(row), _mm512_set1_ps(max)), _mm512_setzero_ps());
            let e = exp(x);
            store(exps, e);
            store(sums, _mm512_add_ps(load(sums), _mm512_mul_ps(rest, e)));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn weigh(exps: &[f32], (rest, scales): (&[f32], &[f32]), weights: &mut [f32], sums: &mut [f32]) {
    let (rest, scales) = (load(rest), load(scales));
    let rows = exps.chunks_exact(LANES).zip(weights.chunks_exact_mut(LANES));
    for ((exps, weights), sums) in rows.zip(sums.chunks_exact_mut(LANES)) {
        let weight = _mm512_mul_ps(load(exps), rest);
        store(sums, _mm512_add_ps(load(sums), weight));
        store(weights, _mm512_mul_ps(weight, scales));
    }
}

/// Heads whose sums are kept in registers at once.
const HEADS: usize = 8;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn accumulate(values: &[i8], weights: &[f32], out: &mut [f32]) {
    let dim = values.len() / LANES;
    for (weights, out) in weights.chunks(HEADS * LANES).zip(out.chunks_mut(HEADS * dim)) {
        // Eight sums or more hide the latency of four cycles at two products a cycle.
        match weights.len() / LANES {
            1 => accumulate_of::<1, 4>(values, weights, out),
            2 => accumulate_of::<2, 4>(values, weights, out),
            3 => accumulate_of::<3, 4>(values, weights, out),
            4 => accumulate_of::<4, 2>(values, weights, out),
            5 => accumulate_of::<5, 2>(values, weights, out),
            6 => accumulate_of::<6, 2>(values, weights, out),
            7 => accumulate_of::<7, 2>(values, weights, out),
            _ => accumulate_of::<8, 2>(values, weights, out),
        }
    }
}

/// `WIDE` registers of values side by side: each weight is spread over a register once for all of them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn accumulate_of<const G: usize, const WIDE: usize>(values: &[i8], weights: &[f32], out: &mut [f32]) {
    let dim = values.len() / LANES;
    assert!(weights.len() == G * LANES && out.len() == G * dim && values.len() == LANES * dim);
    for first in (0..dim).step_by(WIDE * LANES) {
        let masks: [__mmask16; WIDE] = std::array::from_fn(|w| {
            let left = dim.saturating_sub(first + w * LANES).min(LANES);
            ((1u32 << left) - 1) as u16
        });
        let mut sums = [[_mm512_setzero_ps(); WIDE]; G];
        for (h, sums) in sums.iter_mut().enumerate() {
            for (w, sum) in sums.iter_mut().enumerate() {
                let row = out.as_ptr().wrapping_add(h * dim + first + w * LANES);
                // SAFETY: the mask keeps lanes of head `h`'s row only; where it is empty the address is not used.
                *sum = unsafe { _mm512_maskz_loadu_ps(masks[w], row) };
            }
        }
        for e in 0..LANES {
            let mut codes = [_mm512_setzero_ps(); WIDE];
            for (w, codes) in codes.iter_mut().enumerate() {
                let row = values.as_ptr().wrapping_add(e * dim + first + w * LANES);
                // SAFETY: the mask keeps bytes of entry `e`'s row only; where it is empty the address is not used.
                let bytes = unsafe { _mm_maskz_loadu_epi8(masks[w], row) };
                *codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            }
            for (h, sums) in sums.iter_mut().enumerate() {
                let weight = _mm512_set1_ps(weights[h * LANES + e]);
                for (sum, codes) in sums.iter_mut().zip(codes) {
                    *sum = _mm512_fmadd_ps(weight, codes, *sum);
                }
            }
        }
        for (h, sums) in sums.into_iter().enumerate() {
            for (w, sum) in sums.into_iter().enumerate() {
                let row = out.as_mut_ptr().wrapping_add(h * dim + first + w * LANES);
                // SAFETY: as for the load.
                unsafe { _mm512_mask_storeu_ps(row, masks[w], sum) };
            }
        }
    }
}
