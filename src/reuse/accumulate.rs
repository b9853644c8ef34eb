//! Arithmetic on states, head by head.

use floe_cuda::{StateMut, StateRef, merge_states};

use crate::error::Result;
use crate::state::StateBuf;

/// Merges head `head` of `from` into the same head of `into`.
pub(super) fn merge_head(into: &mut StateBuf, from: &StateBuf, head: usize) -> Result<()> {
    let dim = into.out.len() / into.lse.len();
    let span = head * dim..(head + 1) * dim;
    let into = StateMut { out: &mut into.out[span.clone()], lse: &mut into.lse[head..head + 1] };
    Ok(merge_states(into, StateRef { out: &from.out[span], lse: &from.lse[head..head + 1] })?)
}

/// `|a - b|` over `[head_dim]`.
pub(super) fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt()
}

/// `|a|` over `[head_dim]`.
pub(super) fn norm(a: &[f32]) -> f32 {
    a.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// Element `head` of `[group, head_dim]`.
pub(super) fn of_head(out: &[f32], head: usize, dim: usize) -> &[f32] {
    &out[head * dim..(head + 1) * dim]
}
