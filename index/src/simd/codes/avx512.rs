//! The code kernels on 512-bit registers: a page's 16 tokens are the 16 lanes, VNNI multiplies 64 codes by 64 query bytes.

use std::arch::x86_64::*;

use super::scalar::WEIGHT_MIN;
use super::{Fit, LINE_DIMS, Line, PAGE_TOKENS, PageCodes, QueryCodes, Scales, query_limit};

#[inline]
#[target_feature(enable = "avx512f")]
fn load_line(line: &Line) -> __m512i {
    // SAFETY: a line is 64 readable bytes on a 64-byte boundary.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32; 16]) -> __m512 {
    // SAFETY: the array is 64 readable bytes; the load has no alignment requirement.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(x: &mut [f32; 16], value: __m512) {
    // SAFETY: the array is 64 writable bytes; the store has no alignment requirement.
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), value) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_scales(scales: &Scales) -> __m512 {
    // SAFETY: the array is 32 readable bytes; the load has no alignment requirement.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(scales.as_ptr().cast()) })
}

/// Sum of the sixteen lanes, halves onto halves, as the definition does it.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn sum_lanes(x: __m512) -> f32 {
    let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn energy(x: &[f32]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for row in x.as_chunks::<16>().0 {
        let x = load(row);
        sum = _mm512_add_ps(sum, _mm512_mul_ps(x, x));
    }
    sum_lanes(sum)
}

/// Codes of sixteen coordinates.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes(bits: usize, x: __m512, inverse_step: __m512) -> __m512i {
    let half = _mm512_set1_ps((1u32 << (bits - 1)) as f32);
    let top = _mm512_set1_ps(((1u32 << bits) - 1) as f32);
    let place = _mm512_add_ps(_mm512_mul_ps(x, inverse_step), half);
    _mm512_cvttps_epi32(_mm512_min_ps(_mm512_max_ps(place, _mm512_setzero_ps()), top))
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn fit(bits: usize, x: &[f32], inverse_step: f32) -> Fit {
    let inverse_step = _mm512_set1_ps(inverse_step);
    let middle = _mm512_set1_epi32((1 << bits) - 1);
    let (mut along, mut levels_sq) = (_mm512_setzero_ps(), _mm512_setzero_si512());
    for row in x.as_chunks::<16>().0 {
        let x = load(row);
        let codes = codes(bits, x, inverse_step);
        let levels = _mm512_sub_epi32(_mm512_add_epi32(codes, codes), middle);
        along = _mm512_add_ps(along, _mm512_mul_ps(x, _mm512_cvtepi32_ps(levels)));
        levels_sq = _mm512_add_epi32(levels_sq, _mm512_mullo_epi32(levels, levels));
    }
    Fit { along: sum_lanes(along), levels_sq: _mm512_reduce_add_epi32(levels_sq) }
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn quantise(bits: usize, x: &[f32], inverse_step: f32, words: &mut [u32]) {
    let inverse_step = _mm512_set1_ps(inverse_step);
    let lines = x.len() / LINE_DIMS;
    for (v, rows) in x.as_chunks::<16>().0.chunks_exact(2).enumerate() {
        let low = codes(bits, load(&rows[0]), inverse_step);
        let high = codes(bits, load(&rows[1]), inverse_step);
        for plane in 0..bits {
            let bit = _mm512_set1_epi32(1 << (bits - 1 - plane));
            let low = u32::from(_mm512_test_epi32_mask(low, bit));
            let high = u32::from(_mm512_test_epi32_mask(high, bit));
            words[plane * lines + v] = low | high << 16;
        }
    }
}

/// Bits of `high` where `MASK` (a byte, repeated) is set, of `low` elsewhere.
macro_rules! merge {
    ($mask:literal, $high:expr, $low:expr) => {
        _mm512_ternarylogic_epi32::<0xCA>(_mm512_set1_epi8($mask as u8 as i8), $high, $low)
    };
}

/// The codes of line `v` of a page by bit: element `s` holds, in each byte, the code whose plane bits are bit `s` of that byte.
///
/// Two planes are first interleaved into two-bit fields (even and odd `s` apart), four planes into four-bit fields, so that
/// one shift and one mask yield a whole code.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes_by_bit<const BITS: usize>(page: &[Line], lines: usize, v: usize) -> [__m512i; 8] {
    let plane = |p: usize| load_line(&page[p * lines + v]);
    match BITS {
        1 => {
            let (x, one) = (plane(0), _mm512_set1_epi8(1));
            [
                _mm512_and_si512(x, one),
                _mm512_and_si512(_mm512_srli_epi32::<1>(x), one),
                _mm512_and_si512(_mm512_srli_epi32::<2>(x), one),
                _mm512_and_si512(_mm512_srli_epi32::<3>(x), one),
                _mm512_and_si512(_mm512_srli_epi32::<4>(x), one),
                _mm512_and_si512(_mm512_srli_epi32::<5>(x), one),
                _mm512_and_si512(_mm512_srli_epi32::<6>(x), one),
                _mm512_and_si512(_mm512_srli_epi32::<7>(x), one),
            ]
        }
        2 => {
            let (even, odd) = pairs(plane(0), plane(1));
            let three = _mm512_set1_epi8(3);
            [
                _mm512_and_si512(even, three),
                _mm512_and_si512(odd, three),
                _mm512_and_si512(_mm512_srli_epi32::<2>(even), three),
                _mm512_and_si512(_mm512_srli_epi32::<2>(odd), three),
                _mm512_and_si512(_mm512_srli_epi32::<4>(even), three),
                _mm512_and_si512(_mm512_srli_epi32::<4>(odd), three),
                _mm512_and_si512(_mm512_srli_epi32::<6>(even), three),
                _mm512_and_si512(_mm512_srli_epi32::<6>(odd), three),
            ]
        }
        _ => {
            let (even_high, odd_high) = pairs(plane(0), plane(1));
            let (even_low, odd_low) = pairs(plane(2), plane(3));
            let (bits_04, bits_26) = nibbles(even_high, even_low);
            let (bits_15, bits_37) = nibbles(odd_high, odd_low);
            let fifteen = _mm512_set1_epi8(15);
            [
                _mm512_and_si512(bits_04, fifteen),
                _mm512_and_si512(bits_15, fifteen),
                _mm512_and_si512(bits_26, fifteen),
                _mm512_and_si512(bits_37, fifteen),
                _mm512_and_si512(_mm512_srli_epi32::<4>(bits_04), fifteen),
                _mm512_and_si512(_mm512_srli_epi32::<4>(bits_15), fifteen),
                _mm512_and_si512(_mm512_srli_epi32::<4>(bits_26), fifteen),
                _mm512_and_si512(_mm512_srli_epi32::<4>(bits_37), fifteen),
            ]
        }
    }
}

