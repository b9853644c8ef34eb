//! Pages: where the keys and values of one shard lie, and which of them a step touches.

pub mod cold;
pub mod file;
mod hot;
mod life;
mod slab;
mod slots;
mod table;
mod warm;

pub use hot::{Admission, HotCounters, HotTier, Pin, PinError, Purpose, Unit};
pub use life::{IllegalTransition, PageEvent, PageLife, SlotEvent, SlotLife};
pub use slab::{HostMemory, LentSlab, NoMemory, SLAB_ALIGN, SlabMemory, SlabSource, WarmMemory};
pub(crate) use slab::{OwnRows, OwnSlab, Slab};
pub use slots::{HotRows, SlotMemory, SlotTable, WARM};
pub use table::{PageEntry, PageTable};
pub use warm::{PageSlabs, SLAB_ROWS, ShardPages};
pub(crate) use warm::{SlabKind, with_rows};
