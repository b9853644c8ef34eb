//! Eight-bit centres in blocks of sixteen, for finding the nearest centre of many points at once.

use rayon::prelude::*;

use crate::blocks::LANES;
use crate::index::MAX_DIM;
use crate::quant::{QUAD, ZERO, quads_of, quantise};
use crate::simd::Isa;
use crate::simd::dense;

/// Rows that one task codes.
const ROWS: usize = 1024;

/// Points at eight bits: `[n, stride]` signed codes with a scale each, `stride` = dimension rounded up to four.
#[derive(Clone, Debug)]
pub(crate) struct Codes {
    pub stride: usize,
    pub rows: Vec<i8>,
    pub scale: Vec<f32>,
    /// 128 times the sum of a row's codes: what the centres' offset adds to a dot product.
    pub offset: Vec<i32>,
}

impl Codes {
    /// Room for `n` points of `dim` elements.
    pub fn new(n: usize, dim: usize) -> Self {
        let stride = quads_of(dim) * QUAD;
        Self { stride, rows: vec![0; n * stride], scale: vec![0.0; n], offset: vec![0; n] }
    }

    /// Writes point `i` from `row` `[dim]` f32.
    pub fn set(&mut self, i: usize, row: &[f32]) {
        let codes = &mut self.rows[i * self.stride..][..row.len()];
        self.scale[i] = quantise(Isa::detect(), row, codes);
        self.offset[i] = offset_of(codes);
    }

    pub fn len(&self) -> usize {
        self.scale.len()
    }

    /// All rows `[n, dim]` of `data`.
    pub fn of(data: &[f32], dim: usize) -> Self {
        let mut codes = Self::new(data.len() / dim, dim);
        for (i, row) in data.chunks_exact(dim).enumerate() {
            codes.set(i, row);
        }
        codes
    }

    /// All rows `[n, dim]` of `data` less `centre` `[dim]`.
    pub fn centred(data: &[f32], centre: &[f32]) -> Self {
        let dim = centre.len();
        let mut codes = Self::new(data.len() / dim, dim);
        let stride = codes.stride;
        let numbers = codes.scale.par_chunks_mut(ROWS).zip(codes.offset.par_chunks_mut(ROWS));
        let rows = codes.rows.par_chunks_mut(ROWS * stride).zip(data.par_chunks(ROWS * dim));
        rows.zip(numbers).for_each(|((rows, data), (scale, offset))| {
            let mut shifted = [0.0f32; MAX_DIM];
            let shifted = &mut shifted[..dim];
            for (i, (row, data)) in rows.chunks_exact_mut(stride).zip(data.chunks_exact(dim)).enumerate() {
                for ((s, &x), &c) in shifted.iter_mut().zip(data).zip(centre) {
                    *s = x - c;
                }
                scale[i] = quantise(Isa::detect(), shifted, &mut row[..dim]);
                offset[i] = offset_of(row);
            }
        });
        codes
    }

    /// The same points in another order.
    pub fn permuted(&self, order: &[u32]) -> Self {
        let mut codes = Self::new(order.len(), self.stride);
        for (to, &from) in order.iter().enumerate() {
            codes.copy_from(to, self, from as usize);
        }
        codes
    }

    /// Copies point `from` of `other` to point `to`.
    pub fn copy_from(&mut self, to: usize, other: &Codes, from: usize) {
        let stride = self.stride;
        self.rows[to * stride..(to + 1) * stride]
            .copy_from_slice(&other.rows[from * stride..(from + 1) * stride]);
        self.scale[to] = other.scale[from];
        self.offset[to] = other.offset[from];
    }
}

/// See `Codes::offset`.
fn offset_of(codes: &[i8]) -> i32 {
    128 * codes.iter().map(|&c| i32::from(c)).sum::<i32>()
}

/// Centres `[blocks * 16]`; unused lanes are never nearest.
#[derive(Clone, Debug)]
pub(crate) struct Codebook {
    dim: usize,
    codes: Vec<u8>,
    scale: Vec<f32>,
    /// Half the squared length of the centre as stored; infinite for an unused lane.
    half_norm: Vec<f32>,
}

impl Codebook {
    pub fn new(num_blocks: usize, dim: usize) -> Self {
        let stride = quads_of(dim) * QUAD * LANES;
        Self {
            dim,
            codes: vec![ZERO; num_blocks * stride],
            scale: vec![0.0; num_blocks * LANES],
            half_norm: vec![f32::INFINITY; num_blocks * LANES],
        }
    }

    pub fn num_blocks(&self) -> usize {
        self.scale.len() / LANES
    }

    /// Writes a centre `[dim]` f32.
    pub fn set(&mut self, entry: usize, row: &[f32]) {
        let mut codes = [0i8; MAX_DIM];
        let codes = &mut codes[..self.dim];
        let scale = quantise(Isa::detect(), row, codes);
        let stride = quads_of(self.dim) * QUAD * LANES;
        let base = (entry / LANES) * stride + (entry % LANES) * QUAD;
        for (quad, codes) in codes.chunks(QUAD).enumerate() {
            for (slot, &code) in self.codes[base + quad * LANES * QUAD..].iter_mut().zip(codes) {
                *slot = (code as u8) ^ ZERO;
            }
        }
        let norm: i64 = codes.iter().map(|&c| i64::from(c) * i64::from(c)).sum();
        self.scale[entry] = scale;
        self.half_norm[entry] = 0.5 * norm as f32 * scale * scale;
    }

    /// Closeness `x.c - |c|^2 / 2` (larger is nearer; the squared distance is `|x|^2` minus twice it) of all points `x` to the
    /// centres of block `block`: `visit(point, closeness)` for each point.
    pub fn visit(
        &self,
        isa: Isa,
        block: usize,
        points: &Codes,
        dots: &mut Vec<i32>,
        mut visit: impl FnMut(usize, &[f32; LANES]),
    ) {
        let n = points.scale.len();
        dots.resize(n * LANES, 0);
        let stride = points.stride * LANES;
        dense::dots(isa, &self.codes[block * stride..(block + 1) * stride], &points.rows, dots);
        let scale = &self.scale[block * LANES..(block + 1) * LANES];
        let half_norm = &self.half_norm[block * LANES..(block + 1) * LANES];
        let mut close = [0.0f32; LANES];
        for (i, dots) in dots.chunks_exact(LANES).enumerate() {
            let (by, offset) = (points.scale[i], points.offset[i]);
            for (lane, close) in close.iter_mut().enumerate() {
                *close = (dots[lane] - offset) as f32 * (by * scale[lane]) - half_norm[lane];
            }
            visit(i, &close);
        }
    }
}
