//! Matrices of a model: quantised blocks where candle has quick kernels for them, f32 elsewhere.

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};

use super::HostResult;

/// `y = x W^T + b`, W `[out, in]`.
pub(super) struct Linear {
    weights: Weights,
    bias: Option<Tensor>,
}

enum Weights {
    Blocks(QMatMul),
    /// `[in, out]`, a transposed view.
    Dense(Tensor),
}

impl Linear {
    pub(super) fn new(weights: QTensor, bias: Option<Tensor>) -> HostResult<Self> {
        let weights = if has_quick_kernel(&weights) {
            Weights::Blocks(QMatMul::from_qtensor(weights)?)
        } else {
            Weights::Dense(weights.dequantize(&Device::Cpu)?.t()?)
        };
        Ok(Self { weights, bias })
    }

    /// `x` [tokens, in] to [tokens, out].
    pub(super) fn forward(&self, x: &Tensor) -> HostResult<Tensor> {
        let y = match &self.weights {
            Weights::Blocks(blocks) => blocks.forward(x)?,
            Weights::Dense(dense) => x.matmul(dense)?,
        };
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

/// Whether candle 0.11 multiplies this matrix with vector kernels that beat its own f32 product. Measured on two Zen 4
/// cores, 512 rows, width 1536: Q8_0 319, Q4_K 154, Q6_K 135, f32 197 GFLOP/s, but Q4_0 26, Q4_1 8, Q5_0 5; and at widths
/// that are no multiple of 256 also Q8_0 falls to 32. The slow ones become f32 once, at load: more memory, same numbers.
fn has_quick_kernel(weights: &QTensor) -> bool {
    let quick = matches!(weights.dtype(), GgmlDType::Q8_0 | GgmlDType::Q4K | GgmlDType::Q5K | GgmlDType::Q6K);
    quick && weights.shape().dims().last().is_some_and(|width| width.is_multiple_of(256))
}
