//! Twin of [`sparse_decode`](crate::sparse_decode): two passes, first the scores and their maximum, then the weighted sum.

use super::score_rows::{clamp_score, score_f64};
use crate::rows::key_value;
use crate::{Attend, AttendScratch, KernelError, KvElem, KvRows, Rows, StateMut};

/// As [`sparse_decode`](crate::sparse_decode), with scores rounded to f32 and everything summed in f64.
///
/// # Errors
/// The same.
pub fn sparse_decode<R: KvRows>(
    attend: &Attend<'_, R>,
    which: &Rows<'_>,
    scratch: &mut AttendScratch,
    mut state: StateMut<'_>,
) -> Result<(), KernelError> {
    let group = attend.check()?;
    let d = attend.rows.head_dim();
    which.check(attend.rows.num_rows())?;
    state.check(group, d)?;
    state.clear();
    let (scores, sums) = scratch.twin_buffers(which.len(), d);
    for h in 0..group {
        let q = &attend.q[h * d..(h + 1) * d];
        let mut max = f32::NEG_INFINITY;
        for (i, score) in scores.iter_mut().enumerate() {
            let (key, _) = key_value(attend.rows, which.at(i))?;
            *score = clamp_score(score_f64(q, key, &attend.params) as f32);
            max = max.max(*score);
        }
        if max == f32::NEG_INFINITY {
            continue;
        }
        sums.fill(0.0);
        let mut weights = 0.0f64;
        for (i, score) in scores.iter().enumerate() {
            let (_, value) = key_value(attend.rows, which.at(i))?;
            let weight = (f64::from(*score) - f64::from(max)).exp();
            weights += weight;
            for (sum, v) in sums.iter_mut().zip(value) {
                *sum += weight * f64::from(v.to_f32());
            }
        }
        for (o, sum) in state.out[h * d..(h + 1) * d].iter_mut().zip(sums.iter()) {
            *o = (sum / weights) as f32;
        }
        state.lse[h] = (f64::from(max) + weights.ln()) as f32;
    }
    Ok(())
}
