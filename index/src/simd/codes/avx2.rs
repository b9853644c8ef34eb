//! The code kernels on 256-bit registers: a line is two halves of eight tokens (or eight coordinates of the tail).

use std::arch::x86_64::*;

use super::scalar::STEP_MIN;
use super::{
    BYTE_MAX, Fit, LINE_DIMS, Line, PAGE_TOKENS, PageCodes, Pairs, QueryCodes, Scales, Weights, digits,
};

/// Eight lanes of a line.
#[inline]
#[target_feature(enable = "avx2")]
fn load_half(line: &Line, half: usize) -> __m256i {
    let (halves, _) = line.0.as_chunks::<8>();
    // SAFETY: the half is 32 readable bytes; the load has no alignment requirement.
    unsafe { _mm256_loadu_si256(halves[half].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(x: &[f32; 8]) -> __m256 {
    // SAFETY: the array is 32 readable bytes; the load has no alignment requirement.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(x: &mut [f32; 8], value: __m256) {
    // SAFETY: the array is 32 writable bytes; the store has no alignment requirement.
    unsafe { _mm256_storeu_ps(x.as_mut_ptr(), value) }
}

/// Scales of tokens `8 half ..`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_scales(scales: &Scales, half: usize) -> __m256 {
    let (halves, _) = scales.as_chunks::<8>();
    // SAFETY: the half is 16 readable bytes; the load has no alignment requirement.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(halves[half].as_ptr().cast()) })
}

/// Sum of sixteen lanes held as two halves, halves onto halves, as the definition does it.
#[inline]
#[target_feature(enable = "avx2")]
fn sum_lanes(x: [__m256; 2]) -> f32 {
    let x = _mm256_add_ps(x[0], x[1]);
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum_ints(x: __m256i) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
}

#[target_feature(enable = "avx2")]
pub(super) fn energy(x: &[f32]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 2];
    for rows in x.as_chunks::<8>().0.chunks_exact(2) {
        for (sum, row) in sums.iter_mut().zip(rows) {
            let x = load(row);
            *sum = _mm256_add_ps(*sum, _mm256_mul_ps(x, x));
        }
    }
    sum_lanes(sums)
}

/// Codes of eight coordinates.
#[inline]
#[target_feature(enable = "avx2")]
fn codes(bits: usize, x: __m256, inverse_step: __m256) -> __m256i {
    let half = _mm256_set1_ps((1u32 << (bits - 1)) as f32);
    let top = _mm256_set1_ps(((1u32 << bits) - 1) as f32);
    let place = _mm256_add_ps(_mm256_mul_ps(x, inverse_step), half);
    _mm256_cvttps_epi32(_mm256_min_ps(_mm256_max_ps(place, _mm256_setzero_ps()), top))
}

#[target_feature(enable = "avx2")]
pub(super) fn fit(bits: usize, x: &[f32], inverse_step: f32) -> Fit {
    let inverse_step = _mm256_set1_ps(inverse_step);
    let middle = _mm256_set1_epi32((1 << bits) - 1);
    let (mut along, mut levels_sq) = ([_mm256_setzero_ps(); 2], _mm256_setzero_si256());
    for rows in x.as_chunks::<8>().0.chunks_exact(2) {
        for (along, row) in along.iter_mut().zip(rows) {
            let x = load(row);
            let codes = codes(bits, x, inverse_step);
            let levels = _mm256_sub_epi32(_mm256_add_epi32(codes, codes), middle);
            *along = _mm256_add_ps(*along, _mm256_mul_ps(x, _mm256_cvtepi32_ps(levels)));
            levels_sq = _mm256_add_epi32(levels_sq, _mm256_mullo_epi32(levels, levels));
        }
    }
    Fit { along: sum_lanes(along), levels_sq: sum_ints(levels_sq) }
}

#[target_feature(enable = "avx2")]
pub(super) fn quantise(bits: usize, x: &[f32], inverse_step: f32, words: &mut [u32]) {
    let inverse_step = _mm256_set1_ps(inverse_step);
    let lines = x.len() / LINE_DIMS;
    words.fill(0);
    for (row, x) in x.as_chunks::<8>().0.iter().enumerate() {
        let codes = codes(bits, load(x), inverse_step);
        for plane in 0..bits {
            let to_sign = _mm_cvtsi32_si128((32 - bits + plane) as i32);
            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_sll_epi32(codes, to_sign)));
            words[plane * lines + row / 4] |= (mask as u32) << (8 * (row % 4));
        }
    }
}

