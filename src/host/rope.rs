//! Rotary position embedding on host rows.

use super::HostResult;
use super::gguf::Gguf;

/// Which two dimensions rotate together. The scores are the same either way; stored keys are not, so the two must never
/// be mixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(0, 1), (2, 3), ...`
    Interleaved,
    /// `(i, i + head_dim / 2)`
    Halves,
}

/// Frequencies of one rotary base.
#[derive(Clone, Debug)]
pub struct Rope {
    pairing: Pairing,
    /// Radians a position, `[head_dim / 2]`.
    frequencies: Vec<f64>,
}

/// Cosines and sines of consecutive positions.
#[derive(Clone, Debug, Default)]
pub struct Phases {
    /// `[tokens, head_dim / 2, 2]`: cosine, sine.
    cos_sin: Vec<(f32, f32)>,
}

impl Rope {
    /// `frequency_i = theta^(-2i / head_dim)` (Su et al., 2021, arXiv 2104.09864), divided by `factors[i]` where the model
    /// brings its own factors (Llama 3.1).
    #[must_use]
    pub fn new(pairing: Pairing, theta: f64, head_dim: usize, factors: Option<&[f32]>) -> Self {
        let frequencies = (0..head_dim / 2)
            .map(|i| {
                let factor = factors.and_then(|f| f.get(i)).map_or(1.0, |f| f64::from(*f));
                theta.powf(-2.0 * i as f64 / head_dim as f64) / factor
            })
            .collect();
        Self { pairing, frequencies }
    }

    /// Angles of positions `first..first + tokens`, computed in f64.
    #[must_use]
    pub fn phases(&self, first: usize, tokens: usize) -> Phases {
        let angle = |position: usize, frequency: f64| {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (cos as f32, sin as f32)
        };
        let positions = first..first + tokens;
        Phases {
            cos_sin: positions.flat_map(|p| self.frequencies.iter().map(move |f| angle(p, *f))).collect(),
        }
    }

    /// Rotates `rows`, `[tokens, heads, head_dim]`, in place.
    pub fn rotate(&self, phases: &Phases, heads: usize, rows: &mut [f32]) {
        let half = self.frequencies.len();
        let tokens = rows.chunks_exact_mut(heads * 2 * half).zip(phases.cos_sin.chunks_exact(half));
        for (token, phases) in tokens {
            for row in token.chunks_exact_mut(2 * half) {
                match self.pairing {
                    Pairing::Interleaved => {
                        for (pair, (cos, sin)) in row.chunks_exact_mut(2).zip(phases) {
                            (pair[0], pair[1]) =
                                (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
                        }
                    }
                    Pairing::Halves => {
                        let (low, high) = row.split_at_mut(half);
                        for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(phases) {
                            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                        }
                    }
                }
            }
        }
    }
}

/// The model's own frequency factors, when it has them.
pub(super) fn factors(gguf: &mut Gguf, head_dim: usize) -> HostResult<Option<Vec<f32>>> {
    if !gguf.has("rope_freqs.weight") {
        return Ok(None);
    }
    Ok(Some(gguf.dense("rope_freqs.weight", &[head_dim / 2])?.to_vec1()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_pairings_rotate_the_same_numbers_in_their_own_order() {
        let dim = 8;
        let halves: Vec<f32> = (0..dim).map(|i| i as f32 + 1.0).collect();
        let mut interleaved: Vec<f32> = (0..dim).map(|i| halves[i / 2 + i % 2 * dim / 2]).collect();
        let mut rotated = halves.clone();
        for (pairing, rows) in [(Pairing::Halves, &mut rotated), (Pairing::Interleaved, &mut interleaved)] {
            let rope = Rope::new(pairing, 100.0, dim, None);
            rope.rotate(&rope.phases(7, 1), 1, rows);
        }
        assert_ne!(halves, rotated);
        for i in 0..dim {
            assert_eq!(interleaved[i], rotated[i / 2 + i % 2 * dim / 2]);
        }
    }

    #[test]
    fn scores_depend_on_the_distance_alone() {
        let rope = Rope::new(Pairing::Halves, 10_000.0, 16, None);
        let dot = |p: usize, q: usize| -> f32 {
            let row = |seed: usize, at: usize| {
                let mut row: Vec<f32> = (0..16).map(|i| ((i * seed) as f32).sin()).collect();
                rope.rotate(&rope.phases(at, 1), 1, &mut row);
                row
            };
            row(3, p).iter().zip(row(5, q)).map(|(a, b)| a * b).sum()
        };
        assert!((dot(10, 4) - dot(1010, 1004)).abs() < 1e-4);
        assert!((dot(10, 4) - dot(10, 5)).abs() > 1e-3);
    }
}
