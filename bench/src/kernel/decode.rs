//! `dense_decode` and `sparse_decode`: 8 kv heads of 4 query heads, head size 128, bf16.

use anyhow::ensure;
use floe_cuda::AttendParams;
use floe_cuda::device::{DeviceBuffer, DeviceError};
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DevState, Lists, PlanShape, Spans, dense_decode, sparse_decode,
};
use floe_cuda::twin::device::{HostKv, HostSpans, TileRows, decode_lists};
use half::bf16;

use super::rig::{Bounds, Pool, Random, Rig, Row, error};

pub const HEADS: usize = 8;
pub const GROUP: usize = 4;
pub const D: usize = 128;
pub const ROW: usize = 2 * D;
/// Rounding the weights to bf16 costs 2^-9 each; see the tests of floe-cuda.
const ERROR_MAX: f64 = 5e-3;

pub fn params() -> AttendParams {
    AttendParams { scale: 1.0 / (D as f32).sqrt(), softcap: None }
}

/// States of one launch.
pub struct Output {
    pub out: DeviceBuffer<f32>,
    pub lse: DeviceBuffer<f32>,
}

impl Output {
    pub fn new(rig: &Rig, heads: usize) -> anyhow::Result<Self> {
        let (out, lse) =
            (DeviceBuffer::zeros(&rig.device, heads * D)?, DeviceBuffer::zeros(&rig.device, heads)?);
        Ok(Self { out, lse })
    }

    pub fn state(&mut self) -> DevState<'_> {
        DevState { out: self.out.view_mut(), lse: self.lse.view_mut() }
    }
}

pub fn run(rig: &Rig, bounds: &Bounds, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    for (batch, context) in
        [(1, 4096), (1, 8192), (1, 32_768), (1, 131_072), (1, 524_288), (4, 32_768), (16, 8192), (64, 8192)]
    {
        let case = format!("{batch} x {context}");
        if rig.wants("dense_decode", &case) {
            rows.push(dense(rig, bounds, batch, context, case)?);
        }
    }
    for (batch, tokens) in [(1, 128), (1, 256), (1, 1024), (1, 4096), (16, 256), (64, 256), (16, 2048)] {
        for (kernel, kind) in [("sparse_decode pages", Kind::Pages), ("sparse_decode rows", Kind::Rows)] {
            let case = format!("{batch} x {tokens}");
            if rig.wants(kernel, &case) {
                rows.push(sparse(rig, bounds, (batch, tokens), kind, (kernel, case))?);
            }
        }
    }
    Ok(())
}

/// Launches of one shape over several sets.
struct Launches {
    pool: Pool,
    q: DeviceBuffer<bf16>,
    plan: DecodePlan,
    output: Output,
    /// Per set: first, end, entries.
    lists: Vec<[DeviceBuffer<u32>; 3]>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Range,
    Pages,
    Rows,
}

impl Launches {
    fn new(
        rig: &Rig,
        q: &[bf16],
        rows: usize,
        kind: Kind,
        pool_rows: usize,
        lists: &[[Vec<u32>; 3]],
    ) -> anyhow::Result<Self> {
        let items = q.len() / (GROUP * D);
        let rows_max = vec![rows as u32; items];
        let shape = PlanShape { rows_max: &rows_max, group: GROUP, head_dim: D };
        let buffer = |data: &[u32]| DeviceBuffer::from_slice(&rig.device, data);
        Ok(Self {
            pool: Pool::new(rig, pool_rows * ROW)?,
            q: DeviceBuffer::from_slice(&rig.device, q)?,
            plan: DecodePlan::new(&rig.device, shape)?,
            output: Output::new(rig, items * GROUP)?,
            lists: lists
                .iter()
                .map(|[first, end, entries]| Ok([buffer(first)?, buffer(end)?, buffer(entries)?]))
                .collect::<Result<_, DeviceError>>()?,
            kind,
        })
    }

