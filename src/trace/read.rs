use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use half::bf16;
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::error::quote;
use super::map::map_file;
use super::{TraceError, TraceMeta};

/// Longest safetensors header accepted, in bytes. Real ones take 1 to 2 KB; synthetic ones list their needles.
pub(super) const HEADER_MAX_BYTES: u64 = 1 << 20;

/// Bytes before the header: its length, u64 little-endian.
pub(super) const PREFIX_BYTES: usize = 8;

/// The tensors of format 1, in the order in which this crate writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// Keys after rotary embedding, [num_tokens, head_dim].
    K,
    /// Values, [num_tokens, head_dim].
    V,
    /// Queries after rotary embedding, [num_queries, group, head_dim].
    Q,
    /// Queries before rotary embedding, [num_queries, group, head_dim].
    QPre,
}

impl Tensor {
    /// All four.
    pub const ALL: [Self; 4] = [Self::K, Self::V, Self::Q, Self::QPre];

    /// Name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::K => "k",
            Self::V => "v",
            Self::Q => "q",
            Self::QPre => "q_pre",
        }
    }

    /// The shape that `meta` gives this tensor.
    pub fn shape(self, meta: &TraceMeta) -> Vec<usize> {
        match self {
            Self::K | Self::V => meta.token_shape().to_vec(),
            Self::Q | Self::QPre => meta.query_shape().to_vec(),
        }
    }
}

/// An open trace: one shard's recorded keys, values and queries, validated whole, read in place from the mapped file.
///
/// Query `j` sits at position `first_query_pos + j` and sees keys `0..=` that position.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    meta: TraceMeta,
    file: Bytes,
    /// In the order of [`Tensor::ALL`].
    tensors: [Elements; 4],
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// Where a tensor's elements are.
#[derive(Debug)]
enum Elements {
    /// In the file's own bytes, aligned.
    InPlace(Range<usize>),
    /// Copied out, because the bytes are not aligned for bf16 or the machine is big-endian.
    Copied(Vec<bf16>),
}

impl Trace {
    /// Maps and validates the trace at `path`: every field, every shape, and that every element is finite.
    ///
    /// Costs one sequential read of the file. The file must not be changed in place while the trace is open.
    ///
    /// # Errors
    /// Any [`TraceError`] but `ElementCount` and `Request`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TraceError> {
        let path = path.as_ref();
        let map = map_file(path)?;
        Self::parse(path.to_path_buf(), Bytes::Mapped(map))
    }

    /// The same for a file's content that is already in memory; `name` stands for the path.
    ///
    /// # Errors
    /// As [`Trace::open`].
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Self, TraceError> {
        Self::parse(name.into(), Bytes::Owned(bytes))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's name, without folders.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Size of the file in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.file.len() as u64
    }

    /// The metadata.
    pub fn meta(&self) -> &TraceMeta {
        &self.meta
    }

    /// All elements of one tensor, row-major, in the shape of [`Tensor::shape`].
    pub fn elements(&self, tensor: Tensor) -> &[bf16] {
        match &self.tensors[tensor as usize] {
            Elements::InPlace(range) => bytemuck::cast_slice(&self.file[range.clone()]),
            Elements::Copied(elements) => elements,
        }
    }

    /// Keys after rotary embedding, [num_tokens, head_dim].
    pub fn k(&self) -> &[bf16] {
        self.elements(Tensor::K)
    }

    /// Values, [num_tokens, head_dim].
    pub fn v(&self) -> &[bf16] {
        self.elements(Tensor::V)
    }

    /// Queries after rotary embedding, [num_queries, group, head_dim].
    pub fn q(&self) -> &[bf16] {
        self.elements(Tensor::Q)
    }

    /// Queries before rotary embedding, [num_queries, group, head_dim].
    pub fn q_pre(&self) -> &[bf16] {
        self.elements(Tensor::QPre)
    }

    /// Position of query `j`: it sees keys `0..=query_position(j)`.
    pub fn query_position(&self, j: usize) -> usize {
        self.meta.first_query_pos + j
    }

    /// Query `j` after rotary embedding, [group, head_dim]. `j` must be below `num_queries`.
    pub fn query(&self, j: usize) -> &[bf16] {
        let len = self.meta.group() * self.meta.head_dim;
        &self.q()[j * len..(j + 1) * len]
    }

    /// Query `j` before rotary embedding, [group, head_dim]. `j` must be below `num_queries`.
    pub fn query_pre(&self, j: usize) -> &[bf16] {
        let len = self.meta.group() * self.meta.head_dim;
        &self.q_pre()[j * len..(j + 1) * len]
    }

    fn parse(path: PathBuf, file: Bytes) -> Result<Self, TraceError> {
        let (header, data_start) = parse_header(&path, &file)?;
        let fields = header.metadata().clone().unwrap_or_default();
        let meta = TraceMeta::parse(fields, &path)?;
        for name in header.offset_keys() {
            if !Tensor::ALL.iter().any(|tensor| tensor.name() == name) {
                return Err(TraceError::UnknownTensor { path, tensor: quote(&name) });
            }
        }
        let load = |tensor: Tensor| {
            let missing = || TraceError::MissingTensor { path: path.clone(), tensor: tensor.name() };
            let info = header.info(tensor.name()).ok_or_else(missing)?;
            load_tensor(&path, &file, data_start, (tensor, info), &meta)
        };
        let tensors = [load(Tensor::K)?, load(Tensor::V)?, load(Tensor::Q)?, load(Tensor::QPre)?];
        let trace = Self { path, meta, file, tensors };
        for tensor in Tensor::ALL {
            check_finite(&trace.path, tensor, &tensor.shape(&trace.meta), trace.elements(tensor))?;
        }
        Ok(trace)
    }
}

