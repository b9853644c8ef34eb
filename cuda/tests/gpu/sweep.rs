//! `Sweep`: token scores, selection, tail with value codes and joined attention against their twins, one chain at a time.

use floe_cuda::AttendParams;
use floe_cuda::device::DeviceBuffer;
use floe_cuda::ops::sweep::{
    Beside, KeyCodes, PageKeys, Rotation, Selection, Sweep, TailArgs, TailUnits, TokenScores, TokenScoresMut,
    UnitsMut, ValueCodes,
};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DevState, DeviceElem, HOST_ENTRY, Lists, PlanShape, ScanShape, Spans, Summaries,
};
use floe_cuda::twin::StateF64;
use floe_cuda::twin::device as twin;
use half::{bf16, f16};

use crate::rig::{Guarded, allowed, errors, rig};
use crate::support::Random;

#[derive(Clone, Copy)]
struct Case<'a> {
    group: usize,
    d: usize,
    /// Pages of each item.
    lens: &'a [usize],
    budget: u32,
    /// Bits of keys (0: pages are selected) and of values.
    bits: (usize, usize),
}

/// [tiles, group, 16] to [group, units].
fn by_head<T: Copy>(tiles: &[T], group: usize, units: usize) -> Vec<T> {
    (0..group).flat_map(|g| (0..units).map(move |u| tiles[(u / 16 * group + g) * 16 + u % 16])).collect()
}

/// Signs and order of a rotation; any signs are one.
pub fn rotation(random: &mut Random, d: usize) -> (Vec<f32>, Vec<u32>) {
    let rounds = if d.is_power_of_two() { 1 } else { 2 };
    let blocks: &[usize] = if d == 96 { &[64, 32] } else { &[d] };
    let signs = (0..rounds)
        .flat_map(|_| blocks.iter().flat_map(|&len| std::iter::repeat_n(1.0 / (len as f32).sqrt(), len)))
        .map(|size: f32| if random.bits().is_multiple_of(2) { size } else { -size })
        .collect();
    let mut order: Vec<u32> = (0..if rounds == 2 { d as u32 } else { 0 }).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, random.bits() as usize % (i + 1));
    }
    (signs, order)
}

