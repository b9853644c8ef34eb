//! Real times and bytes of a hot tier on the device, over recorded traces: what `floe profile --backend cuda` prints.

mod overlap;

pub use overlap::{StageRow, device_profile_html, overlap_table, step_overlap};

use std::ops::Range;

use floe_cuda::device::{Device, Stream};
use half::bf16;

use super::{GpuEngine, GpuOptions, HostLayerStep};
use crate::config::{Config, HotConfig};
use crate::error::{Error, Result};
use crate::ids::{LayerId, SeqId};
use crate::report::NumberFormat;
use crate::report::table::{Cell, Column, Row, Table, TableError};
use crate::shape::{HeadShape, KvDtype};
use crate::trace::Trace;
use crate::view::TensorView;

/// Tokens of a prefill piece.
const PIECE: usize = 2048;

/// One trace at one number of slots.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceProfileRow {
    /// Name of the trace.
    pub trace: String,
    /// Slots of the kv head at least.
    pub slots: usize,
    /// Share of retrieved rows that were in their slots.
    pub hit_rate: f64,
    /// Bytes over the link, a step: of rows that it waited for, and of rows brought in behind it.
    pub link_bytes: f64,
    /// See `link_bytes`.
    pub prefetched_bytes: f64,
    /// Share of steps that attended everything because estimates would have been too coarse.
    pub doubt_rate: f64,
    /// Device time of a step, microseconds: half of the steps were faster, one in a hundred slower.
    pub p50_us: f64,
    /// See `p50_us`.
    pub p99_us: f64,
    /// Steps that were exact.
    pub exact_steps: u64,
    /// Steps.
    pub steps: u64,
    /// The device.
    pub device: String,
}

/// What to profile.
#[derive(Debug, Clone)]
pub struct DeviceProfilePlan {
    /// Policy and budget; the shape comes from the trace.
    pub policy: crate::Policy,
    /// Tokens attended exactly.
    pub budget: usize,
    /// Slots, as multiples of the budget.
    pub slots: Vec<f64>,
    /// Steps at most; 0 = all.
    pub max_steps: usize,
    /// Tokens of a kv head that are brought in behind a step; see [`GpuOptions::prefetch`].
    pub prefetch: usize,
}

/// Decodes every trace at every number of slots.
///
/// # Errors
/// No driver or device, a configuration that the device does not run, what the driver reports.
pub fn device_profile(traces: &[Trace], plan: &DeviceProfilePlan) -> Result<Vec<DeviceProfileRow>> {
    let device = Device::open(0)?;
    let mut rows = Vec::new();
    for trace in traces {
        for factor in &plan.slots {
            rows.push(one(&device, trace, plan, slots_of(plan, *factor, trace))?);
        }
    }
    Ok(rows)
}

/// Slots at this multiple of the budget.
fn slots_of(plan: &DeviceProfilePlan, factor: f64, trace: &Trace) -> usize {
    ((plan.budget as f64 * factor) as usize).clamp(plan.budget, trace.meta().num_tokens)
}

/// An engine that holds the prompt of a trace in each of its layers.
struct Run<'t> {
    trace: &'t Trace,
    engine: GpuEngine<bf16>,
    layers: Vec<LayerId>,
    seq: SeqId,
    stream: Stream,
    /// Positions that are decoded.
    decoded: Range<usize>,
}

impl<'t> Run<'t> {
    fn new(
        device: &Device,
        trace: &'t Trace,
        (plan, slots, layers): (&DeviceProfilePlan, usize, usize),
    ) -> Result<Self> {
        let meta = trace.meta();
        let hot = HotConfig { slots, ..HotConfig::default() };
        let config = Config {
            policy: plan.policy.clone(),
            budget: plan.budget,
            hot,
            ..Config::new(layers, HeadShape::new(meta.group(), 1, meta.head_dim)?, KvDtype::Bf16)
        };
        let stream = Stream::new(device)?;
        let share = if config.policy.is_exact() { 1.0 } else { 0.0 };
        let options = GpuOptions {
            // A tier too small for it does without.
            prefetch: plan.prefetch.min(slots.saturating_sub(plan.budget)),
            ..GpuOptions::for_load(&config, 1, meta.num_tokens, share)
        };
        let mut engine = GpuEngine::<bf16>::open(device, config, options)?;
        let seq = engine.admit(None)?;
        let start = meta.index_until.max(meta.first_query_pos);
        let recorded = meta.first_query_pos + meta.num_queries;
        let end = if plan.max_steps == 0 { recorded } else { recorded.min(start + plan.max_steps) };
        if start >= end {
            return Err(Error::config("trace", trace.name(), "has no recorded query in its decoded part"));
        }
        let layers = (0..layers).map(LayerId).collect();
        let mut run = Self { trace, engine, layers, seq, stream, decoded: start..end };
        for from in (0..start).step_by(PIECE) {
            let (k, v) = rows(trace, from..(from + PIECE).min(start))?;
            for layer in &run.layers {
                run.engine.prefill_host(seq, *layer, (&k, &v), &run.stream)?;
            }
        }
        Ok(run)
    }