/// The header, and the offset at which tensor data start; the file is exactly as long as the header says.
///
/// The framing is read here rather than by the crate's `read_metadata`, which adds up lengths unchecked and cannot
/// tell a truncated file from a wrong one.
fn parse_header(path: &Path, file: &[u8]) -> Result<(Metadata, usize), TraceError> {
    let truncated = |expected_bytes: u64| TraceError::Truncated {
        path: path.to_path_buf(),
        expected_bytes,
        found_bytes: file.len() as u64,
    };
    let (prefix, rest) = file.split_first_chunk::<PREFIX_BYTES>().ok_or(truncated(PREFIX_BYTES as u64))?;
    let header_bytes = u64::from_le_bytes(*prefix);
    if header_bytes > HEADER_MAX_BYTES {
        let path = path.to_path_buf();
        return Err(TraceError::HeaderLength {
            path,
            found_bytes: header_bytes,
            max_bytes: HEADER_MAX_BYTES,
        });
    }
    let data_start = PREFIX_BYTES + header_bytes as usize;
    let json = rest.get(..header_bytes as usize).ok_or(truncated(data_start as u64))?;
    let header: Metadata = serde_json::from_slice(json).map_err(|error| TraceError::Header {
        path: path.to_path_buf(),
        reason: shorten(&error.to_string()),
    })?;
    let expected_bytes = (data_start as u64).saturating_add(header.data_len() as u64);
    let found_bytes = file.len() as u64;
    if found_bytes < expected_bytes {
        return Err(truncated(expected_bytes));
    }
    if found_bytes > expected_bytes {
        return Err(TraceError::TrailingBytes { path: path.to_path_buf(), expected_bytes, found_bytes });
    }
    Ok((header, data_start))
}

fn load_tensor(
    path: &Path,
    file: &[u8],
    data_start: usize,
    (tensor, info): (Tensor, &TensorInfo),
    meta: &TraceMeta,
) -> Result<Elements, TraceError> {
    if info.dtype != Dtype::BF16 {
        let found = info.dtype.to_string();
        return Err(TraceError::Dtype { path: path.to_path_buf(), tensor: tensor.name(), found });
    }
    let expected = tensor.shape(meta);
    if info.shape != expected {
        let found = info.shape.clone();
        return Err(TraceError::Shape { path: path.to_path_buf(), tensor: tensor.name(), found, expected });
    }
    // In bounds: the header's offsets were checked to be contiguous and to end where the file ends.
    let (start, end) = info.data_offsets;
    let range = data_start + start..data_start + end;
    let bytes = &file[range.clone()];
    if cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, bf16>(bytes).is_ok() {
        return Ok(Elements::InPlace(range));
    }
    let elements = bytes.as_chunks::<2>().0.iter().map(|pair| bf16::from_le_bytes(*pair)).collect();
    Ok(Elements::Copied(elements))
}

/// Refuses the first NaN or infinity: a bf16 whose eight exponent bits are all ones.
pub(super) fn check_finite(
    path: &Path,
    tensor: Tensor,
    shape: &[usize],
    elements: &[bf16],
) -> Result<(), TraceError> {
    let Some(flat) = first_not_finite(elements) else { return Ok(()) };
    let mut rest = flat;
    let mut index = vec![0; shape.len()];
    for (slot, dim) in index.iter_mut().zip(shape).rev() {
        (*slot, rest) = (rest % dim, rest / dim);
    }
    let value = elements[flat].to_f32();
    Err(TraceError::NotFinite { path: path.to_path_buf(), tensor: tensor.name(), index, value })
}

fn first_not_finite(elements: &[bf16]) -> Option<usize> {
    const EXPONENT: u16 = 0x7f80;
    let is_bad = |element: &bf16| element.to_bits() & EXPONENT == EXPONENT;
    // A fold without early exit per run of elements vectorises; only a bad run is searched element by element.
    const RUN: usize = 4096;
    let bad_run = elements.chunks(RUN).position(|run| run.iter().fold(false, |bad, e| bad | is_bad(e)))?;
    let offset = elements[bad_run * RUN..].iter().position(is_bad)?;
    Some(bad_run * RUN + offset)
}

fn shorten(reason: &str) -> String {
    const REASON_MAX: usize = 160;
    reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(REASON_MAX).collect()
}
