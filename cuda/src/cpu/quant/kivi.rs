//! Two bits: keys per channel over 32 tokens, values per token over 32 channels, the newest tokens exact.
//!
//! After "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (Liu et al., ICML 2024), group size 32. Its keys
//! are quantised when a whole residual has gathered, its values one by one; here both leave the residual 32 tokens at a
//! time, so that the last `residual` tokens are always exact.

use half::f16;

use super::affine::{Affine, packed_len, put_code, unpack, unpack_each};
use crate::KvElem;

/// Tokens that share a key channel's scale; channels that share a value's scale.
const GROUP: usize = 32;
/// Largest code.
const LEVELS: u8 = 3;

/// 2-bit keys and values of a shard, and its exact newest rows.
#[derive(Debug, Clone)]
pub(super) struct Kivi<E> {
    head_dim: usize,
    /// Tokens that are exact at least, once there are as many.
    residual: usize,
    /// [groups of tokens, GROUP, bytes of a key].
    key_codes: Vec<u8>,
    /// Scale, then zero of every channel, [groups of tokens, 2, head_dim].
    key_params: Vec<f16>,
    /// [tokens, bytes of a value].
    value_codes: Vec<u8>,
    /// [tokens, groups of channels, 2]: scale, zero.
    value_params: Vec<f16>,
    /// Exact rows, [n, 2, head_dim].
    exact: Vec<E>,
}

impl<E: KvElem> Kivi<E> {
    pub fn new(head_dim: usize, residual: usize) -> Self {
        Self {
            head_dim,
            residual,
            key_codes: Vec::new(),
            key_params: Vec::new(),
            value_codes: Vec::new(),
            value_params: Vec::new(),
            exact: Vec::new(),
        }
    }

    fn key_bytes(&self) -> usize {
        packed_len::<2>(self.head_dim)
    }

    fn value_bytes(&self) -> usize {
        self.head_dim / GROUP * packed_len::<2>(GROUP) + packed_len::<2>(self.head_dim % GROUP)
    }

    fn value_params_len(&self) -> usize {
        2 * self.head_dim.div_ceil(GROUP)
    }

    /// Tokens that are quantised.
    fn num_coded(&self) -> usize {
        self.key_codes.len() / self.key_bytes()
    }

    pub fn len(&self) -> usize {
        self.num_coded() + self.exact.len() / (2 * self.head_dim)
    }

    pub fn size_bytes(&self) -> usize {
        let params = self.key_params.len() + self.value_params.len();
        let codes = self.key_codes.len() + self.value_codes.len();
        codes + params * size_of::<f16>() + size_of_val(&self.exact[..])
    }

    /// Returns the rows left: fewer than `len` where rows are quantised that would still be exact if no others had followed.
    pub fn truncate(&mut self, len: usize) -> usize {
        let (coded, row_len) = (self.num_coded(), 2 * self.head_dim);
        let kept = len.saturating_sub(self.residual) / GROUP * GROUP;
        if kept >= coded {
            self.exact.truncate((len - coded) * row_len);
            return len;
        }
        self.exact.clear();
        self.key_codes.truncate(kept * self.key_bytes());
        self.key_params.truncate(kept / GROUP * row_len);
        self.value_codes.truncate(kept * self.value_bytes());
        self.value_params.truncate(kept * self.value_params_len());
        kept
    }

    /// `k` and `v` [n, head_dim].
    pub fn append(&mut self, k: &[E], v: &[E]) {
        let row_len = 2 * self.head_dim;
        for (k, v) in k.chunks_exact(self.head_dim).zip(v.chunks_exact(self.head_dim)) {
            self.exact.extend_from_slice(k);
            self.exact.extend_from_slice(v);
        }
        let mut coded = 0;
        while self.exact.len() / row_len - coded >= self.residual + GROUP {
            self.code_group(coded);
            coded += GROUP;
        }
        self.exact.drain(..coded * row_len);
    }

