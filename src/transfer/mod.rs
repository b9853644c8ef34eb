//! Movement of units towards the slots that attention reads.
//!
//! [`Offload`] decides: what of a selection is absent, which slots give way, what to bring ahead. A [`Link`] moves: the
//! host copies of the CPU backend complete at once, a simulated link takes the time that its model says.

mod model;
mod offload;

pub use model::{LinkModel, SimLink};
pub use offload::{Fetched, Offload, OffloadError};

/// One unit on its way into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Page or row number in its shard.
    pub unit: u32,
    /// Slot of the shard's hot tier.
    pub slot: u32,
}

/// Names a submitted batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// State of a submitted batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Still moving.
    Pending,
    /// Every unit is in its slot.
    Done,
    /// No unit of the batch may be used.
    Failed,
}

/// Moves batches of units between tiers.
pub trait Link {
    /// Starts to move a batch; the slots belong to the link until the ticket is done or failed.
    fn submit(&mut self, moves: &[Move]) -> Ticket;

    /// Asks after a batch. A ticket is answered with `Done` or `Failed` once and is then forgotten.
    fn poll(&mut self, ticket: Ticket) -> Completion;

    /// Waits for a batch: `Done` or `Failed`.
    fn wait(&mut self, ticket: Ticket) -> Completion;
}
