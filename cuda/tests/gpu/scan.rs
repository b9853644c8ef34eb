//! `page_scores`, `sketch_scores`, `select_topk`, `page_tail`, `match_scan` against their twins, one chain at a time.

use floe_cuda::device::DeviceBuffer;
use floe_cuda::ops::{
    DevState, DeviceElem, KeySketches, PageScores, Ring, Scan, ScanShape, Scores, Select, Spans, Summaries,
    match_scan,
};
use floe_cuda::twin::StateF64;
use floe_cuda::twin::device as twin;
use half::{bf16, f16};

use crate::rig::{Guarded, errors, rig};
use crate::support::Random;

struct Case<'a> {
    group: usize,
    d: usize,
    /// Pages of each item.
    lens: &'a [usize],
    budget: u32,
    /// `None`: pages are selected.
    bits: Option<usize>,
}

/// [tiles, group, 16] to [group, units].
fn by_head<T: Copy>(tiles: &[T], group: usize, units: usize) -> Vec<T> {
    (0..group).flat_map(|g| (0..units).map(move |u| tiles[(u / 16 * group + g) * 16 + u % 16])).collect()
}

fn check<E: DeviceElem>(case: &Case<'_>) {
    let rig = rig();
    let (group, d, items) = (case.group, case.d, case.lens.len());
    let mut random = Random((group * d + case.budget as usize) as u64);
    let elems = |random: &mut Random, n: usize, size: f32| -> Vec<E> {
        (0..n).map(|_| E::from_f32(random.normal() * size)).collect()
    };
    let mut first = Vec::new();
    let mut num_pages = 16;
    for len in case.lens {
        first.push(num_pages as u32);
        num_pages = (num_pages + len).next_multiple_of(16);
    }
    let end: Vec<u32> = first.iter().zip(case.lens).map(|(f, len)| f + *len as u32).collect();
    let keys = elems(&mut random, num_pages * d, 1.0);
    let values = elems(&mut random, num_pages * d, 1.0);
    let q = elems(&mut random, items * group * d, 2.0);
    let log_count: Vec<f32> = (0..num_pages)
        .map(|i| if i % 11 == 5 { f32::NEG_INFINITY } else { ((random.bits() % 16 + 1) as f32).ln() })
        .collect();
    let scale = 1.0 / (d as f32).sqrt();

    let shape =
        ScanShape { items, group, head_dim: d, pages_max: *case.lens.iter().max().unwrap(), num_pages };
    let mut scan = Scan::new(&rig.device, shape).unwrap();
    let (first_d, end_d) = (rig.buffer(&first), rig.buffer(&end));
    let pages = Spans { first: first_d.view(), end: end_d.view() };
    let (keys_d, values_d, q_d, log_d) =
        (rig.buffer(&keys), rig.buffer(&values), rig.buffer(&q), rig.buffer(&log_count));
    let mut scores = rig.buffer(&vec![f32::NAN; num_pages * group]);
    let mut lse = Guarded::new(rig, items * group);
    let summaries = Summaries { keys: keys_d.view(), log_count: log_d.view(), pages, spreads: None };
    scan.page_scores(&rig.stream, (q_d.view(), scale), &summaries, scores.view_mut(), lse.view()).unwrap();
    let (got, got_lse) = (scores.read(&rig.stream).unwrap(), lse.read(rig));

    // Sketches, as random bits.
    let bits = case.bits.unwrap_or(1);
    let lines: Vec<u32> = (0..num_pages * bits * d / 2).map(|_| random.bits() as u32).collect();
    let scales: Vec<f16> =
        (0..num_pages * 16).map(|_| f16::from_f32(0.2 + 0.1 * random.normal().abs())).collect();
    let masks: Vec<u16> = (0..num_pages).map(|_| random.bits() as u16 | 1).collect();
    let q_rot: Vec<f16> =
        (0..items * group * d).map(|_| f16::from_f32(random.normal() * 2.0 * scale)).collect();
    let (lines_d, scales_d, masks_d, q_rot_d) =
        (rig.buffer(&lines), rig.buffer(&scales), rig.buffer(&masks), rig.buffer(&q_rot));
    let mut tokens = rig.buffer(&vec![f16::NAN; num_pages * group * 16]);
    let page_scores = rig.buffer(&got);
    let of_pages =
        PageScores { scores: page_scores.view(), log_count: log_d.view(), lse: lse.reader(), pages };
    if case.bits.is_some() {
        let sketches =
            KeySketches { bits, lines: lines_d.view(), scales: scales_d.view(), masks: masks_d.view() };
        scan.sketch_scores(&rig.stream, q_rot_d.view(), &sketches, &of_pages, tokens.view_mut()).unwrap();
    }
    let got_tokens = tokens.read(&rig.stream).unwrap();

    // Selection and tail, from the device's own scores.
    let budget = case.budget as usize;
    let list_first: Vec<u32> = (0..items).map(|i| (i * budget) as u32).collect();
    let list_first_d = rig.buffer(&list_first);
    let mut list_end: DeviceBuffer<u32> = rig.buffer(&vec![u32::MAX; items]);
    let mut list: DeviceBuffer<u32> = rig.buffer(&vec![u32::MAX; items * budget]);
    let select = Select {
        pages: Spans { first: first_d.view(), end: end_d.view() },
        lse: case.bits.is_none().then(|| lse.reader()),
        ids: None,
        budget: case.budget,
        list_first: list_first_d.view(),
        list_end: list_end.view_mut(),
        list: list.view_mut(),
    };
    // Units of tokens span 16 times the pages.
    let (token_first, token_end): (Vec<u32>, Vec<u32>) =
        (first.iter().map(|x| 16 * x).collect(), end.iter().map(|x| 16 * x).collect());
    let (token_first, token_end) = (rig.buffer(&token_first), rig.buffer(&token_end));
    let units = Spans { first: token_first.view(), end: token_end.view() };
    let select = if case.bits.is_some() { Select { pages: units, ..select } } else { select };
    let of_scores = if case.bits.is_some() {
        Scores::Tokens(tokens.view_mut())
    } else {
        Scores::Pages(scores.view_mut())
    };
    scan.select_topk(&rig.stream, select, of_scores).unwrap();
    let (mut out, mut out_lse) = (Guarded::new(rig, items * group * d), Guarded::new(rig, items * group));
    let of_scores = if case.bits.is_some() {
        Scores::Tokens(tokens.view_mut())
    } else {
        Scores::Pages(scores.view_mut())
    };
    let state = DevState { out: out.view(), lse: out_lse.view() };
    scan.page_tail(&rig.stream, &of_scores, values_d.view(), &of_pages, state).unwrap();
    let (out, out_lse) = (out.read(rig), out_lse.read(rig));
    let (list, list_end) = (list.read(&rig.stream).unwrap(), list_end.read(&rig.stream).unwrap());

    for item in 0..items {
        let (a, b) = (first[item] as usize, end[item] as usize);
        let n = b - a;
        let name = format!("{} group {group} d {d} item {item} of {n} pages, bits {:?}", E::NAME, case.bits);
        let q_item = &q[item * group * d..(item + 1) * group * d];
        let (want, want_lse) = twin::page_scores(q_item, &keys[a * d..b * d], &log_count[a..b], scale);
        let got_item = by_head(&got[a / 16 * group * 16..], group, n);
        let lse_item = &got_lse[item * group..(item + 1) * group];
        // f32 sums of d products of exact f32 values.
        for (x, y) in got_item.iter().zip(&want) {
            assert!(
                f64::from(*x) == *y || (f64::from(*x) - y).abs() < 1e-4,
                "{name}: page score {x} is not {y}"
            );
        }
        for (x, y) in lse_item.iter().zip(&want_lse) {
            assert!(f64::from(*x) == *y || (f64::from(*x) - y).abs() < 1e-4, "{name}: lse {x} is not {y}");
        }
        let mut base = vec![0.0; group * n];
        let chosen = list[list_first[item] as usize..list_end[item] as usize].to_vec();
        let weights: Vec<f64> = if case.bits.is_some() {
            for g in 0..group {
                for p in 0..n {
                    let s = f64::from(got_item[g * n + p]);
                    base[g * n + p] = if s.is_finite() {
                        s - f64::from(log_count[a + p]) - f64::from(lse_item[g])
                    } else {
                        s
                    };
                }
            }
            let masks: Vec<u16> =
                (a..b).map(|p| if log_count[p].is_finite() { masks[p] } else { 0 }).collect();
            let sketches = twin::HostSketches {
                bits,
                lines: &lines[a * bits * d / 2..b * bits * d / 2],
                scales: &scales[a * 16..b * 16],
                masks: &masks,
            };
            let want =
                twin::sketch_scores(&q_rot[item * group * d..(item + 1) * group * d], &sketches, &base);
            let got = by_head(&got_tokens[a * group * 16..], group, n * 16);
            for (x, y) in got.iter().zip(&want) {
                let x = f64::from(x.to_f32());
                // Half a unit of f16, and f32 sums.
                assert!(
                    x == *y || (x - y).abs() <= y.abs() / 2000.0 + 2e-3,
                    "{name}: token score {x} is not {y}"
                );
            }
            let wide: Vec<f32> = got.iter().map(|x| x.to_f32()).collect();
            let want = twin::select_topk(&wide, &vec![0.0; group], budget);
            let want: Vec<u32> = want.iter().map(|u| u + 16 * a as u32).collect();
            assert_eq!(chosen, want, "{name}: selection");
            let taken: std::collections::HashSet<u32> = want.into_iter().collect();
            (0..group * n)
                .map(|at| {
                    let (g, p) = (at / n, at % n);
                    (0..16)
                        .filter(|t| !taken.contains(&((16 * (a + p) + t) as u32)))
                        .map(|t| f64::from(wide[g * n * 16 + p * 16 + t]).exp())
                        .sum()
                })
                .collect()
        } else {
            let want = twin::select_topk(&got_item, lse_item, budget);
            let want: Vec<u32> = want.iter().map(|u| u + a as u32).collect();
            assert_eq!(chosen, want, "{name}: selection");
            let taken: std::collections::HashSet<u32> = want.into_iter().collect();
            (0..group * n)
                .map(|at| {
                    let (g, p) = (at / n, at % n);
                    if taken.contains(&((a + p) as u32)) {
                        0.0
                    } else {
                        (f64::from(got_item[g * n + p]) - f64::from(lse_item[g])).exp()
                    }
                })
                .map(|w: f64| if w.is_nan() { 0.0 } else { w })
                .collect()
        };
        let lse64: Vec<f64> = lse_item.iter().map(|x| f64::from(*x)).collect();
        let want: StateF64 = twin::page_tail(&weights, &lse64, &values[a * d..b * d]);
        let want = if n == 0 {
            StateF64 { out: vec![0.0; group * d], lse: vec![f64::NEG_INFINITY; group] }
        } else {
            want
        };
        let (far, lse_far) = errors(
            &out[item * group * d..(item + 1) * group * d],
            &out_lse[item * group..(item + 1) * group],
            &want,
        );
        assert!(far < 1e-4 && lse_far < 1e-4, "{name}: tail {far:e} {lse_far:e}");
    }
}

