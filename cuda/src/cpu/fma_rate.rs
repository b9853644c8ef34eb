//! How many multiply-adds this machine can do: the bound that attention of large groups is held against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::Isa;

/// Rounds of one timing: about a millisecond.
const ROUNDS: u32 = 100_000;

/// f32 multiply-adds per second of one thread, with all operands in registers: the best of several timings.
///
/// `None` for [`Isa::Scalar`], which is not limited by its multipliers.
pub fn fma_rate(isa: Isa) -> Option<f64> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => {
            // SAFETY: the token proves the instructions.
            Some(best_rate(x86::LANES_512 * x86::CHAINS, || unsafe { x86::chains_512(ROUNDS) }))
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => {
            // SAFETY: the token proves the instructions.
            Some(best_rate(x86::LANES_256 * x86::CHAINS, || unsafe { x86::chains_256(ROUNDS) }))
        }
        _ => None,
    }
}

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "no vector kernels to measure"))]
fn best_rate(fma_per_round: usize, mut run: impl FnMut() -> f32) -> f64 {
    let mut best = Duration::MAX;
    for _ in 0..50 {
        let start = Instant::now();
        black_box(run());
        best = best.min(start.elapsed());
    }
    f64::from(ROUNDS) * fma_per_round as f64 / best.as_secs_f64()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::hint::black_box;

    use super::super::simd::{Avx2Ops, Avx512Ops, Simd};

    /// Independent chains: two multipliers with a latency of four cycles need eight, slower ones ten.
    pub const CHAINS: usize = 12;
    pub const LANES_512: usize = Avx512Ops::LANES;
    pub const LANES_256: usize = Avx2Ops::LANES;

    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn chains<S: Simd>(rounds: u32) -> f32 {
        // SAFETY: the caller's obligations; the array holds the widest register.
        unsafe {
            let (a, b) = (S::splat(black_box(0.5)), S::splat(black_box(1.0)));
            let mut sums = [S::splat(1.0); CHAINS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = S::fma(*sum, a, b);
                }
            }
            let total = sums.into_iter().fold(S::splat(0.0), |x, y| S::add(x, y));
            let mut lanes = [0.0; 16];
            S::store(lanes.as_mut_ptr(), total);
            lanes.iter().sum()
        }
    }

    /// # Safety
    /// The machine has AVX-512 F and DQ.
    #[target_feature(enable = "avx512f,avx512dq,fma")]
    pub unsafe fn chains_512(rounds: u32) -> f32 {
        // SAFETY: enabled here.
        unsafe { chains::<Avx512Ops>(rounds) }
    }

    /// # Safety
    /// The machine has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn chains_256(rounds: u32) -> f32 {
        // SAFETY: enabled here.
        unsafe { chains::<Avx2Ops>(rounds) }
    }
}
