//! The cold tier: under a warm limit outputs keep their bits; full disks lose nothing; what a killed process had written
//! is whole.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Layer, config};
use floe::page::LentSlab;
use floe::page::cold::recover;
use floe::page::file::{Draft, FileBytes, FsStorage, Storage};
use floe::policy::EvictionKind;
use floe::{ColdConfig, Config, DecodeStep, Engine, Error, HeadShape, LayerId, SeqId, StepReport};

const TOKENS: usize = 1500;
/// One slab of 256 rows of K and V, 16 elements, bf16.
const SLAB: usize = 256 * 2 * 16 * 2;

fn setup(policy: &str, cold: Option<(&Path, usize)>) -> (Layer, Config) {
    let heads = HeadShape::new(4, 2, 16).unwrap();
    let warm_limit_bytes = cold.map(|(_, limit)| limit);
    let cold = cold.map(|(folder, _)| ColdConfig::new(folder));
    (Layer::random(heads, TOKENS, 17), Config { cold, warm_limit_bytes, ..config(heads, policy, 112) })
}

fn run(engine: &mut Engine, layer: &Layer, seq: SeqId, prefill: usize) -> Vec<Vec<f32>> {
    for start in (0..prefill).step_by(100) {
        let (k, v) = layer.rows(start..(start + 100).min(prefill));
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    }
    (prefill..TOKENS).map(|position| layer.decode(engine, seq, 0, position).0).collect()
}

#[test]
fn a_warm_limit_changes_no_bit_and_is_kept() {
    for policy in ["floe", "quest", "oracle", "full"] {
        let folder = tempfile::tempdir().unwrap();
        let (layer, plain) = setup(policy, None);
        let mut engine = Engine::open(plain).unwrap();
        let seq = engine.admit().unwrap();
        let expected = run(&mut engine, &layer, seq, 1400);

        let warm_limit_bytes = 4 * SLAB;
        let (_, config) = setup(policy, Some((folder.path(), warm_limit_bytes)));
        let mut engine = Engine::open(config).unwrap();
        let seq = engine.admit().unwrap();
        assert!(run(&mut engine, &layer, seq, 1400) == expected, "{policy}");
        let report = engine.cold_report().unwrap();
        assert!(report.slabs >= 6 && report.failed == 0, "{report:?}");
        // The open slab of each head stays, and one batch may be on its way.
        assert!(engine.warm_bytes() <= warm_limit_bytes + 2 * SLAB, "{}", engine.warm_bytes());

        // Cutting back into a cold slab and going on makes it warm again, with the same bits.
        engine.truncate(seq, 300).unwrap();
        let again = {
            let mut plain = Engine::open(setup(policy, None).1).unwrap();
            let own = plain.admit().unwrap();
            run(&mut plain, &layer, own, 1400);
            plain.truncate(own, 300).unwrap();
            let (k, v) = layer.rows(300..1400);
            plain.prefill(own, LayerId(0), &k, &v).unwrap();
            layer.decode(&mut plain, own, 0, 1400).0
        };
        let (k, v) = layer.rows(300..1400);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
        assert!(layer.decode(&mut engine, seq, 0, 1400).0 == again, "{policy}");
        drop(engine);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

/// The file system, until so many bytes were written: then it is full.
struct SmallDisk {
    room: Arc<AtomicUsize>,
}

struct SmallDraft {
    draft: Box<dyn Draft>,
    room: Arc<AtomicUsize>,
}

impl Write for SmallDraft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.room.load(Ordering::SeqCst);
        if room == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = self.draft.write(&bytes[..bytes.len().min(room)])?;
        self.room.fetch_sub(written, Ordering::SeqCst);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.draft.flush()
    }
}

impl Draft for SmallDraft {
    fn publish(self: Box<Self>) -> io::Result<()> {
        self.draft.publish()
    }
}

