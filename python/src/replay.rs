//! `floe.replay` and `floe.profile`: the reports of the command, as dicts.

use std::sync::Arc;

use floe::Policy;
use floe::page::Unit;
use floe::policy::{EvictionKind, PrefetchKind};
use floe::profile::{PROFILE_SCHEMA, Profile, ProfilePlan, SimPlan, collect, overlap, rows, simulate};
use floe::replay::{DecodeFrom, REPLAY_SCHEMA, ReplayPlan, replay as replay_trace, summarise};
use floe::step::Stage;
use floe::trace::Trace;
use floe::transfer::LinkModel;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Value, json};

use crate::error::{OrPyErr, bad_field};
use crate::json::to_py;
use crate::trace::PyTrace;

/// Accuracy of policies against full attention on recorded traces.
#[pyfunction]
#[pyo3(signature = (traces, *, policies, budgets, segments, max_queries, decode_from, seed, threads))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub fn replay<'py>(
    py: Python<'py>,
    traces: Vec<PyRef<'py, PyTrace>>,
    policies: Vec<String>,
    budgets: Vec<usize>,
    segments: Vec<String>,
    max_queries: usize,
    decode_from: &str,
    seed: u64,
    threads: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let policies = policies.iter().map(|spec| spec.parse::<Policy>().or_py_err()).collect::<PyResult<_>>()?;
    let decode_from = match decode_from {
        "index-until" => DecodeFrom::IndexUntil,
        "first-query" => DecodeFrom::FirstQuery,
        other => return Err(bad_field("decode_from", other, "must be index-until or first-query")),
    };
    let plan = ReplayPlan {
        policies,
        budgets,
        segments,
        max_queries,
        decode_from,
        seed,
        threads,
        backend: floe::Backend::Cpu,
    };
    let traces: Vec<Arc<Trace>> = traces.iter().map(|trace| trace.trace.clone()).collect();
    let replays = py
        .detach(|| {
            traces.iter().map(|trace| replay_trace(trace, &plan, &|| ())).collect::<Result<Vec<_>, _>>()
        })
        .or_py_err()?;
    let rows: Vec<_> = replays.iter().flat_map(summarise).collect();
    let document = json!({ "schema": REPLAY_SCHEMA, "rows": to_value(&rows)? });
    Ok(to_py(py, &document)?.cast_into()?)
}

/// What hot tiers of several sizes would do for a sequence.
#[pyfunction]
#[pyo3(signature = (
    traces, *, policy, budget, unit, evictions, prefetches, slots, max_steps, link_gb_per_s, link_latency_us,
    layer_us, overlap, seed, threads
))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub fn profile<'py>(
    py: Python<'py>,
    traces: Vec<PyRef<'py, PyTrace>>,
    policy: &str,
    budget: usize,
    unit: &str,
    evictions: Vec<String>,
    prefetches: Vec<String>,
    slots: Vec<f64>,
    max_steps: usize,
    link_gb_per_s: Option<f64>,
    link_latency_us: f64,
    layer_us: f64,
    overlap: f64,
    seed: u64,
    threads: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let plan = ProfilePlan {
        policy: policy.parse::<Policy>().or_py_err()?,
        budget,
        unit: unit.parse::<Unit>().map_err(|error| bad_field("unit", unit, error))?,
        max_steps,
        seed,
        threads,
    };
    let policies = parse_all::<EvictionKind>("evictions", &evictions)?;
    let prefetches = parse_all::<PrefetchKind>("prefetches", &prefetches)?;
    // The library profiles traces that it owns.
    let paths: Vec<_> = traces.iter().map(|trace| trace.trace.path().to_path_buf()).collect();
    let traces =
        py.detach(|| paths.into_iter().map(Trace::open).collect::<Result<Vec<_>, _>>()).or_py_err()?;
    let collected = py.detach(|| collect(&traces, &plan, &|| ())).or_py_err()?;
    let mut link = LinkModel::pcie5(collected.log.unit_bytes);
    link.gb_per_s = link_gb_per_s.unwrap_or(link.gb_per_s);
    (link.batch_latency_us, link.layer_us, link.overlap) = (link_latency_us, layer_us, overlap);
    let plan = SimPlan { policies, prefetches, slots_factors: slots, link, threads };
    let cells = py.detach(|| simulate(&collected.log, &plan)).or_py_err()?;
    let profile =
        Profile { log: &collected.log, plan: &plan, cells: &cells, stages_ns: Some(&collected.stages_ns) };
    let steps = collected.stages_ns.len().max(1) as f64;
    let mean = |stage: usize| collected.stages_ns.iter().map(|ns| ns[stage]).sum::<f64>() / steps;
    let stages: serde_json::Map<String, Value> =
        Stage::ALL.iter().enumerate().map(|(i, stage)| (stage.name().to_owned(), json!(mean(i)))).collect();
    let document = json!({
        "schema": PROFILE_SCHEMA,
        "rows": to_value(&rows(&profile))?,
        "overlap": floe_overlap(&profile),
        "stage_ns": stages,
        "notes": profile.notes(),
    });
    Ok(to_py(py, &document)?.cast_into()?)
}

fn floe_overlap(profile: &Profile<'_>) -> f64 {
    overlap(profile.log)
}

fn parse_all<T: std::str::FromStr>(field: &str, names: &[String]) -> PyResult<Vec<T>>
where
    T::Err: std::fmt::Display,
{
    let parse =
        |name: &String| name.parse::<T>().map_err(|error| PyValueError::new_err(format!("{field}: {error}")));
    names.iter().map(parse).collect()
}

fn to_value(rows: &impl serde::Serialize) -> PyResult<Value> {
    serde_json::to_value(rows).map_err(|error| PyRuntimeError::new_err(error.to_string()))
}
