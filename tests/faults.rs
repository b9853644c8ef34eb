//! A seeded world of faults: 100 000 events against offload managers, page files and engines, invariants after each. A
//! failure prints its seed and event; the same seed runs the same schedule.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use common::{Layer, config};
use floe::page::file::{PageFile, PageFileWriter, SlabName};
use floe::page::{HotTier, LentSlab, WARM};
use floe::policy::EvictionKind;
use floe::sim::{Faults, SimStore};
use floe::transfer::{Completion, Link, Move, Offload, Ticket};
use floe::{Engine, Error, HeadShape, LayerId};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A link whose batches arrive late, in any order, torn or not at all.
struct BadLink {
    rng: ChaCha8Rng,
    next: u64,
    flights: HashMap<Ticket, Vec<Move>>,
    /// What each slot's memory holds: the unit whose data arrived last, or nothing usable.
    memory: HashMap<u32, Option<u32>>,
}

impl BadLink {
    fn end(&mut self, ticket: Ticket) -> Completion {
        let moves = self.flights.remove(&ticket).expect("tickets are answered once");
        let failed = self.rng.random_range(0..8) == 0;
        for m in moves {
            // A failed batch may have written some of its slots.
            let torn = failed && self.rng.random();
            self.memory.insert(m.slot, (!torn).then_some(m.unit));
        }
        if failed { Completion::Failed } else { Completion::Done }
    }
}

impl Link for BadLink {
    fn submit(&mut self, moves: &[Move]) -> Ticket {
        self.next += 1;
        for m in moves {
            // From now on the slot's memory is in motion.
            self.memory.insert(m.slot, None);
        }
        self.flights.insert(Ticket(self.next), moves.to_vec());
        Ticket(self.next)
    }

    fn poll(&mut self, ticket: Ticket) -> Completion {
        if self.rng.random_range(0..3) == 0 { self.end(ticket) } else { Completion::Pending }
    }

    fn wait(&mut self, ticket: Ticket) -> Completion {
        self.end(ticket)
    }
}

#[test]
fn offload_keeps_its_invariants_through_80_000_faulty_events() {
    for seed in 0..20u64 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let kind = EvictionKind::ALL[seed as usize % 5];
        let mut offload = Offload::new(HotTier::new(rng.random_range(0..40), kind), 512);
        let mut link = BadLink {
            rng: ChaCha8Rng::seed_from_u64(seed ^ 0xFA11),
            next: 0,
            flights: HashMap::new(),
            memory: HashMap::new(),
        };
        let mut units: Vec<u32> = Vec::new();
        for event in 0..4000 {
            let some = |rng: &mut ChaCha8Rng, most: usize| -> Vec<u32> {
                let n = rng.random_range(0..=most);
                (0..n).map(|_| rng.random_range(0..100u32)).collect::<BTreeSet<_>>().into_iter().collect()
            };
            match rng.random_range(0..10) {
                0..4 => {
                    offload.finish(&[]).unwrap();
                    units = some(&mut rng, 30);
                    offload.demand(&units, &mut link).unwrap();
                }
                4..8 => {
                    let ahead = some(&mut rng, 20);
                    offload.prefetch(&ahead, &mut link).unwrap();
                }
                8 => {
                    offload.finish(&[]).unwrap();
                    units.clear();
                    offload.demand(&[], &mut link).unwrap();
                    offload.truncate(rng.random_range(0..100), &mut link).unwrap();
                }
                _ => offload.clear(),
            }
            let at = format!("seed {seed}, event {event}");
            assert_eq!(offload.tier().fault(), None, "{at}");
            assert_eq!(offload.slots().len(), units.len(), "{at}");
            assert_eq!(
                offload.tier().pins_out(),
                offload.slots().iter().filter(|s| **s != WARM).count(),
                "{at}"
            );
            for (unit, slot) in units.iter().zip(offload.slots()) {
                // Pinned means: this slot holds this unit, whole, until it is handed back.
                assert!(
                    *slot == WARM || link.memory[slot] == Some(*unit),
                    "{at}: unit {unit} in slot {slot}"
                );
            }
        }
    }
}

