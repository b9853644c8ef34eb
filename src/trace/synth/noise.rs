//! Seeded noise whose bits do not depend on the machine: integer arithmetic and exactly rounded operations only.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Independent sequences drawn from one seed, so that another group changes no key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stream {
    Geometry = 0,
    Topics = 1,
    Tokens = 2,
    Needles = 3,
    Queries = 4,
}

/// A source of random numbers.
pub(super) struct Noise(ChaCha8Rng);

impl Noise {
    pub(super) fn new(seed: u64, stream: Stream) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream as u64);
        Self(rng)
    }

    /// Near-normal with mean 0 and variance 1: the sum of four 16-bit uniforms, at most 3.47 in magnitude.
    ///
    /// A true normal needs a logarithm, and buys nothing here: sums over dozens of dimensions are normal anyway.
    pub(super) fn normal(&mut self) -> f64 {
        let bits = self.0.next_u64();
        let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
        // Four uniforms on 0..65536 have mean 131070 and standard deviation sqrt(4 (65536^2 - 1) / 12).
        (sum as f64 - 131_070.0) / 37_837.227
    }

    /// `len` draws of [`Noise::normal`] times `scale`.
    pub(super) fn normals(&mut self, len: usize, scale: f64) -> Vec<f64> {
        (0..len).map(|_| scale * self.normal()).collect()
    }

    /// Uniform on [-1, 1).
    pub(super) fn symmetric(&mut self) -> f64 {
        // 53 bits: every value is exact in f64.
        (self.0.next_u64() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// An integer below `limit`, which must not be 0. Its bias is below limit / 2^64.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.0.next_u64()) * limit as u128) >> 64) as usize
    }
}
