//! Every cache against a brute-force world: what it asks for, and what it makes of the answers.

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::shape::{HeadShape, KvDtype};

const GROUP: usize = 2;
const DIM: usize = 16;

/// Keys, values and queries of one shard, and attention over any of its tokens in f64.
struct World {
    /// `[tokens, DIM]`
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl World {
    /// Keys of zero: every token weighs the same under any query, so a kept state is exact for every later one, and
    /// the answer over a set of tokens tells how often each of them was counted.
    fn level(num: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let values = (0..num * DIM).map(|_| rng.random_range(-1.0..1.0)).collect();
        Self { keys: vec![0.0; num * DIM], values }
    }

    fn random(num: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = || (0..num * DIM).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        Self { keys: draw(), values: draw() }
    }

    fn logit(&self, q: &[f32], token: u32) -> f64 {
        let key = &self.keys[token as usize * DIM..][..DIM];
        q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
    }

    fn attend(&self, q: &[f32], tokens: impl Iterator<Item = u32> + Clone) -> StateBuf {
        let mut state = StateBuf::default();
        state.reset(GROUP, DIM);
        for (head, q) in q.chunks_exact(DIM).enumerate() {
            let max = tokens.clone().map(|t| self.logit(q, t)).fold(f64::NEG_INFINITY, f64::max);
            let (mut sum, mut out) = (0.0, [0.0f64; DIM]);
            for token in tokens.clone() {
                let weight = (self.logit(q, token) - max).exp();
                sum += weight;
                let value = &self.values[token as usize * DIM..][..DIM];
                out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * f64::from(*v));
            }
            if sum > 0.0 {
                state.lse[head] = (max + sum.ln()) as f32;
                state.out[head * DIM..][..DIM].iter_mut().zip(out).for_each(|(s, o)| *s = (o / sum) as f32);
            }
        }
        state
    }

    /// One step: answers everything the cache asks. Also returns the tokens that were read.
    fn step(&self, cache: &mut dyn ReuseCache, q: &[f32], position: u32) -> Option<(StateBuf, Vec<u32>)> {
        if !cache.begin(&ReuseQuery { q_pre: q, position }) {
            return None;
        }
        let mut read = Vec::new();
        while let Some(ask) = cache.ask() {
            let tokens: Vec<u32> = match &ask {
                Ask::Range(range) | Ask::Logits(range) => range.clone().collect(),
                Ask::List(list) | Ask::LogitsOf(list) => list.to_vec(),
            };
            assert!(tokens.is_sorted_by(|a, b| a < b) && tokens.last().is_none_or(|t| *t <= position));
            if matches!(ask, Ask::Logits(_) | Ask::LogitsOf(_)) {
                let of_head = |q| tokens.iter().map(move |t| self.logit(q, *t) as f32);
                let mut logits: Vec<f32> = q.chunks_exact(DIM).flat_map(of_head).collect();
                cache.answer_logits(&mut logits);
            } else {
                let part = self.attend(q, tokens.iter().copied());
                read.extend_from_slice(&tokens);
                cache.answer(&part).unwrap();
            }
        }
        let mut state = StateBuf::default();
        let outcome = cache.finish(&mut state).unwrap();
        (outcome == Outcome::Attended).then_some((state, read))
    }
}

fn config(spec: &str) -> Config {
    let heads = HeadShape::new(GROUP, 1, DIM).unwrap();
    Config { policy: spec.parse().unwrap(), sinks: 4, window: 16, ..Config::new(1, heads, KvDtype::F32) }
}

fn assert_same(got: &StateBuf, want: &StateBuf, tolerance: f32) {
    for (a, b) in got.out.iter().zip(&want.out).chain(got.lse.iter().zip(&want.lse)) {
        assert!((a - b).abs() <= tolerance, "{a} is not {b}");
    }
}

