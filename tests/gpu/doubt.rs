//! Keys whose residuals are too long for their codes, as in the first layer of some models: heads in doubt attend everything.

use floe::gpu::{GpuEngine, GpuOptions, GpuReport, LastStep, LayerStep};
use floe::{Config, HeadShape, HotConfig, KvDtype, LayerId, SeqId};
use half::bf16;

use crate::world::{Held, Output, Random, World, error, full, world};

const D: usize = 128;
const HEADS: usize = 2;
const GROUP: usize = 4;
const SCALE: f32 = 0.09;

/// Channels of head 1 that are large and turn with the position, as a large constant does under rotary embedding.
const LOUD: [(usize, f32); 3] = [(3, 1.7), (17, 0.9), (40, 0.31)];

/// Rows or queries `[n, heads, D]` from position `first` on, of which those of kv head 1 have the large channels.
fn rows(random: &mut Random, (first, n): (usize, usize), group: usize, loud: f32) -> Vec<bf16> {
    let heads = HEADS * group;
    let mut x: Vec<f32> = (0..n * heads * D).map(|_| random.normal()).collect();
    for (i, row) in x.chunks_mut(D).enumerate() {
        let (position, head) = (first + i / heads, i % heads);
        for (channel, speed) in LOUD.iter().filter(|_| head / group == 1) {
            let angle = position as f32 * speed;
            row[*channel] += loud * angle.cos();
            row[channel + D / 2] += loud * angle.sin();
        }
    }
    x.into_iter().map(bf16::from_f32).collect()
}

struct Story {
    seq: SeqId,
    /// By kv head.
    k: [Vec<bf16>; HEADS],
    v: [Vec<bf16>; HEADS],
}

impl Story {
    fn store(&mut self, k: &[bf16], v: &[bf16]) {
        for (i, (k, v)) in k.chunks(D).zip(v.chunks(D)).enumerate() {
            self.k[i % HEADS].extend(k);
            self.v[i % HEADS].extend(v);
        }
    }

    fn len(&self) -> usize {
        self.k[0].len() / D
    }
}

fn admit(engine: &mut GpuEngine<bf16>, world: &World, random: &mut Random, tokens: usize) -> Story {
    let seq = engine.admit(None).unwrap();
    let mut story = Story { seq, k: Default::default(), v: Default::default() };
    let (k, v) = (rows(random, (0, tokens), 1, 100.0), rows(random, (0, tokens), 1, 0.0));
    let held = [&k, &v].map(|data| Held::new(world, data, [tokens, HEADS, D]));
    engine.prefill(seq, LayerId(0), (&held[0].tensor(), &held[1].tensor()), &world.stream).unwrap();
    world.stream.synchronize().unwrap();
    story.store(&k, &v);
    story
}

/// What a few steps of a short, dense sequence and a long one with slots gave.
struct Run {
    /// Mean error by kv head.
    errors: [f64; HEADS],
    outs: Vec<Vec<f32>>,
    last: Vec<LastStep>,
    report: GpuReport,
}

