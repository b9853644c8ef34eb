//! Dense layers, layers of a span, and rows that run out: the same calls to the engine on the CPU give the same outputs.

use floe::gpu::{GpuEngine, GpuOptions, GpuReport, HostLayerStep, Submit};
use floe::{
    Config, DecodeStep, Engine, HeadShape, HotConfig, KvDtype, LayerId, SeqId, StepReport, TensorView,
};
use half::bf16;

use crate::world::{Random, World, error, world};

const HEADS: usize = 2;
const GROUP: usize = 3;
/// bf16 weights, and sums of a few hundred of them.
const CLOSE: f64 = 1.0 / 128.0;

/// A short span, a dense layer, one that selects, a span longer than the prompts of some tests.
fn config(policy: &str, dim: usize) -> Config {
    let heads = HeadShape::new(HEADS * GROUP, HEADS, dim).unwrap();
    let hot = HotConfig { slots: 512, ..HotConfig::default() };
    let policy = policy.parse().unwrap();
    let spans = vec![Some(40), None, None, Some(300)];
    Config { policy, hot, budget: 352, spans, dense_layers: 2, ..Config::new(4, heads, KvDtype::Bf16) }
}

/// One sequence in both engines.
#[derive(Clone, Copy)]
struct Both {
    cpu: SeqId,
    gpu: SeqId,
}

struct Twins<'a> {
    world: &'a World,
    cpu: Engine,
    gpu: GpuEngine<bf16>,
    random: Random,
}

impl<'a> Twins<'a> {
    fn new(world: &'a World, config: &Config, options: GpuOptions) -> Self {
        let gpu = GpuEngine::open(&world.device, config.clone(), options).unwrap();
        Self { world, cpu: Engine::open(config.clone()).unwrap(), gpu, random: Random(11) }
    }

    fn layers(&self) -> usize {
        self.gpu.config().num_layers
    }

    fn rows(&mut self, tokens: usize, heads: usize) -> Vec<bf16> {
        let dim = self.gpu.config().heads.head_dim();
        self.random.normals(tokens * heads * dim)
    }

    fn admit(&mut self, tokens: usize) -> Both {
        let both = Both { cpu: self.cpu.admit().unwrap(), gpu: self.gpu.admit(None).unwrap() };
        self.prefill(both, tokens);
        both
    }

    fn prefill(&mut self, of: Both, tokens: usize) {
        let dim = self.gpu.config().heads.head_dim();
        for layer in (0..self.layers()).map(LayerId) {
            let (k, v) = (self.rows(tokens, HEADS), self.rows(tokens, HEADS));
            let view = |rows| TensorView::contiguous(rows, [tokens, HEADS, dim]).unwrap();
            let (k, v) = (view(&k[..]), view(&v[..]));
            self.cpu.prefill(of.cpu, layer, &k, &v).unwrap();
            self.gpu.prefill_host(of.gpu, layer, (&k, &v), &self.world.stream).unwrap();
        }
    }

    /// One token of each sequence; largest error of each layer.
    fn step(&mut self, sequences: &[Both]) -> Vec<f64> {
        let (b, dim) = (sequences.len(), self.gpu.config().heads.head_dim());
        let width = HEADS * GROUP * dim;
        let ids: Vec<SeqId> = sequences.iter().map(|of| of.gpu).collect();
        (0..self.layers())
            .map(|layer| {
                let layer = LayerId(layer);
                let q = self.rows(b, HEADS * GROUP);
                let (k, v) = (self.rows(b, HEADS), self.rows(b, HEADS));
                let positions: Vec<usize> =
                    ids.iter().map(|seq| self.gpu.num_tokens(*seq, layer).unwrap()).collect();
                let view = |rows, heads| TensorView::contiguous(rows, [b, heads, dim]).unwrap();
                let (q, k, v) = (view(&q[..], HEADS * GROUP), view(&k[..], HEADS), view(&v[..], HEADS));
                let step = HostLayerStep {
                    layer,
                    sequences: &ids,
                    positions: &positions,
                    q,
                    k_new: k,
                    v_new: v,
                    scale: 0.1,
                };
                let mut got = vec![f32::NAN; b * width];
                self.gpu.attend_host(&step, &mut got, &self.world.stream).unwrap();
                let mut worst = 0.0f64;
                for (i, of) in sequences.iter().enumerate() {
                    let one = i..i + 1;
                    let step = DecodeStep {
                        layer,
                        position: positions[i],
                        q: q.tokens(one.clone()),
                        q_pre: None,
                        k_new: k.tokens(one.clone()),
                        v_new: v.tokens(one),
                        scale: 0.1,
                    };
                    let mut want = vec![0.0; width];
                    self.cpu.decode(of.cpu, &step, &mut want, &mut StepReport::default()).unwrap();
                    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
                    let got = &got[i * width..(i + 1) * width];
                    assert!(got.iter().all(|x| x.is_finite()), "{layer:?}");
                    worst = worst.max(error(got, &want, dim));
                }
                worst
            })
            .collect()
    }

