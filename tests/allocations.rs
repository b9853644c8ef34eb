//! A decode step allocates nothing after warm-up: counted, hot tier and all.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "a counting allocator cannot be written safely")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Layer, config};
use floe::policy::{EvictionKind, PrefetchKind};
use floe::{Config, DecodeStep, Engine, HeadShape, HotConfig, LayerId, StepReport, TensorView};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's obligations are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of `rounds` times ten steps, sequence rewound in between so that nothing grows, and the engine: threads that end
/// allocate, so it has to live while others are counted.
fn count(hot: HotConfig, threads: usize, rounds: usize) -> (usize, Engine) {
    let heads = HeadShape::new(4, 2, 32).unwrap();
    let layer = Layer::random(heads, 1100, 9);
    let mut engine = Engine::open(Config { hot, threads, ..config(heads, "floe", 160) }).unwrap();
    let seq = engine.admit().unwrap();
    let (k, v) = layer.rows(0..1040);
    engine.prefill(seq, LayerId(0), &k, &v).unwrap();
    engine.publish(seq).unwrap();
    let (mut out, mut report) = (vec![0.0f32; 128], StepReport::default());
    let shape = [1, 4, 32];
    let mut before = 0;
    for round in 0..rounds + 2 {
        if round == 2 {
            before = ALLOCATIONS.load(Ordering::Relaxed);
        }
        // Fewer than 16, so that no batch joins the index: what grows with the sequence is not the step's.
        for position in 1040..1050 {
            let (k_new, v_new) = layer.rows(position..position + 1);
            let q = TensorView::contiguous(&layer.q[position * 128..][..128], shape).unwrap();
            let step = DecodeStep {
                layer: LayerId(0),
                position,
                q,
                q_pre: Some(q),
                k_new,
                v_new,
                scale: layer.scale(),
            };
            engine.decode(seq, &step, &mut out, &mut report).unwrap();
        }
        if round < rounds + 1 {
            let stop = ALLOCATIONS.load(Ordering::Relaxed);
            engine.truncate(seq, 1040).unwrap();
            before += if round >= 2 { ALLOCATIONS.load(Ordering::Relaxed) - stop } else { 0 };
        }
    }
    (ALLOCATIONS.load(Ordering::Relaxed) - before, engine)
}

#[test]
fn a_step_allocates_nothing_after_warm_up() {
    let mut engines = Vec::new();
    for (slots, eviction, prefetch) in [
        (0, EvictionKind::Lru, PrefetchKind::None),
        (100, EvictionKind::Lru, PrefetchKind::None),
        (100, EvictionKind::Lrfu, PrefetchKind::None),
        (100, EvictionKind::Clock, PrefetchKind::Last),
        (100, EvictionKind::Lfu, PrefetchKind::NextLayer),
        (100, EvictionKind::Mass, PrefetchKind::Predicted),
    ] {
        let hot = HotConfig { slots, eviction, prefetch, ..HotConfig::default() };
        // Own threads, several of them, those of the process.
        for threads in [1, 2, 0] {
            let (allocations, engine) = count(hot, threads, 20);
            engines.push(engine);
            assert_eq!(allocations, 0, "allocations in 200 steps, {threads} threads, {hot:?}");
        }
    }
}
