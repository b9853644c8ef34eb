//! Batches of unequal lengths, sequences that come and go, growth from dense to slots.

use floe::gpu::{GpuEngine, GpuOptions, LayerStep, Prefer};
use floe::{Config, HeadShape, HotConfig, KvDtype, LayerId, SeqId};
use half::bf16;

use crate::world::{Held, Output, Random, World, error, full, world};

pub const D: usize = 128;
pub const HEADS: usize = 2;
pub const GROUP: usize = 4;

/// A sequence with everything that was stored, by kv head.
#[derive(Clone)]
pub struct Story {
    pub seq: SeqId,
    pub k: Vec<Vec<bf16>>,
    pub v: Vec<Vec<bf16>>,
}

pub struct Stage<'a> {
    pub world: &'a World,
    pub engine: GpuEngine<bf16>,
    pub random: Random,
}

impl Stage<'_> {
    pub fn admit(&mut self, tokens: usize) -> Story {
        let seq = self.engine.admit(None).unwrap();
        let mut story = Story { seq, k: vec![vec![]; HEADS], v: vec![vec![]; HEADS] };
        self.prefill(&mut story, tokens);
        story
    }

    pub fn prefill(&mut self, story: &mut Story, tokens: usize) {
        if tokens == 0 {
            return;
        }
        for layer in 0..2 {
            let (k, v) = (self.random.normals(tokens * HEADS * D), self.random.normals(tokens * HEADS * D));
            if layer == 0 {
                story.store(&k, &v);
            }
            let (k, v) = (
                Held::new(self.world, &k, [tokens, HEADS, D]),
                Held::new(self.world, &v, [tokens, HEADS, D]),
            );
            self.engine
                .prefill(story.seq, LayerId(layer), (&k.tensor(), &v.tensor()), &self.world.stream)
                .unwrap();
            self.world.stream.synchronize().unwrap();
        }
    }

    /// One token of each sequence in one layer; its outputs, [sequences, query heads, D].
    pub fn attend(&mut self, (sequences, layer): (&[SeqId], LayerId), rows: [&[bf16]; 3]) -> Vec<f32> {
        let b = sequences.len();
        let positions: Vec<usize> =
            sequences.iter().map(|&seq| self.engine.num_tokens(seq, layer).unwrap()).collect();
        let [q, k, v] = rows;
        let held = [
            Held::new(self.world, q, [b, HEADS * GROUP, D]),
            Held::new(self.world, k, [b, HEADS, D]),
            Held::new(self.world, v, [b, HEADS, D]),
        ];
        let out = Output::new(self.world, [b, HEADS * GROUP, D]);
        let step = LayerStep {
            layer,
            sequences,
            positions: &positions,
            q: held[0].tensor(),
            k_new: held[1].tensor(),
            v_new: held[2].tensor(),
            scale: 0.3,
            out: out.tensor(),
        };
        self.engine.attend(&step, &self.world.stream).unwrap();
        out.read(self.world)
    }

    /// One step of layer 0 (and of layer 1, whose output nobody looks at); largest error against full attention.
    pub fn step(&mut self, stories: &mut [&mut Story]) -> f64 {
        let b = stories.len();
        let mut worst = 0.0f64;
        for layer in 0..2 {
            let q = self.random.normals(b * HEADS * GROUP * D);
            let (k, v) = (self.random.normals(b * HEADS * D), self.random.normals(b * HEADS * D));
            let sequences: Vec<SeqId> = stories.iter().map(|story| story.seq).collect();
            let out = self.attend((&sequences, LayerId(layer)), [&q, &k, &v]);
            if layer > 0 {
                continue;
            }
            for (i, story) in stories.iter_mut().enumerate() {
                story.store(&k[i * HEADS * D..(i + 1) * HEADS * D], &v[i * HEADS * D..(i + 1) * HEADS * D]);
                for head in 0..HEADS {
                    let at = (i * HEADS + head) * GROUP * D;
                    let want = full(&q[at..at + GROUP * D], (&story.k[head], &story.v[head]), D, 0.3);
                    worst = worst.max(error(&out[at..at + GROUP * D], &want, D));
                }
            }
        }
        worst
    }
}

