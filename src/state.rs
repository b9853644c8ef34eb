//! Attention state of one group: the owned form of [`floe_cuda::StateMut`]. lse is f32, natural log; empty = (0, -inf).

use floe_cuda::{StateMut, StateRef, merge_states};

use crate::error::Result;

/// `(out, lse)` of one group of query heads over some set of tokens. Merging states of disjoint sets is associative and
/// commutative; the empty state is the identity.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateBuf {
    /// Softmax-weighted mean of the values, `[group, head_dim]`.
    pub out: Vec<f32>,
    /// Log of the sum of `exp(logit)`, `[group]`.
    pub lse: Vec<f32>,
}

impl StateBuf {
    /// Becomes the empty state of `group` heads of `head_dim`; keeps its memory.
    pub fn reset(&mut self, group: usize, head_dim: usize) {
        self.out.clear();
        self.out.resize(group * head_dim, 0.0);
        self.lse.clear();
        self.lse.resize(group, f32::NEG_INFINITY);
    }

    /// Where a kernel writes.
    pub fn as_mut(&mut self) -> StateMut<'_> {
        StateMut { out: &mut self.out, lse: &mut self.lse }
    }

    /// What a merge reads.
    #[must_use]
    pub fn as_ref(&self) -> StateRef<'_> {
        StateRef { out: &self.out, lse: &self.lse }
    }

    /// Becomes the state of both token sets, which must be disjoint.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        Ok(merge_states(self.as_mut(), other.as_ref())?)
    }
}
