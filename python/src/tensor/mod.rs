//! Tensors of Python in, tensors for Python out. All `unsafe` code of the crate is in this folder.

mod export;
mod host;

pub use export::PyTraceTensor;
pub use host::HostTensor;
