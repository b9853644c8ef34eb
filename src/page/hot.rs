//! The hot tier of one shard: which unit lies in which of a fixed number of slots. It moves no data; whoever owns the
//! slots' memory does, between [`HotTier::admit`] and [`HotTier::arrive`].
//!
//! One directory per shard rather than one for all: shards step in parallel without a lock, and the victims of a step do
//! not depend on the order in which threads happen to run (invariant 7).

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::life::{SlotEvent, SlotLife};
use crate::policy::{Eviction, EvictionKind, Use};

/// What one slot holds: the unit of residency and transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Unit {
    /// 16 tokens of consecutive positions.
    Page,
    /// One token's K and V. Selection picks tokens, and pages of position hold few of them each.
    #[default]
    Row,
}

impl Unit {
    /// Tokens of one unit.
    #[must_use]
    pub const fn tokens(self) -> usize {
        match self {
            Self::Page => crate::shape::PAGE_TOKENS,
            Self::Row => 1,
        }
    }

    /// Name in configurations, logs and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Page => "page",
            Self::Row => "row",
        }
    }
}

impl std::str::FromStr for Unit {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Page, Self::Row]
            .into_iter()
            .find(|unit| unit.name() == name)
            .ok_or_else(|| format!("unit `{name}`: known are page, row"))
    }
}

/// Receipt for residency: while it is out, its slot is not evicted. It has to be handed back to
/// [`HotTier::unpin`]; one that is dropped leaks its slot, which [`HotTier::pins_out`] shows.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a pin that is not handed back keeps its slot for ever"]
pub struct Pin {
    slot: u32,
    epoch: u32,
}

impl Pin {
    /// The pinned slot.
    #[must_use]
    pub const fn slot(&self) -> u32 {
        self.slot
    }
}

/// A receipt that this tier did not give out, or not for the slot's present unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pin of slot {slot}, epoch {epoch}: the slot is at epoch {found} with {pins} pins")]
pub struct PinError {
    /// Slot named by the receipt.
    pub slot: u32,
    /// Epoch named by the receipt.
    pub epoch: u32,
    /// Epoch of the slot; `u32::MAX` when there is no such slot.
    pub found: u32,
    /// Pins of the slot.
    pub pins: u32,
}

/// Answer to [`HotTier::admit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The unit may be moved into this slot; then call [`HotTier::arrive`].
    Slot(u32),
    /// The unit is already there or on its way.
    Present(u32),
    /// Every slot is pinned or loading: the unit has to be read where it lies.
    NoRoom,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    unit: u32,
    /// Counts the units that this slot has held.
    epoch: u32,
    pins: u32,
    life: SlotLife,
    /// Fetched ahead and not used since.
    ahead: bool,
}

/// What the tier has done since it was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HotCounters {
    /// Units asked for.
    pub requests: u64,
    /// Of these, resident when asked for.
    pub hits: u64,
    /// Units fetched ahead.
    pub ahead: u64,
    /// Of these, used before they left.
    pub ahead_used: u64,
    /// Units evicted.
    pub evictions: u64,
    /// Pins released by a receipt that was not valid.
    pub bad_pins: u64,
}

/// Directory of one shard's slots. Allocates nothing after it is built.
pub struct HotTier {
    slots: Vec<Slot>,
    by_unit: HashMap<u32, u32, BuildHasherDefault<UnitHasher>>,
    free: Vec<u32>,
    policy: Box<dyn Eviction>,
    evictable: Vec<bool>,
    victims: Vec<u32>,
    step: u64,
    pins_out: usize,
    counters: HotCounters,
}

impl HotTier {
    /// `num_slots` free slots under `eviction`.
    #[must_use]
    pub fn new(num_slots: usize, eviction: EvictionKind) -> Self {
        let empty = Slot { unit: 0, epoch: 0, pins: 0, life: SlotLife::Free, ahead: false };
        // Twice the entries: the map then clears its tombstones in place and never grows.
        let by_unit = HashMap::with_capacity_and_hasher(2 * num_slots, BuildHasherDefault::default());
        Self {
            slots: vec![empty; num_slots],
            by_unit,
            free: (0..num_slots as u32).rev().collect(),
            policy: eviction.build(num_slots),
            evictable: vec![false; num_slots],
            victims: Vec::with_capacity(num_slots),
            step: 0,
            pins_out: 0,
            counters: HotCounters::default(),
        }
    }

    /// Slots in all.
    #[must_use]
    pub fn num_slots(&self) -> usize {
        self.slots.len()
    }

