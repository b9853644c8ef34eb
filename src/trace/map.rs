//! The one place that maps a file into memory.
#![allow(unsafe_code, reason = "memory-mapping a file cannot be expressed safely")]

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use super::TraceError;

/// Maps the whole file at `path` read-only. An empty file gives an empty map.
pub(crate) fn map_file(path: &Path) -> Result<Mmap, TraceError> {
    let file = File::open(path).map_err(TraceError::io(path, "open"))?;
    let metadata = file.metadata().map_err(TraceError::io(path, "open"))?;
    if !metadata.is_file() {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file");
        return Err(TraceError::Io { path: path.to_path_buf(), action: "open", source });
    }
    // SAFETY: the map is read-only and private to this process. What the type system cannot see is another process
    // that rewrites or truncates the file meanwhile; the documentation of `Trace::open` obliges the caller to leave
    // an open trace alone, and `TraceWriter` never changes a finished file in place (it renames a new one over it).
    let map = unsafe { Mmap::map(&file) };
    map.map_err(TraceError::io(path, "map"))
}