    fn launch(&mut self, rig: &Rig, set: usize) -> Result<(), DeviceError> {
        let [first, end, entries] = &self.lists[set];
        let kv = self.pool.device.view();
        let args = DecodeArgs { q: self.q.view(), kv, params: params(), skip_below: None };
        let spans = Spans { first: first.view(), end: end.view() };
        let state = self.output.state();
        let lists = match self.kind {
            Kind::Range => return dense_decode(&rig.stream, &mut self.plan, &args, spans, state),
            Kind::Pages => Lists::Pages { spans, slots: entries.view(), masks: None },
            Kind::Rows => Lists::Rows { spans, rows: entries.view() },
        };
        sparse_decode(&rig.stream, &mut self.plan, &args, lists, state)
    }

    /// Verifies the first item of set 0, whose rows are `first_item`, then times.
    fn measure(
        mut self,
        rig: &Rig,
        q: &[bf16],
        first_item: &[u32],
        (kernel, case, bytes): (&'static str, String, usize),
        bounds: &Bounds,
    ) -> anyhow::Result<Row> {
        self.launch(rig, 0)?;
        let got = self.output.out.read(&rig.stream)?;
        let kv: Vec<bf16> =
            first_item.iter().flat_map(|&row| self.pool.host(row as usize * ROW, ROW)).collect();
        let host = HostKv { q: &q[..GROUP * D], kv: &kv, group: GROUP, head_dim: D, params: params() };
        let spans = HostSpans { first: &[0], end: &[first_item.len() as u32] };
        let want = decode_lists(&host, spans, &TileRows::Range)?;
        let error = error(&got[..GROUP * D], &want.out, D);
        ensure!(error <= ERROR_MAX, "{kernel} {case}: error {error:e} is over {ERROR_MAX:e}");
        let spread = rig.time(self.lists.len(), |set| self.launch(rig, set))?;
        let gb_s = bytes as f64 / spread.median_us / 1e3;
        Ok(Row { kernel, case, bytes, spread, gb_s, share: gb_s / bounds.copy_gb_s, error })
    }
}

fn dense(rig: &Rig, bounds: &Bounds, batch: usize, context: usize, case: String) -> anyhow::Result<Row> {
    let items = batch * HEADS;
    let bytes = items * context * ROW * size_of::<bf16>();
    let sets = Rig::sets(bytes);
    let lists: Vec<_> = (0..sets)
        .map(|set| {
            let first: Vec<u32> = (0..items).map(|i| ((set * items + i) * context) as u32).collect();
            let end = first.iter().map(|f| f + context as u32).collect();
            [first, end, vec![]]
        })
        .collect();
    let q = Random(1).normals(items * GROUP * D);
    let first_item: Vec<u32> = (0..context as u32).collect();
    Launches::new(rig, &q, context, Kind::Range, sets * items * context, &lists)?.measure(
        rig,
        &q,
        &first_item,
        ("dense_decode", case, bytes),
        bounds,
    )
}

/// Rows of the hot tier that lists point into: 1 GiB.
const POOL_ROWS: usize = 1 << 21;

fn sparse(
    rig: &Rig,
    bounds: &Bounds,
    (batch, tokens): (usize, usize),
    kind: Kind,
    (kernel, case): (&'static str, String),
) -> anyhow::Result<Row> {
    let items = batch * HEADS;
    let bytes = items * tokens * ROW * size_of::<bf16>();
    let unit = if kind == Kind::Pages { 16 } else { 1 };
    let each = tokens / unit;
    let mut random = Random(3);
    let lists: Vec<_> = (0..Rig::sets(bytes))
        .map(|_| {
            let first: Vec<u32> = (0..items).map(|i| (i * each) as u32).collect();
            let end = first.iter().map(|f| f + each as u32).collect();
            [first, end, random.distinct(POOL_ROWS / unit, items * each)]
        })
        .collect();
    let q = random.normals(items * GROUP * D);
    let first_item: Vec<u32> =
        lists[0][2][..each].iter().flat_map(|&e| e * unit as u32..(e + 1) * unit as u32).collect();
    Launches::new(rig, &q, tokens, kind, POOL_ROWS, &lists)?.measure(
        rig,
        &q,
        &first_item,
        (kernel, case, bytes),
        bounds,
    )
}
