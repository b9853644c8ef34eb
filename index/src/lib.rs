//! floe-index: the CPU semantic page index for attention keys of one shard (sequence, layer, kv head).
//!
//! No device code and no engine types. See `KeyIndex` for the contract.

mod error;
mod found;
mod index;
mod rotate;
mod scratch;
pub mod simd;
pub mod sketch;

pub use error::{Field, IndexError};
pub use found::Found;
pub use index::{Batch, Hit, KeyId, KeyIndex, MemoryReport, Query, SearchParams, Tail, TailOut, Unit};
pub use rotate::{DIM_MAX, Rotation};
pub use scratch::Scratch;
