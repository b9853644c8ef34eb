//! The exported pages are those that the index searches, and a mirror that follows the changes equals a fresh one.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use std::collections::BTreeMap;

use common::{Data, clustered};
use floe_index::export::{Changes, Epoch, PageView};
use floe_index::sketch::SketchConfig;
use floe_index::{Dci, Flat, KeyIndex};

/// One page as a device would hold it.
#[derive(Clone, Debug, PartialEq)]
struct Page {
    ids: Vec<(usize, u32)>,
    key: Vec<f32>,
    value: Vec<f32>,
    spread: f32,
    lines: Vec<[u32; 16]>,
    scales: Vec<[u16; 16]>,
}

fn read(view: &PageView<'_>, page: usize) -> Option<Page> {
    let live = view.live()[page];
    if live == 0 {
        return None;
    }
    let (mut key, mut value) = (vec![0.0; view.dim()], vec![0.0; view.dim()]);
    view.mean_key(page, &mut key);
    view.mean_value(page, &mut value);
    let ids = (0..16).filter(|t| live >> t & 1 == 1).map(|t| (t, view.ids()[page * 16 + t])).collect();
    let (mut lines, mut scales) = (Vec::new(), Vec::new());
    for codes in [view.key_sketches(), view.value_sketches()].into_iter().flatten() {
        let per_page = codes.lines.len() / codes.scales.len();
        lines.extend(codes.lines[page * per_page..(page + 1) * per_page].iter().map(|line| line.0));
        scales.push(codes.scales[page]);
    }
    Some(Page { ids, key, value, spread: view.spread(page), lines, scales })
}

fn mirror(view: &PageView<'_>) -> BTreeMap<usize, Page> {
    (0..view.num_pages()).filter_map(|page| Some((page, read(view, page)?))).collect()
}

/// Brings `pages` up to date; returns how many pages were read.
fn follow(view: &PageView<'_>, epoch: &mut Epoch, pages: &mut BTreeMap<usize, Page>) -> usize {
    let changes = view.changes(*epoch);
    *epoch = view.epoch();
    let Changes::Pages(changed) = changes else {
        *pages = mirror(view);
        return pages.len();
    };
    for &page in changed {
        match read(view, page as usize) {
            Some(new) => pages.insert(page as usize, new),
            None => pages.remove(&(page as usize)),
        };
    }
    changed.len()
}

/// The first `built` of `held` tokens joined a page as they were given; the others waited at eight bits for one.
fn check_contents(view: &PageView<'_>, data: &Data, (built, held): (usize, usize)) {
    let mut seen = view.young().to_vec();
    let rotation = view.sketch().map(|sketch| sketch.rotation().matrix());
    for (number, page) in mirror(view) {
        let dim = data.dim;
        let rows: Vec<usize> = page.ids.iter().map(|x| x.1 as usize - data.ids[0] as usize).collect();
        let mean = |rows_of: &[f32], d: usize| {
            rows.iter().map(|r| f64::from(rows_of[r * dim + d])).sum::<f64>() / rows.len() as f64
        };
        for d in 0..dim {
            // Eight bits of a vector whose largest coordinate is below 12 in the index's frame.
            assert!((f64::from(page.key[d]) - mean(&data.keys, d)).abs() < 0.1, "key of page {number}");
            assert!((f64::from(page.value[d]) - mean(&data.values, d)).abs() < 0.1, "value of page {number}");
        }
        seen.extend(page.ids.iter().map(|x| x.1));
        if let (Some(rotation), Some(codes)) = (&rotation, view.key_sketches()) {
            // The sign of a code is the sign of the rotated residual, by the documented layout.
            let lines = dim.div_ceil(32);
            for (&(lane, _), &row) in page.ids.iter().zip(&rows) {
                let key = &data.keys[row * dim..(row + 1) * dim];
                let residual: Vec<f32> = key.iter().zip(&page.key).map(|(x, m)| x - m).collect();
                for (d, axis) in rotation.chunks_exact(dim).enumerate() {
                    let x: f32 = axis.iter().zip(&residual).map(|(a, b)| a * b).sum();
                    let line = &codes.lines[(number * codes.bits) * lines + d / 32];
                    let positive = line.0[lane] >> (d % 32) & 1 == 1;
                    // A step of eight bits is below 0.1.
                    let unsure = if row < built { 1e-3 } else { 0.2 };
                    let right = x.abs() < unsure || positive == (x > 0.0);
                    assert!(right, "page {number}, lane {lane}, {d}: {x}");
                }
            }
        }
    }
    seen.sort_unstable();
    let before = seen.len();
    seen.dedup();
    assert_eq!((seen.len(), before), (held, held), "every token is in one page or young");
}

#[test]
fn slices_hold_what_was_inserted() {
    let data = clustered(700, 64, 1, 21);
    for sketch in [SketchConfig::OFF, SketchConfig::K1, SketchConfig::K2V1] {
        let mut tree = Dci::with_sketch(64, sketch).unwrap();
        tree.build(&data.batch(0..600)).unwrap();
        tree.insert(&data.batch(600..700)).unwrap();
        check_contents(&tree.pages().unwrap(), &data, (600, 700));
        let mut flat = Flat::with_sketch(64, sketch).unwrap();
        flat.build(&data.batch(0..700)).unwrap();
        check_contents(&flat.pages().unwrap(), &data, (700, 700));
    }
}

#[test]
fn a_mirror_that_follows_the_changes_equals_a_fresh_one() {
    let data = clustered(9000, 64, 1, 22);
    let mut tree = Dci::with_sketch(64, SketchConfig::K2V1).unwrap();
    // More pages than changes are remembered.
    tree.build(&data.batch(0..6000)).unwrap();
    let (mut epoch, mut pages) = (Epoch::default(), BTreeMap::new());
    assert_eq!(tree.pages().unwrap().changes(epoch), Changes::All);
    let all = follow(&tree.pages().unwrap(), &mut epoch, &mut pages);
    assert_eq!(all, pages.len());
    for round in 0..180 {
        let at = 6000 + round * 16;
        tree.insert(&data.batch(at..at + 16)).unwrap();
        if round % 9 == 0 {
            tree.remove(&data.ids[round * 12..round * 12 + 40]).unwrap();
        }
        let read = follow(&tree.pages().unwrap(), &mut epoch, &mut pages);
        assert!(read <= 45, "{read} pages read in round {round}");
        assert_eq!(pages, mirror(&tree.pages().unwrap()), "round {round}");
    }
    let restored = Dci::restore(&tree.snapshot()).unwrap();
    assert_eq!(mirror(&restored.pages().unwrap()), pages);
    assert_eq!(restored.pages().unwrap().changes(Epoch::default()), Changes::All);
}
