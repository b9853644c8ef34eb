//! Checks of everything a caller hands in, before anything changes.

use std::collections::HashSet;

use crate::error::{Field, IndexError};
use crate::index::{Batch, KeyId, Query, SearchParams};

/// Tokens that slot numbers can address: 31 bits, one of which marks young tokens in the id map.
pub(crate) const MAX_TOKENS: usize = 1 << 30;

fn shape(field: Field, expected: usize, got: usize) -> Result<(), IndexError> {
    if expected == got { Ok(()) } else { Err(IndexError::Shape { field, expected, got }) }
}

fn finite(field: Field, rows: &[f32], dim: usize, ids: Option<&[KeyId]>) -> Result<(), IndexError> {
    // A sum over x * 0 is NaN exactly if some x is not finite: one branch for the whole slice in the good case.
    if rows.iter().map(|x| x * 0.0).sum::<f32>() == 0.0 {
        return Ok(());
    }
    match rows.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(IndexError::NonFinite {
            field,
            row: at / dim,
            id: ids.map(|ids| ids[at / dim]),
            position: at % dim,
            value: rows[at],
        }),
    }
}

/// Shapes, finite values, no id twice; `held` says whether the index already has an id.
pub(crate) fn batch(
    batch: &Batch<'_>,
    dim: usize,
    len: usize,
    held: impl Fn(KeyId) -> bool,
) -> Result<(), IndexError> {
    let n = batch.ids.len();
    shape(Field::Keys, n * dim, batch.keys.len())?;
    shape(Field::Values, n * dim, batch.values.len())?;
    if len + n > MAX_TOKENS {
        return Err(IndexError::OverLimit { len: len + n, limit: MAX_TOKENS });
    }
    finite(Field::Keys, batch.keys, dim, Some(batch.ids))?;
    finite(Field::Values, batch.values, dim, Some(batch.ids))?;
    let increasing = batch.ids.windows(2).all(|w| w[0] < w[1]);
    let mut seen = HashSet::new();
    for &id in batch.ids {
        if held(id) || (!increasing && !seen.insert(id)) {
            return Err(IndexError::DuplicateId { id });
        }
    }
    Ok(())
}

/// Shape, scale and values of a query.
pub(crate) fn query(query: &Query<'_>, dim: usize) -> Result<(), IndexError> {
    if query.group == 0 {
        return Err(IndexError::Config { field: "group", value: 0.0, expected: "at least 1" });
    }
    shape(Field::Query, query.group * dim, query.q.len())?;
    if !query.scale.is_finite() || query.scale <= 0.0 {
        let value = f64::from(query.scale);
        return Err(IndexError::Config { field: "scale", value, expected: "finite and above 0" });
    }
    finite(Field::Query, query.q, dim, None)?;
    if query.attended_lse.is_empty() {
        return Ok(());
    }
    shape(Field::AttendedLse, query.group, query.attended_lse.len())?;
    // -inf is the mass of no tokens.
    match query.attended_lse.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
        None => Ok(()),
        Some(row) => {
            let value = query.attended_lse[row];
            Err(IndexError::NonFinite { field: Field::AttendedLse, row, id: None, position: 0, value })
        }
    }
}

/// Ranges of the effort knobs.
pub(crate) fn params(params: &SearchParams) -> Result<(), IndexError> {
    let refuse =
        |field, value: f32, expected| Err(IndexError::Config { field, value: f64::from(value), expected });
    if !(params.open_fraction > 0.0 && params.open_fraction <= 1.0) {
        return refuse("open_fraction", params.open_fraction, "in (0, 1]");
    }
    for (field, value) in [("open_mass", params.open_mass), ("detail", params.detail)] {
        if !(value >= 0.0 && value.is_finite()) {
            return refuse(field, value, "at least 0 and finite");
        }
    }
    Ok(())
}

/// Order of the excluded ids.
pub(crate) fn exclude(ids: &[KeyId]) -> Result<(), IndexError> {
    match ids.windows(2).position(|w| w[0] >= w[1]) {
        None => Ok(()),
        Some(at) => Err(IndexError::UnsortedExclude { position: at + 1 }),
    }
}

/// Lengths of the tail's output.
pub(crate) fn tail_out(out: &[f32], lse: &[f32], group: usize, dim: usize) -> Result<(), IndexError> {
    shape(Field::Out, group * dim, out.len())?;
    shape(Field::Lse, group, lse.len())
}
