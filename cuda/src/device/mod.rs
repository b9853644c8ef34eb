//! A CUDA device through its driver: context, streams, events, graphs, memory, and the embedded kernels.
//!
//! The driver library is looked for at run time. Without it [`Device::open`] answers [`DeviceError::NoDriver`]; nothing here
//! panics or aborts. Every call's result is checked. Everything runs in the device's primary context, the one that other
//! libraries of the process use too, or in a context that the caller lends, and on streams of our own or borrowed ones.
//!
//! Work is asynchronous: a launcher returns when the work is queued. Work on one stream runs in order; across streams order it
//! with [`Event`]s. A buffer waits for all work of the device before it is freed.

mod buffer;
mod context;
mod error;
mod graph;
mod kernels;
mod stream;
#[cfg(feature = "timeline")]
pub mod timeline;

pub use buffer::{DevMut, DevRef, DeviceBuffer, PinnedBuffer};
pub use context::{Device, Properties};
pub use error::DeviceError;
pub use graph::Graph;
pub(crate) use kernels::{Launch, Together};
pub use stream::{Event, Stream};
