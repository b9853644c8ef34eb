//! A call of a size seen before allocates nothing. Alone in its file: the counter sees every thread of the process.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use floe_cuda::cpu::quant::{QuantKind, QuantKv, QuantScratch, attend};
use floe_cuda::{
    Attend, AttendParams, AttendScratch, Isa, KvRows, Rows, SliceRows, SplitScratch, StateMut, dense_decode,
    score_rows, sparse_decode,
};
use half::bf16;
use support::Random;

/// Counts what the system allocator is asked for.
struct Counting;

static NUM_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes every call on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's obligations are those of the system allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(p, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of the second of two calls.
fn in_second_call(mut call: impl FnMut()) -> usize {
    call();
    let before = NUM_ALLOCATIONS.load(Ordering::Relaxed);
    call();
    NUM_ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn second_call_of_every_kernel_allocates_nothing() {
    let (group, d, n) = (12, 80, 700);
    let mut random = Random(9);
    let q = random.normals(group * d, 1.0);
    let data: Vec<bf16> = random.normals(n * 2 * d, 1.0).into_iter().map(bf16::from_f32).collect();
    let rows = SliceRows::new(&data, d).unwrap();
    let list: Vec<u32> = (0..n as u32).step_by(3).collect();
    let (mut out, mut lse, mut scores) = (vec![0.0; group * d], vec![0.0; group], vec![0.0; group * n]);
    let params = AttendParams { scale: 0.1, softcap: None };
    for isa in Isa::available() {
        let whole = Attend { isa, q: &q, rows: &rows, params };
        let mut scratch = AttendScratch::default();
        let count = in_second_call(|| {
            let state = StateMut { out: &mut out, lse: &mut lse };
            sparse_decode(&whole, Rows::List(&list), &mut scratch, state).unwrap();
            score_rows(&whole, 0..n, &mut scratch, &mut scores).unwrap();
        });
        assert_eq!(count, 0, "sparse_decode and score_rows, {}", isa.name());

        // One split: more go through rayon, whose queue allocates a block now and then.
        let mut scratch = SplitScratch::default();
        let count = in_second_call(|| {
            let state = StateMut { out: &mut out, lse: &mut lse };
            dense_decode(&whole, 0..rows.num_rows(), &mut scratch, state).unwrap();
        });
        assert_eq!(count, 0, "dense_decode, {}", isa.name());

        for kind in [QuantKind::Int8, QuantKind::Int4, QuantKind::Kivi2 { residual: 32 }] {
            let mut kv = QuantKv::new(kind, d).unwrap();
            kv.append(&data[..n * d], &data[n * d..]).unwrap();
            let mut scratch = QuantScratch::default();
            let count = in_second_call(|| {
                let state = StateMut { out: &mut out, lse: &mut lse };
                attend(&Attend { isa, q: &q, rows: &kv, params }, 0..n, &mut scratch, state).unwrap();
            });
            assert_eq!(count, 0, "{kind:?}, {}", isa.name());
        }
    }
}