fn check<E: DeviceElem>(case: &Case<'_>) {
    let rig = rig();
    let Case { group, d, bits: (k_bits, v_bits), .. } = *case;
    let items = case.lens.len();
    let name = format!("{} group {group} d {d} k{k_bits}v{v_bits}", E::NAME);
    let mut random = Random((group * d + case.budget as usize + 10 * k_bits + v_bits) as u64);
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
    let masks: Vec<u16> =
        (0..num_pages).map(|i| if i % 11 == 5 { 0 } else { random.bits() as u16 | 1 }).collect();
    let log_count: Vec<f32> = masks.iter().map(|m| (m.count_ones() as f32).ln()).collect();
    let scale = 1.0 / (d as f32).sqrt();
    let (signs, order) = rotation(&mut random, d);
    let spread = 0.14;
    let words = |random: &mut Random, bits: usize| -> Vec<u32> {
        (0..num_pages * bits * d / 2).map(|_| random.bits() as u32).collect()
    };
    let halves = |random: &mut Random, size: f32| -> Vec<f16> {
        (0..num_pages * 16).map(|_| f16::from_f32(size * (1.0 + random.normal().abs()))).collect()
    };
    let key_size = [0.0, 0.5, 0.3, 0.1, 0.08][k_bits];
    let (lines, scales) = (words(&mut random, k_bits.max(1)), halves(&mut random, key_size));
    let (value_lines, value_scales) = (words(&mut random, v_bits.max(1)), halves(&mut random, 0.4));

    let shape =
        ScanShape { items, group, head_dim: d, pages_max: *case.lens.iter().max().unwrap(), num_pages };
    let mut sweep = Sweep::new(&rig.device, shape).unwrap();
    let (first_d, end_d) = (rig.buffer(&first), rig.buffer(&end));
    let pages = Spans { first: first_d.view(), end: end_d.view() };
    let (keys_d, values_d, q_d, log_d, masks_d) =
        (rig.buffer(&keys), rig.buffer(&values), rig.buffer(&q), rig.buffer(&log_count), rig.buffer(&masks));
    let (signs_d, order_d) = (rig.buffer(&signs), rig.buffer(&order));
    let rotation = Rotation { signs: signs_d.view(), order: (!order.is_empty()).then(|| order_d.view()) };
    let (lines_d, scales_d) = (rig.buffer(&lines), rig.buffer(&scales));
    let (value_lines_d, value_scales_d) = (rig.buffer(&value_lines), rig.buffer(&value_scales));
    let mut scores = rig.buffer(&vec![f32::NAN; num_pages * group]);
    let mut residuals = rig.buffer(&vec![f16::NAN; num_pages * group * 16]);
    let mut lse = Guarded::new(rig, items * group);
    let query = (q_d.view(), scale);
    let queue_scores = |sweep: &mut Sweep,
                        scores: &mut DeviceBuffer<f32>,
                        residuals: &mut DeviceBuffer<f16>,
                        lse: &mut Guarded| {
        if k_bits == 0 {
            let summaries = Summaries { keys: keys_d.view(), log_count: log_d.view(), pages, spreads: None };
            sweep.page_scores(&rig.stream, query, &summaries, scores.view_mut(), lse.view()).unwrap();
        } else {
            let means = PageKeys { keys: keys_d.view(), pages };
            let codes = KeyCodes {
                bits: k_bits,
                lines: lines_d.view(),
                scales: scales_d.view(),
                masks: masks_d.view(),
                rotation,
                spread,
            };
            let to = TokenScoresMut {
                scores: scores.view_mut(),
                residuals: residuals.view_mut(),
                lse: lse.view(),
            };
            sweep.token_scores(&rig.stream, query, &means, &codes, to).unwrap();
        }
    };
    queue_scores(&mut sweep, &mut scores, &mut residuals, &mut lse);
    let (got, got_residuals, got_lse) =
        (scores.read(&rig.stream).unwrap(), residuals.read(&rig.stream).unwrap(), lse.read(rig));
    // The same bits again.
    queue_scores(&mut sweep, &mut scores, &mut residuals, &mut lse);
    let used = |x: &[f32]| -> Vec<u32> {
        (0..items)
            .flat_map(|i| first[i] as usize / 16 * group * 16..(end[i] as usize).div_ceil(16) * group * 16)
            .map(|at| x[at].to_bits())
            .collect()
    };
    assert_eq!(used(&scores.read(&rig.stream).unwrap()), used(&got), "{name}: scores move");
    assert_eq!(lse.read(rig), got_lse, "{name}: lse moves");

    // Selection.
    let budget = case.budget as usize;
    let list_first: Vec<u32> = (0..items).map(|i| (i * budget) as u32).collect();
    // The second item may have fewer.
    let budgets: Vec<u32> = (0..items).map(|i| if i == 1 { case.budget / 2 } else { u32::MAX }).collect();
    let (list_first_d, budgets_d) = (rig.buffer(&list_first), rig.buffer(&budgets));
    let mut list_end: DeviceBuffer<u32> = rig.buffer(&vec![u32::MAX; items]);
    let mut list: DeviceBuffer<u32> = rig.buffer(&vec![u32::MAX; items * budget + 7]);
    let select = Selection {
        pages,
        lse: lse.reader(),
        attended: None,
        ids: None,
        budget: case.budget,
        budgets: Some(budgets_d.view()),
        list_first: list_first_d.view(),
        list_end: list_end.view_mut(),
        list: list.view_mut(),
    };
    let units = if k_bits == 0 {
        UnitsMut::Pages(scores.view_mut())
    } else {
        UnitsMut::Tokens { scores: scores.view(), residuals: residuals.view_mut() }
    };
    sweep.select(&rig.stream, select, units).unwrap();

    // Tail, alone and joined by attention over the list.
    let tail_units = if k_bits == 0 {
        TailUnits::Pages(scores.view())
    } else {
        let codes =
            ValueCodes { bits: v_bits, lines: value_lines_d.view(), scales: value_scales_d.view(), rotation };
        let tokens = TokenScores { scores: scores.view(), residuals: residuals.view() };
        TailUnits::Tokens(tokens, (v_bits > 0).then_some(codes))
    };
    let args = TailArgs { units: tail_units, lse: lse.reader(), values: values_d.view(), pages };
    let (mut out, mut out_lse) = (Guarded::new(rig, items * group * d), Guarded::new(rig, items * group));
    sweep.tail(&rig.stream, &args, DevState { out: out.view(), lse: out_lse.view() }).unwrap();
    let (tail_out, tail_lse) = (out.read(rig), out_lse.read(rig));
    let unit_rows = if k_bits == 0 { 16 } else { 1 };
    let kv = elems(&mut random, num_pages * 16 * 2 * d, 1.0);
    let kv_d = rig.buffer(&kv);
    let rows_max = vec![(budget * unit_rows) as u32; items];
    let mut plan =
        DecodePlan::new(&rig.device, PlanShape { rows_max: &rows_max, group, head_dim: d }).unwrap();
    let spans = Spans { first: list_first_d.view(), end: list_end.view() };
    let params = AttendParams { scale, softcap: None };
    let decode_args = DecodeArgs { q: q_d.view(), kv: kv_d.view(), params, skip_below: None };
    let lists = if k_bits == 0 {
        Lists::Pages { spans, slots: list.view(), masks: None }
    } else {
        Lists::Rows { spans, rows: list.view() }
    };
    let (mut all, mut all_lse) = (Guarded::new(rig, items * group * d), Guarded::new(rig, items * group));
    sweep
        .tail_and_decode(
            &rig.stream,
            &args,
            DevState { out: out.view(), lse: out_lse.view() },
            Beside { plan: &mut plan, args: decode_args, lists },
            DevState { out: all.view(), lse: all_lse.view() },
        )
        .unwrap();
    let (all, all_lse) = (all.read(rig), all_lse.read(rig));
    assert_eq!(
        (out.read(rig), out_lse.read(rig)),
        (tail_out.clone(), tail_lse.clone()),
        "{name}: tail moves"
    );
    let (list, list_end) = (list.read(&rig.stream).unwrap(), list_end.read(&rig.stream).unwrap());
    assert!(list[items * budget..].iter().all(|x| *x == u32::MAX), "{name}: wrote beyond the lists");

    for item in 0..items {
        let (a, b) = (first[item] as usize, end[item] as usize);
        let n = b - a;
        let name = format!("{name} item {item} of {n} pages");
        let q_item = &q[item * group * d..(item + 1) * group * d];
        let got_item = by_head(&got[a / 16 * group * 16..], group, n);
        let lse_item = &got_lse[item * group..(item + 1) * group];
        let near = |x: f32, y: f64, by: f64| f64::from(x) == y || (f64::from(x) - y).abs() <= by;
        // Scores of units relative to lse, as the device has them.
        let (per_page, wide): (usize, Vec<f32>) = if k_bits == 0 {
            let (want, want_lse) = twin::page_scores(q_item, &keys[a * d..b * d], &log_count[a..b], scale);
            for (x, y) in got_item.iter().zip(&want).chain(lse_item.iter().zip(&want_lse)) {
                assert!(near(*x, *y, 1e-4), "{name}: page score or lse {x} is not {y}");
            }
            (1, (0..group * n).map(|at| got_item[at] - lse_item[at / n]).collect())
        } else {
            let sketches = twin::HostSketches {
                bits: k_bits,
                lines: &lines[a * k_bits * d / 2..b * k_bits * d / 2],
                scales: &scales[a * 16..b * 16],
                masks: &masks[a..b],
            };
            let host_rotation = twin::HostRotation { signs: &signs, order: &order };
            let keys = &keys[a * d..b * d];
            let want = twin::token_scores((q_item, scale), keys, &sketches, &host_rotation, spread);
            let got_tokens = by_head(&got_residuals[a * group * 16..], group, n * 16);
            for (x, y) in got_item.iter().zip(&want.scores) {
                assert!(near(*x, *y, 1e-4), "{name}: page score {x} is not {y}");
            }
            for (at, (x, y)) in got_tokens.iter().zip(&want.residuals).enumerate() {
                // Half a unit of f16; coordinates whose rounding falls on the other side: one level of one of them.
                let (head, token) = (at / (n * 16), at % (n * 16));
                let level = f64::from((1u32 << k_bits) - 1) * f64::from(sketches.scales[token].to_f32());
                let by = y.abs() / 2000.0 + 1e-4 + 2.0 * want.steps[head] * level;
                assert!(near(x.to_f32(), *y, by), "{name}: token {at} {x} is not {y} to {by}");
            }
            for (x, y) in lse_item.iter().zip(&want.lse) {
                assert!(near(*x, *y, 1e-2), "{name}: lse {x} is not {y}");
            }
            let of = |at: usize| {
                let (head, token) = (at / (n * 16), at % (n * 16));
                (got_item[head * n + token / 16] - lse_item[head]) + got_tokens[at].to_f32()
            };
            (16, (0..group * n * 16).map(of).collect())
        };
        let units = n * per_page;
        let its_budget = budget.min(budgets[item] as usize);
        let want = twin::select_units(&wide, &vec![0.0; group], its_budget);
        let want: Vec<u32> = want.iter().map(|u| u + (per_page * a) as u32).collect();
        let chosen = &list[list_first[item] as usize..list_end[item] as usize];
        assert_eq!(chosen, want, "{name}: selection");
        let taken: std::collections::HashSet<u32> = want.iter().copied().collect();

        // Weights of tokens; of a page as a sixteenth for each of its tokens.
        let mut weights = vec![0.0; group * n * 16];
        for (at, weight) in weights.iter_mut().enumerate() {
            let (head, token) = (at / (n * 16), at % (n * 16));
            let unit = token * per_page / 16;
            // An item without any unit has no lse to be relative to.
            let relative = f64::from(wide[head * units + unit]);
            if !relative.is_nan() && !taken.contains(&((per_page * a + unit) as u32)) {
                *weight = relative.exp() * per_page as f64 / 16.0;
            }
        }
        let lse64: Vec<f64> = lse_item.iter().map(|x| f64::from(*x)).collect();
        let codes = twin::HostValues {
            bits: v_bits,
            lines: &value_lines[a * v_bits * d / 2..b * v_bits * d / 2],
            scales: &value_scales[a * 16..b * 16],
        };
        let host_rotation = twin::HostRotation { signs: &signs, order: &order };
        let codes = (v_bits > 0).then_some((&codes, &host_rotation));
        let mut want_tail: StateF64 = twin::tail(&weights, &lse64, &values[a * d..b * d], codes);
        if n == 0 {
            want_tail = StateF64 { out: vec![0.0; group * d], lse: vec![f64::NEG_INFINITY; group] };
        }
        let heads = item * group..(item + 1) * group;
        let span = item * group * d..(item + 1) * group * d;
        let (far, lse_far) = errors(&tail_out[span.clone()], &tail_lse[heads.clone()], &want_tail);
        // Weights times scales are rounded to 1/255 of the largest of 256 tokens: each then errs by at most 1/510 of it, on every
        // coordinate alike; independent errors sum to far less than a twelfth of the largest residual.
        let by = if v_bits > 0 { 0.02 } else { 1e-4 };
        assert!(far < by && lse_far < 1e-4, "{name}: tail {far:e} {lse_far:e}");

        // Attention to the list, merged with the tail in f64.
        let rows: Vec<u32> =
            want.iter().flat_map(|u| (0..unit_rows as u32).map(move |r| u * unit_rows as u32 + r)).collect();
        let exact = attend_rows(q_item, &kv, &rows, (d, scale));
        let parts = [&exact, &want_tail];
        let joined = join(&parts, d);
        let (far, lse_far) = errors(&all[span], &all_lse[heads], &joined);
        assert!(far < by + allowed::<E>() && lse_far < 2e-3, "{name}: joined {far:e} {lse_far:e}");
    }
}

