//! Saved, restored and forked sequences go on as the original does, bit for bit; damage is reported, never used.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{Layer, config};
use floe::page::file::{FsStorage, PageFile};
use floe::{Config, DecodeStep, Engine, Error, HeadShape, LayerId, SeqId, StepReport, TensorView};

const LAYERS: usize = 2;
const PREFILL: usize = 700;

/// Every policy, and the switches that change what an index keeps.
const POLICIES: [&str; 16] = [
    "full",
    "window",
    "quest",
    "pagemean",
    "pagemean:sketch=k1,tail=page",
    "oracle",
    "icecache",
    "hnsw",
    "int8",
    "int4",
    "kivi2",
    "floe",
    "floe:sketch=off,unit=page",
    "floe:sketch=k1",
    "floe:sketch=k4v2,tail=page",
    "floe:open=0.25",
];

fn layers() -> Vec<Layer> {
    let heads = HeadShape::new(4, 2, 16).unwrap();
    (0..LAYERS as u64).map(|i| Layer::random(heads, 760, 40 + i)).collect()
}

fn setup(policy: &str) -> (Vec<Layer>, Config, Engine, SeqId) {
    let layers = layers();
    let config = Config { num_layers: LAYERS, ..config(layers[0].heads, policy, 112) };
    let mut engine = Engine::open(config.clone()).unwrap();
    let seq = engine.admit().unwrap();
    for (i, layer) in layers.iter().enumerate() {
        let (k, v) = layer.rows(0..PREFILL);
        engine.prefill(seq, LayerId(i), &k, &v).unwrap();
    }
    (layers, config, engine, seq)
}

fn decode(
    layers: &[Layer],
    engine: &mut Engine,
    seq: SeqId,
    positions: std::ops::Range<usize>,
) -> Vec<Vec<f32>> {
    let mut outputs = Vec::new();
    for position in positions {
        for (i, layer) in layers.iter().enumerate() {
            outputs.push(layer.decode(engine, seq, i, position).0);
        }
    }
    outputs
}

#[test]
fn a_restored_sequence_goes_on_as_the_saved_one_would_have() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.kv");
    let mut differ = Vec::new();
    for policy in POLICIES {
        let (layers, config, mut engine, seq) = setup(policy);
        decode(&layers, &mut engine, seq, PREFILL..PREFILL + 9);
        // A batch of tokens joins the index, part of it leaves again: what is saved is no fresh build.
        decode(&layers, &mut engine, seq, PREFILL + 9..PREFILL + 30);
        engine.truncate(seq, PREFILL - 60).unwrap();
        engine.save(seq, &path).unwrap();
        let mut other = Engine::open(config).unwrap();
        let restored = other.restore(&path).unwrap();
        assert_eq!(other.num_tokens(restored, LayerId(1)).unwrap(), PREFILL - 60);
        assert_eq!(other.memory(restored).unwrap().kv_allocated_bytes, 0);
        let rest = PREFILL - 60..760;
        let expected = decode(&layers, &mut engine, seq, rest.clone());
        if decode(&layers, &mut other, restored, rest) != expected {
            differ.push(policy);
        }
    }
    assert!(differ.is_empty(), "{differ:?}");
}

#[test]
fn another_policy_builds_its_index_anew_and_another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.kv");
    let (layers, config, mut engine, seq) = setup("floe");
    engine.save(seq, &path).unwrap();
    let mut quest = Engine::open(Config { policy: "quest".parse().unwrap(), ..config.clone() }).unwrap();
    let restored = quest.restore(&path).unwrap();
    let (_, _, mut direct, direct_seq) = setup("quest");
    let rest = PREFILL..PREFILL + 4;
    let expected = decode(&layers, &mut direct, direct_seq, rest.clone());
    assert!(decode(&layers, &mut quest, restored, rest) == expected);
    let heads = HeadShape::new(4, 4, 16).unwrap();
    let message = Engine::open(Config { heads, ..config }).unwrap().restore(&path).unwrap_err().to_string();
    assert!(message.contains("num_kv_heads") && message.contains("s.kv"), "{message}");
    assert!(engine.restore(&folder.path().join("absent.kv")).unwrap_err().is_environment());
}

#[test]
fn a_flipped_bit_is_reported_or_has_no_effect() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.kv");
    let (layers, config, mut engine, seq) = setup("floe");
    engine.save(seq, &path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let positions = PREFILL..PREFILL + 2;
    let expected = decode(&layers, &mut engine, seq, positions.clone());
    let mut reported = 0;
    for at in (0..whole.len()).step_by(whole.len() / 97) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        let flipped = folder.path().join(format!("{at}.kv"));
        std::fs::write(&flipped, bytes).unwrap();
        let mut other = Engine::open(config.clone()).unwrap();
        let result = other.restore(&flipped).and_then(|seq| {
            let mut outputs = Vec::new();
            for position in positions.clone() {
                for (i, layer) in layers.iter().enumerate() {
                    outputs.push(try_decode(layer, &mut other, seq, i, position)?);
                }
            }
            Ok(outputs)
        });
        match result {
            Ok(outputs) => assert!(outputs == expected, "flip at {at}"),
            Err(error) => {
                assert!(matches!(error, Error::Damage(_) | Error::File(_) | Error::Index(_)), "{error}");
                reported += 1;
            }
        }
    }
    assert!(reported > 10, "{reported}");
}

