//! Attention over a long range of rows, on all threads of the current rayon pool.

use std::ops::Range;

use rayon::prelude::*;

use super::{AttendScratch, sparse_decode};
use crate::rows::check_range;
use crate::{Attend, KernelError, KvRows, Rows, StateMut, StateRef, merge_states};

/// Fewest rows of a split: below this, starting a job costs as much as the job (1024 rows of d = 128 bf16 are 512 KiB,
/// some 30 us).
const SPLIT_ROWS_MIN: usize = 1024;
/// Most splits of one call: enough to keep 16 threads busy to the end, few enough that merging them costs nothing.
const SPLITS_MAX: usize = 64;

/// Working memory of [`dense_decode`]: one state and one [`AttendScratch`] per split.
#[derive(Debug, Default)]
pub struct SplitScratch {
    splits: Vec<Split>,
}

#[derive(Debug, Default)]
struct Split {
    scratch: AttendScratch,
    out: Vec<f32>,
    lse: Vec<f32>,
}

/// Rows of each split of a range of `len`: a function of `len` alone, so that the result does not depend on the threads.
fn split_rows(len: usize) -> usize {
    len.div_ceil(SPLITS_MAX).next_multiple_of(64).max(SPLIT_ROWS_MIN)
}

/// As [`sparse_decode`](super::sparse_decode()) over `range`, split over tokens. The same bits for any number of threads.
///
/// # Errors
/// As [`sparse_decode`](super::sparse_decode()).
pub fn dense_decode<R: KvRows>(
    attend: &Attend<'_, R>,
    range: Range<usize>,
    scratch: &mut SplitScratch,
    mut state: StateMut<'_>,
) -> Result<(), KernelError> {
    let group = attend.check()?;
    check_range(&range, attend.rows.num_rows())?;
    let d = attend.rows.head_dim();
    state.check(group, d)?;

    let rows_each = split_rows(range.len());
    let num_splits = range.len().div_ceil(rows_each).max(1);
    if scratch.splits.len() < num_splits {
        scratch.splits.resize_with(num_splits, Split::default);
    }
    let splits = &mut scratch.splits[..num_splits];
    if let [only] = splits {
        return sparse_decode(attend, Rows::Range(range), &mut only.scratch, state);
    }
    splits.par_iter_mut().enumerate().with_max_len(1).try_for_each(|(i, split)| {
        let start = range.start + i * rows_each;
        let part = start..(start + rows_each).min(range.end);
        split.out.resize(group * d, 0.0);
        split.lse.resize(group, f32::NEG_INFINITY);
        let state = StateMut { out: &mut split.out, lse: &mut split.lse };
        sparse_decode(attend, Rows::Range(part), &mut split.scratch, state)
    })?;
    state.clear();
    for split in splits.iter() {
        merge_states(state.reborrow(), StateRef { out: &split.out, lse: &split.lse })?;
    }
    Ok(())
}