/// Attention over rows of `kv` [rows, 2, d] in f64.
pub fn attend_rows<E: DeviceElem>(q: &[E], kv: &[E], rows: &[u32], (d, scale): (usize, f32)) -> StateF64 {
    let wide = |x: &E| f64::from(x.to_f32());
    let mut state = StateF64 { out: vec![0.0; q.len()], lse: Vec::new() };
    for (q, out) in q.chunks(d).zip(state.out.chunks_mut(d)) {
        let row = |r: u32| &kv[r as usize * 2 * d..(r as usize + 1) * 2 * d];
        let scores: Vec<f64> = rows
            .iter()
            .map(|&r| q.iter().zip(row(r)).map(|(a, b)| wide(a) * wide(b)).sum::<f64>() * f64::from(scale))
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        state.lse.push(if max > f64::NEG_INFINITY { max + sum.ln() } else { max });
        for (score, &r) in scores.iter().zip(rows) {
            let weight = (score - max).exp() / sum;
            out.iter_mut().zip(&row(r)[d..]).for_each(|(o, v)| *o += weight * wide(v));
        }
    }
    state
}

fn join(parts: &[&StateF64], d: usize) -> StateF64 {
    let heads = parts[0].lse.len();
    let mut state = StateF64 { out: vec![0.0; heads * d], lse: vec![f64::NEG_INFINITY; heads] };
    for head in 0..heads {
        let max = parts.iter().map(|p| p.lse[head]).fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = parts.iter().map(|p| (p.lse[head] - max).exp()).sum();
        state.lse[head] = max + sum.ln();
        for part in parts {
            let weight = (part.lse[head] - max).exp() / sum;
            for i in head * d..(head + 1) * d {
                state.out[i] += weight * part.out[i];
            }
        }
    }
    state
}

