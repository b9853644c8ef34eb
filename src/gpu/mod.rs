//! The engine on a CUDA device (feature `cuda`).
//!
//! ```text
//! host memory, page-locked     every row of every token, in chunks of 256 tokens: the warm tier
//!        │ misses, single rows, over the link
//!        v
//! device memory                dense sequences: all rows       others: sinks, newest tokens, slots   (hot tier)
//!                              summaries and key sketches of all pages; which token lies in which slot
//! ```
//! A step of a layer is one call, [`GpuEngine::attend`], for a batch of sequences of any lengths. Its kernels choose, fetch and
//! attend without the host: lengths, places and lists lie in device memory, so a step is recorded once for a shape (a power of
//! two of entries and pages, the same tensors) and replayed from then on. Sequences join and leave between steps.
//!
//! With the policy `floe` pages are those of trees on the host, one a kv head, which threads build ([`GpuEngine::index`]) and extend;
//! the device hears which tokens each page holds and builds it from their rows, beside the steps and before the one that needs it.
//!
//! # What is computed
//! Sinks and the newest `window` to `window + 15` tokens are attended exactly, and so are the best tokens (by one-bit key sketches) or
//! pages (by mean keys) among consecutive pages of 16; page means stand for the rest. It is what the policy `pagemean` does on
//! the CPU, up to rounding and to the variance terms of its scores. While all rows of a sequence fit on the device it lies
//! densely, and its steps are exact whenever that is predicted to be faster ([`CostModel`], printed in [`GpuReport::rule`]).
//!
//! Layers that attend everything (policy `full`, [`crate::Config::dense_layers`]) lie densely. A sequence that outgrows its rows moves to a
//! larger place as long as the device has one; from then on the tokens beyond its rows are attended in place in host memory, over the link,
//! and their state is merged with that of the others: [`GpuReport::link_steps`] counts such steps, and the log says it once. Layers of a
//! limited span ([`crate::Config::spans`]) keep a ring of as many rows on the device, no pages and no slots, and attend the ring.
//!
//! # Device memory
//! All of it is taken by [`GpuEngine::open`], and by the first step of a shape for its lists. Reading a prompt takes none: rows go to host
//! memory, and of the device's `rows` a sequence has its share, however long it is. Summaries are proportional to
//! [`GpuOptions::page_tokens`], so to the longest prompt that is to be admitted: of the bytes of its keys and values in bf16 at 128
//! dimensions a head 7 % with page means, 11 % with one-bit keys, 17 % with two-bit keys and one-bit values, and 21 % where these are in
//! trees.
//!
//! Where the codes are too coarse for a head's queries (`max_doubt`), it attends all of its rows, from the device or in place in host
//! memory; [`GpuReport::doubt_rate`] says how often. With [`GpuOptions::prefetch`] the next best units are brought into slots behind a
//! step, on streams of their own, for the layer's next one. [`GpuEngine::stages`] tells when the stages of steps ran.
//!
//! # Views of a host engine's memory
//! A tensor is a [`DeviceTensor`]: address, element type (bf16, f16, f32), shape `[n, heads, head_dim]`, strides of the first two
//! dimensions in elements; rows are contiguous. For a PyTorch tensor `t` of shape `[b, heads, d]` with `t.stride(2) == 1`:
//!
//! ```text
//! DeviceTensor::from_raw(t.data_ptr(), type of t.dtype, [b, heads, d], [t.stride(0), t.stride(1)])
//! ```
//! Its stream is [`Stream::borrow`]`(&device, torch.cuda.current_stream().cuda_stream)`, its context the device's primary one, which
//! [`Device::open`] shares. All work is queued on that stream; nothing waits for it, and tensors must live until it is done.
//! Tensors in host memory are taken by [`GpuEngine::prefill_host`] and [`GpuEngine::attend_host`], which copy and wait.
//! A host engine that attends a chunk of a prompt itself gets the stored rows back from [`GpuEngine::gather`].
//! Tensors at the same addresses in later steps (as PyTorch's allocator usually gives) let the step be replayed.

mod ahead;
mod announce;
mod chain;
mod classes;
mod clock;
mod cost;
mod engine;
mod fetch;
mod fit;
mod fork;
mod gather;
mod host;
mod host_io;
mod inspect;
mod layer;
mod mirror;
mod nodes;
mod options;
mod persist;
mod places;
mod profile;
mod refill;
mod report;
mod room;
mod runs;
mod sequences;
mod standing;
mod tree;
mod trees;
mod turns;
mod whole;

pub use clock::{Stage, StageSpan};
pub use cost::{CostModel, Load};
pub use engine::{GpuEngine, LayerStep};
pub use floe_cuda::device::{Device, DeviceError, Event, Stream};
pub use floe_cuda::ops::DeviceElem;
pub use floe_cuda::ops::cache::{DeviceTensor, TensorType};
pub use host_io::HostLayerStep;
pub use options::{GpuOptions, Placement, Prefer, Submit, TailPlace};
pub use profile::{
    DeviceProfilePlan, DeviceProfileRow, StageRow, device_profile, device_profile_html, device_profile_table,
    overlap_table, step_overlap,
};
pub use report::{GpuMemory, GpuReport, LastStep, TreeReport};
