//! Full attention over quantised keys and values: what one would use instead of choosing tokens.
//!
//! | kind | codes | parameters (f16) | bytes a token at d = 128 (bf16: 512) |
//! |---|---|---|---|
//! | `int8` | 8 bits, symmetric, per token and 64 channels | scale | 264 |
//! | `int4` | 4 bits, per token and 64 channels | scale, zero | 144 |
//! | `kivi2` | 2 bits: keys per channel over 32 tokens, values per token over 32 channels | scale, zero | 96, and 512 for each of the last `residual` to `residual + 31` tokens |
//!
//! Rows are unpacked page by page to f32 and attended by the same kernel as exact rows. Numbers beyond the range of f16
//! (65504) saturate. Not for speed records: unpacking is a loop that vectorises, but writes f32 and reads it again.

mod affine;
mod kivi;
mod token;

use std::ops::Range;

use super::{AttendScratch, sparse_decode};
use crate::rows::{check_len, check_range};
use crate::state::merge_states;
use crate::{Attend, Isa, KernelError, KvElem, KvRows, Rows, SliceRows, StateMut, StateRef};
use kivi::Kivi;
use token::{TokenCodes, Width};

/// Rows unpacked at a time: at d = 128 their f32 form, 128 KiB, stays in the second-level cache.
const PAGE_ROWS: usize = 128;

/// How keys and values are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantKind {
    /// 8 bits.
    Int8,
    /// 4 bits.
    Int4,
    /// 2 bits after KIVI.
    Kivi2 {
        /// Newest tokens that are always exact; KIVI uses 32 to 128.
        residual: usize,
    },
}

/// Quantised keys and values of one shard; `E` is the type of exact rows.
#[derive(Debug, Clone)]
pub struct QuantKv<E> {
    head_dim: usize,
    codes: Codes<E>,
}

#[derive(Debug, Clone)]
enum Codes<E> {
    Token(TokenCodes),
    Kivi(Kivi<E>),
}

impl<E: KvElem> QuantKv<E> {
    /// No rows yet.
    ///
    /// # Errors
    /// `head_dim` 0.
    pub fn new(kind: QuantKind, head_dim: usize) -> Result<Self, KernelError> {
        if head_dim == 0 {
            return Err(KernelError::EmptyHead);
        }
        let codes = match kind {
            QuantKind::Int8 => Codes::Token(TokenCodes::new(Width::Int8, head_dim)),
            QuantKind::Int4 => Codes::Token(TokenCodes::new(Width::Int4, head_dim)),
            QuantKind::Kivi2 { residual } => Codes::Kivi(Kivi::new(head_dim, residual)),
        };
        Ok(Self { head_dim, codes })
    }

    /// Dimensions of a key and of a value.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Rows that exist.
    pub fn num_rows(&self) -> usize {
        match &self.codes {
            Codes::Token(codes) => codes.len(),
            Codes::Kivi(codes) => codes.len(),
        }
    }

    /// Bytes of codes, parameters and exact rows.
    pub fn size_bytes(&self) -> usize {
        match &self.codes {
            Codes::Token(codes) => codes.size_bytes(),
            Codes::Kivi(codes) => codes.size_bytes(),
        }
    }

    /// Appends `n` rows: finite `k` and `v`, each [n, head_dim]. The result does not depend on how rows are divided over calls.
    ///
    /// # Errors
    /// `k` not a whole number of heads, `v` of another length.
    pub fn append(&mut self, k: &[E], v: &[E]) -> Result<(), KernelError> {
        check_len("k", k.len(), k.len() - k.len() % self.head_dim)?;
        check_len("v", v.len(), k.len())?;
        match &mut self.codes {
            Codes::Token(codes) => codes.append(k, v),
            Codes::Kivi(codes) => codes.append(k, v),
        }
        Ok(())
    }

