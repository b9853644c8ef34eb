//! floe: a long-context sparse KV retrieval engine.

#![deny(unsafe_code)]

pub mod ids;
pub mod shape;
pub mod view;
pub mod query;
pub mod selection;
pub mod state;
pub mod config;
pub mod error;
pub mod step;

pub mod engine;
mod prefill;
mod decode;
mod sequence;

pub mod reuse;
pub mod plan;
pub mod select;
pub mod page;
pub mod transfer;
pub mod attend;

pub mod trace;
pub mod replay;
pub mod report;

pub use config::Config;
pub use engine::{DecodeStep, Engine, SequenceMemory};
pub use error::{Error, Result};
pub use ids::{KvHeadId, LayerId, SeqId, TokenPos};
pub use select::{Policy, SpecError};
pub use shape::{HeadShape, KvDtype};
pub use step::{ShardReport, StepReport};
pub use view::TensorView;
