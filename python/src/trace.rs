//! `floe.Trace`, its tensors, and writing traces.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use floe::trace::{Rope, Segment, Tensor, Trace, TraceMeta, TraceWriter};
use half::bf16;
use numpy::PyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use serde_json::{Value, json};

use crate::error::{OrPyErr, bad_field, bad_tensor};
use crate::json::to_py;
use crate::tensor::{HostTensor, PyTraceTensor};

/// A recorded trace, open and valid.
#[pyclass(name = "Trace", module = "floe", frozen)]
pub struct PyTrace {
    pub trace: Arc<Trace>,
}

#[pymethods]
impl PyTrace {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let trace = py.detach(|| Trace::open(path)).or_py_err()?;
        Ok(Self { trace: Arc::new(trace) })
    }

    /// Path it was opened by.
    #[getter]
    fn path(&self) -> PathBuf {
        self.trace.path().to_path_buf()
    }

    /// File name.
    #[getter]
    fn name(&self) -> String {
        self.trace.name()
    }

    /// Metadata.
    #[getter]
    fn meta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        Ok(to_py(py, &meta_json(self.trace.meta()))?.cast_into()?)
    }

    /// A tensor in the file's own bfloat16, in place.
    fn tensor(&self, name: &str) -> PyResult<PyTraceTensor> {
        let tensor = Tensor::ALL.into_iter().find(|tensor| tensor.name() == name);
        let tensor = tensor.ok_or_else(|| bad_field("name", name, "must be k, v, q or q_pre"))?;
        Ok(PyTraceTensor::new(self.trace.clone(), tensor))
    }

    /// Keys, `[num_tokens, head_dim]`, as a new float32 array.
    #[getter]
    fn k<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        widened(py, &self.trace, Tensor::K)
    }

    /// Values, `[num_tokens, head_dim]`, as a new float32 array.
    #[getter]
    fn v<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        widened(py, &self.trace, Tensor::V)
    }

    /// Rotated queries, `[num_queries, group, head_dim]`, as a new float32 array.
    #[getter]
    fn q<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        widened(py, &self.trace, Tensor::Q)
    }

    /// Queries before rotation, `[num_queries, group, head_dim]`, as a new float32 array.
    #[getter]
    fn q_pre<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        widened(py, &self.trace, Tensor::QPre)
    }

    fn __repr__(&self) -> String {
        let meta = self.trace.meta();
        format!(
            "Trace({}: {} layer {} head {}, {} tokens, {} queries)",
            self.trace.name(),
            meta.model,
            meta.layer,
            meta.kv_head,
            meta.num_tokens,
            meta.num_queries
        )
    }
}

fn widened<'py>(py: Python<'py>, trace: &Arc<Trace>, tensor: Tensor) -> PyResult<Bound<'py, PyAny>> {
    let wide: Vec<f32> = py.detach(|| trace.elements(tensor).iter().map(|x| x.to_f32()).collect());
    let shape = PyTuple::new(py, tensor.shape(trace.meta()))?;
    PyArray1::from_vec(py, wide).call_method1("reshape", (shape,))
}

fn meta_json(meta: &TraceMeta) -> Value {
    let segments: serde_json::Map<String, Value> =
        meta.segments.iter().map(|s| (s.name.clone(), json!([s.start, s.end]))).collect();
    json!({
        "model": meta.model,
        "layer": meta.layer,
        "kv_head": meta.kv_head,
        "num_layers": meta.num_layers,
        "num_q_heads": meta.num_q_heads,
        "num_kv_heads": meta.num_kv_heads,
        "head_dim": meta.head_dim,
        "rope": meta.rope.name(),
        "rope_theta": meta.rope_theta,
        "softmax_scale": meta.softmax_scale,
        "num_tokens": meta.num_tokens,
        "num_queries": meta.num_queries,
        "first_query_pos": meta.first_query_pos,
        "index_until": meta.index_until,
        "rope_offset": meta.rope_offset,
        "segments": segments,
        "text": meta.text,
        "licence": meta.licence,
        "extra": meta.extra,
    })
}

/// Writes a format-1 trace, whole or not at all.
#[pyfunction]
pub fn write_trace(
    py: Python<'_>,
    path: PathBuf,
    meta: &Bound<'_, PyDict>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    q: &Bound<'_, PyAny>,
    q_pre: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let given = [("k", k), ("v", v), ("q", q), ("q_pre", q_pre)];
    let mut tensors = Vec::with_capacity(given.len());
    for (field, object) in given {
        tensors.push(HostTensor::import(field, object)?);
    }
    let meta = parse_meta(meta)?;
    let mut rounded = Vec::with_capacity(tensors.len());
    for (kind, tensor) in Tensor::ALL.into_iter().zip(&tensors) {
        let expected = kind.shape(&meta);
        if tensor.shape() != expected {
            return Err(bad_tensor(
                kind.name(),
                format!("the metadata's shape {expected:?}"),
                format!("{:?}", tensor.shape()),
            ));
        }
        let elements: Vec<bf16> = tensor.to_bf16()?;
        rounded.push((kind, elements));
    }
    py.detach(|| {
        let mut writer = TraceWriter::create(path, meta)?;
        rounded.iter().try_for_each(|(kind, elements)| writer.append(*kind, elements))?;
        writer.finish()
    })
    .or_py_err()
}

fn parse_meta(meta: &Bound<'_, PyDict>) -> PyResult<TraceMeta> {
    let field = |name: &str| {
        meta.get_item(name)?
            .ok_or_else(|| PyValueError::new_err(format!("trace metadata: field `{name}` is missing")))
    };
    let count = |name: &str| field(name)?.extract::<usize>().map_err(|e| wrong(name, &e));
    let number = |name: &str| field(name)?.extract::<f64>().map_err(|e| wrong(name, &e));
    let text = |name: &str| field(name)?.extract::<String>().map_err(|e| wrong(name, &e));
    let segments: BTreeMap<String, (usize, usize)> =
        field("segments")?.extract().map_err(|e| wrong("segments", &e))?;
    let mut segments: Vec<Segment> =
        segments.into_iter().map(|(name, (start, end))| Segment { name, start, end }).collect();
    segments.sort_by_key(|segment| (segment.start, segment.end));
    let rope = text("rope")?;
    Ok(TraceMeta {
        model: text("model")?,
        layer: count("layer")?,
        kv_head: count("kv_head")?,
        num_layers: count("num_layers")?,
        num_q_heads: count("num_q_heads")?,
        num_kv_heads: count("num_kv_heads")?,
        head_dim: count("head_dim")?,
        rope: Rope::from_name(&rope)
            .ok_or_else(|| bad_field("rope", &rope, "must be neox-half, interleaved or none"))?,
        rope_theta: number("rope_theta")?,
        softmax_scale: number("softmax_scale")?,
        num_tokens: count("num_tokens")?,
        num_queries: count("num_queries")?,
        first_query_pos: count("first_query_pos")?,
        index_until: count("index_until")?,
        rope_offset: match meta.get_item("rope_offset")? {
            Some(value) => value.extract().map_err(|e| wrong("rope_offset", &e))?,
            None => 0,
        },
        segments,
        text: text("text")?,
        licence: text("licence")?,
        extra: match meta.get_item("extra")? {
            Some(value) => value.extract().map_err(|e| wrong("extra", &e))?,
            None => BTreeMap::new(),
        },
    })
}

fn wrong(field: &str, error: &PyErr) -> PyErr {
    bad_field(field, "the value given", error)
}
