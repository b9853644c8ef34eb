//! An access log served from simulated slots over a simulated link.

use super::{AccessLog, ProfileError};
use crate::page::HotTier;
use crate::policy::{EvictionKind, PrefetchKind, belady};
use crate::replay::{in_parallel, threads};
use crate::transfer::{Fetched, LinkModel, Offload, SimLink};

/// What to simulate: every combination.
#[derive(Clone, Debug)]
pub struct SimPlan {
    /// Eviction policies.
    pub policies: Vec<EvictionKind>,
    /// Ways of prefetching.
    pub prefetches: Vec<PrefetchKind>,
    /// Slots as multiples of the most units that a step retrieves.
    pub slots_factors: Vec<f64>,
    /// The link.
    pub link: LinkModel,
    /// Threads that share the combinations; 0 = one per core.
    pub threads: usize,
}

/// One combination.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// Eviction policy.
    pub policy: EvictionKind,
    /// Way of prefetching.
    pub prefetch: PrefetchKind,
    /// Slots as a multiple of the most units that a step retrieves.
    pub slots_factor: f64,
}

/// One step of one combination, all shards together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SimStep {
    /// Units asked for, found resident, moved on demand, moved ahead; bytes moved.
    pub fetched: Fetched,
    /// Simulated time that layers waited for the link, microseconds.
    pub stall_us: f64,
    /// Simulated time of the layers' own work, microseconds.
    pub compute_us: f64,
}

impl SimStep {
    /// Share of the requested units that were resident.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        self.fetched.hits as f64 / (self.fetched.requests as f64).max(1.0)
    }
}

/// One layer of one step on the simulated clock, microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerTime {
    /// Step, as an index into the log's positions.
    pub step: usize,
    /// Layer of the model.
    pub layer: usize,
    /// When the layer asked for its units.
    pub start_us: f64,
    /// How long it waited.
    pub stall_us: f64,
    /// When its own work was done.
    pub end_us: f64,
    /// When the link moved what was asked for during the layer; `None` when nothing was.
    pub link_us: Option<(f64, f64)>,
}

/// Layers whose times are kept: about as many as a chart can show one by one.
const TIMED_LAYERS: usize = 24;

/// Consecutive steps from the middle of a log, of which the times of every layer are kept.
#[must_use]
pub fn timed_steps(log: &AccessLog) -> std::ops::Range<usize> {
    let num_steps = log.accesses.len();
    let wanted = (TIMED_LAYERS / layers(log).len().max(1)).clamp(1, num_steps);
    let first = (num_steps - wanted) / 2;
    first..first + wanted
}

/// What one combination did.
#[derive(Clone, Debug)]
pub struct Simulated {
    /// The combination.
    pub cell: Cell,
    /// Share of requested units that were resident when asked for.
    pub hit_rate: f64,
    /// The same under Belady's optimum with as many slots, without prefetch.
    pub belady_hit_rate: f64,
    /// Bytes over the link per decoded token, all shards.
    pub bytes_per_token: f64,
    /// Share of the units fetched ahead that were used before they left; `None` when none were fetched ahead.
    pub prefetch_accuracy: Option<f64>,
    /// Bytes per token fetched ahead for nothing.
    pub wasted_bytes_per_token: f64,
    /// Simulated time per token that layers waited for the link, microseconds.
    pub stall_us: f64,
    /// Simulated time per token in which the link moved data, microseconds.
    pub link_busy_us: f64,
    /// Every step.
    pub steps: Vec<SimStep>,
    /// Every layer of the [`timed_steps`].
    pub layers: Vec<LayerTime>,
}

/// Mean share of a step's units that the step before asked for too (same shard).
#[must_use]
pub fn overlap(log: &AccessLog) -> f64 {
    let (mut shared, mut all) = (0usize, 0usize);
    for pair in log.accesses.windows(2) {
        for (before, now) in pair[0].iter().zip(&pair[1]) {
            shared += now.units.iter().filter(|unit| before.units.binary_search(unit).is_ok()).count();
            all += now.units.len();
        }
    }
    shared as f64 / (all as f64).max(1.0)
}

/// Runs every combination. The first step fills empty slots and counts like any other, for the optimum too.
///
/// # Errors
/// [`ProfileError::Plan`] for a factor or link out of range; [`ProfileError::Offload`] for a fault of this program.
pub fn simulate(log: &AccessLog, plan: &SimPlan) -> Result<Vec<Simulated>, ProfileError> {
    if let Err((field, value)) = plan.link.validate() {
        return Err(ProfileError::plan(field, value, "is out of range"));
    }
    if let Some(factor) = plan.slots_factors.iter().find(|f| !(0.0..=1e6).contains(*f)) {
        return Err(ProfileError::plan("slots_factor", factor, "must be within 0 to 1000000"));
    }
    let empty = [
        ("policies", plan.policies.is_empty()),
        ("prefetch", plan.prefetches.is_empty()),
        ("slots", plan.slots_factors.is_empty()),
    ];
    if let Some((field, _)) = empty.iter().find(|(_, empty)| *empty) {
        return Err(ProfileError::plan(field, 0, "must name at least one"));
    }
    if log.accesses.is_empty() {
        return Err(ProfileError::plan("steps", 0, "must be at least 1"));
    }
    let optima = in_parallel(threads(plan.threads), &plan.slots_factors, |factor| {
        Ok::<f64, ProfileError>(optimum(log, *factor))
    })?;
    let mut cells = Vec::new();
    for &policy in &plan.policies {
        for &prefetch in &plan.prefetches {
            for (&slots_factor, &optimum) in plan.slots_factors.iter().zip(&optima) {
                cells.push((Cell { policy, prefetch, slots_factor }, optimum));
            }
        }
    }
    in_parallel(threads(plan.threads), &cells, |(cell, optimum)| run(log, plan, *cell, *optimum))
}

