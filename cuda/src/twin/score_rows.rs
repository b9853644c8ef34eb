//! Twin of [`score_rows`](crate::score_rows).

use std::ops::Range;

use crate::rows::{check_len, check_range, key_value};
use crate::{Attend, AttendParams, KernelError, KvElem, KvRows};

/// One score in f64: `q.k * scale`, then the softcap.
pub(crate) fn score_f64<E: KvElem>(q: &[f32], key: &[E], params: &AttendParams) -> f64 {
    let dot: f64 = q.iter().zip(key).map(|(&q, k)| f64::from(q) * f64::from(k.to_f32())).sum();
    let scaled = dot * f64::from(params.scale);
    match params.softcap {
        Some(cap) => f64::from(cap) * (scaled / f64::from(cap)).tanh(),
        None => scaled,
    }
}

/// As [`score_rows`](crate::score_rows), summed in f64.
///
/// # Errors
/// The same.
pub fn score_rows<R: KvRows>(
    attend: &Attend<'_, R>,
    range: Range<usize>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let group = attend.check()?;
    check_range(&range, attend.rows.num_rows())?;
    let (d, n) = (attend.rows.head_dim(), range.len());
    check_len("out", out.len(), group * n)?;
    for (i, row) in range.enumerate() {
        let (key, _) = key_value(attend.rows, row)?;
        for h in 0..group {
            let score = score_f64(&attend.q[h * d..(h + 1) * d], key, &attend.params);
            out[h * n + i] = clamp_score(score as f32);
        }
    }
    Ok(())
}

/// A score too large for f32 is the largest f32, so that the softmax never meets `inf - inf`. NaN and -inf stay.
pub(crate) fn clamp_score(score: f32) -> f32 {
    if score > f32::MAX { f32::MAX } else { score }
}
