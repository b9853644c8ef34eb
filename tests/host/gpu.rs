//! The backend on a device beside the one on the CPU, call by call, both against full attention. Fails without a device.

use floe::host::{AttendArgs, FloeBackend, GpuBackend, KvBackend, Phase};
use floe::{Config, HeadShape, HotConfig, KvDtype, TensorView};
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const LAYERS: usize = 2;
const HEADS: [usize; 2] = [4, 2];

fn config(policy: &str, dim: usize) -> Config {
    let heads = HeadShape::new(HEADS[0], HEADS[1], dim).unwrap();
    let hot = HotConfig { slots: 512, ..HotConfig::default() };
    Config { policy: policy.parse().unwrap(), hot, ..Config::new(LAYERS, heads, KvDtype::F16) }
}

/// Three backends that are asked the same: full attention on the CPU, the policy there, and the policy on the device.
struct Three {
    dim: usize,
    rng: ChaCha8Rng,
    full: FloeBackend,
    cpu: FloeBackend,
    gpu: GpuBackend<f16>,
}

impl Three {
    fn new(config: &Config, keep_all: bool) -> Self {
        let full = Config { policy: "full".parse().unwrap(), ..config.clone() };
        Self {
            dim: config.heads.head_dim(),
            rng: ChaCha8Rng::seed_from_u64(3),
            full: FloeBackend::open(full).unwrap(),
            cpu: FloeBackend::open(config.clone()).unwrap(),
            gpu: GpuBackend::open(config.clone(), 2048, keep_all).unwrap(),
        }
    }

    fn each(&mut self, ask: impl Fn(&mut dyn KvBackend)) {
        ask(&mut self.full);
        ask(&mut self.cpu);
        ask(&mut self.gpu);
    }

    /// Error of the policy on the CPU and on the device, relative to the length of full attention's output.
    fn pass(&mut self, phase: Phase, tokens: usize) -> [f64; 2] {
        assert_eq!(self.full.num_tokens(), self.gpu.num_tokens());
        let (position, dim) = (self.full.num_tokens(), self.dim);
        let (mut far, mut length) = ([0.0; 2], 0.0);
        for layer in 0..LAYERS {
            let mut rows = |heads: usize| -> Vec<f32> {
                // As the cache stores them, so that only the arithmetic differs.
                let row = |_| f16::from_f32(self.rng.random_range(-1.0f32..1.0)).to_f32();
                (0..tokens * heads * dim).map(row).collect()
            };
            let (q, k, v) = (rows(HEADS[0]), rows(HEADS[1]), rows(HEADS[1]));
            let view = |rows, heads| TensorView::contiguous(rows, [tokens, heads, dim]).unwrap();
            let q = view(&q[..], HEADS[0]);
            let (k, v) = (view(&k[..], HEADS[1]), view(&v[..], HEADS[1]));
            let args = AttendArgs { layer, position, phase, q, q_pre: q, k, v, scale: 0.3 };
            let [mut want, mut cpu, mut gpu] = [(); 3].map(|()| vec![f32::NAN; tokens * HEADS[0] * dim]);
            self.full.attend(&args, &mut want).unwrap();
            self.cpu.attend(&args, &mut cpu).unwrap();
            self.gpu.attend(&args, &mut gpu).unwrap();
            for (far, got) in far.iter_mut().zip([cpu, gpu]) {
                *far += got.iter().zip(&want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            }
            length += want.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        }
        far.map(|far| (far / length).sqrt())
    }
}

/// f16 weights, and sums of a few hundred of them.
const EXACT: f64 = 3e-3;

/// A prompt, an answer, a part of it refused, a second question and its answer.
fn talk(config: &Config, keep_all: bool) {
    let mut three = Three::new(config, keep_all);
    let name = format!(
        "{} d {} dense {} spans {:?}",
        config.policy.spec(),
        three.dim,
        config.dense_layers,
        config.spans
    );
    for tokens in [600, 300] {
        assert!(three.pass(Phase::Prefill, tokens)[1] < EXACT, "{name}");
    }
    three.each(|kv| kv.prompt_ended().unwrap());
    let mut answers: Vec<[f64; 2]> = (0..5).map(|_| three.pass(Phase::Decode, 1)).collect();
    three.each(|kv| kv.truncate(890).unwrap());
    assert!(three.pass(Phase::Prefill, 40)[1] < EXACT, "{name}");
    answers.push(three.pass(Phase::Decode, 3));
    let [cpu, gpu] = [0, 1].map(|i| answers.iter().map(|far| far[i]).sum::<f64>() / answers.len() as f64);
    println!("{name}: error {cpu:.4} on the CPU, {gpu:.4} on the device");
    let unlimited = LAYERS - config.spans.iter().flatten().count();
    let exact = config.policy.is_exact() || config.dense_layers == unlimited;
    if exact {
        assert!(gpu < EXACT, "{name}");
    } else {
        assert!(cpu > EXACT && gpu > EXACT, "{name}: nothing was selected");
        // The device retrieves up to fifteen tokens fewer. A wrong code costs as much as none: twice the error and more.
        assert!(gpu < 1.3 * cpu, "{name}: {gpu}, on the CPU {cpu}");
    }
    let report = three.gpu.report().unwrap();
    assert_eq!(report.exact_steps == report.steps, exact, "{name}");
    assert_eq!(report.link_steps > 0, config.policy.is_exact() && !keep_all, "{name}");
}

const SKETCH: &str = "pagemean:sketch=k2v1,tail=page";

#[test]
fn gpu_answers_are_those_of_the_cpu() {
    talk(&config("full", 128), true);
    // Without all rows on the device a full policy reads the rest in host memory.
    talk(&config("full", 128), false);
    talk(&config(SKETCH, 128), false);
    talk(&config("floe", 128), false);
}

#[test]
fn gpu_heads_of_96_dimensions_are_sketched() {
    talk(&config(SKETCH, 96), false);
    talk(&config("floe", 96), false);
}

#[test]
fn gpu_layers_of_a_span_and_dense_ones_are_those_of_the_cpu() {
    // A layer of a span before one that selects, as in Gemma 3, or behind a dense one.
    talk(&Config { spans: vec![Some(300), None], ..config(SKETCH, 128) }, false);
    talk(&Config { spans: vec![None, Some(90)], dense_layers: 1, ..config(SKETCH, 128) }, false);
    talk(&Config { dense_layers: 1, ..config("floe", 128) }, false);
    talk(&Config { spans: vec![Some(90); 2], ..config("floe", 128) }, false);
}
