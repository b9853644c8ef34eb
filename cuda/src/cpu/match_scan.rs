//! Nearest earlier query: what decode reuse asks first, in every step.
//!
//! Sixteen rows (AVX2: eight) are compared at a time, so that their sums are folded into one register. A ring lies in
//! planes of 32 dimensions: squares only add, so rows whose sum over the first planes reaches the bound cannot come below it,
//! and the later planes of such a block are never touched. Cold, six heads of 512 rows of 128 dimensions take 31 us when the first plane
//! refuses them all and 67 us when it refuses none.

#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2Ops, Avx512Ops, LANES_MAX, Simd};
use crate::rows::check_len;
use crate::{Isa, KernelError, twin};

/// Dimensions of a plane.
pub const PLANE: usize = 32;

/// The row of `ring` f32 `[planes, rows, PLANE]` nearest to `q` f32 `[planes, PLANE]` and its squared distance, if that is below
/// `bound`; the lower row of equals. Fewer dimensions are filled up with equal numbers. Host memory.
///
/// # Errors
/// A `q` that is empty or no whole number of planes, or a ring that is no whole number of rows.
pub fn match_scan(
    isa: Isa,
    ring: &[f32],
    q: &[f32],
    bound: f32,
) -> Result<Option<(usize, f32)>, KernelError> {
    check(ring, q)?;
    check_len("q", q.len(), q.len() / PLANE * PLANE)?;
    Ok(match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the instructions; whole planes of whole rows were checked above.
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

    /// Adds to `sums[i]` the squared differences of row `i` and the query.
    ///
    /// # Safety
    /// As [`Simd`]; the block is as its fields say.
    #[inline(always)]
    unsafe fn add<S: Simd>(block: Block<'_>, sums: &mut [S::V; LANES_MAX]) {
        let dim = block.q.len();
        for at in (0..dim).step_by(S::CHUNK) {
            let len = (dim - at).min(S::CHUNK);
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
    /// As [`Simd`]; `ring` is whole rows of `q.len()` elements, in planes, and `q` whole planes.
    #[inline(always)]
    unsafe fn scan<S: Simd>(ring: &[f32], q: &[f32], bound: f32) -> Option<(usize, f32)> {
        let mut best = None;
        let mut least = bound;
        let rows = ring.len() / q.len();
        for first in (0..rows).step_by(S::LANES) {
            let num = (rows - first).min(S::LANES);
            let mut distances = [0.0; LANES_MAX];
            // SAFETY: rows `first..first + num` lie within each plane of `rows` rows.
            unsafe {
                let mut sums = [S::splat(0.0); LANES_MAX];
                for (plane, q) in q.chunks_exact(PLANE).enumerate() {
                    let at = (plane * rows + first) * PLANE;
                    add::<S>(Block { rows: ring.as_ptr().add(at), num, q }, &mut sums);
                    distances = fold::<S>(&sums);
                    if distances[..num].iter().all(|d| *d >= least) {
                        break;
                    }
                }
            }
            for (i, d) in distances[..num].iter().enumerate() {
                if *d < least {
                    least = *d;
                    best = Some((first + i, *d));
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
                add::<S>(block, &mut sums);
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
        fn both_find_what_the_twins_find(
            (rows, dim, planes) in (0usize..70, 1usize..140, 1usize..5),
            seed in 0u32..1000,
            tightness in 0.0f32..1.2,
        ) {
            // Small integers: every sum is exact in f32, so all instruction sets agree bit for bit, ties included.
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) % 7;
            let values = |n: usize, from: usize| (from..from + n).map(|i| value(i) as f32).collect::<Vec<_>>();
            let (ring, q) = (values(rows * planes * PLANE, 0), values(planes * PLANE, 7919));
            let bound = tightness * 8.0 * (planes * PLANE) as f32;
            let expected = twin::match_scan(&ring, &q, bound);
            let (flat, of) = (values(rows * dim, 0), values(dim, 7919));
            let mut all = vec![0.0; rows];
            twin::distances(&flat, &of, &mut all);
            for isa in isas() {
                prop_assert_eq!(match_scan(isa, &ring, &q, bound).unwrap(), expected, "{:?}", isa);
                let mut got = vec![f32::NAN; rows];
                distances(isa, &flat, &of, &mut got).unwrap();
                prop_assert_eq!(&got, &all, "{:?}", isa);
            }
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        assert_eq!(match_scan(Isa::best(), &[1.0; 4], &[], 1.0), Err(KernelError::EmptyHead));
        let error = match_scan(Isa::best(), &[1.0; 33], &[0.0; 32], 1.0).unwrap_err();
        assert!(error.to_string().contains("ring has 33"), "{error}");
        let error = match_scan(Isa::best(), &[1.0; 48], &[0.0; 48], 1.0).unwrap_err();
        assert!(error.to_string().contains("q has 48"), "{error}");
        let error = distances(Isa::best(), &[1.0; 4], &[0.0; 2], &mut [0.0; 3]).unwrap_err();
        assert!(error.to_string().contains("out has 3"), "{error}");
    }
}
