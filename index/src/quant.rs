//! Eight-bit summaries and the sixteen-bit query that reads them.
//!
//! A summary vector is `scale * (code - 128)` with codes in 1..=255 and `scale = max|x| / 127`. After rotation the
//! coordinates of a vector are close to Gaussian, so the step is about 3 % of their spread and the rounding error of a
//! logit about 0.8 % of the logits' spread. The query is split into two signed bytes so that its own rounding
//! (1 / 32000 of its largest coordinate) never matters, and so that integer dot products are exact on every instruction set.

use crate::index::Query;
use crate::simd::Isa;
use crate::simd::vectorise::{Kernel, dot, largest, nearest_byte, nearest_int, vectorised};

/// Codes that one 512-bit register pairs with one query word: four dimensions of sixteen entries.
pub(crate) const QUAD: usize = 4;

/// Code of zero.
pub(crate) const ZERO: u8 = 128;

/// Quads that hold `dim` elements.
pub(crate) fn quads_of(dim: usize) -> usize {
    dim.div_ceil(QUAD)
}

/// Signed codes of `x` `[dim]` into `codes` `[dim]`; returns the scale (0 for a zero vector).
pub(crate) fn quantise(isa: Isa, x: &[f32], codes: &mut [i8]) -> f32 {
    vectorised(isa, Quantise { x, codes })
}

struct Quantise<'a> {
    x: &'a [f32],
    codes: &'a mut [i8],
}

impl Kernel for Quantise<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        let scale = largest(self.x) / 127.0;
        // Subnormal scales have no finite reciprocal; such a vector is zero for every purpose here.
        if scale < f32::MIN_POSITIVE {
            self.codes.fill(0);
            return 0.0;
        }
        let inverse = 1.0 / scale;
        for (code, &v) in self.codes.iter_mut().zip(self.x) {
            // |v * inverse| is at most 127 plus rounding, which the nearest integer removes.
            *code = nearest_byte(v * inverse);
        }
        scale
    }
}

/// A group of queries as words of four signed bytes, high and low part, for the block kernel.
#[derive(Debug, Default)]
pub(crate) struct QuantQuery {
    /// Query heads.
    pub group: usize,
    /// `[quads, 2 * group]` words: the high parts of all heads, then the low parts, of four dimensions.
    pub words: Vec<i32>,
    /// `[2 * group]` sum of the signed bytes times 128: what the unsigned summary codes add to each dot product.
    pub offset: Vec<i32>,
    /// `[group]` logit per unit of an entry's spread.
    pub spread: Vec<f32>,
    /// `[group]` logit per unit of `(256 high + low) * summary scale`.
    pub unit: Vec<f32>,
}

impl QuantQuery {
    /// From `q` `[group, dim]` f32, `query` in the frame of the summaries. `by` is the share of the variance that counts.
    pub fn set(&mut self, q: &[f32], query: &Query<'_>, by: f32) {
        let (group, scale) = (query.group, query.scale);
        let dim = q.len() / group.max(1);
        let quads = quads_of(dim);
        self.group = group;
        self.words.clear();
        self.words.resize(quads * 2 * group, 0);
        self.offset.clear();
        self.offset.resize(2 * group, 0);
        self.unit.clear();
        self.spread.clear();
        let isa = Isa::detect();
        for (h, row) in q.chunks_exact(dim).enumerate() {
            let unit = vectorised(isa, Split { row, head: h, query: self });
            self.unit.push(unit * scale);
            self.spread.push(by * scale * scale * dot(row, row));
        }
    }
}

/// Splits one head's row into its bytes; returns the step.
struct Split<'a> {
    row: &'a [f32],
    head: usize,
    query: &'a mut QuantQuery,
}

impl Kernel for Split<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        // The high byte of 32000 is 125, so neither part leaves the range of a signed byte.
        let step = largest(self.row) / 32000.0;
        if step < f32::MIN_POSITIVE {
            return 0.0;
        }
        let inverse = 1.0 / step;
        let (group, h) = (self.query.group, self.head);
        let mut sums = [0i32; 2];
        for (quad, row) in self.row.chunks(QUAD).enumerate() {
            let mut bytes = [[0u8; QUAD]; 2];
            for (d, &v) in row.iter().enumerate() {
                let whole = nearest_int(v * inverse);
                let high = (whole + 128) >> 8;
                let low = whole - (high << 8);
                sums[0] += high;
                sums[1] += low;
                bytes[0][d] = high as u8;
                bytes[1][d] = low as u8;
            }
            for (part, bytes) in bytes.into_iter().enumerate() {
                self.query.words[quad * 2 * group + part * group + h] = i32::from_le_bytes(bytes);
            }
        }
        self.query.offset[h] = 128 * sums[0];
        self.query.offset[group + h] = 128 * sums[1];
        step
    }
}