/// Two planes as two-bit codes: fields 0 to 3 of a byte are bits 0, 2, 4, 6 in the first result, bits 1, 3, 5, 7 in the second.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(high: __m512i, low: __m512i) -> (__m512i, __m512i) {
    (merge!(0xAA, _mm512_slli_epi32::<1>(high), low), merge!(0xAA, high, _mm512_srli_epi32::<1>(low)))
}

/// Two-bit fields as four-bit codes: fields 0 and 2 in the first result, 1 and 3 in the second.
#[inline]
#[target_feature(enable = "avx512f")]
fn nibbles(high: __m512i, low: __m512i) -> (__m512i, __m512i) {
    (merge!(0xCC, _mm512_slli_epi32::<2>(high), low), merge!(0xCC, high, _mm512_srli_epi32::<2>(low)))
}

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni")]
pub(super) fn score<const HEADS: usize, const BITS: usize, const DIGITS: usize>(
    codes: &PageCodes<'_>,
    query: &QueryCodes,
    first: usize,
    pages: &[u32],
    out: &mut [f32],
) {
    let words = &query.words[first * query.lines * DIGITS * 8..];
    let (words, _) = words[..HEADS * query.lines * DIGITS * 8].as_chunks::<HEADS>();
    let (words, _) = words.as_chunks::<8>();
    let (words, _) = words.as_chunks::<DIGITS>();
    let per_page = codes.lines_per_page();
    for (&page, out) in pages.iter().zip(out.chunks_exact_mut(query.group * PAGE_TOKENS)) {
        let lines = &codes.lines[page as usize * per_page..][..per_page];
        let mut sums = [[_mm512_setzero_si512(); HEADS]; DIGITS];
        for (v, words) in words.iter().enumerate() {
            let codes = codes_by_bit::<BITS>(lines, query.lines, v);
            for (sums, words) in sums.iter_mut().zip(words) {
                for (codes, words) in codes.iter().zip(words) {
                    for (sum, &word) in sums.iter_mut().zip(words) {
                        *sum = _mm512_dpbusd_epi32(*sum, *codes, _mm512_set1_epi32(word));
                    }
                }
            }
        }
        let scales = load_scales(&codes.scales[page as usize]);
        let (out, _) = out[first * PAGE_TOKENS..].as_chunks_mut::<PAGE_TOKENS>();
        for g in 0..HEADS {
            let mut dot = sums[0][g];
            for sums in &sums[1..] {
                dot = _mm512_add_epi32(_mm512_slli_epi32::<7>(dot), sums[g]);
            }
            let middle = _mm512_set1_epi32(((1 << BITS) - 1) * query.sums[first + g]);
            let exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(dot, dot), middle));
            let step = _mm512_set1_ps(query.steps[first + g]);
            store(&mut out[g], _mm512_mul_ps(_mm512_mul_ps(exact, step), scales));
        }
    }
}

