//! [`Simd`] with eight lanes.

use std::arch::x86_64::*;

use super::{LANES_MAX, Simd};
use crate::KvElem;

/// AVX2, FMA, F16C.
pub(crate) struct Avx2Ops;

/// The body of a function that is one intrinsic or a few: all obligations are the caller's.
macro_rules! op {
    ($($body:tt)*) => {{
        // SAFETY: the caller vouches for AVX2, FMA and F16C and for the pointers (see the trait).
        unsafe { $($body)* }
    }};
}

impl Simd for Avx2Ops {
    type V = __m256;
    const LANES: usize = 8;
    // Sixteen registers: two for each head's part of a chunk of the values, and three to feed them.
    const HEADS_MAX: usize = 6;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        op!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        op!(_mm256_loadu_ps(p))
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        op!(_mm256_storeu_ps(p, v))
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        op!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    unsafe fn abs(a: __m256) -> __m256 {
        op!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }

    #[inline(always)]
    unsafe fn copy_sign(magnitude: __m256, sign: __m256) -> __m256 {
        op!(_mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0))))
    }

    #[inline(always)]
    unsafe fn select_lt(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        op!(_mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
    }

    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        op!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    /// In two factors, each a normal f32: `2^-151` alone is not one.
    #[inline(always)]
    unsafe fn scale_by_power(p: __m256, n: __m256) -> __m256 {
        op! {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let rest = _mm256_sub_epi32(n, half);
            let power = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
            _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(rest))
        }
    }

    #[inline(always)]
    unsafe fn reduce(p: &[__m256; LANES_MAX]) -> __m256 {
        op! {
            let (a, b) = (four(p[0], p[1], p[2], p[3]), four(p[4], p[5], p[6], p[7]));
            _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
        }
    }

    #[inline(always)]
    unsafe fn fold_max<const PERIOD: usize>(v: __m256) -> __m256 {
        op! {
            let mut v = v;
            if PERIOD <= 4 {
                v = _mm256_max_ps(v, _mm256_permute2f128_ps::<0x01>(v, v));
            }
            if PERIOD <= 2 {
                v = _mm256_max_ps(v, _mm256_permute_ps::<0x4e>(v));
            }
            if PERIOD <= 1 {
                v = _mm256_max_ps(v, _mm256_permute_ps::<0xb1>(v));
            }
            v
        }
    }

    #[inline(always)]
    unsafe fn load_chunk<E: KvElem>(p: *const E) -> [__m256; 2] {
        op!(E::load_256(p))
    }

    #[inline(always)]
    unsafe fn load_chunk_part<E: KvElem>(p: *const E, len: usize) -> [__m256; 2] {
        op!(E::load_256_part(p, len))
    }
}

/// Four registers to one: in each 128-bit part, lane `i` is the sum of that part of register `i`.
#[inline(always)]
unsafe fn four(a: __m256, b: __m256, c: __m256, d: __m256) -> __m256 {
    op! {
        let ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
        let cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
        let (low, high) = (_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
        _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
    }
}
