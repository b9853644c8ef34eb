//! Injected time. Stages never read the machine's clock themselves, so that a simulated step takes the same time on
//! every run and no test sleeps.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A source of time.
pub trait Clock: Send + Sync {
    /// Nanoseconds since some fixed moment; never decreases.
    fn now_ns(&self) -> u64;
}

/// The machine's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// Starts at 0 now.
    #[must_use]
    pub fn start() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

/// Time that passes only when told to.
#[derive(Debug, Default)]
pub struct SimClock {
    now_ns: AtomicU64,
}

impl SimClock {
    /// Lets `ns` pass.
    pub fn advance(&self, ns: u64) {
        self.now_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for SimClock {
    fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simulated_time_stands_still_until_told() {
        let clock = SimClock::default();
        assert_eq!(clock.now_ns(), clock.now_ns());
        clock.advance(7);
        assert_eq!(clock.now_ns(), 7);
        let system = SystemClock::start();
        assert!(system.now_ns() <= system.now_ns());
    }
}
