//! floe-index: the CPU semantic page index for attention keys of one shard (sequence, layer, kv head).
//!
//! No device code and no engine types. See `KeyIndex` for the contract.

mod blocks;
mod check;
mod dci;
mod error;
pub mod export;
mod flat;
mod found;
mod frame;
mod grow;
mod hnsw;
mod icecache;
mod idmap;
mod index;
mod keys16;
mod pages;
mod quant;
mod refine;
mod rotate;
mod rows;
mod scratch;
mod search;
pub mod simd;
pub mod sketch;
mod snapshot;
mod tail;
mod tokens;
mod topk;

pub use dci::Dci;
pub use error::{Field, IndexError};
pub use flat::Flat;
pub use found::Found;
pub use hnsw::{Hnsw, HnswConfig};
pub use icecache::Icecache;
pub use index::{
    Batch, DETAIL, Hit, KeyId, KeyIndex, MAX_DIM, MemoryReport, Query, SearchParams, Tail, TailOut, Unit,
};
pub use pages::ROTATION_SEED;
pub use rotate::{DIM_MAX, Rotation};
pub use scratch::Scratch;
pub use tokens::FlatTokens;
