//! The offload manager of one shard: from a selection to slots that can be attended.
//!
//! ```text
//! demand(units)   arrived batches land ─> resident units pinned ─> room made ─> absent ones fetched in one batch, pinned
//! attend          slots()[i] is where units[i] lies, or WARM: read it from the warm tier
//! finish(mass)    policy told, pins handed back
//! prefetch(units) absent ones fetched in one batch, nobody waits
//! ```
//! Whatever cannot be brought in (no slot free, transfer failed) is attended where it lies, so no outcome of a transfer
//! changes a result. Nothing is allocated after warm-up.

use super::{Completion, Link, Move, Ticket};
use crate::page::{Admission, HotTier, IllegalTransition, Pin, PinError, Purpose, SlotEvent, SlotLife, WARM};

/// Batches on their way at most; further prefetches are skipped, since a link that far behind brings them too late.
const FLIGHTS_MAX: usize = 8;

/// What one step asked for and what was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Units that the selection asked for.
    pub requests: usize,
    /// Of these, resident already.
    pub hits: usize,
    /// Units moved because the step needed them.
    pub units: usize,
    /// Bytes moved, units fetched ahead included.
    pub bytes: usize,
    /// Units moved ahead of their use.
    pub ahead: usize,
    /// Units attended where they lie, because no slot was free or the transfer failed.
    pub in_place: usize,
}

impl Fetched {
    /// Adds up.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.hits += other.hits;
        self.units += other.units;
        self.bytes += other.bytes;
        self.ahead += other.ahead;
        self.in_place += other.in_place;
    }
}

