//! Decode reuse: may the state of an earlier step answer for the front of the context?
//!
//! The trait and the policy that never reuses. Match-amend caches implement the same trait.

use crate::ids::TokenPos;
use crate::state::StateBuf;

/// An earlier attention state that a step may take over.
#[derive(Clone, Copy, Debug)]
pub struct Reused<'a> {
    /// The state covers positions `0..covered` exactly once each; the step attends `covered..` afresh.
    pub covered: TokenPos,
    /// State of the group over those positions.
    pub state: &'a StateBuf,
}

/// A cache of earlier attention states of one shard. Lineage depth is 1: `commit` is called only after steps that did
/// not reuse, so a state never stands on another reused one.
pub trait ReuseCache: Send + Sync {
    /// A usable earlier state for the query at `position`, or `None` (no match is a value, not an error).
    /// `q_pre` is the group's pre-RoPE query, `[group, head_dim]`, host memory.
    fn probe(&self, q_pre: &[f32], position: TokenPos) -> Option<Reused<'_>>;

    /// Offers the state of a step that did not reuse. `state` covers `0..=position`.
    fn commit(&mut self, q_pre: &[f32], position: TokenPos, state: &StateBuf);

    /// Forgets everything that saw a position at or after `num_tokens`.
    fn truncate(&mut self, num_tokens: TokenPos);
}

/// Never matches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Off;

impl ReuseCache for Off {
    fn probe(&self, _q_pre: &[f32], _position: TokenPos) -> Option<Reused<'_>> {
        None
    }

    fn commit(&mut self, _q_pre: &[f32], _position: TokenPos, _state: &StateBuf) {}

    fn truncate(&mut self, _num_tokens: TokenPos) {}
}
