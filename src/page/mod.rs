//! Pages: where the keys and values of one shard lie, and which of them a step touches.

mod table;
mod warm;

pub use table::{PageEntry, PageTable};
pub(crate) use warm::with_rows;
pub use warm::{PageSlabs, ShardPages};
