//! Launchers: each checks its shapes, queues one kernel on a stream and returns. None allocates, none waits.
//!
//! Arguments live on the device. Lists (which rows, which pages) may have been written by the device, so their entries cannot
//! be checked here: kernels leave out what lies outside a buffer and report it through
//! [`Device::check_entries`](crate::device::Device::check_entries).
//!
//! # What a recorded step may change
//! Every launcher may be recorded in a [`Graph`](crate::device::Graph): the grid and the addresses are fixed when it is recorded,
//! everything below is read from device memory when it runs. Write these buffers before a replay (or by kernels inside it); an item
//! that is absent this step has an empty range.
//!
//! | launcher | read from the device each time | fixed when recorded |
//! |---|---|---|
//! | [`dense_decode`], [`whole_decode`], [`sparse_decode`], [`fetch_attend`] | `Spans::first`, `Spans::end` per item, every list entry and mask | items, and through [`PlanShape::rows_max`] the number of blocks an item gets: rows beyond it are attended all the same, only slower, but where it gives every warp one or two tiles they are left out and reported |
//! | `Sweep::page_scores`, `token_scores`, `tail` (module [`sweep`]) | first and last page of each item, masks, codes, means | items, blocks an item; more pages than `pages_max` are scored all the same |
//! | `Sweep::select` | first and last page, budgets, where each list begins; writes where it ends | the largest budget; pages beyond `pages_max` are **not** considered |
//! | [`fetch_pages`], [`fetch_rows`] | [`Fetch::num`], the lists; [`Fetch::NOWHERE`] leaves a unit out | most units |
//! | [`append_kv`] | where each row goes; [`NewRows::NOWHERE`] leaves it out | most rows |
//! | [`match_scan`] | places in use of each ring | heads, places |
//! | [`merge_states`] | empty parts have `lse` -inf | which parts |
//!
//! An *item* is one query group against one shard: a kv head of a request. A *slot* is a place of 16 consecutive rows in the
//! hot tier's `kv` [num_rows, 2, head_dim].

mod append_kv;
pub mod cache;
mod decode;
mod fetch;
mod match_scan;
mod merge_states;
mod plan;
pub mod sweep;

pub use append_kv::{NewRows, append_kv};
pub use decode::{
    DecodeArgs, DevState, FetchPages, HOST_ENTRY, Join, Lists, Spans, SparseCall, WholeItems, dense_decode,
    fetch_attend, sparse_decode, sparse_decode_joined, whole_decode,
};
pub use fetch::{Fetch, fetch_pages, fetch_rows};
pub use match_scan::{Ring, match_scan};
pub use merge_states::{MERGE_PARTS_MAX, merge_states};
pub use plan::{DecodePlan, PlanShape};
pub use sweep::{ScanShape, Summaries};

use half::{bf16, f16};

use crate::KvElem;
use crate::device::DeviceError;

/// Rows of a page.
pub const PAGE_ROWS: usize = 16;

/// An element type that the device's tensor cores take: `bf16` or `f16`.
pub trait DeviceElem: KvElem {}

impl DeviceElem for bf16 {}
impl DeviceElem for f16 {}

/// Head sizes that kernels are compiled for.
const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

fn check_head_dim(head_dim: usize) -> Result<(), DeviceError> {
    if HEAD_DIMS.contains(&head_dim) {
        return Ok(());
    }
    Err(DeviceError::Unsupported { field: "head_dim", value: head_dim, expected: "64, 96, 128 or 256" })
}

/// Refuses an address that 16-byte accesses cannot use.
fn check_aligned(field: &'static str, address: u64) -> Result<(), DeviceError> {
    if address.is_multiple_of(16) {
        return Ok(());
    }
    let value = (address % 16) as usize;
    Err(DeviceError::Unsupported { field, value, expected: "an address that is a multiple of 16" })
}

/// A count as kernels take it.
fn word(field: &'static str, value: usize) -> Result<u32, DeviceError> {
    u32::try_from(value).map_err(|_| DeviceError::Unsupported { field, value, expected: "below 2^32" })
}
