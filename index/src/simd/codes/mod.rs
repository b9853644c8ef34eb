//! Kernels over low-bit codes: fit and encode, score a page's tokens, sum a page's weighted values.
//!
//! Every sum whose order could matter is an integer sum, a fixed tree over sixteen interleaved partial sums, or taken page by page; a
//! multiplication is fused with an addition either by all versions or by none. Codes, scales, scores and sums are therefore
//! **bit-identical** on every instruction set; `scalar` is the definition, `avx2` and `avx512` repeat it.
//!
//! A code `c` of `bits` bits stands for the odd level `2c - (2^bits - 1)` times the token's scale: -1, 1 for one bit; -3, -1,
//! 1, 3 for two; -15, -13, ..., 15 for four. Plane 0 holds the top bit of every code, which is its sign, plane 1 the next
//! bit, and so on; the first planes of a wide code are themselves a narrow code.

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::isa::Isa;

/// Tokens of a page: one per 32-bit lane of a [`Line`].
pub const PAGE_TOKENS: usize = 16;

/// Coordinates covered by one [`Line`] of one plane.
pub const LINE_DIMS: usize = 32;

/// Most words of a token's codes: four planes of the largest dimension.
pub(crate) const WORDS_MAX: usize = 4 * crate::rotate::DIM_MAX / LINE_DIMS;

/// Query heads that one pass of a kernel serves; larger groups take several passes over codes that are then in cache.
pub(crate) const HEADS_PER_PASS: usize = 8;

/// Pages per pass, so that a second pass over the heads finds the codes in the first-level or second-level cache.
const PAGES_PER_PASS: usize = 32;

/// 512 bits of one plane of one page: 16 tokens by 32 coordinates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Line(pub [u32; 16]);

/// The f16 bits of the scales of a page's tokens.
pub type Scales = [u16; PAGE_TOKENS];

/// Codes of one kind (key or value) of many pages: `lines` is `[pages][bits][dim / 32]`, `scales` `[pages]`.
#[derive(Clone, Copy, Debug)]
pub struct PageCodes<'a> {
    /// Bits per code as stored: 1, 2 or 4.
    pub bits: usize,
    /// `[pages][bits][lines_per_plane]`.
    pub lines: &'a [Line],
    /// `[pages]`.
    pub scales: &'a [Scales],
}

impl PageCodes<'_> {
    fn lines_per_page(&self) -> usize {
        self.lines.len() / self.scales.len().max(1)
    }
}

/// Sums of four signed bytes under every selection: byte `16 i + n` is the sum of those bytes of quad `i` whose bit is set in
/// `n`, minus the quad's negative bytes, hence 0 to 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Table(pub [u8; 64]);

/// A group of integer queries as the score kernel reads them, in passes of at most `HEADS_PER_PASS` heads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QueryCodes {
    /// Planes to read: 1, 2 or 4.
    pub(crate) bits: usize,
    /// Query heads.
    pub(crate) group: usize,
    /// Lines per plane.
    pub(crate) lines: usize,
    /// To multiply by; per pass `[lines][digits][8 bits][heads]` words of four signed bytes: byte `i` of bit `s` belongs to
    /// coordinate `32 line + 8 i + s`. Empty where `tables` serve.
    pub(crate) words: Vec<i32>,
    /// To look up; per pass `[lines][2][heads]`: quad `i` of nibble `n` is coordinates `32 line + 8 i + 4 n ..`.
    pub(crate) tables: Vec<Table>,
    /// `[group]`: what the codes' offset adds, in half levels: the sum of the integer query with words, of its magnitudes with
    /// tables.
    pub(crate) offsets: Vec<i32>,
    /// `[group]`: value of one unit of the integer query.
    pub(crate) steps: Vec<f32>,
}

