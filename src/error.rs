//! The engine's error type. Three families: caller, environment, damage; "no room now" and "no match" are values.

use std::fmt::Display;

use crate::ids::{LayerId, SeqId};

/// Result of the engine's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in the engine. Every message names the field and the value.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Caller: a configuration value out of range.
    #[error("config field `{field}` = {value}: {reason}")]
    Config {
        /// Name of the configuration field.
        field: &'static str,
        /// The refused value.
        value: String,
        /// What it has to be.
        reason: String,
    },
    /// Caller: a tensor whose shape, strides or length does not fit.
    #[error("tensor `{field}`: expected {expected}, got {got}")]
    Shape {
        /// Name of the tensor.
        field: &'static str,
        /// Expected shape or length.
        expected: String,
        /// Shape or length given.
        got: String,
    },
    /// Caller: a position that is not the next one of its layer.
    #[error("position {got} of layer {}: the next position of {seq} is {expected}", .layer.0)]
    Position {
        /// Sequence addressed.
        seq: SeqId,
        /// Layer addressed.
        layer: LayerId,
        /// Position given.
        got: usize,
        /// Position that has to follow.
        expected: usize,
    },
    /// Caller: a sequence that was never admitted or is closed.
    #[error("sequence {0} is not open")]
    UnknownSequence(SeqId),
    /// Caller: a layer outside the model.
    #[error("layer {got}: the model has {num_layers} layers")]
    UnknownLayer {
        /// Layer given.
        got: usize,
        /// Layers of the model.
        num_layers: usize,
    },
    /// Caller: a key, value or query that is not finite.
    #[error("tensor `{field}`: not a finite number at token {token}, element {element}")]
    NotFinite {
        /// Name of the tensor.
        field: &'static str,
        /// Token row within the tensor.
        token: usize,
        /// Element within the row.
        element: usize,
    },
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] floe_cuda::KernelError),
    /// The index refused its arguments.
    #[error(transparent)]
    Index(#[from] floe_index::IndexError),
    /// The hot tier's books do not agree: a fault of this program. The step's result is not given out.
    #[error(transparent)]
    Offload(#[from] crate::transfer::OffloadError),
    /// Environment: the warm tier is full, by its limit or because the machine has no memory left. Nothing was stored.
    #[error(transparent)]
    NoMemory(#[from] crate::page::NoMemory),
    /// A page file: cannot be read or written, is of another shape, or its frame is damaged.
    #[error(transparent)]
    File(#[from] crate::page::file::FileError),
    /// A cold page that is not what was written. It was not used.
    #[error(transparent)]
    Damage(#[from] crate::page::file::Damage),
    /// The device, its driver, or what a device kernel refuses.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Device(#[from] floe_cuda::device::DeviceError),
    /// Environment: no room in memory that was set aside for this.
    #[error("{what}: {needed} needed, {free} free")]
    NoRoom {
        /// What ran out.
        what: &'static str,
        /// Units needed.
        needed: usize,
        /// Units free.
        free: usize,
    },
    /// Environment: the worker pool could not be started.
    #[error("worker pool of {threads} threads: {reason}")]
    Pool {
        /// Threads asked for.
        threads: usize,
        /// The operating system's answer.
        reason: String,
    },
}

impl Error {
    /// Whether the machine is at fault rather than the caller's input.
    #[must_use]
    pub fn is_environment(&self) -> bool {
        match self {
            Self::Pool { .. } | Self::Offload(_) | Self::NoMemory(_) | Self::NoRoom { .. } => true,
            #[cfg(feature = "cuda")]
            Self::Device(error) => !matches!(
                error,
                floe_cuda::device::DeviceError::Unsupported { .. }
                    | floe_cuda::device::DeviceError::Kernel(_)
            ),
            Self::File(error) => error.is_environment(),
            _ => false,
        }
    }

    pub(crate) fn config(field: &'static str, value: impl Display, reason: impl Into<String>) -> Self {
        Self::Config { field, value: value.to_string(), reason: reason.into() }
    }

    pub(crate) fn shape(field: &'static str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Shape { field, expected: expected.into(), got: got.into() }
    }
}
