//! The oracle: attention of one group over a prefix of a shard with every number in f64. Slow; tests and audits only.

use floe_cuda::{Isa, Rows, twin};

use crate::error::Result;
use crate::page::{ShardPages, with_rows};
use crate::query::GroupQuery;

pub use floe_cuda::twin::StateF64;

/// State over tokens `0..num_tokens`, f64.
///
/// # Errors
/// When the query does not fit the shard or the shard is shorter.
pub fn attend_f64(query: &GroupQuery<'_>, pages: &ShardPages, num_tokens: usize) -> Result<StateF64> {
    Ok(
        with_rows!(pages, rows => twin::attend_f64(&query.over(Isa::Scalar, rows), &Rows::Range(0..num_tokens))?),
    )
}
