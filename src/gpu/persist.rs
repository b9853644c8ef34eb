//! Saving a sequence to the page file of the engine on the CPU, and opening one from there. Either engine reads the other's files: indexes
//! and summaries are made anew from the rows.

use std::path::Path;
use std::sync::Arc;

use floe_cuda::device::Stream;
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::CHUNK_ROWS;

use super::engine::GpuEngine;
use crate::SavedSequence;
use crate::error::{Error, Result};
use crate::ids::{LayerId, SeqId};
use crate::page::LentSlab;
use crate::page::file::{FileError, FsStorage, MappedSlab, PageFile, PageFileWriter, SlabName};
use crate::shape::PAGE_TOKENS;
use crate::view::TensorView;

/// Slabs that are handed to the device at a time.
const PIECE_SLABS: usize = 16;

impl<E: DeviceElem> GpuEngine<E> {
    /// Writes the keys and values of a sequence to `path`. The file appears complete or not at all; an older one is replaced. Returns its
    /// bytes. Waits for the device.
    ///
    /// # Errors
    /// Unknown sequence, a file that cannot be written.
    pub fn save(&self, seq: SeqId, path: &Path) -> Result<u64> {
        let open = self.places.get(seq)?;
        self.device.synchronize()?;
        let heads = self.plan.shape.heads;
        let row_bytes = self.plan.shape.row_len() * size_of::<E>();
        let mut writer = PageFileWriter::create(&FsStorage, path, 0)?;
        for (layer, (chunks, &tokens)) in open.chunks.iter().zip(&open.tokens).enumerate() {
            for head in 0..heads {
                let start = head * CHUNK_ROWS * row_bytes;
                for (slab, first) in (0..tokens).step_by(CHUNK_ROWS).enumerate() {
                    let rows = (tokens - first).min(CHUNK_ROWS);
                    let bytes = self.host.bytes(chunks[slab], start..start + CHUNK_ROWS * row_bytes);
                    let name = SlabName {
                        shard: (layer * heads + head) as u32,
                        slab: slab as u32,
                        rows: rows as u32,
                    };
                    writer.slab(name, PAGE_TOKENS * row_bytes, bytes)?;
                }
            }
        }
        let published = vec![0; self.config.num_layers * heads];
        let saved = SavedSequence::of(&self.config, open.tokens.clone(), published);
        Ok(writer.finish(saved.fields(path)?)?)
    }

    /// Opens a sequence of at most `capacity` tokens (`None`: `options.max_tokens`) from a file that either engine wrote. Every page is
    /// read, checked and stored as a prompt is. Waits for `stream`.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged, or holds another model's shape; no room.
    pub fn restore(&mut self, path: &Path, capacity: Option<usize>, stream: &Stream) -> Result<SeqId> {
        let file = PageFile::open(&FsStorage, path)?;
        let saved = SavedSequence::read(&file, path)?;
        saved.check(&self.config, path)?;
        let seq = self.admit(capacity)?;
        let read = self.read_rows(seq, &file, (&saved, path), stream);
        if read.is_err() {
            self.close(seq)?;
        }
        read.map(|()| seq)
    }

    fn read_rows(
        &mut self,
        seq: SeqId,
        file: &PageFile,
        (saved, path): (&SavedSequence, &Path),
        stream: &Stream,
    ) -> Result<()> {
        let (heads, dim) = (self.plan.shape.heads, self.plan.shape.head_dim);
        let page_bytes = PAGE_TOKENS * 2 * dim * size_of::<E>();
        let misfit = |shard: usize, reason: &str| {
            let reason = format!("shard {shard}: {reason}");
            Error::from(FileError::Format { path: path.to_path_buf(), field: "slabs", reason })
        };
        let mut shards: Vec<(usize, Vec<Arc<MappedSlab>>)> = vec![(0, Vec::new()); saved.published.len()];
        for entry in &file.manifest().slabs {
            let number = entry.shard as usize;
            let (rows, slabs) = shards.get_mut(number).ok_or_else(|| misfit(number, "there is none"))?;
            if entry.page_bytes as usize != page_bytes
                || (slabs.len(), *rows) != (entry.slab as usize, slabs.len() * CHUNK_ROWS)
            {
                return Err(misfit(number, "a slab of the wrong size or out of order"));
            }
            *rows += entry.rows as usize;
            slabs.push(file.slab(entry));
        }
        if let Some(number) =
            (0..shards.len()).find(|number| shards[*number].0 != saved.num_tokens[number / heads])
        {
            return Err(misfit(number, "another number of rows than its layer has tokens"));
        }
        for (layer, &tokens) in saved.num_tokens.iter().enumerate() {
            let shards = &shards[layer * heads..(layer + 1) * heads];
            for first in (0..tokens).step_by(PIECE_SLABS * CHUNK_ROWS) {
                let rows = (tokens - first).min(PIECE_SLABS * CHUNK_ROWS);
                let slabs = first / CHUNK_ROWS..(first + rows).div_ceil(CHUNK_ROWS);
                let mut piece = Vec::with_capacity(heads * rows * 2 * dim);
                for (head, (_, shard)) in shards.iter().enumerate() {
                    for slab in &shard[slabs.clone()] {
                        slab.verify(u16::MAX)?;
                        piece.extend(bytemuck::cast_slice::<u8, E>(slab.bytes()).iter().map(|x| x.to_f32()));
                    }
                    // Whole pages are stored.
                    piece.truncate((head + 1) * rows * 2 * dim);
                }
                let (shape, strides) = ([rows, heads, dim], [2 * dim, rows * 2 * dim]);
                let k = TensorView::strided(&piece[..], shape, strides)?;
                let v = TensorView::strided(&piece[dim..], shape, strides)?;
                self.prefill_host(seq, LayerId(layer), (&k, &v), stream)?;
            }
        }
        Ok(())
    }
}
