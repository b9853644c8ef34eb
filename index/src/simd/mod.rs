//! Vector kernels: the only place of this crate that may hold `unsafe`. Safe functions that take an [`Isa`] dispatch to them.

pub mod codes;
pub(crate) mod dense;
pub mod exp;
pub(crate) mod hadamard;
mod isa;
pub(crate) mod pairs;
pub(crate) mod prefetch;
pub(crate) mod vectorise;

pub use isa::{Avx2, Avx512, Isa};
