//! The code kernels on 512-bit registers: a page's 16 tokens are the 16 lanes, VNNI multiplies 64 codes by 64 query bytes.

use std::arch::x86_64::*;

use super::scalar::STEP_MIN;
use super::{
    BYTE_MAX, Fit, LINE_DIMS, Line, PAGE_TOKENS, PageCodes, Pairs, QueryCodes, Scales, Table, Weights,
};
use crate::simd::prefetch::prefetch;

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

/// Bits of `high` where the mask (a byte, repeated) is set, of `low` elsewhere.
macro_rules! merge {
    ($mask:literal, $high:expr, $low:expr) => {
        _mm512_ternarylogic_epi32::<0xCA>(_mm512_set1_epi8($mask as u8 as i8), $high, $low)
    };
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

/// The four-bit codes of line `v` of a page: element `s` holds, in each byte, the code whose plane bits are bit `s` of that byte.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes_by_bit(page: &[Line], lines: usize, v: usize) -> [__m512i; 8] {
    let plane = |p: usize| load_line(&page[p * lines + v]);
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

/// Table indexes of a line: byte `i` of a lane selects quad `i` by its low nibble, in the second result by its high nibble.
#[inline]
#[target_feature(enable = "avx512f")]
fn indexes(line: __m512i) -> [__m512i; 2] {
    let (low, quad) = (_mm512_set1_epi8(15), _mm512_set1_epi32(0x3020_1000));
    [
        _mm512_ternarylogic_epi32::<0xEA>(line, low, quad),
        _mm512_ternarylogic_epi32::<0xEA>(_mm512_srli_epi32::<4>(line), low, quad),
    ]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_table(table: &Table) -> __m512i {
    // SAFETY: a table is 64 readable bytes on a 64-byte boundary.
    unsafe { _mm512_load_si512(table.0.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_table(table: &mut Table, bytes: __m512i) {
    // SAFETY: a table is 64 writable bytes on a 64-byte boundary.
    unsafe { _mm512_store_si512(table.0.as_mut_ptr().cast(), bytes) }
}

/// Byte `4 i` of `bytes` throughout 128-bit lane `i`, for shuffles by it plus `j`.
#[inline]
#[target_feature(enable = "avx512f")]
fn quad_starts() -> __m512i {
    _mm512_set_epi64(
        0x0C0C_0C0C_0C0C_0C0C,
        0x0C0C_0C0C_0C0C_0C0C,
        0x0808_0808_0808_0808,
        0x0808_0808_0808_0808,
        0x0404_0404_0404_0404,
        0x0404_0404_0404_0404,
        0,
        0,
    )
}

/// Sums of selected bytes, modulo 256: byte `16 i + n` sums those bytes `4 i + j` whose bit `j` is set in `n`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn table_of(bytes: __m128i) -> __m512i {
    let bytes = _mm512_broadcast_i32x4(bytes);
    let byte = |j: i8| _mm512_add_epi8(quad_starts(), _mm512_set1_epi8(j));
    let a = _mm512_maskz_shuffle_epi8(0xAAAA_AAAA_AAAA_AAAA, bytes, byte(0));
    let b = _mm512_maskz_shuffle_epi8(0xCCCC_CCCC_CCCC_CCCC, bytes, byte(1));
    let c = _mm512_maskz_shuffle_epi8(0xF0F0_F0F0_F0F0_F0F0, bytes, byte(2));
    let d = _mm512_maskz_shuffle_epi8(0xFF00_FF00_FF00_FF00, bytes, byte(3));
    _mm512_add_epi8(_mm512_add_epi8(a, b), _mm512_add_epi8(c, d))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn tables(units: &[i8], mut put: impl FnMut(usize, usize, Table)) {
    for (line, units) in units.as_chunks::<LINE_DIMS>().0.iter().enumerate() {
        let (quads, _) = units.as_chunks::<4>();
        for nibble in 0..2 {
            let word = |i: usize| i32::from_le_bytes(quads[2 * i + nibble].map(|unit| unit as u8));
            let bytes = _mm_setr_epi32(word(0), word(1), word(2), word(3));
            let below_zero = _mm_max_epi8(_mm_sub_epi8(_mm_setzero_si128(), bytes), _mm_setzero_si128());
            let pairs = _mm_maddubs_epi16(below_zero, _mm_set1_epi8(1));
            let quads = _mm512_broadcast_i32x4(_mm_madd_epi16(pairs, _mm_set1_epi16(1)));
            let raise = _mm512_shuffle_epi8(quads, quad_starts());
            let mut table = Table([0; 64]);
            store_table(&mut table, _mm512_add_epi8(table_of(bytes), raise));
            put(line, nibble, table);
        }
    }
}

/// Table indexes of `LINES` lines of `BITS` planes of a page, in registers.
#[inline]
#[target_feature(enable = "avx512f")]
fn indexes_of<const LINES: usize, const BITS: usize>(
    page: &[Line],
    lines: usize,
) -> [[[__m512i; 2]; LINES]; BITS] {
    let mut all = [[[_mm512_setzero_si512(); 2]; LINES]; BITS];
    for (plane, of_plane) in all.iter_mut().enumerate() {
        for (v, index) in of_plane.iter_mut().enumerate() {
            *index = indexes(load_line(&page[plane * lines + v]));
        }
    }
    all
}

/// Pages between asking for codes and using them.
const AHEAD: usize = 4;

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vbmi,avx512vnni")]
pub(super) fn score<const LINES: usize, const BITS: usize>(
    codes: &PageCodes<'_>,
    query: &QueryCodes,
    pairs: &Pairs<'_>,
    out: &mut [[f32; PAGE_TOKENS]],
) {
    let per_page = codes.lines_per_page();
    for (i, (page, range)) in pairs.iter().enumerate() {
        if let Some(&ahead) = pairs.pages.get(i + AHEAD) {
            prefetch(&codes.lines[ahead as usize * per_page..][..per_page]);
        }
        let lines = &codes.lines[page as usize * per_page..][..per_page];
        let scales = load_scales(&codes.scales[page as usize]);
        let pairs = pairs.heads[range.clone()].iter().zip(&mut out[range]);
        let finish = |dot: __m512i, head: usize, out: &mut [f32; PAGE_TOKENS]| {
            let offset = _mm512_set1_epi32(((1 << BITS) - 1) * query.offsets[head]);
            let exact = _mm512_sub_epi32(_mm512_add_epi32(dot, dot), offset);
            let exact = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(query.steps[head]));
            store(out, _mm512_mul_ps(exact, scales));
        };
        if BITS == 4 {
            for (&head, out) in pairs {
                finish(dot_by_product(lines, query, usize::from(head)), usize::from(head), out);
            }
        } else if LINES > 0 {
            let indexes = indexes_of::<LINES, BITS>(lines, LINES);
            for (&head, out) in pairs {
                let head = usize::from(head);
                let (tables, _) = query.tables[2 * LINES * head..][..2 * LINES].as_chunks::<2>();
                let mut sums = [_mm512_setzero_si512(); BITS];
                for (v, tables) in tables.iter().enumerate() {
                    for (nibble, table) in tables.iter().enumerate() {
                        let table = load_table(table);
                        for (plane, (sum, indexes)) in sums.iter_mut().zip(&indexes).enumerate() {
                            let quads = _mm512_permutexvar_epi8(indexes[v][nibble], table);
                            *sum =
                                _mm512_dpbusd_epi32(*sum, quads, _mm512_set1_epi8(1 << (BITS - 1 - plane)));
                        }
                    }
                }
                let dot = sums[1..].iter().fold(sums[0], |dot, sum| _mm512_add_epi32(dot, *sum));
                finish(dot, head, out);
            }
        } else {
            for (&head, out) in pairs {
                finish(dot_by_table::<BITS>(lines, query, usize::from(head)), usize::from(head), out);
            }
        }
    }
}

/// Dot products of the 16 tokens' codes with one head: one look-up serves 64 quads, one VNNI instruction sums four of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
fn dot_by_table<const BITS: usize>(lines: &[Line], query: &QueryCodes, head: usize) -> __m512i {
    let (tables, _) = query.tables[2 * query.lines * head..][..2 * query.lines].as_chunks::<2>();
    let mut sum = _mm512_setzero_si512();
    for (v, tables) in tables.iter().enumerate() {
        for plane in 0..BITS {
            let weight = _mm512_set1_epi8(1 << (BITS - 1 - plane));
            let indexes = indexes(load_line(&lines[plane * query.lines + v]));
            for (index, table) in indexes.iter().zip(tables) {
                let quads = _mm512_permutexvar_epi8(*index, load_table(table));
                sum = _mm512_dpbusd_epi32(sum, quads, weight);
            }
        }
    }
    sum
}

/// Dot products of the 16 tokens' four-bit codes with one head's two digits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn dot_by_product(lines: &[Line], query: &QueryCodes, head: usize) -> __m512i {
    let (words, _) = query.words[16 * query.lines * head..][..16 * query.lines].as_chunks::<8>();
    let (words, _) = words.as_chunks::<2>();
    let mut sums = [_mm512_setzero_si512(); 2];
    for (v, words) in words.iter().enumerate() {
        let codes = codes_by_bit(lines, query.lines, v);
        for (sum, words) in sums.iter_mut().zip(words) {
            for (codes, &word) in codes.iter().zip(words) {
                *sum = _mm512_dpbusd_epi32(*sum, *codes, _mm512_set1_epi32(word));
            }
        }
    }
    _mm512_add_epi32(_mm512_slli_epi32::<7>(sums[0]), sums[1])
}

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vbmi,avx512vnni")]
pub(super) fn add_weighted<const LINES: usize, const BITS: usize>(
    codes: &PageCodes<'_>,
    pairs: &Pairs<'_>,
    weights: Weights<'_>,
    acc: &mut [f32],
) {
    let per_page = codes.lines_per_page();
    let (lines, dims) = (per_page / BITS, per_page / BITS * LINE_DIMS);
    for (i, (page, range)) in pairs.iter().enumerate() {
        if let Some(&ahead) = pairs.pages.get(i + AHEAD) {
            prefetch(&codes.lines[ahead as usize * per_page..][..per_page]);
        }
        let page_lines = &codes.lines[page as usize * per_page..][..per_page];
        let scales = load_scales(&codes.scales[page as usize]);
        let unit = _mm512_reduce_max_ps(_mm512_max_ps(scales, _mm512_setzero_ps())) * (1.0 / BYTE_MAX as f32);
        let known = indexes_of::<LINES, BITS>(page_lines, lines);
        for p in range {
            let head = usize::from(pairs.heads[p]);
            let Some((weights, sum)) = weights.of(p, head) else { continue };
            let step = sum * unit;
            if step < STEP_MIN {
                continue;
            }
            let products = _mm512_mul_ps(load(weights), scales);
            let units = _mm512_cvtps_epi32(_mm512_mul_ps(products, _mm512_set1_ps(1.0 / step)));
            let table = table_of(_mm512_cvtepi32_epi8(units));
            // The last entry of each quad sums all four of its tokens.
            let all = _mm512_permutexvar_epi8(_mm512_set1_epi32(0x3F2F_1F0F), table);
            let zero = _mm512_setzero_si512();
            let middle = _mm512_dpbusd_epi32(zero, all, _mm512_set1_epi8((1 << BITS) - 1));
            let middle = _mm512_sub_epi32(zero, middle);
            let step = _mm512_set1_ps(step);
            let acc = &mut acc[head * dims..][..dims];
            for (v, rows) in acc.as_chunks_mut::<16>().0.chunks_exact_mut(2).enumerate() {
                let mut dots = [middle; 2];
                for plane in 0..BITS {
                    let indexes = if LINES > 0 {
                        known[plane][v]
                    } else {
                        indexes(load_line(&page_lines[plane * lines + v]))
                    };
                    for (dot, index) in dots.iter_mut().zip(indexes) {
                        let quads = _mm512_permutexvar_epi8(index, table);
                        // Twice the plane's place: levels are odd integers.
                        *dot = _mm512_dpbusd_epi32(*dot, quads, _mm512_set1_epi8(2 << (BITS - 1 - plane)));
                    }
                }
                for (row, dot) in rows.iter_mut().zip(dots) {
                    store(row, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), step, load(row)));
                }
            }
        }
    }
}