impl Storage for SmallDisk {
    fn draft(&self, path: &Path) -> io::Result<Box<dyn Draft>> {
        Ok(Box::new(SmallDraft { draft: FsStorage.draft(path)?, room: self.room.clone() }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FileBytes>> {
        FsStorage.open(path)
    }
}

#[test]
fn a_full_disk_loses_nothing_and_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let (layer, plain) = setup("floe", None);
    let mut engine = Engine::open(plain).unwrap();
    let seq = engine.admit().unwrap();
    let expected = run(&mut engine, &layer, seq, 1400);
    for room in [0, 100, SLAB + 500, 3 * SLAB] {
        let disk = Arc::new(SmallDisk { room: Arc::new(AtomicUsize::new(room)) });
        let (_, config) = setup("floe", Some((folder.path(), 2 * SLAB)));
        let mut engine = Engine::open_on(disk.clone(), config).unwrap();
        let seq = engine.admit().unwrap();
        assert!(run(&mut engine, &layer, seq, 1400) == expected, "{room}");
        let report = engine.cold_report().unwrap();
        assert!(report.failed > 0 && report.last_error.unwrap().contains("cold-"), "{room}");
        // A save that fails leaves no file, and the sequence goes on.
        let path = folder.path().join("s.kv");
        assert!(engine.save_to(&*disk, seq, &path).unwrap_err().is_environment());
        assert!(!path.exists());
        engine.truncate(seq, 700).unwrap();
    }
}

const CHILD: &str = "FLOE_TEST_SPILL_INTO";

/// Not a test of its own: what [`what_a_killed_process_wrote_is_whole`] kills.
#[test]
fn child_that_spills_for_ever() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    let (layer, config) = setup("window", Some((Path::new(&folder), SLAB)));
    let mut engine = Engine::open(config).unwrap();
    for _ in 0..1000 {
        let seq = engine.admit().unwrap();
        run(&mut engine, &layer, seq, TOKENS);
    }
}

#[test]
fn what_a_killed_process_wrote_is_whole() {
    let (layer, _) = setup("window", None);
    let mut found = 0;
    for round in 0..10u64 {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_spills_for_ever"])
            .env(CHILD, folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(60 + 23 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let slabs = recover(&FsStorage, folder.path()).unwrap();
        found += slabs.len();
        for ((head, slab), copy) in slabs {
            // Row by row what was appended: every sequence of the child holds the same tokens.
            for (row, bytes) in copy.bytes().chunks_exact(2 * 16 * 2).enumerate() {
                let token = slab as usize * 256 + row;
                let at = (token * 2 + head as usize) * 16;
                let expected: Vec<u8> = [&layer.k[at..at + 16], &layer.v[at..at + 16]]
                    .concat()
                    .iter()
                    .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
                    .collect();
                assert_eq!(bytes, expected, "head {head}, token {token}");
            }
        }
    }
    assert!(found > 0, "no file was published in any round");
}

#[test]
fn a_folder_that_is_none_is_refused_by_name() {
    let (_, config) = setup("floe", Some((Path::new("/nonexistent/floe"), 0)));
    let message = Engine::open(config.clone()).err().unwrap().to_string();
    assert!(message.contains("cold.folder") && message.contains("/nonexistent/floe"), "{message}");
    let limitless = Config { warm_limit_bytes: None, cold: Some(ColdConfig::new(".")), ..config };
    let message = Engine::open(limitless).err().unwrap().to_string();
    assert!(message.contains("warm_limit_bytes"), "{message}");
}

#[test]
fn a_full_warm_tier_refuses_tokens_and_keeps_what_it_has() {
    let (layer, plain) = setup("floe", None);
    // Room for two slabs of each of the two heads.
    let mut engine = Engine::open(Config { warm_limit_bytes: Some(4 * SLAB), ..plain.clone() }).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..500);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    let (k, v) = layer.rows(500..520);
    let refusal = engine.prefill(seq, LayerId(0), &k, &v).unwrap_err();
    assert!(refusal.is_environment() && refusal.to_string().contains("warm_limit_bytes"), "{refusal}");
    assert_eq!((engine.num_tokens(seq, LayerId(0)).unwrap(), engine.warm_bytes()), (500, 4 * SLAB));
    let mut other = Engine::open(plain).unwrap();
    let own = other.admit().unwrap();
    let (k, v) = layer.rows(0..500);
    other.prefill(own, LayerId(0), &k, &v).unwrap();
    for position in 500..512 {
        let expected = layer.decode(&mut other, own, 0, position).0;
        assert!(layer.decode(&mut engine, seq, 0, position).0 == expected);
    }
    // A closed sequence makes room.
    engine.close(seq).unwrap();
    assert_eq!(engine.warm_bytes(), 0);
    let again = engine.admit().unwrap();
    engine.prefill(again, LayerId(0), &k, &v).unwrap();
}

#[test]
fn every_eviction_policy_spills_and_reads_ahead_without_changing_a_bit() {
    for policy in ["floe", "oracle"] {
        let (layer, plain) = setup(policy, None);
        let mut engine = Engine::open(plain).unwrap();
        let seq = engine.admit().unwrap();
        let expected = run(&mut engine, &layer, seq, 1400);
        for eviction in EvictionKind::ALL {
            let folder = tempfile::tempdir().unwrap();
            let cold = Some(ColdConfig { eviction, ..ColdConfig::new(folder.path()) });
            let (_, config) = setup(policy, None);
            let mut engine =
                Engine::open(Config { cold, warm_limit_bytes: Some(6 * SLAB), ..config }).unwrap();
            let seq = engine.admit().unwrap();
            assert!(run(&mut engine, &layer, seq, 1400) == expected, "{policy}, {eviction}");
            // The workers take their time; the steps do not depend on it.
            for round in 0.. {
                let report = engine.cold_report().unwrap();
                assert!(engine.warm_bytes() <= 8 * SLAB && report.failed == 0, "{report:?}");
                if report.read_ahead > 0 && report.brought_back > 0 && report.released > 4 {
                    break;
                }
                assert!(round < 200, "{policy}, {eviction}: {report:?}");
                // The same positions again. An index that saw removals may answer differently, so only the run above is compared.
                engine.truncate(seq, 1400).unwrap();
                (1400..TOKENS).for_each(|position| drop(layer.decode(&mut engine, seq, 0, position)));
            }
        }
    }
}

#[test]
fn what_rots_on_disk_is_reported_by_the_step_that_needs_it_and_never_used() {
    let folder = tempfile::tempdir().unwrap();
    let (layer, plain) = setup("oracle", None);
    let mut engine = Engine::open(plain).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..1400);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    let expected = layer.decode(&mut engine, seq, 0, 1400).0;
    let (_, config) = setup("oracle", Some((folder.path(), 4 * SLAB)));
    let mut engine = Engine::open(config).unwrap();
    let seq = engine.admit().unwrap();
    for start in (0..1400).step_by(100) {
        let (k, v) = layer.rows(start..start + 100);
        engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    }
    // One bit of every page of every file, written in place: the maps see it.
    let flip = || {
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let path = file.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            for at in (64..bytes.len() - 4096).step_by(16 * 64) {
                bytes[at] ^= 1;
            }
            let mut file = std::fs::File::options().write(true).open(&path).unwrap();
            file.write_all(&bytes).unwrap();
        }
    };
    flip();
    let (k_new, v_new) = layer.rows(1400..1401);
    let q = layer.queries(1400..1401);
    let step =
        DecodeStep { layer: LayerId(0), position: 1400, q, q_pre: None, k_new, v_new, scale: layer.scale() };
    let (mut out, mut report) = (vec![0.0; 64], StepReport::default());
    let error = engine.decode(seq, &step, &mut out, &mut report).unwrap_err();
    assert!(matches!(&error, Error::Damage(_)) && error.to_string().contains("cold-"), "{error}");
    assert_eq!(engine.num_tokens(seq, LayerId(0)).unwrap(), 1400);
    // Healed, the same step gives the right bits: nothing was lost by the refusal.
    flip();
    engine.decode(seq, &step, &mut out, &mut report).unwrap();
    assert!(out == expected);
}
