//! Twins of the device kernels: the same arguments in host slices, the same lists, f64 accumulation, no order tricks.

#[cfg(feature = "cuda")]
mod cache;
mod decode;
mod rows;
mod scan;
mod states;
mod sweep;

#[cfg(feature = "cuda")]
pub use cache::{HostCache, Resolved, WarmRow, encode};
pub use decode::{HostKv, HostSpans, TileRows, decode_lists};
pub use rows::{NOWHERE, append_rows, fetch_units};
pub use scan::{HostSketches, match_scan, page_scores};
pub use states::merge_parts;
pub use sweep::{HostRotation, HostValues, TokenScoresF64, select_units, tail, token_scores};
