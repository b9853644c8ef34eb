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
    beyond: [u64; 3],
    num_fetch: u64,
    tree_pages: u64,
    fault: u64,
    spread: u64,
    spread_sums: u64,
    warm: u64,
    doubted: u64,
    noticed: u64,
    doubt: f32,
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
    /// Rows of an item that attends all of its tokens: of `kv`, or of host memory (see [`DoubtCheck::warm`]). Of an exact entry those
    /// that are on the device.
    pub row_first: DevMut<'a, u32>,
    /// One past them; `row_first` for an item that selects.
    pub row_end: DevMut<'a, u32>,
}

/// Tokens of exact entries that have no row on the device, per item, `[items]` each; device, written.
#[derive(Debug)]
pub struct BeyondRows<'a> {
    /// First of them.
    pub first: DevMut<'a, u32>,
    /// One past them; `first` where all have a row.
    pub end: DevMut<'a, u32>,
    /// Device address of the item's chunks in host memory.
    pub warm: DevMut<'a, u64>,
}

/// How an item finds out that its logits, estimated from key codes, are in doubt: it then attends all of its tokens, and its pages
/// are none. The estimates err with the variance `scale^2 |q|^2 spread * distortion of the code`, `|q|^2` the mean over its
/// queries, `spread` that over its published pages.
#[derive(Debug)]
pub struct DoubtCheck<'a> {
    /// `scale^2 * distortion / bound^2`, the bound in nats; not NaN.
    pub factor: f32,
    /// Mean square of a page's key residuals, `[pages]`; device.
    pub spread: DevRef<'a, f32>,
    /// [sequences, heads] pages after the sinks that are summed up, and bits of the f32 sum of their spreads: zeros before a
    /// sequence's first step and after its truncation; device.
    pub sums: DevMut<'a, [u32; 2]>,
    /// `[items]`, written: device address of the item's chunks where its rows are in host memory, else 0.
    pub warm: DevMut<'a, u64>,
    /// One word: items in doubt are added; device.
    pub doubted: DevMut<'a, u64>,
    /// One word, becomes 1 with the first item in doubt; host-mapped.
    pub noticed: DevMut<'a, u32>,
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
    /// `None`: every token of an exact entry has its row, or one that has none is reported and not stored.
    pub beyond: Option<BeyondRows<'a>>,
    /// One word, becomes 0, where rows are listed for [`super::fetch_listed`]; device.
    pub num_fetch: Option<DevMut<'a, u32>>,
    /// Pages of the tree of each kv head, [sequences, heads]; `None`: pages are runs of 16 tokens. Device.
    pub tree_pages: Option<DevRef<'a, u32>>,
    /// `None`: no item is in doubt.
    pub doubt: Option<DoubtCheck<'a>>,
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
    step.num_fetch.as_ref().map_or(Ok(()), |num| num.check("num_fetch", 1))?;
    let num_rows = step.kv.len() / shape.row_len();
    step.kv.check("kv", num_rows * shape.row_len())?;
    step.q_out.check("q_out", items * shape.group * shape.head_dim)?;
    let r = &step.ranges;
    let ranges = [&r.page_first, &r.page_end, &r.row_first, &r.row_end];
    for range in ranges {
        range.check("ranges", items)?;
    }
    if let Some(beyond) = &step.beyond {
        beyond.first.check("beyond", items)?;
        beyond.end.check("beyond", items)?;
        beyond.warm.check("beyond", items)?;
    }
    if let Some(pages) = step.tree_pages {
        pages.check("tree_pages", tables.sequences.len() * shape.heads)?;
    }
    if let Some(doubt) = &step.doubt {
        doubt.sums.check("sums", tables.sequences.len() * shape.heads)?;
        doubt.warm.check("warm", items)?;
        doubt.doubted.check("doubted", 1)?;
        doubt.noticed.check("noticed", 1)?;
    }
    let of_doubt = |address: fn(&DoubtCheck<'_>) -> u64| step.doubt.as_ref().map_or(0, address);
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
        beyond: step
            .beyond
            .map_or([0; 3], |beyond| [beyond.first.address(), beyond.end.address(), beyond.warm.address()]),
        num_fetch: step.num_fetch.map_or(0, |num| num.address()),
        tree_pages: step.tree_pages.map_or(0, |pages| pages.address()),
        fault: stream.device().fault_address(),
        spread: of_doubt(|doubt| doubt.spread.address()),
        spread_sums: of_doubt(|doubt| doubt.sums.address()),
        warm: of_doubt(|doubt| doubt.warm.address()),
        doubted: of_doubt(|doubt| doubt.doubted.address()),
        noticed: of_doubt(|doubt| doubt.noticed.address()),
        doubt: step.doubt.as_ref().map_or(0.0, |doubt| doubt.factor),
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
