//! The whole engine against an independent oracle: prefill, decode, truncate, close.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Layer, config, worst_error};
use floe::plan::HeadPath;
use floe::{Config, DecodeStep, Engine, Error, HeadShape, KvDtype, LayerId, StepReport, TensorView};
use proptest::prelude::*;

/// f32 arithmetic over at most some hundred tokens: measured 2e-6, allowed ten times that.
const EXACT: f64 = 2e-5;

const POLICIES: [&str; 16] = [
    "full",
    "window",
    "int8",
    "int4",
    "kivi2",
    "quest",
    "pagemean",
    "icecache",
    "hnsw",
    "oracle",
    "floe:tail=off,sketch=off",
    "floe:tail=page,sketch=off",
    "floe:sketch=k1",
    "floe",
    "floe:open=0.2,unit=page",
    "floe:open_mass=0.1,detail=1",
];

/// Policies that may leave budget unspent: the first four retrieve nothing, a graph does not reach every token, and a
/// fraction of the super-nodes may hold fewer tokens than asked for.
const UNDER_BUDGET: [&str; 7] =
    ["window", "int8", "int4", "kivi2", "hnsw", "floe:open=0.2,unit=page", "floe:open_mass=0.1,detail=1"];

/// Prefills `prefill` tokens in chunks and decodes the rest; returns the last output.
fn run(layer: &Layer, config: Config, prefill: usize, chunks: &[usize]) -> Vec<f32> {
    let mut engine = Engine::open(config).unwrap();
    let seq = engine.admit().unwrap();
    let mut stored = 0;
    for chunk in chunks.iter().copied().chain([usize::MAX]) {
        let end = stored + chunk.min(prefill - stored);
        let (k, v) = layer.rows(stored..end);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
        stored = end;
    }
    let mut out = Vec::new();
    for position in prefill..layer.num_tokens {
        out = layer.decode(&mut engine, seq, 0, position).0;
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_chunking_at_full_budget_equals_the_oracle(
        (kv_heads, group, dim) in (1usize..4, 1usize..5, prop::sample::select(vec![8usize, 20, 64])),
        num_tokens in 1usize..400,
        decoded in 1usize..20,
        chunks in prop::collection::vec(1usize..200, 0..6),
        policy in prop::sample::select(POLICIES.to_vec()),
        seed in any::<u64>(),
    ) {
        let heads = HeadShape::new(kv_heads * group, kv_heads, dim).unwrap();
        let layer = Layer::random(heads, num_tokens, seed);
        let prefill = num_tokens - decoded.min(num_tokens);
        let out = run(&layer, config(heads, policy, 400), prefill, &chunks);
        let error = worst_error(&out, &layer.oracle(num_tokens - 1));
        prop_assert!(error < EXACT, "{policy}: {error:e}");
    }

    #[test]
    fn chunking_and_threads_change_no_bit_of_a_sparse_step(
        num_tokens in 120usize..500,
        chunks in prop::collection::vec(1usize..200, 0..6),
        policy in prop::sample::select(POLICIES.to_vec()),
        seed in any::<u64>(),
    ) {
        let heads = HeadShape::new(4, 2, 16).unwrap();
        let layer = Layer::random(heads, num_tokens, seed);
        let config = config(heads, policy, 96);
        let one = run(&layer, Config { threads: 1, ..config.clone() }, num_tokens - 5, &[]);
        let many = run(&layer, Config { threads: 4, ..config }, num_tokens - 5, &chunks);
        prop_assert_eq!(one, many);
    }

    #[test]
    fn a_sparse_step_keeps_to_its_budget(
        num_tokens in 1usize..600,
        budget in 80usize..300,
        policy in prop::sample::select(POLICIES[1..].to_vec()),
    ) {
        let heads = HeadShape::new(2, 1, 16).unwrap();
        let layer = Layer::random(heads, num_tokens, 7);
        let mut engine = Engine::open(config(heads, policy, budget)).unwrap();
        let seq = engine.admit().unwrap();
        let (k, v) = layer.rows(0..num_tokens / 2);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
        for position in num_tokens / 2..num_tokens {
            let (out, report) = layer.decode(&mut engine, seq, 0, position);
            let shard = &report.shards[0];
            prop_assert!(shard.tokens_attended <= budget.min(position + 1));
            prop_assert!(shard.retrieved.is_sorted_by(|a, b| a < b));
            prop_assert!(shard.retrieved.iter().all(|t| *t >= 16 && (*t as usize) < position + 1 - 64));
            prop_assert!(out.iter().all(|x| x.is_finite()));
            if !UNDER_BUDGET.contains(&policy) {
                prop_assert_eq!(shard.tokens_attended, budget.min(position + 1));
            }
        }
    }
}

#[test]
fn empty_one_token_and_exactly_one_page_sequences_decode_exactly() {
    let heads = HeadShape::new(4, 2, 32).unwrap();
    for policy in POLICIES {
        for num_tokens in [1, 2, 16, 17, 65, 80, 81] {
            let layer = Layer::random(heads, num_tokens, 3);
            for prefill in [0, num_tokens - 1] {
                let out = run(&layer, config(heads, policy, 96), prefill, &[]);
                let error = worst_error(&out, &layer.oracle(num_tokens - 1));
                assert!(error < EXACT, "{policy}, {num_tokens} tokens, prefill {prefill}: {error:e}");
            }
        }
    }
}

#[test]
fn window_longer_than_the_context_is_exact() {
    let heads = HeadShape::new(2, 2, 32).unwrap();
    let layer = Layer::random(heads, 300, 5);
    let config = Config { window: 1000, ..config(heads, "window", 1016) };
    assert!(worst_error(&run(&layer, config, 200, &[]), &layer.oracle(299)) < EXACT);
}

#[test]
fn multi_head_and_multi_query_shapes_select_per_kv_head() {
    for (q_heads, kv_heads) in [(6, 6), (6, 1), (6, 2)] {
        let heads = HeadShape::new(q_heads, kv_heads, 16).unwrap();
        let layer = Layer::random(heads, 400, 11);
        let mut engine = Engine::open(config(heads, "floe", 128)).unwrap();
        let seq = engine.admit().unwrap();
        let (k, v) = layer.rows(0..399);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
        let (out, report) = layer.decode(&mut engine, seq, 0, 399);
        assert_eq!((out.len(), report.shards.len()), (q_heads * 16, kv_heads));
        let window = run(&layer, config(heads, "window", 128), 399, &[]);
        let (error, dropped) =
            (worst_error(&out, &layer.oracle(399)), worst_error(&window, &layer.oracle(399)));
        assert!(error < 0.8 * dropped, "{q_heads}/{kv_heads}: {error} against {dropped}");
    }
}

#[test]
fn the_tail_brings_the_output_nearer_to_full_attention() {
    let heads = HeadShape::new(4, 2, 32).unwrap();
    let layer = Layer::random(heads, 1500, 23);
    let error = |policy| worst_error(&run(&layer, config(heads, policy, 96), 1490, &[]), &layer.oracle(1499));
    let (with, without, window) = (error("floe"), error("floe:tail=off"), error("window"));
    assert!(with < 0.7 * without, "{with} against {without}");
    assert!(without < window, "{without} against {window}");
}

#[test]
fn estimates_too_coarse_for_the_queries_make_the_step_exact() {
    let heads = HeadShape::new(4, 2, 32).unwrap();
    let calm = Layer::random(heads, 500, 11);
    // Residuals eight times as long and queries too: 2-bit codes are off by some ten nats.
    let mut loud = Layer::random(heads, 500, 11);
    loud.k.iter_mut().chain(&mut loud.q).for_each(|x| *x *= 8.0);
    let path = |layer: &Layer, policy: &str| {
        let mut engine = Engine::open(config(heads, policy, 160)).unwrap();
        let seq = engine.admit().unwrap();
        let (k, v) = layer.rows(0..499);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
        let (out, report) = layer.decode(&mut engine, seq, 0, 499);
        (report.shards[1].path, report.shards[1].tokens_attended, worst_error(&out, &layer.oracle(499)))
    };
    let (taken, attended, error) = path(&loud, "floe");
    assert_eq!((taken, attended), (HeadPath::ExactInDoubt, 500));
    // Logits of hundreds: f32 sums of 32 products are off by 1e-4 of a nat.
    assert!(error < 1e-3, "{error:e}");
    assert_eq!(path(&loud, "floe:max_doubt=1000").0, HeadPath::Sparse);
    assert_eq!(path(&loud, "floe:tail=off").0, HeadPath::Sparse);
    assert_eq!(path(&calm, "floe").0, HeadPath::Sparse);
}

#[test]
fn truncate_then_decode_again_equals_never_having_drafted() {
    let heads = HeadShape::new(4, 2, 16).unwrap();
    let layer = Layer::random(heads, 500, 31);
    for policy in
        ["full", "window", "oracle", "int8", "kivi2", "quest", "pagemean", "floe:sketch=off", "floe"]
    {
        let mut engine = Engine::open(config(heads, policy, 128)).unwrap();
        let seq = engine.admit().unwrap();
        let (k, v) = layer.rows(0..400);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
        for position in 400..440 {
            layer.decode(&mut engine, seq, 0, position);
        }
        engine.truncate(seq, 410).unwrap();
        assert_eq!(engine.num_tokens(seq, LayerId(0)).unwrap(), 410);
        let (again, report) = layer.decode(&mut engine, seq, 0, 410);
        assert!(report.shards.iter().flat_map(|s| &s.retrieved).all(|t| *t < 410));
        let fresh = run(
            &Layer { num_tokens: 411, ..Layer::random(heads, 500, 31) },
            config(heads, policy, 128),
            400,
            &[],
        );
        if matches!(policy, "full" | "window" | "oracle" | "int8") {
            assert_eq!(again, fresh, "{policy}");
        } else {
            // Pages that lost tokens keep their means, so the tail may differ a little; the answer must not.
            let wanted: Vec<f64> = fresh.iter().map(|x| f64::from(*x)).collect();
            assert!(worst_error(&again, &wanted) < 0.3, "{policy}");
        }
        engine.truncate(seq, 0).unwrap();
        let (first, _) = layer.decode(&mut engine, seq, 0, 0);
        assert!(worst_error(&first, &layer.oracle(0)) < EXACT, "{policy}");
    }
}

#[test]
fn layers_advance_on_their_own_and_dense_layers_stay_exact() {
    let heads = HeadShape::new(2, 1, 16).unwrap();
    let layer = Layer::random(heads, 300, 2);
    let base = config(heads, "window", 96);
    let mut engine = Engine::open(Config { num_layers: 2, dense_layers: 1, ..base }).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..299);
    for l in 0..2 {
        engine.prefill(seq, LayerId(l), &k, &v).unwrap();
    }
    let error =
        |engine: &mut Engine, l| worst_error(&layer.decode(engine, seq, l, 299).0, &layer.oracle(299));
    assert!(error(&mut engine, 0) < EXACT);
    assert!(error(&mut engine, 1) > 1e-3);
}

