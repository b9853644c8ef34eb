//! What decode reuse did in a replay: how often, at which error, how many bytes, and what was learnt.

use serde::Serialize;

use super::summary::{mean, percentile};
use super::{Run, TraceReplay};
use crate::reuse::ReuseReport;

/// Stretches of steps in [`ReuseRow::by_position`].
const STRETCHES: usize = 8;

/// One run with reuse, over all its measured steps. Errors are relative to full attention, per query head; rates and shares
/// lie in 0..=1. A *reused output* is that of a head in a step where some head of its group reused.
#[derive(Clone, Debug, Serialize)]
pub struct ReuseRow {
    /// File name of the trace, or `average`.
    pub trace: String,
    /// Policy as given.
    pub policy: String,
    /// Tokens that a step without reuse may attend exactly.
    pub budget: usize,
    /// Measured steps.
    pub steps: usize,
    /// Share of query heads and steps with an earlier state near enough to consider.
    pub match_rate: f64,
    /// Share of query heads and steps whose output has a reused part.
    pub reuse_rate: f64,
    /// Keys and values read, as a share of what Full-KV reads.
    pub kv_share: f64,
    /// All bytes read, earlier queries, states and the index included, as a share of what Full-KV reads.
    pub bytes_share: f64,
    /// Errors of all outputs.
    pub error: Errors,
    /// Errors of reused outputs.
    pub reused_error: Errors,
    /// Errors of reused outputs in the second half of the steps: those before taught the thresholds.
    pub held_out_error: Errors,
    /// Reused outputs by the age of the state, in steps.
    pub by_lag: Vec<Stretch>,
    /// All outputs by the number of the step.
    pub by_position: Vec<Stretch>,
    /// Most states that one stood on, itself included.
    pub lineage_max: usize,
    /// Bytes of the cache at the end, as a share of the keys and values.
    pub cache_share: f64,
    /// Measurements that every threshold rests on.
    pub labels: usize,
    /// Whether the shard rested at the end: reuse had been found useless.
    pub resting: bool,
    /// Largest accepted prediction of the error, `[rungs][heads]`; null = none. Empty where nothing is learnt.
    pub thresholds: Vec<Vec<Option<f32>>>,
}

/// Mean and upper percentiles of some errors; 0 where there are none.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Errors {
    /// How many.
    pub outputs: usize,
    /// Mean.
    pub mean: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// Errors of a stretch of lags or steps.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Stretch {
    /// First lag or step.
    pub first: usize,
    /// One past the last.
    pub end: usize,
    /// Their errors.
    pub error: Errors,
}

impl Errors {
    fn of(mut errors: Vec<f64>) -> Self {
        errors.sort_by(f64::total_cmp);
        Self {
            outputs: errors.len(),
            mean: mean(errors.iter().copied()),
            p95: percentile(&errors, 0.95),
            p99: percentile(&errors, 0.99),
        }
    }
}

/// The rows of one trace: its runs with reuse, in order.
#[must_use]
pub fn reuse_rows(replay: &TraceReplay) -> Vec<ReuseRow> {
    let with_reuse = |run: &&Run| run.reuse.iter().any(|r| r.active) || !run.learnt.thresholds.is_empty();
    replay.runs.iter().filter(with_reuse).map(|run| row(replay, run)).collect()
}

