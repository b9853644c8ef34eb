//! Tensors of Python in, tensors for Python out. All `unsafe` code of the crate is in this folder.

#[cfg(feature = "cuda")]
mod device;
mod export;
mod host;

#[cfg(feature = "cuda")]
pub use device::{CudaTensor, HostStream};
pub use export::PyTraceTensor;
pub use host::HostTensor;
