//! The backend on a device against the one on the CPU, call by call. Fails without a device.

use floe::host::{AttendArgs, FloeBackend, GpuBackend, KvBackend, Phase};
use floe::{Config, HeadShape, HotConfig, KvDtype, TensorView};
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const LAYERS: usize = 2;
const HEADS: [usize; 2] = [4, 2];
const DIM: usize = 128;

fn config(policy: &str) -> Config {
    let heads = HeadShape::new(HEADS[0], HEADS[1], DIM).unwrap();
    let hot = HotConfig { slots: 512, ..HotConfig::default() };
    Config { policy: policy.parse().unwrap(), hot, ..Config::new(LAYERS, heads, KvDtype::F16) }
}

/// The same rows to both; the largest difference of their outputs.
fn pass(rng: &mut ChaCha8Rng, both: [&mut dyn KvBackend; 2], phase: Phase, tokens: usize) -> f32 {
    let [a, b] = both;
    assert_eq!(a.num_tokens(), b.num_tokens());
    let position = a.num_tokens();
    let mut worst = 0.0f32;
    for layer in 0..LAYERS {
        let mut rows = |heads: usize| -> Vec<f32> {
            // As the cache stores them, so that only the arithmetic differs.
            let row = |_| f16::from_f32(rng.random_range(-1.0f32..1.0)).to_f32();
            (0..tokens * heads * DIM).map(row).collect()
        };
        let (q, k, v) = (rows(HEADS[0]), rows(HEADS[1]), rows(HEADS[1]));
        let view = |rows, heads| TensorView::contiguous(rows, [tokens, heads, DIM]).unwrap();
        let q = view(&q[..], HEADS[0]);
        let (k, v) = (view(&k[..], HEADS[1]), view(&v[..], HEADS[1]));
        let args = AttendArgs { layer, position, phase, q, q_pre: q, k, v, scale: 0.3 };
        let [mut on_a, mut on_b] = [(); 2].map(|()| vec![f32::NAN; tokens * HEADS[0] * DIM]);
        a.attend(&args, &mut on_a).unwrap();
        b.attend(&args, &mut on_b).unwrap();
        worst = on_a.iter().zip(&on_b).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
        assert!(!worst.is_nan());
    }
    worst
}

#[test]
fn prompts_answers_and_second_questions_are_those_of_the_cpu() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let sketch = "pagemean:sketch=k2v1,tail=page";
    // Without all rows on the device a full policy reads the rest in host memory.
    let plain = [("full", true, 2e-3), ("full", false, 2e-3), (sketch, false, 0.1)];
    let plain = plain.map(|(policy, keep_all, most)| (config(policy), keep_all, most));
    // A layer of a span before one that selects, as in Gemma 3, or behind a dense one.
    let gemma = Config { spans: vec![Some(300), None], ..config(sketch) };
    let dense = Config { spans: vec![None, Some(90)], dense_layers: 1, ..config(sketch) };
    let limited = [(gemma, false, 0.1), (dense, false, 2e-3)];
    for (config, keep_all, most) in plain.into_iter().chain(limited) {
        let exact = config.policy.is_exact() || config.dense_layers > 0;
        let mut cpu = FloeBackend::open(config.clone()).unwrap();
        let mut gpu = GpuBackend::<f16>::open(config.clone(), 2048, keep_all).unwrap();
        for tokens in [600, 300] {
            assert!(pass(&mut rng, [&mut cpu, &mut gpu], Phase::Prefill, tokens) < 2e-3);
        }
        cpu.prompt_ended().unwrap();
        gpu.prompt_ended().unwrap();
        let mut worst = 0.0f32;
        for _ in 0..5 {
            worst = worst.max(pass(&mut rng, [&mut cpu, &mut gpu], Phase::Decode, 1));
        }
        cpu.truncate(890).unwrap();
        gpu.truncate(890).unwrap();
        assert!(pass(&mut rng, [&mut cpu, &mut gpu], Phase::Prefill, 40) < 2e-3);
        worst = worst.max(pass(&mut rng, [&mut cpu, &mut gpu], Phase::Decode, 3));
        assert!(worst < most, "{config:?}: {worst}");
        let report = gpu.report().unwrap();
        assert_eq!(report.exact_steps == report.steps, exact, "{config:?}");
        assert_eq!(report.link_steps > 0, config.policy.is_exact() && !keep_all, "{config:?}");
    }
}
