//! Attention over part of the tokens, and how two parts become one.

use crate::KernelError;
use crate::rows::check_len;

/// A state to be written. Both in host memory, owned by the caller.
#[derive(Debug)]
pub struct StateMut<'a> {
    /// Weighted mean of the values, f32 [group, head_dim].
    pub out: &'a mut [f32],
    /// Log of the sum of the exponentiated scores, f32 `[group]`, natural; empty = -inf with a zero `out`.
    pub lse: &'a mut [f32],
}

/// A state to be read.
#[derive(Debug, Clone, Copy)]
pub struct StateRef<'a> {
    /// As in [`StateMut`].
    pub out: &'a [f32],
    /// As in [`StateMut`].
    pub lse: &'a [f32],
}

impl StateMut<'_> {
    /// The same state under a shorter borrow.
    pub fn reborrow(&mut self) -> StateMut<'_> {
        StateMut { out: self.out, lse: self.lse }
    }

    /// Reads it.
    pub fn as_ref(&self) -> StateRef<'_> {
        StateRef { out: self.out, lse: self.lse }
    }

    /// Makes it the state of no tokens.
    pub fn clear(&mut self) {
        self.out.fill(0.0);
        self.lse.fill(f32::NEG_INFINITY);
    }

    /// Refuses buffers of another shape than [group, head_dim] and `[group]`.
    pub(crate) fn check(&self, group: usize, head_dim: usize) -> Result<(), KernelError> {
        check_len("out", self.out.len(), group * head_dim)?;
        check_len("lse", self.lse.len(), group)
    }
}

/// `into` becomes the state of its tokens and those of `other`, which must be disjoint.
///
/// Commutative; associative up to rounding; the empty state `(0, -inf)` is the identity, bit for bit. Per head:
/// `lse = ln(e^a + e^b)`, `out = out_a e^(a - lse) + out_b e^(b - lse)`.
///
/// # Errors
/// States of different shape, or a number of elements that is no whole number of heads.
pub fn merge_states(into: StateMut<'_>, other: StateRef<'_>) -> Result<(), KernelError> {
    check_len("other.lse", other.lse.len(), into.lse.len())?;
    check_len("other.out", other.out.len(), into.out.len())?;
    let group = into.lse.len();
    if group == 0 {
        return check_len("into.out", into.out.len(), 0);
    }
    let head_dim = into.out.len() / group;
    check_len("into.out", into.out.len(), group * head_dim)?;
    for h in 0..group {
        let span = h * head_dim..(h + 1) * head_dim;
        let (a, b) = (into.lse[h], other.lse[h]);
        if b == f32::NEG_INFINITY {
            continue;
        }
        if a == f32::NEG_INFINITY {
            into.lse[h] = b;
            into.out[span.clone()].copy_from_slice(&other.out[span]);
            continue;
        }
        // The larger weight is e^0 = 1: the sum lies in [1, 2], so neither the logarithm nor the division can overflow.
        let max = a.max(b);
        let (wa, wb) = ((a - max).exp(), (b - max).exp());
        let sum = wa + wb;
        into.lse[h] = max + sum.ln();
        let (wa, wb) = (wa / sum, wb / sum);
        for (x, y) in into.out[span.clone()].iter_mut().zip(&other.out[span]) {
            *x = *x * wa + y * wb;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADS: usize = 3;
    const DIM: usize = 5;

    /// States as attention makes them: every head is either empty with a zero `out`, or finite.
    fn state() -> impl Strategy<Value = (Vec<f32>, Vec<f32>)> {
        let lse = prop_oneof![1 => Just(f32::NEG_INFINITY), 3 => -50f32..50.0, 1 => -3e38f32..3e38];
        (prop::collection::vec(-8f32..8.0, HEADS * DIM), prop::collection::vec(lse, HEADS)).prop_map(
            |(mut out, lse)| {
                for (h, _) in lse.iter().enumerate().filter(|(_, lse)| **lse == f32::NEG_INFINITY) {
                    out[h * DIM..(h + 1) * DIM].fill(0.0);
                }
                (out, lse)
            },
        )
    }

    fn merged(a: &(Vec<f32>, Vec<f32>), b: &(Vec<f32>, Vec<f32>)) -> (Vec<f32>, Vec<f32>) {
        let (mut out, mut lse) = a.clone();
        merge_states(StateMut { out: &mut out, lse: &mut lse }, StateRef { out: &b.0, lse: &b.1 }).unwrap();
        (out, lse)
    }

    fn assert_close(a: &(Vec<f32>, Vec<f32>), b: &(Vec<f32>, Vec<f32>)) {
        // Three roundings of values below 8 and of weights that carry the rounding of lse (below 50 where it matters).
        for (x, y) in a.0.iter().zip(&b.0) {
            assert!((x - y).abs() <= 64.0 * 8.0 * f32::EPSILON, "{x} is not {y}");
        }
        for (x, y) in a.1.iter().zip(&b.1) {
            assert!(x == y || (x - y).abs() <= 4.0 * f32::EPSILON * x.abs().max(1.0), "lse {x} is not {y}");
        }
    }

    proptest! {
        #[test]
        fn merge_with_empty_state_is_identity(a in state()) {
            let empty = (vec![0.0; HEADS * DIM], vec![f32::NEG_INFINITY; HEADS]);
            prop_assert_eq!(&merged(&a, &empty), &a);
            prop_assert_eq!(&merged(&empty, &a), &a);
        }

        #[test]
        fn merge_is_commutative(a in state(), b in state()) {
            assert_close(&merged(&a, &b), &merged(&b, &a));
        }

        #[test]
        fn merge_is_associative(a in state(), b in state(), c in state()) {
            assert_close(&merged(&merged(&a, &b), &c), &merged(&a, &merged(&b, &c)));
        }
    }

    #[test]
    fn merge_of_other_shape_is_an_error() {
        let (mut out, mut lse) = (vec![0.0; 6], vec![0.0; 2]);
        let error = merge_states(
            StateMut { out: &mut out, lse: &mut lse },
            StateRef { out: &[0.0; 6], lse: &[0.0; 3] },
        );
        assert_eq!(error, Err(KernelError::Length { field: "other.lse", len: 3, expected: 2 }));
    }
}
