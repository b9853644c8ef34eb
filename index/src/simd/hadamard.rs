//! The Walsh-Hadamard transform: stages of sums and differences, the same bits on every instruction set.

use super::isa::Isa;

/// Transforms `x` in place, unnormalised: `x[i] = sum_j (-1)^(number of common bits of i and j) x[j]`, by `log2` stages from
/// neighbours outward.
///
/// # Panics
/// When the length is not a power of two.
pub(crate) fn transform(isa: Isa, x: &mut [f32]) {
    assert!(x.len().is_power_of_two(), "transform of {} elements", x.len());
    if x.len() < 16 {
        return stages(x, 1);
    }
    match isa {
        Isa::Scalar => stages(x, 1),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value proves that the CPU has AVX2, which is all that the callee enables.
        Isa::Avx2(_) => unsafe { x86::avx2(x) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value proves that the CPU has AVX-512 F, which is all that the callee enables.
        Isa::Avx512(_) => unsafe { x86::avx512(x) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2(_) | Isa::Avx512(_) => stages(x, 1),
    }
}

/// All stages from distance `half` on.
#[inline(always)]
fn stages(x: &mut [f32], mut half: usize) {
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Distances inside a register by shuffles, larger ones between registers.
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) fn avx512(x: &mut [f32]) {
        for row in x.as_chunks_mut::<16>().0 {
            // SAFETY: the row is 64 readable bytes; the load has no alignment requirement.
            let r = unsafe { _mm512_loadu_ps(row.as_ptr()) };
            let r = butterfly16(_mm512_permute_ps::<0b10_11_00_01>(r), r, 0xAAAA);
            let r = butterfly16(_mm512_permute_ps::<0b01_00_11_10>(r), r, 0xCCCC);
            let r = butterfly16(_mm512_shuffle_f32x4::<0b10_11_00_01>(r, r), r, 0xF0F0);
            let r = butterfly16(_mm512_shuffle_f32x4::<0b01_00_11_10>(r, r), r, 0xFF00);
            // SAFETY: the row is 64 writable bytes; the store has no alignment requirement.
            unsafe { _mm512_storeu_ps(row.as_mut_ptr(), r) };
        }
        super::stages(x, 16);
    }

    /// Partner plus own where the lane is the lower one, partner minus own where it is the upper one (mask set).
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn butterfly16(partner: __m512, own: __m512, upper: __mmask16) -> __m512 {
        _mm512_mask_sub_ps(_mm512_add_ps(partner, own), upper, partner, own)
    }

    /// As `avx512`, eight lanes at a time.
    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(x: &mut [f32]) {
        for row in x.as_chunks_mut::<8>().0 {
            // SAFETY: the row is 32 readable bytes; the load has no alignment requirement.
            let r = unsafe { _mm256_loadu_ps(row.as_ptr()) };
            let partner = _mm256_permute_ps::<0b10_11_00_01>(r);
            let r = _mm256_blend_ps::<0xAA>(_mm256_add_ps(partner, r), _mm256_sub_ps(partner, r));
            let partner = _mm256_permute_ps::<0b01_00_11_10>(r);
            let r = _mm256_blend_ps::<0xCC>(_mm256_add_ps(partner, r), _mm256_sub_ps(partner, r));
            let partner = _mm256_permute2f128_ps::<1>(r, r);
            let r = _mm256_blend_ps::<0xF0>(_mm256_add_ps(partner, r), _mm256_sub_ps(partner, r));
            // SAFETY: the row is 32 writable bytes; the store has no alignment requirement.
            unsafe { _mm256_storeu_ps(row.as_mut_ptr(), r) };
        }
        super::stages(x, 8);
    }
}

#[cfg(test)]
mod tests {
    use super::transform;
    use crate::simd::Isa;

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition() {
        for len in [1, 2, 8, 16, 32, 128, 512] {
            let x: Vec<f32> = (0..len).map(|i| ((i * 37 % 101) as f32).sin() * 3.0).collect();
            let exact = |i: usize| {
                let terms = x
                    .iter()
                    .enumerate()
                    .map(|(j, x)| if (i & j).count_ones().is_multiple_of(2) { *x } else { -x });
                terms.map(f64::from).sum::<f64>()
            };
            let mut expected = x.clone();
            transform(Isa::Scalar, &mut expected);
            for (i, y) in expected.iter().enumerate() {
                assert!((f64::from(*y) - exact(i)).abs() < 1.0e-6 * 3.0 * len as f64, "len {len}, {i}");
            }
            for isa in Isa::all_available() {
                let mut y = x.clone();
                transform(isa, &mut y);
                assert_eq!(y, expected, "{isa:?}, len {len}");
            }
        }
    }
}