#[test]
fn pages_of_every_shape_pass_through_as_their_twins_do() {
    for d in [64, 96, 128, 256] {
        for group in [1, 4, 7, 8, 16] {
            let case = Case { group, d, lens: &[1, 16, 17, 500, 0, 129], budget: 16, bits: (0, 0) };
            check::<bf16>(&case);
            check::<f16>(&case);
        }
    }
    check::<bf16>(&Case { group: 4, d: 128, lens: &[9_000, 20], budget: 64, bits: (0, 0) });
    check::<bf16>(&Case { group: 4, d: 64, lens: &[600; 70], budget: 8, bits: (0, 0) });
}

#[test]
fn tokens_of_every_shape_pass_through_as_their_twins_do() {
    for bits in [(1, 0), (2, 1), (4, 2), (1, 1)] {
        for d in [64, 96, 128, 256] {
            for group in [1, 4, 7, 8, 16] {
                let case = Case { group, d, lens: &[1, 40, 0, 17], budget: 96, bits };
                check::<bf16>(&case);
            }
        }
        check::<f16>(&Case { group: 4, d: 128, lens: &[900, 20], budget: 256, bits });
    }
    check::<f16>(&Case { group: 8, d: 64, lens: &[30; 140], budget: 20, bits: (2, 2) });
}

