//! [`Simd`] with sixteen lanes.

use std::arch::x86_64::*;

use super::{LANES_MAX, Simd};
use crate::KvElem;

/// AVX-512 F, BW, DQ, VL.
pub(crate) struct Avx512Ops;

/// The body of a function that is one intrinsic or a few: all obligations are the caller's.
macro_rules! op {
    ($($body:tt)*) => {{
        // SAFETY: the caller vouches for AVX-512 and for the pointers (see the trait).
        unsafe { $($body)* }
    }};
}

impl Simd for Avx512Ops {
    type V = __m512;
    const LANES: usize = 16;
    const HEADS_MAX: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        op!(_mm512_loadu_ps(p))
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        op!(_mm512_storeu_ps(p, v))
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        op!(_mm512_abs_ps(a))
    }

    #[inline(always)]
    unsafe fn copy_sign(magnitude: __m512, sign: __m512) -> __m512 {
        op!(_mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0))))
    }

    #[inline(always)]
    unsafe fn select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }

    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    unsafe fn scale_by_power(p: __m512, n: __m512) -> __m512 {
        op!(_mm512_scalef_ps(p, n))
    }

    /// Three operations a sum: each step interleaves pairs of registers and adds the two halves.
    #[inline(always)]
    unsafe fn reduce(p: &[__m512; LANES_MAX]) -> __m512 {
        op! {
            let low = fold(four(p[0], p[1], p[2], p[3]), four(p[4], p[5], p[6], p[7]));
            let high = fold(four(p[8], p[9], p[10], p[11]), four(p[12], p[13], p[14], p[15]));
            fold(low, high)
        }
    }

    #[inline(always)]
    unsafe fn fold_max<const PERIOD: usize>(v: __m512) -> __m512 {
        op! {
            let mut v = v;
            if PERIOD <= 8 {
                v = _mm512_max_ps(v, _mm512_shuffle_f32x4::<0x4e>(v, v));
            }
            if PERIOD <= 4 {
                v = _mm512_max_ps(v, _mm512_shuffle_f32x4::<0xb1>(v, v));
            }
            if PERIOD <= 2 {
                v = _mm512_max_ps(v, _mm512_permute_ps::<0x4e>(v));
            }
            if PERIOD <= 1 {
                v = _mm512_max_ps(v, _mm512_permute_ps::<0xb1>(v));
            }
            v
        }
    }

    #[inline(always)]
    unsafe fn load_chunk<E: KvElem>(p: *const E) -> [__m512; 2] {
        op!(E::load_512(p))
    }

    #[inline(always)]
    unsafe fn load_chunk_part<E: KvElem>(p: *const E, len: usize) -> [__m512; 2] {
        op!(E::load_512_part(p, len))
    }
}

/// Four registers to one: in each 128-bit part, lane `i` is the sum of that part of register `i`.
#[inline(always)]
unsafe fn four(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    op! {
        let ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        let cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    }
}

/// Two registers to one: neighbouring 128-bit parts are added.
#[inline(always)]
unsafe fn fold(a: __m512, b: __m512) -> __m512 {
    op!(_mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)))
}
