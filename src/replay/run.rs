//! One policy at one budget over one trace.

use super::{MeasuredStep, ReplayError, truth::Truth};
use crate::config::Config;
use crate::engine::{DecodeStep, Engine};
use crate::ids::LayerId;
use crate::reuse::{ReuseReport, ReuseSummary};
use crate::step::StepReport;
use crate::trace::Trace;
use crate::view::TensorView;

/// Measurements of one run; vectors follow [`super::TraceReplay::steps`].
#[derive(Clone, Debug)]
pub struct Run {
    /// Policy as given.
    pub policy: String,
    /// Tokens that may be attended exactly.
    pub budget: usize,
    /// Relative output error, `[steps, group]`.
    pub errors: Vec<f32>,
    /// Attention mass on the exactly attended tokens, `[steps, group]`.
    pub mass_kept: Vec<f32>,
    /// Recall of the exact top tokens, `[steps]`.
    pub recall: Vec<f32>,
    /// Tokens attended exactly, `[steps]`.
    pub tokens_read: Vec<usize>,
    /// Bytes of keys and values attended exactly, `[steps]`.
    pub kv_bytes_read: Vec<usize>,
    /// Bytes of summaries, codes and keys read to select and to form the tail, `[steps]`.
    pub index_bytes_read: Vec<usize>,
    /// Pages that hold the attended tokens, `[steps]`.
    pub pages_read: Vec<usize>,
    /// What the reuse cache did, `[steps]`.
    pub reuse: Vec<ReuseReport>,
    /// What it had learnt at the end of the run.
    pub learnt: ReuseSummary,
    /// Bytes kept beside the exact keys and values at the end of the run.
    pub index_bytes: usize,
    /// Bytes of the exact keys and values at the end of the run.
    pub kv_bytes: usize,
}

impl Run {
    /// A run of `steps` steps of `group` heads before its first.
    pub(super) fn before(config: &Config, (steps, group): (usize, usize)) -> Self {
        Self {
            policy: config.policy.spec().to_owned(),
            budget: config.budget,
            errors: Vec::with_capacity(steps * group),
            mass_kept: Vec::with_capacity(steps * group),
            recall: Vec::with_capacity(steps),
            tokens_read: Vec::with_capacity(steps),
            kv_bytes_read: Vec::with_capacity(steps),
            index_bytes_read: Vec::with_capacity(steps),
            pages_read: Vec::with_capacity(steps),
            reuse: Vec::with_capacity(steps),
            learnt: ReuseSummary::default(),
            index_bytes: 0,
            kv_bytes: 0,
        }
    }
}

/// Keys and values of consecutive tokens, `[tokens, 1, head_dim]` each.
pub(super) fn token_rows(
    trace: &Trace,
    tokens: std::ops::Range<usize>,
) -> Result<(TensorView<'_>, TensorView<'_>), crate::Error> {
    let head_dim = trace.meta().head_dim;
    let (range, shape) = (tokens.start * head_dim..tokens.end * head_dim, [tokens.len(), 1, head_dim]);
    let k = TensorView::contiguous(&trace.k()[range.clone()], shape)?;
    Ok((k, TensorView::contiguous(&trace.v()[range], shape)?))
}

pub(super) fn run(
    trace: &Trace,
    (prefilled, steps): (usize, &[MeasuredStep]),
    truth: &Truth,
    config: &Config,
) -> Result<Run, ReplayError> {
    let meta = trace.meta();
    let (group, head_dim) = (meta.group(), meta.head_dim);
    let mut engine = Engine::open(config.clone())?;
    let seq = engine.admit()?;
    let layer = LayerId(0);
    let rows = |from, to| token_rows(trace, from..to);
    let (k, v) = rows(0, prefilled)?;
    engine.prefill(seq, layer, &k, &v)?;
    engine.publish(seq)?;

    let mut run = Run::before(config, (steps.len(), group));
    let mut report = StepReport::default();
    let mut out = vec![0.0f32; group * head_dim];
    for (i, step) in steps.iter().enumerate() {
        // Positions between two measured steps join the cache without a query.
        let stored = engine.num_tokens(seq, layer)?;
        let (k, v) = rows(stored, step.position)?;
        engine.prefill(seq, layer, &k, &v)?;
        let (k_new, v_new) = rows(step.position, step.position + 1)?;
        let q_shape = [1, group, head_dim];
        let request = DecodeStep {
            layer,
            position: step.position,
            q: TensorView::contiguous(trace.query(step.query), q_shape)?,
            q_pre: Some(TensorView::contiguous(trace.query_pre(step.query), q_shape)?),
            k_new,
            v_new,
            scale: meta.softmax_scale as f32,
        };
        engine.decode(seq, &request, &mut out, &mut report)?;
        let truth = truth.step(i);
        let shard = &report.shards[0];
        run.errors.extend(truth.errors(&out));
        run.mass_kept.extend(truth.mass_kept(&shard.exact_lse));
        run.recall.push(truth.recall(&shard.retrieved));
        run.tokens_read.push(shard.tokens_attended);
        run.kv_bytes_read.push(shard.kv_bytes_read);
        run.index_bytes_read.push(shard.index_bytes_read);
        run.pages_read.push(shard.pages_touched);
        run.reuse.push(shard.reuse);
    }
    run.learnt = engine.reuse_summary(seq, layer)?.pop().unwrap_or_default();
    let memory = engine.memory(seq)?;
    (run.index_bytes, run.kv_bytes) = (memory.index_bytes, memory.kv_bytes);
    Ok(run)
}