/// Small enough for a memory checker.
#[test]
fn a_few_pages_pass_through_as_their_twins_do() {
    for bits in [(0, 0), (1, 0), (2, 1)] {
        check::<bf16>(&Case { group: 4, d: 128, lens: &[40, 17], budget: 24, bits });
        check::<f16>(&Case { group: 7, d: 96, lens: &[18], budget: 20, bits });
    }
}

#[test]
fn a_million_tokens_pass_through_as_their_twins_do() {
    check::<bf16>(&Case { group: 4, d: 64, lens: &[65_536], budget: 1000, bits: (1, 1) });
}

#[test]
fn attended_mass_lowers_the_keys_of_its_heads() {
    let rig = rig();
    let (group, pages) = (2, 16);
    let shape = ScanShape { items: 1, group, head_dim: 64, pages_max: pages, num_pages: pages };
    let mut sweep = Sweep::new(&rig.device, shape).unwrap();
    // Head 0 likes page 3, head 1 page 9, head 0 more so; but head 0 attends elsewhere.
    let mut tiles = vec![-4.0f32; group * 16];
    (tiles[3], tiles[16 + 9]) = (0.0, -0.5);
    let (first, end) = (rig.buffer(&[0u32]), rig.buffer(&[pages as u32]));
    for (attended, want) in [([f32::NEG_INFINITY; 2], 3), ([5.0, f32::NEG_INFINITY], 9)] {
        let mut scores = rig.buffer(&tiles);
        let (lse, attended) = (rig.buffer(&[0.2f32, 0.2]), rig.buffer(&attended));
        let list_first = rig.buffer(&[0u32]);
        let (mut list_end, mut list) = (rig.buffer(&[0u32]), rig.buffer(&[0u32; 16]));
        let select = Selection {
            pages: Spans { first: first.view(), end: end.view() },
            lse: lse.view(),
            attended: Some(attended.view()),
            ids: None,
            budget: 1,
            budgets: None,
            list_first: list_first.view(),
            list_end: list_end.view_mut(),
            list: list.view_mut(),
        };
        sweep.select(&rig.stream, select, UnitsMut::Pages(scores.view_mut())).unwrap();
        assert_eq!(list.read(&rig.stream).unwrap()[0], want);
        assert_eq!(scores.read(&rig.stream).unwrap()[want as usize], f32::NEG_INFINITY);
    }
}