    /// Keeps the first `len` rows, or fewer, and returns how many: `kivi2` also gives up rows that it had to quantise only
    /// because of those that are gone now. Whoever appends them again has what the first `len` rows alone would have given.
    ///
    /// # Errors
    /// `len` above the number of rows.
    pub fn truncate(&mut self, len: usize) -> Result<usize, KernelError> {
        check_range(&(0..len), self.num_rows())?;
        match &mut self.codes {
            Codes::Token(codes) => {
                codes.truncate(len);
                Ok(len)
            }
            Codes::Kivi(codes) => Ok(codes.truncate(len)),
        }
    }

    /// The rows in `range` as f32, to `out` [range.len(), 2, head_dim].
    ///
    /// # Errors
    /// A range outside the rows, `out` of another length.
    pub fn unpack(
        &self,
        isa: Isa,
        range: Range<usize>,
        scratch: &mut QuantScratch,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        check_range(&range, self.num_rows())?;
        check_len("out", out.len(), range.len() * 2 * self.head_dim)?;
        self.unpack_with(isa, range.start, &mut scratch.params, out);
        Ok(())
    }

    fn unpack_with(&self, isa: Isa, first: usize, params: &mut Vec<f32>, out: &mut [f32]) {
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token proves the instructions.
            Isa::Avx512(_) => unsafe { unpack_512(&self.codes, first, params, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token proves the instructions.
            Isa::Avx2(_) => unsafe { unpack_256(&self.codes, first, params, out) },
            _ => unpack(&self.codes, first, params, out),
        }
    }
}

/// Rows from `first` on; the same arithmetic with every instruction set, so the same bits.
#[inline(always)]
fn unpack<E: KvElem>(codes: &Codes<E>, first: usize, params: &mut Vec<f32>, out: &mut [f32]) {
    match codes {
        Codes::Token(codes) => codes.unpack(first, out),
        Codes::Kivi(codes) => codes.unpack(first, params, out),
    }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
unsafe fn unpack_512<E: KvElem>(codes: &Codes<E>, first: usize, params: &mut Vec<f32>, out: &mut [f32]) {
    unpack(codes, first, params, out);
}

/// # Safety
/// The machine has AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn unpack_256<E: KvElem>(codes: &Codes<E>, first: usize, params: &mut Vec<f32>, out: &mut [f32]) {
    unpack(codes, first, params, out);
}

/// Working memory of [`attend`] and [`QuantKv::unpack`]; a call of a size seen before allocates nothing.
#[derive(Debug, Default)]
pub struct QuantScratch {
    params: Vec<f32>,
    page: Vec<f32>,
    attend: AttendScratch,
    out: Vec<f32>,
    lse: Vec<f32>,
}

/// Attention of one group over the quantised rows in `range`, written to `state`; an empty range gives the empty state.
///
/// # Errors
/// As [`sparse_decode`](crate::sparse_decode).
pub fn attend<E: KvElem>(
    attend: &Attend<'_, QuantKv<E>>,
    range: Range<usize>,
    scratch: &mut QuantScratch,
    mut state: StateMut<'_>,
) -> Result<(), KernelError> {
    let d = attend.rows.head_dim;
    let group = attend.q.len() / d;
    check_range(&range, attend.rows.num_rows())?;
    let QuantScratch { params, page, attend: inner, out, lse } = scratch;
    page.resize(PAGE_ROWS * 2 * d, 0.0);
    out.resize(group * d, 0.0);
    lse.resize(group, f32::NEG_INFINITY);
    let mut first = range.start;
    // An empty range goes through once as well: the kernel checks the arguments.
    loop {
        let num_rows = PAGE_ROWS.min(range.end - first);
        let rows = &mut page[..num_rows * 2 * d];
        attend.rows.unpack_with(attend.isa, first, params, rows);
        let rows = SliceRows::new(rows, d)?;
        let part = Attend { isa: attend.isa, q: attend.q, rows: &rows, params: attend.params };
        let which = Rows::Range(0..rows.num_rows());
        if first == range.start {
            sparse_decode(&part, which, inner, state.reborrow())?;
        } else {
            sparse_decode(&part, which, inner, StateMut { out, lse })?;
            merge_states(state.reborrow(), StateRef { out, lse })?;
        }
        first += num_rows;
        if first == range.end {
            return Ok(());
        }
    }
}
