//! The library's errors as Python exceptions, texts unchanged.

use std::error::Error as StdError;
use std::io;

use floe::profile::ProfileError;
use floe::replay::ReplayError;
use floe::select::SpecError;
use floe::trace::TraceError;
use pyo3::exceptions::{PyFileNotFoundError, PyOSError, PyPermissionError, PyRuntimeError, PyValueError};
use pyo3::{PyErr, PyResult};

/// An error of the library on its way to Python.
pub trait IntoPyErr: StdError + Sized + 'static {
    /// Whether the machine or the program is at fault rather than the caller's input.
    fn is_environment(&self) -> bool;

    /// `OSError` or one of its kinds when the system refused, else `RuntimeError` or `ValueError`. The message is the chain
    /// of causes, as the command prints it.
    fn into_py_err(self) -> PyErr {
        let message = chain(&self);
        match io_kind(&self) {
            Some(io::ErrorKind::NotFound) => PyFileNotFoundError::new_err(message),
            Some(io::ErrorKind::PermissionDenied) => PyPermissionError::new_err(message),
            Some(_) => PyOSError::new_err(message),
            None if self.is_environment() => PyRuntimeError::new_err(message),
            None => PyValueError::new_err(message),
        }
    }
}

macro_rules! into_py_err {
    ($($error:ty),*) => {$(
        impl IntoPyErr for $error {
            fn is_environment(&self) -> bool {
                self.is_environment()
            }
        }
    )*};
}
into_py_err!(floe::Error, TraceError, ReplayError, ProfileError);

impl IntoPyErr for SpecError {
    fn is_environment(&self) -> bool {
        false
    }
}

/// `?` for results of the library.
pub trait OrPyErr<T> {
    /// The value, or the error as an exception.
    fn or_py_err(self) -> PyResult<T>;
}

impl<T, E: IntoPyErr> OrPyErr<T> for Result<T, E> {
    fn or_py_err(self) -> PyResult<T> {
        self.map_err(IntoPyErr::into_py_err)
    }
}

/// A `ValueError` in the library's form for a field of a call.
pub fn bad_field(field: &str, value: impl std::fmt::Display, reason: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(format!("config field `{field}` = {value}: {reason}"))
}

/// A `ValueError` in the library's form for a tensor.
pub fn bad_tensor(field: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(format!("tensor `{field}`: expected {expected}, got {got}"))
}

fn chain(error: &dyn StdError) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        source = cause.source();
    }
    message
}

fn io_kind(error: &(dyn StdError + 'static)) -> Option<io::ErrorKind> {
    let (mut next, mut kind) = (Some(error), None);
    while let Some(cause) = next {
        // The innermost one knows best: those around it may only wrap it.
        kind = cause.downcast_ref::<io::Error>().map(io::Error::kind).or(kind);
        next = cause.source();
    }
    kind
}
