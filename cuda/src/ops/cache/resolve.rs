//! Launchers of `cache_resolve` and `cache_fetch`: rows for the tokens of a step, those that are missing brought from host memory.

use super::{CacheParams, Tables};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream, Together};
use crate::ops::{DeviceElem, Spans, check_aligned, word};

/// Tokens that a step may retrieve for an item at most, as in `cache_resolve.cu`.
pub const RETRIEVED_MAX: usize = 4096;

/// Mirrors `floe::ResolveParams`.
#[repr(C)]
struct ResolveParams {
    cache: CacheParams,
    row_first: u64,
    row_end: u64,
    found_first: u64,
    found_end: u64,
    found: u64,
    row_of_token: u64,
    token_of_row: u64,
    used: u64,
    hand: u64,
    list: u64,
    list_end: u64,
    kv: u64,
    from: u64,
    to: u64,
    num_fetch: u64,
    counters: u64,
    list_each: u32,
    retrieved: u32,
    row_bytes: u32,
    num_rows: u32,
    num_tokens: u32,
    unit_shift: u32,
    ahead: u32,
}

/// Which token lies in which row; device. Before the first step: no token, never used.
#[derive(Debug)]
pub struct Slots<'a> {
    /// Row of a token, `[16 pages]`; `u32::MAX` = none.
    pub row_of_token: DevMut<'a, u32>,
    /// Token of a row, `[rows]`; `u32::MAX` = none.
    pub token_of_row: DevMut<'a, u32>,
    /// Tick of the last step that attended a row, `[rows]`.
    pub used: DevMut<'a, u32>,
    /// [sequences, heads] slot that is looked at first for one to give away.
    pub hand: DevMut<'a, u32>,
    /// Rows found in slots, rows fetched, and rows fetched ahead, since they were last cleared.
    pub counters: DevMut<'a, u64>,
}

/// Mirrors `floe::FetchListedParams`.
#[repr(C)]
struct FetchListedParams {
    from: u64,
    to: u64,
    num: u64,
    kv: u64,
    row_bytes: u32,
    limit: u32,
}

/// Rows to bring from host memory; device.
#[derive(Debug)]
pub struct FetchList<'a> {
    /// Host-mapped addresses.
    pub from: DevMut<'a, u64>,
    /// Rows they go to, as many.
    pub to: DevMut<'a, u32>,
    /// How many, one word; zero before [`resolve`].
    pub num: DevMut<'a, u32>,
}

/// What `found` lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundUnit {
    /// Tokens, as `16 page + place in the page`.
    Tokens,
    /// Pages, of which every token is attended.
    Pages,
}

/// What a step attends, and where the answer goes.
#[derive(Debug)]
pub struct Resolve<'a> {
    /// Rows of items that attend all of their tokens, which have nothing listed; see [`super::Ranges`].
    pub whole: Spans<'a>,
    /// Retrieved units of each item, in `found`.
    pub spans: Spans<'a>,
    /// Units, none twice, together at most `retrieved` tokens of an item; device.
    pub found: DevRef<'a, u32>,
    /// What a unit is.
    pub unit: FoundUnit,
    /// Most tokens that an item retrieves, at most [`RETRIEVED_MAX`]; sequences have at least as many slots.
    pub retrieved: usize,
    /// Rows to attend, [items, fixed + retrieved]; written, device.
    pub list: DevMut<'a, u32>,
    /// One past each item's rows in `list`, `[items]`; written, device.
    pub list_end: DevMut<'a, u32>,
}

/// What a later step may want.
#[derive(Debug)]
pub struct Ahead<'a> {
    /// Units of each item, in `found`.
    pub spans: Spans<'a>,
    /// Units, none twice; device.
    pub found: DevRef<'a, u32>,
    /// What a unit is.
    pub unit: FoundUnit,
    /// Most tokens of an item, at most [`RETRIEVED_MAX`].
    pub most: usize,
    /// Room for `[items, most]` rows; written, device.
    pub rows: DevMut<'a, u32>,
}

/// Lists the rows of sinks, newest tokens and retrieved tokens of each item, and brings those that are missing from host memory
/// into `kv` [rows, 2, head_dim]; device. With `fetch` they are only listed, for [`fetch_listed`], which then follows.
///
/// Host addresses come from the chunk table and never lie beyond it.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn resolve<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    step: Resolve<'_>,
    slots: Slots<'_>,
    (kv, fetch): (DevMut<'_, E>, Option<&mut FetchList<'_>>),
) -> Result<(), DeviceError> {
    let (shape, items) = (tables.shape, tables.items());
    if let Some(fetch) = &fetch {
        fetch.from.check("from", items * step.retrieved)?;
        fetch.to.check("to", items * step.retrieved)?;
        fetch.num.check("num_fetch", 1)?;
    }
    let (from, to, num) =
        fetch.map_or((0, 0, 0), |fetch| (fetch.from.address(), fetch.to.address(), fetch.num.address()));
    step.whole.first.check("row_first", items)?;
    step.whole.end.check("row_end", items)?;
    let list_each = shape.fixed_max() + step.retrieved;
    step.list.check("list", items * list_each)?;
    step.list_end.check("list_end", items)?;
    let units = Units { spans: step.spans, found: step.found, unit: step.unit, most: step.retrieved };
    let params = ResolveParams {
        row_first: step.whole.first.address(),
        row_end: step.whole.end.address(),
        list: step.list.address(),
        list_end: step.list_end.address(),
        list_each: word("list", list_each)?,
        from,
        to,
        num_fetch: num,
        ahead: 0,
        ..params(tables, &units, &slots, kv)?
    };
    launch(stream, items, &params)
}

