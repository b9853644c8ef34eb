//! A link that exists on paper: bandwidth, cost of a batch, one batch after the other, on simulated time.

use super::{Completion, Link, Move, Ticket};

/// What a link can do, and how much work there is to hide behind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkModel {
    /// Bytes a nanosecond, which is GB/s.
    pub gb_per_s: f64,
    /// Fixed cost of one batch, microseconds.
    pub batch_latency_us: f64,
    /// Time that one layer computes whatever is fetched, microseconds.
    pub layer_us: f64,
    /// Share of `layer_us` in which a fetch that the step waits for may run: 0 = none of it is hidden, 1 = all.
    pub overlap: f64,
}

/// Measured speed of one kernel that gathers items over PCIe 5.0 x16 from mapped host memory (DESIGN 7.1): item bytes and
/// GB/s.
const GATHER_GB_PER_S: [(f64, f64); 4] = [(256.0, 15.8), (512.0, 28.5), (1024.0, 49.2), (2048.0, 50.7)];

impl LinkModel {
    /// The defaults for units of `unit_bytes`: the measured gather speed at that size (between two measured sizes in
    /// proportion, below the smallest proportional to the size), one kernel launch a batch, and 60 us of other work a layer
    /// without overlap: what the step asks for is known only when it is needed.
    #[must_use]
    pub fn pcie5(unit_bytes: usize) -> Self {
        let size = unit_bytes as f64;
        let above = GATHER_GB_PER_S.iter().position(|(bytes, _)| size <= *bytes);
        let gb_per_s = match above {
            None => GATHER_GB_PER_S[3].1,
            Some(0) => GATHER_GB_PER_S[0].1 * size / GATHER_GB_PER_S[0].0,
            Some(i) => {
                let ((b0, s0), (b1, s1)) = (GATHER_GB_PER_S[i - 1], GATHER_GB_PER_S[i]);
                s0 + (s1 - s0) * (size - b0) / (b1 - b0)
            }
        };
        Self { gb_per_s, batch_latency_us: 4.5, layer_us: 60.0, overlap: 0.0 }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// Name and value of the first field that is out of range.
    pub fn validate(&self) -> Result<(), (&'static str, f64)> {
        let checks = [
            ("gb_per_s", self.gb_per_s, self.gb_per_s > 0.0),
            ("batch_latency_us", self.batch_latency_us, self.batch_latency_us >= 0.0),
            ("layer_us", self.layer_us, self.layer_us >= 0.0),
            ("overlap", self.overlap, (0.0..=1.0).contains(&self.overlap)),
        ];
        match checks.iter().find(|(_, value, ok)| !ok || !value.is_finite()) {
            Some((field, value, _)) => Err((field, *value)),
            None => Ok(()),
        }
    }
}

/// One link shared by all shards of a sequence, on simulated time. Batches run one after the other; batches submitted at
/// the same moment share one batch cost, as one gather kernel serves all heads of a layer.
#[derive(Clone, Debug)]
pub struct SimLink {
    model: LinkModel,
    unit_bytes: usize,
    now_us: f64,
    free_at_us: f64,
    /// Moment of the last submission.
    batch_at_us: f64,
    /// Arrival of each batch not yet answered for.
    flights: Vec<(Ticket, f64)>,
    next: u64,
    /// Latest arrival that a caller waited for.
    awaited_us: f64,
    busy_us: f64,
}

impl SimLink {
    /// An idle link at time 0.
    #[must_use]
    pub fn new(model: LinkModel, unit_bytes: usize) -> Self {
        Self {
            model,
            unit_bytes,
            now_us: 0.0,
            free_at_us: 0.0,
            batch_at_us: f64::NEG_INFINITY,
            flights: Vec::new(),
            next: 0,
            awaited_us: 0.0,
            busy_us: 0.0,
        }
    }

    /// Simulated time, microseconds.
    #[must_use]
    pub fn now_us(&self) -> f64 {
        self.now_us
    }

    /// Moment at which the link has done what was submitted so far, microseconds.
    #[must_use]
    pub fn free_at_us(&self) -> f64 {
        self.free_at_us
    }

