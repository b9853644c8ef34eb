//! `fetch_pages`, `fetch_rows` over the link, and a sparse step at a hit rate of 0.9: fetch then attend, or both at once.

use anyhow::ensure;
use floe_cuda::device::{DeviceBuffer, DeviceError, PinnedBuffer};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, Fetch, FetchPages, Lists, PlanShape, Spans, fetch_attend, fetch_pages,
    fetch_rows, sparse_decode,
};
use half::bf16;

use super::decode::{D, GROUP, HEADS, Output, ROW, params};
use super::rig::{Bounds, Random, Rig, Row};

/// Rows in host memory: 2 GiB, so that addresses are spread as a real context spreads them.
const HOST_ROWS: usize = 1 << 22;
/// Rows of the hot tier.
const HOT_ROWS: usize = 1 << 19;

pub fn run(rig: &Rig, bounds: &Bounds, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    let cases = [("fetch_pages", 16, [13, 64, 256, 1024]), ("fetch_rows", 1, [205, 2048, 8192, 32_768])];
    let wanted = |kernel: &str, units: usize| rig.wants(kernel, &units.to_string());
    let any = cases.iter().any(|(kernel, _, units)| units.iter().any(|u| wanted(kernel, *u)));
    let steps = [("hit rate 0.9, fetch then attend", false), ("hit rate 0.9, fetch_attend", true)];
    if !any && !steps.iter().any(|(name, _)| rig.wants("sparse step", name)) {
        return Ok(());
    }
    let mut host = PinnedBuffer::<bf16>::zeros(&rig.device, HOST_ROWS * ROW)?;
    let block = Random(11).normals(1 << 20);
    for part in host.as_mut_slice().chunks_mut(block.len()) {
        part.copy_from_slice(&block[..part.len()]);
    }
    for (kernel, unit, counts) in cases {
        for units in counts.into_iter().filter(|units| wanted(kernel, *units)) {
            rows.push(fetch(rig, bounds, &host, (kernel, unit), units)?);
        }
    }
    for (case, fused) in steps.into_iter().filter(|(name, _)| rig.wants("sparse step", name)) {
        rows.push(step(rig, bounds, &host, case, fused)?);
    }
    Ok(())
}

