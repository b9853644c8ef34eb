//! Rows of a sequence from host memory back to its place on the device.

use std::ops::Range;

use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{Tables, refill};

use super::engine::GpuEngine;
use crate::error::Result;
use crate::ids::SeqId;

impl<E: DeviceElem> GpuEngine<E> {
    /// Every row that a sequence keeps in its place, from host memory.
    pub(super) fn refill_all(&mut self, seq: SeqId, stream: &Stream) -> Result<()> {
        if self.places.get(seq)?.is_dense() {
            return self.refill_layers(seq, |stored| 0..stored, stream);
        }
        let sinks = self.plan.shape.sinks;
        self.refill_layers(seq, |stored| 0..stored.min(sinks), stream)?;
        self.refill_ring(seq, stream)
    }

    /// Brings the newest rows of a sequence with slots from host memory into its ring, in every layer.
    pub(super) fn refill_ring(&mut self, seq: SeqId, stream: &Stream) -> Result<()> {
        let shape = self.plan.shape;
        let ring = |stored: usize| stored.saturating_sub(shape.ring).max(shape.sinks.min(stored))..stored;
        self.refill_layers(seq, ring, stream)
    }

    /// Brings rows of a sequence from host memory to its place, in every layer those that `run` names of so many stored tokens.
    fn refill_layers(
        &mut self,
        seq: SeqId,
        run: impl Fn(usize) -> Range<usize>,
        stream: &Stream,
    ) -> Result<()> {
        let shape = self.plan.shape;
        let open = self.places.get(seq)?;
        for (memory, &stored) in self.layers.iter_mut().zip(&open.tokens) {
            let tables = Tables {
                shape,
                batch: self.batch.view(),
                sequences: self.sequences.view(),
                chunks: memory.chunks.view(),
            };
            refill(stream, &tables, (open.index, run(stored)), memory.kv.view_mut())?;
        }
        Ok(())
    }
}
