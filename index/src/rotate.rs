//! Seeded orthogonal rotation of vectors of any dimension, so that a few bits per coordinate describe every direction alike.
//!
//! A round multiplies by random signs and applies a Walsh-Hadamard transform to each block, where the blocks are the powers of
//! two that sum to the dimension, largest first:
//!
//! ```text
//! 128 = [ 128 ]                 one round
//!  80 = [   64   ][ 16 ]        signs, transform, shuffle, signs, transform
//! ```
//!
//! One round suffices for a power of two; otherwise a seeded shuffle between two rounds lets the blocks mix. Every step is
//! orthogonal, so lengths and dot products survive up to rounding (relative error below `2 log2(dim) * 2^-24` per round).
//! The arithmetic is multiplications by one constant and additions in a fixed order: the result is bit-identical on every
//! machine and instruction set. Cost: `dim * log2(dim)` additions.

use crate::error::IndexError;
use crate::simd::{Isa, hadamard};

/// Largest supported dimension; the score kernels' integer sums are proved to fit for it.
pub const DIM_MAX: usize = 4096;

/// An orthogonal matrix, kept as its factors.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    dim: usize,
    /// `[rounds][dim]`: random sign times `1 / sqrt(block)`.
    signs: Vec<Vec<f32>>,
    /// Fisher-Yates partners of `dim - 1, ..., 1`; empty with a single round.
    swaps: Vec<u32>,
}

impl Rotation {
    /// The rotation of `dim` coordinates drawn from `seed`; equal arguments give equal rotations everywhere.
    ///
    /// # Errors
    /// `Config` when `dim` is 0 or above [`DIM_MAX`].
    pub fn new(dim: usize, seed: u64) -> Result<Self, IndexError> {
        if dim == 0 || dim > DIM_MAX {
            return Err(IndexError::Config { field: "dim", value: dim as f64, expected: "1 to 4096" });
        }
        let mut state = seed ^ (dim as u64).wrapping_mul(0xA076_1D64_78BD_642F);
        let num_rounds = if dim.is_power_of_two() { 1 } else { 2 };
        let signs = (0..num_rounds).map(|_| scaled_signs(dim, &mut state)).collect();
        let mut swaps = Vec::new();
        if num_rounds > 1 {
            swaps.extend((1..dim).rev().map(|i| below(&mut state, i as u32 + 1)));
        }
        Ok(Self { dim, signs, swaps })
    }

    /// Coordinates of a vector.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Random signs of each round, times `1 / sqrt(block)`: `[rounds][dim]`.
    pub fn signs(&self) -> &[Vec<f32>] {
        &self.signs
    }

    /// What each coordinate takes before the second round, `[dim]`: coordinate `i` becomes coordinate `order[i]`; empty with one round.
    pub fn order(&self) -> Vec<u32> {
        let mut order: Vec<u32> =
            if self.swaps.is_empty() { Vec::new() } else { (0..self.dim as u32).collect() };
        for (i, &j) in (1..self.dim).rev().zip(&self.swaps) {
            order.swap(i, j as usize);
        }
        order
    }

    /// The rotation as a matrix `[dim, dim]` f32, row-major: row `i` times `x` is coordinate `i` of the rotated `x`, up to rounding.
    pub fn matrix(&self) -> Vec<f32> {
        let mut matrix = vec![0.0; self.dim * self.dim];
        let mut axis = vec![0.0; self.dim];
        for column in 0..self.dim {
            axis.fill(0.0);
            axis[column] = 1.0;
            self.apply(&mut axis);
            for (row, &x) in matrix.chunks_exact_mut(self.dim).zip(&axis) {
                row[column] = x;
            }
        }
        matrix
    }

    /// Rotates `x` `[dim]` f32 in place.
    ///
    /// # Panics
    /// When `x` has another length.
    pub fn apply(&self, x: &mut [f32]) {
        assert_eq!(x.len(), self.dim, "rotation of {} coordinates", self.dim);
        for (round, signs) in self.signs.iter().enumerate() {
            if round > 0 {
                for (i, &j) in (1..self.dim).rev().zip(&self.swaps) {
                    x.swap(i, j as usize);
                }
            }
            multiply(x, signs);
            transform_blocks(x);
        }
    }

    /// Undoes [`Rotation::apply`] on `x` `[dim]` f32, up to rounding.
    ///
    /// # Panics
    /// When `x` has another length.
    pub fn apply_inverse(&self, x: &mut [f32]) {
        assert_eq!(x.len(), self.dim, "rotation of {} coordinates", self.dim);
        for (round, signs) in self.signs.iter().enumerate().rev() {
            transform_blocks(x);
            multiply(x, signs);
            if round > 0 {
                for (i, &j) in (1..self.dim).rev().zip(&self.swaps).rev() {
                    x.swap(i, j as usize);
                }
            }
        }
    }
}

/// Start and length of the power-of-two blocks of `dim` coordinates, largest first.
fn blocks(dim: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut start = 0;
    (0..usize::BITS).rev().map(|bit| 1usize << bit).filter(move |len| dim & len != 0).map(move |len| {
        let block = (start, len);
        start += len;
        block
    })
}

