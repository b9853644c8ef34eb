use std::io;
use std::path::{Path, PathBuf};

/// Longest piece of a file's own text that an error repeats, in characters.
const QUOTE_MAX: usize = 60;

/// What can be wrong with a trace file, or with a request to make one.
///
/// Every message is one sentence on one line that names the file, the field or tensor, and the value found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The operating system refused to open, read or write the file.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: "open", "write", and so on.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The file is shorter than its header promises.
    #[error("{}: truncated: {expected_bytes} bytes promised, {found_bytes} present", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the parts read so far call for.
        expected_bytes: u64,
        /// Bytes that the file has.
        found_bytes: u64,
    },
    /// The file is longer than its header promises.
    #[error("{}: {} bytes follow the last tensor", path.display(), found_bytes - expected_bytes)]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Bytes that the header calls for.
        expected_bytes: u64,
        /// Bytes that the file has.
        found_bytes: u64,
    },
    /// The header announces a length that no trace has.
    #[error("{}: header length {found_bytes} exceeds the limit of {max_bytes} bytes; is this a safetensors file?", path.display())]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// The announced length.
        found_bytes: u64,
        /// The longest header accepted.
        max_bytes: u64,
    },
    /// The header is not the JSON that safetensors prescribes.
    #[error("{}: invalid safetensors header: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What the parser objected to.
        reason: String,
    },
    /// The trace format is one that this version does not know.
    #[error("{}: field floe_trace is {found:?}, this version reads format \"1\"", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The announced format.
        found: String,
    },
    /// A required metadata field is absent.
    #[error("{}: metadata field {field} is missing", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The field's name.
        field: &'static str,
    },
    /// A metadata field has a value that it cannot have.
    #[error("{}: metadata field {field} is {value}, expected {expected}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field's name.
        field: &'static str,
        /// The value found, shortened.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// A required tensor is absent.
    #[error("{}: tensor {tensor} is missing", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: &'static str,
    },
    /// A tensor is present that format 1 does not define.
    #[error("{}: unknown tensor {tensor}; format 1 holds k, v, q and q_pre", path.display())]
    UnknownTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name, shortened.
        tensor: String,
    },
    /// A tensor's elements are not bf16.
    #[error("{}: tensor {tensor} has dtype {found}, expected BF16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: &'static str,
        /// The dtype found.
        found: String,
    },
    /// A tensor's shape disagrees with the metadata.
    #[error("{}: tensor {tensor} has shape {found:?}, the metadata calls for {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: &'static str,
        /// Shape found.
        found: Vec<usize>,
        /// Shape that the metadata implies.
        expected: Vec<usize>,
    },
    /// A tensor holds a NaN or an infinity.
    #[error("{}: tensor {tensor} holds {value} at index {index:?}", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: &'static str,
        /// Index of the first such element, one number per dimension.
        index: Vec<usize>,
        /// The element.
        value: f32,
    },
    /// A writer was given too many or too few elements of a tensor.
    #[error("{}: {written} elements written to tensor {tensor}, the metadata calls for {expected}", path.display())]
    ElementCount {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: &'static str,
        /// Elements written so far, the refused ones included.
        written: usize,
        /// Elements that the tensor has.
        expected: usize,
    },
    /// A slice or a synthetic trace was asked for that cannot be made.
    #[error("{option} is {value}, expected {expected}")]
    Request {
        /// The option's name.
        option: &'static str,
        /// The value asked for.
        value: String,
        /// What would be possible.
        expected: String,
    },
}

impl TraceError {
    /// Whether the machine failed (disk full, read error), rather than the input or the request.
    ///
    /// A path that does not exist, is not a file or may not be used is an input error: another path would work.
    pub fn is_environment(&self) -> bool {
        match self {
            Self::Io { source, .. } => !matches!(
                source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::IsADirectory
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::AlreadyExists
                    | io::ErrorKind::InvalidInput
                    | io::ErrorKind::InvalidFilename
            ),
            _ => false,
        }
    }

    pub(super) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, action, source }
    }

    pub(super) fn request(option: &'static str, value: impl ToString, expected: impl ToString) -> Self {
        Self::Request { option, value: value.to_string(), expected: expected.to_string() }
    }
}

/// Text from a file as an error may repeat it: quoted, on one line, at most [`QUOTE_MAX`] characters.
pub(super) fn quote(text: &str) -> String {
    let mut short: String = text.chars().take(QUOTE_MAX).collect();
    if short.len() < text.len() {
        short.push_str("...");
    }
    format!("{short:?}")
}
