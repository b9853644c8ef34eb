//! `dense_decode`, `sparse_decode`, `fetch_attend` against their twin.

use floe_cuda::AttendParams;
use floe_cuda::device::{DeviceBuffer, DeviceError, PinnedBuffer};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DevState, DeviceElem, FetchPages, Lists, PlanShape, Spans, dense_decode,
    fetch_attend, sparse_decode,
};
use floe_cuda::twin::device::{HostKv, HostSpans, TileRows, decode_lists};
use half::{bf16, f16};

use crate::rig::{Guarded, Rig, allowed, errors, rig};
use crate::support::Random;

/// What a case attends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Range,
    Pages,
    MaskedPages,
    Rows,
    Fetch,
}

#[derive(Debug, Clone, Copy)]
struct Case<'a> {
    kind: Kind,
    group: usize,
    d: usize,
    /// Entries of each item: rows, or pages.
    lens: &'a [usize],
    softcap: Option<f32>,
    q_size: f32,
}

/// Host side of a case.
struct Data<E> {
    q: Vec<E>,
    kv: Vec<E>,
    first: Vec<u32>,
    end: Vec<u32>,
    entries: Vec<u32>,
    masks: Option<Vec<u16>>,
}

fn data<E: DeviceElem>(case: &Case<'_>) -> Data<E> {
    let mut random = Random(case.d as u64 * 1000 + case.group as u64);
    let elems = |random: &mut Random, n: usize, size: f32| -> Vec<E> {
        (0..n).map(|_| E::from_f32(random.normal() * size)).collect()
    };
    let by_page = !matches!(case.kind, Kind::Range | Kind::Rows);
    let total: usize = case.lens.iter().sum();
    let num_rows = (if by_page { total * 16 } else { total } + 48).next_multiple_of(16);
    let mut kv = elems(&mut random, num_rows * 2 * case.d, 1.0);
    let q = elems(&mut random, case.lens.len() * case.group * case.d, case.q_size);
    // Entries are drawn without replacement, so a fetched slot has one page.
    let units = if by_page { num_rows / 16 } else { num_rows } as u32;
    let mut entries: Vec<u32> = (0..units).collect();
    for i in 0..total {
        let j = i + random.bits() as usize % (entries.len() - i);
        entries.swap(i, j);
    }
    let masks: Option<Vec<u16>> = matches!(case.kind, Kind::MaskedPages | Kind::Fetch)
        .then(|| (0..total).map(|i| if i % 5 == 0 { 0 } else { random.bits() as u16 }).collect());
    // What is not attended holds NaN: reading it shows.
    let mut used = vec![false; num_rows];
    match case.kind {
        Kind::Range => used[..total].fill(true),
        Kind::Rows => entries[..total].iter().for_each(|&row| used[row as usize] = true),
        Kind::Pages | Kind::MaskedPages | Kind::Fetch => {
            for (i, &slot) in entries[..total].iter().enumerate() {
                let mask = masks.as_ref().map_or(u16::MAX, |m| m[i]);
                (0..16).filter(|r| mask >> r & 1 == 1).for_each(|r| used[slot as usize * 16 + r] = true);
            }
        }
    }
    for (row, _) in used.iter().enumerate().filter(|(_, used)| !**used) {
        kv[row * 2 * case.d..(row + 1) * 2 * case.d].fill(E::from_f32(f32::NAN));
    }
    entries.truncate(total);
    let end: Vec<u32> = case
        .lens
        .iter()
        .scan(0, |at, len| {
            *at += *len as u32;
            Some(*at)
        })
        .collect();
    let first = end.iter().zip(case.lens).map(|(end, len)| end - *len as u32).collect();
    Data { q, kv, first, end, entries, masks }
}

/// Runs a case twice and returns its bits; checks the first against the twin.
fn check<E: DeviceElem>(case: &Case<'_>) -> (f64, f64) {
    let rig = rig();
    let data = data::<E>(case);
    let (items, d, group) = (case.lens.len(), case.d, case.group);
    let params = AttendParams { scale: 1.0 / (d as f32).sqrt(), softcap: case.softcap };
    let host = HostKv { q: &data.q, kv: &data.kv, group, head_dim: d, params };
    let spans = HostSpans { first: &data.first, end: &data.end };
    let rows = match case.kind {
        Kind::Range => TileRows::Range,
        Kind::Rows => TileRows::Rows(&data.entries),
        _ => TileRows::Pages { slots: &data.entries, masks: data.masks.as_deref() },
    };
    let want = decode_lists(&host, spans, &rows).unwrap();
    let unit = if matches!(case.kind, Kind::Range | Kind::Rows) { 1 } else { 16 };
    // The plan knows an upper bound only.
    let rows_max: Vec<u32> = case.lens.iter().map(|len| (len * unit + len / 3) as u32).collect();
    let mut plan =
        DecodePlan::new(&rig.device, PlanShape { rows_max: &rows_max, group, head_dim: d }).unwrap();
    let first_run = run(rig, &mut plan, case, &data, params);
    let (far, lse_far) = errors(&first_run.0, &first_run.1, &want);
    assert!(far <= allowed::<E>(), "{} {case:?}: out {far:e} off", E::NAME);
    assert!(lse_far <= 2e-4, "{} {case:?}: lse {lse_far:e} off", E::NAME);
    let again = run(rig, &mut plan, case, &data, params);
    assert!(first_run == again, "{} {case:?}: bits differ from run to run", E::NAME);
    assert_eq!(items * group, first_run.1.len());
    (far, lse_far)
}

