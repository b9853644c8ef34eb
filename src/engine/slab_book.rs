//! Which slabs may give way: every full slab in warm memory has a slot in the book, and an eviction policy ranks the slots.

use crate::ids::SeqId;
use crate::policy::{Eviction, EvictionKind, Use};

/// Whose slab it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlabKey {
    pub(super) seq: SeqId,
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) slab: usize,
}

impl SlabKey {
    /// A number for policies that remember slabs that were away.
    fn unit(&self) -> u32 {
        let mixed = [self.seq.0, self.layer as u64, self.head as u64, self.slab as u64];
        let hash =
            mixed.iter().fold(0u64, |hash, x| (hash ^ x).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29));
        (hash >> 32) as u32
    }
}

/// Slots of all sequences under one policy. Sequences may close and slabs be cut off without a word to the book: whoever asks
/// for victims says which keys are alive.
pub(super) struct SlabBook {
    policy: Box<dyn Eviction>,
    keys: Vec<Option<SlabKey>>,
    free: Vec<u32>,
    evictable: Vec<bool>,
    victims: Vec<u32>,
    step: u64,
}

/// What a key stands for today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It may be chosen.
    Wanted,
    /// It is there, but not for this choice.
    Kept,
    /// Its slab is gone, or has another slot.
    Gone,
}

impl SlabBook {
    pub(super) fn new(eviction: EvictionKind) -> Self {
        let (keys, free, evictable, victims) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { policy: eviction.build(0), keys, free, evictable, victims, step: 0 }
    }

    pub(super) fn begin_step(&mut self) {
        self.step += 1;
    }

    /// A slot for a slab that came into warm memory.
    pub(super) fn admit(&mut self, key: SlabKey) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.keys.push(None);
            self.policy.grow(self.keys.len());
            self.keys.len() as u32 - 1
        });
        self.keys[slot as usize] = Some(key);
        self.policy.admit(slot, key.unit(), Use { step: self.step, mass: 0.0 });
        slot
    }

    pub(super) fn used(&mut self, slot: u32, mass: f32) {
        self.policy.used(slot, Use { step: self.step, mass });
    }

    /// The slab in `slot` left warm memory.
    pub(super) fn release(&mut self, slot: u32) {
        if self.keys[slot as usize].take().is_some() {
            self.policy.forget(slot);
            self.free.push(slot);
        }
    }

    /// At most `wanted` slabs, first to go first, among those that `standing` wants; slots of slabs that are gone are taken
    /// back. One pass over the book.
    pub(super) fn victims(
        &mut self,
        wanted: usize,
        standing: impl Fn(u32, &SlabKey) -> Standing,
        chosen: &mut Vec<SlabKey>,
    ) {
        chosen.clear();
        self.evictable.clear();
        self.evictable.resize(self.keys.len(), false);
        for slot in 0..self.keys.len() {
            let Some(key) = &self.keys[slot] else { continue };
            match standing(slot as u32, key) {
                Standing::Wanted => self.evictable[slot] = true,
                Standing::Kept => {}
                Standing::Gone => self.release(slot as u32),
            }
        }
        let mut victims = std::mem::take(&mut self.victims);
        self.policy.victims(wanted, &self.evictable, self.step, &mut victims);
        chosen.extend(victims.drain(..).filter_map(|slot| self.keys[slot as usize]));
        self.victims = victims;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_chooses_among_the_living_and_slots_come_back() {
        let key = |slab| SlabKey { seq: SeqId(0), layer: 0, head: 0, slab };
        for kind in EvictionKind::ALL {
            let mut book = SlabBook::new(kind);
            for slab in 0..6 {
                book.begin_step();
                let slot = book.admit(key(slab));
                assert_eq!(slot, slab as u32, "{kind}");
                book.used(slot, slab as f32 * 0.1);
            }
            let mut chosen = Vec::new();
            let standing = |_, key: &SlabKey| match key.slab {
                0 => Standing::Gone,
                1 => Standing::Kept,
                _ => Standing::Wanted,
            };
            book.victims(2, standing, &mut chosen);
            assert_eq!(chosen, [key(2), key(3)], "{kind}");
            book.release(2);
            assert_eq!((book.admit(key(7)), book.admit(key(8)), book.admit(key(9))), (2, 0, 6), "{kind}");
        }
    }
}