fn scaled_signs(dim: usize, state: &mut u64) -> Vec<f32> {
    blocks(dim)
        .flat_map(|(_, len)| std::iter::repeat_n((1.0 / (len as f64).sqrt()) as f32, len))
        .map(|scale| if next(state) >> 63 == 0 { scale } else { -scale })
        .collect()
}

fn multiply(x: &mut [f32], by: &[f32]) {
    for (x, by) in x.iter_mut().zip(by) {
        *x *= by;
    }
}

fn transform_blocks(x: &mut [f32]) {
    let isa = Isa::detect();
    for (start, len) in blocks(x.len()) {
        hadamard::transform(isa, &mut x[start..start + len]);
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, seeded, the same on every platform.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Integer in `0..limit` by multiplication (Lemire 2019); the bias below `limit / 2^64` is irrelevant here.
fn below(state: &mut u64, limit: u32) -> u32 {
    ((u128::from(next(state)) * u128::from(limit)) >> 64) as u32
}

#[cfg(test)]
mod tests {
    use super::{DIM_MAX, Rotation, next};
    use crate::error::IndexError;

    const DIMS: [usize; 12] = [1, 2, 3, 7, 64, 80, 96, 100, 128, 256, 576, 4095];

    fn random(dim: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        (0..dim).map(|_| (next(&mut state) >> 40) as f32 / (1u32 << 23) as f32 - 1.0).collect()
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    #[test]
    fn rotation_keeps_dot_products_and_is_undone_by_its_inverse() {
        for dim in DIMS {
            let rotation = Rotation::new(dim, 7).unwrap();
            let (a, b) = (random(dim, 1), random(dim, 2));
            let (mut ra, mut rb) = (a.clone(), b.clone());
            rotation.apply(&mut ra);
            rotation.apply(&mut rb);
            // Two rounds of log2(dim) additions, each within half a unit in the last place of the vector's length.
            let bound = 4.0 * (dim as f64).log2().max(1.0) * f64::from(f32::EPSILON);
            let size = (dot(&a, &a) * dot(&b, &b)).sqrt();
            assert!((dot(&ra, &rb) - dot(&a, &b)).abs() <= bound * size, "dim {dim}");
            rotation.apply_inverse(&mut ra);
            for (x, y) in ra.iter().zip(&a) {
                assert!(f64::from((x - y).abs()) <= bound * dot(&a, &a).sqrt(), "dim {dim}: {x} against {y}");
            }
        }
    }

    #[test]
    fn signs_and_order_say_all_of_a_rotation() {
        for dim in [96, 80, 128] {
            let rotation = Rotation::new(dim, 11).unwrap();
            let (signs, order) = (rotation.signs(), rotation.order());
            assert_eq!((signs.len(), order.len()), if dim == 128 { (1, 0) } else { (2, dim) });
            let (mut want, mut x) = (random(dim, 5), random(dim, 5));
            rotation.apply(&mut want);
            for (round, signs) in signs.iter().enumerate() {
                if round > 0 {
                    x = order.iter().map(|from| x[*from as usize]).collect();
                }
                super::multiply(&mut x, signs);
                super::transform_blocks(&mut x);
            }
            assert_eq!(x, want, "dim {dim}");
        }
    }

    #[test]
    fn one_coordinate_spreads_over_many() {
        for dim in [64, 80, 96, 100, 128, 256, 576] {
            let rotation = Rotation::new(dim, 3).unwrap();
            for axis in [0, dim / 2, dim - 1] {
                let mut x = vec![0.0; dim];
                x[axis] = 1.0;
                rotation.apply(&mut x);
                // Fourth moment: 1 / dim when spread evenly, 1 when not at all.
                let fourth: f64 = x.iter().map(|v| f64::from(*v).powi(4)).sum();
                assert!(fourth <= 6.0 / dim as f64, "dim {dim}, axis {axis}: {fourth}");
            }
        }
    }

    #[test]
    fn seed_and_dimension_determine_the_rotation() {
        assert_eq!(Rotation::new(96, 5).unwrap(), Rotation::new(96, 5).unwrap());
        assert_ne!(Rotation::new(96, 5).unwrap(), Rotation::new(96, 6).unwrap());
        let mut x: Vec<f32> = (0..80).map(|i| i as f32).collect();
        Rotation::new(80, 1).unwrap().apply(&mut x);
        let bits =
            x.iter().fold(0u64, |h, v| (h ^ u64::from(v.to_bits())).wrapping_mul(0x0000_0100_0000_01B3));
        // Written once from this code: stored sketches are only readable while it holds.
        assert_eq!(bits, 0x3e89_dd84_2d08_0000, "{bits:#x}");
    }

    #[test]
    fn dimension_outside_its_range_is_refused() {
        for dim in [0, DIM_MAX + 1] {
            assert!(matches!(Rotation::new(dim, 0), Err(IndexError::Config { field: "dim", .. })));
        }
    }
}
