//! Decayed counts of uses that outlive eviction: a middle between recency and frequency (Lee et al., LRFU, IEEE
//! Transactions on Computers 50(12), 2001), with a memory of units that are gone.

use super::{Eviction, Use};

/// Steps after which a use counts half. 8 is the best of 1, 2, 4, ..., 64 on both recorded models, 4 and 16 lie within half a
/// point (bench/README.md).
const HALF_LIFE_STEPS: f32 = 8.0;

/// Remembered units for each slot. What is forgotten by a collision is the older one.
const GHOSTS_PER_SLOT: usize = 8;

/// Uses of a unit, decayed to `last_step`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Uses {
    unit: u32,
    count: f32,
    last_step: u64,
    /// The use that brought the unit in is counted already.
    fresh: bool,
}

impl Uses {
    fn at(&self, step: u64) -> f32 {
        self.count * (-(step.saturating_sub(self.last_step) as f32) / HALF_LIFE_STEPS).exp2()
    }
}

/// Evicts the unit with the smallest decayed count, longest unused among equals.
pub(super) struct Lrfu {
    slots: Vec<Uses>,
    /// Units that were evicted, by hash; `None` = nobody.
    ghosts: Vec<Option<Uses>>,
    order: Vec<(f32, u64, u32)>,
}

impl Lrfu {
    pub(super) fn new(num_slots: usize) -> Self {
        let mut policy = Self { slots: Vec::new(), ghosts: Vec::new(), order: Vec::new() };
        policy.grow(num_slots);
        policy
    }

    fn home(&self, unit: u32) -> usize {
        // Fibonacci hashing onto the table.
        let hash = u64::from(unit).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        (hash as usize * self.ghosts.len()) >> 32
    }
}

impl Eviction for Lrfu {
    fn grow(&mut self, num_slots: usize) {
        let num_slots = num_slots.max(self.slots.len());
        self.slots.resize(num_slots, Uses::default());
        self.order.reserve(num_slots.saturating_sub(self.order.len()));
        if self.ghosts.len() < num_slots * GHOSTS_PER_SLOT {
            let known = std::mem::take(&mut self.ghosts);
            self.ghosts = vec![None; num_slots.next_power_of_two() * GHOSTS_PER_SLOT];
            for ghost in known.into_iter().flatten() {
                let home = self.home(ghost.unit);
                self.ghosts[home] = Some(ghost);
            }
        }
    }

    fn admit(&mut self, slot: u32, unit: u32, first: Use) {
        let home = self.home(unit);
        let known = self.ghosts[home].take_if(|ghost| ghost.unit == unit);
        let count = known.map_or(0.0, |ghost| ghost.at(first.step)) + 1.0;
        self.slots[slot as usize] = Uses { unit, count, last_step: first.step, fresh: true };
    }

    fn used(&mut self, slot: u32, by: Use) {
        let uses = &mut self.slots[slot as usize];
        if !(std::mem::take(&mut uses.fresh) && uses.last_step == by.step) {
            uses.count = uses.at(by.step) + 1.0;
            uses.last_step = by.step;
        }
    }

    fn forget(&mut self, slot: u32) {
        let uses = std::mem::take(&mut self.slots[slot as usize]);
        let home = self.home(uses.unit);
        self.ghosts[home] = Some(uses);
    }

    fn victims(&mut self, wanted: usize, evictable: &[bool], step: u64, victims: &mut Vec<u32>) {
        self.order.clear();
        let candidates = self.slots.iter().zip(evictable).enumerate().filter(|(_, (_, ok))| **ok);
        self.order.extend(candidates.map(|(slot, (uses, _))| (uses.at(step), uses.last_step, slot as u32)));
        let ascending = |a: &(f32, u64, u32), b: &(f32, u64, u32)| {
            a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2))
        };
        let wanted = wanted.min(self.order.len());
        if wanted == 0 {
            return;
        }
        self.order.select_nth_unstable_by(wanted - 1, ascending);
        self.order[..wanted].sort_unstable_by(ascending);
        victims.extend(self.order[..wanted].iter().map(|(_, _, slot)| *slot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(step: u64) -> Use {
        Use { step, mass: 0.0 }
    }

    #[test]
    fn a_unit_that_comes_back_is_remembered() {
        let mut policy = Lrfu::new(2);
        policy.admit(0, 70, at(0));
        for step in 0..6 {
            policy.used(0, at(step));
        }
        policy.forget(0);
        // 70 returns and 71 is new, both at step 8: the old uses decide.
        policy.admit(0, 70, at(8));
        policy.admit(1, 71, at(8));
        (0..2).for_each(|slot| policy.used(slot, at(8)));
        let mut victims = Vec::new();
        policy.victims(1, &[true; 2], 9, &mut victims);
        assert_eq!(victims, [1]);
        assert!((policy.slots[1].count - 1.0).abs() < 1e-6, "the use that brought a unit in counts once");
        // Growth keeps what is remembered.
        policy.forget(0);
        policy.grow(100);
        policy.admit(50, 70, at(9));
        assert!(policy.slots[50].count > 3.0);
    }
}