fn run(policy: &str, cold: bool) -> Run {
    let world = world();
    let heads = HeadShape::new(HEADS * GROUP, HEADS, D).unwrap();
    let hot = HotConfig { slots: 512, ..HotConfig::default() };
    let policy = policy.parse().unwrap();
    let config = Config { policy, hot, budget: 352, ..Config::new(1, heads, KvDtype::Bf16) };
    let options = GpuOptions { rows: 2 * HEADS * 2064, ..GpuOptions::for_load(&config, 2, 8192, 0.0) };
    let mut engine = GpuEngine::<bf16>::open(&world.device, config, options).unwrap();
    let mut random = Random(7);
    let mut stories = [1500, 4000].map(|tokens| admit(&mut engine, &world, &mut random, tokens));
    let sequences = [stories[0].seq, stories[1].seq];
    let mut run = Run {
        errors: [0.0; HEADS],
        outs: vec![],
        last: vec![],
        report: engine.report(&world.stream).unwrap(),
    };
    let steps = 40;
    for step in 0..steps {
        if step == 20 {
            for story in &mut stories {
                let keep = story.len() - 5;
                engine.truncate(story.seq, keep, &world.stream).unwrap();
                story.k.iter_mut().chain(&mut story.v).for_each(|rows| rows.truncate(keep * D));
            }
        }
        if cold {
            engine.empty_hot().unwrap();
        }
        let positions = [stories[0].len(), stories[1].len()];
        let mut of = |group: usize, loud: f32| -> Vec<bf16> {
            positions.iter().flat_map(|at| rows(&mut random, (*at, 1), group, loud)).collect()
        };
        let (q, k, v) = (of(GROUP, 2.0), of(1, 100.0), of(1, 0.0));
        let held = [
            Held::new(&world, &q, [2, HEADS * GROUP, D]),
            Held::new(&world, &k, [2, HEADS, D]),
            Held::new(&world, &v, [2, HEADS, D]),
        ];
        let out = Output::new(&world, [2, HEADS * GROUP, D]);
        let [q_new, k_new, v_new] = [held[0].tensor(), held[1].tensor(), held[2].tensor()];
        let layer_step = LayerStep {
            layer: LayerId(0),
            sequences: &sequences,
            positions: &positions,
            q: q_new,
            k_new,
            v_new,
            scale: SCALE,
            out: out.tensor(),
        };
        engine.attend(&layer_step, &world.stream).unwrap();
        let got = out.read(&world);
        for (i, story) in stories.iter_mut().enumerate() {
            story.store(&k[i * HEADS * D..(i + 1) * HEADS * D], &v[i * HEADS * D..(i + 1) * HEADS * D]);
            for head in 0..HEADS {
                let at = (i * HEADS + head) * GROUP * D..(i * HEADS + head + 1) * GROUP * D;
                let want = full(&q[at.clone()], (&story.k[head], &story.v[head]), D, SCALE);
                run.errors[head] += error(&got[at], &want, D) / f64::from(2 * steps);
            }
        }
        run.outs.push(got);
    }
    run.last = engine.last_step(&sequences, &world.stream).unwrap();
    run.report = engine.report(&world.stream).unwrap();
    run
}

#[test]
fn heads_in_doubt_attend_everything_and_the_others_select() {
    for sketch in ["k1", "k2v1"] {
        let policy = format!("pagemean:sketch={sketch},tail=page");
        let (with, without) = (run(&policy, false), run(&format!("{policy},max_doubt=1000"), false));
        let shares = (with.report.doubt_rate(), without.report.doubt_rate());
        println!("{sketch}: errors {:?}, without {:?}; in doubt {shares:?}", with.errors, without.errors);
        assert_eq!(with.report.exact_steps, 0, "the long sequence does not lie densely");
        assert_eq!(shares, (0.5, 0.0));
        // bf16 weights, as everywhere; without, estimates are off by five to ten nats.
        assert!(with.errors[1] < 1.0 / 128.0, "{:?}", with.errors);
        assert!(without.errors[1] > 10.0 * with.errors[1], "{:?} {:?}", with.errors, without.errors);
        assert!((with.errors[0] - without.errors[0]).abs() < 1e-6, "the calm head selects either way");
        for (item, last) in with.last.iter().enumerate() {
            assert_eq!((last.in_doubt, last.exact), (item % HEADS == 1, item % HEADS == 1), "item {item}");
            assert_eq!(last.retrieved.is_empty(), item % HEADS == 1, "item {item}");
            assert!(last.exact_lse.iter().all(|lse| lse.is_finite()));
        }
        // What is hot changes no bit of it.
        let cold = run(&policy, true);
        for (step, (a, b)) in with.outs.iter().zip(&cold.outs).enumerate() {
            assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{sketch}: step {step}");
        }
    }
}
