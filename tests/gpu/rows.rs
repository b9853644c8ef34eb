//! Stored rows that come back: gathered, forked, saved and restored.

use floe::gpu::Prefer;
use floe::{Config, Engine, Error, HeadShape, KvDtype, LayerId, SeqId, TensorView};
use half::bf16;

use crate::lifetime::{CLOSE, D, GROUP, HEADS, Stage, Story, stage};
use crate::world::{Held, world};

/// All of a sequence fits densely; or it has sinks, a ring and slots.
const PLACES: [(usize, Prefer); 2] = [(8192, Prefer::Exact), (2064, Prefer::Speed)];

/// Keys and values of layer 0, gathered head-major from `first` on.
fn gathered(stage: &Stage<'_>, seq: SeqId, first: usize, tokens: usize) -> [Vec<bf16>; 2] {
    let world = stage.world;
    let empty = vec![bf16::NAN; HEADS * tokens * D];
    let [k, v] = [(); 2].map(|()| Held::new(world, &empty, [tokens, HEADS, D]));
    stage.engine.gather(seq, LayerId(0), first, (&k.by_head(), &v.by_head()), &world.stream).unwrap();
    [k.read(world), v.read(world)]
}

fn assert_stored(stage: &Stage<'_>, story: &Story, first: usize) {
    let tokens = story.k[0].len() / D - first;
    let [k, v] = gathered(stage, story.seq, first, tokens);
    for head in 0..HEADS {
        let own = head * tokens * D..(head + 1) * tokens * D;
        assert!(k[own.clone()] == story.k[head][first * D..], "keys of head {head} from {first} on");
        assert!(v[own] == story.v[head][first * D..], "values of head {head} from {first} on");
    }
}

fn cut(stage: &mut Stage<'_>, story: &mut Story, tokens: usize) {
    stage.engine.truncate(story.seq, tokens, &stage.world.stream).unwrap();
    story.k.iter_mut().chain(&mut story.v).for_each(|rows| rows.truncate(tokens * D));
}

/// The same token after both sequences, whose outputs must have the same bits.
fn same_step(stage: &mut Stage<'_>, stories: &mut [Story; 2]) -> Vec<f32> {
    let (q, k, v) = {
        let random = &mut stage.random;
        (random.normals(HEADS * GROUP * D), random.normals(HEADS * D), random.normals(HEADS * D))
    };
    let mut first = Vec::new();
    for layer in [0, 1] {
        let [q, k, v] = [&q, &k, &v].map(|x| [&x[..], &x[..]].concat());
        let sequences = [stories[0].seq, stories[1].seq];
        let out = stage.attend((&sequences, LayerId(layer)), [&q, &k, &v]);
        let (one, other) = out.split_at(HEADS * GROUP * D);
        assert!(one.iter().all(|x| x.is_finite()));
        assert_eq!(one, other, "layer {layer}");
        if layer == 0 {
            first = one.to_vec();
        }
    }
    stories.iter_mut().for_each(|story| story.store(&k, &v));
    first
}

#[test]
fn stored_rows_are_gathered_from_wherever_they_lie() {
    let world = world();
    for (rows, prefer) in PLACES {
        let mut stage = stage(&world, rows, prefer);
        let mut a = stage.admit(2500);
        stage.prefill(&mut a, 123);
        for _ in 0..20 {
            stage.step(&mut [&mut a]);
        }
        for first in [0, 5, 1000, 2600] {
            assert_stored(&stage, &a, first);
        }
        cut(&mut stage, &mut a, 2600);
        stage.step(&mut [&mut a]);
        assert_stored(&stage, &a, 0);
        let tokens = a.k[0].len() / D;
        let buffer = Held::new(&world, &vec![bf16::ZERO; 2 * HEADS * D], [2, HEADS, D]);
        let refused = stage.engine.gather(
            a.seq,
            LayerId(0),
            tokens - 1,
            (&buffer.tensor(), &buffer.tensor()),
            &world.stream,
        );
        assert!(matches!(refused, Err(Error::Config { field: "tokens", .. })), "{refused:?}");
    }
}

