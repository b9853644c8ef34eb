//! A world that can be run twice: time that is told rather than read.

mod clock;

pub use clock::{Clock, SimClock, SystemClock};