#[test]
fn page_files_hand_out_what_was_written_or_an_error_through_20_000_faulty_events() {
    const PAGE: usize = 64;
    let faults = Faults { write: 12, publish: 60, tear: 120, rot: 200, open: 30 };
    let store = SimStore::new(7, faults);
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    // Per file: every version that publishing reported as durable, or may have replaced silently torn.
    let mut written: HashMap<String, Vec<u8>> = HashMap::new();
    let (mut whole, mut refused) = (0, 0);
    for event in 0..20_000u64 {
        let name = format!("f{}.kv", rng.random_range(0..8));
        let path = Path::new(&name);
        if rng.random_range(0..3) == 0 {
            let bytes: Vec<u8> = (0..4 * PAGE).map(|_| rng.random()).collect();
            let done = PageFileWriter::create(&store, path, event).and_then(|mut writer| {
                writer.slab(SlabName { shard: 0, slab: 0, rows: 60 }, PAGE, &bytes)?;
                writer.finish(serde_json::Value::Null)
            });
            match done {
                Ok(_) => {
                    written.insert(name, bytes);
                }
                Err(error) => assert!(error.is_environment(), "event {event}: {error}"),
            }
        } else {
            let read = PageFile::open(&store, path).and_then(|file| {
                let slab = file.slab(&file.manifest().slabs[0]);
                slab.verify(u16::MAX)?;
                Ok(slab.bytes().to_vec())
            });
            match read {
                Ok(bytes) => {
                    assert!(
                        written.get(&name) == Some(&bytes),
                        "event {event}: {name} is not what was written"
                    );
                    whole += 1;
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(whole > 1000 && refused > 1000, "{whole} whole, {refused} refused");
}

#[test]
fn an_engine_restored_from_a_faulty_store_gives_the_right_bits_or_an_error() {
    let heads = HeadShape::new(2, 1, 16).unwrap();
    let layer = Layer::random(heads, 640, 3);
    let config = config(heads, "floe", 112);
    let mut engine = Engine::open(config.clone()).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..600);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    engine.publish(seq).unwrap();
    let copy = engine.fork(seq).unwrap();
    let expected: Vec<Vec<f32>> = (600..604).map(|p| layer.decode(&mut engine, copy, 0, p).0).collect();
    let (mut right, mut refused) = (0, 0);
    for seed in 0..150 {
        let store = SimStore::new(seed, Faults { write: 5, publish: 50, tear: 100, rot: 500, open: 50 });
        let path = Path::new("s.kv");
        if engine.save_to(&store, seq, path).is_err() {
            refused += 1;
            continue;
        }
        let mut other = Engine::open(config.clone()).unwrap();
        match other.restore_from(&store, path) {
            Ok(restored) => {
                for (position, want) in (600..604).zip(&expected) {
                    match common_decode(&layer, &mut other, restored, 0, position) {
                        Ok(out) => assert!(out == *want, "seed {seed}, position {position}"),
                        Err(error) => {
                            assert!(matches!(error, Error::Damage(_)), "seed {seed}: {error}");
                            refused += 1;
                            break;
                        }
                    }
                    right += 1;
                }
            }
            Err(error) => {
                assert!(matches!(error, Error::File(_) | Error::Index(_)), "seed {seed}: {error}");
                refused += 1;
            }
        }
    }
    assert!(right > 100 && refused > 20, "{right} right, {refused} refused");
}

/// What is done to an engine between its steps.
fn meddle(engine: &mut Engine, open: &mut Vec<floe::SeqId>, (op, at): (u32, usize), layers: &[Layer]) {
    let seq = open[at % open.len()];
    let tokens = engine.num_tokens(seq, LayerId(0)).unwrap();
    match op {
        0 if open.len() < 4 => open.push(engine.fork(seq).unwrap()),
        1 if open.len() > 1 => {
            engine.close(open.swap_remove(at % open.len())).unwrap();
        }
        2 => engine.truncate(seq, tokens - at % (tokens / 2)).unwrap(),
        _ => {
            let more = (at % 400).min(layers[0].num_tokens - tokens);
            for (i, layer) in layers.iter().enumerate() {
                let (k, v) = layer.rows(tokens..tokens + more);
                engine.prefill(seq, LayerId(i), &k, &v).unwrap();
            }
        }
    }
}

#[test]
fn a_cold_tier_on_a_faulty_store_changes_no_bit_through_4_000_events() {
    let heads = HeadShape::new(2, 1, 16).unwrap();
    let layers: Vec<Layer> = (0..2).map(|i| Layer::random(heads, 2400, 50 + i)).collect();
    let (mut spilled, mut failed, mut back) = (0, 0, 0);
    for seed in 0..8u64 {
        let folder = tempfile::tempdir().unwrap();
        let faults = Faults { write: 8, publish: 100, tear: 150, rot: 200, open: 100 };
        let store = SimStore::new(seed, faults);
        let policy = ["floe", "oracle", "quest", "window"][seed as usize % 4];
        let plain = floe::Config { num_layers: 2, ..config(heads, policy, 112) };
        let eviction = EvictionKind::ALL[seed as usize % 5];
        let slab = 256 * 2 * 16 * 2;
        let cold = floe::Config {
            cold: Some(floe::ColdConfig { eviction, ..floe::ColdConfig::new(folder.path()) }),
            warm_limit_bytes: Some(10 * slab),
            ..plain.clone()
        };
        let mut engines = [
            Engine::open(plain).unwrap(),
            Engine::open_on(std::sync::Arc::new(store.clone()), cold).unwrap(),
        ];
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut open = engines.each_mut().map(|engine| vec![engine.admit().unwrap()]);
        for (i, layer) in layers.iter().enumerate() {
            let (k, v) = layer.rows(0..700);
            for (engine, open) in engines.iter_mut().zip(&open) {
                engine.prefill(open[0], LayerId(i), &k, &v).unwrap();
            }
        }
        for event in 0..500 {
            let (op, at) = (rng.random_range(0..24u32), rng.random_range(0..10_000usize));
            let seq = open[0][at % open[0].len()];
            let position = engines[0].num_tokens(seq, LayerId(0)).unwrap();
            if op < 4 || position == layers[0].num_tokens {
                let op = if op < 4 { op } else { 2 };
                engines.iter_mut().zip(&mut open).for_each(|(e, open)| meddle(e, open, (op, at), &layers));
                continue;
            }
            let outs = engines.each_mut().map(|engine| {
                let step = |i: usize| common_decode(&layers[i], engine, seq, i, position).unwrap();
                (0..2).map(step).collect::<Vec<_>>()
            });
            assert!(outs[0] == outs[1], "seed {seed}, event {event}: {policy}, position {position}");
        }
        let report = engines[1].cold_report().unwrap();
        assert_eq!(report.damaged, 0, "what was read back after writing is whole: {report:?}");
        (spilled, failed, back) =
            (spilled + report.released, failed + report.failed, back + report.brought_back);
    }
    assert!(
        spilled > 100 && failed > 20 && back > 5,
        "{spilled} released, {failed} failed, {back} brought back"
    );
}

fn common_decode(
    layer: &Layer,
    engine: &mut Engine,
    seq: floe::SeqId,
    number: usize,
    position: usize,
) -> floe::Result<Vec<f32>> {
    let (k_new, v_new) = layer.rows(position..position + 1);
    let q = floe::TensorView::contiguous(&layer.q[position * 32..][..32], [1, 2, 16])?;
    let step = floe::DecodeStep {
        layer: LayerId(number),
        position,
        q,
        q_pre: Some(q),
        k_new,
        v_new,
        scale: layer.scale(),
    };
    let (mut out, mut report) = (vec![0.0; 32], floe::StepReport::default());
    engine.decode(seq, &step, &mut out, &mut report).map(|()| out)
}