/// A query of one of a few kinds, so that some steps match and others do not.
fn query(rng: &mut ChaCha8Rng) -> Vec<f32> {
    let kind = rng.random_range(0..4) as f32;
    (0..GROUP * DIM).map(|i| (kind * 1.7 + i as f32).sin() * 2.0 + rng.random_range(-0.1..0.1)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is asked for and whatever a kept state stands for: every token counts exactly once.
    #[test]
    fn coverage_tiles_the_context(
        seed in 0u64..1000,
        start in 1u32..400,
        spec in prop::sample::select(vec![
            "mac:min=0,ring=16,band=8", "mac:min=0,ring=64,band=32,sinks=6", "mac:min=0,ring=5,band=1,tau=0.2",
            "reuse:min=0,refresh=4,lottery=0.2", "reuse:min=0,refresh=9,anchors=2", "reuse:min=100,refresh=5,anchors=1",
        ]),
    ) {
        let (world, mut rng) = (World::level(800), ChaCha8Rng::seed_from_u64(seed));
        let config = config(spec);
        let mut cache = cache(&config, 0);
        let mut position = start;
        let mut reused = 0;
        for _ in 0..260 {
            match rng.random_range(0..40) {
                0 => {
                    // Speculation refused: some positions come again, with other queries.
                    position -= rng.random_range(0..position.min(20));
                    cache.truncate(position);
                }
                1 => cache = cache.fork(),
                2 => {
                    let bytes = cache.snapshot().unwrap();
                    cache = super::cache(&config, 0);
                    prop_assert!(cache.restore(&bytes));
                }
                _ => {}
            }
            let q = query(&mut rng);
            if let Some((state, read)) = world.step(&mut *cache, &q, position) {
                assert_same(&state, &world.attend(&q, 0..position + 1), 2e-5);
                let mut once = read.clone();
                once.sort_unstable();
                once.dedup();
                prop_assert_eq!(once.len(), read.len(), "a token is read at most once a step");
                let report = cache.report();
                prop_assert_eq!(report.tokens_read, read.len());
                prop_assert!(report.heads_reused > 0 || read.len() == position as usize + 1);
                reused += usize::from(report.heads_reused > 0);
            }
            position += 1;
        }
        prop_assert!(reused > 10, "{} reused of 260", reused);
    }
}

/// The published recurrence, written down once more with whole states and no ring arithmetic.
struct Published {
    /// Position, query, and per head the state over `[sinks, end)`.
    entries: Vec<(u32, Vec<f32>, StateBuf)>,
}

impl Published {
    fn step(&mut self, world: &World, q: &[f32], position: u32, options: &MacOptions) -> StateBuf {
        let end = |p: u32| (p + 1).saturating_sub(options.band as u32).max(options.sinks as u32);
        let bound = 2.0 * DIM as f32 * (1.0 - options.tau).powi(2);
        let (mut body, mut out) = (StateBuf::default(), StateBuf::default());
        body.reset(GROUP, DIM);
        out.reset(GROUP, DIM);
        for head in 0..GROUP {
            let of = |x: &[f32]| x[head * DIM..][..DIM].to_vec();
            let distance = |a: &[f32]| accumulate::distance(&of(a), &of(q)).powi(2);
            let in_ring = self.entries.iter().filter(|e| position - e.0 <= options.ring as u32);
            let nearest = in_ring.min_by(|a, b| distance(&a.1).total_cmp(&distance(&b.1)));
            let hit = nearest.filter(|e| distance(&e.1) < bound && e.2.lse[head].is_finite());
            let start = hit.map_or(options.sinks as u32, |e| end(e.0));
            let mut state = world.attend(q, start..end(position));
            if let Some((_, _, earlier)) = hit {
                accumulate::merge_head(&mut state, earlier, head).unwrap();
            }
            accumulate::merge_head(&mut body, &state, head).unwrap();
        }
        let now = position + 1;
        out.merge(&body).unwrap();
        out.merge(&world.attend(q, (0..options.sinks as u32).chain(end(position)..now))).unwrap();
        self.entries.push((position, q.to_vec(), body));
        out
    }
}

#[test]
fn mac_equals_the_published_recurrence_over_512_steps_with_wrap_around() {
    let (world, mut rng) = (World::random(800, 11), ChaCha8Rng::seed_from_u64(12));
    for sinks in [0, 5] {
        let spec = format!("mac:min=0,ring=48,band=24,tau=0.5,sinks={sinks}");
        let config = config(&spec);
        let ReuseKind::Mac(options) = *config.policy.reuse() else { unreachable!() };
        let (mut cache, mut published) = (Mac::new(&config, options), Published { entries: Vec::new() });
        let (mut all, mut mixed, mut none, mut deepest) = (0, 0, 0, 0);
        for position in 200..712 {
            let mut q = query(&mut rng);
            if rng.random_range(0..10) == 0 {
                q[..DIM].iter_mut().for_each(|x| *x += rng.random_range(-3.0..3.0));
            }
            let (state, _) = world.step(&mut cache, &q, position).unwrap();
            let expected = published.step(&world, &q, position, &options);
            assert_same(&state, &expected, 1e-3);
            let report = cache.report();
            deepest = deepest.max(report.lineage);
            match report.heads_reused {
                GROUP => all += 1,
                0 => none += 1,
                _ => mixed += 1,
            }
        }
        assert!(all > 300 && mixed > 10 && none > 0, "{all} {mixed} {none}");
        assert!(deepest > 20, "chains are part of the published method: {deepest}");
    }
}

#[test]
fn calibrated_over_512_steps_never_chains_and_its_anchors_hold_what_they_say() {
    let (world, mut rng) = (World::random(900, 21), ChaCha8Rng::seed_from_u64(22));
    let config = config("reuse:min=0,max_error=0.1,refresh=16,anchors=4");
    let ReuseKind::Calibrated(options) = *config.policy.reuse() else { unreachable!() };
    let mut cache = Calibrated::new(&config, options, 0);
    let (mut errors, mut whole) = (Vec::new(), 0);
    for position in 300..812 {
        let q = query(&mut rng);
        let (state, read) = world.step(&mut cache, &q, position).unwrap();
        let exact = world.attend(&q, 0..position + 1);
        let report = cache.report();
        if report.heads_reused == 0 {
            assert_same(&state, &exact, 1e-4);
            assert_eq!(read.len(), position as usize + 1);
            whole += 1;
        } else {
            assert_eq!(report.lineage, 1);
            for head in 0..GROUP {
                let (got, want) = (&state.out[head * DIM..][..DIM], &exact.out[head * DIM..][..DIM]);
                errors.push(accumulate::distance(got, want) / accumulate::norm(want));
            }
        }
    }
    assert!(errors.len() > 300 && whole > 50, "{} reused outputs, {whole} whole steps", errors.len());
    errors.sort_by(f32::total_cmp);
    let p95 = errors[errors.len() * 95 / 100];
    assert!(p95 <= 0.11, "{p95}");
}

#[test]
fn nothing_matches_a_threshold_that_nothing_can_meet() {
    let (world, mut rng) = (World::random(400, 1), ChaCha8Rng::seed_from_u64(2));
    let mut mac = cache(&config("mac:min=0,tau=1"), 0);
    for position in 100..200 {
        let q = query(&mut rng);
        let (state, read) = world.step(&mut *mac, &q, position).unwrap();
        assert_same(&state, &world.attend(&q, 0..position + 1), 1e-4);
        assert_eq!((mac.report().heads_matched, read.len()), (0, position as usize + 1));
    }
    assert_eq!(mac.summary().entries, 100);
}

#[test]
fn a_shard_that_cannot_meet_its_bound_stops_asking() {
    let (world, mut rng) = (World::random(2500, 5), ChaCha8Rng::seed_from_u64(6));
    let mut cache = cache(&config("reuse:min=0,max_error=0.000001"), 0);
    let mut asked = 0;
    for position in 300..900 {
        let q: Vec<f32> = (0..GROUP * DIM).map(|_| rng.random_range(-2.0..2.0)).collect();
        let step = world.step(&mut *cache, &q, position);
        asked += usize::from(step.is_some());
        assert!(step.is_none() || cache.report().heads_reused == 0);
    }
    let summary = cache.summary();
    assert!(summary.resting && asked < 160, "{asked} steps asked");
    assert!(summary.thresholds.iter().any(|t| t.is_nan()));
}

#[test]
fn truncation_drops_what_saw_the_future_and_ends_a_step_under_way() {
    let (world, mut rng) = (World::random(700, 7), ChaCha8Rng::seed_from_u64(8));
    for spec in ["mac:min=0,band=16,ring=64", "reuse:min=0,refresh=2,anchors=64"] {
        let mut cache = cache(&config(spec), 0);
        let q = query(&mut rng);
        for position in 300..340 {
            world.step(&mut *cache, &q, position);
        }
        // An epoch passes between the questions and the end: what was answered is void.
        assert!(cache.begin(&ReuseQuery { q_pre: &q, position: 340 }));
        cache.truncate(320);
        let mut state = StateBuf::default();
        assert_eq!(cache.finish(&mut state).unwrap(), Outcome::Declined);
        assert!(cache.summary().entries > 0, "{spec}: entries before position 320 stay");
        world.step(&mut *cache, &q, 320).unwrap();
        let lag = cache.report().lag;
        // All queries are equal: the published cache takes the first such slot, ours the newest anchor.
        let oldest = if spec.starts_with("mac") { 20 } else { 2 };
        assert!((1..=oldest).contains(&lag), "{spec}: entries left are those before 320, lag {lag}");
        cache.truncate(0);
        assert_eq!(cache.summary().entries, 0, "{spec}");
    }
}

#[test]
fn damaged_snapshots_are_refused_and_forks_go_their_own_way() {
    let (world, mut rng) = (World::random(700, 9), ChaCha8Rng::seed_from_u64(10));
    for spec in ["mac:min=0,band=16,ring=32", "reuse:min=0,refresh=4"] {
        let config = config(spec);
        let mut first = cache(&config, 0);
        for position in 300..380 {
            let q = query(&mut rng);
            world.step(&mut *first, &q, position);
        }
        let bytes = first.snapshot().unwrap();
        for len in [0, 8, bytes.len() / 2, bytes.len() - 1] {
            assert!(!cache(&config, 0).restore(&bytes[..len]), "{spec}: {len} of {} bytes", bytes.len());
        }
        let (mut fork, mut restored) = (first.fork(), cache(&config, 0));
        assert!(restored.restore(&bytes));
        let q = query(&mut rng);
        let expected = world.step(&mut *first, &q, 380).unwrap();
        assert_eq!(world.step(&mut *fork, &q, 380).unwrap(), expected, "{spec}");
        assert_eq!(world.step(&mut *restored, &q, 380).unwrap(), expected, "{spec}");
        fork.truncate(0);
        assert!(first.summary().entries > 0);
        assert_eq!(first.snapshot().is_some(), restored.snapshot().is_some());
    }
}