/// Slots of one shard.
fn num_slots(log: &AccessLog, shard: usize, factor: f64) -> usize {
    let most = log.accesses.iter().map(|step| step[shard].units.len()).max().unwrap_or(0);
    (most as f64 * factor).ceil() as usize
}

fn optimum(log: &AccessLog, factor: f64) -> f64 {
    let (mut hits, mut requests) = (0, 0);
    for shard in 0..log.shards.len() {
        let steps: Vec<&[u32]> = log.accesses.iter().map(|step| &step[shard].units[..]).collect();
        let best = belady(&steps, num_slots(log, shard, factor));
        hits += best.hits;
        requests += best.requests;
    }
    hits as f64 / (requests as f64).max(1.0)
}

fn run(log: &AccessLog, plan: &SimPlan, cell: Cell, optimum: f64) -> Result<Simulated, ProfileError> {
    let mut link = SimLink::new(plan.link, log.unit_bytes);
    let mut shards: Vec<Offload> = (0..log.shards.len())
        .map(|shard| {
            let slots = num_slots(log, shard, cell.slots_factor);
            Offload::new(HotTier::new(slots, cell.policy), log.unit_bytes)
        })
        .collect();
    let layers = layers(log);
    let mut total = Fetched::default();
    let timed = timed_steps(log);
    let (mut steps, mut times) = (Vec::with_capacity(log.accesses.len()), Vec::new());
    for (t, step) in log.accesses.iter().enumerate() {
        let mut of_step = SimStep::default();
        for (i, layer) in layers.iter().enumerate() {
            let (start_us, link_from) = (link.now_us(), link.free_at_us().max(link.now_us()));
            for shard in layer.clone() {
                shards[shard].demand(&step[shard].units, &mut link)?;
            }
            // The last layer looks ahead to the first one of the next step.
            let (target, target_step) = match (cell.prefetch, layers.get(i + 1)) {
                (PrefetchKind::Last, _) => (layer, t + 1),
                (_, Some(next)) => (next, t),
                (_, None) => (&layers[0], t + 1),
            };
            for shard in target.clone() {
                let previous = (target_step > 0).then(|| &log.accesses[target_step - 1][shard].units[..]);
                let ahead = match cell.prefetch {
                    PrefetchKind::None => None,
                    PrefetchKind::Last | PrefetchKind::NextLayer => previous,
                    PrefetchKind::Predicted => {
                        log.accesses.get(target_step).map(|step| &step[shard].guess[..])
                    }
                };
                if let Some(ahead) = ahead.filter(|units| !units.is_empty()) {
                    shards[shard].prefetch(ahead, &mut link)?;
                }
            }
            let stall_us = link.end_layer();
            of_step.stall_us += stall_us;
            of_step.compute_us += link.now_us() - start_us - stall_us;
            for shard in layer.clone() {
                of_step.fetched.add(&shards[shard].finish(&step[shard].mass)?);
            }
            if timed.contains(&t) {
                let link_us = (link.free_at_us() > link_from).then(|| (link_from, link.free_at_us()));
                let (layer, end_us) = (log.shards[layer.start].layer, link.now_us());
                times.push(LayerTime { step: t, layer, start_us, stall_us, end_us, link_us });
            }
        }
        total.add(&of_step.fetched);
        steps.push(of_step);
    }
    let tokens = log.accesses.len() as f64;
    let counters = shards.iter().map(|shard| shard.tier().counters());
    let (ahead, used) = counters.fold((0, 0), |(a, u), c| (a + c.ahead, u + c.ahead_used));
    Ok(Simulated {
        cell,
        hit_rate: total.hits as f64 / (total.requests as f64).max(1.0),
        belady_hit_rate: optimum,
        bytes_per_token: total.bytes as f64 / tokens,
        prefetch_accuracy: (ahead > 0).then(|| used as f64 / ahead as f64),
        wasted_bytes_per_token: ((ahead - used) as usize * log.unit_bytes) as f64 / tokens,
        stall_us: steps.iter().map(|step| step.stall_us).sum::<f64>() / tokens,
        link_busy_us: link.busy_us() / tokens,
        steps,
        layers: times,
    })
}