/// The codes of half a line by bit, as the 512-bit version has them.
#[inline]
#[target_feature(enable = "avx2")]
fn codes_by_bit<const BITS: usize>(page: &[Line], lines: usize, v: usize, half: usize) -> [__m256i; 8] {
    let plane = |p: usize| load_half(&page[p * lines + v], half);
    match BITS {
        1 => {
            let (x, one) = (plane(0), _mm256_set1_epi8(1));
            [
                _mm256_and_si256(x, one),
                _mm256_and_si256(_mm256_srli_epi32::<1>(x), one),
                _mm256_and_si256(_mm256_srli_epi32::<2>(x), one),
                _mm256_and_si256(_mm256_srli_epi32::<3>(x), one),
                _mm256_and_si256(_mm256_srli_epi32::<4>(x), one),
                _mm256_and_si256(_mm256_srli_epi32::<5>(x), one),
                _mm256_and_si256(_mm256_srli_epi32::<6>(x), one),
                _mm256_and_si256(_mm256_srli_epi32::<7>(x), one),
            ]
        }
        2 => {
            let (even, odd) = pairs(plane(0), plane(1));
            let three = _mm256_set1_epi8(3);
            [
                _mm256_and_si256(even, three),
                _mm256_and_si256(odd, three),
                _mm256_and_si256(_mm256_srli_epi32::<2>(even), three),
                _mm256_and_si256(_mm256_srli_epi32::<2>(odd), three),
                _mm256_and_si256(_mm256_srli_epi32::<4>(even), three),
                _mm256_and_si256(_mm256_srli_epi32::<4>(odd), three),
                _mm256_and_si256(_mm256_srli_epi32::<6>(even), three),
                _mm256_and_si256(_mm256_srli_epi32::<6>(odd), three),
            ]
        }
        _ => {
            let (even_high, odd_high) = pairs(plane(0), plane(1));
            let (even_low, odd_low) = pairs(plane(2), plane(3));
            let (bits_04, bits_26) = nibbles(even_high, even_low);
            let (bits_15, bits_37) = nibbles(odd_high, odd_low);
            let fifteen = _mm256_set1_epi8(15);
            [
                _mm256_and_si256(bits_04, fifteen),
                _mm256_and_si256(bits_15, fifteen),
                _mm256_and_si256(bits_26, fifteen),
                _mm256_and_si256(bits_37, fifteen),
                _mm256_and_si256(_mm256_srli_epi32::<4>(bits_04), fifteen),
                _mm256_and_si256(_mm256_srli_epi32::<4>(bits_15), fifteen),
                _mm256_and_si256(_mm256_srli_epi32::<4>(bits_26), fifteen),
                _mm256_and_si256(_mm256_srli_epi32::<4>(bits_37), fifteen),
            ]
        }
    }
}

/// Bits of `high` where `mask` is set, of `low` elsewhere.
#[inline]
#[target_feature(enable = "avx2")]
fn merge(mask: u8, high: __m256i, low: __m256i) -> __m256i {
    let mask = _mm256_set1_epi8(mask as i8);
    _mm256_or_si256(_mm256_and_si256(mask, high), _mm256_andnot_si256(mask, low))
}

#[inline]
#[target_feature(enable = "avx2")]
fn pairs(high: __m256i, low: __m256i) -> (__m256i, __m256i) {
    (merge(0xAA, _mm256_slli_epi32::<1>(high), low), merge(0xAA, high, _mm256_srli_epi32::<1>(low)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(high: __m256i, low: __m256i) -> (__m256i, __m256i) {
    (merge(0xCC, _mm256_slli_epi32::<2>(high), low), merge(0xCC, high, _mm256_srli_epi32::<2>(low)))
}

/// `sum + codes . word`, four bytes to a lane. Eight pair sums of at most `2 * 15 * 127` stay below 2^15, so the 16-bit sums
/// over the bits of one line are exact.
#[inline]
#[target_feature(enable = "avx2")]
fn dot(sum: __m256i, codes: &[__m256i], words: &[i32]) -> __m256i {
    let mut pairs = _mm256_setzero_si256();
    for (codes, word) in codes.iter().zip(words) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(*codes, _mm256_set1_epi32(*word)));
    }
    _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// Dot products of half a page's tokens with each of up to `HEADS` heads' digits, so that codes are taken apart once for them.
#[inline]
#[target_feature(enable = "avx2")]
fn dots_of_heads<const BITS: usize>(
    page: &[Line],
    query: &QueryCodes,
    heads: &[u16],
    half: usize,
) -> [[__m256i; HEADS]; 2] {
    let digits = digits(BITS);
    let (words, _) = query.words.as_chunks::<8>();
    let mut sums = [[_mm256_setzero_si256(); HEADS]; 2];
    for v in 0..query.lines {
        let codes = codes_by_bit::<BITS>(page, query.lines, v, half);
        for (g, &head) in heads.iter().enumerate() {
            let words = &words[(usize::from(head) * query.lines + v) * digits..][..digits];
            for (sums, words) in sums.iter_mut().zip(words) {
                sums[g] = dot(sums[g], &codes, words);
            }
        }
    }
    sums
}

/// Heads scored together.
const HEADS: usize = 4;

#[target_feature(enable = "avx2,f16c")]
pub(super) fn score<const LINES: usize, const BITS: usize>(
    codes: &PageCodes<'_>,
    query: &QueryCodes,
    pairs: &Pairs<'_>,
    out: &mut [[f32; PAGE_TOKENS]],
) {
    let per_page = codes.lines_per_page();
    for (page, range) in pairs.iter() {
        let lines = &codes.lines[page as usize * per_page..][..per_page];
        let of_page = pairs.heads[range.clone()].chunks(HEADS).zip(out[range].chunks_mut(HEADS));
        for (heads, out) in of_page {
            for half in 0..2 {
                let sums = dots_of_heads::<BITS>(lines, query, heads, half);
                let scales = load_scales(&codes.scales[page as usize], half);
                for (g, (&head, out)) in heads.iter().zip(out.iter_mut()).enumerate() {
                    let mut dot = sums[0][g];
                    if digits(BITS) == 2 {
                        dot = _mm256_add_epi32(_mm256_slli_epi32::<7>(dot), sums[1][g]);
                    }
                    let head = usize::from(head);
                    let middle = _mm256_set1_epi32(((1 << BITS) - 1) * query.offsets[head]);
                    let exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(dot, dot), middle));
                    let step = _mm256_set1_ps(query.steps[head]);
                    let (out, _) = out.as_chunks_mut::<8>();
                    store(&mut out[half], _mm256_mul_ps(_mm256_mul_ps(exact, step), scales));
                }
            }
        }
    }
}