fn run<E: DeviceElem>(
    rig: &Rig,
    plan: &mut DecodePlan,
    case: &Case<'_>,
    data: &Data<E>,
    params: AttendParams,
) -> (Vec<f32>, Vec<f32>) {
    let (items, d, group) = (case.lens.len(), case.d, case.group);
    let (mut out, mut lse) = (Guarded::new(rig, items * group * d), Guarded::new(rig, items * group));
    let (q, mut kv) = (rig.buffer(&data.q), rig.buffer(&data.kv));
    let (first, end, entries) = (rig.buffer(&data.first), rig.buffer(&data.end), rig.buffer(&data.entries));
    let masks = data.masks.as_ref().map(|m| rig.buffer(m));
    let masks_view = masks.as_ref().map(DeviceBuffer::view);
    let spans = Spans { first: first.view(), end: end.view() };
    let page = 32 * d;
    // For Fetch: every other page is absent; its slot holds NaN and the host has it.
    let absent = |i: usize| i.is_multiple_of(2);
    let mut host = PinnedBuffer::<E>::zeros(&rig.device, data.kv.len()).unwrap();
    let mut host_pages = vec![u32::MAX; data.entries.len()];
    if case.kind == Kind::Fetch {
        let mut emptied = data.kv.clone();
        let pages = data.kv.len() / page;
        for (i, &slot) in data.entries.iter().enumerate().filter(|(i, _)| absent(*i)) {
            let place = pages - 1 - slot as usize;
            let source = slot as usize * page..(slot as usize + 1) * page;
            host.as_mut_slice()[place * page..(place + 1) * page].copy_from_slice(&data.kv[source.clone()]);
            emptied[source].fill(E::from_f32(f32::NAN));
            host_pages[i] = place as u32;
        }
        kv.write(&emptied).unwrap();
    }
    let host_pages = rig.buffer(&host_pages);
    let args = DecodeArgs { q: q.view(), kv: kv.view(), params, skip_below: None };
    let state = DevState { out: out.view(), lse: lse.view() };
    match case.kind {
        Kind::Range => dense_decode(&rig.stream, plan, &args, spans, state),
        Kind::Rows => {
            sparse_decode(&rig.stream, plan, &args, Lists::Rows { spans, rows: entries.view() }, state)
        }
        Kind::Pages | Kind::MaskedPages => sparse_decode(
            &rig.stream,
            plan,
            &args,
            Lists::Pages { spans, slots: entries.view(), masks: masks_view },
            state,
        ),
        Kind::Fetch => {
            let pages = FetchPages {
                spans,
                slots: entries.view(),
                masks: masks_view,
                host_pages: host_pages.view(),
                host: host.view(),
            };
            fetch_attend(&rig.stream, plan, &args, &pages, state)
        }
    }
    .unwrap();
    let result = (out.read(rig), lse.read(rig));
    if case.kind == Kind::Fetch {
        let bits = |x: &[E]| bytemuck::cast_slice::<E, u16>(x).to_vec();
        assert!(
            bits(&kv.read(&rig.stream).unwrap()) == bits(&data.kv),
            "{case:?}: fetched pages are not in their slots"
        );
    }
    result
}

const KINDS: [Kind; 5] = [Kind::Range, Kind::Pages, Kind::MaskedPages, Kind::Rows, Kind::Fetch];

#[test]
fn every_shape_agrees_with_its_twin() {
    let mut worst = (0f64, 0f64);
    for kind in KINDS {
        for d in [64, 96, 128, 256] {
            for group in [1, 2, 4, 7, 8, 12, 16] {
                // Empty, one entry, around a tile, around a block's warps, many splits.
                for lens in [&[0usize, 1, 15, 16, 17, 63, 64, 65][..], &[700, 0, 3], &[1]] {
                    let case = Case { kind, group, d, lens, softcap: None, q_size: 2.0 };
                    let (far, _) = check::<bf16>(&case);
                    worst.0 = worst.0.max(far);
                    let (far, _) = check::<f16>(&case);
                    worst.1 = worst.1.max(far);
                }
            }
        }
    }
    rig().device.check_entries().unwrap();
    eprintln!("largest relative error: bf16 {:.2e}, f16 {:.2e}", worst.0, worst.1);
}

