//! Two ways to multiply keys with queries: widened to f32, or as pairs of bf16.

use super::simd::Simd;
use crate::KvElem;

/// What the packed queries of a call look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueryForm {
    /// f32 in the lane order of the element type.
    Widened,
    /// Keys and queries are bf16: each f32 place holds two of them, in memory order. Only half of each chunk's places are used.
    Bf16Pairs,
}

/// Multiplies one chunk of a key with one chunk of a query.
///
/// # Safety
/// The obligations of [`Simd`]; pointers are valid for a chunk, or for what `key_part` is told.
pub(super) trait Dot<S: Simd, E: KvElem> {
    /// Registers of a chunk.
    type Chunk: Copy;

    /// A whole chunk of a key.
    unsafe fn key(p: *const E) -> Self::Chunk;
    /// The first `len` elements of a chunk, then zeros.
    unsafe fn key_part(p: *const E, len: usize) -> Self::Chunk;
    /// A chunk of packed queries.
    unsafe fn query(p: *const f32) -> Self::Chunk;
    /// `sum + key * query`, lane by lane.
    unsafe fn add(sum: S::V, key: Self::Chunk, query: Self::Chunk) -> S::V;
}

/// [`QueryForm::Widened`].
pub(super) struct Widened;

impl<S: Simd, E: KvElem> Dot<S, E> for Widened {
    type Chunk = [S::V; 2];

    #[inline(always)]
    unsafe fn key(p: *const E) -> [S::V; 2] {
        // SAFETY: the caller's obligations.
        unsafe { S::load_chunk(p) }
    }

    #[inline(always)]
    unsafe fn key_part(p: *const E, len: usize) -> [S::V; 2] {
        // SAFETY: the caller's obligations.
        unsafe { S::load_chunk_part(p, len) }
    }

    #[inline(always)]
    unsafe fn query(p: *const f32) -> [S::V; 2] {
        // SAFETY: the caller's obligations.
        unsafe { [S::load(p), S::load(p.add(S::LANES))] }
    }

    #[inline(always)]
    unsafe fn add(sum: S::V, key: [S::V; 2], query: [S::V; 2]) -> S::V {
        // SAFETY: the caller's obligations.
        unsafe { S::fma(key[1], query[1], S::fma(key[0], query[0], sum)) }
    }
}

/// [`QueryForm::Bf16Pairs`]: one AVX512-BF16 instruction in place of two multiply-adds and two conversions.
///
/// A product of two bf16 is exact in f32 and sums are f32, so the error is that of [`Widened`]; only bf16 below 1.2e-38
/// (denormals) count as zero. `E` must be bf16, and the entry must have enabled `avx512bf16`.
pub(super) struct Bf16Pairs;

#[cfg(target_arch = "x86_64")]
impl<E: KvElem> Dot<super::simd::Avx512Ops, E> for Bf16Pairs {
    type Chunk = std::arch::x86_64::__m512bh;

    #[inline(always)]
    unsafe fn key(p: *const E) -> Self::Chunk {
        use std::arch::x86_64::*;
        // SAFETY: the caller's obligations; all bit patterns are bf16 pairs.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast())) }
    }

    #[inline(always)]
    unsafe fn key_part(p: *const E, len: usize) -> Self::Chunk {
        use std::arch::x86_64::*;
        let mask = (1u32 << len) - 1;
        // SAFETY: as above; lanes outside the mask are not read.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_maskz_loadu_epi16(mask, p.cast())) }
    }

    #[inline(always)]
    unsafe fn query(p: *const f32) -> Self::Chunk {
        use std::arch::x86_64::*;
        // SAFETY: as above.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast())) }
    }

    #[inline(always)]
    unsafe fn add(
        sum: std::arch::x86_64::__m512,
        key: Self::Chunk,
        query: Self::Chunk,
    ) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's obligations; `avx512bf16` is enabled by the entry.
        unsafe { std::arch::x86_64::_mm512_dpbf16_ps(sum, key, query) }
    }
}