/// A fault of the manager's own books.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// A slot was moved on in a way its life-cycle does not have.
    #[error(transparent)]
    Life(#[from] IllegalTransition<SlotLife, SlotEvent>),
    /// A pin did not fit its slot.
    #[error(transparent)]
    Pin(#[from] PinError),
}

#[derive(Debug, Default)]
struct Flight {
    ticket: Option<Ticket>,
    moves: Vec<Move>,
}

/// Residency of one shard.
pub struct Offload {
    tier: HotTier,
    unit_bytes: usize,
    flights: Vec<Flight>,
    /// Of the present step: where each unit lies, and its pin.
    slots: Vec<u32>,
    pins: Vec<Pin>,
    /// Pins of resident units while others are brought ahead.
    kept: Vec<Pin>,
    /// Absent units, as places in the selection.
    absent: Vec<u32>,
    moves: Vec<Move>,
    fetched: Fetched,
}

impl Offload {
    /// Manages `tier`, whose units are `unit_bytes` long.
    #[must_use]
    pub fn new(tier: HotTier, unit_bytes: usize) -> Self {
        let flights = (0..FLIGHTS_MAX).map(|_| Flight::default()).collect();
        Self {
            tier,
            unit_bytes,
            flights,
            slots: Vec::new(),
            pins: Vec::new(),
            kept: Vec::new(),
            absent: Vec::new(),
            moves: Vec::new(),
            fetched: Fetched::default(),
        }
    }

    /// The directory.
    #[must_use]
    pub fn tier(&self) -> &HotTier {
        &self.tier
    }

    /// Slot of each unit of the present step, in the order asked for; [`WARM`] = in none.
    #[must_use]
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// Makes `units` (distinct) resident and pins them. Ends with every unit in a slot or marked [`WARM`].
    ///
    /// # Errors
    /// [`OffloadError`] when the books do not agree, which is a fault of this program.
    pub fn demand(&mut self, units: &[u32], link: &mut dyn Link) -> Result<(), OffloadError> {
        self.tier.begin_step();
        self.fetched.requests += units.len();
        self.slots.clear();
        self.absent.clear();
        self.land(link)?;
        for (i, unit) in units.iter().enumerate() {
            match self.tier.request(*unit) {
                Some(pin) => {
                    self.slots.push(pin.slot());
                    self.pins.push(pin);
                }
                None => {
                    self.slots.push(WARM);
                    self.absent.push(i as u32);
                }
            }
        }
        self.fetched.hits += units.len() - self.absent.len();
        if !self.absent.is_empty() {
            self.fetch_absent(units, link)?;
        }
        self.fetched.in_place += self.slots.iter().filter(|slot| **slot == WARM).count();
        Ok(())
    }

    /// Ends the step: tells the policy what each unit was worth (`mass` in the order of the units, or empty when nobody
    /// weighs them), hands the pins back and returns what was moved since the last step.
    ///
    /// # Errors
    /// [`OffloadError::Pin`] when a pin is refused; the others are handed back all the same.
    pub fn finish(&mut self, mass: &[f32]) -> Result<Fetched, OffloadError> {
        for (i, slot) in self.slots.iter().enumerate().filter(|(_, slot)| **slot != WARM) {
            self.tier.used(*slot, mass.get(i).copied().unwrap_or(0.0));
        }
        let mut refused = None;
        for pin in self.pins.drain(..) {
            if let Err(error) = self.tier.unpin(pin) {
                refused = Some(error);
            }
        }
        let fetched = std::mem::take(&mut self.fetched);
        refused.map_or(Ok(fetched), |error| Err(error.into()))
    }

    /// Starts to bring in what of `units` is absent, ahead of its use; what of it is resident stays. Returns the units
    /// submitted.
    ///
    /// # Errors
    /// [`OffloadError`] when the books do not agree.
    pub fn prefetch(&mut self, units: &[u32], link: &mut dyn Link) -> Result<usize, OffloadError> {
        let Some(free) = self.flights.iter().position(|flight| flight.ticket.is_none()) else { return Ok(0) };
        let absent = units.iter().filter(|unit| !self.tier.is_known(**unit)).count();
        if absent == 0 {
            return Ok(0);
        }
        for unit in units {
            if let Some(slot) = self.tier.peek(*unit) {
                self.kept.push(self.tier.pin(slot));
            }
        }
        self.tier.make_room(absent.min(self.tier.num_slots()));
        let mut moves = std::mem::take(&mut self.flights[free].moves);
        moves.clear();
        for unit in units {
            match self.tier.admit(*unit, Purpose::Ahead) {
                Admission::Slot(slot) => moves.push(Move { unit: *unit, slot }),
                Admission::Present(_) => {}
                Admission::NoRoom => break,
            }
        }
        for pin in self.kept.drain(..) {
            self.tier.unpin(pin)?;
        }
        let submitted = moves.len();
        let ticket = (submitted > 0).then(|| link.submit(&moves));
        self.flights[free] = Flight { ticket, moves };
        self.fetched.ahead += submitted;
        self.fetched.bytes += submitted * self.unit_bytes;
        Ok(submitted)
    }

    /// Drops what is cached of `first..`, after those tokens were cut off. Batches on their way are waited for.
    ///
    /// # Errors
    /// [`OffloadError`] when the books do not agree.
    pub fn truncate(&mut self, first: u32, link: &mut dyn Link) -> Result<(), OffloadError> {
        for i in 0..self.flights.len() {
            self.settle(i, link)?;
        }
        self.tier.truncate(first);
        Ok(())
    }

    /// Empties the tier, pinned units aside.
    pub fn clear(&mut self) {
        self.tier.clear();
    }

    fn fetch_absent(&mut self, units: &[u32], link: &mut dyn Link) -> Result<(), OffloadError> {
        // A unit that is on its way is waited for: fetching it twice would cost more.
        for i in 0..self.flights.len() {
            let moves = &self.flights[i].moves;
            let awaited = self.flights[i].ticket.is_some()
                && moves.iter().any(|m| units.binary_search(&m.unit).is_ok());
            if awaited {
                self.settle(i, link)?;
            }
        }
        self.moves.clear();
        let missing = self.absent.iter().filter(|i| self.tier.peek(units[**i as usize]).is_none()).count();
        // Units that arrived meanwhile are pinned before room is made, or they might be chosen to leave.
        for k in 0..self.absent.len() {
            let i = self.absent[k] as usize;
            if let Some(slot) = self.tier.peek(units[i]) {
                self.slots[i] = slot;
                self.pins.push(self.tier.pin(slot));
            }
        }
        self.tier.make_room(missing.min(self.tier.num_slots()));
        for k in 0..self.absent.len() {
            let i = self.absent[k] as usize;
            if self.slots[i] != WARM {
                continue;
            }
            match self.tier.admit(units[i], Purpose::Demand) {
                Admission::Slot(slot) => self.moves.push(Move { unit: units[i], slot }),
                Admission::Present(_) => {}
                Admission::NoRoom => break,
            }
        }
        if self.moves.is_empty() {
            return Ok(());
        }
        let ticket = link.submit(&self.moves);
        let arrived = link.wait(ticket) == Completion::Done;
        let mut moved = self.moves.iter();
        let mut next = moved.next();
        for k in 0..self.absent.len() {
            let i = self.absent[k] as usize;
            let Some(m) = next.filter(|m| m.unit == units[i]) else { continue };
            next = moved.next();
            if arrived {
                self.tier.arrive(m.slot)?;
                self.slots[i] = m.slot;
                self.pins.push(self.tier.pin(m.slot));
            } else {
                self.tier.fail(m.slot)?;
            }
        }
        if arrived {
            self.fetched.units += self.moves.len();
        }
        self.fetched.bytes += self.moves.len() * self.unit_bytes;
        Ok(())
    }

    /// Takes in the batches that are complete.
    fn land(&mut self, link: &mut dyn Link) -> Result<(), OffloadError> {
        for i in 0..self.flights.len() {
            if let Some(ticket) = self.flights[i].ticket {
                let completion = link.poll(ticket);
                self.complete(i, completion)?;
            }
        }
        Ok(())
    }

    fn settle(&mut self, flight: usize, link: &mut dyn Link) -> Result<(), OffloadError> {
        match self.flights[flight].ticket {
            Some(ticket) => {
                let completion = link.wait(ticket);
                self.complete(flight, completion)
            }
            None => Ok(()),
        }
    }

    fn complete(&mut self, flight: usize, completion: Completion) -> Result<(), OffloadError> {
        if completion == Completion::Pending {
            return Ok(());
        }
        let Flight { ticket, moves } = &mut self.flights[flight];
        *ticket = None;
        for m in moves.drain(..) {
            match completion {
                Completion::Done => self.tier.arrive(m.slot)?,
                Completion::Failed | Completion::Pending => self.tier.fail(m.slot)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::EvictionKind;
    use proptest::prelude::*;

    /// A link that completes, delays or fails batches as its list says, and remembers which unit each slot received.
    #[derive(Default)]
    struct Script {
        outcomes: Vec<u8>,
        next: usize,
        pending: Vec<(Ticket, Vec<Move>, u8)>,
        memory: std::collections::HashMap<u32, u32>,
    }

    impl Script {
        fn finish(&mut self, ticket: Ticket) -> Completion {
            let at = self.pending.iter().position(|(t, _, _)| *t == ticket).unwrap();
            let (_, moves, outcome) = self.pending.remove(at);
            for m in moves {
                self.memory.insert(m.slot, if outcome == 1 { u32::MAX } else { m.unit });
            }
            if outcome == 1 { Completion::Failed } else { Completion::Done }
        }
    }

    impl Link for Script {
        fn submit(&mut self, moves: &[Move]) -> Ticket {
            self.next += 1;
            let outcome = self.outcomes[self.next % self.outcomes.len()];
            self.pending.push((Ticket(self.next as u64), moves.to_vec(), outcome));
            Ticket(self.next as u64)
        }

        fn poll(&mut self, ticket: Ticket) -> Completion {
            let entry = self.pending.iter_mut().find(|(t, _, _)| *t == ticket).unwrap();
            if entry.2 == 2 {
                entry.2 = 0;
                return Completion::Pending;
            }
            self.finish(ticket)
        }

        fn wait(&mut self, ticket: Ticket) -> Completion {
            self.finish(ticket)
        }
    }

    proptest! {
        #[test]
        fn a_slot_that_is_handed_out_holds_its_unit_whatever_the_link_does(
            num_slots in 0usize..12,
            kind in prop::sample::select(EvictionKind::ALL.to_vec()),
            outcomes in prop::collection::vec(0u8..3, 1..20),
            steps in prop::collection::vec(
                (prop::collection::btree_set(0u32..30, 0..10), prop::collection::btree_set(0u32..30, 0..6)), 1..40),
        ) {
            let mut link = Script { outcomes, ..Script::default() };
            let mut offload = Offload::new(HotTier::new(num_slots, kind), 4);
            for (units, ahead) in steps {
                let units: Vec<u32> = units.into_iter().collect();
                let ahead: Vec<u32> = ahead.into_iter().collect();
                offload.demand(&units, &mut link).unwrap();
                prop_assert_eq!(offload.slots().len(), units.len());
                for (unit, slot) in units.iter().zip(offload.slots()) {
                    prop_assert!(*slot == WARM || link.memory[slot] == *unit);
                }
                offload.prefetch(&ahead, &mut link).unwrap();
                for (unit, slot) in units.iter().zip(offload.slots()) {
                    prop_assert!(*slot == WARM || link.memory[slot] == *unit);
                }
                let fetched = offload.finish(&[]).unwrap();
                prop_assert_eq!(fetched.requests, units.len());
                prop_assert!(fetched.hits + fetched.units + fetched.in_place <= units.len());
                prop_assert_eq!(offload.tier().pins_out(), 0);
                prop_assert_eq!(offload.tier().fault(), None);
            }
            offload.truncate(10, &mut link).unwrap();
            prop_assert!((10..30).all(|unit| offload.tier().peek(unit).is_none()));
        }
    }

    #[test]
    fn with_room_for_everything_only_the_first_use_moves_a_unit() {
        let mut link = Script { outcomes: vec![0], ..Script::default() };
        let mut offload = Offload::new(HotTier::new(8, EvictionKind::Mass), 512);
        for (step, moved) in [(0, 3), (1, 0)] {
            offload.demand(&[1, 5, 6], &mut link).unwrap();
            let fetched = offload.finish(&[0.1, 0.2, 0.3]).unwrap();
            assert_eq!(
                (fetched.units, fetched.bytes, fetched.hits),
                (moved, moved * 512, 3 - moved),
                "{step}"
            );
        }
    }
}
