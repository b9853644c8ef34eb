//! How well would a hot tier of a given size do? Replays traces, records which units each step asks for, and serves that
//! access string from simulated slots over a simulated link: every eviction policy and way of prefetching, beside the
//! optimum that sees the future.
//!
//! What counts: only retrieved units. Sinks and window are resident in every design, and counting them would flatter all
//! of them. "Slots = 2x" are, for each shard, twice the units that a step retrieves there at most.

mod collect;
mod log;
mod render;
mod simulate;
mod steps;

pub use collect::{Collected, ProfilePlan, collect};
pub use log::{Access, AccessLog, LogError, ShardName};
pub use render::{PROFILE_SCHEMA, Profile, ProfileRow, html, rows, tables};
pub use simulate::{Cell, LayerTime, SimPlan, SimStep, Simulated, overlap, simulate, timed_steps};

/// A profile that cannot be made as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// A field of the plan that is out of range.
    #[error("profile field `{field}` = {value}: {reason}")]
    Plan {
        /// Name of the field.
        field: &'static str,
        /// Value given.
        value: String,
        /// What it has to be.
        reason: String,
    },
    /// Two traces that do not belong to one sequence.
    #[error("{trace}: {field} is {found}, but {expected} in {first}; shards of one sequence agree")]
    Mismatch {
        /// The trace that differs.
        trace: String,
        /// What differs.
        field: &'static str,
        /// Its value there.
        found: String,
        /// Value in the first trace.
        expected: String,
        /// Name of the first trace.
        first: String,
    },
    /// The traces cannot be replayed.
    #[error(transparent)]
    Replay(#[from] crate::replay::ReplayError),
    /// The engine refused a step or a configuration.
    #[error(transparent)]
    Engine(#[from] crate::Error),
    /// The access log cannot be read or written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The books of the simulated tier do not agree: a fault of this program.
    #[error(transparent)]
    Offload(#[from] crate::transfer::OffloadError),
}

impl ProfileError {
    /// Whether the machine is at fault rather than the caller's input.
    #[must_use]
    pub fn is_environment(&self) -> bool {
        match self {
            Self::Replay(error) => error.is_environment(),
            Self::Engine(error) => error.is_environment(),
            Self::Log(error) => error.is_environment(),
            Self::Offload(_) => true,
            Self::Plan { .. } | Self::Mismatch { .. } => false,
        }
    }

    pub(crate) fn plan(field: &'static str, value: impl ToString, reason: impl Into<String>) -> Self {
        Self::Plan { field, value: value.to_string(), reason: reason.into() }
    }
}
