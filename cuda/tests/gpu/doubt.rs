//! Items whose estimates are in doubt: found by `cache_append`, attended by `whole_decode`, passed over by `cache_resolve`.

use floe_cuda::AttendParams;
use floe_cuda::device::{DeviceBuffer, PinnedBuffer};
use floe_cuda::ops::cache::{
    AppendStep, BatchEntry, DoubtCheck, FoundUnit, PageSource, Ranges, Resolve, append_step, build_pages,
    resolve,
};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DevState, DeviceElem, PlanShape, Spans, WholeItems, whole_decode,
};
use floe_cuda::twin::device::{HostKv, HostSpans, TileRows, decode_lists};
use half::{bf16, f16};

use crate::cache::{PageBuffers, SlotRig, World, shape, tables_of, tensor};
use crate::rig::{Guarded, allowed, errors};

const HEADS: usize = 3;
const GROUP: usize = 5;
const ITEMS: usize = 2 * HEADS;

/// Buffers that a step leaves its answers in.
struct Step<E: DeviceElem> {
    ranges: [DeviceBuffer<u32>; 4],
    q_out: DeviceBuffer<E>,
    sums: DeviceBuffer<[u32; 2]>,
    warm: DeviceBuffer<u64>,
    doubted: DeviceBuffer<u64>,
    noticed: PinnedBuffer<u32>,
}

impl<E: DeviceElem> Step<E> {
    fn new(world: &World<E>, d: usize) -> Self {
        let device = &world.rig.device;
        let words = || DeviceBuffer::zeros(device, ITEMS).unwrap();
        Self {
            ranges: [words(), words(), words(), words()],
            q_out: DeviceBuffer::zeros(device, ITEMS * GROUP * d).unwrap(),
            sums: DeviceBuffer::zeros(device, ITEMS).unwrap(),
            warm: DeviceBuffer::zeros(device, ITEMS).unwrap(),
            doubted: DeviceBuffer::zeros(device, 1).unwrap(),
            noticed: PinnedBuffer::zeros(device, 1).unwrap(),
        }
    }

    /// Appends a token to both sequences, whose queries are longer item by item; returns the queries.
    fn append(
        &mut self,
        world: &mut World<E>,
        buffers: &mut PageBuffers<E>,
        (tokens, factor): (usize, f32),
    ) -> Vec<E> {
        let (d, rig) = (world.twin.shape.head_dim, world.rig);
        let entry =
            |sequence: u32| BatchEntry { sequence, tokens: tokens as u32, tick: tokens as u32, exact: 0 };
        world.batch.write(&[entry(0), entry(1)]).unwrap();
        let mut q = world.elems(ITEMS * GROUP * d);
        for (item, q) in q.chunks_mut(GROUP * d).enumerate() {
            q.iter_mut().for_each(|x| *x = E::from_f32(x.to_f32() * (item as f32 * 2.0 % 7.0 + 1.0) / 4.0));
        }
        let (k, v) = (world.elems(ITEMS * d), world.elems(ITEMS * d));
        let device = [rig.buffer(&q), rig.buffer(&k), rig.buffer(&v)];
        let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
        let [page_first, page_end, row_first, row_end] = &mut self.ranges;
        let step = AppendStep {
            q: tensor(&device[0], [2, HEADS * GROUP, d]),
            k: tensor(&device[1], [2, HEADS, d]),
            v: tensor(&device[2], [2, HEADS, d]),
            kv: world.kv.view_mut(),
            q_out: self.q_out.view_mut(),
            ranges: Ranges {
                page_first: page_first.view_mut(),
                page_end: page_end.view_mut(),
                row_first: row_first.view_mut(),
                row_end: row_end.view_mut(),
            },
            beyond: None,
            num_fetch: None,
            tree_pages: None,
            doubt: Some(DoubtCheck {
                factor,
                spread: buffers.spread.view(),
                sums: self.sums.view_mut(),
                warm: self.warm.view_mut(),
                doubted: self.doubted.view_mut(),
                noticed: self.noticed.view_mut(),
            }),
        };
        append_step(&rig.stream, &tables, step).unwrap();
        build_pages(&rig.stream, &tables, PageSource::Step, world.kv.view(), buffers.pages()).unwrap();
        rig.stream.synchronize().unwrap();
        for sequence in 0..2 {
            let span = sequence * HEADS * d..(sequence + 1) * HEADS * d;
            world.twin.ingest(sequence, tokens - 1, &k[span.clone()], &v[span]);
        }
        q
    }
}

