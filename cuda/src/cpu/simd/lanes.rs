//! Loading KV elements as f32 lanes. All conversions are exact, denormals included.

use std::arch::x86_64::*;

use half::{bf16, f16};

/// How a run of elements becomes two registers of f32.
///
/// # Safety
/// Functions named `_512` need AVX-512 F, BW, VL and F16C, those named `_256` AVX2 and F16C; `p` must be valid for reading
/// 32 (`_512`), 16 (`_256`) or `len` (`_part`) elements.
#[allow(
    clippy::missing_safety_doc,
    reason = "the obligations are the same for all functions and stand on the trait"
)]
pub trait Lanes: Copy {
    /// False: the first register holds the first half of the elements. True: it holds the elements at even places, the
    /// second those at odd places (bf16: splitting 32-bit pairs is one operation a register, widening would be two).
    const INTERLEAVED: bool;
    /// Whether this is `bf16`.
    const IS_BF16: bool = false;

    /// 32 elements.
    unsafe fn load_512(p: *const Self) -> [__m512; 2];
    /// `len < 32` elements, then zeros.
    unsafe fn load_512_part(p: *const Self, len: usize) -> [__m512; 2];
    /// 16 elements.
    unsafe fn load_256(p: *const Self) -> [__m256; 2];
    /// `len < 16` elements, then zeros.
    #[inline(always)]
    unsafe fn load_256_part(p: *const Self, len: usize) -> [__m256; 2]
    where
        Self: bytemuck::Zeroable,
    {
        let mut padded = [Self::zeroed(); 16];
        // SAFETY: `p` is valid for `len` elements, which is less than the 16 of the buffer.
        unsafe {
            std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), len);
            Self::load_256(padded.as_ptr())
        }
    }
}

/// The low `len` of 32 bits.
fn mask32(len: usize) -> u32 {
    (1u32 << len) - 1
}

impl Lanes for bf16 {
    const INTERLEAVED: bool = true;
    const IS_BF16: bool = true;

    #[inline(always)]
    unsafe fn load_512(p: *const Self) -> [__m512; 2] {
        // SAFETY: the caller vouches for the instructions and for 32 elements.
        unsafe { split_512(_mm512_loadu_si512(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_512_part(p: *const Self, len: usize) -> [__m512; 2] {
        // SAFETY: as above; lanes outside the mask are not read.
        unsafe { split_512(_mm512_maskz_loadu_epi16(mask32(len), p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_256(p: *const Self) -> [__m256; 2] {
        // SAFETY: the caller vouches for the instructions and for 16 elements.
        unsafe {
            let pairs = _mm256_loadu_si256(p.cast());
            let even = _mm256_slli_epi32::<16>(pairs);
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000u32.cast_signed()));
            [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
        }
    }
}

/// bf16 at even and at odd places. A bf16 is the upper half of an f32.
#[inline(always)]
unsafe fn split_512(pairs: __m512i) -> [__m512; 2] {
    // SAFETY: the caller vouches for AVX-512 F.
    unsafe {
        let even = _mm512_slli_epi32::<16>(pairs);
        let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32.cast_signed()));
        [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
    }
}

impl Lanes for f16 {
    const INTERLEAVED: bool = false;

    #[inline(always)]
    unsafe fn load_512(p: *const Self) -> [__m512; 2] {
        // SAFETY: the caller vouches for the instructions and for 32 elements.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(16).cast()));
            [_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    unsafe fn load_512_part(p: *const Self, len: usize) -> [__m512; 2] {
        let mask = mask32(len);
        // SAFETY: as above; lanes outside the masks are not read, so the second address is only computed (wrapping).
        unsafe {
            let low = _mm256_maskz_loadu_epi16(mask as u16, p.cast());
            let high = _mm256_maskz_loadu_epi16((mask >> 16) as u16, p.wrapping_add(16).cast());
            [_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    unsafe fn load_256(p: *const Self) -> [__m256; 2] {
        // SAFETY: the caller vouches for the instructions and for 16 elements.
        unsafe {
            let (low, high) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(8).cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }
}

impl Lanes for f32 {
    const INTERLEAVED: bool = false;

    #[inline(always)]
    unsafe fn load_512(p: *const Self) -> [__m512; 2] {
        // SAFETY: the caller vouches for the instructions and for 32 elements.
        unsafe { [_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16))] }
    }

    #[inline(always)]
    unsafe fn load_512_part(p: *const Self, len: usize) -> [__m512; 2] {
        let mask = mask32(len);
        // SAFETY: as above; lanes outside the masks are not read, so the second address is only computed (wrapping).
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as u16, p);
            let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, p.wrapping_add(16));
            [low, high]
        }
    }

    #[inline(always)]
    unsafe fn load_256(p: *const Self) -> [__m256; 2] {
        // SAFETY: the caller vouches for the instructions and for 16 elements.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
}
