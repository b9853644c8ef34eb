//! Rotary position embedding, as far as traces need it: to check `q` against `q_pre` and to synthesise both.

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

    /// Turns the head `x` [head_dim] in place by `position`, which may be negative to turn back.
    pub fn rotate(&self, x: &mut [f64], position: f64) {
        let head_dim = x.len();
        for (i, frequency) in self.frequencies.iter().enumerate() {
            let (sin, cos) = libm::sincos(position * frequency);
            let (a, b) = self.rope.pair(i, head_dim);
            (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
        }
    }
}
