//! The few vector operations that the kernels are written in, once for AVX-512 and once for AVX2.
//!
//! Kernels are generic over [`Simd`] and entered through functions with `#[target_feature]`; everything between is
//! `inline(always)`, so that each instance compiles to the instructions of its entry.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(not(target_arch = "x86_64"))]
mod lanes_none;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2Ops;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512Ops;
pub(crate) use exp::soft_cap;
#[cfg(target_arch = "x86_64")]
pub use lanes::Lanes;
#[cfg(not(target_arch = "x86_64"))]
pub use lanes_none::Lanes;

use crate::KvElem;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Most lanes of any [`Simd`].
pub(crate) const LANES_MAX: usize = 16;

/// Vectors of f32 and what can be done with them.
///
/// # Safety
/// Every function asks of its caller:
/// - the machine has the instructions of the implementation, and the call is inlined below a function that enables them;
/// - pointers are valid for the lanes that are read or written; no alignment is asked for.
pub(crate) trait Simd {
    /// One register.
    type V: Copy;
    /// f32 lanes of a register.
    const LANES: usize;
    /// Elements that one step over a key or a value consumes: two registers.
    const CHUNK: usize = 2 * Self::LANES;
    /// Most query heads that a kernel keeps in registers at once.
    const HEADS_MAX: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn abs(a: Self::V) -> Self::V;
    /// `magnitude` (not negative) with the sign of `sign`.
    unsafe fn copy_sign(magnitude: Self::V, sign: Self::V) -> Self::V;
    /// Per lane `if a < b { x } else { y }`.
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `p * 2^n` for `p` in [1/2, 2] and an integer `n` in [-151, 0].
    unsafe fn scale_by_power(p: Self::V, n: Self::V) -> Self::V;
    /// The sum over the lanes of each of the first `LANES` of `parts`, that of part `i` in lane `i`.
    unsafe fn reduce(parts: &[Self::V; LANES_MAX]) -> Self::V;
    /// In every lane, the maximum over the lanes whose number is the same modulo `PERIOD` (a power of two).
    unsafe fn fold_max<const PERIOD: usize>(v: Self::V) -> Self::V;
    /// `CHUNK` elements as f32, in the lane order of [`Lanes::INTERLEAVED`].
    unsafe fn load_chunk<E: KvElem>(p: *const E) -> [Self::V; 2];
    /// As `load_chunk`, only the first `len` elements are read, the rest are zero.
    unsafe fn load_chunk_part<E: KvElem>(p: *const E, len: usize) -> [Self::V; 2];

    /// `e^x` for `x <= 0`: see [`exp::exp_nonpositive`] for the error.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V
    where
        Self: Sized,
    {
        // SAFETY: the caller's obligations are the callee's.
        unsafe { exp::exp_nonpositive::<Self>(x) }
    }
}

/// Asks for the cache line of `p` to be brought to the first-level cache; any address is allowed.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect on memory and does not fault; SSE is part of x86_64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Place of element `i` of a chunk of `chunk` elements in `E`'s lane order.
#[inline(always)]
pub(crate) fn place_in_chunk<E: KvElem>(i: usize, chunk: usize) -> usize {
    if E::INTERLEAVED { i % 2 * (chunk / 2) + i / 2 } else { i }
}
