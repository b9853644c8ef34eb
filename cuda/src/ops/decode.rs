//! Launchers of the attention kernels over a range, pages, rows, and absent pages.

use super::plan::DecodePlan;
use super::{DeviceElem, PAGE_ROWS, check_aligned, word};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream, Together};
use crate::{AttendParams, KernelError};
use half::bf16;

/// Queries and rows of all items.
#[derive(Debug, Clone, Copy)]
pub struct DecodeArgs<'a, E> {
    /// [items, group, head_dim] E, post-RoPE; device.
    pub q: DevRef<'a, E>,
    /// [num_rows, 2, head_dim] E; device. A whole number of pages where pages are listed.
    pub kv: DevRef<'a, E>,
    /// Scale and softcap.
    pub params: AttendParams,
    /// `Some(ln lambda)`, below zero: sixteen rows whose scores all lie at least this far below the running maximum are not
    /// weighed (BLASST). Their weight is at most `16 lambda` of what is kept by then. `None`: every row counts.
    pub skip_below: Option<f32>,
}

/// Per item a half-open range: of entries of a list, or of rows.
#[derive(Debug, Clone, Copy)]
pub struct Spans<'a> {
    /// `[items]`; device.
    pub first: DevRef<'a, u32>,
    /// `[items]`; device.
    pub end: DevRef<'a, u32>,
}

impl<'a> Spans<'a> {
    /// Of a CSR pointer array [items + 1].
    ///
    /// # Errors
    /// An empty array.
    pub fn csr(pointers: DevRef<'a, u32>) -> Result<Self, KernelError> {
        let items = pointers.len().saturating_sub(1);
        Ok(Self { first: pointers.slice(0..items)?, end: pointers.slice(1..items + 1)? })
    }
}

/// What each item attends.
#[derive(Debug, Clone, Copy)]
pub enum Lists<'a, E = bf16> {
    /// Slots of pages.
    Pages {
        /// Which entries are an item's.
        spans: Spans<'a>,
        /// `[entries]`; device. Page `s` is rows `16 s..16 s + 16` of `kv`.
        slots: DevRef<'a, u32>,
        /// `[entries]`; device. Bit `r`: row `r` of the page is attended. `None`: all rows.
        masks: Option<DevRef<'a, u16>>,
    },
    /// Single rows.
    Rows {
        /// Which entries are an item's.
        spans: Spans<'a>,
        /// `[entries]` rows of `kv`; device.
        rows: DevRef<'a, u32>,
    },
    /// Pages, some of them still in host memory, where they are read in place and left.
    PagesAndHost {
        /// Which entries are an item's.
        spans: Spans<'a>,
        /// `[entries]` slots, or [`HOST_ENTRY`] + a page of `host`; device.
        slots: DevRef<'a, u32>,
        /// As in [`Lists::Pages`].
        masks: Option<DevRef<'a, u16>>,
        /// [host_pages, 16, 2, head_dim] E; host-mapped.
        host: DevRef<'a, E>,
    },
    /// Single rows, some of them still in host memory, where they are read in place and left.
    RowsAndHost {
        /// Which entries are an item's.
        spans: Spans<'a>,
        /// `[entries]` rows of `kv`, or [`HOST_ENTRY`] + a row of `host`; device.
        rows: DevRef<'a, u32>,
        /// [host_rows, 2, head_dim] E; host-mapped.
        host: DevRef<'a, E>,
    },
}

/// Marks an entry of a list that lies in host memory. Neither side may have that many rows or pages.
pub const HOST_ENTRY: u32 = 1 << 31;

/// The state of other tokens, merged into a result by the blocks that finish it: pairs of `out` and `lse`, shaped as the result.
#[derive(Debug, Clone, Copy)]
pub struct Join<'a> {
    /// [items, group, head_dim]; device.
    pub out: DevRef<'a, f32>,
    /// [items, group]; device.
    pub lse: DevRef<'a, f32>,
}

