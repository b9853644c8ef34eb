//! From traces to an access log: runs the engine over every shard and notes what each step retrieves.

use super::{Access, AccessLog, ProfileError, ShardName};
use crate::config::Config;
use crate::engine::{DecodeStep, Engine};
use crate::ids::{LayerId, SeqId, TokenPos};
use crate::page::Unit;
use crate::replay::{in_parallel, threads};
use crate::select::Policy;
use crate::shape::{HeadShape, KvDtype, PAGE_TOKENS, PageShape};
use crate::step::{StageTimes, StepReport};
use crate::trace::Trace;
use crate::view::TensorView;

/// What to replay.
#[derive(Clone, Debug)]
pub struct ProfilePlan {
    /// Selection policy.
    pub policy: Policy,
    /// Tokens attended exactly per kv head and step, sinks and window included.
    pub budget: usize,
    /// Unit of residency and transfer.
    pub unit: Unit,
    /// Decode at most this many steps, the first ones; 0 = all. Steps are consecutive, or neighbours would not overlap as
    /// they do in a real run.
    pub max_steps: usize,
    /// Seed of the policy's random parts.
    pub seed: u64,
    /// Threads that share the shards; 0 = one per core.
    pub threads: usize,
}

/// What the traces gave.
#[derive(Clone, Debug)]
pub struct Collected {
    /// The access string.
    pub log: AccessLog,
    /// Measured time of each stage by step, mean over the shards, on the machine that ran it.
    pub stages_ns: Vec<[f64; 9]>,
}

impl Collected {
    /// Measured nanoseconds of each stage, mean over the steps.
    #[must_use]
    pub fn mean_stages_ns(&self) -> [f64; 9] {
        super::steps::mean_stages(&self.stages_ns)
    }
}

/// Decodes every trace, shard by shard, and notes the retrieved units with their attention mass, and what a search with
/// the previous layer's query would have found. `progress` is told after each shard.
///
/// # Errors
/// [`ProfileError`]: traces that do not belong together, a plan that the engine refuses.
pub fn collect(
    traces: &[Trace],
    plan: &ProfilePlan,
    progress: &(dyn Fn() + Sync),
) -> Result<Collected, ProfileError> {
    let Some(first) = traces.first() else {
        return Err(ProfileError::plan("traces", 0, "must be at least 1"));
    };
    let mut order: Vec<&Trace> = traces.iter().collect();
    order.sort_by_key(|trace| name_of(trace));
    check_together(first, &order)?;
    let meta = first.meta();
    let start = meta.index_until.max(meta.first_query_pos);
    let recorded = meta.first_query_pos + meta.num_queries;
    let end = if plan.max_steps == 0 { recorded } else { recorded.min(start + plan.max_steps) };
    if start >= end {
        let (trace, index_until) = (first.name(), meta.index_until);
        return Err(crate::replay::ReplayError::NoQueries { trace, index_until }.into());
    }
    let heads = HeadShape::new(meta.group(), 1, meta.head_dim)?;
    let config = Config {
        policy: plan.policy.clone(),
        budget: plan.budget,
        seed: plan.seed,
        threads: 1,
        ..Config::new(1, heads, KvDtype::Bf16)
    };
    config.validate()?;

    // A shard is guessed for with the query of the same head one recorded layer earlier.
    let jobs: Vec<(&Trace, Option<&Trace>)> = order
        .iter()
        .map(|trace| {
            let earlier = order
                .iter()
                .filter(|t| t.meta().kv_head == trace.meta().kv_head && t.meta().layer < trace.meta().layer);
            (*trace, earlier.max_by_key(|t| t.meta().layer).copied())
        })
        .collect();
    let shards = in_parallel(threads(plan.threads), &jobs, |(trace, earlier)| {
        let shard = run_shard(trace, *earlier, &config, plan.unit, start..end);
        progress();
        shard
    })?;

    let mut stages_ns = vec![[0.0; 9]; end - start];
    for shard in &shards {
        for (mean, (times, _)) in stages_ns.iter_mut().zip(shard) {
            mean.iter_mut().zip(times.ns).for_each(|(sum, ns)| *sum += ns as f64 / shards.len() as f64);
        }
    }
    let mut accesses: Vec<Vec<Access>> = (start..end).map(|_| Vec::with_capacity(order.len())).collect();
    for shard in shards {
        accesses.iter_mut().zip(shard).for_each(|(step, (_, access))| step.push(access));
    }
    let unit_bytes = plan.unit.tokens() * PageShape::new(meta.head_dim, KvDtype::Bf16).row_bytes();
    let log = AccessLog {
        unit: plan.unit,
        unit_bytes,
        budget: plan.budget,
        shards: order.iter().map(|trace| name_of(trace)).collect(),
        positions: (start as u64..end as u64).collect(),
        accesses,
    };
    Ok(Collected { log, stages_ns })
}

fn name_of(trace: &Trace) -> ShardName {
    ShardName { layer: trace.meta().layer, kv_head: trace.meta().kv_head }
}