/// Rows and pages in host memory give the bits that the same ones on the device give.
#[test]
fn attention_reads_host_rows_in_place() {
    use floe_cuda::device::PinnedBuffer;
    use floe_cuda::ops::{SparseCall, sparse_decode_joined};
    let rig = rig();
    let (d, group, num) = (128, 4, 320usize);
    let mut random = Random(77);
    let kv: Vec<bf16> = (0..num * 2 * d).map(|_| bf16::from_f32(random.normal())).collect();
    let q: Vec<bf16> = (0..group * d).map(|_| bf16::from_f32(random.normal())).collect();
    let (kv_d, q_d) = (rig.buffer(&kv), rig.buffer(&q));
    let mut host = PinnedBuffer::<bf16>::zeros(&rig.device, kv.len()).unwrap();
    host.as_mut_slice().copy_from_slice(&kv);
    for unit in [1, 16] {
        let entries: Vec<u32> = (0..(num / unit) as u32).rev().collect();
        let mixed: Vec<u32> = entries.iter().map(|e| if e % 3 == 0 { e + HOST_ENTRY } else { *e }).collect();
        let (first, end) = (rig.buffer(&[0u32]), rig.buffer(&[entries.len() as u32]));
        let spans = Spans { first: first.view(), end: end.view() };
        let shape = PlanShape { rows_max: &[num as u32], group, head_dim: d };
        let mut plan = DecodePlan::new(&rig.device, shape).unwrap();
        let params = AttendParams { scale: 0.1, softcap: None };
        let args = DecodeArgs { q: q_d.view(), kv: kv_d.view(), params, skip_below: None };
        let mut states = Vec::new();
        for list in [&entries, &mixed] {
            let list = rig.buffer(list);
            let lists = if unit == 1 {
                Lists::RowsAndHost { spans, rows: list.view(), host: host.view() }
            } else {
                Lists::PagesAndHost { spans, slots: list.view(), masks: None, host: host.view() }
            };
            let (mut out, mut lse) = (Guarded::new(rig, group * d), Guarded::new(rig, group));
            let call = SparseCall { args, lists, join: None };
            let state = DevState { out: out.view(), lse: lse.view() };
            sparse_decode_joined(&rig.stream, &mut plan, &call, state).unwrap();
            states.push((out.read(rig), lse.read(rig)));
        }
        assert_eq!(states[0], states[1], "units of {unit}");
    }
    rig.device.check_entries().unwrap();
}
