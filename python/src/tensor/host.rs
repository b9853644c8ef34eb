//! Tensors of Python in place: numpy arrays through the buffer that they own, everything else through DLPack.

use std::ffi::c_void;

use dlpark::ffi::{DLDataTypeCode, DLDevice, DLDeviceType};
use dlpark::python::{ImportedDlpack, from_dlpack};
use floe::view::Elems;
use floe::{KvDtype, TensorView};
use half::{bf16, f16};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::error::{OrPyErr, bad_tensor};

/// A tensor in host memory that some Python object owns. It is read in place, and stays alive as long as this does.
pub struct HostTensor<'py> {
    field: &'static str,
    data: *const c_void,
    dtype: KvDtype,
    shape: Vec<usize>,
    /// In elements.
    strides: Vec<usize>,
    writeable: bool,
    _owner: Owner<'py>,
}

enum Owner<'py> {
    Numpy(#[expect(dead_code, reason = "keeps the array alive")] Bound<'py, PyUntypedArray>),
    Dlpack(#[expect(dead_code, reason = "keeps the tensor alive")] ImportedDlpack),
}

impl<'py> HostTensor<'py> {
    /// Takes a numpy array or anything with `__dlpack__`: float32, float16 or bfloat16, in host memory. `field` names it in
    /// errors.
    pub fn import(field: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        match object.cast::<PyUntypedArray>() {
            Ok(array) => Self::of_numpy(field, array),
            Err(_) => Self::of_dlpack(field, object),
        }
    }

    fn of_numpy(field: &'static str, array: &Bound<'py, PyUntypedArray>) -> PyResult<Self> {
        let descr = array.dtype();
        let name: String = descr.getattr("name")?.extract()?;
        let dtype = match name.as_str() {
            "float32" if descr.is_native_byteorder() != Some(false) => KvDtype::F32,
            "float16" if descr.is_native_byteorder() != Some(false) => KvDtype::F16,
            "bfloat16" => KvDtype::Bf16,
            _ => return Err(bad_tensor(field, "float32, float16 or bfloat16 elements", descr.str()?)),
        };
        let size = dtype.size_bytes() as isize;
        let strides = array.strides().iter().zip(array.shape()).map(|(stride, dim)| {
            // A dimension of one element may carry any stride.
            if *dim <= 1 {
                return Ok(0);
            }
            usize::try_from(stride / size)
                .ok()
                .filter(|_| stride % size == 0)
                .ok_or_else(|| bad_tensor(field, "strides of whole elements, not negative", stride))
        });
        // SAFETY: `array` is a live numpy array, so its object has the layout of PyArrayObject.
        let raw = unsafe { &(*array.as_array_ptr()).fields };
        if !(raw.data as usize).is_multiple_of(dtype.size_bytes()) {
            return Err(bad_tensor(field, "elements aligned to their size", "an unaligned array"));
        }
        Ok(Self {
            field,
            data: raw.data.cast(),
            dtype,
            shape: array.shape().to_vec(),
            strides: strides.collect::<PyResult<_>>()?,
            writeable: raw.flags & numpy::npyffi::NPY_ARRAY_WRITEABLE != 0,
            _owner: Owner::Numpy(array.clone()),
        })
    }

    fn of_dlpack(field: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        if !object.hasattr("__dlpack__")? {
            let got = object.get_type().name()?;
            return Err(PyTypeError::new_err(format!(
                "tensor `{field}`: expected a numpy array or an object with __dlpack__, got {got}"
            )));
        }
        let imported = from_dlpack(object.as_borrowed(), None, None)?;
        let broken = |error: &dyn std::fmt::Display| bad_tensor(field, "a valid DLPack tensor", error);
        let tensor = imported.validate().map_err(|error| broken(&error))?;
        check_host(field, tensor.device())?;
        let dtype = match (tensor.dtype().code, tensor.dtype().bits, tensor.dtype().lanes) {
            (DLDataTypeCode::FLOAT, 32, 1) => KvDtype::F32,
            (DLDataTypeCode::FLOAT, 16, 1) => KvDtype::F16,
            (DLDataTypeCode::BFLOAT, 16, 1) => KvDtype::Bf16,
            (code, bits, _) => {
                let got = format!("DLPack type code {} of {bits} bits", code.0);
                return Err(bad_tensor(field, "float32, float16 or bfloat16 elements", got));
            }
        };
        let shape: Vec<usize> = tensor.shape().iter().map(|dim| *dim as usize).collect();
        let strides = tensor.strides_or_compact().map_err(|error| broken(&error))?;
        let strides = strides.iter().zip(&shape).map(|(stride, dim)| {
            if *dim <= 1 {
                return Ok(0);
            }
            usize::try_from(*stride).map_err(|_| bad_tensor(field, "strides that are not negative", stride))
        });
        let strides = strides.collect::<PyResult<_>>()?;
        // SAFETY: the offset is the producer's own and lies inside the tensor; nothing is read here.
        let data = unsafe { tensor.offset_bytes_ptr() }.map_err(|error| broken(&error))?;
        if !(data as usize).is_multiple_of(dtype.size_bytes()) {
            return Err(bad_tensor(field, "elements aligned to their size", "an unaligned tensor"));
        }
        let writeable = !imported.flags().contains(dlpark::DlpackFlags::READ_ONLY);
        Ok(Self {
            field,
            data: data.cast(),
            dtype,
            shape,
            strides,
            writeable,
            _owner: Owner::Dlpack(imported),
        })
    }

    /// Shape as given.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// `[tokens, heads, head_dim]`
    pub fn shape3(&self) -> PyResult<[usize; 3]> {
        match self.shape[..] {
            [tokens, heads, dim] => Ok([tokens, heads, dim]),
            // One token without its dimension.
            [heads, dim] => Ok([1, heads, dim]),
            _ => {
                let got = format!("{:?}", self.shape);
                Err(bad_tensor(self.field, "a shape [tokens, heads, head_dim]", got))
            }
        }
    }

    /// The tensor as `[tokens, heads, head_dim]`, rows contiguous.
    pub fn view(&self) -> PyResult<TensorView<'_>> {
        let shape = self.shape3()?;
        let n = self.strides.len();
        let (token, head, element) =
            (if n == 3 { self.strides[0] } else { 0 }, self.strides[n - 2], self.strides[n - 1]);
        if shape[2] > 1 && element != 1 {
            return Err(bad_tensor(
                self.field,
                "rows of head_dim contiguous elements",
                format!("a stride of {element} elements"),
            ));
        }
        let empty = shape.contains(&0);
        let len = if empty { 0 } else { (shape[0] - 1) * token + (shape[1] - 1) * head + shape[2] };
        // SAFETY: the producer's shape and strides say that these elements exist; they are aligned (checked at import) and
        // live as long as `self`. Python code that writes to them meanwhile races, as with any function of numpy that
        // releases the lock; the elements are plain numbers, of which every bit pattern is valid.
        let elems = unsafe {
            match self.dtype {
                KvDtype::F32 => Elems::F32(slice(self.data.cast::<f32>(), len)),
                KvDtype::F16 => Elems::F16(slice(self.data.cast::<f16>(), len)),
                KvDtype::Bf16 => Elems::Bf16(slice(self.data.cast::<bf16>(), len)),
            }
        };
        TensorView::strided(elems, shape, [token, head]).or_py_err()
    }

    /// All elements in order of the shape, rounded to bf16.
    pub fn to_bf16(&self) -> PyResult<Vec<bf16>> {
        let view = self.view()?;
        let [tokens, heads, dim] = view.shape();
        let mut rounded = Vec::with_capacity(tokens * heads * dim);
        for (token, head) in (0..tokens).flat_map(|token| (0..heads).map(move |head| (token, head))) {
            match view.row(token, head) {
                Elems::Bf16(row) => rounded.extend_from_slice(row),
                Elems::F16(row) => rounded.extend(row.iter().map(|x| bf16::from_f32(x.to_f32()))),
                Elems::F32(row) => rounded.extend(row.iter().map(|x| bf16::from_f32(*x))),
            }
        }
        Ok(rounded)
    }

    /// Where a call writes its result: float32, contiguous, of exactly this many elements.
    pub fn output(&mut self, shape: [usize; 3]) -> PyResult<&mut [f32]> {
        let len: usize = shape.iter().product();
        let field = self.field;
        if self.dtype != KvDtype::F32 {
            return Err(bad_tensor(field, "float32 elements", self.dtype));
        }
        if !self.writeable {
            return Err(bad_tensor(field, "a tensor that can be written", "a read-only one"));
        }
        if self.shape.iter().product::<usize>() != len {
            return Err(bad_tensor(field, format!("{shape:?}"), format!("{:?}", self.shape)));
        }
        let mut compact = 1;
        for (dim, stride) in self.shape.iter().zip(&self.strides).rev() {
            if *dim > 1 && *stride != compact {
                return Err(bad_tensor(field, "a contiguous tensor", format!("strides {:?}", self.strides)));
            }
            compact *= dim;
        }
        // SAFETY: contiguous and of `len` elements, checked above; writeable by the owner's word, and alive with `self`.
        // The caller of a Python function must not use its output before the function returns.
        Ok(unsafe { slice_mut(self.data.cast_mut().cast::<f32>(), len) })
    }
}

fn check_host(field: &str, device: DLDevice) -> PyResult<()> {
    if [DLDeviceType::CPU, DLDeviceType::CUDAHOST].contains(&device.device_type) {
        return Ok(());
    }
    let got = match device.device_type {
        DLDeviceType::CUDA => format!("one on cuda:{}", device.device_id),
        other => format!("one on device type {}", other.0),
    };
    Err(bad_tensor(field, "a tensor in host memory", got))
}

/// # Safety
/// As [`std::slice::from_raw_parts`], but `data` may be anything when `len` is 0.
unsafe fn slice<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data, len) }
}

/// # Safety
/// As [`std::slice::from_raw_parts_mut`], but `data` may be anything when `len` is 0.
unsafe fn slice_mut<'a, T>(data: *mut T, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(data, len) }
}
