//! Instruction set as a value: found once, carried by the index, dispatched once per block.

use super::scalar;
use crate::quant::QuantQuery;

/// What this machine can run. Copying it is free; holding one proves that the instructions exist.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Isa {
    /// Plain Rust, on any machine.
    Scalar,
}

impl Isa {
    /// The best that this machine offers.
    pub fn detect() -> Self {
        Isa::Scalar
    }

    /// Logits `[group, 16]` of one block: `keys` `[quads, 16, 4]` codes, `scales` `[16]`.
    pub fn logits(self, keys: &[u8], scales: &[f32], q: &QuantQuery, out: &mut [f32]) {
        match self {
            Isa::Scalar => scalar::logits(keys, scales, q, out),
        }
    }

    /// `weights[lane] = rest[lane] * exp(min(logits[lane] - max, 0))` for sixteen lanes.
    pub fn weigh(self, logits: &[f32], rest: &[f32], max: f32, weights: &mut [f32]) {
        match self {
            Isa::Scalar => scalar::weigh(logits, rest, max, weights),
        }
    }

    /// `out[h, d] += sum_e weights[h, e] * values[e, d]` with `values` `[16, dim]` codes, `weights` `[group, 16]`,
    /// `out` `[group, dim]`.
    pub fn accumulate(self, values: &[i8], weights: &[f32], out: &mut [f32]) {
        match self {
            Isa::Scalar => scalar::accumulate(values, weights, out),
        }
    }
}
