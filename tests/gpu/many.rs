//! Many items at a time: missing rows are brought by a kernel of their own.

use floe::gpu::{GpuEngine, GpuOptions, LayerStep, Prefer};
use floe::{Config, HeadShape, HotConfig, KvDtype, LayerId, SeqId};
use half::bf16;

use crate::world::{Held, Output, Random, error, world};

const D: usize = 64;
const HEADS: usize = 16;
const GROUP: usize = 2;
const BATCH: usize = 3;
const PROMPT: usize = 1500;
const STEPS: usize = 12;

/// Outputs of all steps, and the hit rate. `each`: sequences of a call.
fn run(slots: usize, each: usize, cold: bool) -> (Vec<f32>, f64) {
    let world = &*world();
    let config = Config {
        policy: "pagemean:sketch=k1,tail=page".parse().unwrap(),
        budget: 256,
        hot: HotConfig { slots, ..HotConfig::default() },
        ..Config::new(1, HeadShape::new(HEADS * GROUP, HEADS, D).unwrap(), KvDtype::Bf16)
    };
    let options =
        GpuOptions { prefer: Prefer::Speed, ..GpuOptions::for_load(&config, BATCH, PROMPT + STEPS, 0.0) };
    let mut engine = GpuEngine::<bf16>::open(&world.device, config, options).unwrap();
    let mut random = Random(5);
    let sequences: Vec<SeqId> = (0..BATCH).map(|_| engine.admit(None).unwrap()).collect();
    for &seq in &sequences {
        let [k, v] = [(); 2].map(|()| random.normals(PROMPT * HEADS * D));
        let [k, v] = [&k, &v].map(|rows| Held::new(world, rows, [PROMPT, HEADS, D]));
        engine.prefill(seq, LayerId(0), (&k.tensor(), &v.tensor()), &world.stream).unwrap();
        world.stream.synchronize().unwrap();
    }
    let (mut outs, mut q) = (Vec::new(), random.normals(BATCH * HEADS * GROUP * D));
    for step in 0..STEPS {
        // Every query changes a little, so that much of a selection stays.
        q.iter_mut().for_each(|x| *x = bf16::from_f32(0.95 * x.to_f32() + 0.3 * random.normal()));
        let [k, v] = [(); 2].map(|()| random.normals(BATCH * HEADS * D));
        if cold {
            engine.empty_hot().unwrap();
        }
        for (i, sequences) in sequences.chunks(each).enumerate() {
            let of = |rows: &[bf16], heads: usize| {
                let len = sequences.len() * heads * D;
                Held::new(world, &rows[i * len..(i + 1) * len], [sequences.len(), heads, D])
            };
            let (q, k, v) = (of(&q, HEADS * GROUP), of(&k, HEADS), of(&v, HEADS));
            let out = Output::new(world, [sequences.len(), HEADS * GROUP, D]);
            let step = LayerStep {
                layer: LayerId(0),
                sequences,
                positions: &[PROMPT + step; BATCH][..sequences.len()],
                q: q.tensor(),
                k_new: k.tensor(),
                v_new: v.tensor(),
                scale: 0.25,
                out: out.tensor(),
            };
            engine.attend(&step, &world.stream).unwrap();
            outs.extend(out.read(world));
        }
    }
    let report = engine.report(&world.stream).unwrap();
    assert_eq!(report.exact_steps, 0);
    (outs, report.hit_rate())
}

#[test]
fn rows_brought_by_a_kernel_of_their_own_are_the_same_rows() {
    let (warm, hits) = run(400, BATCH, false);
    let (cold, none) = run(200, BATCH, true);
    assert!(none < 1e-9 && (0.2..0.99).contains(&hits), "{none} {hits}");
    assert!(warm.iter().zip(&cold).all(|(a, b)| a.to_bits() == b.to_bits()));
    // One by one the sequences are few items, whose attention is divided in another way.
    let (alone, _) = run(400, 1, false);
    let alone: Vec<f64> = alone.into_iter().map(f64::from).collect();
    assert!(error(&warm, &alone, D) < 1.0 / 128.0, "{}", error(&warm, &alone, D));
}
