//! `floe.Sequence`.

use std::path::PathBuf;

use floe::step::StepReport;
use floe::{DecodeStep, LayerId, PrefillStep, SeqId};
use numpy::PyArray;
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::json;

use crate::engine::SharedEngine;
use crate::error::OrPyErr;
use crate::json::to_py;
use crate::metrics::{Metrics, step_json};
use crate::tensor::HostTensor;

/// One sequence of an engine: keys and values of every layer.
#[pyclass(name = "Sequence", module = "floe", frozen)]
pub struct PySequence {
    engine: SharedEngine,
    id: SeqId,
    steps: Mutex<Steps>,
}

/// The last decode step and the sum of all.
#[derive(Default)]
struct Steps {
    last: StepReport,
    sum: Metrics,
    closed: bool,
}

impl PySequence {
    pub fn new(engine: SharedEngine, id: SeqId) -> Self {
        Self { engine, id, steps: Mutex::default() }
    }
}

impl Drop for PySequence {
    fn drop(&mut self) {
        if !self.steps.get_mut().closed {
            // Whoever drops the last handle may hold the interpreter's lock while another thread decodes under the
            // engine's; that thread finishes its step without the interpreter, so this waits for a step and no longer.
            let _ = self.engine.lock().close(self.id);
        }
    }
}

#[pymethods]
impl PySequence {
    /// Appends keys and values without attending.
    fn append(
        &self,
        py: Python<'_>,
        layer: usize,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (k, v) = (HostTensor::import("k", k)?, HostTensor::import("v", v)?);
        let (k, v) = (k.view()?, v.view()?);
        py.detach(|| self.engine.lock().prefill(self.id, LayerId(layer), &k, &v)).or_py_err()
    }

    /// Appends prompt tokens and attends causally with their queries, exactly.
    #[pyo3(signature = (layer, q, k, v, *, scale=None, out=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn prefill<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        scale: Option<f32>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let tensors = [HostTensor::import("q", q)?, HostTensor::import("k", k)?, HostTensor::import("v", v)?];
        let [q, k, v] = [tensors[0].view()?, tensors[1].view()?, tensors[2].view()?];
        let scale = scale.unwrap_or_else(|| default_scale(q.shape()));
        with_output(py, out, q.shape(), |out| {
            let mut engine = self.engine.lock();
            let position = engine.num_tokens(self.id, LayerId(layer))?;
            engine.prefill_attend(
                self.id,
                &PrefillStep { layer: LayerId(layer), position, q, k, v, scale },
                out,
            )
        })
    }

    /// Appends one token and attends with its queries as the policy says.
    #[pyo3(signature = (layer, q, k, v, *, q_pre=None, scale=None, out=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn decode<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        q_pre: Option<&Bound<'py, PyAny>>,
        scale: Option<f32>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let tensors = [HostTensor::import("q", q)?, HostTensor::import("k", k)?, HostTensor::import("v", v)?];
        let [q, k_new, v_new] = [tensors[0].view()?, tensors[1].view()?, tensors[2].view()?];
        let q_pre = q_pre.map(|q_pre| HostTensor::import("q_pre", q_pre)).transpose()?;
        let q_pre = q_pre.as_ref().map(HostTensor::view).transpose()?;
        let scale = scale.unwrap_or_else(|| default_scale(q.shape()));
        with_output(py, out, q.shape(), |out| {
            let mut steps = self.steps.lock();
            let mut engine = self.engine.lock();
            let position = engine.num_tokens(self.id, LayerId(layer))?;
            let step = DecodeStep { layer: LayerId(layer), position, q, q_pre, k_new, v_new, scale };
            engine.decode(self.id, &step, out, &mut steps.last)?;
            let config = engine.config();
            let row_bytes = 2 * config.heads.head_dim() * config.kv_dtype.size_bytes();
            let seen =
                config.spans.get(layer).copied().flatten().map_or(position + 1, |s| s.min(position + 1));
            let full_bytes = seen * row_bytes * config.heads.num_kv_heads();
            let Steps { last, sum, .. } = &mut *steps;
            sum.add(last, full_bytes);
            Ok(())
        })
    }

    /// Builds the indexes of everything appended, now instead of during the next step.
    fn publish(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.engine.lock().publish(self.id)).or_py_err()
    }

    /// Forgets the tokens at and after `num_tokens`.
    fn truncate(&self, py: Python<'_>, num_tokens: usize) -> PyResult<()> {
        py.detach(|| self.engine.lock().truncate(self.id, num_tokens)).or_py_err()
    }

    /// A new sequence with the same contents, shared until one side changes them.
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        let id = py.detach(|| self.engine.lock().fork(self.id)).or_py_err()?;
        Ok(Self::new(self.engine.clone(), id))
    }

    /// Writes the sequence to a file, whole or not at all; its bytes.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<u64> {
        py.detach(|| self.engine.lock().save(self.id, &path)).or_py_err()
    }

    /// Frees the sequence; any later call on it fails.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            let mut steps = self.steps.lock();
            self.engine.lock().close(self.id)?;
            steps.closed = true;
            Ok::<_, floe::Error>(())
        })
        .or_py_err()
    }

    /// Empties the hot tier: the next steps take longer and give the same bits.
    fn empty_hot(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.engine.lock().empty_hot(self.id)).or_py_err()
    }

    /// Gives every kv head this many empty slots.
    fn resize_hot(&self, py: Python<'_>, slots: usize) -> PyResult<()> {
        py.detach(|| self.engine.lock().resize_hot(self.id, slots)).or_py_err()
    }

    /// Tokens stored in a layer.
    #[pyo3(signature = (layer=0))]
    fn num_tokens(&self, py: Python<'_>, layer: usize) -> PyResult<usize> {
        py.detach(|| self.engine.lock().num_tokens(self.id, LayerId(layer))).or_py_err()
    }

    /// Bytes held.
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let memory = py.detach(|| self.engine.lock().memory(self.id)).or_py_err()?;
        let value = json!({
            "kv_bytes": memory.kv_bytes,
            "kv_allocated_bytes": memory.kv_allocated_bytes,
            "index_bytes": memory.index_bytes,
            "hot_bytes": memory.hot_bytes,
        });
        Ok(to_py(py, &value)?.cast_into()?)
    }

    /// Sums over all decode steps.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let value = py.detach(|| self.steps.lock().sum.to_json());
        Ok(to_py(py, &value)?.cast_into()?)
    }

    /// The last decode step, one dict a kv head.
    fn last_step<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let value = py.detach(|| step_json(&self.steps.lock().last));
        Ok(to_py(py, &value)?.cast_into()?)
    }

    fn __repr__(&self) -> String {
        format!("Sequence({})", self.id)
    }
}

/// `1 / sqrt(head_dim)`
fn default_scale(shape: [usize; 3]) -> f32 {
    (shape[2] as f32).powf(-0.5)
}

/// Runs `work` without the interpreter's lock on the output: the caller's tensor, or a new numpy array `[tokens, heads,
/// head_dim]` of float32. Returns that object.
fn with_output<'py>(
    py: Python<'py>,
    out: Option<&Bound<'py, PyAny>>,
    shape: [usize; 3],
    work: impl FnOnce(&mut [f32]) -> floe::Result<()> + Send,
) -> PyResult<Bound<'py, PyAny>> {
    let object = match out {
        Some(out) => out.clone(),
        None => PyArray::<f32, _>::zeros(py, shape, false).into_any(),
    };
    let mut tensor = HostTensor::import("out", &object)?;
    let slice = tensor.output(shape)?;
    py.detach(|| work(slice)).or_py_err()?;
    Ok(object)
}