fn try_decode(
    layer: &Layer,
    engine: &mut Engine,
    seq: SeqId,
    number: usize,
    position: usize,
) -> floe::Result<Vec<f32>> {
    let (k_new, v_new) = layer.rows(position..position + 1);
    let width = layer.heads.num_q_heads() * layer.heads.head_dim();
    let shape = [1, layer.heads.num_q_heads(), layer.heads.head_dim()];
    let q = TensorView::contiguous(&layer.q[position * width..][..width], shape)?;
    let step = DecodeStep {
        layer: LayerId(number),
        position,
        q,
        q_pre: Some(q),
        k_new,
        v_new,
        scale: layer.scale(),
    };
    let (mut out, mut report) = (vec![0.0; width], StepReport::default());
    engine.decode(seq, &step, &mut out, &mut report).map(|()| out)
}

#[test]
fn sixty_four_forks_cost_what_one_costs_and_part_company() {
    let (layers, config, mut engine, seq) = setup("floe");
    engine.publish(seq).unwrap();
    let one = engine.memory(seq).unwrap();
    let forks: Vec<SeqId> = (0..64).map(|_| engine.fork(seq).unwrap()).collect();
    let total: usize = forks
        .iter()
        .chain([&seq])
        .map(|s| {
            let memory = engine.memory(*s).unwrap();
            memory.kv_allocated_bytes + memory.index_bytes
        })
        .sum();
    let alone = one.kv_allocated_bytes + one.index_bytes;
    assert!(total as f64 <= 1.05 * alone as f64, "{total} against {alone}");

    let expected = {
        let mut fresh = Engine::open(config).unwrap();
        let own = fresh.admit().unwrap();
        for (i, layer) in layers.iter().enumerate() {
            let (k, v) = layer.rows(0..PREFILL);
            fresh.prefill(own, LayerId(i), &k, &v).unwrap();
        }
        fresh.publish(own).unwrap();
        decode(&layers, &mut fresh, own, PREFILL..740)
    };
    // One side cut back and refilled with other tokens must not be seen by the others.
    engine.truncate(forks[5], 400).unwrap();
    for (i, layer) in layers.iter().enumerate() {
        let (k, v) = layer.rows(0..200);
        engine.prefill(forks[5], LayerId(i), &k, &v).unwrap();
    }
    assert!(decode(&layers, &mut engine, forks[63], PREFILL..740) == expected);
    engine.close(seq).unwrap();
    for fork in &forks[10..63] {
        engine.close(*fork).unwrap();
    }
    assert!(decode(&layers, &mut engine, forks[2], PREFILL..740) == expected);
    for fork in forks[..10].iter().rev() {
        engine.close(*fork).unwrap();
    }
}

const CHILD: &str = "FLOE_TEST_SAVE_INTO";

/// Not a test of its own: what [`a_save_that_is_killed_leaves_the_old_file_or_the_new_one`] kills.
#[test]
fn child_that_saves_for_ever() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let (layers, _, mut engine, seq) = setup("floe");
    for position in (PREFILL..760).cycle() {
        if position == PREFILL {
            engine.truncate(seq, PREFILL).unwrap();
        }
        decode(&layers, &mut engine, seq, position..position + 1);
        engine.save(seq, Path::new(&path)).unwrap();
    }
}

#[test]
fn a_save_that_is_killed_leaves_the_old_file_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.kv");
    let (_, config, engine, seq) = setup("floe");
    engine.save(seq, &path).unwrap();
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_saves_for_ever"])
            .env(CHILD, &path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(120 + round * 17));
        child.kill().unwrap();
        child.wait().unwrap();
        PageFile::open(&FsStorage, &path).unwrap().verify().unwrap();
        let mut other = Engine::open(config.clone()).unwrap();
        let restored = other.restore(&path).unwrap();
        assert!(other.num_tokens(restored, LayerId(0)).unwrap() >= PREFILL);
    }
}

#[test]
fn kv_info_describes_a_file_and_refuses_what_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.kv");
    let (_, _, engine, seq) = setup("floe");
    engine.save(seq, &path).unwrap();
    let floe = |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_floe")).args(args).output().unwrap();
    let output = floe(&["kv", "info", "--verify", path.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    for word in ["2 layers", "700", "floe", "bf16", "agree"] {
        assert!(text.contains(word), "{word}\n{text}");
    }
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let output = floe(&["kv", "info", path.to_str().unwrap()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("s.kv") && text.contains("cut off"), "{text}");
}

#[test]
#[ignore = "writes a gigabyte; run with --release"]
fn a_million_tokens_are_ready_in_under_a_second() {
    let heads = HeadShape::new(4, 1, 128).unwrap();
    let config = Config { threads: 0, ..config(heads, "floe", 256) };
    let mut engine = Engine::open(config.clone()).unwrap();
    let seq = engine.admit().unwrap();
    let layer = Layer::random(heads, 4096, 3);
    for _ in 0..244 {
        let (k, v) = layer.rows(0..4096);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    }
    let (k, v) = layer.rows(0..576);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    engine.publish(seq).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("million.kv");
    let bytes = engine.save(seq, &path).unwrap();
    let mut other = Engine::open(config).unwrap();
    let start = std::time::Instant::now();
    let restored = other.restore(&path).unwrap();
    let ready = start.elapsed();
    let tokens = other.num_tokens(restored, LayerId(0)).unwrap();
    let first = std::time::Instant::now();
    let (k, v) = layer.rows(7..8);
    let q = TensorView::contiguous(&layer.q[..512], [1, 4, 128]).unwrap();
    let step =
        DecodeStep { layer: LayerId(0), position: tokens, q, q_pre: None, k_new: k, v_new: v, scale: 0.09 };
    let (mut out, mut report) = (vec![0.0; 512], StepReport::default());
    other.decode(restored, &step, &mut out, &mut report).unwrap();
    println!("{tokens} tokens, {bytes} bytes: restored in {ready:?}, first step in {:?}", first.elapsed());
    assert!(tokens == 1_000_000 && ready.as_secs_f64() < 1.0, "{tokens} tokens in {ready:?}");
}
