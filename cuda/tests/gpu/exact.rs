//! Exact entries: dense ones that are longer than their rows on the device, and layers that attend a span.

use floe_cuda::AttendParams;
use floe_cuda::device::DeviceBuffer;
use floe_cuda::ops::cache::{AppendStep, BatchEntry, BeyondRows, Ranges, append_step};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DevState, DeviceElem, PlanShape, Spans, WholeItems, dense_decode, whole_decode,
};
use floe_cuda::twin::device::{HostKv, HostSpans, TileRows, decode_lists};
use half::{bf16, f16};

use crate::cache::{World, shape, tables_of, tensor};
use crate::rig::{Guarded, allowed, errors};

const HEADS: usize = 3;
const GROUP: usize = 2;
const ITEMS: usize = 2 * HEADS;

/// What a step of two sequences left, by item.
struct Left<E> {
    q: Vec<E>,
    /// First and end of the rows on the device, and of the tokens that have none.
    rows: [Vec<u32>; 2],
    beyond: [Vec<u32>; 2],
    warm: DeviceBuffer<u64>,
    buffers: [DeviceBuffer<u32>; 4],
    q_out: DeviceBuffer<E>,
}

/// Appends a token to both sequences, with a tensor for tokens beyond the rows or without.
fn append<E: DeviceElem>(world: &mut World<E>, tokens: usize) -> Left<E> {
    let (d, rig) = (world.twin.shape.head_dim, world.rig);
    let entry = |sequence: u32| BatchEntry { sequence, tokens: tokens as u32, tick: 1, exact: 1 };
    world.batch.write(&[entry(0), entry(1)]).unwrap();
    let (q, k, v) = (world.elems(ITEMS * GROUP * d), world.elems(ITEMS * d), world.elems(ITEMS * d));
    let device = [rig.buffer(&q), rig.buffer(&k), rig.buffer(&v)];
    let words = || DeviceBuffer::<u32>::zeros(&rig.device, ITEMS).unwrap();
    let (mut pages, mut buffers) = ([words(), words()], [words(), words(), words(), words()]);
    let mut warm = DeviceBuffer::zeros(&rig.device, ITEMS).unwrap();
    let mut q_out = DeviceBuffer::zeros(&rig.device, ITEMS * GROUP * d).unwrap();
    let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
    let [page_first, page_end] = &mut pages;
    let [row_first, row_end, first, end] = &mut buffers;
    let step = AppendStep {
        q: tensor(&device[0], [2, HEADS * GROUP, d]),
        k: tensor(&device[1], [2, HEADS, d]),
        v: tensor(&device[2], [2, HEADS, d]),
        kv: world.kv.view_mut(),
        q_out: q_out.view_mut(),
        ranges: Ranges {
            page_first: page_first.view_mut(),
            page_end: page_end.view_mut(),
            row_first: row_first.view_mut(),
            row_end: row_end.view_mut(),
        },
        beyond: Some(BeyondRows { first: first.view_mut(), end: end.view_mut(), warm: warm.view_mut() }),
        num_fetch: None,
        tree_pages: None,
        doubt: None,
    };
    append_step(&rig.stream, &tables, step).unwrap();
    rig.stream.synchronize().unwrap();
    for sequence in 0..2 {
        let of = sequence * HEADS * d..(sequence + 1) * HEADS * d;
        world.twin.ingest(sequence, tokens - 1, &k[of.clone()], &v[of]);
    }
    let read = |i: usize| buffers[i].read(&rig.stream).unwrap();
    let (rows, beyond) = ([read(0), read(1)], [read(2), read(3)]);
    Left { q, rows, beyond, warm, buffers, q_out }
}