    /// Decodes a position in every layer, one behind the other.
    fn step(&mut self, position: usize, out: &mut [f32]) -> Result<()> {
        let meta = self.trace.meta();
        let (k_new, v_new) = rows(self.trace, position..position + 1)?;
        let query = self.trace.query(position - meta.first_query_pos);
        let step = HostLayerStep {
            layer: LayerId(0),
            sequences: &[self.seq],
            positions: &[position],
            q: TensorView::contiguous(query, [1, meta.group(), meta.head_dim])?,
            k_new,
            v_new,
            scale: meta.softmax_scale as f32,
        };
        self.engine.attend_host_in(&self.layers, &step, out, &self.stream)
    }
}

/// Keys and values `[tokens, 1, head_dim]` of a trace.
fn rows(trace: &Trace, range: Range<usize>) -> Result<(TensorView<'_>, TensorView<'_>)> {
    let d = trace.meta().head_dim;
    let (elements, shape) = (range.start * d..range.end * d, [range.len(), 1, d]);
    let k = TensorView::contiguous(&trace.k()[elements.clone()], shape)?;
    Ok((k, TensorView::contiguous(&trace.v()[elements], shape)?))
}

fn one(device: &Device, trace: &Trace, plan: &DeviceProfilePlan, slots: usize) -> Result<DeviceProfileRow> {
    let meta = trace.meta();
    let mut run = Run::new(device, trace, (plan, slots, 1))?;
    let mut out = vec![0.0f32; meta.group() * meta.head_dim];
    let mut times = Vec::with_capacity(run.decoded.len());
    for position in run.decoded.clone() {
        run.step(position, &mut out)?;
        times.push(run.engine.host_step_us()?);
    }
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    let report = run.engine.report(&run.stream)?;
    Ok(DeviceProfileRow {
        trace: trace.name(),
        slots,
        hit_rate: report.hit_rate(),
        link_bytes: report.bytes_fetched as f64 / report.steps as f64,
        prefetched_bytes: report.bytes_prefetched as f64 / report.steps as f64,
        doubt_rate: report.doubt_rate(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        exact_steps: report.exact_steps,
        steps: report.steps,
        device: report.device,
    })
}

/// The rows as a table.
///
/// # Errors
/// Never for rows of [`device_profile`].
pub fn device_profile_table(rows: &[DeviceProfileRow]) -> std::result::Result<Table, TableError> {
    let columns = ["trace"].map(Column::text).into_iter();
    let numbers = [
        "slots",
        "hit rate",
        "link KB a step",
        "ahead KB a step",
        "us a step p50",
        "p99",
        "exact steps",
        "in doubt",
        "steps",
    ];
    let mut table = Table::new(columns.chain(numbers.map(Column::number)));
    for row in rows {
        let cells = [
            Cell::text(row.trace.clone()),
            Cell::number(row.slots as f64, NumberFormat::Count),
            Cell::number(row.hit_rate, NumberFormat::Decimals(3)),
            Cell::number(row.link_bytes / 1e3, NumberFormat::Decimals(1)),
            Cell::number(row.prefetched_bytes / 1e3, NumberFormat::Decimals(1)),
            Cell::number(row.p50_us, NumberFormat::Decimals(1)),
            Cell::number(row.p99_us, NumberFormat::Decimals(1)),
            Cell::number(row.exact_steps as f64, NumberFormat::Count),
            Cell::number(row.doubt_rate, NumberFormat::Percent(1)),
            Cell::number(row.steps as f64, NumberFormat::Count),
        ];
        table.push(Row::new(cells))?;
    }
    Ok(table)
}
