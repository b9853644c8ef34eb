//! The native half of the Python package `floe`: engine, sequences, traces, replay and profile.
//!
//! Tensors come in through numpy or DLPack without a copy. Every call that computes releases the interpreter's lock.
//! Errors keep the library's texts: `OSError` where the system refused, `RuntimeError` where the program or the machine is
//! at fault, `ValueError` for everything else.

#[cfg(feature = "cuda")]
mod device;
mod engine;
mod error;
mod json;
mod metrics;
mod replay;
mod sequence;
mod tensor;
mod trace;

use pyo3::prelude::*;

/// Native half of the package `floe`.
#[pymodule]
fn _floe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<engine::PyEngine>()?;
    #[cfg(feature = "cuda")]
    module.add_class::<device::PyCudaEngine>()?;
    module.add_class::<sequence::PySequence>()?;
    module.add_class::<trace::PyTrace>()?;
    module.add_class::<tensor::PyTraceTensor>()?;
    module.add_function(wrap_pyfunction!(trace::write_trace, module)?)?;
    module.add_function(wrap_pyfunction!(replay::replay, module)?)?;
    module.add_function(wrap_pyfunction!(replay::profile, module)?)?;
    Ok(())
}
