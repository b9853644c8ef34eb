//! The definition of every code kernel in plain loops: what the vector versions are compared with, bit by bit.

use super::{BYTE_MAX, Fit, LINE_DIMS, Line, PAGE_TOKENS, PageCodes, QUAD_MAX, QueryCodes, Table};

/// Weight steps below this are taken as zero: their inverse would leave the range of f32.
pub(super) const STEP_MIN: f32 = 1e-30;

/// Sum of sixteen partial sums, halves onto halves.
fn sum_lanes(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// Largest code as f32.
fn top(bits: usize) -> f32 {
    ((1u32 << bits) - 1) as f32
}

/// Code of one coordinate: `floor(x / step + 2^(bits - 1))`, clamped.
fn code(bits: usize, x: f32, inverse_step: f32) -> i32 {
    let half = (1u32 << (bits - 1)) as f32;
    (x * inverse_step + half).max(0.0).min(top(bits)) as i32
}

pub(super) fn energy(x: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    for row in x.as_chunks::<16>().0 {
        for (lane, x) in lanes.iter_mut().zip(row) {
            *lane += x * x;
        }
    }
    sum_lanes(lanes)
}

pub(super) fn fit(bits: usize, x: &[f32], inverse_step: f32) -> Fit {
    let mut along = [0.0; 16];
    let mut levels_sq = 0;
    for row in x.as_chunks::<16>().0 {
        for (lane, &x) in along.iter_mut().zip(row) {
            let level = 2 * code(bits, x, inverse_step) - ((1 << bits) - 1);
            *lane += x * level as f32;
            levels_sq += level * level;
        }
    }
    Fit { along: sum_lanes(along), levels_sq }
}

pub(super) fn quantise(bits: usize, x: &[f32], inverse_step: f32, words: &mut [u32]) {
    let lines = x.len() / LINE_DIMS;
    words.fill(0);
    for (i, &x) in x.iter().enumerate() {
        let code = code(bits, x, inverse_step) as u32;
        for plane in 0..bits {
            let bit = (code >> (bits - 1 - plane)) & 1;
            words[plane * lines + i / LINE_DIMS] |= bit << (i % LINE_DIMS);
        }
    }
}

/// The codes of bit `s` of every byte of line `v`: `[byte]` in 0..2^BITS.
fn codes_of_bit<const BITS: usize>(page: &[Line], lines: usize, v: usize, s: usize) -> [i32; 64] {
    std::array::from_fn(|byte| {
        (0..BITS).fold(0, |code, plane| {
            let word = page[plane * lines + v].0[byte / 4];
            2 * code + ((word >> (8 * (byte % 4) + s)) & 1) as i32
        })
    })
}

pub(super) fn score<const HEADS: usize, const BITS: usize, const DIGITS: usize>(
    codes: &PageCodes<'_>,
    query: &QueryCodes,
    first: usize,
    pages: &[u32],
    out: &mut [f32],
) {
    let words = &query.words[first * query.lines * DIGITS * 8..];
    let (words, _) = words[..HEADS * query.lines * DIGITS * 8].as_chunks::<HEADS>();
    let per_page = codes.lines_per_page();
    for (&page, out) in pages.iter().zip(out.chunks_exact_mut(query.group * PAGE_TOKENS)) {
        let lines = &codes.lines[page as usize * per_page..][..per_page];
        let mut sums = [[[0i32; PAGE_TOKENS]; HEADS]; DIGITS];
        for (v, s) in (0..query.lines).flat_map(|v| (0..8).map(move |s| (v, s))) {
            let codes = codes_of_bit::<BITS>(lines, query.lines, v, s);
            for (digit, sums) in sums.iter_mut().enumerate() {
                let words = words[8 * (v * DIGITS + digit) + s];
                for (sums, word) in sums.iter_mut().zip(words) {
                    for (byte, code) in codes.iter().enumerate() {
                        sums[byte / 4] += code * i32::from(word.to_le_bytes()[byte % 4] as i8);
                    }
                }
            }
        }
        let scales = &codes.scales[page as usize];
        for g in 0..HEADS {
            for t in 0..PAGE_TOKENS {
                let dot = sums.iter().fold(0, |dot, sums| 128 * dot + sums[g][t]);
                let exact = 2 * dot - ((1 << BITS) - 1) * query.offsets[first + g];
                let scale = half::f16::from_bits(scales[t]).to_f32();
                out[(first + g) * PAGE_TOKENS + t] = exact as f32 * query.steps[first + g] * scale;
            }
        }
    }
}

/// One table for each line and nibble, by the definition of [`Table`].
pub(super) fn tables(units: &[i8], mut put: impl FnMut(usize, usize, Table)) {
    for (line, units) in units.as_chunks::<LINE_DIMS>().0.iter().enumerate() {
        for nibble in 0..2 {
            let entry = |at: usize| {
                let quad = &units[8 * (at / 16) + 4 * nibble..][..4];
                let selected = quad.iter().enumerate().filter(|(j, _)| at >> j & 1 == 1);
                let negative = quad.iter().filter(|unit| **unit < 0);
                let sum = selected.map(|(_, unit)| i32::from(*unit)).sum::<i32>();
                (sum - negative.map(|unit| i32::from(*unit)).sum::<i32>()) as u8
            };
            put(line, nibble, Table(std::array::from_fn(entry)));
        }
    }
}

/// Products of weights and scales as multiples of the returned step.
fn round_weights(weights: &[f32], scales: &[u16; PAGE_TOKENS]) -> (f32, [i32; PAGE_TOKENS]) {
    let products: [f32; PAGE_TOKENS] =
        std::array::from_fn(|t| (weights[t] * half::f16::from_bits(scales[t]).to_f32()).max(0.0));
    let step = products.iter().fold(0.0f32, |most, p| most.max(p * (1.0 / BYTE_MAX as f32)));
    let step = products
        .as_chunks::<4>()
        .0
        .iter()
        .fold(step, |most, [a, b, c, d]| most.max(((a + b) + (c + d)) * (1.0 / QUAD_MAX as f32)));
    if step < STEP_MIN {
        return (0.0, [0; PAGE_TOKENS]);
    }
    let inverse = 1.0 / step;
    (step, products.map(|p| (p * inverse).round_ties_even() as i32))
}

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
        for g in 0..HEADS {
            let weights = &weights[(first + g) * PAGE_TOKENS..][..PAGE_TOKENS];
            let (step, rounded) = round_weights(weights, &codes.scales[page as usize]);
            if step == 0.0 {
                continue;
            }
            let sum: i32 = rounded.iter().sum();
            for v in 0..lines {
                for h in 0..2 {
                    let mut dots = [0; 16];
                    for j in 0..4 {
                        let codes = codes_of_bit::<BITS>(page_lines, lines, v, 4 * h + j);
                        for (byte, code) in codes.iter().enumerate() {
                            dots[byte / 4] += code * rounded[4 * (byte % 4) + j];
                        }
                    }
                    for (lane, dot) in dots.iter().enumerate() {
                        let exact = 2 * dot - ((1 << BITS) - 1) * sum;
                        let acc = &mut acc[g * dims + LINE_DIMS * v + 16 * h + lane];
                        *acc = (exact as f32).mul_add(step, *acc);
                    }
                }
            }
        }
    }
}
