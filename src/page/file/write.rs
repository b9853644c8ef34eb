//! Writing a page file.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{
    ALIGN, BYTE_ORDER, BlobEntry, Draft, END_MAGIC, FileError, HEADER_BYTES, MAGIC, Manifest, SlabEntry,
    Storage, VERSION,
};

/// Which slab is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlabName {
    /// Shard: `layer * num_kv_heads + kv_head`.
    pub shard: u32,
    /// Slab of the shard.
    pub slab: u32,
    /// Rows filled.
    pub rows: u32,
}

/// A page file being written. Dropped before [`Self::finish`], it leaves nothing behind.
pub struct PageFileWriter {
    path: PathBuf,
    draft: Box<dyn Draft>,
    offset: u64,
    manifest: Manifest,
}

impl PageFileWriter {
    /// Starts the file that will appear as `path`.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn create(storage: &dyn Storage, path: &Path, epoch: u64) -> Result<Self, FileError> {
        let draft = storage.draft(path).map_err(io_error(path, "create"))?;
        let manifest = Manifest { epoch, ..Manifest::default() };
        let mut writer = Self { path: path.to_path_buf(), draft, offset: 0, manifest };
        let mut header = [0u8; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&BYTE_ORDER.to_le_bytes());
        let crc = crc32fast::hash(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        writer.put(&header)?;
        Ok(writer)
    }

    /// Adds the first `rows` rows of a slab, whole pages of `page_bytes`; `bytes` holds at least those.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn slab(&mut self, name: SlabName, page_bytes: usize, bytes: &[u8]) -> Result<(), FileError> {
        let pages = (name.rows as usize).div_ceil(crate::shape::PAGE_TOKENS);
        let bytes = &bytes[..pages * page_bytes];
        self.align()?;
        let crc = bytes.chunks_exact(page_bytes).map(crc32fast::hash).collect();
        let SlabName { shard, slab, rows } = name;
        let (offset, page_bytes) = (self.offset, page_bytes as u32);
        self.manifest.slabs.push(SlabEntry { shard, slab, rows, offset, page_bytes, crc });
        self.put(bytes)
    }

    /// Adds a blob.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn blob(&mut self, name: String, bytes: &[u8]) -> Result<(), FileError> {
        self.align()?;
        let (offset, crc) = (self.offset, crc32fast::hash(bytes));
        self.manifest.blobs.push(BlobEntry { name, offset, bytes: bytes.len() as u64, crc });
        self.put(bytes)
    }

    /// Writes the manifest, last, and publishes the file. After `Ok` the file survives a crash. Returns its bytes.
    ///
    /// # Errors
    /// [`FileError::Io`]; the path then holds what it held before.
    pub fn finish(mut self, fields: serde_json::Value) -> Result<u64, FileError> {
        self.align()?;
        self.manifest.fields = fields;
        let json = serde_json::to_vec(&self.manifest)
            .map_err(|error| io_error(&self.path, "encode")(std::io::Error::other(error)))?;
        let start = self.offset;
        self.put(&json)?;
        let mut footer = Vec::with_capacity(32);
        footer.extend(start.to_le_bytes());
        footer.extend((json.len() as u64).to_le_bytes());
        footer.extend(crc32fast::hash(&json).to_le_bytes());
        footer.extend([0u8; 4]);
        footer.extend(END_MAGIC);
        self.put(&footer)?;
        self.draft.flush().map_err(io_error(&self.path, "write"))?;
        self.draft.publish().map_err(io_error(&self.path, "publish"))?;
        Ok(self.offset)
    }

    fn align(&mut self) -> Result<(), FileError> {
        let gap = self.offset.next_multiple_of(ALIGN) - self.offset;
        self.put(&[0u8; ALIGN as usize][..gap as usize])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.draft.write_all(bytes).map_err(io_error(&self.path, "write"))?;
        self.offset += bytes.len() as u64;
        Ok(())
    }
}

pub(super) fn io_error(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> FileError {
    let path = path.to_path_buf();
    move |source| FileError::Io { path, action, source }
}