fn row(replay: &TraceReplay, run: &Run) -> ReuseRow {
    let steps = replay.steps.len();
    let group = run.errors.len() / steps.max(1);
    let errors = |wanted: &dyn Fn(usize, &ReuseReport) -> bool| {
        let of_steps = run.reuse.iter().enumerate().filter(|(i, report)| wanted(*i, report));
        Errors::of(
            of_steps
                .flat_map(|(i, _)| &run.errors[i * group..(i + 1) * group])
                .map(|e| f64::from(*e))
                .collect(),
        )
    };
    let outputs = (steps * group).max(1) as f64;
    let heads = |of: fn(&ReuseReport) -> usize| run.reuse.iter().map(of).sum::<usize>() as f64 / outputs;
    // Every token of the run has the same number of bytes.
    let last = replay.steps.last().map_or(1, |s| s.position + 1);
    let full: f64 = replay.steps.iter().map(|s| (s.position + 1) as f64).sum::<f64>()
        * (run.kv_bytes as f64 / last as f64);
    let (kv, index) = (run.kv_bytes_read.iter().sum::<usize>(), run.index_bytes_read.iter().sum::<usize>());
    let reused = |report: &ReuseReport| report.heads_reused > 0;
    let lags = run.reuse.iter().filter(|r| reused(r)).map(|r| r.lag).max().unwrap_or(0);
    let by_lag = (0..usize::BITS)
        .map(|power| (1usize << power, 2usize << power))
        .take_while(|(first, _)| *first <= lags)
        .map(|(first, end)| {
            let error = errors(&|_, r| reused(r) && (first..end).contains(&r.lag));
            Stretch { first, end, error }
        })
        .filter(|stretch| stretch.error.outputs > 0);
    let bounds = |i: usize| i * steps / STRETCHES;
    let by_position = (0..STRETCHES).map(|i| {
        let (first, end) = (bounds(i), bounds(i + 1));
        Stretch { first, end, error: errors(&|step, _| (first..end).contains(&step)) }
    });
    ReuseRow {
        trace: replay.trace.clone(),
        policy: run.policy.clone(),
        budget: run.budget,
        steps,
        match_rate: heads(|r| r.heads_matched),
        reuse_rate: heads(|r| r.heads_reused),
        kv_share: kv as f64 / full,
        bytes_share: (kv + index) as f64 / full,
        error: errors(&|_, _| true),
        reused_error: errors(&|_, r| reused(r)),
        held_out_error: errors(&|step, r| reused(r) && 2 * step >= steps),
        by_lag: by_lag.collect(),
        by_position: by_position.filter(|s| s.error.outputs > 0).collect(),
        lineage_max: run.reuse.iter().map(|r| r.lineage).max().unwrap_or(0),
        cache_share: run.learnt.size_bytes as f64 / run.kv_bytes.max(1) as f64,
        labels: run.learnt.labels,
        resting: run.learnt.resting,
        thresholds: run
            .learnt
            .thresholds
            .chunks(group.max(1))
            .map(|rung| rung.iter().map(|t| Some(*t).filter(|t| t.is_finite())).collect())
            .collect(),
    }
}

/// Rows averaged over the traces that have them: every trace counts the same. What belongs to one trace alone, thresholds and
/// stretches, is left out.
#[must_use]
pub fn average_reuse(rows: &[ReuseRow]) -> Vec<ReuseRow> {
    let mut groups: Vec<Vec<&ReuseRow>> = Vec::new();
    for row in rows {
        match groups.iter_mut().find(|g| (&g[0].policy, g[0].budget) == (&row.policy, row.budget)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups.iter().map(|group| average(group)).collect()
}

fn average(group: &[&ReuseRow]) -> ReuseRow {
    let over = |f: &dyn Fn(&ReuseRow) -> f64| mean(group.iter().map(|r| f(r)));
    let errors = |f: fn(&ReuseRow) -> Errors| Errors {
        outputs: group.iter().map(|r| f(r).outputs).sum(),
        mean: over(&|r| f(r).mean),
        p95: over(&|r| f(r).p95),
        p99: over(&|r| f(r).p99),
    };
    ReuseRow {
        trace: "average".into(),
        policy: group[0].policy.clone(),
        budget: group[0].budget,
        steps: group.iter().map(|r| r.steps).sum(),
        match_rate: over(&|r| r.match_rate),
        reuse_rate: over(&|r| r.reuse_rate),
        kv_share: over(&|r| r.kv_share),
        bytes_share: over(&|r| r.bytes_share),
        error: errors(|r| r.error),
        reused_error: errors(|r| r.reused_error),
        held_out_error: errors(|r| r.held_out_error),
        by_lag: Vec::new(),
        by_position: Vec::new(),
        lineage_max: group.iter().map(|r| r.lineage_max).max().unwrap_or(0),
        cache_share: over(&|r| r.cache_share),
        labels: group.iter().map(|r| r.labels).min().unwrap_or(0),
        resting: group.iter().all(|r| r.resting),
        thresholds: Vec::new(),
    }
}