/// Bytes that represent one coordinate of a query: one (7 bits and sign) for codes of one and two bits, two (14 bits and sign)
/// for four, so that rounding the query always adds less than 0.1 % to the energy of the codes' own error.
pub(crate) const fn digits(bits: usize) -> usize {
    if bits == 4 { 2 } else { 1 }
}

/// Largest magnitude of one byte of an integer query or weight.
pub(crate) const BYTE_MAX: i32 = 127;

/// Largest sum of magnitudes of four neighbouring bytes before they are rounded: a table entry (8 bits) then holds them, each
/// rounding adding at most one half.
pub(crate) const QUAD_MAX: i32 = 253;

/// Largest magnitude of an integer query of two digits: a high digit of 127 and a low digit of 63.
pub(crate) const TWO_DIGITS_MAX: i32 = 128 * 127 + 63;

/// Whether scoring `bits` planes looks up sums of four coordinates instead of multiplying: where the table fits a register.
pub(crate) fn looks_up(isa: Isa, bits: usize) -> bool {
    matches!(isa, Isa::Avx512(_)) && bits <= 2
}

/// What a candidate step reaches: the least-squares scale is `along / levels_sq`, the energy it explains `along^2 / levels_sq`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fit {
    /// `sum_i x_i * level_i`.
    pub along: f32,
    /// `sum_i level_i^2`, padding included.
    pub levels_sq: i32,
}