/// Pages of which some are still in host memory.
#[derive(Debug, Clone, Copy)]
pub struct FetchPages<'a, E> {
    /// Which entries are an item's.
    pub spans: Spans<'a>,
    /// `[entries]`, each slot at most once among absent pages; device.
    pub slots: DevRef<'a, u32>,
    /// `[entries]`; device. See [`Lists::Pages`].
    pub masks: Option<DevRef<'a, u16>>,
    /// `[entries]`; device. The page's place in `host`, or [`FetchPages::RESIDENT`].
    pub host_pages: DevRef<'a, u32>,
    /// [pages, 16, 2, head_dim] E; host-mapped.
    pub host: DevRef<'a, E>,
}

impl<E> FetchPages<'_, E> {
    /// Place of a page that is already in its slot.
    pub const RESIDENT: u32 = u32::MAX;
}

/// States to be written; device.
#[derive(Debug)]
pub struct DevState<'a> {
    /// [items, group, head_dim] f32.
    pub out: DevMut<'a, f32>,
    /// [items, group] f32, natural; empty = -inf with a zero `out`.
    pub lse: DevMut<'a, f32>,
}

/// Mirrors `floe::DecodeParams`.
#[repr(C)]
struct DecodeParams {
    q: u64,
    kv: u64,
    first: u64,
    end: u64,
    entries: u64,
    masks: u64,
    host_pages: u64,
    host: u64,
    work: u64,
    part_out: u64,
    part_lse: u64,
    arrived: u64,
    fault: u64,
    out: u64,
    lse: u64,
    scale: f32,
    softcap: f32,
    skip: f32,
    group: u32,
    num_rows: u32,
    num_entries: u32,
    num_host: u32,
    splits: u32,
    ring: u32,
    join_out: u64,
    join_lse: u64,
    late: u32,
    heads: u32,
    warm: u64,
}

/// Attention over the rows `first..end` of each item, which are contiguous.
///
/// Reads every key and value once: `2 * head_dim * size_of::<E>()` bytes a row.
///
/// # Errors
/// Shapes that do not fit the plan or each other, a scale or softcap that is not finite; what the driver reports.
pub fn dense_decode<E: DeviceElem>(
    stream: &Stream,
    plan: &mut DecodePlan,
    args: &DecodeArgs<'_, E>,
    rows: Spans<'_>,
    state: DevState<'_>,
) -> Result<(), DeviceError> {
    let params = prepare(stream, plan, args, rows, state)?;
    launch::<E>(stream, plan, "dense_decode", &params)
}

/// All rows of each item, in order of position, wherever they lie.
#[derive(Debug, Clone, Copy)]
pub struct WholeItems<'a> {
    /// Rows of `kv`, or of the item's tokens in host memory, there from a multiple of 16 on.
    pub rows: Spans<'a>,
    /// `[items]` device address of the addresses of the item's chunks in host memory (see [`super::cache::Tables`]), or 0: its rows
    /// are in `kv`; device.
    pub warm: DevRef<'a, u64>,
    /// Kv heads of a chunk; item `i` is head `i % heads`.
    pub heads: usize,
}

/// As [`dense_decode`], over rows of `kv` or, in place, of host memory.
///
/// What `warm` names is written by the device (`cache::append_step`), from chunk tables that hold all of an item's rows.
///
/// # Errors
/// As [`dense_decode`].
pub fn whole_decode<E: DeviceElem>(
    stream: &Stream,
    plan: &mut DecodePlan,
    args: &DecodeArgs<'_, E>,
    items: WholeItems<'_>,
    state: DevState<'_>,
) -> Result<(), DeviceError> {
    let mut params = prepare(stream, plan, args, items.rows, state)?;
    items.warm.check("warm", plan.items)?;
    (params.warm, params.heads) = (items.warm.address(), word("heads", items.heads.max(1))?);
    launch::<E>(stream, plan, "whole_decode", &params)
}

/// Attention over the listed pages or rows of each item, in the order of the list.
///
/// # Errors
/// As [`dense_decode`].
pub fn sparse_decode<E: DeviceElem>(
    stream: &Stream,
    plan: &mut DecodePlan,
    args: &DecodeArgs<'_, E>,
    lists: Lists<'_, E>,
    state: DevState<'_>,
) -> Result<(), DeviceError> {
    queue_sparse(stream, plan, &SparseCall { args: *args, lists, join: None }, When::AfterEarlier, state)
}

