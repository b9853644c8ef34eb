use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::bf16;
use serde::Serialize;

use super::read::{HEADER_MAX_BYTES, PREFIX_BYTES, Tensor, check_finite};
use super::{TraceError, TraceMeta};

/// Bytes of an element.
const ELEMENT_BYTES: u64 = size_of::<bf16>() as u64;

/// Writes one trace piece by piece, in bounded memory: the header first, then elements of any tensor in any order of
/// tensors, each tensor from its start to its end.
///
/// The bytes go to a temporary file in the target's folder, which takes the target's name only in
/// [`TraceWriter::finish`]; dropped before that, it is removed. So a half-written file never has the final name.
#[derive(Debug)]
pub struct TraceWriter {
    target: PathBuf,
    partial: Partial,
    meta: TraceMeta,
    /// In the order of [`Tensor::ALL`].
    regions: [Region; 4],
}

/// Where a tensor goes in the file, and how far it is.
#[derive(Debug)]
struct Region {
    start_byte: u64,
    written: usize,
    expected: usize,
}

/// The temporary file, removed unless it got its final name.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    file: File,
    renamed: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing can be done about a failure here; the file's name says what it is.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[derive(Serialize)]
struct Header<'a> {
    #[serde(rename = "__metadata__")]
    metadata: BTreeMap<String, String>,
    k: &'a TensorEntry,
    v: &'a TensorEntry,
    q: &'a TensorEntry,
    q_pre: &'a TensorEntry,
}

#[derive(Serialize)]
struct TensorEntry {
    dtype: &'static str,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl TraceWriter {
    /// Starts the trace that [`TraceWriter::finish`] will put at `path`, with the header from `meta`.
    ///
    /// The bytes of a trace depend on `meta` and the elements alone.
    ///
    /// # Errors
    /// [`TraceError::Field`] when `meta` breaks a rule of the format, [`TraceError::Io`].
    pub fn create(path: impl AsRef<Path>, meta: TraceMeta) -> Result<Self, TraceError> {
        let target = path.as_ref().to_path_buf();
        meta.validate(&target)?;
        let mut entries = Vec::with_capacity(Tensor::ALL.len());
        let mut next_byte = 0;
        for tensor in Tensor::ALL {
            let shape = tensor.shape(&meta);
            let end =
                size_of_shape(&shape).and_then(|bytes| bytes.checked_add(next_byte)).ok_or_else(|| {
                    let value = format!("of shape {shape:?} for tensor {}", tensor.name());
                    let expected = "one whose size in bytes fits 63 bits".to_string();
                    TraceError::Field { path: target.clone(), field: "head_dim", value, expected }
                })?;
            entries.push(TensorEntry { dtype: "BF16", shape, data_offsets: [next_byte, end] });
            next_byte = end;
        }
        let [k, v, q, q_pre] = [&entries[0], &entries[1], &entries[2], &entries[3]];
        let header = header_bytes(&target, &Header { metadata: meta.to_fields(), k, v, q, q_pre })?;

        let mut partial = open_partial(&target)?;
        partial.file.write_all(&header).map_err(TraceError::io(&target, "write"))?;
        let regions = [0, 1, 2, 3].map(|i| {
            let [start, end] = entries[i].data_offsets;
            let start_byte = header.len() as u64 + start;
            Region { start_byte, written: 0, expected: ((end - start) / ELEMENT_BYTES) as usize }
        });
        Ok(Self { target, partial, meta, regions })
    }

    /// The metadata being written.
    pub fn meta(&self) -> &TraceMeta {
        &self.meta
    }

    /// Appends `elements` (row-major, any number of them) to `tensor`.
    ///
    /// # Errors
    /// [`TraceError::ElementCount`] for more elements than the tensor has, [`TraceError::NotFinite`] (index within
    /// `elements`), [`TraceError::Io`].
    pub fn append(&mut self, tensor: Tensor, elements: &[bf16]) -> Result<(), TraceError> {
        check_finite(&self.target, tensor, &[elements.len()], elements)?;
        let region = &mut self.regions[tensor as usize];
        let written = region.written.saturating_add(elements.len());
        if written > region.expected {
            return Err(count_error(&self.target, tensor, written, region.expected));
        }
        let position = region.start_byte + region.written as u64 * ELEMENT_BYTES;
        let file = &mut self.partial.file;
        let write = |file: &mut File| {
            file.seek(SeekFrom::Start(position))?;
            write_elements(file, elements)
        };
        write(file).map_err(TraceError::io(&self.target, "write"))?;
        region.written = written;
        Ok(())
    }

