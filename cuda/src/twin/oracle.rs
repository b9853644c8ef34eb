//! Attention in f64: what every other path is compared with.

use super::score_rows::score_f64;
use crate::rows::key_value;
use crate::{Attend, KernelError, KvElem, KvRows, Rows};

/// A state in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct StateF64 {
    /// [group, head_dim].
    pub out: Vec<f64>,
    /// `[group]`, natural log, empty = -inf.
    pub lse: Vec<f64>,
}

/// Attention over some rows with every number in f64; allocates, and takes as long as it takes. `attend.isa` is not read.
///
/// # Errors
/// As [`sparse_decode`](crate::sparse_decode).
pub fn attend_f64<R: KvRows>(attend: &Attend<'_, R>, which: &Rows<'_>) -> Result<StateF64, KernelError> {
    let group = attend.check()?;
    which.check(attend.rows.num_rows())?;
    let d = attend.rows.head_dim();
    let mut state = StateF64 { out: vec![0.0; group * d], lse: vec![f64::NEG_INFINITY; group] };
    for h in 0..group {
        let q = &attend.q[h * d..(h + 1) * d];
        let mut scores = Vec::with_capacity(which.len());
        for i in 0..which.len() {
            let (key, _) = key_value(attend.rows, which.at(i))?;
            scores.push(score_f64(q, key, &attend.params));
        }
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            continue;
        }
        let out = &mut state.out[h * d..(h + 1) * d];
        let mut sum = 0.0;
        for (i, score) in scores.iter().enumerate() {
            let (_, value) = key_value(attend.rows, which.at(i))?;
            let weight = (score - max).exp();
            sum += weight;
            for (o, v) in out.iter_mut().zip(value) {
                *o += weight * f64::from(v.to_f32());
            }
        }
        out.iter_mut().for_each(|o| *o /= sum);
        state.lse[h] = max + sum.ln();
    }
    Ok(state)
}
