//! Causal attention of consecutive prompt tokens, exact, on one thread.
//!
//! The queries of one kv head are stacked as one large group, so that a stored row is read once for all of them:
//!
//! ```text
//! position      first_row        shared end = position of query 0         query n-1
//!               |  |  |  ..... shared by all queries ...... | \
//!  left ragged  \  |                                        |   \   right ragged: each query
//!  (spans only)   \|                                        |     \ its own rows up to itself
//! ```
//! The two ragged parts are attended query by query and merged; they are `n` rows at most.

use std::ops::Range;

use floe_cuda::{Attend, AttendParams, Isa, KvRows, Rows, StateMut, StateRef, merge_states, sparse_decode};

use super::AttendScratch;
use crate::error::Result;
use crate::ids::TokenPos;

/// Queries of one kv head at consecutive positions.
#[derive(Clone, Copy, Debug)]
pub struct CausalQueries<'a> {
    /// Post-RoPE queries, `[tokens, group, head_dim]` f32, host memory.
    pub q: &'a [f32],
    /// Query heads of the group.
    pub group: usize,
    /// Softmax scale, applied to `q.k`.
    pub scale: f32,
    /// Position of the first query; rows up to the last query's position are stored.
    pub first: TokenPos,
    /// Rows that a query attends at most, its own included; `None` = all.
    pub span: Option<usize>,
}

impl CausalQueries<'_> {
    /// Rows that query `i` sees.
    fn rows(&self, i: usize) -> Range<usize> {
        let end = self.first as usize + i + 1;
        end - self.span.map_or(end, |span| span.min(end))..end
    }
}

/// Output of every query, `[tokens, group, head_dim]`, into `out`.
pub(super) fn attend_causal<R: KvRows>(
    isa: Isa,
    queries: &CausalQueries<'_>,
    rows: &R,
    scratch: &mut AttendScratch,
    out: &mut [f32],
) -> Result<()> {
    let head_dim = rows.head_dim();
    let per_token = queries.group * head_dim;
    let num_tokens = queries.q.len() / per_token.max(1);
    let params = AttendParams { scale: queries.scale, softcap: None };
    let all = &mut scratch.all;
    all.reset(num_tokens * queries.group, head_dim);
    if num_tokens == 0 {
        return Ok(());
    }
    let shared_start = queries.rows(num_tokens - 1).start;
    let shared = shared_start..(queries.first as usize).max(shared_start);
    if !shared.is_empty() {
        let attend = Attend { isa, q: queries.q, rows, params };
        sparse_decode(&attend, Rows::Range(shared.clone()), &mut scratch.rows, all.as_mut())?;
    }
    scratch.part.reset(queries.group, head_dim);
    for (i, q) in queries.q.chunks_exact(per_token).enumerate() {
        let attend = Attend { isa, q, rows, params };
        let seen = queries.rows(i);
        let mut own = StateMut {
            out: &mut all.out[i * per_token..][..per_token],
            lse: &mut all.lse[i * queries.group..][..queries.group],
        };
        let (left, right) = (seen.start..shared.start.min(seen.end), seen.start.max(shared.end)..seen.end);
        for ragged in [left, right] {
            if !ragged.is_empty() {
                sparse_decode(&attend, Rows::Range(ragged), &mut scratch.rows, scratch.part.as_mut())?;
                let part = StateRef { out: &scratch.part.out, lse: &scratch.part.lse };
                merge_states(own.reborrow(), part)?;
            }
        }
    }
    out.copy_from_slice(&all.out);
    Ok(())
}
