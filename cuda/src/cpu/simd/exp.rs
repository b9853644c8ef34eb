//! Exponential and hyperbolic tangent on vectors.

use super::Simd;

/// `ln 2` in two parts: the first has nine bits, so that its product with an integer below 2^15 is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// `e^x` of anything below is less than half of the smallest denormal: zero.
const EXP_MIN: f32 = -104.0;

/// `e^x` for `x <= 0`; -inf gives 0, NaN stays.
///
/// `x = n ln 2 + r`, `|r| <= ln 2 / 2`; `e^r` by the degree-6 polynomial of Cephes `expf` (S. Moshier, 1989). At most 2 units in
/// the last place from the true value where that is a normal number (tested against f64 over the whole range).
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn exp_nonpositive<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's obligations are those of every operation.
    unsafe {
        let x = S::max(S::splat(EXP_MIN), x);
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-LN_2_HIGH), x);
        let r = S::fma(n, S::splat(-LN_2_LOW), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let p = S::fma(p, S::mul(r, r), S::add(r, S::splat(1.0)));
        S::scale_by_power(p, n)
    }
}

/// `cap * tanh(s / cap)` for `cap > 0`, within 8 units in the last place of `s / cap` (tested).
///
/// Below 0.625 the odd polynomial of Cephes `tanhf`, above it `(1 - e) / (1 + e)` with `e = exp(-2 |x|)`.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(crate) unsafe fn soft_cap<S: Simd>(s: S::V, cap: f32) -> S::V {
    // SAFETY: the caller's obligations are those of every operation.
    unsafe {
        let (cap, one) = (S::splat(cap), S::splat(1.0));
        let x = S::div(s, cap);
        let a = S::abs(x);
        let e = S::exp(S::mul(a, S::splat(-2.0)));
        let large = S::copy_sign(S::div(S::sub(one, e), S::add(one, e)), x);
        let z = S::mul(x, x);
        let mut p = S::splat(-5.704_988_7e-3);
        for c in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
            p = S::fma(p, z, S::splat(c));
        }
        let small = S::fma(S::mul(p, z), x, x);
        S::mul(cap, S::select_lt(a, S::splat(0.625), small, large))
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::{Avx2Ops, Avx512Ops};
    use super::*;
    use crate::{Avx2, Avx512};

    /// One operation on whole registers of a slice.
    macro_rules! over_slice {
        ($name:ident, $ops:ty, $features:literal, |$x:ident| $body:expr) => {
            #[target_feature(enable = $features)]
            unsafe fn $name(xs: &mut [f32]) {
                for xs in xs.chunks_exact_mut(<$ops>::LANES) {
                    // SAFETY: whole registers; the caller has detected the instructions.
                    unsafe {
                        let $x = <$ops>::load(xs.as_ptr());
                        <$ops>::store(xs.as_mut_ptr(), $body);
                    }
                }
            }
        };
    }
    over_slice!(exp_512, Avx512Ops, "avx512f,avx512dq,fma", |x| exp_nonpositive::<Avx512Ops>(x));
    over_slice!(exp_256, Avx2Ops, "avx2,fma", |x| exp_nonpositive::<Avx2Ops>(x));
    over_slice!(cap_512, Avx512Ops, "avx512f,avx512dq,fma", |x| soft_cap::<Avx512Ops>(x, 1.0));
    over_slice!(cap_256, Avx2Ops, "avx2,fma", |x| soft_cap::<Avx2Ops>(x, 1.0));

    type OverSlice = unsafe fn(&mut [f32]);

    fn each(wide: OverSlice, narrow: OverSlice) -> impl Iterator<Item = (&'static str, OverSlice)> {
        let wide = Avx512::detect().map(|_| ("avx512", wide));
        let narrow = Avx2::detect().map(|_| ("avx2", narrow));
        wide.into_iter().chain(narrow)
    }

    /// The bits of a positive number count units in the last place.
    fn ulps(a: f32, b: f32) -> u32 {
        a.abs().to_bits().abs_diff(b.abs().to_bits())
    }

    #[test]
    fn exp_of_every_kind_of_nonpositive_number_is_within_two_ulps() {
        for (name, exp) in each(exp_512, exp_256) {
            // Every 97th f32 from -0 down to -110: some ten million numbers, every binade among them.
            let inputs: Vec<f32> =
                (0..110f32.to_bits()).step_by(97).map(|bits| -f32::from_bits(bits)).collect();
            let inputs = &inputs[..inputs.len() / 16 * 16];
            let mut got = inputs.to_vec();
            // SAFETY: `each` gives only what this machine has.
            unsafe { exp(&mut got) };
            for (x, y) in inputs.iter().zip(&got) {
                let want = f64::from(*x).exp() as f32;
                assert!(ulps(*y, want) <= 2, "{name}: exp({x}) = {y}, not {want}");
            }
        }
    }

    #[test]
    fn exp_of_infinity_is_zero_and_of_nan_is_nan() {
        for (_, exp) in each(exp_512, exp_256) {
            let mut xs = [f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, f32::MIN, -1e-40, -104.0, -103.9].repeat(2);
            // SAFETY: `each` gives only what this machine has.
            unsafe { exp(&mut xs) };
            assert_eq!(xs[0], 0.0);
            assert!(xs[1].is_nan());
            assert_eq!(xs[2..7], [1.0, 1.0, 0.0, 1.0, 0.0]);
            assert!(xs[7] > 0.0, "the smallest denormal is reached");
        }
    }

    #[test]
    fn soft_cap_is_within_eight_ulps_of_tanh() {
        for (name, cap) in each(cap_512, cap_256) {
            let positive = (0..20f32.to_bits()).step_by(971).map(f32::from_bits);
            let inputs: Vec<f32> = positive.flat_map(|x| [x, -x]).collect();
            let inputs = &inputs[..inputs.len() / 16 * 16];
            let mut got = inputs.to_vec();
            // SAFETY: `each` gives only what this machine has.
            unsafe { cap(&mut got) };
            for (x, y) in inputs.iter().zip(&got) {
                let want = f64::from(*x).tanh() as f32;
                assert!(ulps(*y, want) <= 8 && x * y >= 0.0, "{name}: tanh({x}) = {y}");
            }
        }
    }
}