    /// Units resident or loading.
    #[must_use]
    pub fn num_units(&self) -> usize {
        self.by_unit.len()
    }

    /// Pins given out and not handed back. Between steps anything but 0 is a leak.
    #[must_use]
    pub fn pins_out(&self) -> usize {
        self.pins_out
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> HotCounters {
        self.counters
    }

    /// Number of the present step.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Starts the next step.
    pub fn begin_step(&mut self) {
        self.step += 1;
    }

    /// Slot of a unit that is resident, without pinning it or counting a request.
    #[must_use]
    pub fn peek(&self, unit: u32) -> Option<u32> {
        let slot = *self.by_unit.get(&unit)?;
        (self.slots[slot as usize].life == SlotLife::Resident).then_some(slot)
    }

    /// Whether the unit is resident or on its way.
    #[must_use]
    pub fn is_known(&self, unit: u32) -> bool {
        self.by_unit.contains_key(&unit)
    }

    /// Asks for a unit on behalf of the present step: its pin when it is resident, `None` when it is absent or still
    /// loading. Counts a request, and a hit.
    pub fn request(&mut self, unit: u32) -> Option<Pin> {
        self.counters.requests += 1;
        let slot = self.peek(unit)?;
        self.counters.hits += 1;
        let entry = &mut self.slots[slot as usize];
        if std::mem::take(&mut entry.ahead) {
            self.counters.ahead_used += 1;
        }
        Some(self.pin(slot))
    }

    /// Finds a slot for an absent unit, evicting if need be. `ahead` of its use or because it was asked for.
    pub fn admit(&mut self, unit: u32, purpose: Purpose) -> Admission {
        if let Some(slot) = self.by_unit.get(&unit) {
            return Admission::Present(*slot);
        }
        if self.free.is_empty() {
            self.evict(1);
        }
        let Some(slot) = self.free.pop() else { return Admission::NoRoom };
        let entry = &mut self.slots[slot as usize];
        let Ok(life) = entry.life.next(SlotEvent::Fetch) else {
            unreachable!("the free list holds free slots only")
        };
        let epoch = entry.epoch.wrapping_add(1);
        *entry = Slot { unit, epoch, pins: 0, life, ahead: purpose == Purpose::Ahead };
        self.by_unit.insert(unit, slot);
        self.counters.ahead += u64::from(purpose == Purpose::Ahead);
        Admission::Slot(slot)
    }

    /// Frees slots until `wanted` are free, as far as the policy finds unpinned ones. One call for a whole batch of absent
    /// units costs one pass over the slots.
    pub fn make_room(&mut self, wanted: usize) {
        let missing = wanted.saturating_sub(self.free.len());
        if missing > 0 {
            self.evict(missing);
        }
    }

    /// The unit's data has arrived in `slot`.
    ///
    /// # Errors
    /// When the slot is not loading.
    pub fn arrive(&mut self, slot: u32) -> Result<(), super::life::IllegalTransition<SlotLife, SlotEvent>> {
        let entry = &mut self.slots[slot as usize];
        entry.life = entry.life.next(SlotEvent::Arrive)?;
        self.policy.admit(slot, entry.unit, Use { step: self.step, mass: 0.0 });
        Ok(())
    }

    /// The transfer into `slot` failed: the unit is absent again.
    ///
    /// # Errors
    /// When the slot is not loading.
    pub fn fail(&mut self, slot: u32) -> Result<(), super::life::IllegalTransition<SlotLife, SlotEvent>> {
        let entry = &mut self.slots[slot as usize];
        entry.life = entry.life.next(SlotEvent::Fail)?;
        self.by_unit.remove(&entry.unit);
        self.free.push(slot);
        Ok(())
    }

    /// Pins a resident slot.
    ///
    /// # Panics
    /// When the slot does not exist; debug builds also check that it is resident.
    pub fn pin(&mut self, slot: u32) -> Pin {
        let entry = &mut self.slots[slot as usize];
        debug_assert_eq!(entry.life, SlotLife::Resident, "only what has arrived is pinned");
        entry.pins += 1;
        self.pins_out += 1;
        Pin { slot, epoch: entry.epoch }
    }

    /// Takes a receipt back.
    ///
    /// # Errors
    /// When the receipt does not fit its slot; nothing is released then.
    pub fn unpin(&mut self, pin: Pin) -> Result<(), PinError> {
        match self.slots.get_mut(pin.slot as usize) {
            Some(entry) if entry.epoch == pin.epoch && entry.pins > 0 => {
                entry.pins -= 1;
                self.pins_out -= 1;
                Ok(())
            }
            entry => {
                self.counters.bad_pins += 1;
                let (found, pins) = entry.map_or((u32::MAX, 0), |e| (e.epoch, e.pins));
                Err(PinError { slot: pin.slot, epoch: pin.epoch, found, pins })
            }
        }
    }

    /// Tells the policy that the unit in `slot` was attended with this mass in the present step.
    pub fn used(&mut self, slot: u32, mass: f32) {
        self.policy.used(slot, Use { step: self.step, mass });
    }

    /// Drops a unit if it is resident and not pinned (it changed, or was cut off). Returns whether it is gone.
    pub fn invalidate(&mut self, unit: u32) -> bool {
        match self.by_unit.get(&unit).copied() {
            None => true,
            Some(slot) => {
                let entry = self.slots[slot as usize];
                let idle = entry.life == SlotLife::Resident && entry.pins == 0;
                if idle {
                    self.leave(slot);
                }
                idle
            }
        }
    }

    /// Drops every unit at and after `first`; returns whether all of them are gone.
    pub fn truncate(&mut self, first: u32) -> bool {
        let units = self.slots.iter().filter(|s| s.life != SlotLife::Free && s.unit >= first);
        let units: Vec<u32> = units.map(|s| s.unit).collect();
        let mut all = true;
        for unit in units {
            all &= self.invalidate(unit);
        }
        all
    }

    /// Evicts everything that is not pinned or loading.
    pub fn clear(&mut self) {
        self.evict(self.slots.len());
    }

    /// First fault of the directory's own bookkeeping, in words; `None` when all of it agrees. For tests and simulations.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let pins: u32 = self.slots.iter().map(|s| s.pins).sum();
        if pins as usize != self.pins_out {
            return Some(format!("{pins} pins in the slots, {} given out", self.pins_out));
        }
        let held = self.slots.iter().filter(|s| s.life != SlotLife::Free).count();
        if held != self.by_unit.len() || held + self.free.len() != self.slots.len() {
            let (mapped, free) = (self.by_unit.len(), self.free.len());
            return Some(format!("{held} slots taken, {mapped} units mapped, {free} free"));
        }
        self.slots.iter().enumerate().find_map(|(slot, s)| match s.life {
            SlotLife::Free => (s.pins > 0).then(|| format!("free slot {slot} is pinned")),
            _ => (self.by_unit.get(&s.unit) != Some(&(slot as u32)))
                .then(|| format!("unit {} of slot {slot} is not mapped to it", s.unit)),
        })
    }

