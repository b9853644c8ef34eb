//! `floe.TraceTensor`: a trace's tensor handed out through DLPack.

use std::sync::Arc;

use dlpark::allocation::dynamic;
use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDevice, DLManagedTensor, DLManagedTensorVersioned};
use dlpark::metadata::Dynamic;
use dlpark::python::{DlpackExporter, ExportRequest, export_dlpack};
use dlpark::{DlpackFlags, Managed, ManagedTensorBase};
use floe::trace::{Tensor, Trace};
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// One tensor of a trace, for `torch.from_dlpack` and the like: bfloat16, read in place from the mapped file, read-only.
#[pyclass(name = "TraceTensor", module = "floe", frozen)]
pub struct PyTraceTensor {
    trace: Arc<Trace>,
    tensor: Tensor,
}

#[pymethods]
impl PyTraceTensor {
    /// Shape.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.tensor.shape(self.trace.meta()))
    }

    fn __dlpack_device__(&self) -> (u32, i32) {
        (DLDevice::CPU.device_type.0, DLDevice::CPU.device_id)
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<&Bound<'_, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(u32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        export_dlpack(self, py, ExportRequest::parse(stream, max_version, dl_device, copy)?)
    }

    fn __repr__(&self) -> String {
        format!("TraceTensor({}, {:?})", self.tensor.name(), self.tensor.shape(self.trace.meta()))
    }
}

impl PyTraceTensor {
    /// One tensor of an open trace.
    pub fn new(trace: Arc<Trace>, tensor: Tensor) -> Self {
        Self { trace, tensor }
    }

    fn managed<M: ManagedTensorBase>(&self) -> PyResult<Managed<M>> {
        let broken = |error: &dyn std::fmt::Display| PyBufferError::new_err(error.to_string());
        let shape = self.tensor.shape(self.trace.meta());
        let mut strides = vec![1i64; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i] as i64;
        }
        let prepared =
            Dynamic::new(&shape[..], &strides[..]).prepare_as::<M>().map_err(|error| broken(&error))?;
        let mut tensor: dynamic::Initialized<M> = prepared.initialize(self.trace.clone());
        tensor.set_data(self.trace.elements(self.tensor).as_ptr().cast_mut().cast());
        tensor.set_dtype(DLDataType { code: DLDataTypeCode::BFLOAT, bits: 16, lanes: 1 });
        tensor.set_device(DLDevice::CPU);
        tensor.set_flags(DlpackFlags::READ_ONLY).map_err(|error| broken(&error))?;
        // SAFETY: pointer, shape and strides are those of the elements, which live in the trace that the tensor owns.
        Ok(unsafe { tensor.finish() })
    }
}

impl DlpackExporter for PyTraceTensor {
    fn device(&self) -> DLDevice {
        DLDevice::CPU
    }

    fn flags(&self) -> DlpackFlags {
        DlpackFlags::READ_ONLY
    }

    fn prepare_export(&self, _py: Python<'_>, _request: &ExportRequest<'_>) -> PyResult<()> {
        Ok(())
    }

    fn export_legacy(&self, _py: Python<'_>) -> PyResult<Managed<DLManagedTensor>> {
        self.managed()
    }

    fn export_versioned(&self, _py: Python<'_>) -> PyResult<Managed<DLManagedTensorVersioned>> {
        self.managed()
    }
}
