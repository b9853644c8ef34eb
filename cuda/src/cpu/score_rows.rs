//! Scores of a range of rows.

use std::ops::Range;

use super::AttendScratch;
use crate::{Attend, KernelError, KvRows, twin};

/// Scores `q.k * scale` (after the softcap, if any) of the rows in `range`, to `out` [group, range.len()].
///
/// # Errors
/// Wrong shapes of `q` or `out`, a range outside the shard, a scale or softcap that is no usable number.
pub fn score_rows<R: KvRows>(
    attend: &Attend<'_, R>,
    range: Range<usize>,
    _scratch: &mut AttendScratch,
    out: &mut [f32],
) -> Result<(), KernelError> {
    twin::score_rows(attend, range, out)
}
