//! Attention over chosen rows of one shard.

use super::AttendScratch;
use crate::{Attend, KernelError, KvRows, Rows, StateMut, twin};

/// Attention of one group of query heads over `which` rows, written to `state`; no rows give the empty state.
///
/// Formula, per head: `w_i = exp(cap(q.k_i * scale))`, `out = sum w_i v_i / sum w_i`, `lse = ln(sum w_i)`. A score beyond f32
/// counts as the largest f32. Runs on the calling thread.
///
/// # Errors
/// Wrong shapes of `q`, `out` or `lse`; rows outside the shard; a list that is not strictly ascending; a scale or
/// softcap that is no usable number.
pub fn sparse_decode<R: KvRows>(
    attend: &Attend<'_, R>,
    which: Rows<'_>,
    scratch: &mut AttendScratch,
    state: StateMut<'_>,
) -> Result<(), KernelError> {
    twin::sparse_decode(attend, &which, scratch, state)
}
