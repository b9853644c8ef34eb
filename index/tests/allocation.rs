//! A search and its tail allocate nothing once scratch and answer have grown.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use std::alloc::System;

use common::clustered;
use floe_index::sketch::SketchConfig;
use floe_index::{Dci, Found, KeyIndex, Scratch, SearchParams, Tail, TailOut, Unit};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[test]
fn search_and_tail_allocate_nothing_after_warm_up() {
    let (n, dim) = (8000, 128);
    let data = clustered(n, dim, 4, 2);
    for sketch in [SketchConfig::OFF, SketchConfig::K2V1] {
        let mut index = Dci::with_sketch(dim, sketch).unwrap();
        index.build(&data.batch(0..n)).unwrap();
        let (mut scratch, mut found) = (Scratch::default(), Found::default());
        let (mut out, mut lse) = (vec![0.0; 4 * dim], vec![0.0; 4]);
        let exclude: Vec<u32> = data.ids[n - 64..].to_vec();
        let mut step = |j: usize| {
            for open_fraction in [1.0, 0.3] {
                let params =
                    SearchParams { open_fraction, ..SearchParams::exact(200, Unit::Token, Tail::Tree) };
                let query = data.query(j);
                index.search(&query, &exclude, &params, &mut scratch, &mut found).unwrap();
                let state = TailOut { out: &mut out, lse: &mut lse };
                index.tail(&query, &exclude, &found, &mut scratch, state).unwrap();
            }
        };
        (0..16).for_each(&mut step);
        let region = Region::new(ALLOCATOR);
        (0..16).for_each(&mut step);
        let change = region.change();
        assert_eq!((change.allocations, change.reallocations), (0, 0), "sketch {sketch}");
    }
}