    fn evict(&mut self, wanted: usize) {
        for (ok, slot) in self.evictable.iter_mut().zip(&self.slots) {
            *ok = slot.life == SlotLife::Resident && slot.pins == 0;
        }
        let mut victims = std::mem::take(&mut self.victims);
        self.policy.victims(wanted, &self.evictable, self.step, &mut victims);
        for slot in victims.drain(..) {
            self.leave(slot);
            self.counters.evictions += 1;
        }
        self.victims = victims;
    }

    /// Resident, unpinned slot to free.
    fn leave(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        assert!(entry.pins == 0, "slot {slot} is pinned (invariant 6)");
        let left = entry.life.next(SlotEvent::Evict).and_then(|life| life.next(SlotEvent::Release));
        let Ok(life) = left else { unreachable!("slot {slot} is {:?}, not resident", entry.life) };
        entry.life = life;
        self.by_unit.remove(&entry.unit);
        self.policy.forget(slot);
        self.free.push(slot);
    }
}

/// Why a unit is brought in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The present step attends it.
    Demand,
    /// A later step may.
    Ahead,
}

/// Fibonacci hashing of a 32-bit number: units are small numbers chosen by no adversary.
#[derive(Clone, Copy, Debug, Default)]
struct UnitHasher(u64);

impl Hasher for UnitHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, unit: u32) {
        self.0 = (self.0 ^ u64::from(unit)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bring(tier: &mut HotTier, unit: u32) -> u32 {
        let Admission::Slot(slot) = tier.admit(unit, Purpose::Demand) else { panic!("no slot for {unit}") };
        tier.arrive(slot).unwrap();
        slot
    }

    #[test]
    fn a_pinned_unit_stays_and_a_lost_pin_is_seen() {
        let mut tier = HotTier::new(2, EvictionKind::Lru);
        let slot = bring(&mut tier, 7);
        bring(&mut tier, 8);
        let pin = tier.pin(slot);
        bring(&mut tier, 9);
        assert_eq!((tier.peek(7), tier.peek(8)), (Some(slot), None));
        drop(pin);
        assert_eq!(tier.pins_out(), 1);
        bring(&mut tier, 10);
        tier.clear();
        assert_eq!((tier.peek(7), tier.num_units()), (Some(slot), 1));
        assert!(!tier.invalidate(7));
    }

    #[test]
    fn a_receipt_of_an_earlier_unit_or_a_foreign_one_is_refused() {
        let mut tier = HotTier::new(1, EvictionKind::Lru);
        let slot = bring(&mut tier, 1);
        let pin = tier.pin(slot);
        let stale = Pin { slot, epoch: pin.epoch };
        tier.unpin(pin).unwrap();
        bring(&mut tier, 2);
        let message = tier.unpin(stale).unwrap_err().to_string();
        assert!(message.contains("epoch 1") && message.contains("epoch 2"), "{message}");
        assert!(tier.unpin(Pin { slot: 5, epoch: 0 }).is_err());
        assert_eq!(tier.counters().bad_pins, 2);
    }

    #[test]
    fn a_loading_slot_is_neither_hit_nor_evicted() {
        let mut tier = HotTier::new(1, EvictionKind::Lru);
        let Admission::Slot(slot) = tier.admit(3, Purpose::Ahead) else { panic!() };
        assert!(tier.request(3).is_none());
        assert_eq!(tier.admit(4, Purpose::Demand), Admission::NoRoom);
        assert_eq!(tier.admit(3, Purpose::Demand), Admission::Present(slot));
        tier.arrive(slot).unwrap();
        assert!(tier.arrive(slot).is_err());
        let pin = tier.request(3).unwrap();
        tier.unpin(pin).unwrap();
        assert_eq!(tier.counters().ahead_used, 1);
    }

    /// The tier as a list of (unit, pins), with victims taken from what the tier reports.
    #[derive(Default)]
    struct Model {
        units: Vec<(u32, usize)>,
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_and_keeps_its_books(
            num_slots in 1usize..9,
            kind in prop::sample::select(EvictionKind::ALL.to_vec()),
            ops in prop::collection::vec((0u8..6, 0u32..20), 1..200),
        ) {
            let mut tier = HotTier::new(num_slots, kind);
            let mut model = Model::default();
            let mut pins: Vec<(u32, Pin)> = Vec::new();
            for (op, unit) in ops {
                match op {
                    0 | 1 => {
                        let known = model.units.iter().any(|(u, _)| *u == unit);
                        let full = model.units.len() == num_slots && model.units.iter().all(|(_, p)| *p > 0);
                        match tier.admit(unit, Purpose::Demand) {
                            Admission::Slot(slot) => {
                                prop_assert!(!known && !full);
                                tier.arrive(slot).unwrap();
                                // Whoever left was not pinned.
                                let gone: Vec<_> =
                                    model.units.iter().filter(|(u, _)| tier.peek(*u).is_none()).collect();
                                prop_assert!(gone.iter().all(|(_, p)| *p == 0) && gone.len() <= 1);
                                prop_assert_eq!(gone.len(), usize::from(model.units.len() == num_slots));
                                model.units.retain(|(u, _)| tier.peek(*u).is_some());
                                model.units.push((unit, 0));
                            }
                            Admission::Present(_) => prop_assert!(known),
                            Admission::NoRoom => prop_assert!(!known && full),
                        }
                    }
                    2 => {
                        let pin = tier.request(unit);
                        let entry = model.units.iter_mut().find(|(u, _)| *u == unit);
                        prop_assert_eq!(pin.is_some(), entry.is_some());
                        if let (Some(pin), Some(entry)) = (pin, entry) {
                            entry.1 += 1;
                            tier.used(pin.slot(), 0.5);
                            pins.push((unit, pin));
                        }
                    }
                    3 => {
                        if let Some((unit, pin)) = pins.pop() {
                            tier.unpin(pin).unwrap();
                            model.units.iter_mut().find(|(u, _)| *u == unit).unwrap().1 -= 1;
                        }
                    }
                    4 => {
                        tier.invalidate(unit);
                        model.units.retain(|(u, p)| *u != unit || *p > 0);
                    }
                    _ => tier.begin_step(),
                }
                prop_assert_eq!(tier.fault(), None);
                prop_assert_eq!(tier.num_units(), model.units.len());
                prop_assert!(model.units.iter().all(|(u, _)| tier.peek(*u).is_some()));
            }
            prop_assert_eq!(tier.pins_out(), pins.len());
        }
    }
}
