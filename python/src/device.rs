//! `floe._floe.CudaEngine`: the engine on a CUDA device, for tensors of a host engine on the same device.

use std::path::PathBuf;

use floe::gpu::{Device, DeviceElem, GpuEngine, GpuOptions, LayerStep};
use floe::{Config, HeadShape, HotConfig, KvDtype, LayerId, Policy, SeqId};
use half::{bf16, f16};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::json;

use crate::engine::{dtype_name, parse_dtype};
use crate::error::{OrPyErr, bad_field};
use crate::json::to_py;
use crate::tensor::{CudaTensor, HostStream};

/// The engine for either element type.
enum Typed {
    Bf16(GpuEngine<bf16>),
    F16(GpuEngine<f16>),
}

/// Calls a method of whichever engine it is.
macro_rules! of_either {
    ($typed:expr, $engine:ident => $call:expr) => {
        match $typed {
            Typed::Bf16($engine) => $call,
            Typed::F16($engine) => $call,
        }
    };
}

struct State {
    engine: Typed,
    /// Open sequences, by the number that Python knows; closed ones leave a gap.
    sequences: Vec<Option<SeqId>>,
}

impl State {
    fn sequence(&self, number: usize) -> PyResult<SeqId> {
        let open = self.sequences.get(number).copied().flatten();
        open.ok_or_else(|| PyValueError::new_err(format!("sequence #{number} is not open")))
    }

    fn insert(&mut self, id: SeqId) -> usize {
        self.sequences.push(Some(id));
        self.sequences.len() - 1
    }
}

/// KV cache and attention of one model on a CUDA device.
#[pyclass(name = "CudaEngine", module = "floe", frozen)]
pub struct PyCudaEngine {
    device: Device,
    ordinal: usize,
    state: Mutex<State>,
}