    /// Gives the complete file its name, replacing a file of that name.
    ///
    /// # Errors
    /// [`TraceError::ElementCount`] when a tensor is incomplete, [`TraceError::Io`]; the target is then untouched.
    pub fn finish(mut self) -> Result<(), TraceError> {
        for tensor in Tensor::ALL {
            let region = &self.regions[tensor as usize];
            if region.written != region.expected {
                return Err(count_error(&self.target, tensor, region.written, region.expected));
            }
        }
        // Some file systems report a full disk only now.
        self.partial.file.sync_all().map_err(TraceError::io(&self.target, "write"))?;
        fs::rename(&self.partial.path, &self.target).map_err(TraceError::io(&self.target, "rename to"))?;
        self.partial.renamed = true;
        Ok(())
    }
}

/// The four tensors of a trace in memory, row-major, in the shapes of [`Tensor::shape`].
#[derive(Clone, Copy, Debug)]
pub struct TraceData<'a> {
    /// [num_tokens, head_dim].
    pub k: &'a [bf16],
    /// [num_tokens, head_dim].
    pub v: &'a [bf16],
    /// [num_queries, group, head_dim].
    pub q: &'a [bf16],
    /// [num_queries, group, head_dim].
    pub q_pre: &'a [bf16],
}

/// Writes a whole trace at once.
///
/// # Errors
/// As [`TraceWriter`].
pub fn write_trace(path: impl AsRef<Path>, meta: TraceMeta, data: TraceData<'_>) -> Result<(), TraceError> {
    let mut writer = TraceWriter::create(path, meta)?;
    writer.append(Tensor::K, data.k)?;
    writer.append(Tensor::V, data.v)?;
    writer.append(Tensor::Q, data.q)?;
    writer.append(Tensor::QPre, data.q_pre)?;
    writer.finish()
}

fn count_error(path: &Path, tensor: Tensor, written: usize, expected: usize) -> TraceError {
    TraceError::ElementCount { path: path.to_path_buf(), tensor: tensor.name(), written, expected }
}

/// Bytes of a bf16 tensor, at most `i64::MAX` as file offsets are.
fn size_of_shape(shape: &[usize]) -> Option<u64> {
    let bytes = shape.iter().try_fold(ELEMENT_BYTES, |product, &dim| product.checked_mul(dim as u64))?;
    (bytes <= i64::MAX as u64 / 4).then_some(bytes)
}

/// Length prefix and JSON, padded with spaces so that tensor data start 8-byte aligned.
fn header_bytes(path: &Path, header: &Header<'_>) -> Result<Vec<u8>, TraceError> {
    let mut json = serde_json::to_vec(header)
        .map_err(|error| TraceError::Header { path: path.to_path_buf(), reason: error.to_string() })?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let found_bytes = json.len() as u64;
    if found_bytes > HEADER_MAX_BYTES {
        let path = path.to_path_buf();
        return Err(TraceError::HeaderLength { path, found_bytes, max_bytes: HEADER_MAX_BYTES });
    }
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + json.len());
    bytes.extend_from_slice(&found_bytes.to_le_bytes());
    bytes.extend_from_slice(&json);
    Ok(bytes)
}

/// A new file beside `target`, hidden, named after it and this process.
fn open_partial(target: &Path) -> Result<Partial, TraceError> {
    let Some(name) = target.file_name() else {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a file name");
        return Err(TraceError::Io { path: target.to_path_buf(), action: "create", source });
    };
    // Leftovers of a killed process with a recycled id must not stand in the way: try the next number.
    let mut attempt = 0;
    loop {
        let mut partial_name = std::ffi::OsString::from(".");
        partial_name.push(name);
        partial_name.push(format!(".{}-{attempt}.partial", std::process::id()));
        let path = target.with_file_name(partial_name);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok(Partial { path, file, renamed: false }),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && attempt < 1000 => attempt += 1,
            Err(error) => return Err(TraceError::io(target, "create")(error)),
        }
    }
}

/// Elements as the file has them: little-endian.
fn write_elements(file: &mut File, elements: &[bf16]) -> std::io::Result<()> {
    if cfg!(target_endian = "little") {
        return file.write_all(bytemuck::cast_slice(elements));
    }
    let bytes: Vec<u8> = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
    file.write_all(&bytes)
}
