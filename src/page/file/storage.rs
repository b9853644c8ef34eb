//! Where page files live: the file system, or a simulated one that fails on purpose.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A file that nobody sees before it is published.
pub trait Draft: Write + Send {
    /// Makes the whole file durable under its final name, replacing an older one, in one step.
    ///
    /// # Errors
    /// The storage's error; the final name then still holds what it held before.
    fn publish(self: Box<Self>) -> io::Result<()>;
}

/// Read-only contents of a published file, aligned to at least 64 bytes.
pub trait FileBytes: Send + Sync {
    /// All of the file.
    fn bytes(&self) -> &[u8];
}

/// Holds page files.
pub trait Storage: Send + Sync {
    /// Starts a file that will be published as `path`.
    ///
    /// # Errors
    /// The storage's error.
    fn draft(&self, path: &Path) -> io::Result<Box<dyn Draft>>;

    /// Opens a published file.
    ///
    /// # Errors
    /// The storage's error.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn FileBytes>>;
}

/// The file system: temporary name, flush, rename, flush of the folder; reads through a memory map.
#[derive(Clone, Copy, Debug, Default)]
pub struct FsStorage;

struct FsDraft {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    published: bool,
}

impl Write for FsDraft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Draft for FsDraft {
    fn publish(mut self: Box<Self>) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        self.published = true;
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder)?.sync_all()
    }
}

impl Drop for FsDraft {
    fn drop(&mut self) {
        if !self.published {
            // Nobody reads the temporary name, so a failure to remove it only leaves litter.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

impl FileBytes for memmap2::Mmap {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl Storage for FsStorage {
    fn draft(&self, path: &Path) -> io::Result<Box<dyn Draft>> {
        static DRAFTS: AtomicU64 = AtomicU64::new(0);
        let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let number = DRAFTS.fetch_add(1, Ordering::Relaxed);
        let name = format!(".{}.{}-{number}.tmp", name.to_string_lossy(), std::process::id());
        let temporary = path.with_file_name(name);
        let file = File::options().write(true).create_new(true).open(&temporary)?;
        Ok(Box::new(FsDraft { file, temporary, path: path.to_path_buf(), published: false }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FileBytes>> {
        Ok(Arc::new(crate::trace::map_file(path).map_err(io::Error::other)?))
    }
}
