#![doc = include_str!("../ARCHITECTURE.md")]
#![deny(unsafe_code)]

pub mod config;
pub mod error;
pub mod ids;
pub mod query;
pub mod selection;
pub mod shape;
pub mod state;
pub mod step;
pub mod view;

mod decode;
pub mod engine;
mod hot;
mod prefill;
mod sequence;

pub mod attend;
pub mod page;
pub mod plan;
pub mod policy;
pub mod reuse;
pub mod reusing;
pub mod select;
pub mod sim;
pub mod transfer;

#[cfg(feature = "cuda")]
pub mod gpu;
#[cfg(feature = "candle")]
pub mod host;
pub mod profile;
pub mod replay;
pub mod report;
pub mod trace;

pub use config::{Backend, ColdConfig, Config, HotConfig};
pub use engine::{DecodeStep, Engine, PrefillStep, SavedSequence, SequenceMemory};
pub use error::{Error, Result};
pub use ids::{KvHeadId, LayerId, SeqId, TokenPos};
pub use select::{Policy, SpecError};
pub use shape::{HeadShape, KvDtype};
pub use step::{ShardReport, StepReport};
pub use view::TensorView;

/// Compiles the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
