//! What the engine on the device holds and did: for reports, replays and tests. Nothing here is part of a step.

use std::ops::Range;

use floe_cuda::KvElem;
use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::CHUNK_ROWS;

use super::clock::StageSpan;
use super::engine::GpuEngine;
use super::host::Chunk;
use super::layer::LayerMemory;
use super::report::{GpuMemory, GpuReport, LastStep};
use crate::error::{Error, Result};
use crate::ids::{LayerId, SeqId};

impl<E: DeviceElem> GpuEngine<E> {
    /// Tokens stored in a layer.
    ///
    /// # Errors
    /// Unknown sequence or layer.
    pub fn num_tokens(&self, seq: SeqId, layer: LayerId) -> Result<usize> {
        self.check_layer(layer)?;
        Ok(self.places.get(seq)?.tokens[layer.0])
    }

    /// Keys and values of a token of a kv head as the warm tier holds them, `[2 * head_dim]`. Waits for the device.
    ///
    /// # Errors
    /// Unknown sequence or layer, a token that is not stored.
    pub fn stored_row(&self, seq: SeqId, layer: LayerId, (head, token): (usize, usize)) -> Result<Vec<E>> {
        let stored = self.num_tokens(seq, layer)?;
        if token >= stored || head >= self.plan.shape.heads {
            return Err(Error::config("token", token, format!("the layer holds {stored} tokens")));
        }
        self.device.synchronize()?;
        Ok(self.host_row(&self.places.get(seq)?.chunks[layer.0], (head, token)).collect())
    }

    /// Key and value `[2 * head_dim]` of a token of a kv head in the chunks of its layer.
    fn host_row(&self, chunks: &[Chunk], (head, token): (usize, usize)) -> impl Iterator<Item = E> {
        let bytes = self.plan.shape.row_len() * size_of::<E>();
        let start = (head * CHUNK_ROWS + token % CHUNK_ROWS) * bytes;
        let row = self.host.bytes(chunks[token / CHUNK_ROWS], start..start + bytes);
        row.chunks_exact(size_of::<E>()).map(bytemuck::pod_read_unaligned)
    }

    /// Stored keys and values of a layer `[tokens, num_kv_heads, head_dim]` as f32, read in host memory: the warm tier holds every row.
    /// Waits for the device.
    ///
    /// # Errors
    /// Unknown sequence or layer, positions that are not stored.
    pub fn rows_host(&self, seq: SeqId, layer: LayerId, tokens: Range<usize>) -> Result<[Vec<f32>; 2]> {
        let stored = self.num_tokens(seq, layer)?;
        if tokens.end > stored {
            return Err(Error::config(
                "tokens",
                format!("{tokens:?}"),
                format!("the layer holds {stored} tokens"),
            ));
        }
        self.device.synchronize()?;
        let (shape, chunks) = (self.plan.shape, &self.places.get(seq)?.chunks[layer.0]);
        let mut rows = [(); 2].map(|()| Vec::with_capacity(tokens.len() * shape.heads * shape.head_dim));
        for token in tokens {
            for head in 0..shape.heads {
                let mut row = self.host_row(chunks, (head, token)).map(KvElem::to_f32);
                rows.iter_mut().for_each(|rows| rows.extend(row.by_ref().take(shape.head_dim)));
            }
        }
        Ok(rows)
    }

