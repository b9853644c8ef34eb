//! What can go wrong in the host engine.

use std::path::PathBuf;

/// Errors of [`crate::host`].
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Environment: a file that cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// Environment: a file that cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file that is no GGUF file, or a damaged one.
    #[error("{path} is not a readable GGUF file: {reason}")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A metadata field of the model file that is missing or that this engine does not support.
    #[error("model field `{field}` = {value}: expected {expected}")]
    Field {
        /// Name of the field.
        field: String,
        /// Its value, or "missing".
        value: String,
        /// What is supported.
        expected: String,
    },
    /// A tensor that is missing or has another shape than the metadata ask for.
    #[error("model tensor `{name}`: {reason}")]
    Tensor {
        /// Name of the tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer of the model file cannot be built or refuses a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template of the model file cannot be read or fails on the messages.
    #[error("chat template: {0}")]
    Template(#[from] minijinja::Error),
    /// An argument out of range.
    #[error("argument `{field}` = {value}: {reason}")]
    Argument {
        /// Name of the argument.
        field: &'static str,
        /// The refused value.
        value: String,
        /// What it has to be.
        reason: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The KV engine refused a call.
    #[error(transparent)]
    Engine(#[from] crate::Error),
    /// A trace that cannot be written.
    #[error(transparent)]
    Trace(#[from] crate::trace::TraceError),
    /// A KV backend outside this crate failed.
    #[error("KV backend: {0}")]
    Backend(String),
}

impl HostError {
    /// Whether the machine is at fault rather than the caller's input.
    #[must_use]
    pub fn is_environment(&self) -> bool {
        match self {
            // A file name that does not exist is input; a file that cannot be read to its end is not.
            Self::Read { source, .. } => source.kind() != std::io::ErrorKind::NotFound,
            Self::Candle(_) | Self::Write { .. } => true,
            Self::Engine(error) => error.is_environment(),
            Self::Trace(error) => error.is_environment(),
            _ => false,
        }
    }

    pub(crate) fn field(field: impl Into<String>, value: impl ToString, expected: impl Into<String>) -> Self {
        Self::Field { field: field.into(), value: value.to_string(), expected: expected.into() }
    }

    pub(crate) fn argument(field: &'static str, value: impl ToString, reason: impl Into<String>) -> Self {
        Self::Argument { field, value: value.to_string(), reason: reason.into() }
    }
}

/// Result of the host engine's calls.
pub type HostResult<T> = Result<T, HostError>;