/// Attention over lists, with what is to be joined to its result.
#[derive(Debug, Clone, Copy)]
pub struct SparseCall<'a, E> {
    /// Queries and rows.
    pub args: DecodeArgs<'a, E>,
    /// What is attended.
    pub lists: Lists<'a, E>,
    /// The state of tokens that `lists` does not name.
    pub join: Option<Join<'a>>,
}

/// As [`sparse_decode`], joined with another state in the same launch.
///
/// # Errors
/// As [`dense_decode`].
pub fn sparse_decode_joined<E: DeviceElem>(
    stream: &Stream,
    plan: &mut DecodePlan,
    call: &SparseCall<'_, E>,
    state: DevState<'_>,
) -> Result<(), DeviceError> {
    queue_sparse(stream, plan, call, When::AfterEarlier, state)
}

/// When attention may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// When all earlier work is done.
    AfterEarlier,
    /// When the kernel queued just before has begun; all but the state to join was ready before that one began.
    BesideLast,
}

pub(super) fn queue_sparse<E: DeviceElem>(
    stream: &Stream,
    plan: &mut DecodePlan,
    call: &SparseCall<'_, E>,
    when: When,
    state: DevState<'_>,
) -> Result<(), DeviceError> {
    let (spans, host) = match call.lists {
        Lists::Pages { spans, .. } | Lists::Rows { spans, .. } => (spans, None),
        Lists::PagesAndHost { spans, host, .. } => (spans, Some((host, PAGE_ROWS))),
        Lists::RowsAndHost { spans, host, .. } => (spans, Some((host, 1))),
    };
    let mut params = prepare(stream, plan, &call.args, spans, state)?;
    params.late = u32::from(when == When::BesideLast);
    if let Some(Join { out, lse }) = call.join {
        out.check("join.out", plan.items * plan.group * plan.head_dim)?;
        lse.check("join.lse", plan.items * plan.group)?;
        check_aligned("join.out", out.address())?;
        (params.join_out, params.join_lse) = (out.address(), lse.address());
    }
    if let Some((host, unit_rows)) = host {
        let unit_len = unit_rows * 2 * plan.head_dim;
        let num_host = host.len() / unit_len;
        host.check("host", num_host * unit_len)?;
        check_aligned("host", host.address())?;
        params.host = host.address();
        params.num_host = word("host", num_host)?;
        let most = [("units of host", num_host), ("rows of kv", params.num_rows as usize)];
        if let Some((field, value)) = most.into_iter().find(|(_, value)| *value > HOST_ENTRY as usize) {
            return Err(DeviceError::Unsupported { field, value, expected: "at most 2^31" });
        }
    }
    match call.lists {
        Lists::Pages { slots, masks, .. } | Lists::PagesAndHost { slots, masks, .. } => {
            list_pages(&mut params, slots, masks)?;
            check_pages(params.num_rows)?;
            launch::<E>(stream, plan, "sparse_decode_pages", &params)
        }
        Lists::Rows { rows, .. } | Lists::RowsAndHost { rows, .. } => {
            params.entries = rows.address();
            params.num_entries = word("rows", rows.len())?;
            launch::<E>(stream, plan, "sparse_decode_rows", &params)
        }
    }
}

/// As [`sparse_decode`] over pages; absent ones are read from host memory, attended, and stored into their slots on the way.
///
/// `args.kv` is written: the slots of absent pages.
///
/// # Errors
/// As [`dense_decode`].
pub fn fetch_attend<E: DeviceElem>(
    stream: &Stream,
    plan: &mut DecodePlan,
    args: &DecodeArgs<'_, E>,
    pages: &FetchPages<'_, E>,
    state: DevState<'_>,
) -> Result<(), DeviceError> {
    let mut params = prepare(stream, plan, args, pages.spans, state)?;
    list_pages(&mut params, pages.slots, pages.masks)?;
    check_pages(params.num_rows)?;
    pages.host_pages.check("host_pages", pages.slots.len())?;
    let page_len = PAGE_ROWS * 2 * plan.head_dim;
    let num_pages = pages.host.len() / page_len;
    pages.host.check("host", num_pages * page_len)?;
    check_aligned("host", pages.host.address())?;
    params.host_pages = pages.host_pages.address();
    params.host = pages.host.address();
    params.num_host = word("host", num_pages)?;
    launch::<E>(stream, plan, "fetch_attend", &params)
}

