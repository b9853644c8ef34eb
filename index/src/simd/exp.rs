//! The exponential over many scores: attention weights from logits.
//!
//! `exp(x) = 2^n exp(r)` with `n = round(x / ln 2)`, `r = x - n ln 2` in two parts (Cody and Waite 1980) and a polynomial of
//! degree 7 for `exp(r)` (coefficients of Cephes `expf`, Moshier 1992). No operation is fused, so that all instruction sets return the
//! same bits. Error below 2 units in the last place on `[X_MIN, X_MAX]`; below it 0, above it infinity.

use super::isa::Isa;

/// Arguments below this give 0: their exponential is no normal f32.
pub const X_MIN: f32 = -87.33;

/// Arguments above this give infinity, a little early (the largest f32 is `exp(88.72)`): weights are at most 1 in their use.
pub const X_MAX: f32 = 88.37;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// `ln 2` to nine bits: its products with `n` are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Of `r^7`, ..., `r^2`.
const POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// Replaces every `x[i]` by `exp(x[i] - shift)` and returns their sum over sixteen interleaved partial sums.
///
/// `x` may hold minus infinity (weight 0); NaN stays NaN.
pub fn exp_shifted(isa: Isa, x: &mut [f32], shift: f32) -> f32 {
    let (rows, rest) = x.as_chunks_mut::<16>();
    // The last, partial row is padded with arguments whose weight is zero.
    let mut last = [f32::NEG_INFINITY; 16];
    last[..rest.len()].copy_from_slice(rest);
    let sum = match isa {
        Isa::Scalar => scalar(rows, &mut last, shift),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value proves that the CPU has AVX2, which is all that the callee enables.
        Isa::Avx2(_) => unsafe { x86::avx2(rows, &mut last, shift) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value proves that the CPU has AVX-512 F and DQ, which is all that the callee enables.
        Isa::Avx512(_) => unsafe { x86::avx512(rows, &mut last, shift) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2(_) | Isa::Avx512(_) => scalar(rows, &mut last, shift),
    };
    rest.copy_from_slice(&last[..rest.len()]);
    sum
}

fn exp(x: f32) -> f32 {
    let n = (x * LOG2_E).round_ties_even();
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut poly = POLYNOMIAL[0];
    for c in &POLYNOMIAL[1..] {
        poly = poly * r + c;
    }
    let poly = (poly * (r * r) + r) + 1.0;
    let power = f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23);
    if x < X_MIN {
        0.0
    } else if x > X_MAX {
        f32::INFINITY
    } else {
        poly * power
    }
}

fn scalar(rows: &mut [[f32; 16]], last: &mut [f32; 16], shift: f32) -> f32 {
    let mut lanes = [0.0; 16];
    for row in rows.iter_mut().chain([last]) {
        for (lane, x) in lanes.iter_mut().zip(row) {
            *x = exp(*x - shift);
            *lane += *x;
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LN_2_HIGH, LN_2_LOW, LOG2_E, POLYNOMIAL, X_MAX, X_MIN};

    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) fn avx512(rows: &mut [[f32; 16]], last: &mut [f32; 16], shift: f32) -> f32 {
        let mut sum = _mm512_setzero_ps();
        for row in rows.iter_mut().chain([last]) {
            // SAFETY: the row is 64 readable bytes; the load has no alignment requirement.
            let x = _mm512_sub_ps(unsafe { _mm512_loadu_ps(row.as_ptr()) }, _mm512_set1_ps(shift));
            let x = exp16(x);
            // SAFETY: the row is 64 writable bytes; the store has no alignment requirement.
            unsafe { _mm512_storeu_ps(row.as_mut_ptr(), x) };
            sum = _mm512_add_ps(sum, x);
        }
        let sum = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
        sum8(sum)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(rows: &mut [[f32; 16]], last: &mut [f32; 16], shift: f32) -> f32 {
        let mut sums = [_mm256_setzero_ps(); 2];
        for row in rows.iter_mut().chain([last]) {
            for (half, sum) in row.as_chunks_mut::<8>().0.iter_mut().zip(&mut sums) {
                // SAFETY: the half is 32 readable bytes; the load has no alignment requirement.
                let x = _mm256_sub_ps(unsafe { _mm256_loadu_ps(half.as_ptr()) }, _mm256_set1_ps(shift));
                let x = exp8(x);
                // SAFETY: the half is 32 writable bytes; the store has no alignment requirement.
                unsafe { _mm256_storeu_ps(half.as_mut_ptr(), x) };
                *sum = _mm256_add_ps(*sum, x);
            }
        }
        sum8(_mm256_add_ps(sums[0], sums[1]))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn sum8(x: __m256) -> f32 {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn exp16(x: __m512) -> __m512 {
        let round = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)));
        let n = _mm512_cvtepi32_ps(round);
        let r = _mm512_sub_ps(x, _mm512_mul_ps(n, _mm512_set1_ps(LN_2_HIGH)));
        let r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(LN_2_LOW)));
        let mut poly = _mm512_set1_ps(POLYNOMIAL[0]);
        for c in &POLYNOMIAL[1..] {
            poly = _mm512_add_ps(_mm512_mul_ps(poly, r), _mm512_set1_ps(*c));
        }
        let poly = _mm512_add_ps(_mm512_mul_ps(poly, _mm512_mul_ps(r, r)), r);
        let poly = _mm512_add_ps(poly, _mm512_set1_ps(1.0));
        let power = _mm512_slli_epi32::<23>(_mm512_add_epi32(round, _mm512_set1_epi32(127)));
        let y = _mm512_mul_ps(poly, _mm512_castsi512_ps(power));
        let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(X_MIN));
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(X_MAX));
        let y = _mm512_mask_mov_ps(y, below, _mm512_setzero_ps());
        _mm512_mask_mov_ps(y, above, _mm512_set1_ps(f32::INFINITY))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn exp8(x: __m256) -> __m256 {
        let round = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(LOG2_E)));
        let n = _mm256_cvtepi32_ps(round);
        let r = _mm256_sub_ps(x, _mm256_mul_ps(n, _mm256_set1_ps(LN_2_HIGH)));
        let r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(LN_2_LOW)));
        let mut poly = _mm256_set1_ps(POLYNOMIAL[0]);
        for c in &POLYNOMIAL[1..] {
            poly = _mm256_add_ps(_mm256_mul_ps(poly, r), _mm256_set1_ps(*c));
        }
        let poly = _mm256_add_ps(_mm256_mul_ps(poly, _mm256_mul_ps(r, r)), r);
        let poly = _mm256_add_ps(poly, _mm256_set1_ps(1.0));
        let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(round, _mm256_set1_epi32(127)));
        let y = _mm256_mul_ps(poly, _mm256_castsi256_ps(power));
        let below = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(X_MIN));
        let above = _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_set1_ps(X_MAX));
        let y = _mm256_andnot_ps(below, y);
        _mm256_blendv_ps(y, _mm256_set1_ps(f32::INFINITY), above)
    }
}

