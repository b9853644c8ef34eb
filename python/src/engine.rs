//! `floe.Engine`.

use std::path::PathBuf;
use std::sync::Arc;

use floe::page::Unit;
use floe::policy::{EvictionKind, PrefetchKind};
use floe::{ColdConfig, Config, Engine, HeadShape, HotConfig, KvDtype, Policy};
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::json;

use crate::error::{OrPyErr, bad_field};
use crate::json::to_py;
use crate::sequence::PySequence;

/// The engine and its sequences. The lock is taken only while the interpreter's is released, so the two cannot wait for
/// each other.
pub type SharedEngine = Arc<Mutex<Engine>>;

/// KV cache and attention of one model, for any number of sequences.
#[pyclass(name = "Engine", module = "floe", frozen)]
pub struct PyEngine {
    engine: SharedEngine,
}

#[pymethods]
impl PyEngine {
    #[new]
    #[pyo3(signature = (
        num_layers, num_q_heads, num_kv_heads, head_dim, *, dtype="bfloat16", policy="floe", budget=256, sinks=16,
        window=64, dense_layers=0, spans=None, threads=0, seed=0, hot_slots=0, hot_unit="row", eviction="lrfu",
        prefetch="none", cold_folder=None, warm_limit_bytes=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn new(
        num_layers: usize,
        num_q_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        dtype: &str,
        policy: &str,
        budget: usize,
        sinks: usize,
        window: usize,
        dense_layers: usize,
        spans: Option<Vec<Option<usize>>>,
        threads: usize,
        seed: u64,
        hot_slots: usize,
        hot_unit: &str,
        eviction: &str,
        prefetch: &str,
        cold_folder: Option<PathBuf>,
        warm_limit_bytes: Option<usize>,
    ) -> PyResult<Self> {
        let heads = HeadShape::new(num_q_heads, num_kv_heads, head_dim).or_py_err()?;
        let refuse = |field: &'static str, value: &str| {
            let value = value.to_owned();
            move |reason: String| bad_field(field, value, reason)
        };
        let hot = HotConfig {
            slots: hot_slots,
            unit: hot_unit.parse::<Unit>().map_err(refuse("hot_unit", hot_unit))?,
            eviction: eviction
                .parse::<EvictionKind>()
                .map_err(|error| refuse("eviction", eviction)(error.to_string()))?,
            prefetch: prefetch
                .parse::<PrefetchKind>()
                .map_err(|error| refuse("prefetch", prefetch)(error.to_string()))?,
        };
        let config = Config {
            policy: policy.parse::<Policy>().or_py_err()?,
            budget,
            sinks,
            window,
            dense_layers,
            hot,
            cold: cold_folder.map(ColdConfig::new),
            warm_limit_bytes,
            spans: spans.unwrap_or_default(),
            threads,
            seed,
            ..Config::new(num_layers, heads, parse_dtype(dtype)?)
        };
        let engine = Engine::open(config).or_py_err()?;
        Ok(Self { engine: Arc::new(Mutex::new(engine)) })
    }

    /// Opens an empty sequence.
    fn admit(&self, py: Python<'_>) -> PyResult<PySequence> {
        let id = py.detach(|| self.engine.lock().admit()).or_py_err()?;
        Ok(PySequence::new(self.engine.clone(), id))
    }

    /// Opens a saved sequence.
    fn restore(&self, py: Python<'_>, path: PathBuf) -> PyResult<PySequence> {
        let id = py.detach(|| self.engine.lock().restore(&path)).or_py_err()?;
        Ok(PySequence::new(self.engine.clone(), id))
    }

    /// Selects differently from now on.
    fn set_policy(&self, py: Python<'_>, policy: &str, budget: usize) -> PyResult<()> {
        let policy = policy.parse::<Policy>().or_py_err()?;
        py.detach(|| self.engine.lock().set_policy(policy, budget)).or_py_err()
    }

    /// The settings in force.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let config = py.detach(|| self.engine.lock().config().clone());
        let value = json!({
            "num_layers": config.num_layers,
            "num_q_heads": config.heads.num_q_heads(),
            "num_kv_heads": config.heads.num_kv_heads(),
            "head_dim": config.heads.head_dim(),
            "dtype": dtype_name(config.kv_dtype),
            "policy": config.policy.spec(),
            "reuse": *config.policy.reuse() != floe::reuse::ReuseKind::Off,
            "budget": config.budget,
            "sinks": config.sinks,
            "window": config.window,
            "dense_layers": config.dense_layers,
            "spans": config.spans,
            "threads": config.threads,
            "seed": config.seed,
            "hot_slots": config.hot.slots,
            "warm_limit_bytes": config.warm_limit_bytes,
        });
        Ok(to_py(py, &value)?.cast_into()?)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let config = py.detach(|| self.engine.lock().config().clone());
        let heads = config.heads;
        format!(
            "Engine({} layers, {}:{} heads of {}, {}, policy {}, budget {})",
            config.num_layers,
            heads.num_q_heads(),
            heads.num_kv_heads(),
            heads.head_dim(),
            dtype_name(config.kv_dtype),
            config.policy.spec(),
            config.budget
        )
    }
}

/// The element type of that name.
pub fn parse_dtype(name: &str) -> PyResult<KvDtype> {
    match name {
        "bfloat16" | "bf16" => Ok(KvDtype::Bf16),
        "float16" | "f16" => Ok(KvDtype::F16),
        "float32" | "f32" => Ok(KvDtype::F32),
        _ => Err(bad_field("dtype", name, "must be bfloat16, float16 or float32")),
    }
}

/// Its name in Python.
pub fn dtype_name(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::Bf16 => "bfloat16",
        KvDtype::F16 => "float16",
        KvDtype::F32 => "float32",
    }
}