    /// Steps in which all layers but those that select are right.
    fn steps(&mut self, num: usize, sequences: &[Both], selecting: &[usize], name: &str) {
        for step in 0..num {
            for (layer, far) in self.step(sequences).into_iter().enumerate() {
                let most = if selecting.contains(&layer) { 1.0 } else { CLOSE };
                assert!(far < most, "{name}, step {step}, layer {layer}: {far}");
            }
        }
    }

    fn truncate(&mut self, of: Both, tokens: usize) {
        self.cpu.truncate(of.cpu, tokens).unwrap();
        self.gpu.truncate(of.gpu, tokens, &self.world.stream).unwrap();
    }

    fn fork(&mut self, of: Both) -> Both {
        let gpu = self.gpu.fork(of.gpu, &self.world.stream).unwrap();
        Both { cpu: self.cpu.fork(of.cpu).unwrap(), gpu }
    }

    fn close(&mut self, of: Both) {
        self.cpu.close(of.cpu).unwrap();
        self.gpu.close(of.gpu).unwrap();
    }
}

/// All that may happen to sequences.
fn lives(
    world: &World,
    config: &Config,
    options: GpuOptions,
    (selecting, name): (&[usize], &str),
) -> GpuReport {
    let mut twins = Twins::new(world, config, options);
    let (a, b) = (twins.admit(10), twins.admit(290));
    let c = twins.admit(1700);
    twins.steps(20, &[a, b, c], selecting, name);
    twins.prefill(c, 333);
    twins.prefill(a, 31);
    twins.steps(3, &[c, a], selecting, name);
    // Within the spans, and by more than they are long.
    for tokens in [2050, 2010, 1500] {
        twins.truncate(c, tokens);
        twins.steps(2, &[c, b], selecting, name);
    }
    let d = twins.fork(c);
    twins.truncate(c, 1400);
    twins.steps(3, &[d, c], selecting, name);
    twins.close(c);
    let e = twins.admit(700);
    twins.steps(3, &[b, d, e, a], selecting, name);
    let folder = std::env::temp_dir().join(format!("floe-gpu-layers-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("saved.floe");
    twins.gpu.save(d.gpu, &path).unwrap();
    twins.close(e);
    let again = Both {
        cpu: twins.cpu.restore(&path).unwrap(),
        gpu: twins.gpu.restore(&path, None, &world.stream).unwrap(),
    };
    twins.steps(3, &[again, b], selecting, name);
    std::fs::remove_dir_all(&folder).unwrap();
    let report = twins.gpu.report(&world.stream).unwrap();
    assert_eq!(report.link_steps > 0, report.bytes_in_place > 0);
    report
}

#[test]
fn dense_layers_and_spans_are_those_of_the_cpu() {
    let world = world();
    for policy in ["pagemean:sketch=k1,tail=page", "floe"] {
        let config = config(policy, 128);
        let all = GpuOptions::for_load(&config, 5, 4096, 0.0);
        let report = lives(&world, &config, all.clone(), (&[2], policy));
        let (steps, exact) = (report.steps, report.exact_steps);
        assert!(exact > steps / 2 && exact < steps, "layer 2 selects once it has slots");
        assert_eq!(report.link_steps, 0, "a dense layer has room for its rows");
        // Room for a part of the dense layer's rows; recorded, since exact steps are otherwise launched.
        let few = GpuOptions { dense_rows: 5 * HEADS * 208, submit: Submit::Recorded, ..all };
        let report = lives(&world, &config, few, (&[2], policy));
        assert!(report.link_steps > 0 && report.link_steps < exact, "{report:?}");
    }
}

#[test]
fn a_full_policy_goes_on_where_its_rows_end() {
    let world = world();
    for dim in [64, 96, 128, 256] {
        let config = config("full", dim);
        for (rows, name) in [(5 * 4096, "all rows"), (5 * 400, "few rows"), (0, "hardly any")] {
            let options =
                GpuOptions { rows: HEADS * rows.max(16), ..GpuOptions::for_load(&config, 5, 4096, 1.0) };
            let report = lives(&world, &config, options, (&[], &format!("full, {dim}, {name}")));
            assert_eq!(report.steps, report.exact_steps, "every step is exact");
            assert_eq!(report.link_steps > 0, rows < 5 * 4096, "{name}: {report:?}");
        }
    }
}

#[test]
fn a_place_given_back_lets_the_next_grow() {
    let world = world();
    let config = config("full", 128);
    let options = GpuOptions { rows: 2 * HEADS * 512, ..GpuOptions::for_load(&config, 2, 4096, 1.0) };
    let mut twins = Twins::new(&world, &config, options);
    let (a, b) = (twins.admit(400), twins.admit(500));
    twins.steps(3, &[a, b], &[], "both");
    twins.prefill(a, 200);
    twins.steps(3, &[a, b], &[], "one over the link");
    let link = twins.gpu.report(&world.stream).unwrap().link_steps;
    assert_eq!(link, 6, "two unlimited layers, three steps");
    twins.close(b);
    twins.steps(40, &[a], &[], "grown");
    let report = twins.gpu.report(&world.stream).unwrap();
    assert_eq!((report.link_steps, report.rows_moved), (link, 1), "all rows are on the device again");
}

#[test]
fn a_layer_of_a_span_takes_the_rows_of_its_span() {
    let world = world();
    let heads = HeadShape::new(8, 4, 128).unwrap();
    // Five of six layers attend 512 tokens, as in Gemma 3.
    let spans = (0..6).map(|layer| (layer < 5).then_some(512)).collect();
    let config = Config { policy: "full".parse().unwrap(), spans, ..Config::new(6, heads, KvDtype::Bf16) };
    let open = |tokens: usize| {
        let options = GpuOptions::for_load(&config, 2, tokens, 1.0);
        GpuEngine::<bf16>::open(&world.device, config.clone(), options).unwrap().memory().rows_bytes
    };
    let row = 4 * 512;
    for tokens in [8192, 32_768] {
        assert_eq!(open(tokens), 2 * row * (5 * 512 + tokens), "{tokens} tokens");
    }
}

#[test]
fn rows_fill_the_memory_that_they_are_given() {
    let world = world();
    let given = 700 << 20;
    for policy in ["full", "pagemean:unit=page,tail=page", "pagemean:sketch=k2v1,tail=page", "floe"] {
        let heads = HeadShape::new(8, 4, 128).unwrap();
        let hot = HotConfig { slots: 512, ..HotConfig::default() };
        let (spans, policy) =
            ((0..12).map(|layer| (layer % 3 > 0).then_some(1024)).collect(), policy.parse());
        let config = Config {
            policy: policy.unwrap(),
            hot,
            spans,
            dense_layers: 1,
            ..Config::new(12, heads, KvDtype::Bf16)
        };
        let all = GpuOptions::for_load(&config, 2, 65_536, 1.0);
        let cut = all.clone().within(&config, given).unwrap();
        assert!(cut.rows < all.rows, "all of it takes more than is given");
        let memory = GpuEngine::<bf16>::open(&world.device, config.clone(), cut).unwrap().memory();
        let taken = memory.rows_bytes + memory.summary_bytes;
        assert!(taken <= given && taken * 100 > given * 98, "{}: {taken} of {given}", config.policy.spec());
    }
}