/// Mean square length of an item's queries times the mean spread of its published pages, sinks aside.
fn variance<E: DeviceElem>(world: &World<E>, q: &[E], item: usize, tokens: usize) -> f64 {
    let d = world.twin.shape.head_dim;
    let length: f64 =
        q[item * GROUP * d..(item + 1) * GROUP * d].iter().map(|x| f64::from(x.to_f32()).powi(2)).sum();
    let pages = 1..world.twin.published(tokens);
    let spread: f64 =
        pages.clone().map(|page| world.twin.spread(item / HEADS, item % HEADS, page)).sum::<f64>();
    length / GROUP as f64 * spread / pages.len() as f64
}

fn check<E: DeviceElem>(d: usize) {
    let mut world = World::<E>::new(shape(HEADS, GROUP, d), 96);
    let rig = world.rig;
    let mut buffers = PageBuffers::new(rig, world.twin.row_of_token.len() / 16, d, [2, 1]);
    let prompt = 700;
    world.prefill(0, 0, prompt, None);
    world.prefill(1, 0, prompt, Some(&mut buffers));
    let source = PageSource::Rows { sequence: 0, first: 0, num: buffers.built };
    let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
    build_pages(&rig.stream, &tables, source, world.kv.view(), buffers.pages()).unwrap();
    let mut step = Step::new(&world, d);
    let rows_max = [800u32; ITEMS];
    let mut plan =
        DecodePlan::new(&rig.device, PlanShape { rows_max: &rows_max, group: GROUP, head_dim: d }).unwrap();
    let params = AttendParams { scale: 0.1, softcap: None };
    // Residuals of normal keys have a mean square near 1, queries a square length near d: about half of the items are in doubt.
    let factor = 1.0 / (0.9 * d as f32);
    let (mut in_doubt, mut calm) = (0, 0);
    // Forty steps, of which some publish a page, and one after a truncation to an earlier length.
    for (turn, tokens) in (prompt + 1..=prompt + 40).chain([prompt - 150]).enumerate() {
        if tokens < prompt {
            step.sums = DeviceBuffer::zeros(&rig.device, ITEMS).unwrap();
        }
        let q = step.append(&mut world, &mut buffers, (tokens, factor));
        let name = format!("{} d {d}, turn {turn}", E::NAME);
        let read = |i: usize| step.ranges[i].read(&rig.stream).unwrap();
        let (pages, rows) = ((read(0), read(1)), (read(2), read(3)));
        let warm = step.warm.read(&rig.stream).unwrap();
        let mut all: Vec<E> = Vec::new();
        let (mut first, mut end) = (vec![], vec![]);
        for (item, warm) in warm.iter().enumerate() {
            let doubt = rows.1[item] > rows.0[item];
            let far = variance(&world, &q, item, tokens) * f64::from(factor);
            // f32 sums, and means that round the other way.
            assert!(doubt == (far > 1.0) || (far - 1.0).abs() < 0.02, "{name}: item {item} at {far}");
            in_doubt += u64::from(doubt);
            calm += u64::from(!doubt);
            let published = if doubt { 0 } else { world.twin.published(tokens) as u32 };
            assert_eq!(pages.1[item] - pages.0[item], published, "{name}: pages of item {item}");
            assert_eq!(rows.1[item] - rows.0[item], if doubt { tokens as u32 } else { 0 });
            assert_eq!(*warm != 0, doubt && item >= HEADS, "{name}: item {item}");
            first.push((all.len() / (2 * d)) as u32);
            for token in (0..tokens).filter(|_| doubt) {
                all.extend_from_slice(&world.twin.warm[&(item / HEADS, item % HEADS, token)]);
            }
            end.push((all.len() / (2 * d)) as u32);
        }
        assert_eq!(step.doubted.read(&rig.stream).unwrap(), [in_doubt]);
        if turn % 8 != 0 && tokens > prompt {
            continue;
        }
        let (mut out, mut lse) = (Guarded::new(rig, ITEMS * GROUP * d), Guarded::new(rig, ITEMS * GROUP));
        let args = DecodeArgs { q: step.q_out.view(), kv: world.kv.view(), params, skip_below: None };
        let items = WholeItems {
            rows: Spans { first: step.ranges[2].view(), end: step.ranges[3].view() },
            warm: step.warm.view(),
            heads: HEADS,
        };
        let state = DevState { out: out.view(), lse: lse.view() };
        whole_decode(&rig.stream, &mut plan, &args, items, state).unwrap();
        let host = HostKv { q: &q, kv: &all, group: GROUP, head_dim: d, params };
        let want = decode_lists(&host, HostSpans { first: &first, end: &end }, &TileRows::Range).unwrap();
        let (far, lse_far) = errors(&out.read(rig), &lse.read(rig), &want);
        assert!(far < allowed::<E>() && lse_far < 1e-3, "{name}: {far:e} {lse_far:e}");
    }
    assert!(in_doubt > 40 && calm > 40, "{in_doubt} in doubt, {calm} not: the case must have both");
    assert_eq!(step.noticed.peek(0), Some(1));
    nothing_is_listed(&mut world, &step);
    rig.device.check_entries().unwrap();
}

