//! A second sequence with the contents of one: what is complete in host memory is shared, what lies on the device is copied.

use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{CHUNK_ROWS, SequencePlace};

use super::engine::{GpuEngine, published};
use super::places::chunks_of;
use crate::error::Result;
use crate::ids::SeqId;

impl<E: DeviceElem> GpuEngine<E> {
    /// Opens a sequence with the contents of `seq`. Chunks of 256 tokens in host memory are shared between the two for as long as both keep
    /// their tokens; summaries and rows on the device are copied, slots start empty. Trees of the new sequence are built by its first sparse
    /// step. Closing in any order is safe. Waits for the device; the copies are queued on `stream`.
    ///
    /// # Errors
    /// Unknown sequence, no room for another one.
    pub fn fork(&mut self, seq: SeqId, stream: &Stream) -> Result<SeqId> {
        let capacity = self.places.get(seq)?.capacity;
        self.device.synchronize()?;
        let fork = self.admit(Some(capacity))?;
        if let Err(error) = self.fill(seq, fork, stream) {
            self.close(fork)?;
            return Err(error);
        }
        Ok(fork)
    }

    fn fill(&mut self, seq: SeqId, fork: SeqId, stream: &Stream) -> Result<()> {
        let window = self.plan.shape.window;
        let longest = self.places.get(seq)?.longest();
        let dense = longest <= self.places.get(fork)?.place.rows_each as usize;
        if !dense && !self.plan.tree {
            for layer in 0..self.config.num_layers {
                let stored = self.places.get(seq)?.tokens[layer];
                self.catch_up(seq, layer, published(stored + 1, window), stream)?;
            }
        }
        self.share_chunks(seq, fork, stream)?;
        let (from, built) = {
            let open = self.places.get(seq)?;
            (open.place, open.built.clone())
        };
        let open = self.places.get_mut(fork)?;
        open.built = built;
        if !dense {
            open.place.slots = open.place.rows_each - (self.plan.shape.sinks + self.plan.shape.ring) as u32;
            self.sequences.write_async(open.index, &[open.place], stream)?;
        }
        let to = open.place;
        if !self.plan.exact && !self.plan.tree {
            let pages =
                from.pages as usize..(from.pages + from.pages_each * self.plan.shape.heads as u32) as usize;
            for memory in &mut self.layers {
                memory.pages.copy(pages.clone(), to.pages as usize, stream)?;
            }
        }
        if dense && from.slots == SequencePlace::DENSE {
            return self.copy_rows(fork, (from, to), stream);
        }
        self.refill_all(fork, stream)
    }

    /// Lengths, and the chunks in host memory: complete ones are shared, one that the next token is written to is copied.
    fn share_chunks(&mut self, seq: SeqId, fork: SeqId, stream: &Stream) -> Result<()> {
        let open = self.places.get(seq)?;
        let (tokens, turned_back) = (open.tokens.clone(), open.turned_back);
        let mut all = Vec::with_capacity(tokens.len());
        self.host.reserve(tokens.len())?;
        for (held, &tokens) in open.chunks.iter().zip(&tokens) {
            let mut chunks = held[..chunks_of(tokens)].to_vec();
            for (i, chunk) in chunks.iter_mut().enumerate() {
                if (i + 1) * CHUNK_ROWS <= tokens {
                    self.host.share(*chunk);
                } else {
                    let own = self.host.take()?;
                    self.host.copy(*chunk, own)?;
                    *chunk = own;
                }
            }
            all.push(chunks);
        }
        let open = self.places.get_mut(fork)?;
        (open.tokens, open.turned_back, open.chunks) = (tokens, turned_back, all);
        for layer in 0..self.config.num_layers {
            self.write_addresses(fork, layer, 0, stream)?;
        }
        Ok(())
    }

    /// Rows of a dense sequence to another dense place.
    fn copy_rows(
        &mut self,
        fork: SeqId,
        (from, to): (SequencePlace, SequencePlace),
        stream: &Stream,
    ) -> Result<()> {
        let row = self.plan.shape.row_len();
        let tokens = &self.places.get(fork)?.tokens;
        for (memory, &tokens) in self.layers.iter_mut().zip(tokens) {
            for head in 0..self.plan.shape.heads {
                let start = (from.rows as usize + head * from.rows_each as usize) * row;
                let target = (to.rows as usize + head * to.rows_each as usize) * row;
                if tokens > 0 {
                    memory.kv.copy_within(start..start + tokens * row, target, stream)?;
                }
            }
        }
        Ok(())
    }

    /// After a truncation: what will be written next must be nobody else's. Waits for the device when that takes a copy.
    pub(super) fn own_end(&mut self, seq: SeqId, stream: &Stream) -> Result<()> {
        for layer in 0..self.config.num_layers {
            let open = self.places.get(seq)?;
            let (tokens, chunks) = (open.tokens[layer], &open.chunks[layer]);
            let kept = tokens / CHUNK_ROWS;
            if chunks.iter().skip(kept).all(|chunk| !self.host.is_shared(*chunk)) {
                continue;
            }
            let mut chunks = chunks.clone();
            if let Some(part) =
                chunks.get_mut(kept).filter(|part| tokens % CHUNK_ROWS > 0 && self.host.is_shared(**part))
            {
                self.device.synchronize()?;
                let own = self.host.take()?;
                self.host.copy(*part, own)?;
                self.host.give(*part);
                *part = own;
            }
            let (shared, own): (Vec<_>, Vec<_>) =
                chunks.drain(kept..).partition(|chunk| self.host.is_shared(*chunk));
            shared.into_iter().for_each(|chunk| self.host.give(chunk));
            chunks.extend(own);
            self.places.get_mut(seq)?.chunks[layer] = chunks;
            self.write_addresses(seq, layer, kept, stream)?;
        }
        Ok(())
    }

    /// Tells the device where the chunks of a layer from `start` on lie.
    pub(super) fn write_addresses(
        &mut self,
        seq: SeqId,
        layer: usize,
        start: usize,
        stream: &Stream,
    ) -> Result<()> {
        let open = self.places.get(seq)?;
        let addresses: Vec<u64> =
            open.chunks[layer][start..].iter().map(|chunk| self.host.address(*chunk)).collect();
        let at = open.index * chunks_of(self.options.max_tokens) + start;
        Ok(self.layers[layer].chunks.write_async(at, &addresses, stream)?)
    }
}
