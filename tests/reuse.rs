//! Decode reuse in the whole engine: what it may answer for, what it must see, and what it learns.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Layer, config, worst_error};
use floe::reuse::ReuseReport;
use floe::{Config, DecodeStep, Engine, HeadShape, KvDtype, LayerId, SeqId, StepReport, TensorView};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIM: usize = 32;
const HEADS: usize = 2;

/// Keys, values, and queries before and after rotary embedding, one kv head; written by each test as it needs.
struct Stream {
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
    q_pre: Vec<f32>,
    prefill: usize,
}

impl Stream {
    fn num_tokens(&self) -> usize {
        self.k.len() / DIM
    }

    /// Decodes everything after the prefill: per step the errors of the heads and what the cache did.
    fn run(&self, policy: &str) -> Vec<(Vec<f64>, ReuseReport)> {
        let heads = HeadShape::new(HEADS, 1, DIM).unwrap();
        let config =
            Config { policy: policy.parse().unwrap(), threads: 1, ..Config::new(1, heads, KvDtype::F32) };
        let mut engine = Engine::open(config).unwrap();
        let seq = engine.admit().unwrap();
        let rows = |x: &'static str, from: usize, to: usize| {
            let data = if x == "k" { &self.k } else { &self.v };
            TensorView::contiguous(&data[from * DIM..to * DIM], [to - from, 1, DIM]).unwrap()
        };
        let n = self.prefill;
        engine.prefill(seq, LayerId(0), &rows("k", 0, n), &rows("v", 0, n)).unwrap();
        let (mut out, mut report) = (vec![0.0; HEADS * DIM], StepReport::default());
        let steps = n..self.num_tokens();
        steps
            .map(|position| {
                let of = (position - n) * HEADS * DIM..(position - n + 1) * HEADS * DIM;
                let shape = [1, HEADS, DIM];
                let step = DecodeStep {
                    layer: LayerId(0),
                    position,
                    q: TensorView::contiguous(&self.q[of.clone()], shape).unwrap(),
                    q_pre: Some(TensorView::contiguous(&self.q_pre[of.clone()], shape).unwrap()),
                    k_new: rows("k", position, position + 1),
                    v_new: rows("v", position, position + 1),
                    scale: (DIM as f32).powf(-0.5),
                };
                engine.decode(seq, &step, &mut out, &mut report).unwrap();
                let errors = (0..HEADS).map(|head| self.error(&self.q[of.clone()], &out, position, head));
                (errors.collect(), report.shards[0].reuse)
            })
            .collect()
    }

    /// Relative error of one head against f64 attention over `0..=position`.
    fn error(&self, q: &[f32], out: &[f32], position: usize, head: usize) -> f64 {
        let q = &q[head * DIM..][..DIM];
        let dot = |t: usize| -> f64 {
            q.iter().zip(&self.k[t * DIM..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
        };
        let logits: Vec<f64> = (0..=position).map(|t| dot(t) * (DIM as f64).powf(-0.5)).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        let mut want = [0.0; DIM];
        for (t, logit) in logits.iter().enumerate() {
            let weight = (logit - max).exp() / total;
            want.iter_mut().zip(&self.v[t * DIM..]).for_each(|(w, v)| *w += weight * f64::from(*v));
        }
        let square = |x: f64| x * x;
        let off: f64 = out[head * DIM..].iter().zip(want).map(|(o, w)| square(f64::from(*o) - w)).sum();
        (off / want.iter().map(|w| w * w).sum::<f64>()).sqrt()
    }
}

fn noise(rng: &mut ChaCha8Rng, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.87 * size).collect()
}

/// Rotary embedding, halves paired, of one head at `position`.
fn rotate(x: &[f32], position: usize) -> Vec<f32> {
    let half = DIM / 2;
    let mut out = x.to_vec();
    for i in 0..half {
        let angle = position as f64 * 10_000f64.powf(-(i as f64) / half as f64);
        let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
        out[i] = x[i] * cos - x[i + half] * sin;
        out[i + half] = x[i + half] * cos + x[i] * sin;
    }
    out
}

/// Errors of reused outputs in the second half of the steps, ascending.
fn late_errors(steps: &[(Vec<f64>, ReuseReport)]) -> Vec<f64> {
    let late = steps[steps.len() / 2..].iter().filter(|(_, report)| report.heads_reused > 0);
    let mut errors: Vec<f64> = late.flat_map(|(errors, _)| errors.clone()).collect();
    errors.sort_by(f64::total_cmp);
    errors
}

fn p95(errors: &[f64]) -> f64 {
    errors.get(errors.len() * 95 / 100).copied().unwrap_or(0.0)
}

fn reused(steps: &[(Vec<f64>, ReuseReport)]) -> usize {
    steps.iter().filter(|(_, report)| report.heads_reused == HEADS).count()
}

