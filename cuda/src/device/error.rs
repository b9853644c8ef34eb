//! What a device refuses or reports.

use cudarc::driver::result::DriverError;

use crate::KernelError;

/// An error of the device, of the machine it should be in, or of what a launcher was given.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The machine has no CUDA driver library.
    #[error("no CUDA driver on this machine (libcuda.so.1 not found): floe runs on the CPU")]
    NoDriver,
    /// The driver sees fewer devices.
    #[error("device {ordinal} does not exist: the driver sees {count}")]
    NoDevice {
        /// Device asked for.
        ordinal: usize,
        /// Devices there are.
        count: usize,
    },
    /// A driver call failed.
    #[error("{call} failed: {name} ({code})")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's number of the error.
        code: u32,
        /// The driver's name of it.
        name: String,
    },
    /// A size, shape or number that no kernel takes.
    #[error("{field} is {value}, supported is {expected}")]
    Unsupported {
        /// Which argument.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A list entry that lies outside its buffer reached a kernel, which left it out. Results since the last check are incomplete.
    #[error(
        "a list entry given to a kernel lies outside its buffer: results since the last check leave it out"
    )]
    EntryOutside,
    /// What the CPU kernels refuse too.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Names the call that failed.
pub(crate) trait Named<T> {
    fn named(self, call: &'static str) -> Result<T, DeviceError>;
}

impl<T> Named<T> for Result<T, DriverError> {
    fn named(self, call: &'static str) -> Result<T, DeviceError> {
        self.map_err(|error| DeviceError::Driver {
            call,
            code: error.0 as u32,
            name: error
                .error_name()
                .map_or_else(|_| "unknown error".to_owned(), |n| n.to_string_lossy().into_owned()),
        })
    }
}