fn fetch(
    rig: &Rig,
    bounds: &Bounds,
    host: &PinnedBuffer<bf16>,
    (kernel, unit): (&'static str, usize),
    units: usize,
) -> anyhow::Result<Row> {
    let unit_len = unit * ROW;
    let bytes = units * unit_len * size_of::<bf16>();
    let mut random = Random(units as u64);
    let mut kv = DeviceBuffer::<bf16>::zeros(&rig.device, HOT_ROWS * ROW)?;
    // So many that the round over them is larger than any cache of data or of addresses.
    let sets = Rig::sets(bytes);
    let mut lists = Vec::new();
    for _ in 0..sets {
        lists.push((random.distinct(HOST_ROWS / unit, units), random.distinct(HOT_ROWS / unit, units)));
    }
    let device: Vec<_> = lists
        .iter()
        .map(|(from, slot)| {
            Ok((DeviceBuffer::from_slice(&rig.device, from)?, DeviceBuffer::from_slice(&rig.device, slot)?))
        })
        .collect::<Result<_, DeviceError>>()?;
    let mut launch = |set: usize| {
        let (from, slot): &(DeviceBuffer<u32>, DeviceBuffer<u32>) = &device[set];
        let fetch = Fetch { host: host.view(), from: from.view(), slot: slot.view(), num: None };
        let run = if unit == 1 { fetch_rows } else { fetch_pages };
        run(&rig.stream, &fetch, D, kv.view_mut())
    };
    launch(0)?;
    let spread = rig.time(sets, &mut launch)?;
    launch(0)?;
    let got = kv.read(&rig.stream)?;
    for (&from, &slot) in lists[0].0.iter().zip(&lists[0].1) {
        let unit = |at: u32| at as usize * unit_len..(at as usize + 1) * unit_len;
        ensure!(got[unit(slot)] == host.as_slice()[unit(from)], "{kernel}: unit {from} did not arrive");
    }
    let gb_s = bytes as f64 / spread.median_us / 1e3;
    let case = units.to_string();
    Ok(Row { kernel, case, bytes, spread, gb_s, share: gb_s / bounds.link_gb_s, error: 0.0 })
}

/// Batch 1, 256 tokens a head, every tenth page absent.
fn step(
    rig: &Rig,
    bounds: &Bounds,
    host: &PinnedBuffer<bf16>,
    case: &str,
    fused: bool,
) -> anyhow::Result<Row> {
    const PAGES: usize = 16;
    let entries = HEADS * PAGES;
    let mut random = Random(17);
    let block = random.normals(1 << 20);
    let mut kv = DeviceBuffer::<bf16>::zeros(&rig.device, HOT_ROWS * ROW)?;
    for start in (0..HOT_ROWS * ROW).step_by(block.len()) {
        kv.write_at(start, &block)?;
    }
    let q = DeviceBuffer::from_slice(&rig.device, &random.normals(HEADS * GROUP * D))?;
    let sets = 64;
    let mut lists = Vec::new();
    let mut absent_count = 0;
    for _ in 0..sets {
        let slots = random.distinct(HOT_ROWS / 16, entries);
        let places = random.distinct(HOST_ROWS / 16, entries);
        let absent: Vec<usize> = (0..entries).filter(|i| i % 10 == 3).collect();
        absent_count = absent.len();
        let mut mixed = vec![u32::MAX; entries];
        absent.iter().for_each(|&i| mixed[i] = places[i]);
        let of = |list: &[u32]| -> Vec<u32> { absent.iter().map(|&i| list[i]).collect() };
        let buffer = |data: &[u32]| DeviceBuffer::from_slice(&rig.device, data);
        lists.push([buffer(&slots)?, buffer(&mixed)?, buffer(&of(&places))?, buffer(&of(&slots))?]);
    }
    let pointers: Vec<u32> = (0..=HEADS).map(|i| (i * PAGES) as u32).collect();
    let pointers = DeviceBuffer::from_slice(&rig.device, &pointers)?;
    let rows_max = [16 * PAGES as u32; HEADS];
    let shape = PlanShape { rows_max: &rows_max, group: GROUP, head_dim: D };
    let mut plan = DecodePlan::new(&rig.device, shape)?;
    let mut output = Output::new(rig, HEADS * GROUP)?;
    let mut launch = |set: usize, fused: bool, output: &mut Output| {
        let [slots, host_pages, from, to] = &lists[set];
        let spans = Spans::csr(pointers.view())?;
        if fused {
            let pages = FetchPages {
                spans,
                slots: slots.view(),
                masks: None,
                host_pages: host_pages.view(),
                host: host.view(),
            };
            let args = DecodeArgs { q: q.view(), kv: kv.view(), params: params(), skip_below: None };
            return fetch_attend(&rig.stream, &mut plan, &args, &pages, output.state());
        }
        let fetch = Fetch { host: host.view(), from: from.view(), slot: to.view(), num: None };
        fetch_pages(&rig.stream, &fetch, D, kv.view_mut())?;
        let args = DecodeArgs { q: q.view(), kv: kv.view(), params: params(), skip_below: None };
        let lists = Lists::Pages { spans, slots: slots.view(), masks: None };
        sparse_decode(&rig.stream, &mut plan, &args, lists, output.state())
    };
    // Both ways must give the same bits.
    let mut outs = Vec::new();
    for way in [true, false] {
        launch(0, way, &mut output)?;
        outs.push(output.out.read(&rig.stream)?);
    }
    ensure!(outs[0] == outs[1], "fetch_attend differs from fetch_pages and sparse_decode");
    let spread = rig.time(sets, |set| launch(set, fused, &mut output))?;
    let bytes = absent_count * 16 * ROW * size_of::<bf16>();
    let gb_s = bytes as f64 / spread.median_us / 1e3;
    let share = gb_s / bounds.link_gb_s;
    Ok(Row { kernel: "sparse step", case: case.to_owned(), bytes, spread, gb_s, share, error: 0.0 })
}
