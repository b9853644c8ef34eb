//! Tensors in host memory: copied to the device and back, for replays and tests.

#![allow(unsafe_code, reason = "names this module's own device buffers as tensors")]

use floe_cuda::device::{DeviceBuffer, Event, Stream};
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{DeviceTensor, TensorType};

use super::engine::{GpuEngine, LayerStep};
use crate::error::{Error, Result};
use crate::ids::{LayerId, SeqId};
use crate::view::{TensorView, widen};

/// One layer's step of a batch of sequences with tensors in host memory; as [`LayerStep`].
#[derive(Debug, Clone, Copy)]
pub struct HostLayerStep<'a> {
    /// Layer, `0..num_layers`.
    pub layer: LayerId,
    /// Sequences, none twice.
    pub sequences: &'a [SeqId],
    /// Position of each one's token.
    pub positions: &'a [usize],
    /// Post-RoPE queries `[b, num_q_heads, head_dim]`.
    pub q: TensorView<'a>,
    /// New post-RoPE keys `[b, num_kv_heads, head_dim]`.
    pub k_new: TensorView<'a>,
    /// New values, of the same shape.
    pub v_new: TensorView<'a>,
    /// Softmax scale.
    pub scale: f32,
}

/// A buffer on the device that grows.
#[derive(Debug, Default)]
pub(super) struct Staged {
    buffer: Option<DeviceBuffer<f32>>,
}

impl Staged {
    /// Room for a tensor; its contents are whatever they were.
    fn room(&mut self, stream: &Stream, shape: [usize; 3]) -> Result<DeviceTensor> {
        let len = shape.iter().product();
        let held = self.buffer.as_ref().map_or(0, |buffer| buffer.view().len());
        if self.buffer.is_none() || held < len {
            self.buffer = Some(DeviceBuffer::zeros(stream.device(), len)?);
        }
        let address = self.buffer.as_ref().map_or(0, |buffer| buffer.view().address());
        // SAFETY: the buffer holds the shape. The engine owns it and uses the tensor within one call, at whose end it waits.
        Ok(unsafe { DeviceTensor::contiguous(address, TensorType::F32, shape) })
    }

    fn put(&mut self, stream: &Stream, view: &TensorView<'_>) -> Result<DeviceTensor> {
        let shape = view.shape();
        let mut wide = vec![0.0f32; shape.iter().product()];
        for (i, row) in wide.chunks_exact_mut(shape[2].max(1)).enumerate() {
            widen(view.row(i / shape[1], i % shape[1]), row);
        }
        let tensor = self.room(stream, shape)?;
        if let Some(buffer) = &mut self.buffer {
            buffer.write_async(0, &wide, stream)?;
        }
        Ok(tensor)
    }
}

/// Buffers of the calls below.
#[derive(Debug, Default)]
pub(super) struct HostIo {
    q: Staged,
    k: Staged,
    v: Staged,
    out: Staged,
    /// Before and behind the last step's kernels.
    marks: Option<[Event; 2]>,
}

impl<E: DeviceElem> GpuEngine<E> {
    /// As [`GpuEngine::prefill`], from host memory. Waits.
    ///
    /// # Errors
    /// As [`GpuEngine::prefill`]; numbers that are not finite.
    pub fn prefill_host(
        &mut self,
        seq: SeqId,
        layer: LayerId,
        (k, v): (&TensorView<'_>, &TensorView<'_>),
        stream: &Stream,
    ) -> Result<()> {
        finite(&[("k", k), ("v", v)])?;
        let mut io = std::mem::take(&mut self.host_io);
        let done = (|| {
            let (k, v) = (io.k.put(stream, k)?, io.v.put(stream, v)?);
            self.prefill(seq, layer, (&k, &v), stream)
        })();
        self.host_io = io;
        stream.synchronize()?;
        done
    }

    /// As [`GpuEngine::attend`], from host memory to host memory; `out` is `[b, num_q_heads, head_dim]`. Waits.
    ///
    /// # Errors
    /// As [`GpuEngine::attend`]; numbers that are not finite.
    pub fn attend_host(&mut self, step: &HostLayerStep<'_>, out: &mut [f32], stream: &Stream) -> Result<()> {
        self.attend_host_in(&[step.layer], step, out, stream)
    }

    /// As [`GpuEngine::attend_host`], with the same tensors in several layers, one right behind the other; `out` is the last one's.
    pub(super) fn attend_host_in(
        &mut self,
        layers: &[LayerId],
        step: &HostLayerStep<'_>,
        out: &mut [f32],
        stream: &Stream,
    ) -> Result<()> {
        finite(&[("q", &step.q), ("k_new", &step.k_new), ("v_new", &step.v_new)])?;
        let len: usize = step.q.shape().iter().product();
        if out.len() != len {
            return Err(Error::shape("out", format!("{len} elements"), out.len().to_string()));
        }
        let mut io = std::mem::take(&mut self.host_io);
        let done = (|| {
            let step = LayerStep {
                layer: step.layer,
                sequences: step.sequences,
                positions: step.positions,
                q: io.q.put(stream, &step.q)?,
                k_new: io.k.put(stream, &step.k_new)?,
                v_new: io.v.put(stream, &step.v_new)?,
                scale: step.scale,
                out: io.out.room(stream, step.q.shape())?,
            };
            if io.marks.is_none() {
                io.marks = Some([Event::new(stream.device())?, Event::new(stream.device())?]);
            }
            if let Some([before, _]) = &io.marks {
                before.record(stream)?;
            }
            for layer in layers {
                self.attend(&LayerStep { layer: *layer, ..step }, stream)?;
            }
            if let Some([_, behind]) = &io.marks {
                behind.record(stream)?;
            }
            if let Some(buffer) = &io.out.buffer {
                out.copy_from_slice(&buffer.read(stream)?[..len]);
            }
            Ok(())
        })();
        self.host_io = io;
        stream.synchronize()?;
        done
    }
}

impl<E: DeviceElem> GpuEngine<E> {
    /// Device time of the last [`GpuEngine::attend_host`], copies aside, microseconds; 0 before the first.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn host_step_us(&self) -> Result<f64> {
        match &self.host_io.marks {
            Some([before, behind]) => Ok(behind.micros_since(before)?),
            None => Ok(0.0),
        }
    }
}

fn finite(views: &[(&'static str, &TensorView<'_>)]) -> Result<()> {
    for (field, view) in views {
        if let Some((token, element)) = view.first_not_finite() {
            return Err(Error::NotFinite { field, token, element });
        }
    }
    Ok(())
}
