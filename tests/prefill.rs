//! Prefill with queries, sliding layers and change of policy, against an independent oracle.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Layer, config, worst_error};
use floe::{Config, Engine, Error, HeadShape, KvDtype, LayerId, PrefillStep, SeqId, TensorView};
use proptest::prelude::*;

/// f32 arithmetic over at most some hundred tokens: measured 2e-6, allowed ten times that.
const EXACT: f64 = 2e-5;

fn step(layer: &Layer, tokens: std::ops::Range<usize>) -> PrefillStep<'_> {
    let (k, v) = layer.rows(tokens.clone());
    let position = tokens.start;
    PrefillStep { layer: LayerId(0), position, q: layer.queries(tokens), k, v, scale: layer.scale() }
}

/// Prefills all tokens; the output of every one.
fn prefill(engine: &mut Engine, seq: SeqId, layer: &Layer, chunks: &[usize]) -> Vec<f32> {
    let mut out = vec![f32::NAN; layer.q.len()];
    let (per_token, mut stored) = (layer.q.len() / layer.num_tokens, 0);
    for chunk in chunks.iter().copied().chain([usize::MAX]) {
        let end = stored + chunk.min(layer.num_tokens - stored);
        let out = &mut out[stored * per_token..end * per_token];
        engine.prefill_attend(seq, &step(layer, stored..end), out).unwrap();
        stored = end;
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_prompt_token_attends_causally_over_its_span(
        (kv_heads, group, dim) in (1usize..4, 1usize..5, prop::sample::select(vec![8usize, 20, 64])),
        num_tokens in 1usize..300,
        chunks in prop::collection::vec(1usize..150, 0..5),
        span in prop::option::of(1usize..200),
        policy in prop::sample::select(vec!["full", "window", "floe"]),
        seed in any::<u64>(),
    ) {
        let heads = HeadShape::new(kv_heads * group, kv_heads, dim).unwrap();
        let layer = Layer::random(heads, num_tokens, seed);
        let config = Config { spans: vec![span], ..config(heads, policy, 96) };
        let mut engine = Engine::open(config).unwrap();
        let seq = engine.admit().unwrap();
        let out = prefill(&mut engine, seq, &layer, &chunks);
        for (position, out) in out.chunks_exact(heads.num_q_heads() * dim).enumerate() {
            let first = span.map_or(0, |span| (position + 1).saturating_sub(span));
            let error = worst_error(out, &layer.oracle_from(first, position));
            prop_assert!(error < EXACT, "position {position}: {error:e}");
        }
    }
}

#[test]
fn a_sliding_layer_decodes_over_its_span_under_any_policy() {
    let heads = HeadShape::new(4, 2, 32).unwrap();
    let layer = Layer::random(heads, 400, 3);
    for policy in ["full", "window", "quest", "floe"] {
        let config = Config { spans: vec![Some(100)], ..config(heads, policy, 96) };
        let mut engine = Engine::open(config).unwrap();
        let seq = engine.admit().unwrap();
        let (k, v) = layer.rows(0..399);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
        engine.publish(seq).unwrap();
        assert_eq!(engine.memory(seq).unwrap().index_bytes, 0);
        let (out, report) = layer.decode(&mut engine, seq, 0, 399);
        assert!(worst_error(&out, &layer.oracle_from(300, 399)) < EXACT, "{policy}");
        assert_eq!(report.shards[0].tokens_attended, 100);
    }
}

#[test]
fn a_policy_set_later_answers_as_one_set_at_the_start() {
    let heads = HeadShape::new(4, 2, 32).unwrap();
    let layer = Layer::random(heads, 500, 11);
    let policies = ["floe", "full", "quest", "window", "pagemean", "floe:tail=off"];
    let mut engine = Engine::open(config(heads, policies[0], 96)).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..450);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    for policy in policies {
        engine.set_policy(policy.parse().unwrap(), 128).unwrap();
        engine.publish(seq).unwrap();
        let mut fresh = Engine::open(config(heads, policy, 128)).unwrap();
        let other = fresh.admit().unwrap();
        fresh.prefill(other, LayerId(0), &k, &v).unwrap();
        fresh.publish(other).unwrap();
        for position in 450..500 {
            let got = layer.decode(&mut engine, seq, 0, position).0;
            assert_eq!(got, layer.decode(&mut fresh, other, 0, position).0, "{policy} at {position}");
        }
        engine.truncate(seq, 450).unwrap();
    }
    let error = engine.set_policy("window".parse().unwrap(), 10).unwrap_err();
    assert!(matches!(error, Error::Config { field: "budget", .. }), "{error}");
    assert_eq!(engine.config().policy.spec(), "floe:tail=off");
}

#[test]
fn refused_prefill_stores_nothing() {
    let heads = HeadShape::new(4, 2, 8).unwrap();
    let layer = Layer::random(heads, 20, 5);
    let mut engine = Engine::open(Config::new(1, heads, KvDtype::F32)).unwrap();
    let seq = engine.admit().unwrap();
    let good = step(&layer, 0..20);
    let mut out = vec![0.0; layer.q.len()];
    let mut nan = layer.q.clone();
    nan[5] = f32::NAN;
    let bad_q = TensorView::contiguous(&nan[..], good.q.shape()).unwrap();
    let cases = [
        ("position", PrefillStep { position: 1, ..good }),
        ("`q`", PrefillStep { q: bad_q, ..good }),
        ("`k`", PrefillStep { k: good.k.tokens(0..19), ..good }),
        ("`scale`", PrefillStep { scale: f32::INFINITY, ..good }),
        ("layer 3", PrefillStep { layer: LayerId(3), ..good }),
    ];
    for (word, step) in cases {
        let message = engine.prefill_attend(seq, &step, &mut out).unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
    let message = engine.prefill_attend(seq, &good, &mut out[1..]).unwrap_err().to_string();
    assert!(message.contains("`out`"), "{message}");
    assert_eq!(engine.num_tokens(seq, LayerId(0)).unwrap(), 0);
}
