//! The hot tier never changes an output bit: off, on, emptied, shrunk, pages or rows, any policy, any prefetch.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Layer, config};
use floe::page::Unit;
use floe::policy::{EvictionKind, PrefetchKind};
use floe::{Config, Engine, HeadShape, HotConfig, LayerId};
use proptest::prelude::*;

const LAYERS: usize = 2;

/// Something done between two steps.
#[derive(Clone, Debug)]
enum Meddle {
    Nothing,
    Empty,
    Resize(usize),
    /// Cut this many tokens and decode them again.
    Rewind(usize),
}

fn meddle() -> impl Strategy<Value = Meddle> {
    prop_oneof![
        3 => Just(Meddle::Nothing),
        1 => Just(Meddle::Empty),
        1 => (0usize..60).prop_map(Meddle::Resize),
        1 => (1usize..20).prop_map(Meddle::Rewind),
    ]
}

/// Outputs of every decoded position, last decode of it.
fn run(layers: &[Layer], config: Config, prefill: usize, meddles: &[Meddle]) -> Vec<Vec<f32>> {
    let num_tokens = layers[0].num_tokens;
    let mut engine = Engine::open(config).unwrap();
    let seq = engine.admit().unwrap();
    for (i, layer) in layers.iter().enumerate() {
        let (k, v) = layer.rows(0..prefill);
        engine.prefill(seq, LayerId(i), &k, &v).unwrap();
    }
    let mut outputs = Vec::new();
    let mut meddles = meddles.iter();
    while outputs.len() < (num_tokens - prefill) * layers.len() {
        let position = prefill + outputs.len() / layers.len();
        for (i, layer) in layers.iter().enumerate() {
            outputs.push(layer.decode(&mut engine, seq, i, position).0);
        }
        match meddles.next() {
            Some(Meddle::Empty) => engine.empty_hot(seq).unwrap(),
            Some(Meddle::Resize(slots)) => engine.resize_hot(seq, *slots).unwrap(),
            Some(Meddle::Rewind(n)) => {
                let back = (*n).min(outputs.len() / layers.len() - 1);
                let keep = position + 1 - back;
                engine.truncate(seq, keep).unwrap();
                outputs.truncate((keep - prefill) * layers.len());
            }
            Some(Meddle::Nothing) | None => {}
        }
        assert_eq!(engine.memory(seq).unwrap().hot_pins_out, 0);
    }
    outputs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_hot_no_output_bit_changes(
        slots in 1usize..100,
        unit in prop::sample::select(vec![Unit::Row, Unit::Page]),
        eviction in prop::sample::select(EvictionKind::ALL.to_vec()),
        prefetch in prop::sample::select(PrefetchKind::ALL.to_vec()),
        policy in prop::sample::select(vec!["floe", "quest", "oracle"]),
        seed in any::<u64>(),
        meddles in prop::collection::vec(meddle(), 0..60),
    ) {
        let heads = HeadShape::new(4, 2, 16).unwrap();
        let layers: Vec<Layer> = (0..LAYERS as u64).map(|i| Layer::random(heads, 300, seed ^ i)).collect();
        let cold = Config { num_layers: LAYERS, ..config(heads, policy, 112) };
        let hot = HotConfig { slots, unit, eviction, prefetch };
        // The same rewinds without a hot tier: an index that saw removals may answer differently from one that did not.
        let expected = run(&layers, cold.clone(), 260, &meddles);
        let found = run(&layers, Config { hot, ..cold }, 260, &meddles);
        prop_assert_eq!(expected, found);
    }
}

#[test]
fn a_warm_tier_that_repeats_itself_is_hit() {
    let heads = HeadShape::new(2, 1, 16).unwrap();
    let layer = Layer::random(heads, 400, 5);
    let hot = HotConfig { slots: 400, ..HotConfig::default() };
    let mut engine = Engine::open(Config { hot, ..config(heads, "oracle", 112) }).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..360);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    let (mut requests, mut hits, mut bytes) = (0, 0, 0);
    for position in 360..400 {
        let fetched = layer.decode(&mut engine, seq, 0, position).1.shards[0].fetched;
        assert_eq!(fetched.requests, 32);
        assert_eq!(fetched.requests, fetched.hits + fetched.units);
        assert_eq!(fetched.bytes, fetched.units * 2 * 16 * 2);
        (requests, hits, bytes) = (requests + fetched.requests, hits + fetched.hits, bytes + fetched.bytes);
    }
    // Every token is fetched once at most, for nothing ever leaves.
    assert!(hits * 2 > requests && bytes <= 400 * 2 * 16 * 2, "{hits} of {requests}, {bytes} bytes");
}
