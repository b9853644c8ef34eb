//! Room for tokens to come: host chunks, and rows on the device, of which a growing sequence may need more than its place has.

use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::SequencePlace;

use super::classes::POLICY;
use super::engine::{GpuEngine, published};
use super::places::chunks_of;
use crate::error::{Error, Result};
use crate::ids::SeqId;

impl<E: DeviceElem> GpuEngine<E> {
    /// Room for `tokens` of a layer. Rows of a dense sequence that run out turn to slots where the policy selects; where everything is
    /// attended they move to a larger place, or, without one, the tokens beyond them are attended in host memory.
    pub(super) fn make_room(
        &mut self,
        seq: SeqId,
        layer: usize,
        tokens: usize,
        stream: &Stream,
    ) -> Result<()> {
        let open = self.places.get(seq)?;
        if tokens > open.capacity {
            return Err(Error::NoRoom {
                what: "tokens of the sequence",
                needed: tokens,
                free: open.capacity,
            });
        }
        let class = self.classes.of(layer);
        let place = open.places[class];
        if place.slots == SequencePlace::DENSE && tokens > place.rows_each as usize {
            if self.classes.all[class].plan.exact {
                self.grow((seq, class), tokens, stream)?;
            } else {
                self.turn_to_slots(seq, tokens, stream)?;
            }
        }
        let open = self.places.get_mut(seq)?;
        let chunks = &mut open.chunks[layer];
        let have = chunks.len();
        let need = chunks_of(tokens);
        if need > have {
            self.host.reserve(need - have)?;
            let mut addresses = Vec::with_capacity(need - have);
            for _ in have..need {
                let chunk = self.host.take()?;
                addresses.push(self.host.address(chunk));
                chunks.push(chunk);
            }
            let start = open.index * chunks_of(self.options.max_tokens) + have;
            self.layers[layer].chunks.write_async(start, &addresses, stream)?;
        }
        Ok(())
    }

    /// Moves a sequence to a larger dense place in a class of layers, if the device has one. Waits for the device then.
    pub(super) fn grow(
        &mut self,
        (seq, class): (SeqId, usize),
        tokens: usize,
        stream: &Stream,
    ) -> Result<()> {
        let Some(grown) = self.places.grow((seq, class), tokens)? else {
            self.warn_of_link((seq, class), tokens)?;
            return Ok(());
        };
        let open = self.places.get(seq)?;
        let (index, stored) = (open.index, open.tokens.clone());
        let kept = if grown.overlaps { 0 } else { grown.from.rows_each as usize };
        if kept > 0 {
            self.copy_rows((class, &stored), (grown.from, grown.to), stream)?;
        }
        self.sequences[class].write_async(index, &[grown.to], stream)?;
        // Others get the old rows, on whatever stream, once they were read.
        self.device.synchronize()?;
        self.places.give_old(class, &grown);
        self.moved += 1;
        self.refill_layers((seq, class), |layer| kept..stored[layer], stream)
    }

    /// Says once that steps will be as slow as the link.
    fn warn_of_link(&mut self, (seq, class): (SeqId, usize), tokens: usize) -> Result<()> {
        if !std::mem::replace(&mut self.warned_of_link, true) {
            let rows = self.places.get(seq)?.places[class].rows_each;
            tracing::warn!(
                tokens,
                rows,
                "rows of the device run out: tokens of exact layers beyond them are read from host memory at every step"
            );
        }
        Ok(())
    }

    /// Turns the rows of a dense sequence that are more than they hold into sinks, ring and slots.
    fn turn_to_slots(&mut self, seq: SeqId, tokens: usize, stream: &Stream) -> Result<()> {
        let shape = self.plan.shape;
        let old = self.places.get(seq)?.place();
        if (old.rows_each as usize) < self.plan.slot_rows() {
            let what = "rows of the sequence on the device (`rows`)";
            return Err(Error::NoRoom { what, needed: tokens, free: old.rows_each as usize });
        }
        let slots = old.rows_each as usize - shape.sinks - shape.ring;
        let place = SequencePlace { slots: slots as u32, ..old };
        self.settle(stream)?;
        // While all rows are still there; trees read host memory.
        if !self.plan.tree {
            for layer in self.classes.layers(POLICY).collect::<Vec<_>>() {
                let stored = self.places.get(seq)?.tokens[layer];
                self.catch_up(seq, layer, published(stored + 1, shape.window), stream)?;
            }
        }
        let open = self.places.get_mut(seq)?;
        open.places[POLICY] = place;
        self.sequences[POLICY].write_async(open.index, &[place], stream)?;
        self.refill_ring((seq, POLICY), |_| usize::MAX, stream)?;
        self.forget_slots_on(&place, stream)
    }
}
