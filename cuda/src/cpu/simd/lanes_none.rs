//! Lane order of element types where there are no vector kernels.

/// See the x86-64 version; here only the scalar twins run.
pub trait Lanes {
    /// No chunk is ever packed.
    const INTERLEAVED: bool = false;
}

impl Lanes for half::bf16 {}
impl Lanes for half::f16 {}
impl Lanes for f32 {}
