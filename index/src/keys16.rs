//! Keys held in full as bf16, for the token-level baselines: dot products with a query, and of many keys with many others.
//!
//! bf16 is what the models that produce the keys store; a dot product of `dim` rounded keys with an f32 query differs from the
//! unrounded one by at most `2^-9 |q| |k|`.

use half::bf16;

use crate::error::IndexError;
use crate::index::KeyId;
use crate::simd::Isa;
use crate::simd::vectorise::{Kernel, fold, vectorised};
use crate::snapshot::{Reader, Writer};

/// Rows of a tile of [`Tiles`]: one 512-bit register.
const TILE: usize = 16;
/// Queries that share each load of a tile.
const QUERIES: usize = 4;

/// bf16 to f32 without the quieting of NaN, so that loops vectorise; checked input has none.
#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds f32 elements.
pub(crate) fn narrowed(row: &[f32]) -> Vec<bf16> {
    let narrow = |&x: &f32| {
        // Rounding may reach infinity from the largest finite numbers; the largest bf16 stands for them.
        let rounded = bf16::from_f32(x);
        match (rounded.is_finite(), x < 0.0) {
            (true, _) => rounded,
            (false, true) => bf16::MIN,
            (false, false) => bf16::MAX,
        }
    };
    row.iter().map(narrow).collect()
}

/// Appends tokens to a snapshot: how many, their ids, their keys.
pub(crate) fn write<'a>(to: &mut Writer, ids: &[KeyId], rows: impl Iterator<Item = &'a [bf16]>) {
    to.len(ids.len());
    to.u32s(ids);
    for row in rows {
        let bits: Vec<u16> = row.iter().map(|x| x.to_bits()).collect();
        to.u16s(&bits);
    }
}

/// What [`write`] appended: ids `[n]` and keys `[n, dim]`, finite.
pub(crate) fn read(from: &mut Reader<'_>, dim: usize) -> Result<(Vec<KeyId>, Vec<bf16>), IndexError> {
    let len = from.len()?;
    let ids = from.u32s(len)?;
    let size = len.checked_mul(dim).ok_or_else(|| from.damaged("length"))?;
    let keys: Vec<bf16> = from.u16s(size)?.into_iter().map(bf16::from_bits).collect();
    from.check(keys.iter().all(|k| k.is_finite()), "a number is not finite")?;
    Ok((ids, keys))
}

/// `out[i] = q . rows[places[i]]` for rows `[n, dim]`.
pub(crate) fn dots(isa: Isa, q: &[f32], rows: &[bf16], places: &[u32], out: &mut Vec<f32>) {
    out.clear();
    vectorised(isa, Dots { q, rows, places, out });
}

struct Dots<'a> {
    q: &'a [f32],
    rows: &'a [bf16],
    places: &'a [u32],
    out: &'a mut Vec<f32>,
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let dim = self.q.len();
        for &place in self.places {
            let row = &self.rows[place as usize * dim..][..dim];
            self.out.push(dot_row(self.q, row));
        }
    }
}

/// Dot product in sixteen interleaved partial sums.
#[inline(always)]
fn dot_row(q: &[f32], row: &[bf16]) -> f32 {
    let mut sums = [0.0f32; TILE];
    let (qs, rows) = (q.chunks_exact(TILE), row.chunks_exact(TILE));
    let rest = qs.remainder().iter().zip(rows.remainder());
    let rest: f32 = rest.map(|(x, y)| x * widen(y.to_bits())).sum();
    for (x, y) in qs.zip(rows) {
        for ((s, x), y) in sums.iter_mut().zip(x).zip(y) {
            *s += x * widen(y.to_bits());
        }
    }
    fold(sums) + rest
}

/// Dot products of one row.
pub(crate) fn dot(isa: Isa, q: &[f32], row: &[bf16]) -> f32 {
    vectorised(isa, Dot { q, row })
}

struct Dot<'a> {
    q: &'a [f32],
    row: &'a [bf16],
}

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        dot_row(self.q, self.row)
    }
}

/// Keys in tiles of sixteen with the dimension outermost, so that many queries meet all of them without horizontal sums.
pub(crate) struct Tiles {
    dim: usize,
    len: usize,
    /// `[tiles, dim, 16]`
    data: Vec<f32>,
    /// `[tiles, 16]` added per query weight to each product: the lift of [`crate::icecache`].
    lift: Vec<f32>,
}

impl Tiles {
    /// From rows `[n, dim]` f32 and their lifts `[n]`.
    pub fn new(rows: &[f32], lift: &[f32], dim: usize) -> Self {
        let len = lift.len();
        let tiles = len.div_ceil(TILE);
        let mut data = vec![0.0; tiles * dim * TILE];
        for (i, row) in rows.chunks_exact(dim).enumerate() {
            let base = i / TILE * dim * TILE + i % TILE;
            for (d, &x) in row.iter().enumerate() {
                data[base + d * TILE] = x;
            }
        }
        let mut lifts = vec![0.0; tiles * TILE];
        lifts[..len].copy_from_slice(lift);
        Self { dim, len, data, lift: lifts }
    }

