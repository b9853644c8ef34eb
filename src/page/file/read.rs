//! Reading a page file: the frame at once, each page when it is first needed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::write::io_error;
use super::{
    ALIGN, BYTE_ORDER, Damage, END_MAGIC, FOOTER_BYTES, FileBytes, FileError, HEADER_BYTES, MAGIC, Manifest,
    SlabEntry, Storage, VERSION,
};
use crate::page::LentSlab;
use crate::shape::PAGE_TOKENS;

/// An open page file.
pub struct PageFile {
    path: Arc<PathBuf>,
    bytes: Arc<dyn FileBytes>,
    manifest: Manifest,
}

impl std::fmt::Debug for PageFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl PageFile {
    /// Opens a file and checks its frame: header, footer, manifest, and that every entry lies inside the file. The pages
    /// themselves are not read. The file must not be changed in place while it is open; writers replace it whole.
    ///
    /// # Errors
    /// [`FileError`] naming the field.
    pub fn open(storage: &dyn Storage, path: &Path) -> Result<Self, FileError> {
        let bytes = storage.open(path).map_err(io_error(path, "open"))?;
        let manifest = check(path, bytes.bytes())?;
        Ok(Self { path: Arc::new(path.to_path_buf()), bytes, manifest })
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Bytes of the file.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.bytes.bytes().len() as u64
    }

    /// Contents of a blob, checked.
    ///
    /// # Errors
    /// [`FileError::Format`] when there is none of that name, [`Damage`] when it is not what was written.
    pub fn blob(&self, name: &str) -> Result<&[u8], FileError> {
        let entry = self.manifest.blobs.iter().find(|blob| blob.name == name);
        let entry = entry.ok_or_else(|| format(&self.path, "blobs", format!("no blob {name:?}")))?;
        let bytes = &self.bytes.bytes()[entry.offset as usize..][..entry.bytes as usize];
        let found = crc32fast::hash(bytes);
        if found == entry.crc {
            return Ok(bytes);
        }
        let (path, what) = (self.path.to_path_buf(), format!("blob {name:?}"));
        Err(Damage { path, what, expected: entry.crc, found }.into())
    }

    /// A slab that reads from the map, for an entry of this file's manifest.
    #[must_use]
    pub fn slab(&self, entry: &SlabEntry) -> Arc<MappedSlab> {
        Arc::new(MappedSlab {
            path: self.path.clone(),
            bytes: self.bytes.clone(),
            entry: entry.clone(),
            verified: AtomicU32::new(0),
        })
    }

    /// Checks every page and blob.
    ///
    /// # Errors
    /// The first [`Damage`] found.
    pub fn verify(&self) -> Result<(), FileError> {
        self.manifest.slabs.iter().try_for_each(|entry| self.slab(entry).verify(u16::MAX))?;
        self.manifest.blobs.iter().try_for_each(|blob| self.blob(&blob.name).map(drop))
    }
}

/// One slab of a mapped file.
pub struct MappedSlab {
    path: Arc<PathBuf>,
    bytes: Arc<dyn FileBytes>,
    entry: SlabEntry,
    /// Bit `i` = page `i` was compared with its checksum.
    verified: AtomicU32,
}

impl std::fmt::Debug for MappedSlab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MappedSlab")
            .field("path", &self.path)
            .field("slab", &self.entry.slab)
            .finish_non_exhaustive()
    }
}

impl LentSlab for MappedSlab {
    fn bytes(&self) -> &[u8] {
        let len = self.entry.crc.len() * self.entry.page_bytes as usize;
        &self.bytes.bytes()[self.entry.offset as usize..][..len]
    }

    fn verify(&self, pages: u16) -> Result<(), Damage> {
        let missing = u32::from(pages) & !self.verified.load(Ordering::Acquire);
        if missing == 0 {
            return Ok(());
        }
        let page_bytes = self.entry.page_bytes as usize;
        for (i, (page, expected)) in self.bytes().chunks_exact(page_bytes).zip(&self.entry.crc).enumerate() {
            if missing >> i & 1 == 0 {
                continue;
            }
            let found = crc32fast::hash(page);
            if found != *expected {
                let what = format!("page {i} of slab {}, shard {}", self.entry.slab, self.entry.shard);
                return Err(Damage { path: self.path.to_path_buf(), what, expected: *expected, found });
            }
        }
        self.verified.fetch_or(missing, Ordering::Release);
        Ok(())
    }
}

fn format(path: &Path, field: &'static str, reason: impl Into<String>) -> FileError {
    FileError::Format { path: path.to_path_buf(), field, reason: reason.into() }
}

fn check(path: &Path, bytes: &[u8]) -> Result<Manifest, FileError> {
    let fail = |field, reason: String| Err(format(path, field, reason));
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if bytes.len() < HEADER_BYTES + FOOTER_BYTES {
        return fail("length", format!("{} bytes are too few for a page file", bytes.len()));
    }
    if bytes[..8] != MAGIC {
        return fail("magic", "this is no page file".into());
    }
    if u32_at(8) != VERSION {
        return fail("version", format!("{}; this program reads {VERSION}", u32_at(8)));
    }
    if u32_at(12) != BYTE_ORDER || cfg!(target_endian = "big") {
        return fail("byte order", "not the order of this machine".into());
    }
    if crc32fast::hash(&bytes[..60]) != u32_at(60) {
        return fail("header", "checksum differs".into());
    }
    let footer = bytes.len() - FOOTER_BYTES;
    if bytes[footer + 24..] != END_MAGIC {
        return fail("footer", "missing: the file is cut off".into());
    }
    let (start, len) = (u64_at(footer), u64_at(footer + 8));
    if start < HEADER_BYTES as u64 || start.checked_add(len) != Some(footer as u64) {
        return fail("footer", format!("manifest at {start}, {len} bytes, in a file of {}", bytes.len()));
    }
    let json = &bytes[start as usize..footer];
    if crc32fast::hash(json) != u32_at(footer + 16) {
        return fail("manifest", "checksum differs".into());
    }
    let manifest: Manifest =
        serde_json::from_slice(json).or_else(|error| fail("manifest", error.to_string()))?;
    let inside = |offset: u64, len: u64| {
        offset >= HEADER_BYTES as u64
            && offset.is_multiple_of(ALIGN)
            && offset.checked_add(len).is_some_and(|end| end <= start)
    };
    for slab in &manifest.slabs {
        let pages = slab.crc.len();
        let fits = pages <= 16
            && (slab.rows as usize).div_ceil(PAGE_TOKENS) == pages
            && inside(slab.offset, pages as u64 * u64::from(slab.page_bytes));
        if !fits || slab.page_bytes == 0 {
            return fail(
                "slabs",
                format!("slab {} of shard {} does not fit the file", slab.slab, slab.shard),
            );
        }
    }
    match manifest.blobs.iter().find(|blob| !inside(blob.offset, blob.bytes)) {
        Some(blob) => fail("blobs", format!("{:?} does not fit the file", blob.name)),
        None => Ok(manifest),
    }
}
