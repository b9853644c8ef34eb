//! Decisions without I/O: which resident units give way, and the optimum that any such decision is measured against.

mod belady;
mod clock;
mod lrfu;
mod prefetch;
mod ranked;

use std::str::FromStr;

pub use belady::{Optimum, belady};
pub use prefetch::{PrefetchKind, UnknownPrefetch};

/// Steps after which attention mass counts half: long enough to bridge a step or two in which a token is not selected,
/// short enough to follow the text.
pub const MASS_HALF_LIFE_STEPS: f32 = 8.0;

/// One use of a slot by a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Use {
    /// Step number, never decreasing.
    pub step: u64,
    /// Attention mass of the unit in this step, mean over the group's query heads; 0 for a unit fetched ahead.
    pub mass: f32,
}

/// Names victims among slots from facts only: no clock, no randomness, ties by slot number. One per hot tier.
pub trait Eviction: Send + Sync {
    /// Makes room for slots up to `num_slots`; those there are keep what is known of them.
    fn grow(&mut self, num_slots: usize);

    /// Slot `slot` received `unit`.
    fn admit(&mut self, slot: u32, unit: u32, first: Use);

    /// The unit in `slot` was attended.
    fn used(&mut self, slot: u32, by: Use);

    /// The unit in `slot` is gone.
    fn forget(&mut self, slot: u32);

    /// Appends at most `wanted` slots to `victims`, first to go first, all of them with `evictable[slot]`. `step` is the
    /// present one.
    fn victims(&mut self, wanted: usize, evictable: &[bool], step: u64, victims: &mut Vec<u32>);
}

/// The eviction policies. The default is the best on the recorded traces: `lrfu` hits 1 to 3 points more often than `lru` and
/// `mass`, which lie within half a point of each other; and it needs no weights of attended tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EvictionKind {
    /// Longest unused first.
    Lru,
    /// Second chance: a hand passes over the slots and spares, once, those used since its last visit.
    Clock,
    /// Least often used since it came, longest unused among equals.
    Lfu,
    /// Least attention mass, older steps counting less.
    Mass,
    /// Least used, older steps counting less and uses before an eviction remembered.
    #[default]
    Lrfu,
}

impl EvictionKind {
    /// Every policy, in the order of reports.
    pub const ALL: [Self; 5] = [Self::Lru, Self::Clock, Self::Lfu, Self::Mass, Self::Lrfu];

    /// Name in configurations and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Clock => "clock",
            Self::Lfu => "lfu",
            Self::Mass => "mass",
            Self::Lrfu => "lrfu",
        }
    }

    /// The policy over `num_slots` free slots.
    #[must_use]
    pub fn build(self, num_slots: usize) -> Box<dyn Eviction> {
        match self {
            Self::Lru => Box::new(ranked::Ranked::new(num_slots, ranked::recency)),
            Self::Lfu => Box::new(ranked::Ranked::new(num_slots, ranked::frequency)),
            Self::Mass => Box::new(ranked::Ranked::new(num_slots, ranked::decayed_mass)),
            Self::Clock => Box::new(clock::Clock::new(num_slots)),
            Self::Lrfu => Box::new(lrfu::Lrfu::new(num_slots)),
        }
    }
}

impl std::fmt::Display for EvictionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A policy name that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("eviction policy `{0}`: unknown name; known are lru, clock, lfu, mass, lrfu")]
pub struct UnknownEviction(pub String);

impl FromStr for EvictionKind {
    type Err = UnknownEviction;

    fn from_str(name: &str) -> Result<Self, UnknownEviction> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownEviction(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(step: u64, mass: f32) -> Use {
        Use { step, mass }
    }

    fn order(kind: EvictionKind, uses: &[(u32, Use)]) -> Vec<u32> {
        let mut policy = kind.build(4);
        for slot in 0..4 {
            policy.admit(slot, slot, at(0, 0.0));
        }
        for (slot, by) in uses {
            policy.used(*slot, *by);
        }
        let mut victims = Vec::new();
        policy.victims(4, &[true; 4], 10, &mut victims);
        victims
    }

    #[test]
    fn each_policy_ranks_by_its_own_fact() {
        let uses = [
            (0, at(1, 0.9)),
            (1, at(2, 0.1)),
            (1, at(3, 0.1)),
            (1, at(4, 0.1)),
            (2, at(5, 0.2)),
            (3, at(6, 0.01)),
            (3, at(7, 0.01)),
        ];
        assert_eq!(order(EvictionKind::Lru, &uses), [0, 1, 2, 3]);
        assert_eq!(order(EvictionKind::Lfu, &uses), [0, 2, 3, 1]);
        // Decayed to step 10 by 2^-(age / 8): 0.41, 0.16, 0.13, 0.015.
        assert_eq!(order(EvictionKind::Mass, &uses), [3, 2, 1, 0]);
        // Decayed counts at step 10: .88, 2.1, 1.1, 2.0.
        assert_eq!(order(EvictionKind::Lrfu, &uses), [0, 2, 3, 1]);
    }

    #[test]
    fn clock_spares_what_was_used_since_its_last_visit() {
        let mut policy = EvictionKind::Clock.build(3);
        (0..3).for_each(|slot| policy.admit(slot, slot, at(0, 0.0)));
        let mut victims = Vec::new();
        policy.victims(1, &[true; 3], 1, &mut victims);
        assert_eq!(victims, [0]);
        policy.used(1, at(2, 0.0));
        victims.clear();
        policy.victims(1, &[false, true, true], 3, &mut victims);
        assert_eq!(victims, [2]);
    }

    #[test]
    fn victims_are_distinct_and_evictable_and_no_more_than_asked_for() {
        for kind in EvictionKind::ALL {
            let mut policy = kind.build(8);
            (0..8).for_each(|slot| policy.admit(slot, slot, at(u64::from(slot), 1.0)));
            let evictable = [true, false, true, true, false, false, true, true];
            for wanted in 0..10 {
                let mut victims = Vec::new();
                policy.victims(wanted, &evictable, 9, &mut victims);
                assert_eq!(victims.len(), wanted.min(5), "{kind}");
                assert!(victims.iter().all(|slot| evictable[*slot as usize]), "{kind}");
                victims.sort_unstable();
                victims.dedup();
                assert_eq!(victims.len(), wanted.min(5), "{kind}");
            }
        }
    }

    #[test]
    fn names_round_trip_and_a_wrong_one_is_repeated() {
        for kind in EvictionKind::ALL {
            assert_eq!(kind.name().parse::<EvictionKind>().unwrap(), kind);
        }
        assert!("fifo".parse::<EvictionKind>().unwrap_err().to_string().contains("`fifo`"));
    }
}