    /// Quantises `GROUP` exact rows from `first` on.
    fn code_group(&mut self, first: usize) {
        let d = self.head_dim;
        let (key_bytes, value_bytes) = (self.key_bytes(), self.value_bytes());
        let rows = &self.exact[first * 2 * d..(first + GROUP) * 2 * d];

        let codes_start = self.key_codes.len();
        self.key_codes.resize(codes_start + GROUP * key_bytes, 0);
        let params_start = self.key_params.len();
        self.key_params.resize(params_start + 2 * d, f16::ZERO);
        for channel in 0..d {
            let keys = || rows.chunks_exact(2 * d).map(|row| row[channel].to_f32());
            let affine = Affine::over(keys(), LEVELS);
            self.key_params[params_start + channel] = affine.scale;
            self.key_params[params_start + d + channel] = affine.zero;
            for (key, codes) in keys().zip(self.key_codes[codes_start..].chunks_exact_mut(key_bytes)) {
                put_code::<2>(codes, channel, affine.code(key, LEVELS));
            }
        }

        for row in rows.chunks_exact(2 * d) {
            let start = self.value_codes.len();
            self.value_codes.resize(start + value_bytes, 0);
            let codes = self.value_codes[start..].chunks_mut(packed_len::<2>(GROUP));
            for (group, codes) in row[d..].chunks(GROUP).zip(codes) {
                let affine = Affine::over(group.iter().map(|x| x.to_f32()), LEVELS);
                self.value_params.extend([affine.scale, affine.zero]);
                for (i, x) in group.iter().enumerate() {
                    put_code::<2>(codes, i, affine.code(x.to_f32(), LEVELS));
                }
            }
        }
    }

    /// Rows from `first` on, to `out` [n, 2, head_dim]; `widened` is scratch.
    #[inline(always)]
    pub fn unpack(&self, first: usize, widened: &mut Vec<f32>, out: &mut [f32]) {
        let row_len = 2 * self.head_dim;
        let coded = self.num_coded();
        let (old, new) = out.split_at_mut((coded.saturating_sub(first) * row_len).min(out.len()));
        let mut row = first;
        let mut rest = old;
        while !rest.is_empty() {
            let in_group = (GROUP - row % GROUP) * row_len;
            let (part, after) = rest.split_at_mut(in_group.min(rest.len()));
            self.unpack_in_group(row, widened, part);
            row += part.len() / row_len;
            rest = after;
        }
        let exact = &self.exact[first.saturating_sub(coded) * row_len..];
        for (x, e) in new.iter_mut().zip(exact) {
            *x = e.to_f32();
        }
    }

    /// Rows of one group of tokens, from `first` on.
    #[inline(always)]
    fn unpack_in_group(&self, first: usize, widened: &mut Vec<f32>, out: &mut [f32]) {
        let d = self.head_dim;
        widened.clear();
        widened.extend(self.key_params[first / GROUP * 2 * d..][..2 * d].iter().map(|x| x.to_f32()));
        let (scales, zeros) = widened.split_at(d);
        let keys = self.key_codes[first * self.key_bytes()..].chunks_exact(self.key_bytes());
        let values = self.value_codes[first * self.value_bytes()..].chunks_exact(self.value_bytes());
        let params =
            self.value_params[first * self.value_params_len()..].chunks_exact(self.value_params_len());
        for (((row, key), value), params) in out.chunks_exact_mut(2 * d).zip(keys).zip(values).zip(params) {
            let (key_out, value_out) = row.split_at_mut(d);
            unpack_each::<2>(key, scales, zeros, key_out);
            let codes = value.chunks(packed_len::<2>(GROUP));
            for ((out, codes), params) in value_out.chunks_mut(GROUP).zip(codes).zip(params.chunks_exact(2)) {
                unpack::<2>(codes, Affine { scale: params[0], zero: params[1] }, out);
            }
        }
    }
}
