//! What the tree promises beyond the common contract: equality with a flat scan, effort, fill, determinism.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::clustered;
use floe_index::sketch::SketchConfig;
use floe_index::{DETAIL, Dci, Found, KeyIndex, Scratch, SearchParams, Tail, TailOut, Unit};

fn grown(n: usize, dim: usize, sketch: SketchConfig) -> Dci {
    let data = clustered(n, dim, 4, 21);
    let mut index = Dci::with_sketch(dim, sketch).unwrap();
    index.build(&data.batch(0..n / 2)).unwrap();
    for at in (n / 2..n).step_by(16) {
        index.insert(&data.batch(at..(at + 16).min(n))).unwrap();
    }
    index
}

#[test]
fn unlimited_effort_equals_a_flat_scan_of_the_same_pages_bit_by_bit() {
    let (n, dim) = (9000, 96);
    let data = clustered(n, dim, 4, 21);
    for sketch in [SketchConfig::OFF, SketchConfig::K1, SketchConfig::K2V1] {
        let dci = grown(n, dim, sketch);
        let flat = dci.flattened();
        let (mut scratch, mut a, mut b) = (Scratch::default(), Found::default(), Found::default());
        for j in 0..16 {
            let query = data.query(j);
            let exclude: Vec<u32> =
                data.ids.iter().copied().filter(|id| (id * 7 + j as u32).is_multiple_of(90)).collect();
            for (unit, tail) in [(Unit::Page, Tail::Tree), (Unit::Token, Tail::Page)] {
                let params = SearchParams::exact(300, unit, tail);
                dci.search(&query, &exclude, &params, &mut scratch, &mut a).unwrap();
                flat.search(&query, &exclude, &params, &mut scratch, &mut b).unwrap();
                assert_eq!(a.tokens, b.tokens);
                let mut states = [vec![0.0f32; 4 * dim + 4], vec![0.0f32; 4 * dim + 4]];
                for (state, (index, found)) in
                    states.iter_mut().zip([(&dci as &dyn KeyIndex, &a), (&flat as &dyn KeyIndex, &b)])
                {
                    let (out, lse) = state.split_at_mut(4 * dim);
                    index.tail(&query, &exclude, found, &mut scratch, TailOut { out, lse }).unwrap();
                }
                assert_eq!(states[0], states[1]);
            }
        }
    }
}

#[test]
fn every_effort_knob_changes_the_work_and_respects_its_bound() {
    let (n, dim) = (40_000, 64);
    let data = clustered(n, dim, 4, 21);
    let mut index = Dci::new(dim).unwrap();
    index.build(&data.batch(0..n)).unwrap();
    let run = |open_fraction, node_budget| {
        let params =
            SearchParams { node_budget, open_fraction, ..SearchParams::exact(128, Unit::Page, Tail::Tree) };
        let mut found = Found::default();
        index.search(&data.query(1), &[], &params, &mut Scratch::default(), &mut found).unwrap();
        assert_eq!(found.tail_tokens() + found.tokens.len(), n);
        (found.pages_opened, found.nodes_scored, found.index_bytes_read)
    };
    let all = run(1.0, usize::MAX);
    let quarter = run(0.25, usize::MAX);
    let few = run(0.02, usize::MAX);
    assert!(all.0 > 3 * quarter.0 && quarter.0 > 3 * few.0, "{all:?} {quarter:?} {few:?}");
    assert!(all.2 > quarter.2 && quarter.2 > few.2);
    let capped = run(1.0, 1000);
    assert!(capped.1 <= 1000 && capped.1 > 500, "{capped:?}");
}

