//! The code kernels on 512-bit registers: a page's 16 tokens are the 16 lanes, VNNI multiplies 64 codes by 64 query bytes.

use std::arch::x86_64::*;

use super::scalar::STEP_MIN;
use super::{
    BYTE_MAX, Fit, LINE_DIMS, Line, PAGE_TOKENS, PAGES_PER_PASS, PageCodes, QUAD_MAX, QueryCodes, Scales,
    Table,
};

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

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vbmi,avx512vnni")]
pub(super) fn score<const HEADS: usize, const BITS: usize, const DIGITS: usize>(
    codes: &PageCodes<'_>,
    query: &QueryCodes,
    first: usize,
    pages: &[u32],
    out: &mut [f32],
) {
    let per_page = codes.lines_per_page();
    for (&page, out) in pages.iter().zip(out.chunks_exact_mut(query.group * PAGE_TOKENS)) {
        let lines = &codes.lines[page as usize * per_page..][..per_page];
        let dots = if BITS <= 2 {
            dots_by_table::<HEADS, BITS>(lines, query, first)
        } else {
            dots_by_product::<HEADS, DIGITS>(lines, query, first)
        };
        let scales = load_scales(&codes.scales[page as usize]);
        let (out, _) = out[first * PAGE_TOKENS..].as_chunks_mut::<PAGE_TOKENS>();
        for g in 0..HEADS {
            let offset = _mm512_set1_epi32(((1 << BITS) - 1) * query.offsets[first + g]);
            let exact = _mm512_sub_epi32(_mm512_add_epi32(dots[g], dots[g]), offset);
            let exact = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(query.steps[first + g]));
            store(&mut out[g], _mm512_mul_ps(exact, scales));
        }
    }
}

/// Dot products of the 16 tokens' codes with each head: one look-up serves 64 quads, one VNNI instruction sums four of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
fn dots_by_table<const HEADS: usize, const BITS: usize>(
    lines: &[Line],
    query: &QueryCodes,
    first: usize,
) -> [__m512i; HEADS] {
    let (tables, _) = query.tables[2 * first * query.lines..].as_chunks::<HEADS>();
    let (tables, _) = tables[..2 * query.lines].as_chunks::<2>();
    let mut sums = [_mm512_setzero_si512(); HEADS];
    for (v, tables) in tables.iter().enumerate() {
        for plane in 0..BITS {
            let weight = _mm512_set1_epi8(1 << (BITS - 1 - plane));
            let indexes = indexes(load_line(&lines[plane * query.lines + v]));
            for (index, tables) in indexes.iter().zip(tables) {
                for (sum, table) in sums.iter_mut().zip(tables) {
                    let quads = _mm512_permutexvar_epi8(*index, load_table(table));
                    *sum = _mm512_dpbusd_epi32(*sum, quads, weight);
                }
            }
        }
    }
    sums
}

/// Dot products of the 16 tokens' four-bit codes with each head's digits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn dots_by_product<const HEADS: usize, const DIGITS: usize>(
    lines: &[Line],
    query: &QueryCodes,
    first: usize,
) -> [__m512i; HEADS] {
    let words = &query.words[first * query.lines * DIGITS * 8..];
    let (words, _) = words[..HEADS * query.lines * DIGITS * 8].as_chunks::<HEADS>();
    let (words, _) = words.as_chunks::<8>();
    let (words, _) = words.as_chunks::<DIGITS>();
    let mut sums = [[_mm512_setzero_si512(); HEADS]; DIGITS];
    for (v, words) in words.iter().enumerate() {
        let codes = codes_by_bit(lines, query.lines, v);
        for (sums, words) in sums.iter_mut().zip(words) {
            for (codes, words) in codes.iter().zip(words) {
                for (sum, &word) in sums.iter_mut().zip(words) {
                    *sum = _mm512_dpbusd_epi32(*sum, *codes, _mm512_set1_epi32(word));
                }
            }
        }
    }
    let mut dots = sums[0];
    for sums in &sums[1..] {
        for (dot, sum) in dots.iter_mut().zip(sums) {
            *dot = _mm512_add_epi32(_mm512_slli_epi32::<7>(*dot), *sum);
        }
    }
    dots
}

/// Rounded weights of the heads of up to [`PAGES_PER_PASS`] pages.
struct Weights<const HEADS: usize> {
    tables: [[Table; HEADS]; PAGES_PER_PASS],
    steps: [[f32; HEADS]; PAGES_PER_PASS],
    offsets: [[i32; HEADS]; PAGES_PER_PASS],
}

