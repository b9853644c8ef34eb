//! Second-chance eviction: one bit a slot and a hand.

use super::{Eviction, Use};

pub(super) struct Clock {
    /// Used since the hand last passed.
    used: Vec<bool>,
    taken: Vec<bool>,
    hand: usize,
}

impl Clock {
    pub(super) fn new(num_slots: usize) -> Self {
        Self { used: vec![false; num_slots], taken: vec![false; num_slots], hand: 0 }
    }
}

impl Eviction for Clock {
    fn grow(&mut self, num_slots: usize) {
        self.used.resize(num_slots.max(self.used.len()), false);
        self.taken.resize(self.used.len(), false);
    }

    fn admit(&mut self, slot: u32, _unit: u32, _first: Use) {
        self.used[slot as usize] = false;
    }

    fn used(&mut self, slot: u32, _by: Use) {
        self.used[slot as usize] = true;
    }

    fn forget(&mut self, slot: u32) {
        self.used[slot as usize] = false;
    }

    fn victims(&mut self, wanted: usize, evictable: &[bool], _step: u64, victims: &mut Vec<u32>) {
        let num_slots = self.used.len();
        self.taken.fill(false);
        let mut left = wanted.min(evictable.iter().filter(|e| **e).count());
        // Two rounds are enough: the first clears every bit, the second takes whatever may be taken.
        for _ in 0..2 * num_slots {
            if left == 0 {
                break;
            }
            let slot = self.hand;
            self.hand = (self.hand + 1) % num_slots;
            if !evictable[slot] || self.taken[slot] {
                continue;
            }
            if std::mem::take(&mut self.used[slot]) {
                continue;
            }
            self.taken[slot] = true;
            victims.push(slot as u32);
            left -= 1;
        }
    }
}