/// Products of weights and scales as multiples of the returned step, packed four tokens to a word, and their sum.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
fn round_weights(weights: &[f32; PAGE_TOKENS], scales: __m512) -> (f32, [i32; 4], i32) {
    let products = _mm512_mul_ps(load(weights), scales);
    let most = _mm512_reduce_max_ps(_mm512_abs_ps(products));
    if most < WEIGHT_MIN {
        return (0.0, [0; 4], 0);
    }
    let inverse = query_limit(1) as f32 / most;
    let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(products, _mm512_set1_ps(inverse)));
    let bytes = _mm512_cvtepi32_epi8(rounded);
    let words = [
        _mm_extract_epi32::<0>(bytes),
        _mm_extract_epi32::<1>(bytes),
        _mm_extract_epi32::<2>(bytes),
        _mm_extract_epi32::<3>(bytes),
    ];
    (most / query_limit(1) as f32, words, _mm512_reduce_add_epi32(rounded))
}

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni")]
pub(super) fn add_weighted<const HEADS: usize, const BITS: usize>(
    codes: &PageCodes<'_>,
    first: usize,
    pages: &[u32],
    weights: &[f32],
    acc: &mut [f32],
) {
    let (per_page, group) = (codes.lines_per_page(), weights.len() / (pages.len() * PAGE_TOKENS));
    let (lines, dims) = (per_page / BITS, acc.len() / HEADS);
    for (&page, weights) in pages.iter().zip(weights.chunks_exact(group * PAGE_TOKENS)) {
        let page_lines = &codes.lines[page as usize * per_page..][..per_page];
        let scales = load_scales(&codes.scales[page as usize]);
        let (weights, _) = weights[first * PAGE_TOKENS..].as_chunks::<PAGE_TOKENS>();
        let mut rounded = [(0.0, [0; 4], 0); HEADS];
        for (rounded, weights) in rounded.iter_mut().zip(weights) {
            *rounded = round_weights(weights, scales);
        }
        if rounded.iter().all(|(step, ..)| *step == 0.0) {
            continue;
        }
        for v in 0..lines {
            let codes = codes_by_bit::<BITS>(page_lines, lines, v);
            for (h, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
                for (g, (step, words, sum)) in rounded.iter().enumerate() {
                    let mut dot = _mm512_setzero_si512();
                    for (codes, &word) in codes.iter().zip(words) {
                        dot = _mm512_dpbusd_epi32(dot, *codes, _mm512_set1_epi32(word));
                    }
                    let middle = _mm512_set1_epi32(((1 << BITS) - 1) * sum);
                    let exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(dot, dot), middle));
                    let (row, _) = acc[g * dims + LINE_DIMS * v + 16 * h..].as_chunks_mut::<16>();
                    let sum = load(&row[0]);
                    store(&mut row[0], _mm512_add_ps(sum, _mm512_mul_ps(exact, _mm512_set1_ps(*step))));
                }
            }
        }
    }
}
