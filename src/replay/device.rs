//! One policy at one budget over one trace, on the device.

use floe_cuda::device::{Device, Stream};
use half::bf16;

use super::run::{Run, token_rows};
use super::{MeasuredStep, ReplayError, truth::Truth};
use crate::config::{Config, HotConfig};
use crate::gpu::{GpuEngine, GpuOptions, HostLayerStep};
use crate::ids::LayerId;
use crate::reuse::ReuseReport;
use crate::shape::{PAGE_TOKENS, PageShape};
use crate::trace::Trace;
use crate::view::TensorView;

/// Slots of the replay, for each token that a step may attend: a hot tier that holds a few steps.
const SLOTS_PER_TOKEN: usize = 4;
/// Tokens of a prefill piece.
const PIECE: usize = 2048;

pub(super) fn run(
    trace: &Trace,
    steps: &[MeasuredStep],
    truth: &Truth,
    config: &Config,
) -> Result<Run, ReplayError> {
    let meta = trace.meta();
    let (group, head_dim) = (meta.group(), meta.head_dim);
    let device = Device::open(0).map_err(crate::Error::from)?;
    let stream = Stream::new(&device).map_err(crate::Error::from)?;
    let slots = (SLOTS_PER_TOKEN * config.budget).min(meta.num_tokens);
    let config = Config { hot: HotConfig { slots, ..config.hot }, ..config.clone() };
    // Exact attention needs all rows; selection is to be seen at work.
    let hot = if config.policy.is_exact() { 1.0 } else { 0.0 };
    let options = GpuOptions::for_load(&config, 1, meta.num_tokens, hot);
    let mut engine = GpuEngine::<bf16>::open(&device, config.clone(), options)?;
    let seq = engine.admit(None)?;
    let layer = LayerId(0);
    let rows = |from, to| token_rows(trace, from..to);
    let shape = PageShape::new(head_dim, config.kv_dtype);
    let mut run = Run {
        // The device does not reuse.
        reuse: vec![ReuseReport::default(); steps.len()],
        kv_bytes: meta.num_tokens * shape.row_bytes(),
        ..Run::before(&config, (steps.len(), group))
    };
    let mut out = vec![0.0f32; group * head_dim];
    for (i, step) in steps.iter().enumerate() {
        let stored = engine.num_tokens(seq, layer)?;
        for from in (stored..step.position).step_by(PIECE) {
            let (k, v) = rows(from, (from + PIECE).min(step.position))?;
            engine.prefill_host(seq, layer, (&k, &v), &stream)?;
        }
        let (k_new, v_new) = rows(step.position, step.position + 1)?;
        let request = HostLayerStep {
            layer,
            sequences: &[seq],
            positions: &[step.position],
            q: TensorView::contiguous(trace.query(step.query), [1, group, head_dim])?,
            k_new,
            v_new,
            scale: meta.softmax_scale as f32,
        };
        engine.attend_host(&request, &mut out, &stream)?;
        let Some(last) = engine.last_step(&[seq], &stream)?.pop() else { continue };
        let truth = truth.step(i);
        let tokens = step.position + 1;
        let pages = tokens.saturating_sub(config.window + 1) / PAGE_TOKENS;
        // Sinks and everything behind the published pages are attended beside what was retrieved.
        let fixed = config.sinks.min(tokens) + tokens - (pages * PAGE_TOKENS).max(config.sinks.min(tokens));
        let attended = if last.exact { tokens } else { fixed + last.retrieved.len() };
        let mut retrieved_pages: Vec<u32> = last.retrieved.iter().map(|t| t / PAGE_TOKENS as u32).collect();
        retrieved_pages.dedup();
        run.errors.extend(truth.errors(&out));
        run.mass_kept.extend(truth.mass_kept(&last.exact_lse));
        run.recall.push(truth.recall(&last.retrieved));
        run.tokens_read.push(attended);
        run.kv_bytes_read.push(attended * shape.row_bytes());
        run.index_bytes_read.push(if last.exact { 0 } else { pages * engine.page_bytes() });
        run.pages_read.push(if last.exact {
            tokens.div_ceil(PAGE_TOKENS)
        } else {
            fixed.div_ceil(PAGE_TOKENS) + retrieved_pages.len()
        });
    }
    if !config.policy.is_exact() {
        run.index_bytes = meta.num_tokens / PAGE_TOKENS * engine.page_bytes();
    }
    engine.report(&stream)?;
    Ok(run)
}