#[test]
fn opening_by_mass_leaves_only_what_holds_little() {
    let (n, dim) = (40_000, 64);
    let data = clustered(n, dim, 4, 21);
    let mut index = Dci::with_sketch(dim, SketchConfig::K1).unwrap();
    index.build(&data.batch(0..n)).unwrap();
    let (mut scratch, mut found) = (Scratch::default(), Found::default());
    let mut run = |j: usize, open_mass, detail| {
        let exact = SearchParams::exact(176, Unit::Token, Tail::Tree);
        let params = SearchParams { open_mass, detail, ..exact };
        let query = data.query(j);
        index.search(&query, &[], &params, &mut scratch, &mut found).unwrap();
        let (mut out, mut lse) = (vec![0.0; 4 * dim], vec![0.0; 4]);
        let state = TailOut { out: &mut out, lse: &mut lse };
        index.tail(&query, &[], &found, &mut scratch, state).unwrap();
        assert_eq!(found.tail_tokens() + found.tokens.len(), n);
        let ids: Vec<u32> = found.tokens.iter().map(|hit| hit.id).collect();
        (ids, found.pages_opened, found.pages_refined, out)
    };
    let (mut same, mut off, mut size) = (0, 0.0, 0.0);
    for j in 0..16 {
        let all = run(j, 0.0, DETAIL);
        let some = run(j, 0.05, DETAIL);
        assert!(some.1 < all.1 && some.1 > 0, "{} of {} pages opened", some.1, all.1);
        same += some.0.iter().filter(|id| all.0.contains(id)).count();
        off += some.3.iter().zip(&all.3).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        size += all.3.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        // Nothing is told apart beyond all bounds, everything without one.
        assert_eq!(run(j, 0.0, 1e9).2, 0);
        assert!(run(j, 0.0, 0.0).2 >= n / 16 && all.2 < n / 16, "{} pages", all.2);
    }
    assert!(same >= 16 * 174, "{same} of {}", 16 * 176);
    assert!((off / size).sqrt() < 0.02, "{}", (off / size).sqrt());
}

#[test]
fn opened_quarter_keeps_most_of_what_the_whole_finds() {
    let (n, dim) = (40_000, 64);
    let data = clustered(n, dim, 4, 21);
    let mut index = Dci::new(dim).unwrap();
    index.build(&data.batch(0..n)).unwrap();
    let (mut kept, mut all) = (0, 0);
    for j in 0..16 {
        let mut lists = Vec::new();
        for open_fraction in [1.0, 0.25] {
            let params = SearchParams { open_fraction, ..SearchParams::exact(176, Unit::Page, Tail::Tree) };
            let mut found = Found::default();
            index.search(&data.query(j), &[], &params, &mut Scratch::default(), &mut found).unwrap();
            lists.push(found.tokens);
        }
        all += lists[0].len();
        kept += lists[0].iter().filter(|h| lists[1].iter().any(|o| o.id == h.id)).count();
    }
    assert!(kept * 10 >= all * 9, "{kept} of {all}");
}

#[test]
fn pages_are_full_after_build_and_after_a_hundred_thousand_insertions() {
    let (n, dim) = (110_000, 64);
    let data = clustered(n, dim, 1, 33);
    let mut index = Dci::new(dim).unwrap();
    index.build(&data.batch(0..10_000)).unwrap();
    assert!(index.fill() >= 0.9, "{}", index.fill());
    for at in (10_000..n).step_by(16) {
        index.insert(&data.batch(at..(at + 16).min(n))).unwrap();
    }
    assert!(index.fill() >= 0.85, "{}", index.fill());
    assert_eq!(index.len(), n);
    let report = index.memory();
    let kv = n * dim * 4;
    // At dim 64 the ids weigh twice what they do at 128: 8 of 256 bytes.
    assert!(report.total_bytes() * 100 < kv * 15, "{report:?}");
}

#[test]
fn the_same_tokens_give_the_same_bytes_on_any_number_of_threads() {
    let (n, dim) = (20_000, 64);
    let data = clustered(n, dim, 1, 5);
    let build = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut index = Dci::with_sketch(dim, SketchConfig::K1).unwrap();
            index.build(&data.batch(0..n - 800)).unwrap();
            index.insert(&data.batch(n - 800..n)).unwrap();
            index.snapshot()
        })
    };
    let one = build(1);
    assert!(one == build(4) && one == build(3), "snapshots differ");
}
