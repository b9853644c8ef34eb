//! Page-locked host memory of the warm tier, in chunks that never move.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use floe_cuda::device::{Device, PinnedBuffer, Stream};

/// Bytes that are asked of the driver at a time: page-locking costs a fixed time a call.
const BLOCK_BYTES: usize = 64 << 20;

/// A chunk: its block and its place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Chunk {
    block: u32,
    at: u32,
}

/// All chunks of an engine.
#[derive(Debug)]
pub(super) struct HostPool {
    device: Device,
    chunk_bytes: usize,
    blocks: Vec<Arc<PinnedBuffer<u8>>>,
    free: Vec<Chunk>,
    /// Chunks that several sequences hold, with the number of holders beyond the first.
    shared: HashMap<Chunk, u32>,
    limit_bytes: usize,
}

impl HostPool {
    pub(super) fn new(device: &Device, chunk_bytes: usize, limit_bytes: usize) -> Self {
        let (blocks, free, shared) = (Vec::new(), Vec::new(), HashMap::new());
        Self { device: device.clone(), chunk_bytes, blocks, free, shared, limit_bytes }
    }

    fn block_chunks(&self) -> usize {
        (BLOCK_BYTES / self.chunk_bytes).max(1)
    }

    /// Makes `num` chunks available.
    pub(super) fn reserve(&mut self, num: usize) -> Result<(), crate::Error> {
        while self.free.len() < num {
            let chunks = self.block_chunks();
            let bytes = chunks * self.chunk_bytes;
            let held = self.size_bytes();
            if held + bytes > self.limit_bytes {
                let (what, free) =
                    ("bytes of page-locked host memory", self.limit_bytes - held.min(self.limit_bytes));
                return Err(crate::Error::NoRoom { what, needed: bytes, free });
            }
            self.blocks.push(Arc::new(PinnedBuffer::zeros(&self.device, bytes)?));
            let block = self.blocks.len() as u32 - 1;
            self.free.extend((0..chunks as u32).rev().map(|at| Chunk { block, at }));
        }
        Ok(())
    }

    /// A chunk; after [`Self::reserve`].
    pub(super) fn take(&mut self) -> Result<Chunk, crate::Error> {
        self.reserve(1)?;
        self.free.pop().ok_or(crate::Error::NoRoom { what: "host chunks", needed: 1, free: 0 })
    }

    /// One more holder of a chunk, which nobody writes to from now on.
    pub(super) fn share(&mut self, chunk: Chunk) {
        *self.shared.entry(chunk).or_default() += 1;
    }

    /// Whether a chunk has several holders.
    pub(super) fn is_shared(&self, chunk: Chunk) -> bool {
        self.shared.contains_key(&chunk)
    }

    /// A holder lets go of a chunk; free once nobody holds it.
    pub(super) fn give(&mut self, chunk: Chunk) {
        match self.shared.get_mut(&chunk) {
            None => self.free.push(chunk),
            Some(1) => {
                self.shared.remove(&chunk);
            }
            Some(others) => *others -= 1,
        }
    }

    /// Copies a chunk. The device is idle.
    pub(super) fn copy(&mut self, from: Chunk, to: Chunk) -> Result<(), crate::Error> {
        let stream = Stream::new(&self.device)?;
        let start = |chunk: Chunk| chunk.at as usize * self.chunk_bytes;
        let from = (&*self.blocks[from.block as usize], start(from)..start(from) + self.chunk_bytes);
        self.blocks[to.block as usize].copy_part(start(to), from, &stream)?;
        Ok(stream.synchronize()?)
    }

    /// Address of a chunk as the device sees it.
    pub(super) fn address(&self, chunk: Chunk) -> u64 {
        self.blocks[chunk.block as usize].view().address() + (chunk.at as usize * self.chunk_bytes) as u64
    }

    /// Bytes of a chunk. Whoever reads them has waited for the work that writes them.
    pub(super) fn bytes(&self, chunk: Chunk, range: Range<usize>) -> &[u8] {
        let start = chunk.at as usize * self.chunk_bytes;
        &self.blocks[chunk.block as usize].as_slice()[start + range.start..start + range.end]
    }

    /// The chunk's block and where it begins in it, for readers on other threads.
    pub(super) fn shared(&self, chunk: Chunk) -> (Arc<PinnedBuffer<u8>>, usize) {
        (self.blocks[chunk.block as usize].clone(), chunk.at as usize * self.chunk_bytes)
    }

    /// Bytes held.
    pub(super) fn size_bytes(&self) -> usize {
        self.blocks.len() * self.block_chunks() * self.chunk_bytes
    }
}
