//! A second sequence with the contents of one: what is complete in host memory is shared, what lies on the device is copied.

use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{CHUNK_ROWS, SequencePlace};

use super::classes::POLICY;
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
        self.catch_up_for(seq, fork, stream)?;
        self.share_chunks(seq, fork, stream)?;
        self.fill_pages(seq, fork, stream)?;
        for class in 0..self.classes.all.len() {
            let (from, tokens) = {
                let open = self.places.get(seq)?;
                (open.places[class], open.tokens.clone())
            };
            let longest = self.classes.layers(class).map(|layer| tokens[layer]).max().unwrap_or(0);
            let to = self.places.get(fork)?.places[class];
            let both_dense = [from, to].iter().all(|place| place.slots == SequencePlace::DENSE);
            if !both_dense {
                self.refill_all((fork, class), stream)?;
                continue;
            }
            self.copy_rows((class, &tokens), (from, to), stream)?;
            let had = from.rows_each.min(to.rows_each) as usize;
            self.refill_layers((fork, class), |layer| had..tokens[layer], stream)?;
            if longest > to.rows_each as usize {
                self.grow((fork, class), longest, stream)?;
            }
        }
        Ok(())
    }

    /// Where the fork gets slots, all pages that its steps will select from are those of `seq`, built while that has their rows.
    fn catch_up_for(&mut self, seq: SeqId, fork: SeqId, stream: &Stream) -> Result<()> {
        if self.plan.exact || self.lies_densely(seq, fork)? || self.plan.tree {
            return Ok(());
        }
        let window = self.plan.shape.window;
        for layer in self.classes.layers(POLICY).collect::<Vec<_>>() {
            let stored = self.places.get(seq)?.tokens[layer];
            self.catch_up(seq, layer, published(stored + 1, window), stream)?;
        }
        Ok(())
    }

    /// Whether the rows of the fork hold what is in `seq`, where the policy selects.
    fn lies_densely(&self, seq: SeqId, fork: SeqId) -> Result<bool> {
        let rows = self.places.get(fork)?.place().rows_each as usize;
        Ok(self.places.get(seq)?.longest() <= rows)
    }

    /// Pages of the fork, and slots where its rows are too few.
    fn fill_pages(&mut self, seq: SeqId, fork: SeqId, stream: &Stream) -> Result<()> {
        let (dense, shape) = (self.lies_densely(seq, fork)?, self.plan.shape);
        let (from, built) = {
            let open = self.places.get(seq)?;
            (open.place(), open.built.clone())
        };
        let open = self.places.get_mut(fork)?;
        open.built = built;
        if self.plan.exact {
            return Ok(());
        }
        let place = &mut open.places[POLICY];
        if !dense {
            place.slots = place.rows_each - (shape.sinks + shape.ring) as u32;
            self.sequences[POLICY].write_async(open.index, &[*place], stream)?;
        }
        if !self.plan.tree {
            let pages = from.pages as usize..(from.pages + from.pages_each * shape.heads as u32) as usize;
            for layer in self.classes.layers(POLICY) {
                self.layers[layer].pages.copy(pages.clone(), place.pages as usize, stream)?;
            }
        }
        Ok(())
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