    /// For each of `q` `[m, dim]` with lift `q_lift` `[m]`, the row with the largest `q . row + q_lift * lift`, first of equals,
    /// and that sum; `[m]` into `best`.
    pub fn nearest(&self, isa: Isa, q: &[f32], q_lift: &[f32], best: &mut Vec<(f32, u32)>) {
        best.clear();
        best.resize(q_lift.len(), (f32::NEG_INFINITY, 0));
        for (at, (q, lift)) in q.chunks(QUERIES * self.dim).zip(q_lift.chunks(QUERIES)).enumerate() {
            let best = &mut best[at * QUERIES..][..lift.len()];
            if lift.len() == QUERIES {
                vectorised(isa, Nearest { tiles: self, q, lift, best });
            } else {
                for ((q, lift), best) in q.chunks_exact(self.dim).zip(lift).zip(best) {
                    let (q, lift) = (q.repeat(QUERIES), [*lift; QUERIES]);
                    let mut same = [*best; QUERIES];
                    vectorised(isa, Nearest { tiles: self, q: &q, lift: &lift, best: &mut same });
                    *best = same[0];
                }
            }
        }
    }
}

struct Nearest<'a> {
    tiles: &'a Tiles,
    q: &'a [f32],
    lift: &'a [f32],
    best: &'a mut [(f32, u32)],
}

impl Kernel for Nearest<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let dim = self.tiles.dim;
        let (q0, rest) = self.q.split_at(dim);
        let (q1, rest) = rest.split_at(dim);
        let (q2, q3) = rest.split_at(dim);
        let tiles = self.tiles.data.chunks_exact(dim * TILE).zip(self.tiles.lift.chunks_exact(TILE));
        for (t, (tile, lift)) in tiles.enumerate() {
            // Four named arrays stay in four registers; an array of arrays does not (the build at 128K tokens took 8 times longer).
            let (mut s0, mut s1, mut s2, mut s3) =
                ([0.0f32; TILE], [0.0f32; TILE], [0.0f32; TILE], [0.0f32; TILE]);
            let heads = q0.iter().zip(q1).zip(q2).zip(q3);
            for (row, (((&x0, &x1), &x2), &x3)) in tile.as_chunks::<TILE>().0.iter().zip(heads) {
                for lane in 0..TILE {
                    s0[lane] += x0 * row[lane];
                    s1[lane] += x1 * row[lane];
                    s2[lane] += x2 * row[lane];
                    s3[lane] += x3 * row[lane];
                }
            }
            let mut sums = [s0, s1, s2, s3];
            let num = (self.tiles.len - t * TILE).min(TILE);
            for ((sums, &own), best) in sums.iter_mut().zip(self.lift).zip(&mut *self.best) {
                let mut most = f32::NEG_INFINITY;
                for (s, &l) in sums.iter_mut().zip(lift) {
                    *s += own * l;
                }
                for &s in &sums[..num] {
                    most = if s > most { s } else { most };
                }
                if most > best.0 {
                    let lane = sums[..num].iter().position(|&s| s == most).unwrap_or(0);
                    *best = (most, (t * TILE + lane) as u32);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, by: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * by).sin()).collect()
    }

    #[test]
    fn products_equal_the_f64_sum_within_its_rounding() {
        for dim in [64usize, 80, 129] {
            let rows: Vec<bf16> = numbers(5 * dim, 0.37).iter().map(|&x| bf16::from_f32(x)).collect();
            let q = numbers(dim, 1.7);
            for isa in Isa::all_available() {
                let mut out = Vec::new();
                dots(isa, &q, &rows, &[4, 0, 2], &mut out);
                for (&got, place) in out.iter().zip([4usize, 0, 2]) {
                    let row = &rows[place * dim..][..dim];
                    let exact: f64 = q.iter().zip(row).map(|(a, b)| f64::from(*a) * b.to_f64()).sum();
                    // dim products and as many sums, each of relative error 2^-24, over terms of at most 1.
                    assert!((f64::from(got) - exact).abs() < dim as f64 * dim as f64 * 2f64.powi(-24));
                    assert_eq!(got, dot(isa, &q, row));
                }
            }
        }
    }

    #[test]
    fn nearest_row_is_the_first_of_the_best_for_every_count() {
        let dim = 80;
        for n in [1usize, 15, 16, 17, 100] {
            let mut rows = numbers(n * dim, 0.91);
            rows.truncate(n * dim);
            let lift = numbers(n, 0.3);
            let tiles = Tiles::new(&rows, &lift, dim);
            for m in [1usize, 4, 7] {
                let (q, q_lift) = (numbers(m * dim, 2.3), numbers(m, 1.1));
                for isa in Isa::all_available() {
                    let mut best = Vec::new();
                    tiles.nearest(isa, &q, &q_lift, &mut best);
                    for (i, &(got, at)) in best.iter().enumerate() {
                        let score = |r: usize| -> f64 {
                            let pairs = q[i * dim..][..dim].iter().zip(&rows[r * dim..][..dim]);
                            pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                                + f64::from(q_lift[i]) * f64::from(lift[r])
                        };
                        let most = (0..n).map(score).fold(f64::NEG_INFINITY, f64::max);
                        assert!(
                            (score(at as usize) - most).abs() < 1e-3 && (f64::from(got) - most).abs() < 1e-3
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_never_leaves_the_finite_numbers() {
        let rounded = narrowed(&[f32::MAX, -f32::MAX, 0.1]);
        assert_eq!(rounded, [bf16::MAX, bf16::MIN, bf16::from_f32(0.1)]);
    }
}
