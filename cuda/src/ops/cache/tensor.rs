//! Tensors of a host engine.

use crate::KernelError;
use crate::device::DeviceError;

/// Element type of a host engine's tensor. Mirrors `floe::Type`.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorType {
    /// bfloat16
    Bf16 = 0,
    /// binary16
    F16 = 1,
    /// binary32
    F32 = 2,
}

impl TensorType {
    /// Bytes of an element.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A `[n, heads, head_dim]` tensor in device (or host-mapped) memory that somebody else owns: rows contiguous, the first two
/// dimensions strided in elements. So token-major and head-major layouts are taken as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceTensor {
    address: u64,
    shape: [usize; 3],
    strides: [usize; 2],
    dtype: TensorType,
}

impl DeviceTensor {
    /// Names memory of a host engine. `strides` of the first two dimensions count elements; rows are contiguous.
    ///
    /// # Safety
    /// - Every element that shape and strides reach is valid device (or host-mapped) memory of the device that the tensor is
    ///   used on, and stays so until the work queued with it is done (an output: nothing else touches it until then).
    pub const unsafe fn from_raw(
        address: u64,
        dtype: TensorType,
        shape: [usize; 3],
        strides: [usize; 2],
    ) -> Self {
        Self { address, shape, strides, dtype }
    }

    /// The same for a tensor without gaps.
    ///
    /// # Safety
    /// - As [`DeviceTensor::from_raw`].
    pub const unsafe fn contiguous(address: u64, dtype: TensorType, shape: [usize; 3]) -> Self {
        Self { address, shape, strides: [shape[1] * shape[2], shape[2]], dtype }
    }

    /// The same memory as a tensor of at least `n` in its first dimension. Kernels of a step leave entries of nobody alone, so that
    /// those beyond the real ones are never touched.
    #[must_use]
    pub const fn padded(mut self, n: usize) -> Self {
        if self.shape[0] < n {
            self.shape[0] = n;
        }
        self
    }

    /// `[n, heads, head_dim]`
    #[must_use]
    pub const fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Device address of the first element.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Strides of the first two dimensions, in elements.
    #[must_use]
    pub const fn strides(&self) -> [usize; 2] {
        self.strides
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> TensorType {
        self.dtype
    }

    /// Refuses another shape, or an address that its elements cannot lie at.
    pub(super) fn expect(&self, field: &'static str, shape: [usize; 3]) -> Result<(), DeviceError> {
        let sizes = self.shape.iter().product::<usize>();
        if self.shape != shape {
            return Err(KernelError::Length { field, len: sizes, expected: shape.iter().product() }.into());
        }
        if !self.address.is_multiple_of(self.dtype.size_bytes() as u64) {
            let value = (self.address % 16) as usize;
            return Err(DeviceError::Unsupported {
                field,
                value,
                expected: "an address aligned to its elements",
            });
        }
        Ok(())
    }

    pub(super) fn strides_64(&self) -> [u64; 2] {
        self.strides.map(|s| s as u64)
    }
}