#[test]
fn pages_are_scored_selected_and_summed_as_their_twins_do() {
    for d in [64, 96, 128, 256] {
        for group in [1, 4, 7, 8, 16] {
            let case = Case { group, d, lens: &[1, 16, 17, 500, 0, 129], budget: 16, bits: None };
            check::<bf16>(&case);
            check::<f16>(&case);
        }
    }
    check::<bf16>(&Case { group: 4, d: 128, lens: &[9_000, 20], budget: 64, bits: None });
    // More units than one block selects among.
    check::<bf16>(&Case { group: 2, d: 64, lens: &[20_000, 50], budget: 300, bits: None });
    // So many items that a block of the tail takes several parts of one.
    check::<bf16>(&Case { group: 4, d: 128, lens: &[600; 120], budget: 8, bits: None });
}

#[test]
fn tokens_are_scored_selected_and_summed_as_their_twins_do() {
    for bits in [1, 2, 4] {
        for d in [64, 96, 128, 256] {
            for group in [1, 4, 7, 8, 16] {
                let case = Case { group, d, lens: &[1, 40, 0, 17], budget: 96, bits: Some(bits) };
                check::<bf16>(&case);
            }
        }
        check::<f16>(&Case { group: 4, d: 128, lens: &[900, 20], budget: 256, bits: Some(bits) });
    }
}

