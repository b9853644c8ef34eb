//! Choosing the next token from logits, with a seed.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::{HostError, HostResult};

/// Draws tokens; the same seed and logits give the same tokens on every machine that computes the same logits.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// `temperature` 0 = always the largest logit. `top_p` in (0, 1]: the smallest set of tokens that holds this much
    /// probability is drawn from (Holtzman et al., 2019, arXiv 1904.09751).
    ///
    /// # Errors
    /// [`HostError::Argument`] naming the value that is out of range.
    pub fn new(temperature: f32, top_p: f32, seed: u64) -> HostResult<Self> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(HostError::argument("temperature", temperature, "must be finite and at least 0"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(HostError::argument("top_p", top_p, "must be above 0 and at most 1"));
        }
        Ok(Self { temperature, top_p, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// The next token for `logits`, `[vocab]`; ties go to the smaller token.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        if self.temperature == 0.0 {
            return largest(logits);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        let Some(top) = order.first().map(|t| logits[*t as usize]) else { return 0 };
        let inverse = 1.0 / f64::from(self.temperature);
        let weight = |token: u32| (f64::from(logits[token as usize] - top) * inverse).exp();
        let total: f64 = order.iter().map(|t| weight(*t)).sum();
        let (mut kept, mut mass) = (0, 0.0);
        while kept < order.len() && mass < f64::from(self.top_p) * total {
            mass += weight(order[kept]);
            kept += 1;
        }
        // 53 random bits, the precision of an f64 in [0, 1).
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * mass;
        for &token in &order[..kept] {
            left -= weight(token);
            if left < 0.0 {
                return token;
            }
        }
        order[kept.saturating_sub(1)]
    }
}

/// The token with the largest logit; ties go to the smaller token.
#[must_use]
pub fn largest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    best.map_or(0, |(token, _)| token as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temperature_zero_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(0.0, 1.0, 1).unwrap();
        assert_eq!(sampler.sample(&[1.0, 3.0, 3.0, -2.0]), 1);
    }

    #[test]
    fn a_seed_repeats_and_frequencies_follow_the_weights() {
        let logits = [0.0, 2f32.ln(), f32::NEG_INFINITY, 5f32.ln()];
        let draw = |seed| {
            let mut sampler = Sampler::new(1.0, 1.0, seed).unwrap();
            (0..8000).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
        let count = |token| draw(3).iter().filter(|t| **t == token).count() as f64 / 8000.0;
        for (token, share) in [(0, 0.125), (1, 0.25), (2, 0.0), (3, 0.625)] {
            assert!((count(token) - share).abs() < 0.02, "{token}: {}", count(token));
        }
    }

    #[test]
    fn top_p_never_draws_beyond_its_mass() {
        let logits = [0.0, 2f32.ln(), 1f32.ln(), 5f32.ln()];
        let mut sampler = Sampler::new(1.0, 0.5, 9).unwrap();
        assert!((0..500).all(|_| sampler.sample(&logits) == 3));
    }

    #[test]
    fn values_out_of_range_are_named() {
        assert!(Sampler::new(-1.0, 1.0, 0).unwrap_err().to_string().contains("temperature"));
        assert!(Sampler::new(1.0, 0.0, 0).unwrap_err().to_string().contains("top_p"));
    }
}
