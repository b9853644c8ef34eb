//! Launcher of `cache_append`: the first kernel of a step.

use super::{CacheParams, DeviceTensor, Tables};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream, Together};
use crate::ops::{DeviceElem, word};

/// Mirrors `floe::AppendStepParams`.
#[repr(C)]
struct AppendStepParams {
    cache: CacheParams,
    q: u64,
    k: u64,
    v: u64,
    strides: [u64; 6],
    kv: u64,
    q_out: u64,
    ranges: [u64; 4],
    num_fetch: u64,
    tree_pages: u64,
    fault: u64,
    q_type: u32,
    kv_type: u32,
    num_rows: u32,
}

/// What a step's other kernels work on, per item, `[items]` each; device, written.
#[derive(Debug)]
pub struct Ranges<'a> {
    /// Published pages.
    pub page_first: DevMut<'a, u32>,
    /// One past them.
    pub page_end: DevMut<'a, u32>,
    /// Rows of a dense sequence.
    pub row_first: DevMut<'a, u32>,
    /// One past them; `row_first` for a sequence with slots.
    pub row_end: DevMut<'a, u32>,
}

/// A step's new tokens and queries, and where they go.
#[derive(Debug)]
pub struct AppendStep<'a, E> {
    /// Post-RoPE queries [entries, heads * group, head_dim].
    pub q: DeviceTensor,
    /// New keys [entries, heads, head_dim].
    pub k: DeviceTensor,
    /// New values, of the same shape and type.
    pub v: DeviceTensor,
    /// [rows, 2, head_dim]; device.
    pub kv: DevMut<'a, E>,
    /// Queries [items, group, head_dim]; device.
    pub q_out: DevMut<'a, E>,
    /// Per item.
    pub ranges: Ranges<'a>,
    /// One word, becomes 0; device.
    pub num_fetch: DevMut<'a, u32>,
    /// Pages of the tree of each kv head, [sequences, heads]; `None`: pages are runs of 16 tokens. Device.
    pub tree_pages: Option<DevRef<'a, u32>>,
}

/// Stores the new token of every entry, on the device and in host memory, and readies queries and ranges.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn append_step<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    step: AppendStep<'_, E>,
) -> Result<(), DeviceError> {
    let shape = tables.shape;
    let (entries, items) = (tables.batch.len(), tables.items());
    step.q.expect("q", [entries, shape.heads * shape.group, shape.head_dim])?;
    step.k.expect("k", [entries, shape.heads, shape.head_dim])?;
    step.v.expect("v", [entries, shape.heads, shape.head_dim])?;
    if step.k.dtype() != step.v.dtype() {
        let (value, expected) = (step.v.dtype() as usize, "the type of k");
        return Err(DeviceError::Unsupported { field: "type of v", value, expected });
    }
    let num_rows = step.kv.len() / shape.row_len();
    step.kv.check("kv", num_rows * shape.row_len())?;
    step.q_out.check("q_out", items * shape.group * shape.head_dim)?;
    let r = &step.ranges;
    let ranges = [&r.page_first, &r.page_end, &r.row_first, &r.row_end];
    for range in ranges {
        range.check("ranges", items)?;
    }
    step.num_fetch.check("num_fetch", 1)?;
    if let Some(pages) = step.tree_pages {
        pages.check("tree_pages", tables.sequences.len() * shape.heads)?;
    }
    let ([q0, q1], [k0, k1], [v0, v1]) = (step.q.strides_64(), step.k.strides_64(), step.v.strides_64());
    let params = AppendStepParams {
        cache: tables.params()?,
        q: step.q.address(),
        k: step.k.address(),
        v: step.v.address(),
        strides: [q0, q1, k0, k1, v0, v1],
        kv: step.kv.address(),
        q_out: step.q_out.address(),
        ranges: ranges.map(|range| range.address()),
        num_fetch: step.num_fetch.address(),
        tree_pages: step.tree_pages.map_or(0, |pages| pages.address()),
        fault: stream.device().fault_address(),
        q_type: step.q.dtype() as u32,
        kv_type: step.k.dtype() as u32,
        num_rows: word("kv", num_rows)?,
    };
    let name = format!("cache_append_{}_d{}", E::NAME, shape.head_dim);
    let kernel = stream.device().kernel("cache_append", &name, 0)?;
    let blocks = (params.cache.heads, word("entries", entries)?);
    // SAFETY: the layouts match, every buffer has the checked shape, and whoever made the tensors vouches for theirs;
    // the kernel begins by waiting for earlier ones.
    unsafe {
        kernel.launch_early(
            stream,
            Launch { blocks, threads: 128, shared_bytes: 0 },
            Together::ALONE,
            &params,
        )
    }
}