/// Rounds a page's products of weights and scales for one head to multiples of the returned step; fills their table and
/// returns what the codes' offset adds to every sum, in half levels.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vbmi,avx512vnni")]
fn round_weights<const BITS: usize>(
    weights: &[f32; PAGE_TOKENS],
    scales: __m512,
    table: &mut Table,
) -> (f32, i32) {
    let products = _mm512_max_ps(_mm512_mul_ps(load(weights), scales), _mm512_setzero_ps());
    let pairs = _mm512_add_ps(products, _mm512_permute_ps::<0b10_11_00_01>(products));
    let quads = _mm512_add_ps(pairs, _mm512_permute_ps::<0b01_00_11_10>(pairs));
    let alone = _mm512_mul_ps(products, _mm512_set1_ps(1.0 / BYTE_MAX as f32));
    let need = _mm512_max_ps(alone, _mm512_mul_ps(quads, _mm512_set1_ps(1.0 / QUAD_MAX as f32)));
    let step = _mm512_reduce_max_ps(need);
    if step < STEP_MIN {
        store_table(table, _mm512_setzero_si512());
        return (0.0, 0);
    }
    let units = _mm512_cvtps_epi32(_mm512_mul_ps(products, _mm512_set1_ps(1.0 / step)));
    let sums = table_of(_mm512_cvtepi32_epi8(units));
    store_table(table, sums);
    // The last entry of each quad sums all four of its tokens.
    let all = _mm512_permutexvar_epi8(_mm512_set1_epi32(0x3F2F_1F0F), sums);
    let offset = _mm512_dpbusd_epi32(_mm512_setzero_si512(), all, _mm512_set1_epi8((1 << BITS) - 1));
    (step, -_mm512_cvtsi512_si32(offset))
}

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vbmi,avx512vnni")]
pub(super) fn add_weighted<const HEADS: usize, const BITS: usize>(
    codes: &PageCodes<'_>,
    first: usize,
    pages: &[u32],
    weights: &[f32],
    acc: &mut [f32],
) {
    let (per_page, group) = (codes.lines_per_page(), weights.len() / (pages.len() * PAGE_TOKENS));
    let (lines, dims) = (per_page / BITS, acc.len() / HEADS);
    let mut rounded = Weights::<HEADS> {
        tables: [[Table([0; 64]); HEADS]; PAGES_PER_PASS],
        steps: [[0.0; HEADS]; PAGES_PER_PASS],
        offsets: [[0; HEADS]; PAGES_PER_PASS],
    };
    let mut used = [0u32; PAGES_PER_PASS];
    let mut num_used = 0;
    for (&page, weights) in pages.iter().zip(weights.chunks_exact(group * PAGE_TOKENS)) {
        let scales = load_scales(&codes.scales[page as usize]);
        let (weights, _) = weights[first * PAGE_TOKENS..].as_chunks::<PAGE_TOKENS>();
        let (steps, offsets) = (&mut rounded.steps[num_used], &mut rounded.offsets[num_used]);
        for (g, table) in rounded.tables[num_used].iter_mut().enumerate() {
            (steps[g], offsets[g]) = round_weights::<BITS>(&weights[g], scales, table);
        }
        used[num_used] = page;
        num_used += usize::from(steps.iter().any(|step| *step > 0.0));
    }
    for v in 0..lines {
        let mut sums = [[_mm512_setzero_ps(); HEADS]; 2];
        for (h, sums) in sums.iter_mut().enumerate() {
            for (g, sum) in sums.iter_mut().enumerate() {
                *sum = load(&acc[g * dims + LINE_DIMS * v + 16 * h..].as_chunks().0[0]);
            }
        }
        for (i, &page) in used[..num_used].iter().enumerate() {
            let page_lines = &codes.lines[page as usize * per_page..][..per_page];
            let mut planes = [[_mm512_setzero_si512(); 2]; BITS];
            for (plane, to) in planes.iter_mut().enumerate() {
                *to = indexes(load_line(&page_lines[plane * lines + v]));
            }
            for g in 0..HEADS {
                let table = load_table(&rounded.tables[i][g]);
                let step = _mm512_set1_ps(rounded.steps[i][g]);
                for (h, sums) in sums.iter_mut().enumerate() {
                    let mut exact = _mm512_set1_epi32(rounded.offsets[i][g]);
                    for (plane, indexes) in planes.iter().enumerate() {
                        let quads = _mm512_permutexvar_epi8(indexes[h], table);
                        // Twice the plane's place: levels are odd integers.
                        exact = _mm512_dpbusd_epi32(exact, quads, _mm512_set1_epi8(2 << (BITS - 1 - plane)));
                    }
                    sums[g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), step, sums[g]);
                }
            }
        }
        for (h, sums) in sums.iter().enumerate() {
            for (g, sum) in sums.iter().enumerate() {
                store(&mut acc[g * dims + LINE_DIMS * v + 16 * h..].as_chunks_mut().0[0], *sum);
            }
        }
    }
}
