//! Every token by itself: int8 and int4 codes with a scale for each 64 channels.

use half::f16;

use super::affine::{
    Affine, packed_len, put_code, symmetric_code, symmetric_scale, unpack, unpack_symmetric,
};
use crate::KvElem;

/// Channels that share a scale.
const GROUP: usize = 64;
/// Largest int4 code.
const LEVELS_4: u8 = 15;

/// Width of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    /// Signed and symmetric: `x = code * scale`.
    Int8,
    /// `x = zero + code * scale`.
    Int4,
}

impl Width {
    /// Bytes of the codes of `len` channels.
    fn code_bytes(self, len: usize) -> usize {
        match self {
            Self::Int8 => len,
            Self::Int4 => packed_len::<4>(len),
        }
    }

    /// f16 numbers stored per group.
    fn num_params(self) -> usize {
        match self {
            Self::Int8 => 1,
            Self::Int4 => 2,
        }
    }
}

/// Codes of a shard's keys and values.
#[derive(Debug, Clone)]
pub(super) struct TokenCodes {
    width: Width,
    head_dim: usize,
    /// [tokens, 2, bytes of a vector].
    codes: Vec<u8>,
    /// Scale, or scale and zero, [tokens, 2, groups, params].
    params: Vec<f16>,
}

impl TokenCodes {
    pub fn new(width: Width, head_dim: usize) -> Self {
        Self { width, head_dim, codes: Vec::new(), params: Vec::new() }
    }

    /// Bytes of one key or value.
    fn vector_bytes(&self) -> usize {
        let whole = self.head_dim / GROUP * self.width.code_bytes(GROUP);
        whole + self.width.code_bytes(self.head_dim % GROUP)
    }

    /// f16 numbers of one key or value.
    fn vector_params(&self) -> usize {
        self.head_dim.div_ceil(GROUP) * self.width.num_params()
    }

    pub fn len(&self) -> usize {
        self.codes.len() / (2 * self.vector_bytes())
    }

    pub fn size_bytes(&self) -> usize {
        self.codes.len() + self.params.len() * size_of::<f16>()
    }

    pub fn truncate(&mut self, len: usize) {
        self.codes.truncate(len * 2 * self.vector_bytes());
        self.params.truncate(len * 2 * self.vector_params());
    }

    /// `k` and `v` [n, head_dim].
    pub fn append<E: KvElem>(&mut self, k: &[E], v: &[E]) {
        for (k, v) in k.chunks_exact(self.head_dim).zip(v.chunks_exact(self.head_dim)) {
            for group in k.chunks(GROUP).chain(v.chunks(GROUP)) {
                self.append_group(group);
            }
        }
    }

    fn append_group<E: KvElem>(&mut self, xs: &[E]) {
        let xs = || xs.iter().map(|x| x.to_f32());
        let start = self.codes.len();
        match self.width {
            Width::Int8 => {
                let scale = symmetric_scale(xs());
                self.params.push(scale);
                self.codes.extend(xs().map(|x| symmetric_code(x, scale)));
            }
            Width::Int4 => {
                let affine = Affine::over(xs(), LEVELS_4);
                self.params.extend([affine.scale, affine.zero]);
                self.codes.resize(start + packed_len::<4>(xs().len()), 0);
                for (i, x) in xs().enumerate() {
                    put_code::<4>(&mut self.codes[start..], i, affine.code(x, LEVELS_4));
                }
            }
        }
    }

    /// Rows from `first` on, to `out` [n, 2, head_dim].
    #[inline(always)]
    pub fn unpack(&self, first: usize, out: &mut [f32]) {
        let (vector_bytes, vector_params) = (self.vector_bytes(), self.vector_params());
        let codes = self.codes[first * 2 * vector_bytes..].chunks_exact(vector_bytes);
        let params = self.params[first * 2 * vector_params..].chunks_exact(vector_params);
        for ((out, codes), params) in out.chunks_exact_mut(self.head_dim).zip(codes).zip(params) {
            let groups = out.chunks_mut(GROUP).zip(params.chunks_exact(self.width.num_params()));
            match self.width {
                Width::Int8 => {
                    for ((out, params), codes) in groups.zip(codes.chunks(GROUP)) {
                        unpack_symmetric(codes, params[0], out);
                    }
                }
                Width::Int4 => {
                    for ((out, params), codes) in groups.zip(codes.chunks(packed_len::<4>(GROUP))) {
                        unpack::<4>(codes, Affine { scale: params[0], zero: params[1] }, out);
                    }
                }
            }
        }
    }
}
