//! Tensors of Python in device memory, through DLPack.

use std::ffi::c_void;

use dlpark::ffi::{DLDataTypeCode, DLDevice, DLDeviceType};
use dlpark::python::consumer::stream::{self, StreamArg};
use dlpark::python::{DlpackStream, ImportedDlpack, from_dlpack};
use floe::gpu::{Device, DeviceTensor, Stream, TensorType};
use pyo3::prelude::*;

use crate::error::bad_tensor;

/// The stream of a host engine, by its address; 0 is the default stream.
#[derive(Clone, Copy, Debug)]
pub struct HostStream(pub usize);

impl HostStream {
    /// The stream, to queue work on.
    pub fn borrow(self, device: &Device) -> Stream {
        // SAFETY: the caller of the Python method names a stream of the device that lives during the call, as torch's do.
        unsafe { Stream::borrow(device, self.raw()) }
    }

    fn raw(self) -> *mut c_void {
        self.0 as *mut c_void
    }
}

// SAFETY: what is queued on a stream is ordered by that stream, so a producer that worked on the same one is ready; for any
// other the answer is no, and dlpark then has the producer order the two.
unsafe impl DlpackStream for HostStream {
    fn as_python_arg(&self, _py: Python<'_>, _device: DLDevice) -> PyResult<StreamArg> {
        Ok(stream::cuda(self.raw()))
    }

    unsafe fn wait_for_producer(&self, _device: DLDevice, producer: *mut c_void) -> PyResult<bool> {
        Ok(producer == self.raw())
    }
}

/// A tensor in device memory that some Python object owns. Work queued with it on its stream must be all that uses it: the
/// owner may free it as soon as that work is queued, as torch's allocator, which reuses memory in order of the stream, does.
pub struct CudaTensor {
    tensor: DeviceTensor,
    _owner: ImportedDlpack,
}

impl CudaTensor {
    /// Takes anything with `__dlpack__` on CUDA device `ordinal`: `[n, heads, head_dim]` of bfloat16, float16 or float32, rows
    /// contiguous; a fourth dimension, the second or third, may stand for one token, as in transformers' tensors. `field`
    /// names it in errors.
    pub fn import(
        field: &'static str,
        object: &Bound<'_, PyAny>,
        (ordinal, stream): (usize, HostStream),
    ) -> PyResult<Self> {
        let imported = from_dlpack(object.as_borrowed(), Some(&stream), None)?;
        let broken = |error: &dyn std::fmt::Display| bad_tensor(field, "a valid DLPack tensor", error);
        let tensor = imported.validate().map_err(|error| broken(&error))?;
        let device = tensor.device();
        if device.device_type != DLDeviceType::CUDA || usize::try_from(device.device_id) != Ok(ordinal) {
            let got = format!("device type {} number {}", device.device_type.0, device.device_id);
            return Err(bad_tensor(field, format!("a tensor on cuda:{ordinal}"), got));
        }
        let dtype = match (tensor.dtype().code, tensor.dtype().bits, tensor.dtype().lanes) {
            (DLDataTypeCode::FLOAT, 32, 1) => TensorType::F32,
            (DLDataTypeCode::FLOAT, 16, 1) => TensorType::F16,
            (DLDataTypeCode::BFLOAT, 16, 1) => TensorType::Bf16,
            (code, bits, _) => {
                let got = format!("DLPack type code {} of {bits} bits", code.0);
                return Err(bad_tensor(field, "float32, float16 or bfloat16 elements", got));
            }
        };
        let strides = tensor.strides_or_compact().map_err(|error| broken(&error))?;
        let (([n, heads, dim], &[outer, middle, inner])
        | ([n, 1, heads, dim], &[outer, _, middle, inner])
        | ([n, heads, 1, dim], &[outer, middle, _, inner])) = (tensor.shape(), &*strides)
        else {
            let got = format!("{:?}", tensor.shape());
            return Err(bad_tensor(
                field,
                "a shape [n, heads, head_dim], or with one token beside the heads",
                got,
            ));
        };
        if *dim > 1 && inner != 1 {
            return Err(bad_tensor(
                field,
                "rows of head_dim contiguous elements",
                format!("a stride of {inner} elements"),
            ));
        }
        let stride = |dim: i64, stride: i64| {
            let stride = if dim <= 1 { 0 } else { stride };
            usize::try_from(stride).map_err(|_| bad_tensor(field, "strides that are not negative", stride))
        };
        let strides = [stride(*n, outer)?, stride(*heads, middle)?];
        let shape = [*n as usize, *heads as usize, *dim as usize];
        // SAFETY: the offset is the producer's own and lies inside the tensor; nothing is read here.
        let address = unsafe { tensor.offset_bytes_ptr() }.map_err(|error| broken(&error))? as u64;
        if !address.is_multiple_of(dtype.size_bytes() as u64) {
            return Err(bad_tensor(field, "elements aligned to their size", "an unaligned tensor"));
        }
        // SAFETY: the producer's shape and strides say that these elements exist on the device; it keeps them until the work
        // queued on its stream is done.
        let tensor = unsafe { DeviceTensor::from_raw(address, dtype, shape, strides) };
        Ok(Self { tensor, _owner: imported })
    }

    /// The tensor, as long as `self` lives.
    pub fn get(&self) -> DeviceTensor {
        self.tensor
    }
}
