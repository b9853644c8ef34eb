//! Policies that give every slot a worth and evict the least worthy.

use super::{Eviction, MASS_HALF_LIFE_STEPS, Use};

/// What is known of the unit in a slot.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    last_step: u64,
    uses: u32,
    /// Decayed attention mass as of `last_step`.
    mass: f32,
}

/// Worth of a unit at `step`, compared part by part; smaller goes first.
type Worth = fn(&Facts, step: u64) -> (f32, u64);

pub(super) fn recency(facts: &Facts, _step: u64) -> (f32, u64) {
    (0.0, facts.last_step)
}

pub(super) fn frequency(facts: &Facts, _step: u64) -> (f32, u64) {
    (facts.uses as f32, facts.last_step)
}

pub(super) fn decayed_mass(facts: &Facts, step: u64) -> (f32, u64) {
    (decay(facts.mass, step - facts.last_step.min(step)), facts.last_step)
}

fn decay(mass: f32, steps: u64) -> f32 {
    mass * (-(steps as f32) / MASS_HALF_LIFE_STEPS).exp2()
}

/// Evicts the slots of least worth. A batch of victims costs one pass over the slots, whatever its size.
pub(super) struct Ranked {
    facts: Vec<Facts>,
    worth: Worth,
    order: Vec<((f32, u64), u32)>,
}

impl Ranked {
    pub(super) fn new(num_slots: usize, worth: Worth) -> Self {
        Self { facts: vec![Facts::default(); num_slots], worth, order: Vec::with_capacity(num_slots) }
    }
}

impl Eviction for Ranked {
    fn grow(&mut self, num_slots: usize) {
        self.facts.resize(num_slots.max(self.facts.len()), Facts::default());
    }

    fn admit(&mut self, slot: u32, _unit: u32, first: Use) {
        self.facts[slot as usize] = Facts { last_step: first.step, uses: 1, mass: first.mass };
    }

    fn used(&mut self, slot: u32, by: Use) {
        let facts = &mut self.facts[slot as usize];
        facts.mass = decay(facts.mass, by.step - facts.last_step.min(by.step)) + by.mass;
        facts.last_step = by.step;
        facts.uses = facts.uses.saturating_add(1);
    }

    fn forget(&mut self, slot: u32) {
        self.facts[slot as usize] = Facts::default();
    }

    fn victims(&mut self, wanted: usize, evictable: &[bool], step: u64, victims: &mut Vec<u32>) {
        let worth = self.worth;
        self.order.clear();
        let candidates = self.facts.iter().zip(evictable).enumerate().filter(|(_, (_, ok))| **ok);
        self.order.extend(candidates.map(|(slot, (facts, _))| (worth(facts, step), slot as u32)));
        let ascending = |a: &((f32, u64), u32), b: &((f32, u64), u32)| {
            a.0.0.total_cmp(&b.0.0).then(a.0.1.cmp(&b.0.1)).then(a.1.cmp(&b.1))
        };
        let wanted = wanted.min(self.order.len());
        if wanted == 0 {
            return;
        }
        self.order.select_nth_unstable_by(wanted - 1, ascending);
        self.order[..wanted].sort_unstable_by(ascending);
        victims.extend(self.order[..wanted].iter().map(|(_, slot)| *slot));
    }
}