/// Items in doubt list no row and fetch nothing, whatever was found; the others do both.
fn nothing_is_listed<E: DeviceElem>(world: &mut World<E>, step: &Step<E>) {
    let rig = world.rig;
    let zeros = |n: usize| DeviceBuffer::<u32>::zeros(&rig.device, n).unwrap();
    let retrieved = 8;
    let list_each = world.twin.shape.fixed_max() + retrieved;
    let (mut list, mut list_end) = (zeros(ITEMS * list_each), zeros(ITEMS));
    let firsts: Vec<u32> = (0..ITEMS).map(|item| (item * retrieved) as u32).collect();
    let ends: Vec<u32> = firsts.iter().map(|first| first + retrieved as u32).collect();
    let found: Vec<u32> = (0..ITEMS)
        .flat_map(|item| {
            let place = world.twin.places[item / HEADS];
            let base = (place.pages + (item % HEADS) as u32 * place.pages_each) * 16 + 16;
            base..base + retrieved as u32
        })
        .collect();
    let (found, firsts, ends) = (rig.buffer(&found), rig.buffer(&firsts), rig.buffer(&ends));
    let mut slots = SlotRig::new(world);
    let request = Resolve {
        whole: Spans { first: step.ranges[2].view(), end: step.ranges[3].view() },
        spans: Spans { first: firsts.view(), end: ends.view() },
        found: found.view(),
        unit: FoundUnit::Tokens,
        retrieved,
        list: list.view_mut(),
        list_end: list_end.view_mut(),
    };
    let tables = tables_of(world.twin.shape, &world.batch, &world.sequences, &world.chunks);
    resolve(&rig.stream, &tables, request, slots.write(), (world.kv.view_mut(), None)).unwrap();
    let (first, end) = (step.ranges[2].read(&rig.stream).unwrap(), step.ranges[3].read(&rig.stream).unwrap());
    let listed = list_end.read(&rig.stream).unwrap();
    for item in 0..ITEMS {
        assert_eq!(listed[item] as usize > item * list_each, end[item] <= first[item], "list of item {item}");
    }
    let calm_with_slots = (HEADS..ITEMS).filter(|item| end[*item] <= first[*item]).count();
    assert_eq!(slots.counters.read(&rig.stream).unwrap()[1], (calm_with_slots * retrieved) as u64);
}

#[test]
fn items_in_doubt_attend_all_of_their_rows_wherever_they_lie() {
    check::<bf16>(64);
    check::<bf16>(128);
    check::<f16>(256);
}