impl Story {
    pub fn store(&mut self, k: &[bf16], v: &[bf16]) {
        for (k, v) in k.chunks(HEADS * D).zip(v.chunks(HEADS * D)) {
            for head in 0..HEADS {
                self.k[head].extend(&k[head * D..(head + 1) * D]);
                self.v[head].extend(&v[head * D..(head + 1) * D]);
            }
        }
    }
}

pub fn stage(world: &World, rows_of_each: usize, prefer: Prefer) -> Stage<'_> {
    let heads = HeadShape::new(HEADS * GROUP, HEADS, D).unwrap();
    let hot = HotConfig { slots: 1024, ..HotConfig::default() };
    let policy = "pagemean:sketch=k1,tail=page".parse().unwrap();
    let config = Config { policy, hot, budget: 1024, ..Config::new(2, heads, KvDtype::Bf16) };
    let rows = 5 * HEADS * rows_of_each;
    let options = GpuOptions { rows, prefer, ..GpuOptions::for_load(&config, 5, 8192, 0.0) };
    let engine = GpuEngine::open(&world.device, config, options).unwrap();
    Stage { world, engine, random: Random(rows as u64) }
}

/// bf16 weights, and sums of a few hundred of them.
pub const CLOSE: f64 = 1.0 / 128.0;

#[test]
fn unequal_lengths_join_and_leave_and_stay_exact_while_they_fit() {
    let world = world();
    let mut stage = stage(&world, 8192, Prefer::Exact);
    let mut a = stage.admit(1);
    let mut b = stage.admit(1023);
    let mut c = stage.admit(3000);
    for step in 0..6 {
        let far = stage.step(&mut [&mut a, &mut b, &mut c]);
        assert!(far < CLOSE, "step {step}: {far}");
    }
    assert!(stage.step(&mut [&mut c, &mut a]) < CLOSE);
    stage.engine.close(b.seq).unwrap();
    let mut d = stage.admit(700);
    stage.prefill(&mut d, 900);
    for step in 0..4 {
        let far = stage.step(&mut [&mut d, &mut a, &mut c]);
        assert!(far < CLOSE, "step {step}: {far}");
    }
    assert!(stage.engine.attend_closed(b.seq, &world));
    let report = stage.engine.report(&world.stream).unwrap();
    assert_eq!(report.exact_steps, report.steps);
}

trait Closed {
    fn attend_closed(&mut self, seq: SeqId, world: &World) -> bool;
}

impl Closed for GpuEngine<bf16> {
    fn attend_closed(&mut self, seq: SeqId, world: &World) -> bool {
        let held = Held::new(world, &vec![bf16::ZERO; HEADS * GROUP * D], [1, HEADS * GROUP, D]);
        let kv = Held::new(world, &vec![bf16::ZERO; HEADS * D], [1, HEADS, D]);
        let step = LayerStep {
            layer: LayerId(0),
            sequences: &[seq],
            positions: &[0],
            q: held.tensor(),
            k_new: kv.tensor(),
            v_new: kv.tensor(),
            scale: 0.3,
            out: held.tensor(),
        };
        matches!(self.attend(&step, &world.stream), Err(floe::Error::UnknownSequence(_)))
    }
}

#[test]
fn a_sequence_that_outgrows_its_rows_moves_to_slots_and_selects() {
    let world = world();
    let mut stage = stage(&world, 2064, Prefer::Exact);
    let mut a = stage.admit(2040);
    for _ in 0..24 {
        assert!(stage.step(&mut [&mut a]) < CLOSE);
    }
    let exact = stage.engine.report(&world.stream).unwrap().exact_steps;
    assert_eq!(exact, 48, "all of it fits so far");
    let mut errors = Vec::new();
    for _ in 0..40 {
        errors.push(stage.step(&mut [&mut a]));
    }
    let report = stage.engine.report(&world.stream).unwrap();
    assert_eq!(report.exact_steps, 48);
    assert!(report.rows_fetched > 0);
    // Random keys and a budget of half the context: far from exact, far from nothing.
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    println!("mean of the largest errors with slots: {mean:.3}");
    assert!(mean < 0.5, "{mean}");
    stage.prefill(&mut a, 4000);
    assert!(stage.step(&mut [&mut a]).is_finite());
}