/// One query again and again, after rotary embedding too: what is kept is exact.
fn steady(num_steps: usize) -> Stream {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (prefill, n) = (600, 600 + num_steps);
    let (k, v) = (noise(&mut rng, n * DIM, 1.0), noise(&mut rng, n * DIM, 1.0));
    let q = noise(&mut rng, HEADS * DIM, 1.5).repeat(num_steps);
    Stream { k, v, q_pre: q.clone(), q, prefill }
}

#[test]
fn a_forced_match_reuses_and_is_exact_when_nothing_moved() {
    let stream = steady(200);
    for policy in ["mac:min=0,band=32", "reuse:min=0"] {
        let steps = stream.run(policy);
        assert!(steps.iter().flat_map(|(errors, _)| errors).all(|e| *e < 1e-4), "{policy}");
        let reused = reused(&steps);
        assert!(reused >= 130, "{policy}: {reused} of 200");
        let read = steps[150..].iter().map(|(_, r)| r.tokens_read).min().unwrap();
        assert!(read < 200, "{policy}: {read} tokens at least");
    }
}

#[test]
fn equal_queries_at_another_position_are_other_questions_to_rotated_keys() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (prefill, num_steps) = (1200, 400);
    let n = prefill + num_steps;
    let rotated = |x: &[f32], heads: usize, first: usize| -> Vec<f32> {
        let rows = x.chunks_exact(DIM).enumerate();
        rows.flat_map(|(i, row)| rotate(row, first + i / heads)).collect()
    };
    let k = rotated(&noise(&mut rng, n * DIM, 1.0), 1, 0);
    let v = noise(&mut rng, n * DIM, 1.0);
    let q_pre = noise(&mut rng, HEADS * DIM, 2.5).repeat(num_steps);
    let q = rotated(&q_pre, HEADS, prefill);
    let stream = Stream { k, v, q, q_pre, prefill };
    // The published match sees distance zero and reuses every step: it knows nothing of the phase.
    let mac = stream.run("mac:min=0,band=64");
    assert_eq!(reused(&mac[1..]), num_steps - 1);
    let mac_p95 = p95(&late_errors(&mac));
    assert!(mac_p95 > 0.3, "{mac_p95}");
    // Measuring sees it.
    let own = stream.run("reuse:min=0,max_error=0.05");
    let own_p95 = p95(&late_errors(&own));
    assert!(own_p95 <= 0.055, "{own_p95}");
}

#[test]
fn a_needle_that_enters_after_the_anchor_is_always_seen() {
    for policy in ["mac:min=0,band=32", "reuse:min=0"] {
        let mut stream = steady(200);
        let at = stream.prefill + 150;
        // A key along both queries outweighs everything else from the moment it is there.
        for i in 0..DIM {
            stream.k[at * DIM + i] = 3.0 * (stream.q[i] + stream.q[DIM + i]);
        }
        let steps = stream.run(policy);
        assert!(steps[..150].iter().any(|(_, r)| r.heads_reused > 0));
        assert!(steps[150..].iter().flat_map(|(errors, _)| errors).all(|e| *e < 1e-3), "{policy}");
        assert!(reused(&steps[150..]) > 20, "{policy}: reuse goes on around it");
    }
}

#[test]
fn needles_among_what_is_kept_spoil_the_published_reuse_but_not_the_measured_one() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let num_steps = 1200;
    let mut stream = steady(num_steps);
    // One step in five asks for a token far behind that no other step looks at, with a query still near the others.
    let needle = noise(&mut rng, DIM, 1.0);
    let norm = needle.iter().map(|x| x * x).sum::<f32>().sqrt();
    let unit: Vec<f32> = needle.iter().map(|x| x / norm).collect();
    stream.k[300 * DIM..301 * DIM].iter_mut().zip(&unit).for_each(|(k, u)| *k = u * 25.0);
    for head in stream.q.chunks_exact_mut(DIM) {
        let along: f32 = head.iter().zip(&unit).map(|(q, u)| q * u).sum();
        head.iter_mut().zip(&unit).for_each(|(q, u)| *q -= along * u);
    }
    for step in stream.q.chunks_exact_mut(HEADS * DIM).filter(|_| rng.random_range(0..5) == 0) {
        step.chunks_exact_mut(DIM)
            .for_each(|head| head.iter_mut().zip(&unit).for_each(|(q, u)| *q += 3.0 * u));
    }
    stream.q_pre.clone_from(&stream.q);
    let mac = stream.run("mac:min=0,band=32,ring=8");
    let mac_p95 = p95(&late_errors(&mac));
    assert!(mac_p95 > 0.3, "{mac_p95}");
    let own_p95 = p95(&late_errors(&stream.run("reuse:min=0,max_error=0.05")));
    assert!(own_p95 <= 0.055, "{own_p95}");
}

const PREFILL: usize = 700;

fn setup(policy: &str) -> (Layer, Config, Engine, SeqId) {
    let heads = HeadShape::new(4, 2, 16).unwrap();
    let layer = Layer::random(heads, 960, 40);
    let config = config(heads, policy, 128);
    let mut engine = Engine::open(config.clone()).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..PREFILL);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    (layer, config, engine, seq)
}

