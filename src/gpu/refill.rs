//! Rows of a sequence to its place on the device: back from host memory, or over from another place.

use std::ops::Range;

use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{SequencePlace, Tables, refill};

use super::engine::GpuEngine;
use crate::error::Result;
use crate::ids::SeqId;

impl<E: DeviceElem> GpuEngine<E> {
    /// Every row that a sequence keeps in its place in a class of layers, from host memory.
    pub(super) fn refill_all(&mut self, (seq, class): (SeqId, usize), stream: &Stream) -> Result<()> {
        let open = self.places.get(seq)?;
        let (place, stored) = (open.places[class], open.tokens.clone());
        if place.slots == SequencePlace::DENSE {
            return self.refill_layers((seq, class), |layer| 0..stored[layer], stream);
        }
        let sinks = self.classes.all[class].plan.shape.sinks;
        self.refill_layers((seq, class), |layer| 0..stored[layer].min(sinks), stream)?;
        self.refill_ring((seq, class), |_| usize::MAX, stream)
    }

    /// Brings those of a sequence's newest rows from host memory into its ring that are not there any more, because the ring of a layer has
    /// held the newest of `had` tokens.
    pub(super) fn refill_ring(
        &mut self,
        (seq, class): (SeqId, usize),
        had: impl Fn(usize) -> usize,
        stream: &Stream,
    ) -> Result<()> {
        let shape = self.classes.all[class].plan.shape;
        let stored = self.places.get(seq)?.tokens.clone();
        let missing = |layer: usize| {
            let stored: usize = stored[layer];
            let first = stored.saturating_sub(shape.ring).max(shape.sinks.min(stored));
            first..had(layer).saturating_sub(shape.ring).min(stored)
        };
        self.refill_layers((seq, class), missing, stream)
    }

    /// Brings rows of a sequence from host memory to its place, in every layer of a class those that `run` names; of a dense place as many
    /// as it has.
    pub(super) fn refill_layers(
        &mut self,
        (seq, class): (SeqId, usize),
        run: impl Fn(usize) -> Range<usize>,
        stream: &Stream,
    ) -> Result<()> {
        let open = self.places.get(seq)?;
        let (index, place) = (open.index, open.places[class]);
        let most = if place.slots == SequencePlace::DENSE { place.rows_each as usize } else { usize::MAX };
        for layer in self.classes.layers(class) {
            let memory = &mut self.layers[layer];
            let tables = Tables {
                shape: self.classes.all[class].plan.shape,
                batch: self.batch.view(),
                sequences: self.sequences[class].view(),
                chunks: memory.chunks.view(),
            };
            let run = run(layer);
            let run = run.start..run.end.min(most);
            refill(stream, &tables, (index, run), memory.kv.view_mut())?;
        }
        Ok(())
    }

    /// Rows of dense places from one to the other in a class of layers, as many as both have, of a sequence with so many tokens by layer.
    pub(super) fn copy_rows(
        &mut self,
        (class, stored): (usize, &[usize]),
        (from, to): (SequencePlace, SequencePlace),
        stream: &Stream,
    ) -> Result<()> {
        let shape = self.plan.shape;
        let row = shape.row_len();
        for layer in self.classes.layers(class) {
            let rows = stored[layer].min(from.rows_each.min(to.rows_each) as usize);
            for head in (0..shape.heads).filter(|_| rows > 0) {
                let start = (from.rows as usize + head * from.rows_each as usize) * row;
                let target = (to.rows as usize + head * to.rows_each as usize) * row;
                self.layers[layer].kv.copy_within(start..start + rows * row, target, stream)?;
            }
        }
        Ok(())
    }
}
