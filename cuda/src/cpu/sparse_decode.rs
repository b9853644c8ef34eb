//! Attention over chosen rows of one shard.

use super::AttendScratch;
#[cfg(target_arch = "x86_64")]
use super::vector;
use crate::{Attend, Isa, KernelError, KvRows, Rows, StateMut, twin};

/// Attention of one group of query heads over `which` rows, written to `state`; no rows give the empty state.
///
/// Formula, per head: `w_i = exp(cap(q.k_i * scale))`, `out = sum w_i v_i / sum w_i`, `lse = ln(sum w_i)`. A score that
/// scaling takes beyond f32 counts as the largest f32; `q.k` itself must stay inside f32 (finite keys and queries whose products
/// sum to less than 3e38), or the head's output may be NaN. Keys of -inf have no weight. Runs on the calling thread.
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
    let group = attend.check()?;
    which.check(attend.rows.num_rows())?;
    state.check(group, attend.rows.head_dim())?;
    match attend.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(token) => vector::sparse_decode(token, attend, &which, scratch.vector(), state),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(token) => vector::sparse_decode(token, attend, &which, scratch.vector(), state),
        // On other architectures the tokens cannot be made.
        _ => twin::sparse_decode(attend, &which, scratch, state),
    }
}