/// Everything but the lists.
fn prepare<E: DeviceElem>(
    stream: &Stream,
    plan: &mut DecodePlan,
    args: &DecodeArgs<'_, E>,
    spans: Spans<'_>,
    state: DevState<'_>,
) -> Result<DecodeParams, DeviceError> {
    let (items, group, d) = (plan.items, plan.group, plan.head_dim);
    args.q.check("q", items * group * d)?;
    let num_rows = args.kv.len() / (2 * d);
    args.kv.check("kv", num_rows * 2 * d)?;
    spans.first.check("first", items)?;
    spans.end.check("end", items)?;
    state.out.check("out", items * group * d)?;
    state.lse.check("lse", items * group)?;
    for (field, address) in [("q", args.q.address()), ("kv", args.kv.address()), ("out", state.out.address())]
    {
        check_aligned(field, address)?;
    }
    let AttendParams { scale, softcap } = args.params;
    if !scale.is_finite() {
        return Err(KernelError::Scale { scale }.into());
    }
    if let Some(softcap) = softcap.filter(|cap| !cap.is_finite() || *cap <= 0.0) {
        return Err(KernelError::Softcap { softcap }.into());
    }
    Ok(DecodeParams {
        q: args.q.address(),
        kv: args.kv.address(),
        first: spans.first.address(),
        end: spans.end.address(),
        entries: 0,
        masks: 0,
        host_pages: 0,
        host: 0,
        work: plan.work.view().address(),
        part_out: plan.part_out.view_mut().address(),
        part_lse: plan.part_lse.view_mut().address(),
        arrived: plan.arrived.view_mut().address(),
        fault: stream.device().fault_address(),
        out: state.out.address(),
        lse: state.lse.address(),
        scale,
        softcap: softcap.unwrap_or(0.0),
        skip: args.skip_below.unwrap_or(f32::NEG_INFINITY),
        group: word("group", group)?,
        num_rows: word("kv", num_rows)?,
        num_entries: 0,
        num_host: 0,
        splits: plan.uniform_splits,
        ring: {
            let (warps, stages) = ring(d);
            plan.share.div_ceil(warps).clamp(1, stages)
        },
        join_out: 0,
        join_lse: 0,
        late: 0,
        heads: 0,
        warm: 0,
    })
}

fn list_pages(
    params: &mut DecodeParams,
    slots: DevRef<'_, u32>,
    masks: Option<DevRef<'_, u16>>,
) -> Result<(), DeviceError> {
    if let Some(masks) = masks {
        masks.check("masks", slots.len())?;
        params.masks = masks.address();
    }
    params.entries = slots.address();
    params.num_entries = word("slots", slots.len())?;
    Ok(())
}

fn check_pages(num_rows: u32) -> Result<(), DeviceError> {
    if num_rows.is_multiple_of(PAGE_ROWS as u32) {
        return Ok(());
    }
    Err(DeviceError::Unsupported {
        field: "rows of kv",
        value: num_rows as usize,
        expected: "whole pages of 16",
    })
}

/// Warps of a block and stages of a ring, as in `decode.cuh`.
fn ring(head_dim: usize) -> (u32, u32) {
    match head_dim {
        64 => (4, 6),
        96 => (4, 4),
        256 => (2, 3),
        _ => (4, 3),
    }
}

fn launch<E: DeviceElem>(
    stream: &Stream,
    plan: &DecodePlan,
    module: &'static str,
    params: &DecodeParams,
) -> Result<(), DeviceError> {
    let d = plan.head_dim;
    let (warps, stages) = ring(d);
    let shared_bytes = warps * stages * (PAGE_ROWS * 4 * d) as u32;
    let name = format!("{module}_{}_d{d}", E::NAME);
    let kernel = stream.device().kernel(module, &name, shared_bytes)?;
    let shared_bytes = shared_bytes / stages * params.ring;
    let launch = Launch { blocks: (plan.blocks, 1), threads: warps * 32, shared_bytes };
    // SAFETY: the layouts match; every buffer was checked against the shapes above, and borrowed buffers wait for the device
    // before they are freed. The kernel waits for earlier ones, or was queued right behind one that did before it let this one start.
    unsafe { kernel.launch_early(stream, launch, Together { layers: 1, cluster: 1 }, params) }
}
