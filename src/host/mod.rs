//! A host engine on candle: GGUF models whose attention runs through a [`KvBackend`].
//!
//! ```text
//! text -> Tokenizer -> Decoder: embed, blocks, head -> Sampler -> text
//!                         |  ^
//!             q, k, v     v  |  attention output
//!                      KvBackend: FloeBackend | GpuBackend | CandleKv | your own
//! ```
//! [`FloeBackend`] is the engine of this crate, `GpuBackend` (feature `cuda`) its engine on a device; [`CandleKv`] is candle's own full attention, for comparison. The core
//! knows nothing of this module: another inference engine plugs in the same way, at its attention.
//!
//! candle's threads wait for their next product in a loop, on the cores that attention needs in between: start a program of your own with
//! `CANDLE_BARRIER_POOL_SPIN_LIMIT=2000` in its environment, as the `floe` command does for itself, and run it inside a rayon pool
//! (`ThreadPool::install`), whose threads products and attention then share.
//!
//! Runs on the CPU, one sequence at a time. Use another engine for throughput over many users.

mod backend;
mod candle_kv;
mod chat;
mod config;
mod decoder;
mod error;
pub mod eval;
mod floe_kv;
mod generate;
mod gguf;
#[cfg(feature = "cuda")]
mod gpu_kv;
mod linear;
mod logits;
mod model;
mod record;
mod rope;
mod sample;
mod tokenizer;

pub use backend::{AttendArgs, KvBackend, Phase};
pub use candle_kv::{CandleAttention, CandleKv};
pub use chat::{ChatTemplate, Message};
pub use config::{Family, ModelConfig};
pub use decoder::{Decoder, Hidden};
pub use error::{HostError, HostResult};
pub use floe_kv::{FloeBackend, ReadCounters};
pub use generate::{PREFILL_TOKENS, PhaseTime, Session};
pub use gguf::Gguf;
#[cfg(feature = "cuda")]
pub use gpu_kv::GpuBackend;
pub use logits::TOP;
pub use model::Model;
pub use record::{RecordPlan, Recorder};
pub use rope::{Pairing, Phases, Rope};
pub use sample::{Sampler, largest};
pub use tokenizer::{TextStream, Tokenizer};