#[pymethods]
impl PyCudaEngine {
    #[new]
    #[pyo3(signature = (
        num_layers, num_q_heads, num_kv_heads, head_dim, *, device=0, dtype="bfloat16", policy, budget, sinks=16, window=64,
        dense_layers=0, hot_slots, max_sequences, max_tokens, resident=0.0, seed=0
    ))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn new(
        py: Python<'_>,
        num_layers: usize,
        num_q_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        device: usize,
        dtype: &str,
        policy: &str,
        budget: usize,
        sinks: usize,
        window: usize,
        dense_layers: usize,
        hot_slots: usize,
        max_sequences: usize,
        max_tokens: usize,
        resident: f64,
        seed: u64,
    ) -> PyResult<Self> {
        let heads = HeadShape::new(num_q_heads, num_kv_heads, head_dim).or_py_err()?;
        let kv_dtype = parse_dtype(dtype)?;
        let config = Config {
            policy: policy.parse::<Policy>().or_py_err()?,
            budget,
            sinks,
            window,
            dense_layers,
            hot: HotConfig { slots: hot_slots, ..HotConfig::default() },
            seed,
            ..Config::new(num_layers, heads, kv_dtype)
        };
        if !(0.0..=1.0).contains(&resident) {
            return Err(bad_field("resident", resident, "must be within 0 to 1"));
        }
        let options = GpuOptions::for_load(&config, max_sequences, max_tokens, resident);
        let ordinal = device;
        let (device, engine) = py
            .detach(|| -> floe::Result<_> {
                let device = Device::open(ordinal)?;
                let engine = match kv_dtype {
                    KvDtype::Bf16 => Typed::Bf16(open(&device, config, options)?),
                    KvDtype::F16 => Typed::F16(open(&device, config, options)?),
                    KvDtype::F32 => {
                        let reason = "must be bfloat16 or float16 on a CUDA device".into();
                        let value = dtype_name(kv_dtype).into();
                        return Err(floe::Error::Config { field: "dtype", value, reason });
                    }
                };
                Ok((device, engine))
            })
            .or_py_err()?;
        Ok(Self { device, ordinal, state: Mutex::new(State { engine, sequences: Vec::new() }) })
    }

    /// Opens an empty sequence; its number.
    fn admit(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| {
            let mut state = self.state.lock();
            let id = of_either!(&mut state.engine, engine => engine.admit(None))?;
            Ok::<_, floe::Error>(state.insert(id))
        })
        .or_py_err()
    }

    /// Appends keys and values `[tokens, num_kv_heads, head_dim]` of a prompt; queued on `stream`.
    #[pyo3(signature = (sequence, layer, k, v, *, stream))]
    fn prefill(
        &self,
        py: Python<'_>,
        sequence: usize,
        layer: usize,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        stream: usize,
    ) -> PyResult<()> {
        let place = (self.ordinal, HostStream(stream));
        let (k, v) = (CudaTensor::import("k", k, place)?, CudaTensor::import("v", v, place)?);
        let (k, v) = (k.get(), v.get());
        py.detach(|| {
            let mut state = self.state.lock();
            let id = state.sequence(sequence)?;
            let stream = place.1.borrow(&self.device);
            of_either!(&mut state.engine, engine => engine.prefill(id, LayerId(layer), (&k, &v), &stream))
                .or_py_err()
        })
    }

    /// Begins to build the page trees of a layer over the tokens stored in it, once the work queued on `stream` is done; nothing
    /// where the policy has none.
    #[pyo3(signature = (sequence, layer, *, stream))]
    fn index(&self, py: Python<'_>, sequence: usize, layer: usize, stream: usize) -> PyResult<()> {
        py.detach(|| {
            let mut state = self.state.lock();
            let id = state.sequence(sequence)?;
            let stream = HostStream(stream).borrow(&self.device);
            of_either!(&mut state.engine, engine => engine.index(id, LayerId(layer), &stream)).or_py_err()
        })
    }

    /// Copies stored keys and values from position `first` on, as many as the tensors hold; queued on `stream`.
    #[pyo3(signature = (sequence, layer, first, k, v, *, stream))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn gather(
        &self,
        py: Python<'_>,
        sequence: usize,
        layer: usize,
        first: usize,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        stream: usize,
    ) -> PyResult<()> {
        let place = (self.ordinal, HostStream(stream));
        let (k, v) = (CudaTensor::import("k", k, place)?, CudaTensor::import("v", v, place)?);
        let (k, v) = (k.get(), v.get());
        py.detach(|| {
            let state = self.state.lock();
            let id = state.sequence(sequence)?;
            let stream = place.1.borrow(&self.device);
            of_either!(&state.engine, engine => engine.gather(id, LayerId(layer), first, (&k, &v), &stream))
                .or_py_err()
        })
    }

    /// Appends one token to each of some sequences and attends; queued on `stream`.
    #[pyo3(signature = (layer, sequences, q, k, v, out, *, scale, stream))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn attend(
        &self,
        py: Python<'_>,
        layer: usize,
        sequences: Vec<usize>,
        q: &Bound<'_, PyAny>,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        scale: f32,
        stream: usize,
    ) -> PyResult<()> {
        let place = (self.ordinal, HostStream(stream));
        let q = CudaTensor::import("q", q, place)?;
        let k = CudaTensor::import("k", k, place)?;
        let v = CudaTensor::import("v", v, place)?;
        let out = CudaTensor::import("out", out, place)?;
        let (q, k_new, v_new, out) = (q.get(), k.get(), v.get(), out.get());
        py.detach(|| {
            let mut state = self.state.lock();
            let ids = sequences.iter().map(|n| state.sequence(*n)).collect::<PyResult<Vec<_>>>()?;
            let layer = LayerId(layer);
            let positions =
                ids.iter().map(|id| of_either!(&state.engine, engine => engine.num_tokens(*id, layer)));
            let positions = positions.collect::<floe::Result<Vec<_>>>().or_py_err()?;
            let step =
                LayerStep { layer, sequences: &ids, positions: &positions, q, k_new, v_new, scale, out };
            let stream = place.1.borrow(&self.device);
            of_either!(&mut state.engine, engine => engine.attend(&step, &stream)).or_py_err()
        })
    }

    /// Forgets the tokens at and after `num_tokens`; queued on `stream`.
    fn truncate(&self, py: Python<'_>, sequence: usize, num_tokens: usize, stream: usize) -> PyResult<()> {
        py.detach(|| {
            let mut state = self.state.lock();
            let id = state.sequence(sequence)?;
            let stream = HostStream(stream).borrow(&self.device);
            of_either!(&mut state.engine, engine => engine.truncate(id, num_tokens, &stream)).or_py_err()
        })
    }

    /// Opens a sequence with the contents of another; its number. Waits for the device; copies are queued on `stream`.
    fn fork(&self, py: Python<'_>, sequence: usize, stream: usize) -> PyResult<usize> {
        py.detach(|| {
            let mut state = self.state.lock();
            let id = state.sequence(sequence)?;
            let stream = HostStream(stream).borrow(&self.device);
            let fork = of_either!(&mut state.engine, engine => engine.fork(id, &stream)).or_py_err()?;
            Ok(state.insert(fork))
        })
    }

    /// Writes a sequence to a file, whole or not at all; its bytes. Waits for the device.
    fn save(&self, py: Python<'_>, sequence: usize, path: PathBuf) -> PyResult<u64> {
        py.detach(|| {
            let state = self.state.lock();
            let id = state.sequence(sequence)?;
            of_either!(&state.engine, engine => engine.save(id, &path)).or_py_err()
        })
    }

    /// Opens a sequence from a file; its number. Waits for `stream`.
    fn restore(&self, py: Python<'_>, path: PathBuf, stream: usize) -> PyResult<usize> {
        py.detach(|| {
            let mut state = self.state.lock();
            let stream = HostStream(stream).borrow(&self.device);
            let id =
                of_either!(&mut state.engine, engine => engine.restore(&path, None, &stream)).or_py_err()?;
            Ok(state.insert(id))
        })
    }

    /// Frees a sequence; waits for the device.
    fn close(&self, py: Python<'_>, sequence: usize) -> PyResult<()> {
        py.detach(|| {
            let mut state = self.state.lock();
            let id = state.sequence(sequence)?;
            of_either!(&mut state.engine, engine => engine.close(id)).or_py_err()?;
            state.sequences[sequence] = None;
            Ok(())
        })
    }

    /// Tokens stored in a layer.
    fn num_tokens(&self, py: Python<'_>, sequence: usize, layer: usize) -> PyResult<usize> {
        py.detach(|| {
            let state = self.state.lock();
            let id = state.sequence(sequence)?;
            of_either!(&state.engine, engine => engine.num_tokens(id, LayerId(layer))).or_py_err()
        })
    }

    /// What happened since the engine was opened; waits for `stream`.
    fn metrics<'py>(&self, py: Python<'py>, stream: usize) -> PyResult<Bound<'py, PyDict>> {
        let report = py.detach(|| {
            let state = self.state.lock();
            let stream = HostStream(stream).borrow(&self.device);
            of_either!(&state.engine, engine => engine.report(&stream)).or_py_err()
        })?;
        let requests = report.rows_hit + report.rows_fetched;
        let value = json!({
            "device": report.device,
            "steps": report.steps,
            "exact_steps": report.exact_steps,
            "replayed_steps": report.replayed_steps,
            "link_steps": report.link_steps,
            "bytes_in_place": report.bytes_in_place,
            "head_steps": report.head_steps,
            "head_steps_in_doubt": report.head_steps_in_doubt,
            "hot_requests": requests,
            "hot_hits": report.rows_hit,
            "hit_rate": (requests > 0).then(|| report.hit_rate()),
            "bytes_moved": report.bytes_fetched,
            "rule": report.rule,
        });
        Ok(to_py(py, &value)?.cast_into()?)
    }

    /// Bytes held.
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let memory = py.detach(|| of_either!(&self.state.lock().engine, engine => engine.memory()));
        let value = json!({
            "device_rows_bytes": memory.rows_bytes,
            "device_summary_bytes": memory.summary_bytes,
            "host_bytes": memory.host_bytes,
        });
        Ok(to_py(py, &value)?.cast_into()?)
    }
}

fn open<E: DeviceElem>(device: &Device, config: Config, options: GpuOptions) -> floe::Result<GpuEngine<E>> {
    GpuEngine::open(device, config, options)
}
