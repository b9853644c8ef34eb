//! The definition of every code kernel in plain loops: what the vector versions are compared with, bit by bit.

use super::{
    BYTE_MAX, Fit, LINE_DIMS, Line, PAGE_TOKENS, PageCodes, Pairs, QueryCodes, Table, Weights, digits,
};

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

pub(super) fn score<const LINES: usize, const BITS: usize>(
    codes: &PageCodes<'_>,
    query: &QueryCodes,
    pairs: &Pairs<'_>,
    out: &mut [[f32; PAGE_TOKENS]],
) {
    let digits = digits(BITS);
    let (words, _) = query.words.as_chunks::<8>();
    let per_page = codes.lines_per_page();
    for (page, range) in pairs.iter() {
        let lines = &codes.lines[page as usize * per_page..][..per_page];
        let scales = &codes.scales[page as usize];
        for (&head, out) in pairs.heads[range.clone()].iter().zip(&mut out[range]) {
            let head = usize::from(head);
            let words = &words[head * query.lines * digits..][..query.lines * digits];
            let mut sums = [[0i32; PAGE_TOKENS]; 2];
            for (v, s) in (0..query.lines).flat_map(|v| (0..8).map(move |s| (v, s))) {
                let codes = codes_of_bit::<BITS>(lines, query.lines, v, s);
                for (words, sums) in words[v * digits..][..digits].iter().zip(&mut sums) {
                    for (byte, code) in codes.iter().enumerate() {
                        sums[byte / 4] += code * i32::from(words[s].to_le_bytes()[byte % 4] as i8);
                    }
                }
            }
            for (t, out) in out.iter_mut().enumerate() {
                let dot = sums[..digits].iter().fold(0, |dot, sums| 128 * dot + sums[t]);
                let exact = 2 * dot - ((1 << BITS) - 1) * query.offsets[head];
                *out = exact as f32 * query.steps[head] * half::f16::from_bits(scales[t]).to_f32();
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
fn round_weights(
    weights: &[f32; PAGE_TOKENS],
    sum: f32,
    scales: &[u16; PAGE_TOKENS],
) -> (f32, [i32; PAGE_TOKENS]) {
    let scales = scales.map(|scale| half::f16::from_bits(scale).to_f32());
    let step = sum * (scales.iter().fold(0.0f32, |most, s| most.max(*s)) * (1.0 / BYTE_MAX as f32));
    if step < STEP_MIN {
        return (0.0, [0; PAGE_TOKENS]);
    }
    let inverse = 1.0 / step;
    (step, std::array::from_fn(|t| (weights[t] * scales[t] * inverse).round_ties_even() as i32))
}

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
        for p in range {
            let head = usize::from(pairs.heads[p]);
            let Some((weights, sum)) = weights.of(p, head) else { continue };
            let (step, rounded) = round_weights(weights, sum, &codes.scales[page as usize]);
            if step == 0.0 {
                continue;
            }
            let sum: i32 = rounded.iter().sum();
            let acc = &mut acc[head * dims..][..dims];
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
                        let acc = &mut acc[LINE_DIMS * v + 16 * h + lane];
                        *acc = (exact as f32).mul_add(step, *acc);
                    }
                }
            }
        }
    }
}
