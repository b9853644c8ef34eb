//! Launcher of `cache_finish`: the last kernel of a step.

use super::{CacheParams, DeviceTensor, Tables};
use crate::device::{DevRef, DeviceError, Launch, Stream, Together};
use crate::ops::word;

/// States that are joined at most.
pub const FINISH_PARTS_MAX: usize = 4;

/// Mirrors `floe::FinishParams`.
#[repr(C)]
struct FinishParams {
    cache: CacheParams,
    part_out: [u64; FINISH_PARTS_MAX],
    part_lse: [u64; FINISH_PARTS_MAX],
    out: u64,
    strides: [u64; 2],
    parts: u32,
    dtype: u32,
    entries: u32,
    dim: u32,
}

/// When `finish` may take its places on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishStart {
    /// While the stream's last kernel, which made the last part, still runs.
    Early,
    /// After everything that the stream waits for: parts come from several streams.
    AfterAll,
}

/// Merges the states of disjoint sets of tokens, pairs of `out` [items, group, head_dim] and `lse` [items, group], and writes
/// `out` [entries, heads * group, head_dim]. Entries of nobody are left as they are. `start`: whether the parts come from the stream's
/// last kernel alone.
///
/// # Errors
/// No part or too many, shapes that do not fit; what the driver reports.
pub fn finish(
    stream: &Stream,
    tables: &Tables<'_>,
    parts: &[(DevRef<'_, f32>, DevRef<'_, f32>)],
    out: &DeviceTensor,
    start: FinishStart,
) -> Result<(), DeviceError> {
    let (shape, entries) = (tables.shape, tables.batch.len());
    if parts.is_empty() || parts.len() > FINISH_PARTS_MAX {
        return Err(DeviceError::Unsupported { field: "parts", value: parts.len(), expected: "1 to 4" });
    }
    out.expect("out", [entries, shape.heads * shape.group, shape.head_dim])?;
    let rows = tables.items() * shape.group;
    let mut params = FinishParams {
        cache: tables.params()?,
        part_out: [0; FINISH_PARTS_MAX],
        part_lse: [0; FINISH_PARTS_MAX],
        out: out.address(),
        strides: out.strides_64(),
        parts: word("parts", parts.len())?,
        dtype: out.dtype() as u32,
        entries: word("entries", entries)?,
        dim: word("head_dim", shape.head_dim)?,
    };
    for (i, (part, lse)) in parts.iter().enumerate() {
        part.check("part.out", rows * shape.head_dim)?;
        lse.check("part.lse", rows)?;
        (params.part_out[i], params.part_lse[i]) = (part.address(), lse.address());
    }
    let kernel = stream.device().kernel("cache_finish", "cache_finish", 0)?;
    let launch = Launch { blocks: (word("rows", rows)?.div_ceil(4), 1), threads: 128, shared_bytes: 0 };
    // SAFETY: the layouts match, every buffer has the checked shape, whoever made the tensor vouches for it, and the kernel begins
    // by waiting for earlier ones.
    unsafe {
        match start {
            FinishStart::Early => kernel.launch_early(stream, launch, Together::ALONE, &params),
            FinishStart::AfterAll => kernel.launch(stream, launch, &params),
        }
    }
}