#[cfg(test)]
mod tests {
    use super::{X_MAX, X_MIN, exp_shifted};
    use crate::simd::Isa;

    #[test]
    fn error_stays_below_two_units_in_the_last_place() {
        // Steps of about 6e-5 over the whole range.
        let x: Vec<f32> = (0..3_000_000).map(|i| X_MIN + (X_MAX - X_MIN) * i as f32 / 3.0e6).collect();
        for isa in Isa::all_available() {
            let mut y = x.clone();
            exp_shifted(isa, &mut y, 0.0);
            for (x, y) in x.iter().zip(y) {
                let exact = f64::from(*x).exp();
                let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                assert!((f64::from(y) - exact).abs() < 2.0 * unit, "{isa:?}: exp({x}) = {y}, not {exact}");
            }
        }
    }

    #[test]
    fn weights_and_their_sum_are_the_same_bits_on_every_instruction_set() {
        for n in [0, 1, 15, 16, 17, 31, 1000] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 60.0).collect();
            let mut expected = x.clone();
            let sum = exp_shifted(Isa::Scalar, &mut expected, 20.0);
            for isa in Isa::all_available() {
                let mut y = x.clone();
                assert_eq!(exp_shifted(isa, &mut y, 20.0).to_bits(), sum.to_bits(), "{isa:?}, n = {n}");
                assert_eq!(y, expected, "{isa:?}, n = {n}");
            }
        }
    }

    #[test]
    fn special_arguments_have_their_limits() {
        for isa in Isa::all_available() {
            let mut y = [f32::NEG_INFINITY, f32::INFINITY, 0.0, -0.0, -1.0e30, X_MIN, X_MAX, f32::NAN];
            exp_shifted(isa, &mut y, 0.0);
            assert_eq!(y[..5], [0.0, f32::INFINITY, 1.0, 1.0, 0.0], "{isa:?}");
            assert!(y[5] >= f32::MIN_POSITIVE && y[6].is_finite() && y[7].is_nan(), "{isa:?}: {y:?}");
        }
    }
}