/// Gives slots to tokens that a later step may want, and brings their rows. Runs behind the step's own [`resolve`], which goes
/// before: only slots that were last used earlier than a step ago are given away, so a token may get none.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn resolve_ahead<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    ahead: Ahead<'_>,
    slots: Slots<'_>,
    kv: DevMut<'_, E>,
) -> Result<(), DeviceError> {
    let items = tables.items();
    ahead.rows.check("rows", items * ahead.most)?;
    let units = Units { spans: ahead.spans, found: ahead.found, unit: ahead.unit, most: ahead.most };
    let params = ResolveParams {
        list: ahead.rows.address(),
        list_each: word("list", ahead.most)?,
        ..params(tables, &units, &slots, kv)?
    };
    launch(stream, items, &params)
}

/// What both look up.
struct Units<'a> {
    spans: Spans<'a>,
    found: DevRef<'a, u32>,
    unit: FoundUnit,
    most: usize,
}

/// Of [`resolve_ahead`], without a list.
fn params<E: DeviceElem>(
    tables: &Tables<'_>,
    units: &Units<'_>,
    slots: &Slots<'_>,
    kv: DevMut<'_, E>,
) -> Result<ResolveParams, DeviceError> {
    let (shape, items) = (tables.shape, tables.items());
    if units.most > RETRIEVED_MAX {
        return Err(DeviceError::Unsupported {
            field: "retrieved",
            value: units.most,
            expected: "at most 4096",
        });
    }
    units.spans.first.check("found_first", items)?;
    units.spans.end.check("found_end", items)?;
    let (num_rows, num_tokens) = (slots.used.len(), slots.row_of_token.len());
    slots.token_of_row.check("token_of_row", num_rows)?;
    slots.hand.check("hand", tables.sequences.len() * shape.heads)?;
    slots.counters.check("counters", 3)?;
    kv.check("kv", num_rows * shape.row_len())?;
    check_aligned("kv", kv.address())?;
    Ok(ResolveParams {
        cache: tables.params()?,
        row_first: 0,
        row_end: 0,
        found_first: units.spans.first.address(),
        found_end: units.spans.end.address(),
        found: units.found.address(),
        row_of_token: slots.row_of_token.address(),
        token_of_row: slots.token_of_row.address(),
        used: slots.used.address(),
        hand: slots.hand.address(),
        list: 0,
        list_end: 0,
        kv: kv.address(),
        from: 0,
        to: 0,
        num_fetch: 0,
        counters: slots.counters.address(),
        list_each: 0,
        retrieved: word("retrieved", units.most)?,
        row_bytes: word("row", shape.row_len() * size_of::<E>())?,
        num_rows: word("rows", num_rows)?,
        num_tokens: word("tokens", num_tokens)?,
        unit_shift: if units.unit == FoundUnit::Pages { 4 } else { 0 },
        ahead: 1,
    })
}

fn launch(stream: &Stream, items: usize, params: &ResolveParams) -> Result<(), DeviceError> {
    let kernel = stream.device().kernel("cache_resolve", "cache_resolve", 0)?;
    let launch = Launch { blocks: (word("items", items)?, 1), threads: 512, shared_bytes: 0 };
    // SAFETY: the layouts match, every buffer has the checked shape, host addresses come from the chunk table, and the kernel begins
    // by waiting for earlier ones.
    unsafe { kernel.launch_early(stream, launch, Together::ALONE, params) }
}

/// Blocks that bring listed rows. Each fills a multiprocessor by itself, and tails leave four free. They get nine tenths of what any
/// number of blocks gets out of host memory (18 GB/s in rows of 512 bytes on an H100), and as much as those beside a tail (13).
const FETCH_BLOCKS: u32 = 4;
/// Warps of such a block at most, and bytes that each has under way, as in `cache_resolve.cu`.
const FETCH_WARPS: u32 = 32;
const FETCH_BYTES: u32 = 8 * 512;

/// Brings the listed rows into `kv` [rows, 2, head_dim].
///
/// The addresses were written by [`resolve`], which takes them from the chunk table and never beyond it.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn fetch_listed<E: DeviceElem>(
    stream: &Stream,
    head_dim: usize,
    list: &FetchList<'_>,
    kv: DevMut<'_, E>,
) -> Result<(), DeviceError> {
    list.to.check("to", list.from.len())?;
    list.num.check("num", 1)?;
    check_aligned("kv", kv.address())?;
    let params = FetchListedParams {
        from: list.from.address(),
        to: list.to.address(),
        num: list.num.address(),
        kv: kv.address(),
        row_bytes: word("head_dim", 2 * head_dim * size_of::<E>())?,
        limit: word("list", list.from.len())?,
    };
    // Some devices have less shared memory than that.
    let most = word("shared memory", stream.device().properties().shared_bytes_max)?;
    let warps = (most / FETCH_BYTES).clamp(1, FETCH_WARPS);
    let shared_bytes = warps * FETCH_BYTES;
    let kernel = stream.device().kernel("cache_resolve", "cache_fetch", shared_bytes)?;
    let launch = Launch { blocks: (FETCH_BLOCKS, 1), threads: warps * 32, shared_bytes };
    // SAFETY: the layouts match; the list's entries are addresses of rows in mapped chunks and rows of kv; the kernel begins by
    // waiting for earlier ones.
    unsafe { kernel.launch_early(stream, launch, Together::ALONE, &params) }
}
