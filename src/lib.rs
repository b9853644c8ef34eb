//! floe: a long-context sparse KV retrieval engine.
#![deny(unsafe_code)]

pub mod trace;
