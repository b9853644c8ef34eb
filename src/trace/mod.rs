//! Recorded long-context traces: reading, writing, cutting and synthesising format 1.
//!
//! A trace is one safetensors file per shard (one layer's one kv head). Tensors, all bf16:
//!
//! | tensor | shape | content |
//! |---|---|---|
//! | `k` | [num_tokens, head_dim] | keys after rotary embedding |
//! | `v` | [num_tokens, head_dim] | values |
//! | `q` | [num_queries, group, head_dim] | queries after rotary embedding |
//! | `q_pre` | [num_queries, group, head_dim] | the same before it |
//!
//! Query `j` sits at position `first_query_pos + j` and sees keys `0..=` that position. The metadata (strings in the
//! safetensors header) are the fields of [`TraceMeta`], plus `floe_trace` = "1".
//!
//! A [`Trace`] that opened is valid: shapes agree with the metadata, queries and segments lie inside the tokens, and
//! every element is finite. Nothing downstream has to check again.

mod error;
mod map;
mod meta;
mod read;
mod rope;
mod slice;
pub mod synth;
mod write;

pub use error::TraceError;
pub(crate) use map::map_file;
pub use meta::{FORMAT, Segment, TraceMeta};
pub use read::{Tensor, Trace};
pub use rope::{Rope, Rotation, rope_error};
pub use slice::{QueryRange, SliceRequest};
pub use synth::SynthRequest;
pub use write::{TraceData, TraceWriter, write_trace};
