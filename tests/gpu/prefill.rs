//! Device memory while prompts are read.

use floe::gpu::{GpuEngine, GpuOptions};
use floe::{Config, HeadShape, HotConfig, KvDtype, LayerId};
use half::bf16;

use crate::world::{Held, Random, World, world};

const LAYERS: usize = 2;
const HEADS: usize = 8;
const D: usize = 128;
const PIECE: usize = 2048;
const LONG: usize = 65_536;
const MIB: usize = 1 << 20;

/// Bytes of device memory that an engine's buffers take, when it is opened and at most while it reads a prompt; and what it says it holds.
#[derive(Debug)]
struct Taken {
    opened: usize,
    peak: usize,
    rows: usize,
    summaries: usize,
}

fn taken(world: &World, policy: &str, (max_tokens, prompt): (usize, usize)) -> Taken {
    let heads = HeadShape::new(4 * HEADS, HEADS, D).unwrap();
    let hot = HotConfig { slots: 1024, ..HotConfig::default() };
    let policy = policy.parse().unwrap();
    let config = Config { policy, hot, ..Config::new(LAYERS, heads, KvDtype::Bf16) };
    // Room for 5 % of the long prompt's rows, whatever is read.
    let rows = GpuOptions::for_load(&config, 1, LONG, 0.05).rows;
    let options = GpuOptions { rows, ..GpuOptions::for_load(&config, 1, max_tokens, 0.05) };
    let random = Random(3).normals(PIECE * HEADS * D);
    let [k, v] = [(); 2].map(|()| Held::new(world, &random, [PIECE, HEADS, D]));
    world.stream.synchronize().unwrap();
    let before = world.device.held_bytes();
    let held = || world.device.held_bytes() - before;
    let mut engine = GpuEngine::<bf16>::open(&world.device, config, options).unwrap();
    let opened = held();
    let seq = engine.admit(None).unwrap();
    let mut peak = opened;
    for layer in (0..LAYERS).map(LayerId) {
        for _ in 0..prompt / PIECE {
            engine.prefill(seq, layer, (&k.tensor(), &v.tensor()), &world.stream).unwrap();
            peak = peak.max(held());
        }
        // As a host engine does whose next layer goes on meanwhile.
        engine.index(seq, layer, &world.stream).unwrap();
        peak = peak.max(held());
    }
    world.stream.synchronize().unwrap();
    engine.wait_for_trees();
    peak = peak.max(held());
    let memory = engine.memory();
    assert_eq!(engine.num_tokens(seq, LayerId(LAYERS - 1)).unwrap(), prompt);
    Taken { opened, peak, rows: memory.rows_bytes, summaries: memory.summary_bytes }
}

#[test]
fn a_prompt_takes_no_device_memory_however_long() {
    let world = world();
    for policy in ["pagemean:sketch=k1,tail=page", "floe"] {
        let (short, long) = (taken(&world, policy, (LONG, 8192)), taken(&world, policy, (LONG, LONG)));
        let narrow = taken(&world, policy, (8192, 8192));
        let text = format!("{policy}: {short:?} {long:?}, for 8K at most {narrow:?}");
        assert_eq!((short.peak, long.peak), (long.opened, long.opened), "{text}");
        // Another longest prompt changes summaries alone, and tables.
        assert_eq!((narrow.rows, short.rows), (long.rows, long.rows), "{text}");
        let (grown, summaries) = (long.opened - narrow.opened, long.summaries - narrow.summaries);
        assert!(grown <= summaries + LAYERS * 32 * MIB, "{text}");
        let stored = LAYERS * (LONG - 8192) * HEADS * 4 * D;
        assert!(grown * 3 < stored, "{grown} of {stored} bytes more are stored: {text}");
        eprintln!("{text}");
    }
}
