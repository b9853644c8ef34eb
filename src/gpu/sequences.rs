//! Sequences come, are cut, and go.

use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::SequencePlace;

use super::classes::POLICY;
use super::engine::GpuEngine;
use super::places::{Open, chunks_of};
use crate::error::{Error, Result};
use crate::ids::SeqId;

impl<E: DeviceElem> GpuEngine<E> {
    /// Opens an empty sequence of at most `capacity` tokens (`None`: `options.max_tokens`). It lies densely while there is room.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity of 0 or above `options.max_tokens`; [`Error::NoRoom`].
    pub fn admit(&mut self, capacity: Option<usize>) -> Result<SeqId> {
        let capacity = capacity.unwrap_or(self.options.max_tokens);
        if capacity == 0 || capacity > self.options.max_tokens {
            let reason = format!("must be 1 to {}", self.options.max_tokens);
            return Err(Error::config("capacity", capacity, reason));
        }
        let seq = SeqId(self.next_seq);
        self.places.admit(seq, capacity, &self.classes, self.config.num_layers)?;
        self.next_seq += 1;
        let open = self.places.get(seq)?;
        let (index, place) = (open.index, open.place());
        for (table, place) in self.sequences.iter_mut().zip(&open.places) {
            table.write_at(index, &[*place])?;
        }
        let stream = Stream::new(&self.device)?;
        self.forget_slots_on(&place, &stream)?;
        self.forget_spread(index, &stream)?;
        stream.synchronize()?;
        Ok(seq)
    }

    /// Page-locks host memory for so many more tokens in every layer now, so that no step has to: a block takes the driver
    /// milliseconds.
    ///
    /// # Errors
    /// [`Error::NoRoom`] beyond `options.host_bytes`; what the driver reports.
    pub fn reserve_host(&mut self, tokens: usize) -> Result<()> {
        self.host.reserve(self.config.num_layers * chunks_of(tokens))
    }

    /// Forgets the tokens at and after `num_tokens` in every layer, as speculative decoding does with refused drafts.
    ///
    /// # Errors
    /// Unknown sequence; what the driver reports.
    pub fn truncate(&mut self, seq: SeqId, num_tokens: usize, stream: &Stream) -> Result<()> {
        let open = self.places.get_mut(seq)?;
        let (longest, had) = (open.longest(), open.tokens.clone());
        if longest <= num_tokens {
            return Ok(());
        }
        open.turned_back += (longest - num_tokens) as u32;
        for (tokens, built) in open.tokens.iter_mut().zip(&mut open.built) {
            *tokens = (*tokens).min(num_tokens);
            *built = (*built).min(num_tokens / 16);
        }
        let (index, places) = (open.index, open.places.clone());
        self.own_end(seq, stream)?;
        self.settle(stream)?;
        self.forget_spread(index, stream)?;
        for layer in self.classes.layers(POLICY) {
            // Slots of what is forgotten may be asked for again with other contents.
            for head in 0..self.plan.shape.heads {
                let tokens = (places[POLICY].tokens + head as u32 * places[POLICY].tokens_each) as usize;
                let end = tokens + places[POLICY].tokens_each as usize;
                let from = (tokens + num_tokens).min(end);
                self.layers[layer].slots.row_of_token.fill_range(from..end, 0xff, stream)?;
            }
        }
        self.truncate_trees(seq, num_tokens, stream)?;
        for class in (0..places.len()).filter(|class| places[*class].slots != SequencePlace::DENSE) {
            self.refill_ring((seq, class), |layer| had[layer], stream)?;
        }
        Ok(())
    }

    /// Frees a sequence. Work queued with it must be done: waits for the device.
    ///
    /// # Errors
    /// Unknown sequence; what the driver reports.
    pub fn close(&mut self, seq: SeqId) -> Result<()> {
        self.places.get(seq)?;
        self.device.synchronize()?;
        if let Some(trees) = &mut self.trees {
            trees.close(seq);
        }
        for chunk in self.places.close(seq)? {
            self.host.give(chunk);
        }
        Ok(())
    }

    /// Empties the slots of all sequences: their next steps fetch everything anew and give the same bits. Waits for the device.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn empty_hot(&mut self) -> Result<()> {
        self.device.synchronize()?;
        let places: Vec<_> = self.places.open.values().map(Open::place).collect();
        let stream = Stream::new(&self.device)?;
        places.iter().try_for_each(|place| self.forget_slots_on(place, &stream))?;
        Ok(stream.synchronize()?)
    }

    /// The spreads of a sequence's pages are summed up anew.
    pub(super) fn forget_spread(&mut self, index: usize, stream: &Stream) -> Result<()> {
        let heads = self.plan.shape.heads;
        for memory in &mut self.layers {
            memory.doubt.sums.fill_range(index * heads..(index + 1) * heads, 0, stream)?;
        }
        Ok(())
    }

    /// No slot of a place holds anything.
    pub(super) fn forget_slots_on(&mut self, place: &SequencePlace, stream: &Stream) -> Result<()> {
        if self.plan.exact {
            return Ok(());
        }
        let heads = self.plan.shape.heads;
        for layer in self.classes.layers(POLICY) {
            self.layers[layer].slots.forget(place, heads, stream)?;
        }
        Ok(())
    }
}