#[test]
fn softcap_and_peaked_scores_agree_with_the_twin() {
    for kind in KINDS {
        for (softcap, q_size) in [(Some(30.0), 5.0), (None, 40.0), (Some(2.0), 0.01)] {
            let case = Case { kind, group: 8, d: 128, lens: &[300, 5], softcap, q_size };
            check::<bf16>(&case);
            check::<f16>(&case);
        }
    }
}

#[test]
fn long_context_agrees_with_the_twin() {
    for _ in 0..3 {
        check::<bf16>(&Case {
            kind: Kind::Range,
            group: 4,
            d: 128,
            lens: &[40_000, 77, 9_999],
            softcap: None,
            q_size: 3.0,
        });
    }
}

#[test]
fn entries_outside_are_left_out_and_reported() {
    // A device of its own, since the report is the device's.
    let rig = &Rig::new();
    let d = 128;
    let kv = rig.buffer(&vec![bf16::from_f32(0.5); 64 * 2 * d]);
    let q = rig.buffer(&vec![bf16::from_f32(0.1); d]);
    let (first, end) = (rig.buffer(&[0u32]), rig.buffer(&[3u32]));
    let params = AttendParams { scale: 0.1, softcap: None };
    let args = DecodeArgs { q: q.view(), kv: kv.view(), params, skip_below: None };
    let mut plan =
        DecodePlan::new(&rig.device, PlanShape { rows_max: &[48], group: 1, head_dim: d }).unwrap();
    let spans = Spans { first: first.view(), end: end.view() };
    let score = (d as f32 * bf16::from_f32(0.1).to_f32() * 0.5 * 0.1) as f64;
    for (entries, pages, kept) in [([1u32, 4, 2], true, 32.0f64), ([0, 64, 63], false, 2.0)] {
        let entries = rig.buffer(&entries);
        let lists = if pages {
            Lists::Pages { spans, slots: entries.view(), masks: None }
        } else {
            Lists::Rows { spans, rows: entries.view() }
        };
        let (mut out, mut lse) = (Guarded::new(rig, d), Guarded::new(rig, 1));
        sparse_decode(&rig.stream, &mut plan, &args, lists, DevState { out: out.view(), lse: lse.view() })
            .unwrap();
        assert!((f64::from(lse.read(rig)[0]) - score - kept.ln()).abs() < 1e-3, "{kept} rows");
        assert!(out.read(rig).iter().all(|&x| x == 0.5));
        assert_eq!(rig.device.check_entries(), Err(DeviceError::EntryOutside));
        rig.device.check_entries().unwrap();
    }
}

#[test]
fn skipped_tiles_cost_at_most_their_weight() {
    let rig = rig();
    let (d, n) = (128, 4096);
    let mut random = Random(9);
    let kv: Vec<bf16> = (0..n * 2 * d).map(|_| bf16::from_f32(random.normal())).collect();
    let q: Vec<bf16> = (0..4 * d).map(|_| bf16::from_f32(random.normal() * 4.0)).collect();
    let params = AttendParams { scale: 1.0 / (d as f32).sqrt(), softcap: None };
    let host = HostKv { q: &q, kv: &kv, group: 4, head_dim: d, params };
    let want = decode_lists(&host, HostSpans { first: &[0], end: &[n as u32] }, &TileRows::Range).unwrap();
    let (q, kv) = (rig.buffer(&q), rig.buffer(&kv));
    let (first, end) = (rig.buffer(&[0u32]), rig.buffer(&[n as u32]));
    let mut plan =
        DecodePlan::new(&rig.device, PlanShape { rows_max: &[n as u32], group: 4, head_dim: d }).unwrap();
    for ln_lambda in [-12.0f32, -8.0, -5.0] {
        let args = DecodeArgs { q: q.view(), kv: kv.view(), params, skip_below: Some(ln_lambda) };
        let (mut out, mut lse) = (Guarded::new(rig, 4 * d), Guarded::new(rig, 4));
        let spans = Spans { first: first.view(), end: end.view() };
        dense_decode(&rig.stream, &mut plan, &args, spans, DevState { out: out.view(), lse: lse.view() })
            .unwrap();
        let (far, lse_far) = errors(&out.read(rig), &lse.read(rig), &want);
        eprintln!("ln lambda {ln_lambda}: out {far:.2e}, lse {lse_far:.2e}");
        let bound = n as f64 * f64::from(ln_lambda).exp();
        assert!(lse_far <= bound + 2e-4, "ln lambda {ln_lambda}: lse {lse_far:e} off");
    }
}