#[test]
fn every_kv_dtype_stores_what_it_can_represent() {
    let heads = HeadShape::new(4, 2, 32).unwrap();
    let layer = Layer::random(heads, 200, 9);
    for (dtype, bound) in [(KvDtype::Bf16, EXACT), (KvDtype::F16, EXACT), (KvDtype::F32, EXACT)] {
        let config = Config { kv_dtype: dtype, ..config(heads, "full", 96) };
        let error = worst_error(&run(&layer, config, 150, &[]), &layer.oracle(199));
        assert!(error < bound, "{dtype}: {error:e}");
    }
}

#[test]
fn bad_input_is_a_typed_error_and_stores_nothing() {
    let heads = HeadShape::new(4, 2, 8).unwrap();
    let layer = Layer::random(heads, 40, 1);
    let mut engine = Engine::open(config(heads, "floe", 96)).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..30);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();

    let (k1, v1) = layer.rows(30..31);
    let q = [0.5f32; 32];
    let q = TensorView::contiguous(&q[..], [1, 4, 8]).unwrap();
    let good =
        DecodeStep { layer: LayerId(0), position: 30, q, q_pre: None, k_new: k1, v_new: v1, scale: 0.3 };
    let (mut out, mut report) = (vec![0.0; 32], StepReport::default());
    let mut bad = [0.5f32; 16];
    bad[11] = f32::INFINITY;
    let bad = TensorView::contiguous(&bad[..], [1, 2, 8]).unwrap();
    let (two_k, _) = layer.rows(30..32);

    let mut refuse =
        |step: DecodeStep<'_>, out: &mut [f32]| engine.decode(seq, &step, out, &mut report).unwrap_err();
    let cases = [
        (refuse(DecodeStep { position: 31, ..good }, &mut out), "position 31"),
        (refuse(DecodeStep { layer: LayerId(7), ..good }, &mut out), "layer 7"),
        (refuse(DecodeStep { q: k1, ..good }, &mut out), "`q`"),
        (refuse(DecodeStep { q_pre: Some(k1), ..good }, &mut out), "`q_pre`"),
        (refuse(DecodeStep { k_new: two_k, ..good }, &mut out), "`k_new`"),
        (
            refuse(DecodeStep { v_new: bad, ..good }, &mut out),
            "`v_new`: not a finite number at token 0, element 11",
        ),
        (refuse(DecodeStep { scale: f32::NAN, ..good }, &mut out), "`scale`"),
        (refuse(good, &mut out[..31]), "`out`"),
    ];
    for (error, words) in &cases {
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
    assert_eq!(engine.num_tokens(seq, LayerId(0)).unwrap(), 30);
    engine.decode(seq, &good, &mut out, &mut report).unwrap();

    engine.close(seq).unwrap();
    assert!(matches!(engine.close(seq), Err(Error::UnknownSequence(_))));
    assert!(matches!(engine.prefill(seq, LayerId(0), &k, &v), Err(Error::UnknownSequence(_))));
    assert!(matches!(Engine::open(config(heads, "floe", 79)), Err(Error::Config { field: "budget", .. })));
}
