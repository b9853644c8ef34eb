//! floe: a long-context sparse KV retrieval engine.

pub mod report;
