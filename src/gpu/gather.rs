//! Stored rows back into a host engine's tensors: for a pass of several tokens that it attends itself.

use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{DeviceTensor, Gather, Tables, gather};

use super::engine::{GpuEngine, expect};
use crate::error::{Error, Result};
use crate::ids::{LayerId, SeqId};

impl<E: DeviceElem> GpuEngine<E> {
    /// Copies the stored keys and values of a layer from position `first` on, as many as the tensors hold, to `k` and `v`
    /// `[tokens, num_kv_heads, head_dim]` of the cache's element type, rows at multiples of 16 bytes. Rows that are not on the device come
    /// over the link. Queued on `stream`.
    ///
    /// # Errors
    /// Unknown sequence or layer, positions that are not stored, tensors of another shape or type.
    pub fn gather(
        &self,
        seq: SeqId,
        layer: LayerId,
        first: usize,
        (k, v): (&DeviceTensor, &DeviceTensor),
        stream: &Stream,
    ) -> Result<()> {
        let stored = self.num_tokens(seq, layer)?;
        let tokens = k.shape()[0];
        let shape = [tokens, self.plan.shape.heads, self.plan.shape.head_dim];
        for (field, tensor) in [("k", k), ("v", v)] {
            expect(field, tensor, shape)?;
        }
        if first + tokens > stored {
            let reason = format!("the layer holds {stored} tokens");
            return Err(Error::config("tokens", format!("{first}..{}", first + tokens), reason));
        }
        let memory = &self.layers[layer.0];
        let tables = Tables {
            shape: self.classes.plan(layer.0).shape,
            batch: self.batch.view(),
            sequences: self.sequences[self.classes.of(layer.0)].view(),
            chunks: memory.chunks.view(),
        };
        let run = Gather { k: *k, v: *v, sequence: self.places.get(seq)?.index, first, stored };
        Ok(gather(stream, &tables, &run, memory.kv.view())?)
    }
}
