//! The frame in which an index stores keys and values: shifted by a centre, then rotated.
//!
//! The centre is the mean of the first tokens; it takes away the large constant part of real keys, which eight-bit codes
//! would otherwise spend their range on. A constant shift of all keys adds `q.centre` to every logit of a head, so it never
//! changes a ranking; it is added back to the tail's lse, and the value centre to the tail's output.

use crate::error::IndexError;
use crate::snapshot::{Reader, Writer};

/// Shift of one shard.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Frame {
    dim: usize,
    /// `[dim]`; empty until the first tokens arrive.
    pub key_centre: Vec<f32>,
    /// `[dim]`; empty until the first tokens arrive.
    pub value_centre: Vec<f32>,
}

fn mean_of(rows: &[f32], dim: usize) -> Vec<f32> {
    let mut sum = vec![0.0f64; dim];
    for row in rows.chunks_exact(dim) {
        for (s, &x) in sum.iter_mut().zip(row) {
            *s += f64::from(x);
        }
    }
    let n = (rows.len() / dim).max(1) as f64;
    sum.iter().map(|s| (s / n) as f32).collect()
}

impl Frame {
    pub fn new(dim: usize) -> Self {
        Self { dim, ..Self::default() }
    }

    /// Fixes the centre from the first tokens; later calls change nothing.
    pub fn settle(&mut self, keys: &[f32], values: &[f32]) {
        if self.key_centre.is_empty() && !keys.is_empty() {
            self.key_centre = mean_of(keys, self.dim);
            self.value_centre = mean_of(values, self.dim);
        }
    }

    /// Appends the centre.
    pub fn write_to(&self, to: &mut Writer) {
        to.len(self.key_centre.len());
        to.f32s(&self.key_centre);
        to.f32s(&self.value_centre);
    }

    /// What `write_to` appended.
    pub fn read_from(dim: usize, from: &mut Reader<'_>) -> Result<Self, IndexError> {
        let len = from.len()?;
        from.check(len == 0 || len == dim, "length of the centre")?;
        Ok(Self { dim, key_centre: from.f32s(len)?, value_centre: from.f32s(len)? })
    }

    /// Keys `[n, dim]` into the frame.
    pub fn key_in(&self, rows: &[f32], out: &mut [f32]) {
        shift_in(rows, &self.key_centre, out);
    }

    /// Values `[n, dim]` into the frame.
    pub fn value_in(&self, rows: &[f32], out: &mut [f32]) {
        shift_in(rows, &self.value_centre, out);
    }

    /// Queries `[group, dim]` into the frame: rotated only.
    pub fn query_in(&self, rows: &[f32], out: &mut [f32]) {
        out.copy_from_slice(rows);
    }

    /// What the shift of the keys adds to every logit of a head, before the softmax scale.
    pub fn bias(&self, q: &[f32]) -> f32 {
        let sum: f64 = q.iter().zip(&self.key_centre).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        sum as f32
    }

    /// Turns mean values `[group, dim]` in the frame back into the caller's.
    pub fn value_out(&self, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.dim) {
            for (x, &c) in row.iter_mut().zip(&self.value_centre) {
                *x += c;
            }
        }
    }
}

fn shift_in(rows: &[f32], centre: &[f32], out: &mut [f32]) {
    // No token has set the centre yet: then there are no rows either.
    let dim = centre.len().max(1);
    for (row, out) in rows.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        for ((o, &x), &c) in out.iter_mut().zip(row).zip(centre) {
            *o = x - c;
        }
    }
}