/// Ranges of shards that are heads of one layer.
fn layers(log: &AccessLog) -> Vec<std::ops::Range<usize>> {
    let mut layers: Vec<std::ops::Range<usize>> = Vec::new();
    for (i, shard) in log.shards.iter().enumerate() {
        match layers.last_mut() {
            Some(range) if log.shards[range.start].layer == shard.layer => range.end = i + 1,
            _ => layers.push(i..i + 1),
        }
    }
    layers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Unit;
    use crate::profile::{Access, ShardName};
    use proptest::prelude::*;

    fn log_of(steps: Vec<Vec<u32>>) -> AccessLog {
        let access = |units: Vec<u32>| Access { mass: vec![0.1; units.len()], units, guess: Vec::new() };
        AccessLog {
            unit: Unit::Row,
            unit_bytes: 1000,
            budget: 8,
            shards: vec![ShardName { layer: 0, kv_head: 0 }],
            positions: (0..steps.len() as u64).collect(),
            accesses: steps.into_iter().map(|units| vec![access(units)]).collect(),
        }
    }

    fn stalls(cell: &Simulated) -> Vec<f64> {
        cell.steps.iter().map(|step| step.stall_us).collect()
    }

    fn plan() -> SimPlan {
        let link = LinkModel { gb_per_s: 1.0, batch_latency_us: 2.0, layer_us: 10.0, overlap: 0.0 };
        let (policies, prefetches) = (EvictionKind::ALL.to_vec(), vec![PrefetchKind::None]);
        SimPlan { policies, prefetches, slots_factors: vec![1.0, 1.5, 4.0], link, threads: 1 }
    }

    proptest! {
        #[test]
        fn no_demand_cache_beats_the_optimum_and_bytes_are_misses(
            steps in prop::collection::vec(prop::collection::btree_set(0u32..24, 1..8), 1..40),
        ) {
            let log = log_of(steps.into_iter().map(|s| s.into_iter().collect()).collect());
            let requests: usize = log.accesses.iter().map(|s| s[0].units.len()).sum();
            for cell in simulate(&log, &plan()).unwrap() {
                prop_assert!(cell.hit_rate <= cell.belady_hit_rate + 1e-12, "{:?}", cell.cell);
                let misses = (1.0 - cell.hit_rate) * requests as f64;
                prop_assert!((cell.bytes_per_token * log.accesses.len() as f64 - misses * 1000.0).abs() < 1e-6);
                let moved_us = misses + 2.0 * log.accesses.len() as f64;
                prop_assert!(cell.stall_us * log.accesses.len() as f64 <= moved_us + 1e-6);
            }
        }
    }

    #[test]
    fn stalls_follow_from_the_link_model() {
        let log = log_of(vec![vec![1, 2], vec![1, 2], vec![2, 3]]);
        let cells = simulate(&log, &SimPlan { slots_factors: vec![2.0], ..plan() }).unwrap();
        assert_eq!(stalls(&cells[0]), [4.0, 0.0, 3.0]);
        let rates: Vec<f64> = cells[0].steps.iter().map(SimStep::hit_rate).collect();
        assert_eq!(rates, [0.0, 1.0, 0.5]);
        // The same on the clock: a layer waits, then works; the link is busy while it waits.
        let clock: Vec<_> =
            cells[0].layers.iter().map(|l| (l.start_us, l.stall_us, l.end_us, l.link_us)).collect();
        assert_eq!(
            clock,
            [
                (0.0, 4.0, 14.0, Some((0.0, 4.0))),
                (14.0, 0.0, 24.0, None),
                (24.0, 3.0, 37.0, Some((24.0, 27.0)))
            ]
        );
        assert!((overlap(&log) - 0.75).abs() < 1e-12);
    }

    #[test]
    fn a_right_guess_hides_the_fetch_behind_the_layer() {
        let mut log = log_of(vec![vec![1, 2], vec![3, 4], vec![5, 6]]);
        for step in &mut log.accesses {
            step[0].guess = step[0].units.clone();
        }
        let plan = SimPlan { prefetches: vec![PrefetchKind::Predicted], slots_factors: vec![2.0], ..plan() };
        let cell = &simulate(&log, &plan).unwrap()[0];
        assert_eq!(stalls(cell), [4.0, 0.0, 0.0]);
        assert_eq!(cell.prefetch_accuracy, Some(1.0));
        assert_eq!(cell.hit_rate, 2.0 / 3.0);
    }

    #[test]
    fn what_cannot_be_simulated_is_named() {
        let log = log_of(vec![vec![1]]);
        let link = LinkModel { overlap: 2.0, ..plan().link };
        for (plan, field) in [
            (SimPlan { link, ..plan() }, "overlap"),
            (SimPlan { slots_factors: vec![-1.0], ..plan() }, "slots_factor"),
            (SimPlan { policies: Vec::new(), ..plan() }, "policies"),
        ] {
            assert!(simulate(&log, &plan).unwrap_err().to_string().contains(field));
        }
    }
}
