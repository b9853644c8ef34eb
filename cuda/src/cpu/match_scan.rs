//! Nearest earlier query: what decode reuse asks first, in every step.
//!
//! Sixteen rows (AVX2: eight) are compared at a time, so that their sums are folded into one register. The first 32
//! dimensions are a probe: squares only add, so a row whose probe reaches the bound cannot come below it, and where that
//! holds for all rows of a block the rest of it is never read.

#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2Ops, Avx512Ops, LANES_MAX, Simd};
use crate::rows::check_len;
use crate::{Isa, KernelError, twin};

/// Dimensions of the probe.
#[cfg(target_arch = "x86_64")]
const PROBE: usize = 32;

/// The row of `ring` f32 `[rows, dim]` nearest to `q` f32 `[dim]` and its squared distance, if that is below `bound`; the lower row of
/// equals. Host memory. Reads a row's later dimensions only where its first ones leave it a chance.
///
/// # Errors
/// An empty `q`, or a ring that is no whole number of rows.
pub fn match_scan(
    isa: Isa,
    ring: &[f32],
    q: &[f32],
    bound: f32,
) -> Result<Option<(usize, f32)>, KernelError> {
    check(ring, q)?;
    Ok(match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the instructions; `check` has seen whole rows of `q`'s length.
        Isa::Avx512(_) => unsafe { x86::scan_512(ring, q, bound) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2(_) => unsafe { x86::scan_256(ring, q, bound) },
        _ => twin::match_scan(ring, q, bound),
    })
}

