//! Element types of the KV cache.

use half::{bf16, f16};

/// An element of a key or a value: `bf16`, `f16` or `f32`.
///
/// Sealed: the vector kernels have one conversion per type.
pub trait KvElem: bytemuck::Pod + Send + Sync + crate::cpu::simd::Lanes {
    /// Name in reports: `"bf16"`, `"f16"` or `"f32"`.
    const NAME: &'static str;

    /// Exact conversion.
    fn to_f32(self) -> f32;

    /// Nearest representable value, ties to even.
    fn from_f32(x: f32) -> Self;
}

impl KvElem for bf16 {
    const NAME: &'static str = "bf16";

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

impl KvElem for f16 {
    const NAME: &'static str = "f16";

    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl KvElem for f32 {
    const NAME: &'static str = "f32";

    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(x: f32) -> Self {
        x
    }
}
