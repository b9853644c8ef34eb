//! A world that can be run twice: time that is told rather than read.

mod clock;
mod store;

pub use clock::{Clock, SimClock, SystemClock};
pub use store::{Faults, SimStore};
