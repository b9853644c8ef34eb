//! Rotary position embedding, as far as traces need it: to check `q` against `q_pre` and to synthesise both.

use super::Trace;

/// How the model pairs the dimensions of a head for rotary position embedding.
///
/// Pair `i` of `head_dim / 2` turns by `position * theta^(-2 i / head_dim)` radians (Su et al. 2021, RoFormer, eq. 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rope {
    /// Dimension `i` pairs with `i + head_dim / 2` (GPT-NeoX, Qwen, Llama in transformers).
    NeoxHalf,
    /// Dimension `2 i` pairs with `2 i + 1` (GPT-J, llama.cpp's Llama).
    Interleaved,
    /// No rotation: `q` equals `q_pre`.
    None,
}

impl Rope {
    /// The name in the metadata field `rope`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NeoxHalf => "neox-half",
            Self::Interleaved => "interleaved",
            Self::None => "none",
        }
    }

    /// The kind with this name in the metadata.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::NeoxHalf, Self::Interleaved, Self::None].into_iter().find(|kind| kind.name() == name)
    }

    /// The two dimensions of pair `i` in a head of `head_dim` dimensions.
    pub(super) fn pair(self, i: usize, head_dim: usize) -> (usize, usize) {
        match self {
            Self::NeoxHalf | Self::None => (i, i + head_dim / 2),
            Self::Interleaved => (2 * i, 2 * i + 1),
        }
    }
}

/// Rotation of one head by positions: the frequencies, computed once.
#[derive(Clone, Debug)]
pub struct Rotation {
    rope: Rope,
    /// Radians per position of each pair, [head_dim / 2]; empty for [`Rope::None`].
    frequencies: Vec<f64>,
}

impl Rotation {
    /// Rotation for heads of `head_dim` (even) dimensions with base `theta`.
    ///
    /// Sine, cosine and power come from the crate libm, not the system, so the bits are the same on every machine.
    pub fn new(rope: Rope, head_dim: usize, theta: f64) -> Self {
        let pairs = if rope == Rope::None { 0 } else { head_dim / 2 };
        let frequencies = (0..pairs).map(|i| libm::pow(theta, -2.0 * i as f64 / head_dim as f64)).collect();
        Self { rope, frequencies }
    }

    /// Turns the head `x`, \[head_dim\], in place by `position`, which may be negative to turn back.
    pub fn rotate(&self, x: &mut [f64], position: f64) {
        let head_dim = x.len();
        for (i, frequency) in self.frequencies.iter().enumerate() {
            let (sin, cos) = libm::sincos(position * frequency);
            let (a, b) = self.rope.pair(i, head_dim);
            (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
        }
    }
}

/// How far `q` is from RoPE(`q_pre`): the largest relative L2 distance over all heads of `num_sampled` queries spread
/// evenly over the trace. Rounding to bf16 alone explains about 0.004 (2^-8).
pub fn rope_error(trace: &Trace, num_sampled: usize) -> f64 {
    let meta = trace.meta();
    let rotation = Rotation::new(meta.rope, meta.head_dim, meta.rope_theta);
    let stride = meta.num_queries.div_ceil(num_sampled.max(1));
    let mut worst: f64 = 0.0;
    for j in (0..meta.num_queries).step_by(stride) {
        let heads =
            trace.query(j).chunks_exact(meta.head_dim).zip(trace.query_pre(j).chunks_exact(meta.head_dim));
        for (q, q_pre) in heads {
            let mut expected: Vec<f64> = q_pre.iter().map(|x| x.to_f64()).collect();
            rotation.rotate(&mut expected, (trace.query_position(j) + meta.rope_offset) as f64);
            let square = |x: f64| x * x;
            let distance: f64 = q.iter().zip(&expected).map(|(x, y)| square(x.to_f64() - y)).sum();
            let norm: f64 = expected.iter().map(|&x| square(x)).sum();
            if distance > 0.0 {
                worst = worst.max((distance / norm).sqrt());
            }
        }
    }
    worst
}