/// Products of weights and scales as multiples of the returned step; word `j` holds tokens `j`, `4 + j`, `8 + j`, `12 + j`; and
/// their sum.
#[inline]
#[target_feature(enable = "avx2")]
fn round_weights(weights: &[f32; PAGE_TOKENS], step: f32, scales: [__m256; 2]) -> ([i32; 4], i32) {
    let (halves, _) = weights.as_chunks::<8>();
    let inverse = _mm256_set1_ps(1.0 / step);
    let rounded = [0, 1].map(|half: usize| {
        let product = _mm256_mul_ps(load(&halves[half]), scales[half]);
        _mm256_cvtps_epi32(_mm256_mul_ps(product, inverse))
    });
    let sum = sum_ints(_mm256_add_epi32(rounded[0], rounded[1]));
    let halves = rounded.map(|r| {
        let low = _mm256_castsi256_si128(r);
        _mm_packs_epi32(low, _mm256_extracti128_si256::<1>(r))
    });
    let bytes = _mm_packs_epi16(halves[0], halves[1]);
    let transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let bytes = _mm_shuffle_epi8(bytes, transpose);
    let words = [
        _mm_extract_epi32::<0>(bytes),
        _mm_extract_epi32::<1>(bytes),
        _mm_extract_epi32::<2>(bytes),
        _mm_extract_epi32::<3>(bytes),
    ];
    (words, sum)
}

/// Largest of sixteen scales, times 1/127; at least 0.
#[inline]
#[target_feature(enable = "avx2")]
fn unit_of(scales: [__m256; 2]) -> f32 {
    let most = _mm256_max_ps(_mm256_max_ps(scales[0], scales[1]), _mm256_setzero_ps());
    let most = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps::<1>(most));
    let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most))) * (1.0 / BYTE_MAX as f32)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_weighted<const LINES: usize, const BITS: usize>(
    codes: &PageCodes<'_>,
    pairs: &Pairs<'_>,
    weights: Weights<'_>,
    acc: &mut [f32],
) {
    let per_page = codes.lines_per_page();
    let (lines, dims) = (per_page / BITS, per_page / BITS * LINE_DIMS);
    for (page, range) in pairs.iter() {
        let page_lines = &codes.lines[page as usize * per_page..][..per_page];
        let scales = &codes.scales[page as usize];
        let scales = [load_scales(scales, 0), load_scales(scales, 1)];
        let unit = unit_of(scales);
        for p in range {
            let head = usize::from(pairs.heads[p]);
            let Some((weights, sum)) = weights.of(p, head) else { continue };
            let step = sum * unit;
            if step < STEP_MIN {
                continue;
            }
            let (words, sum) = round_weights(weights, step, scales);
            let acc = &mut acc[head * dims..][..dims];
            for (v, half) in (0..lines).flat_map(|v| [(v, 0), (v, 1)]) {
                let codes = codes_by_bit::<BITS>(page_lines, lines, v, half);
                for (h, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
                    let dot = dot(_mm256_setzero_si256(), codes, &words);
                    let middle = _mm256_set1_epi32(((1 << BITS) - 1) * sum);
                    let exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(dot, dot), middle));
                    let (row, _) = acc[LINE_DIMS * v + 16 * h + 8 * half..].as_chunks_mut::<8>();
                    let sum = _mm256_fmadd_ps(exact, _mm256_set1_ps(step), load(&row[0]));
                    store(&mut row[0], sum);
                }
            }
        }
    }
}
