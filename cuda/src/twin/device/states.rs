//! Twin of the device kernel `merge_states`.

use crate::rows::check_len;
use crate::twin::StateF64;
use crate::{KernelError, StateRef};

/// The state of the tokens of all `parts` [heads, head_dim], `[heads]`.
///
/// # Errors
/// No part, or parts of different shape.
pub fn merge_parts(parts: &[StateRef<'_>]) -> Result<StateF64, KernelError> {
    let Some(first) = parts.first() else {
        return Err(KernelError::Length { field: "parts", len: 0, expected: 1 });
    };
    for part in parts {
        check_len("part.out", part.out.len(), first.out.len())?;
        check_len("part.lse", part.lse.len(), first.lse.len())?;
    }
    let heads = first.lse.len();
    let d = first.out.len().checked_div(heads).unwrap_or(0);
    check_len("part.out", first.out.len(), heads * d)?;
    let mut state = StateF64 { out: vec![0.0; heads * d], lse: vec![f64::NEG_INFINITY; heads] };
    for head in 0..heads {
        let lse = |part: &StateRef<'_>| f64::from(part.lse[head]);
        let max = parts.iter().map(lse).fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = parts.iter().map(|part| (lse(part) - max).exp()).sum();
        for part in parts {
            let weight = (lse(part) - max).exp() / sum;
            let out = &mut state.out[head * d..(head + 1) * d];
            for (o, x) in out.iter_mut().zip(&part.out[head * d..(head + 1) * d]) {
                *o += weight * f64::from(*x);
            }
        }
        state.lse[head] = max + sum.ln();
    }
    Ok(state)
}