    /// Simulated time in which the link moved data.
    #[must_use]
    pub fn busy_us(&self) -> f64 {
        self.busy_us
    }

    /// Ends a layer: time passes by what was waited for beyond the overlap (returned, the stall) and by the layer's own
    /// work.
    pub fn end_layer(&mut self) -> f64 {
        let hidden = self.model.overlap * self.model.layer_us;
        let stall = (self.awaited_us - self.now_us - hidden).max(0.0);
        self.now_us += stall + self.model.layer_us;
        self.awaited_us = self.now_us;
        stall
    }

    fn take(&mut self, ticket: Ticket) -> Option<f64> {
        let at = self.flights.iter().position(|(t, _)| *t == ticket)?;
        Some(self.flights.swap_remove(at).1)
    }
}

impl Link for SimLink {
    fn submit(&mut self, moves: &[Move]) -> Ticket {
        let together = self.batch_at_us == self.now_us;
        let latency = if together { 0.0 } else { self.model.batch_latency_us };
        self.batch_at_us = self.now_us;
        let duration = latency + (moves.len() * self.unit_bytes) as f64 / (self.model.gb_per_s * 1e3);
        self.free_at_us = self.free_at_us.max(self.now_us) + duration;
        self.busy_us += duration;
        self.next += 1;
        self.flights.push((Ticket(self.next), self.free_at_us));
        Ticket(self.next)
    }

    fn poll(&mut self, ticket: Ticket) -> Completion {
        match self.flights.iter().find(|(t, _)| *t == ticket) {
            Some((_, arrival)) if *arrival > self.now_us => Completion::Pending,
            Some(_) | None => self.take(ticket).map_or(Completion::Failed, |_| Completion::Done),
        }
    }

    fn wait(&mut self, ticket: Ticket) -> Completion {
        match self.take(ticket) {
            Some(arrival) => {
                self.awaited_us = self.awaited_us.max(arrival);
                Completion::Done
            }
            None => Completion::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: LinkModel = LinkModel { gb_per_s: 1.0, batch_latency_us: 5.0, layer_us: 20.0, overlap: 0.0 };

    fn moves(n: u32) -> Vec<Move> {
        (0..n).map(|i| Move { unit: i, slot: i }).collect()
    }

    #[test]
    fn a_step_stalls_for_latency_and_bytes_of_what_it_waits_for() {
        let mut link = SimLink::new(MODEL, 1000);
        let a = link.submit(&moves(2));
        let b = link.submit(&moves(3));
        assert_eq!(link.poll(a), Completion::Pending);
        assert_eq!((link.wait(a), link.wait(b)), (Completion::Done, Completion::Done));
        assert_eq!(link.end_layer(), 10.0);
        assert_eq!((link.now_us(), link.end_layer()), (30.0, 0.0));
    }

    #[test]
    fn what_is_fetched_ahead_hides_behind_the_layer() {
        let mut link = SimLink::new(MODEL, 1000);
        let ahead = link.submit(&moves(10));
        assert_eq!(link.end_layer(), 0.0);
        assert_eq!(link.poll(ahead), Completion::Done);
        let late = link.submit(&moves(30));
        link.end_layer();
        assert_eq!(link.poll(late), Completion::Pending);
        link.wait(late);
        assert_eq!(link.end_layer(), 15.0);
        let mut link = SimLink::new(LinkModel { overlap: 0.5, ..MODEL }, 1000);
        let ticket = link.submit(&moves(10));
        link.wait(ticket);
        assert_eq!(link.end_layer(), 5.0);
    }

    #[test]
    fn defaults_are_the_measured_gather_speeds() {
        let speed = |bytes| LinkModel::pcie5(bytes).gb_per_s;
        assert_eq!((speed(256), speed(512), speed(8192), speed(128)), (15.8, 28.5, 50.7, 7.9));
        assert!(speed(384) > 15.8 && speed(384) < 28.5);
        assert!(LinkModel::pcie5(512).validate().is_ok());
        assert_eq!(LinkModel { overlap: 1.5, ..MODEL }.validate(), Err(("overlap", 1.5)));
    }
}
