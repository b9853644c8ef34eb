//! Replay of a recorded trace: how far each policy is from full attention, budget by budget.
//!
//! Protocol (DESIGN section 9): positions `0..index_until` are prefilled, the rest is decoded one position at a time with
//! the recorded queries, keys and values (teacher-forced), inserting as it goes. Per query head and step: relative
//! output error `|o - o_full| / |o_full|` and attention mass kept; per step: recall of the exact top tokens, tokens and
//! bytes read.

#[cfg(feature = "cuda")]
mod device;
mod render;
mod reuse;
mod reuse_render;
mod run;
mod summary;
mod truth;

use std::sync::atomic::{AtomicUsize, Ordering};

pub use render::{html, tables};
pub use reuse::{Errors, ReuseRow, Stretch, average_reuse, reuse_rows};
pub use run::Run;
pub use summary::{REPLAY_SCHEMA, ReplayRow, average, summarise};

use crate::config::{Backend, Config};
use crate::select::Policy;
use crate::shape::{HeadShape, KvDtype};
use crate::trace::Trace;
use truth::Truth;

/// What to replay.
#[derive(Clone, Debug)]
pub struct ReplayPlan {
    /// Policies, in the order of the report.
    pub policies: Vec<Policy>,
    /// Budgets, tokens attended exactly per kv head and step.
    pub budgets: Vec<usize>,
    /// Where the prefill ends.
    pub decode_from: DecodeFrom,
    /// Segments to measure; empty = all that lie in the decoded part.
    pub segments: Vec<String>,
    /// Measure at most this many queries, evenly spaced over the segments; 0 = all.
    pub max_queries: usize,
    /// Seed of the policies' random parts.
    pub seed: u64,
    /// Threads that share the (policy, budget) runs; 0 = one per core. On a device runs follow one another.
    pub threads: usize,
    /// Where attention runs.
    pub backend: Backend,
}

impl ReplayPlan {
    /// Every query of every segment from the end of the prompt on, on the CPU, with all cores and seed 0.
    #[must_use]
    pub fn new(policies: Vec<Policy>, budgets: Vec<usize>) -> Self {
        Self {
            policies,
            budgets,
            decode_from: DecodeFrom::default(),
            segments: Vec::new(),
            max_queries: 0,
            seed: 0,
            threads: 0,
            backend: Backend::Cpu,
        }
    }
}

/// First position that is decoded rather than prefilled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DecodeFrom {
    /// Where the trace says that the prompt ended.
    #[default]
    IndexUntil,
    /// The first recorded query: as many steps as the trace can give, for what learns as it decodes.
    FirstQuery,
}

/// A replay that cannot be done as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// A segment that the trace does not have in its decoded part.
    #[error("{trace}: no segment `{segment}` in the decoded part; it has {known}")]
    Segment {
        /// Name of the trace.
        trace: String,
        /// Segment asked for.
        segment: String,
        /// Segments that can be measured.
        known: String,
    },
    /// No recorded query lies in the decoded part.
    #[error("{trace}: no recorded query at or after index_until = {index_until}")]
    NoQueries {
        /// Name of the trace.
        trace: String,
        /// First decoded position.
        index_until: usize,
    },
    /// The plan names no policy or no budget.
    #[error("replay field `{field}` is empty")]
    Empty {
        /// Name of the field.
        field: &'static str,
    },
    /// The engine refused a step or a configuration.
    #[error(transparent)]
    Engine(#[from] crate::Error),
}

impl ReplayError {
    /// Whether the machine is at fault rather than the caller's input.
    #[must_use]
    pub fn is_environment(&self) -> bool {
        matches!(self, Self::Engine(error) if error.is_environment())
    }
}

/// One measured step: query `query` of the trace, in segment `segment` of [`TraceReplay::segments`].
#[derive(Clone, Copy, Debug)]
pub struct MeasuredStep {
    /// Index of the recorded query.
    pub query: usize,
    /// Position of the query.
    pub position: usize,
    /// Index into [`TraceReplay::segments`].
    pub segment: usize,
}

/// All runs of one trace.
#[derive(Clone, Debug)]
pub struct TraceReplay {
    /// File name of the trace.
    pub trace: String,
    /// Names of the measured segments, in order of position.
    pub segments: Vec<String>,
    /// Positions before this one were prefilled.
    pub prefilled: usize,
    /// Measured steps, in order of position.
    pub steps: Vec<MeasuredStep>,
    /// One run per policy and budget, policies outermost.
    pub runs: Vec<Run>,
}

