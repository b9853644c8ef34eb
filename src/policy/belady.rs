//! Belady's optimum on an access string: the best hit rate that any eviction could have had, because it sees the future.

use std::collections::{BinaryHeap, HashMap};

/// Hits and requests of the optimum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Optimum {
    /// Requests that found their unit resident.
    pub hits: u64,
    /// All requests.
    pub requests: u64,
}

/// Serves `steps`, each a set of distinct units that must be resident together, from `num_slots` slots that start empty,
/// and evicts the unit whose next use lies furthest ahead (L. A. Belady, IBM Systems Journal 5, 1966). Units are fetched
/// when asked for and never before, so this is the bound of demand caches. A step with more units than slots streams the
/// excess past the slots. `O(n log n)` in the length of the string.
pub fn belady<S: AsRef<[u32]>>(steps: &[S], num_slots: usize) -> Optimum {
    const NEVER: usize = usize::MAX;
    // next[t][i]: the step after t that asks for unit i of step t.
    let mut next: Vec<Vec<usize>> = Vec::with_capacity(steps.len());
    let mut upcoming: HashMap<u32, usize> = HashMap::new();
    for (t, step) in steps.iter().enumerate().rev() {
        next.push(step.as_ref().iter().map(|unit| upcoming.insert(*unit, t).unwrap_or(NEVER)).collect());
    }
    next.reverse();

    let mut optimum = Optimum::default();
    let mut resident: HashMap<u32, usize> = HashMap::with_capacity(num_slots + 1);
    let mut furthest: BinaryHeap<(usize, u32)> = BinaryHeap::new();
    for (step, next) in steps.iter().zip(&next) {
        let step = step.as_ref();
        let hits = step.iter().filter(|unit| resident.contains_key(unit)).count();
        optimum.hits += hits as u64;
        optimum.requests += step.len() as u64;
        // What this step asks for lies in the heap with its next use `t`, nearer than any other: it is popped last.
        let absent = step.iter().filter(|unit| !resident.contains_key(unit)).count();
        while resident.len() + absent > num_slots {
            let Some((at, unit)) = furthest.pop() else { break };
            if resident.get(&unit) == Some(&at) {
                resident.remove(&unit);
            }
        }
        for (unit, next) in step.iter().zip(next) {
            resident.insert(*unit, *next);
            furthest.push((*next, *unit));
        }
        while resident.len() > num_slots {
            let Some((at, unit)) = furthest.pop() else { break };
            if resident.get(&unit) == Some(&at) {
                resident.remove(&unit);
            }
        }
    }
    optimum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every way of evicting, tried out.
    fn best(steps: &[Vec<u32>], resident: &[u32], num_slots: usize) -> u64 {
        let Some((step, rest)) = steps.split_first() else { return 0 };
        let hits = step.iter().filter(|unit| resident.contains(unit)).count() as u64;
        let idle: Vec<u32> = resident.iter().copied().filter(|unit| !step.contains(unit)).collect();
        let room = num_slots - step.len();
        let kept = (0u32..1 << idle.len()).filter(|mask| mask.count_ones() as usize <= room);
        let futures = kept.map(|mask| {
            let chosen = idle.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1).map(|(_, unit)| *unit);
            let next: Vec<u32> = step.iter().copied().chain(chosen).collect();
            best(rest, &next, num_slots)
        });
        hits + futures.max().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn equals_the_best_of_all_evictions(
            steps in prop::collection::vec(prop::collection::btree_set(0u32..7, 1..4), 0..7),
            extra in 0usize..3,
        ) {
            let steps: Vec<Vec<u32>> = steps.into_iter().map(|s| s.into_iter().collect()).collect();
            let num_slots = 3 + extra;
            let optimum = belady(&steps, num_slots);
            prop_assert_eq!(optimum.hits, best(&steps, &[], num_slots));
            prop_assert_eq!(optimum.requests, steps.iter().map(|s| s.len() as u64).sum::<u64>());
        }
    }

    #[test]
    fn textbook_string_has_its_textbook_answer() {
        // Silberschatz, Operating System Concepts: 20 references, 3 frames, 9 faults.
        let string = [7u32, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1];
        let steps: Vec<[u32; 1]> = string.map(|unit| [unit]).to_vec();
        assert_eq!(belady(&steps, 3), Optimum { hits: 11, requests: 20 });
    }

    #[test]
    fn a_step_larger_than_the_slots_hits_at_most_the_slots() {
        let steps = vec![vec![1u32, 2, 3, 4]; 5];
        assert_eq!(belady(&steps, 3), Optimum { hits: 12, requests: 20 });
        assert_eq!(belady(&steps, 0), Optimum { hits: 0, requests: 20 });
    }
}
