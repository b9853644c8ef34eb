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

/// Which query heads ask which pages: the heads `heads[ends[i - 1]..ends[i]]` ask page `pages[i]`. A *pair* is one of `heads` with its
/// page; arrays by pair follow their order.
#[derive(Clone, Copy, Debug)]
pub struct Pairs<'a> {
    /// `[pages]` page numbers.
    pub pages: &'a [u32],
    /// `[pages]` where each page's heads end, not decreasing.
    pub ends: &'a [u32],
    /// `[pairs]` query heads.
    pub heads: &'a [u16],
}

impl<'a> Pairs<'a> {
    /// Pages with the range of their pairs.
    pub fn iter(self) -> impl Iterator<Item = (u32, std::ops::Range<usize>)> + 'a {
        let mut start = 0;
        self.pages.iter().zip(self.ends).map(move |(&page, &end)| {
            let range = start..end as usize;
            start = end as usize;
            (page, range)
        })
    }

    /// Whether the ends fit the pages and `len` entries by pair.
    fn fits(&self, len: usize) -> bool {
        let last = self.ends.last().map_or(0, |&end| end as usize);
        self.ends.len() == self.pages.len() && last == self.heads.len() && self.heads.len() == len
    }
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

/// A group of integer queries as the score kernel reads them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QueryCodes {
    /// Planes to read: 1, 2 or 4.
    pub(crate) bits: usize,
    /// Query heads.
    pub(crate) group: usize,
    /// Lines per plane.
    pub(crate) lines: usize,
    /// To multiply by: `[group][lines][digits][8 bits]` words of four signed bytes: byte `i` of bit `s` belongs to coordinate
    /// `32 line + 8 i + s`. Empty where `tables` serve.
    pub(crate) words: Vec<i32>,
    /// To look up: `[group][lines][2]`: quad `i` of nibble `n` is coordinates `32 line + 8 i + 4 n ..`.
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

/// Largest sum of magnitudes of four neighbouring query bytes before they are rounded: a table entry (8 bits) then holds them,
/// each rounding adding at most one half.
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

/// Chooses the instance for a number of lines: the common ones keep a page's codes in registers, 0 takes any number.
macro_rules! dispatch_lines {
    ($isa:expr, $lines:expr, $name:ident :: <$bits:literal> ($($arg:expr),*)) => {
        match $lines {
            2 => dispatch!($isa, $name::<2, $bits>($($arg),*)),
            3 => dispatch!($isa, $name::<3, $bits>($($arg),*)),
            4 => dispatch!($isa, $name::<4, $bits>($($arg),*)),
            _ => dispatch!($isa, $name::<0, $bits>($($arg),*)),
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

/// `out[p][t] = scale_t * sum_d level_t[d] * query_h[d]` for the tokens `t` of the page and the head `h` of pair `p`: `out`
/// `[pairs][16]` f32.
///
/// # Panics
/// When a page or head does not exist, the query has more planes or other lines than the codes, or `out` another length.
pub fn score(isa: Isa, codes: &PageCodes<'_>, query: &QueryCodes, pairs: &Pairs<'_>, out: &mut [f32]) {
    let (out, rest) = out.as_chunks_mut::<PAGE_TOKENS>();
    assert!(rest.is_empty() && pairs.fits(out.len()), "scores of {} pairs", pairs.heads.len());
    assert!(query.bits <= codes.bits, "query of {} planes, codes of {}", query.bits, codes.bits);
    assert_eq!(codes.lines.len(), codes.scales.len() * codes.bits * query.lines, "lines of the pages");
    match query.bits {
        1 => dispatch_lines!(isa, query.lines, score::<1>(codes, query, pairs, out)),
        2 => dispatch_lines!(isa, query.lines, score::<2>(codes, query, pairs, out)),
        _ => dispatch!(isa, score::<0, 4>(codes, query, pairs, out)),
    }
}

/// Weights of the tokens of pairs.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// `[pairs][16]` f32, none negative.
    pub tokens: &'a [f32],
    /// `[pairs]` their sums over the tokens.
    pub sums: &'a [f32],
    /// `[group]` pairs whose sum is at most their head's contribute nothing.
    pub least: &'a [f32],
}

impl Weights<'_> {
    /// Weights `[16]` and sum of a pair that contributes.
    fn of(&self, pair: usize, head: usize) -> Option<(&[f32; PAGE_TOKENS], f32)> {
        let sum = self.sums[pair];
        (sum > self.least[head]).then(|| (&self.tokens.as_chunks().0[pair], sum))
    }
}

/// `acc[h][d] += sum_p sum_t weight_p[t] * scale_t * level_t[d]` over the pairs `p` of head `h` and the tokens `t` of their pages: `acc`
/// `[group][dims]` f32 with `dims` the coordinates of a page's lines; codes of at most two bits.
///
/// Within a pair `weight * scale` is rounded to multiples of 1/127 of `sum * largest scale`. Below a step of 1e-30 the pair
/// contributes nothing.
///
/// # Panics
/// When a page or head does not exist or a slice has another length.
pub fn add_weighted(
    isa: Isa,
    codes: &PageCodes<'_>,
    pairs: &Pairs<'_>,
    weights: Weights<'_>,
    acc: &mut [f32],
) {
    assert!(pairs.fits(weights.sums.len()), "weights of {} pairs", pairs.heads.len());
    assert_eq!(weights.tokens.len(), weights.sums.len() * PAGE_TOKENS, "sums of the pairs");
    let lines = codes.lines_per_page() / codes.bits;
    match codes.bits {
        1 => dispatch_lines!(isa, lines, add_weighted::<1>(codes, pairs, weights, acc)),
        _ => dispatch_lines!(isa, lines, add_weighted::<2>(codes, pairs, weights, acc)),
    }
}