#[test]
fn nearest_query_is_that_of_the_twin() {
    let rig = rig();
    let (heads, places, dim) = (32, 300, 128);
    let mut random = Random(3);
    let mut ring = random.normals(heads * places * dim, 1.0);
    let q = random.normals(heads * dim, 1.0);
    let num: Vec<u32> = (0..heads as u32).map(|h| [0, 1, 7, 300][h as usize % 4]).collect();
    // Every fourth head has two equal nearest queries.
    for head in (3..heads).step_by(4) {
        for place in [41, 200] {
            ring[(head * places + place) * dim..][..dim].copy_from_slice(&q[head * dim..][..dim]);
        }
    }
    let (ring_d, q_d, num_d) = (rig.buffer(&ring), rig.buffer(&q), rig.buffer(&num));
    let mut distance = Guarded::new(rig, heads);
    let mut place: DeviceBuffer<u32> = rig.buffer(&vec![u32::MAX; heads]);
    let of = Ring { queries: ring_d.view(), num: num_d.view() };
    match_scan(&rig.stream, &of, q_d.view(), distance.view(), place.view_mut()).unwrap();
    let (distance, place) = (distance.read(rig), place.read(&rig.stream).unwrap());
    for head in 0..heads {
        let start = head * places * dim;
        let (want, at) =
            twin::match_scan(&ring[start..start + num[head] as usize * dim], &q[head * dim..][..dim]);
        assert_eq!(place[head], at, "head {head}");
        let far = (f64::from(distance[head]) - want).abs();
        assert!(
            f64::from(distance[head]) == want || far <= want * 1e-5,
            "head {head}: {} is not {want}",
            distance[head]
        );
    }
}
