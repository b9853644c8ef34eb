//! Plain loops compiled once for each instruction set: for code that the compiler vectorises well by itself.
//!
//! The body is ordinary Rust without fused operations, so its results are bit-identical everywhere; only its speed differs.

use super::isa::Isa;

/// A computation whose `run` is `#[inline(always)]`, and so is all that it calls in its loops.
pub(crate) trait Kernel {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs a kernel as compiled for `isa`.
pub(crate) fn vectorised<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        Isa::Scalar => kernel.run(),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value proves that the CPU has AVX2 and FMA, which is all that the callee enables.
        Isa::Avx2(_) => unsafe { run_avx2(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value proves that the CPU has AVX-512 F, BW, DQ and VL, which is all that the callee enables.
        Isa::Avx512(_) => unsafe { run_avx512(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2(_) | Isa::Avx512(_) => kernel.run(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// Dot product in sixteen interleaved partial sums, which stay in registers.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks_a, chunks_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in chunks_a.zip(chunks_b) {
        for ((s, x), y) in sums.iter_mut().zip(x).zip(y) {
            *s += x * y;
        }
    }
    fold(sums) + rest
}

/// Squared distance, summed as `dot` does.
#[inline(always)]
pub(crate) fn distance_sq(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks_a, chunks_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 =
        chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(x, y)| (x - y) * (x - y)).sum();
    for (x, y) in chunks_a.zip(chunks_b) {
        for ((s, x), y) in sums.iter_mut().zip(x).zip(y) {
            *s += (x - y) * (x - y);
        }
    }
    fold(sums) + rest
}

/// Sum of the partial sums as a fixed tree.
#[inline(always)]
pub(crate) fn fold(mut sums: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

/// `sum[d] += x[d]`.
#[inline(always)]
pub(crate) fn add(sum: &mut [f32], x: &[f32]) {
    for (s, &x) in sum.iter_mut().zip(x) {
        *s += x;
    }
}

/// `sum[d] += by * x[d]`.
#[inline(always)]
pub(crate) fn add_scaled(sum: &mut [f32], by: f32, x: &[f32]) {
    for (s, &x) in sum.iter_mut().zip(x) {
        *s += by * x;
    }
}

/// Largest magnitude; 0 for an empty slice.
#[inline(always)]
pub(crate) fn largest(x: &[f32]) -> f32 {
    let mut most = [0.0f32; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder().iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for x in chunks {
        for (m, v) in most.iter_mut().zip(x) {
            // Written as a comparison: `f32::max` must also order NaN, which costs two instructions more.
            let v = v.abs();
            *m = if v > *m { v } else { *m };
        }
    }
    most.iter().fold(rest, |m, &v| if v > m { v } else { m })
}

/// 1.5 * 2^23: adding it drops the fraction of a smaller number and leaves the integer in the low bits of the sum.
const SHIFT: f32 = 12_582_912.0;

/// Nearest integer, ties to even, for |x| <= 127.
#[inline(always)]
pub(crate) fn nearest_byte(x: f32) -> i8 {
    (x + SHIFT).to_bits() as i8
}

/// Nearest integer, ties to even, for |x| < 2^22.
#[inline(always)]
pub(crate) fn nearest_int(x: f32) -> i32 {
    (x + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i32
}

/// Dot product of signed bytes.
#[inline(always)]
pub(crate) fn dot_bytes(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct All<'a>(&'a [f32], &'a [f32]);

    impl Kernel for All<'_> {
        type Output = Vec<u32>;
        #[inline(always)]
        fn run(self) -> Vec<u32> {
            let mut sum = self.0.to_vec();
            add_scaled(&mut sum, 0.3, self.1);
            sum.extend([dot(self.0, self.1), distance_sq(self.0, self.1), largest(self.0)]);
            sum.extend(self.1.iter().map(|&x| f32::from(nearest_byte(100.0 * x))));
            sum.iter().map(|x| x.to_bits()).collect()
        }
    }

    #[test]
    fn vectorised_loops_have_the_same_bits_on_every_set() {
        for n in [0usize, 1, 15, 16, 80, 129] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let b: Vec<f32> = (0..n).map(|i| (i as f32 * 1.91).cos()).collect();
            let wanted = All(&a, &b).run();
            for isa in Isa::all_available() {
                assert_eq!(vectorised(isa, All(&a, &b)), wanted, "{isa:?} n {n}");
            }
            for &x in &a {
                assert_eq!(f32::from(nearest_byte(127.0 * x)), (127.0 * x).round_ties_even());
                assert_eq!(nearest_int(9e5 * x) as f32, (9e5 * x).round_ties_even());
            }
        }
    }
}