/// The states of both parts against the oracle over the tokens that each is to attend, by item.
fn check<E: DeviceElem>(
    world: &World<E>,
    left: &Left<E>,
    want: [&dyn Fn(usize) -> Vec<usize>; 2],
    name: &str,
) {
    let (d, rig) = (world.twin.shape.head_dim, world.rig);
    let params = AttendParams { scale: 0.1, softcap: None };
    let rows_max = [1500u32; ITEMS];
    let of = PlanShape { rows_max: &rows_max, group: GROUP, head_dim: d };
    let args = DecodeArgs { q: left.q_out.view(), kv: world.kv.view(), params, skip_below: None };
    let spans = |i: usize| Spans { first: left.buffers[i].view(), end: left.buffers[i + 1].view() };
    for (part, tokens_of) in want.into_iter().enumerate() {
        let mut plan = DecodePlan::new(&rig.device, of).unwrap();
        let (mut out, mut lse) = (Guarded::new(rig, ITEMS * GROUP * d), Guarded::new(rig, ITEMS * GROUP));
        let state = DevState { out: out.view(), lse: lse.view() };
        if part == 0 {
            dense_decode(&rig.stream, &mut plan, &args, spans(0), state).unwrap();
        } else {
            let items = WholeItems { rows: spans(2), warm: left.warm.view(), heads: HEADS };
            whole_decode(&rig.stream, &mut plan, &args, items, state).unwrap();
        }
        let (mut all, mut first, mut end) = (Vec::<E>::new(), vec![], vec![]);
        for item in 0..ITEMS {
            first.push((all.len() / (2 * d)) as u32);
            for token in tokens_of(item) {
                all.extend_from_slice(&world.twin.warm[&(item / HEADS, item % HEADS, token)]);
            }
            end.push((all.len() / (2 * d)) as u32);
        }
        let host = HostKv { q: &left.q, kv: &all, group: GROUP, head_dim: d, params };
        let want = decode_lists(&host, HostSpans { first: &first, end: &end }, &TileRows::Range).unwrap();
        let (far, lse_far) = errors(&out.read(rig), &lse.read(rig), &want);
        assert!(far < allowed::<E>() && lse_far < 1e-3, "{name}, part {part}: {far:e} {lse_far:e}");
    }
}

fn longer_than_its_rows<E: DeviceElem>(d: usize) {
    let mut world = World::<E>::new(shape(HEADS, GROUP, d), 96);
    // Both sequences lie densely; the first has rows for 512 tokens, the second for 48.
    let each = [512u32, 48];
    for (place, rows) in world.twin.places.iter_mut().zip(each) {
        (place.rows_each, place.slots) = (rows, floe_cuda::ops::cache::SequencePlace::DENSE);
    }
    world.sequences.write(&world.twin.places).unwrap();
    world.prefill(0, 0, 700, None);
    world.prefill(1, 0, 300, None);
    world.prefill(1, 300, 400, None);
    for tokens in 701..=704 {
        let left = append(&mut world, tokens);
        let name = format!("{} d {d}, {tokens} tokens", E::NAME);
        world.check_rows(&name);
        for item in 0..ITEMS {
            let rows = each[item / HEADS];
            assert_eq!(left.rows[1][item] - left.rows[0][item], rows, "{name}: item {item}");
            assert_eq!([left.beyond[0][item], left.beyond[1][item]], [rows, tokens as u32]);
        }
        let near = |item: usize| (0..each[item / HEADS] as usize).collect();
        let beyond = |item: usize| (each[item / HEADS] as usize..tokens).collect();
        check(&world, &left, [&near, &beyond], &name);
    }
    world.rig.device.check_entries().unwrap();
}

#[test]
fn tokens_beyond_the_rows_are_attended_in_host_memory() {
    longer_than_its_rows::<bf16>(64);
    longer_than_its_rows::<bf16>(96);
    longer_than_its_rows::<f16>(128);
    longer_than_its_rows::<bf16>(256);
}

#[test]
fn a_span_is_attended_from_its_ring() {
    for (span, d) in [(1, 64), (100, 128), (16, 96), (512, 64)] {
        let mut world = World::<bf16>::new(shape(HEADS, GROUP, d).of_span(span), 0);
        let each = span.next_multiple_of(16) as u32;
        for (place, rows) in world.twin.places.iter_mut().zip([5, 5 + HEADS as u32 * each]) {
            (place.rows, place.rows_each, place.slots) = (rows, each, 0);
        }
        world.sequences.write(&world.twin.places).unwrap();
        for (first, run) in [(0, 3), (3, 600), (603, 7)] {
            world.prefill(0, first, run, None);
            world.prefill(1, first, run, None);
            world.check_rows(&format!("span {span}: prompt"));
        }
        for tokens in 611..=640 {
            let left = append(&mut world, tokens);
            let name = format!("span {span} d {d}, {tokens} tokens");
            world.check_rows(&name);
            let newest = |_| (tokens.saturating_sub(span)..tokens).collect();
            check(&world, &left, [&newest, &|_| Vec::new()], &name);
        }
        world.rig.device.check_entries().unwrap();
    }
}