/// Outputs of the steps, and how many kv heads reused.
fn decode(
    layer: &Layer,
    engine: &mut Engine,
    seq: SeqId,
    steps: std::ops::Range<usize>,
) -> (Vec<Vec<f32>>, usize) {
    let mut reused = 0;
    let outputs = steps.map(|position| {
        let (out, report) = layer.decode(engine, seq, 0, position);
        reused += report.shards.iter().filter(|s| s.reuse.heads_reused > 0).count();
        out
    });
    (outputs.collect(), reused)
}

const POLICIES: [&str; 4] = [
    "mac:min=0,band=32,ring=64",
    "reuse:min=0,max_error=0.9",
    "floe:reuse=on,max_error=0.9",
    "pagemean:tail=page,reuse=on,max_error=0.9",
];

/// `min` is no option of the sparse policies, whose default of 2,048 tokens these tests are too short for.
fn short(policy: &str) -> floe::Policy {
    let policy: floe::Policy = policy.parse().unwrap();
    match *policy.reuse() {
        floe::reuse::ReuseKind::Calibrated(options) => {
            policy.with_reuse(floe::reuse::ReuseKind::Calibrated(floe::reuse::CalibratedOptions {
                min_tokens: 0,
                ..options
            }))
        }
        _ => policy,
    }
}

#[test]
fn a_fork_and_a_restored_sequence_reuse_as_the_original_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.kv");
    for policy in POLICIES {
        let (layer, config, mut engine, seq) = setup(policy);
        engine.set_policy(short(policy), config.budget).unwrap();
        decode(&layer, &mut engine, seq, PREFILL..PREFILL + 120);
        engine.save(seq, &path).unwrap();
        let fork = engine.fork(seq).unwrap();
        let mut other = Engine::open(engine.config().clone()).unwrap();
        let restored = other.restore(&path).unwrap();
        let rest = PREFILL + 120..960;
        let (expected, reused) = decode(&layer, &mut engine, seq, rest.clone());
        assert!(reused > 20, "{policy}: {reused} reused after 120 steps");
        assert!(decode(&layer, &mut engine, fork, rest.clone()).0 == expected, "{policy}: fork");
        assert!(decode(&layer, &mut other, restored, rest).0 == expected, "{policy}: restored");
        let summary = engine.reuse_summary(seq, LayerId(0)).unwrap();
        assert!(summary.len() == 2 && summary[0].entries > 0 && summary[0].size_bytes > 0, "{policy}");
    }
}

#[test]
fn a_rewound_sequence_never_uses_what_came_from_the_refused_tokens() {
    for policy in POLICIES {
        let (layer, config, mut engine, seq) = setup(policy);
        engine.set_policy(short(policy), config.budget).unwrap();
        decode(&layer, &mut engine, seq, PREFILL..PREFILL + 100);
        for round in 0..40 {
            // Eight drafts, of which round % 8 are kept.
            let from = PREFILL + 100 + (0..round).map(|r| r % 8).sum::<usize>();
            for position in from..from + 8 {
                let (_, report) = layer.decode(&mut engine, seq, 0, position);
                for shard in &report.shards {
                    assert!(!shard.reuse.active || shard.reuse.lag <= position);
                }
            }
            engine.truncate(seq, from + round % 8).unwrap();
        }
        let position = engine.num_tokens(seq, LayerId(0)).unwrap();
        let (out, report) = layer.decode(&mut engine, seq, 0, position);
        assert!(out.iter().all(|x| x.is_finite()));
        for shard in report.shards.iter().filter(|s| s.reuse.heads_reused > 0) {
            assert!(shard.reuse.lag >= 1);
        }
    }
}

#[test]
fn without_queries_before_rotary_embedding_nothing_is_reused() {
    let (layer, _, mut engine, seq) = setup("mac:min=0");
    let (k_new, v_new) = layer.rows(PREFILL..PREFILL + 1);
    let q = layer.queries(PREFILL..PREFILL + 1);
    let step = DecodeStep {
        layer: LayerId(0),
        position: PREFILL,
        q,
        q_pre: None,
        k_new,
        v_new,
        scale: layer.scale(),
    };
    let (mut out, mut report) = (vec![0.0; 64], StepReport::default());
    engine.decode(seq, &step, &mut out, &mut report).unwrap();
    assert!(report.shards.iter().all(|s| !s.reuse.active && s.tokens_attended == PREFILL + 1));
    assert!(worst_error(&out, &layer.oracle(PREFILL)) < 1e-4);
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let heads = HeadShape::new(4, 2, 16).unwrap();
    let reuse = floe::reuse::ReuseKind::Calibrated(floe::reuse::CalibratedOptions {
        max_error: 1.5,
        ..Default::default()
    });
    let policy = "full".parse::<floe::Policy>().unwrap().with_reuse(reuse);
    let Err(error) = Engine::open(Config { policy, ..Config::new(1, heads, KvDtype::Bf16) }) else {
        panic!("a bound of 150 % was taken");
    };
    assert!(error.to_string().contains("`reuse.max_error` = 1.5"), "{error}");
}