    /// What has happened so far. Waits for `stream`.
    ///
    /// # Errors
    /// What the driver reports, list entries outside of their buffers included.
    pub fn report(&self, stream: &Stream) -> Result<GpuReport> {
        let (mut hits, mut fetched, mut ahead, mut in_doubt) = (0, 0, 0, 0);
        for memory in &self.layers {
            let counters = memory.slots.counters.read(stream)?;
            hits += counters[0];
            fetched += counters[1];
            ahead += counters[2];
            in_doubt += memory.doubt.doubted.read(stream)?[0];
        }
        self.device.check_entries()?;
        let row_bytes = (self.plan.shape.row_len() * size_of::<E>()) as u64;
        Ok(GpuReport {
            device: self.device.properties().name.clone(),
            steps: self.steps,
            exact_steps: self.exact_steps,
            replayed_steps: self.replayed_steps,
            head_steps: self.sparse_head_steps,
            head_steps_in_doubt: in_doubt,
            link_steps: self.link_steps,
            bytes_in_place: self.link_rows * row_bytes,
            rows_moved: self.moved,
            rows_hit: hits,
            rows_fetched: fetched,
            bytes_fetched: fetched * row_bytes,
            bytes_prefetched: ahead * row_bytes,
            rule: self.cost.to_string() + &self.plan.placement() + &self.classes.describe(),
            tree: self.trees.as_ref().map(|trees| trees.report),
        })
    }

    /// Sets hits, fetches and steps of heads of the report to zero; queued on `stream`.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn clear_counters(&mut self, stream: &Stream) -> Result<()> {
        for memory in &mut self.layers {
            memory.slots.counters.fill_bytes(0, stream)?;
            memory.doubt.doubted.fill_bytes(0, stream)?;
        }
        self.sparse_head_steps = 0;
        (self.link_steps, self.link_rows) = (0, 0);
        Ok(())
    }

    /// Times the stages of steps from here on, or no longer: they are then launched one by one.
    pub fn time_stages(&mut self, on: bool) {
        self.shared.clock.on = on;
    }

    /// When the stages ran that were timed since the last call. Waits for the device.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn stages(&mut self) -> Result<Vec<StageSpan>> {
        self.device.synchronize()?;
        Ok(self.shared.clock.take()?)
    }

    /// Bytes held.
    #[must_use]
    pub fn memory(&self) -> GpuMemory {
        let layers = self.layers.iter().map(LayerMemory::size_bytes);
        let (rows_bytes, beside_bytes) = layers.fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        let staged = self.plan.staged_bytes(self.options.max_sequences * self.config.num_layers);
        GpuMemory {
            rows_bytes,
            rows_free: self.places.rows_free(),
            summary_bytes: beside_bytes + self.shared.size_bytes() + staged,
            host_bytes: self.host.size_bytes(),
        }
    }

    /// What the last step did, by entry and kv head. Waits; for tests, replays and profiles.
    ///
    /// # Errors
    /// Unknown sequence; what the driver reports.
    pub fn last_step(&self, sequences: &[SeqId], stream: &Stream) -> Result<Vec<LastStep>> {
        let Some(chain) = self.last.and_then(|shape| self.chains.get(&shape)) else { return Ok(Vec::new()) };
        let shape = self.plan.shape;
        let exact = self.last.is_some_and(|last| last.exact);
        let read = chain.read(stream)?;
        let mut all = Vec::with_capacity(sequences.len() * shape.heads);
        for item in 0..sequences.len() * shape.heads {
            let open = self.places.get(sequences[item / shape.heads])?;
            let place = open.place();
            let first = place.tokens + (item % shape.heads) as u32 * place.tokens_each;
            let mut retrieved: Vec<u32> = match read.found.get(item) {
                Some(units) if self.plan.lists_tokens() => units.iter().map(|unit| unit - first).collect(),
                Some(units) => {
                    units.iter().flat_map(|page| (0..16).map(move |i| page * 16 + i - first)).collect()
                }
                None => Vec::new(),
            };
            retrieved.sort_unstable();
            let exact_lse = read.lse[item * shape.group..(item + 1) * shape.group].to_vec();
            let in_doubt = read.in_doubt.get(item).is_some_and(|doubt| *doubt);
            all.push(LastStep { exact: exact || in_doubt, in_doubt, retrieved, exact_lse });
        }
        Ok(all)
    }

    /// Bytes of a page's summaries, codes and scales on the device: what a step reads of each published page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.plan.page_bytes(size_of::<E>())
    }
}
