//! Working memory of a search, owned by the caller: one per worker thread.

/// Reused by any number of searches on any index.
#[derive(Debug, Default)]
pub struct Scratch {}