#[test]
fn a_fork_goes_its_own_way() {
    let world = world();
    for (rows, prefer) in PLACES {
        let mut stage = stage(&world, rows, prefer);
        let mut a = stage.admit(2300);
        for _ in 0..5 {
            stage.step(&mut [&mut a]);
        }
        let mut b = Story { seq: stage.engine.fork(a.seq, &world.stream).unwrap(), ..a.clone() };
        for _ in 0..20 {
            let mut both = [a, b];
            same_step(&mut stage, &mut both);
            [a, b] = both;
        }
        // Into chunks that both hold, on either side, and on from there.
        cut(&mut stage, &mut a, 2250);
        stage.prefill(&mut a, 400);
        cut(&mut stage, &mut b, 2303);
        let far = [stage.step(&mut [&mut a, &mut b]), stage.step(&mut [&mut b])];
        assert!(prefer != Prefer::Exact || far.iter().all(|far| *far < CLOSE), "{far:?}");
        assert_stored(&stage, &a, 0);
        assert_stored(&stage, &b, 0);
        let c = Story { seq: stage.engine.fork(b.seq, &world.stream).unwrap(), ..b.clone() };
        stage.engine.close(b.seq).unwrap();
        let held = stage.engine.memory().host_bytes;
        // What the closed one alone held is used again, what the others hold is not.
        let d = stage.admit(2048);
        assert_eq!(stage.engine.memory().host_bytes, held);
        for story in [&a, &c, &d] {
            assert_stored(&stage, story, 0);
        }
    }
}

#[test]
fn a_saved_sequence_goes_on_as_the_one_that_was_saved() {
    let world = world();
    let folder = std::env::temp_dir().join(format!("floe-gpu-rows-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("row.floe");
    for (rows, prefer) in PLACES {
        let mut stage = stage(&world, rows, prefer);
        let mut a = stage.admit(4300);
        for _ in 0..30 {
            stage.step(&mut [&mut a]);
        }
        let bytes = stage.engine.save(a.seq, &path).unwrap();
        assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
        let seq = stage.engine.restore(&path, None, &world.stream).unwrap();
        let b = Story { seq, ..a.clone() };
        assert_stored(&stage, &b, 0);
        let mut both = [a, b];
        for _ in 0..20 {
            same_step(&mut stage, &mut both);
        }
        // The engine on the CPU reads the file too, and the other way round.
        let mut cpu = on_cpu();
        let seq = cpu.restore(&path).unwrap();
        assert_eq!(cpu.num_tokens(seq, LayerId(0)).unwrap(), 4330);
        cpu.save(seq, &path).unwrap();
        let seq = stage.engine.restore(&path, None, &world.stream).unwrap();
        let mut c = Story { seq, ..both[0].clone() };
        c.k.iter_mut().chain(&mut c.v).for_each(|rows| rows.truncate(4330 * D));
        assert_stored(&stage, &c, 0);
        // A page that is not what was written is never handed out, and leaves no sequence behind.
        let mut damaged = std::fs::read(&path).unwrap();
        damaged[5000] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        stage.engine.close(c.seq).unwrap();
        for _ in 0..5 {
            let refused = stage.engine.restore(&path, None, &world.stream);
            assert!(matches!(&refused, Err(Error::Damage(_))), "{refused:?}");
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// An engine on the CPU for the same model.
fn on_cpu() -> Engine {
    let heads = HeadShape::new(HEADS * GROUP, HEADS, D).unwrap();
    let policy = "full".parse().unwrap();
    Engine::open(Config { policy, ..Config::new(2, heads, KvDtype::Bf16) }).unwrap()
}

#[test]
fn the_cpu_reads_what_the_device_stored() {
    let world = world();
    let folder = std::env::temp_dir().join(format!("floe-gpu-cpu-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("row.floe");
    let mut stage = stage(&world, 8192, Prefer::Exact);
    let a = stage.admit(700);
    stage.engine.save(a.seq, &path).unwrap();
    let mut cpu = on_cpu();
    let seq = cpu.restore(&path).unwrap();
    let mut both = [a.clone(), Story { seq: stage.engine.fork(a.seq, &world.stream).unwrap(), ..a }];
    let seed = stage.random.0;
    let device = same_step(&mut stage, &mut both);
    stage.random.0 = seed;
    let random = &mut stage.random;
    let (q, k, v) = (random.normals(HEADS * GROUP * D), random.normals(HEADS * D), random.normals(HEADS * D));
    let step = floe::DecodeStep {
        layer: LayerId(0),
        position: 700,
        q: TensorView::contiguous(&q[..], [1, HEADS * GROUP, D]).unwrap(),
        q_pre: None,
        k_new: TensorView::contiguous(&k[..], [1, HEADS, D]).unwrap(),
        v_new: TensorView::contiguous(&v[..], [1, HEADS, D]).unwrap(),
        scale: 0.3,
    };
    let mut out = vec![0.0; HEADS * GROUP * D];
    cpu.decode(seq, &step, &mut out, &mut floe::StepReport::default()).unwrap();
    for (got, want) in device.chunks(D).zip(out.chunks(D)) {
        let wide: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
        assert!(crate::world::error(got, &wide, D) < CLOSE);
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
