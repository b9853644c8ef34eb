//! Scalar twins: what the kernels mean, with f64 accumulation and no tricks. They also are the [`Isa::Scalar`] versions.
//!
//! [`Isa::Scalar`]: crate::Isa::Scalar

pub mod device;
mod match_scan;
mod oracle;
mod score_rows;
mod sparse_decode;

pub use match_scan::{distances, match_scan};
pub use oracle::{StateF64, attend_f64};
pub use score_rows::score_rows;
pub use sparse_decode::sparse_decode;