/// Replays one trace. `progress` is told after each finished run.
///
/// # Errors
/// [`ReplayError`]; the first run that fails ends the replay.
pub fn replay(
    trace: &Trace,
    plan: &ReplayPlan,
    progress: &(dyn Fn() + Sync),
) -> Result<TraceReplay, ReplayError> {
    for (field, empty) in [("policies", plan.policies.is_empty()), ("budgets", plan.budgets.is_empty())] {
        if empty {
            return Err(ReplayError::Empty { field });
        }
    }
    let meta = trace.meta();
    let prefilled = match plan.decode_from {
        DecodeFrom::IndexUntil => meta.index_until,
        DecodeFrom::FirstQuery => meta.index_until.min(meta.first_query_pos),
    };
    let (segments, steps) = measured_steps(trace, plan, prefilled)?;
    let jobs: Vec<Config> = plan
        .policies
        .iter()
        .flat_map(|policy| plan.budgets.iter().map(move |&budget| (policy, budget)))
        .map(|(policy, budget)| shard_config(trace, policy, budget, plan.seed))
        .collect::<Result<_, _>>()?;
    jobs.iter().try_for_each(Config::validate)?;
    let largest = plan.budgets.iter().copied().max().unwrap_or(0);
    let truth = Truth::compute(trace, &steps, &jobs[0], largest)?;
    let on_device = plan.backend == Backend::Cuda;
    let runs = in_parallel(if on_device { 1 } else { threads(plan.threads) }, &jobs, |config| {
        let run = match plan.backend {
            Backend::Cpu => run::run(trace, (prefilled, &steps), &truth, config),
            #[cfg(feature = "cuda")]
            Backend::Cuda => device::run(trace, &steps, &truth, config),
            #[cfg(not(feature = "cuda"))]
            Backend::Cuda => {
                Err(crate::Error::config("backend", "cuda", "needs a build with the feature cuda").into())
            }
        };
        progress();
        run
    })?;
    Ok(TraceReplay { trace: trace.name(), segments, prefilled, steps, runs })
}

/// Number of runs that [`replay`] reports progress for.
#[must_use]
pub fn num_runs(plan: &ReplayPlan) -> usize {
    plan.policies.len() * plan.budgets.len()
}

/// A trace is one shard: one layer, one kv head. One thread an engine, since the runs themselves are shared out.
fn shard_config(trace: &Trace, policy: &Policy, budget: usize, seed: u64) -> Result<Config, ReplayError> {
    let heads = HeadShape::new(trace.meta().group(), 1, trace.meta().head_dim)?;
    let config = Config::new(1, heads, KvDtype::Bf16);
    Ok(Config { policy: policy.clone(), budget, seed, threads: 1, ..config })
}

pub(crate) fn threads(asked: usize) -> usize {
    if asked > 0 { asked } else { std::thread::available_parallelism().map_or(1, usize::from) }
}

/// Segments and steps to measure: recorded queries at or after `index_until` that lie in a wanted segment.
fn measured_steps(
    trace: &Trace,
    plan: &ReplayPlan,
    prefilled: usize,
) -> Result<(Vec<String>, Vec<MeasuredStep>), ReplayError> {
    let meta = trace.meta();
    let first = prefilled.max(meta.first_query_pos);
    let last = meta.first_query_pos + meta.num_queries;
    let decoded: Vec<_> = meta.segments.iter().filter(|s| s.start.max(first) < s.end.min(last)).collect();
    for wanted in &plan.segments {
        if !decoded.iter().any(|s| s.name == *wanted) {
            let known: Vec<&str> = decoded.iter().map(|s| s.name.as_str()).collect();
            let (trace, segment) = (trace.name(), wanted.clone());
            return Err(ReplayError::Segment { trace, segment, known: known.join(", ") });
        }
    }
    let wanted: Vec<_> =
        decoded.into_iter().filter(|s| plan.segments.is_empty() || plan.segments.contains(&s.name)).collect();
    let mut steps: Vec<MeasuredStep> = Vec::new();
    for (segment, s) in wanted.iter().enumerate() {
        let positions = s.start.max(first)..s.end.min(last);
        steps.extend(positions.map(|position| MeasuredStep {
            query: position - meta.first_query_pos,
            position,
            segment,
        }));
    }
    steps.sort_by_key(|s| s.position);
    if steps.is_empty() {
        return Err(ReplayError::NoQueries { trace: trace.name(), index_until: prefilled });
    }
    if plan.max_queries > 0 && plan.max_queries < steps.len() {
        let (n, k) = (steps.len(), plan.max_queries);
        steps = (0..k).map(|i| steps[i * n / k]).collect();
    }
    Ok((wanted.iter().map(|s| s.name.clone()).collect(), steps))
}

/// Runs `work` on every job over `threads` plain threads; results in the order of the jobs. Plain threads rather than a
/// rayon pool, because each run owns an engine with its own pool and would otherwise start others while it waits.
pub(crate) fn in_parallel<J: Sync, T: Send, E: Send>(
    threads: usize,
    jobs: &[J],
    work: impl Fn(&J) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let next = AtomicUsize::new(0);
    let done = parking_lot::Mutex::new(Vec::with_capacity(jobs.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(jobs.len()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(i) else { break };
                    let result = work(job);
                    let failed = result.is_err();
                    done.lock().push((i, result));
                    if failed {
                        next.store(jobs.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let mut done = done.into_inner();
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}