/// Shards of one sequence have the same positions and shapes, and no two are the same shard.
fn check_together(first: &Trace, order: &[&Trace]) -> Result<(), ProfileError> {
    let a = first.meta();
    for (i, trace) in order.iter().enumerate() {
        let b = trace.meta();
        let facts = [
            ("model", a.model.clone(), b.model.clone()),
            ("text", a.text.clone(), b.text.clone()),
            ("num_tokens", a.num_tokens.to_string(), b.num_tokens.to_string()),
            ("first_query_pos", a.first_query_pos.to_string(), b.first_query_pos.to_string()),
            ("num_queries", a.num_queries.to_string(), b.num_queries.to_string()),
            ("index_until", a.index_until.to_string(), b.index_until.to_string()),
            ("head_dim", a.head_dim.to_string(), b.head_dim.to_string()),
            ("group", a.group().to_string(), b.group().to_string()),
        ];
        let (trace_name, first_name) = (trace.name(), first.name());
        if let Some((field, expected, found)) = facts.into_iter().find(|(_, a, b)| a != b) {
            return Err(ProfileError::Mismatch {
                trace: trace_name,
                field,
                found,
                expected,
                first: first_name,
            });
        }
        if i > 0 && name_of(order[i - 1]) == name_of(trace) {
            let found = format!("layer {} head {}", b.layer, b.kv_head);
            let expected = "given once".to_owned();
            return Err(ProfileError::Mismatch {
                trace: trace_name,
                field: "shard",
                found,
                expected,
                first: order[i - 1].name(),
            });
        }
    }
    Ok(())
}

type ShardSteps = Vec<(StageTimes, Access)>;

fn run_shard(
    trace: &Trace,
    earlier: Option<&Trace>,
    config: &Config,
    unit: Unit,
    positions: std::ops::Range<usize>,
) -> Result<ShardSteps, ProfileError> {
    let meta = trace.meta();
    let (group, dim, layer) = (meta.group(), meta.head_dim, LayerId(0));
    let mut engine = Engine::open(config.clone())?;
    let seq: SeqId = engine.admit()?;
    let rows = |from: usize, to: usize| -> Result<_, crate::Error> {
        let (range, shape) = (from * dim..to * dim, [to - from, 1, dim]);
        let k = TensorView::contiguous(&trace.k()[range.clone()], shape)?;
        Ok((k, TensorView::contiguous(&trace.v()[range], shape)?))
    };
    let (k, v) = rows(0, positions.start)?;
    engine.prefill(seq, layer, &k, &v)?;
    engine.publish(seq)?;

    let (mut report, mut out, mut guess) = (StepReport::default(), vec![0.0f32; group * dim], Vec::new());
    let mut steps = Vec::with_capacity(positions.len());
    for position in positions {
        let query = position - meta.first_query_pos;
        let shape = [1, group, dim];
        guess.clear();
        if let Some(earlier) = earlier {
            let q = TensorView::contiguous(earlier.query(query), shape)?;
            engine.guess(seq, layer, &q, meta.softmax_scale as f32, &mut guess)?;
        }
        let (k_new, v_new) = rows(position, position + 1)?;
        let step = DecodeStep {
            layer,
            position,
            q: TensorView::contiguous(trace.query(query), shape)?,
            q_pre: Some(TensorView::contiguous(trace.query_pre(query), shape)?),
            k_new,
            v_new,
            scale: meta.softmax_scale as f32,
        };
        engine.decode(seq, &step, &mut out, &mut report)?;
        let shard = &report.shards[0];
        let mass = masses(trace, query, &shard.retrieved, &shard.exact_lse);
        let (units, mass) = in_units(unit, &shard.retrieved, &mass);
        let (guess, _) = in_units(unit, &guess, &vec![0.0; guess.len()]);
        steps.push((shard.stages, Access { units, mass, guess }));
    }
    Ok(steps)
}

/// Share of the exactly attended mass on each token, mean over the group's heads.
fn masses(trace: &Trace, query: usize, tokens: &[TokenPos], exact_lse: &[f32]) -> Vec<f32> {
    let meta = trace.meta();
    let (dim, scale) = (meta.head_dim, meta.softmax_scale as f32);
    let heads: Vec<f32> = trace.query(query).iter().map(|x| x.to_f32()).collect();
    let share = |token: &TokenPos| {
        let key = &trace.k()[*token as usize * dim..][..dim];
        let of_head = |(q, lse): (&[f32], &f32)| {
            let logit: f32 = q.iter().zip(key).map(|(q, k)| q * k.to_f32()).sum::<f32>() * scale;
            (logit - lse).exp().min(1.0)
        };
        heads.chunks_exact(dim).zip(exact_lse).map(of_head).sum::<f32>() / meta.group() as f32
    };
    tokens.iter().map(share).collect()
}

/// Tokens (ascending) as units (ascending), masses added up.
fn in_units(unit: Unit, tokens: &[TokenPos], mass: &[f32]) -> (Vec<u32>, Vec<f32>) {
    match unit {
        Unit::Row => (tokens.to_vec(), mass.to_vec()),
        Unit::Page => {
            let (mut units, mut sums): (Vec<u32>, Vec<f32>) = (Vec::new(), Vec::new());
            for (token, mass) in tokens.iter().zip(mass) {
                let page = token / PAGE_TOKENS as u32;
                match (units.last(), sums.last_mut()) {
                    (Some(last), Some(sum)) if *last == page => *sum = (*sum + mass).min(1.0),
                    _ => {
                        units.push(page);
                        sums.push(*mass);
                    }
                }
            }
            (units, sums)
        }
    }
}
