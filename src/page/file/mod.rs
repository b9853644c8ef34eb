//! The page file: slabs of pages and other blobs in one file that is complete or absent.
//!
//! ```text
//! 0        magic "FLOE-KV\n", version u32 = 1, byte order 0x01020304 u32, zeros up to 60, crc32 of bytes 0..60
//! 64       slab | slab | blob | ...      each starts at a multiple of 64; K and V rows as in memory
//! m        manifest, JSON: every slab with its shard, number, rows, offset and one crc32 a page; every blob; free fields
//! end-32   m u64, manifest bytes u64, crc32 of the manifest u32, zero u32, magic "FLOE-END"
//! ```
//! All numbers little-endian. The file is written under another name, flushed, and renamed: a reader sees all of it or none
//! (a crash leaves the other name behind, which nobody reads). Pages are checked one by one when they are first read, so
//! opening a file costs its manifest and not its length.

mod read;
mod storage;
mod write;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use read::{MappedSlab, PageFile};
pub use storage::{Draft, FileBytes, FsStorage, Storage};
pub use write::{PageFileWriter, SlabName};

pub(crate) const MAGIC: [u8; 8] = *b"FLOE-KV\n";
pub(crate) const END_MAGIC: [u8; 8] = *b"FLOE-END";
pub(crate) const VERSION: u32 = 1;
pub(crate) const BYTE_ORDER: u32 = 0x0102_0304;
pub(crate) const HEADER_BYTES: usize = 64;
pub(crate) const FOOTER_BYTES: usize = 32;
/// Sections start at multiples of this: a cache line, and enough for every element type.
pub(crate) const ALIGN: u64 = 64;

/// One slab in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlabEntry {
    /// Shard: `layer * num_kv_heads + kv_head`.
    pub shard: u32,
    /// Slab of the shard: rows `slab * 256 ..`.
    pub slab: u32,
    /// Rows filled.
    pub rows: u32,
    /// Start in the file.
    pub offset: u64,
    /// Bytes of one page.
    pub page_bytes: u32,
    /// crc32 of each page, in order.
    pub crc: Vec<u32>,
}

/// One blob in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobEntry {
    /// What it is.
    pub name: String,
    /// Start in the file.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
    /// crc32 of all of it.
    pub crc: u32,
}

/// The manifest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Counts the files of one store: the highest holds the newest copy of a slab.
    pub epoch: u64,
    /// Fields of whoever wrote the file.
    pub fields: serde_json::Value,
    /// Slabs, in the order written.
    pub slabs: Vec<SlabEntry>,
    /// Blobs, in the order written.
    pub blobs: Vec<BlobEntry>,
}

/// A page or blob that is not what was written. It is never handed out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: damaged: {what}: checksum {found:08x}, written with {expected:08x}", path.display())]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// Which page or blob.
    pub what: String,
    /// Checksum in the manifest.
    pub expected: u32,
    /// Checksum of what is there.
    pub found: u32,
}

/// What can be wrong with a page file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system refused.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is no page file, of another version, cut off, or its frame is damaged.
    #[error("{}: field `{field}`: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Field of the format.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Contents that are not what was written.
    #[error(transparent)]
    Damage(#[from] Damage),
}

impl FileError {
    /// Whether the machine is at fault rather than the file.
    #[must_use]
    pub fn is_environment(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

#[cfg(test)]
mod tests;
