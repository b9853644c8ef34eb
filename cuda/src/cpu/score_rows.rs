//! Scores of a range of rows.

use std::ops::Range;

use super::AttendScratch;
#[cfg(target_arch = "x86_64")]
use super::vector;
use crate::rows::{check_len, check_range};
use crate::{Attend, Isa, KernelError, KvRows, twin};

/// Scores `q.k * scale` (after the softcap, if any) of the rows in `range`, to `out` [group, range.len()].
///
/// # Errors
/// Wrong shapes of `q` or `out`, a range outside the shard, a scale or softcap that is no usable number.
pub fn score_rows<R: KvRows>(
    attend: &Attend<'_, R>,
    range: Range<usize>,
    scratch: &mut AttendScratch,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let group = attend.check()?;
    check_range(&range, attend.rows.num_rows())?;
    check_len("out", out.len(), group * range.len())?;
    match attend.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(token) => vector::score_rows(token, attend, range, scratch.vector(), out),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(token) => vector::score_rows(token, attend, range, scratch.vector(), out),
        // On other architectures the tokens cannot be made.
        _ => twin::score_rows(attend, range, out),
    }
}
