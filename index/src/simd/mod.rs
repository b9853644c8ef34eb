//! The dense primitives of the index: logits of sixteen summaries, exponentials, weighted sums of values.
//!
//! One obvious scalar version and vector versions that give the same bits: dot products are integer, and floating-point
//! steps are the same IEEE operations in the same order on every instruction set.

mod isa;
mod scalar;

pub(crate) use isa::Isa;