macro_rules! dispatch {
    ($isa:expr, $name:ident $(::<$($generic:literal),*>)? ($($arg:expr),*)) => {
        match $isa {
            Isa::Scalar => scalar::$name$(::<$($generic),*>)?($($arg),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value proves that the CPU has AVX2, FMA and F16C, which is all that the callee enables.
            Isa::Avx2(_) => unsafe { avx2::$name$(::<$($generic),*>)?($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value proves that the CPU has AVX-512 F, BW, DQ, VBMI and VNNI, which is all that the callee enables.
            Isa::Avx512(_) => unsafe { avx512::$name$(::<$($generic),*>)?($($arg),*) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2(_) | Isa::Avx512(_) => scalar::$name$(::<$($generic),*>)?($($arg),*),
        }
    };
}

/// Chooses the instance for a number of heads between 1 and [`HEADS_PER_PASS`].
macro_rules! dispatch_heads {
    ($isa:expr, $heads:expr, $name:ident :: <$($generic:literal),*> ($($arg:expr),*)) => {
        match $heads {
            1 => dispatch!($isa, $name::<1, $($generic),*>($($arg),*)),
            2 => dispatch!($isa, $name::<2, $($generic),*>($($arg),*)),
            3 => dispatch!($isa, $name::<3, $($generic),*>($($arg),*)),
            4 => dispatch!($isa, $name::<4, $($generic),*>($($arg),*)),
            5 => dispatch!($isa, $name::<5, $($generic),*>($($arg),*)),
            6 => dispatch!($isa, $name::<6, $($generic),*>($($arg),*)),
            7 => dispatch!($isa, $name::<7, $($generic),*>($($arg),*)),
            _ => dispatch!($isa, $name::<8, $($generic),*>($($arg),*)),
        }
    };
}

/// `sum_i x_i^2` of `x` (a multiple of 32 f32).
pub(crate) fn energy(isa: Isa, x: &[f32]) -> f32 {
    dispatch!(isa, energy(x))
}

/// Levels of `x` (a multiple of 32 f32) for `inverse_step = 1 / (2 scale)`, measured against `x`.
pub(crate) fn fit(isa: Isa, bits: usize, x: &[f32], inverse_step: f32) -> Fit {
    dispatch!(isa, fit(bits, x, inverse_step))
}

/// Writes the codes of `x` (a multiple of 32 f32) for `inverse_step` to `words` `[bits][x.len() / 32]`: bit `b` of word `w` of
/// a plane belongs to coordinate `32 w + b`.
pub(crate) fn quantise(isa: Isa, bits: usize, x: &[f32], inverse_step: f32, words: &mut [u32]) {
    assert_eq!(words.len(), bits * (x.len() / LINE_DIMS), "words of {} coordinates", x.len());
    dispatch!(isa, quantise(bits, x, inverse_step, words));
}

/// Tables of one head's integer query `units` (a multiple of 32 bytes): `put(line, nibble, table)` for each.
pub(crate) fn tables(isa: Isa, units: &[i8], put: impl FnMut(usize, usize, Table)) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value proves that the CPU has AVX-512 F and BW, which is all that the callee enables.
        Isa::Avx512(_) => unsafe { avx512::tables(units, put) },
        _ => scalar::tables(units, put),
    }
}

/// `out[i][g][t] = scale_t * sum_d level_t[d] * query_g[d]` for the tokens `t` of `pages[i]`: `out` `[pages][group][16]` f32.
///
/// # Panics
/// When a page does not exist, the query has more planes or other lines than the codes, or `out` another length.
pub fn score(isa: Isa, codes: &PageCodes<'_>, query: &QueryCodes, pages: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), pages.len() * query.group * PAGE_TOKENS, "scores of {} pages", pages.len());
    assert!(query.bits <= codes.bits, "query of {} planes, codes of {}", query.bits, codes.bits);
    assert_eq!(codes.lines.len(), codes.scales.len() * codes.bits * query.lines, "lines of the pages");
    for (pages, out) in
        pages.chunks(PAGES_PER_PASS).zip(out.chunks_mut(PAGES_PER_PASS * query.group * PAGE_TOKENS))
    {
        for first in (0..query.group).step_by(HEADS_PER_PASS) {
            let heads = (query.group - first).min(HEADS_PER_PASS);
            match query.bits {
                1 => dispatch_heads!(isa, heads, score::<1, 1>(codes, query, first, pages, out)),
                2 => dispatch_heads!(isa, heads, score::<2, 1>(codes, query, first, pages, out)),
                _ => dispatch_heads!(isa, heads, score::<4, 2>(codes, query, first, pages, out)),
            }
        }
    }
}

/// `acc[g][d] += sum_i sum_t weights[i][g][t] * scale_t * level_t[d]` over the tokens `t` of `pages[i]`: `weights`
/// `[pages][group][16]` f32 (negative counts as zero), `acc` `[group][dims]` f32 with `dims` a multiple of 32; codes of at most two bits.
///
/// Within a page and head, `weight * scale` is rounded to multiples of a step: 1/127 of the largest product, or 1/253 of the
/// largest sum over tokens `4 j .. 4 j + 4` where that is more. Below a step of 1e-30 the page contributes nothing.
///
/// # Panics
/// When a page does not exist or a slice has another length.
pub fn add_weighted(isa: Isa, codes: &PageCodes<'_>, pages: &[u32], weights: &[f32], acc: &mut [f32]) {
    if pages.is_empty() {
        return;
    }
    let group = weights.len() / (pages.len() * PAGE_TOKENS);
    assert_eq!(weights.len(), pages.len() * group * PAGE_TOKENS, "weights of {} pages", pages.len());
    let dims = codes.lines_per_page() / codes.bits * LINE_DIMS;
    assert_eq!(acc.len(), group * dims, "sums of {group} heads");
    for (pages, weights) in
        pages.chunks(PAGES_PER_PASS).zip(weights.chunks(PAGES_PER_PASS * group * PAGE_TOKENS))
    {
        for (pass, acc) in acc.chunks_mut(HEADS_PER_PASS * dims).enumerate() {
            let first = pass * HEADS_PER_PASS;
            let heads = (group - first).min(HEADS_PER_PASS);
            match codes.bits {
                1 => dispatch_heads!(isa, heads, add_weighted::<1>(codes, first, pages, weights, acc)),
                _ => dispatch_heads!(isa, heads, add_weighted::<2>(codes, first, pages, weights, acc)),
            }
        }
    }
}