/// Squared distance of `q` f32 `[dim]` to every row of `ring` f32 `[rows, dim]`, to `out` f32 `[rows]`. Host memory.
///
/// # Errors
/// An empty `q`, a ring that is no whole number of rows, `out` of another length.
pub fn distances(isa: Isa, ring: &[f32], q: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
    check(ring, q)?;
    check_len("out", out.len(), ring.len() / q.len())?;
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the instructions; the shapes were checked above.
        Isa::Avx512(_) => unsafe { x86::distances_512(ring, q, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2(_) => unsafe { x86::distances_256(ring, q, out) },
        _ => twin::distances(ring, q, out),
    }
    Ok(())
}

fn check(ring: &[f32], q: &[f32]) -> Result<(), KernelError> {
    if q.is_empty() {
        return Err(KernelError::EmptyHead);
    }
    check_len("ring", ring.len(), ring.len() / q.len() * q.len())
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;

    /// Some rows of a ring and the query they are compared with.
    #[derive(Clone, Copy)]
    struct Block<'a> {
        /// `num` rows of `q.len()` elements each.
        rows: *const f32,
        /// At most [`LANES_MAX`].
        num: usize,
        q: &'a [f32],
    }

    /// Adds to `sums[i]` the squared differences of row `i` and the query over dimensions `from..to`.
    ///
    /// # Safety
    /// As [`Simd`]; the block is as its fields say, `from <= to <= q.len()`.
    #[inline(always)]
    unsafe fn add<S: Simd>(block: Block<'_>, from: usize, to: usize, sums: &mut [S::V; LANES_MAX]) {
        let dim = block.q.len();
        for at in (from..to).step_by(S::CHUNK) {
            let len = (to - at).min(S::CHUNK);
            // SAFETY: `at + len <= dim`, and the query and every row are that long.
            unsafe {
                let q = load::<S>(block.q.as_ptr().add(at), len);
                for (i, sum) in sums.iter_mut().enumerate().take(block.num) {
                    let x = load::<S>(block.rows.add(i * dim + at), len);
                    let (a, b) = (S::sub(q[0], x[0]), S::sub(q[1], x[1]));
                    *sum = S::fma(b, b, S::fma(a, a, *sum));
                }
            }
        }
    }

    /// # Safety
    /// As [`Simd`]; `p` is valid for `len <= CHUNK` elements.
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32, len: usize) -> [S::V; 2] {
        // SAFETY: the caller's obligations.
        unsafe { if len == S::CHUNK { S::load_chunk(p) } else { S::load_chunk_part(p, len) } }
    }

    /// The sums of each row's lanes.
    ///
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn fold<S: Simd>(sums: &[S::V; LANES_MAX]) -> [f32; LANES_MAX] {
        let mut lanes = [0.0; LANES_MAX];
        // SAFETY: the caller's obligations; the array holds the widest register.
        unsafe { S::store(lanes.as_mut_ptr(), S::reduce(sums)) };
        lanes
    }

    /// # Safety
    /// As [`Simd`]; `ring` is whole rows of `q.len()` elements, at least one each.
    #[inline(always)]
    unsafe fn scan<S: Simd>(ring: &[f32], q: &[f32], bound: f32) -> Option<(usize, f32)> {
        let mut best = None;
        let mut least = bound;
        let probe = PROBE.min(q.len());
        for (b, rows) in ring.chunks(S::LANES * q.len()).enumerate() {
            let block = Block { rows: rows.as_ptr(), num: rows.len() / q.len(), q };
            // SAFETY: the block is whole rows, at most LANES of them.
            let distances = unsafe {
                let mut sums = [S::splat(0.0); LANES_MAX];
                add::<S>(block, 0, probe, &mut sums);
                if fold::<S>(&sums)[..block.num].iter().all(|d| *d >= least) {
                    continue;
                }
                add::<S>(block, probe, q.len(), &mut sums);
                fold::<S>(&sums)
            };
            for (i, d) in distances[..block.num].iter().enumerate() {
                if *d < least {
                    least = *d;
                    best = Some((b * S::LANES + i, *d));
                }
            }
        }
        best
    }

    /// # Safety
    /// As `scan`; `out` has a place per row.
    #[inline(always)]
    unsafe fn distances<S: Simd>(ring: &[f32], q: &[f32], out: &mut [f32]) {
        for (rows, out) in ring.chunks(S::LANES * q.len()).zip(out.chunks_mut(S::LANES)) {
            let block = Block { rows: rows.as_ptr(), num: out.len(), q };
            // SAFETY: the block is whole rows, at most LANES of them.
            let folded = unsafe {
                let mut sums = [S::splat(0.0); LANES_MAX];
                add::<S>(block, 0, q.len(), &mut sums);
                fold::<S>(&sums)
            };
            out.copy_from_slice(&folded[..out.len()]);
        }
    }

    /// The two loops with the instructions of one set.
    macro_rules! entries {
        ($scan:ident, $distances:ident, $ops:ty, $features:literal) => {
            /// # Safety
            /// The machine has the instructions; as `scan`.
            #[target_feature(enable = $features)]
            pub unsafe fn $scan(ring: &[f32], q: &[f32], bound: f32) -> Option<(usize, f32)> {
                // SAFETY: the instructions are enabled here; shapes as promised by the caller.
                unsafe { scan::<$ops>(ring, q, bound) }
            }

            /// # Safety
            /// The machine has the instructions; as `distances`.
            #[target_feature(enable = $features)]
            pub unsafe fn $distances(ring: &[f32], q: &[f32], out: &mut [f32]) {
                // SAFETY: as above.
                unsafe { distances::<$ops>(ring, q, out) }
            }
        };
    }

    entries! { scan_512, distances_512, Avx512Ops, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c" }
    entries! { scan_256, distances_256, Avx2Ops, "avx2,fma,f16c" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every instruction set of this machine.
    fn isas() -> Vec<Isa> {
        let wide = [crate::Avx512::detect().map(Isa::Avx512), crate::Avx2::detect().map(Isa::Avx2)];
        wide.into_iter().flatten().chain([Isa::Scalar]).collect()
    }

    proptest! {
        #[test]
        fn scan_finds_what_the_twin_finds(
            (rows, dim) in (0usize..70, 1usize..140),
            seed in 0u32..1000,
            tightness in 0.0f32..1.2,
        ) {
            // Small integers: every sum is exact in f32, so all instruction sets agree bit for bit, ties included.
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) % 7;
            let ring: Vec<f32> = (0..rows * dim).map(|i| value(i) as f32).collect();
            let q: Vec<f32> = (0..dim).map(|i| value(i + 7919) as f32).collect();
            let bound = tightness * 8.0 * dim as f32;
            let expected = twin::match_scan(&ring, &q, bound);
            let mut all = vec![0.0; rows];
            twin::distances(&ring, &q, &mut all);
            for isa in isas() {
                prop_assert_eq!(match_scan(isa, &ring, &q, bound).unwrap(), expected, "{:?}", isa);
                let mut got = vec![f32::NAN; rows];
                distances(isa, &ring, &q, &mut got).unwrap();
                prop_assert_eq!(&got, &all, "{:?}", isa);
            }
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        assert_eq!(match_scan(Isa::best(), &[1.0; 4], &[], 1.0), Err(KernelError::EmptyHead));
        let error = match_scan(Isa::best(), &[1.0; 5], &[0.0; 2], 1.0).unwrap_err();
        assert!(error.to_string().contains("ring has 5"), "{error}");
        let error = distances(Isa::best(), &[1.0; 4], &[0.0; 2], &mut [0.0; 3]).unwrap_err();
        assert!(error.to_string().contains("out has 3"), "{error}");
    }
}
