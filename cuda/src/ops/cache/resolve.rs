//! Launchers of `cache_resolve` and `cache_fetch`: rows for the tokens of a step, and the rows that are missing.

use super::{CacheParams, Tables};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream, Together};
use crate::ops::{DeviceElem, Spans, check_aligned, word};

/// Tokens that a step may retrieve for an item at most, as in `cache_resolve.cu`.
pub const RETRIEVED_MAX: usize = 4096;

/// Blocks of a fetch: the link is full from 32 blocks on.
const FETCH_BLOCKS: u32 = 64;

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
}

/// Mirrors `floe::FetchListedParams`.
#[repr(C)]
struct FetchListedParams {
    from: u64,
    to: u64,
    num: u64,
    kv: u64,
    pieces: u32,
    limit: u32,
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
    /// Rows found in slots and rows fetched, since they were last cleared.
    pub counters: DevMut<'a, u64>,
}

/// Rows to bring from host memory; device.
#[derive(Debug)]
pub struct FetchList<'a> {
    /// Host-mapped addresses.
    pub from: DevMut<'a, u64>,
    /// Rows they go to, as many.
    pub to: DevMut<'a, u32>,
    /// How many, one word.
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

/// Lists the rows of sinks, newest tokens and retrieved tokens of each item, and what has to be fetched before they are read.
/// `row_len` elements of `E` a row, `num_rows` rows on the device.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn resolve<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    step: Resolve<'_>,
    slots: Slots<'_>,
    fetch: &mut FetchList<'_>,
) -> Result<(), DeviceError> {
    let (shape, items) = (tables.shape, tables.items());
    if step.retrieved > RETRIEVED_MAX {
        return Err(DeviceError::Unsupported {
            field: "retrieved",
            value: step.retrieved,
            expected: "at most 4096",
        });
    }
    step.whole.first.check("row_first", items)?;
    step.whole.end.check("row_end", items)?;
    step.spans.first.check("found_first", items)?;
    step.spans.end.check("found_end", items)?;
    let list_each = shape.fixed_max() + step.retrieved;
    step.list.check("list", items * list_each)?;
    step.list_end.check("list_end", items)?;
    let (num_rows, num_tokens) = (slots.used.len(), slots.row_of_token.len());
    slots.token_of_row.check("token_of_row", num_rows)?;
    slots.hand.check("hand", tables.sequences.len() * shape.heads)?;
    slots.counters.check("counters", 2)?;
    fetch.from.check("from", items * step.retrieved)?;
    fetch.to.check("to", items * step.retrieved)?;
    fetch.num.check("num_fetch", 1)?;
    let params = ResolveParams {
        cache: tables.params()?,
        row_first: step.whole.first.address(),
        row_end: step.whole.end.address(),
        found_first: step.spans.first.address(),
        found_end: step.spans.end.address(),
        found: step.found.address(),
        row_of_token: slots.row_of_token.address(),
        token_of_row: slots.token_of_row.address(),
        used: slots.used.address(),
        hand: slots.hand.address(),
        list: step.list.address(),
        list_end: step.list_end.address(),
        from: fetch.from.address(),
        to: fetch.to.address(),
        num_fetch: fetch.num.address(),
        counters: slots.counters.address(),
        list_each: word("list", list_each)?,
        retrieved: word("retrieved", step.retrieved)?,
        row_bytes: word("row", shape.row_len() * size_of::<E>())?,
        num_rows: word("rows", num_rows)?,
        num_tokens: word("tokens", num_tokens)?,
        unit_shift: if step.unit == FoundUnit::Pages { 4 } else { 0 },
    };
    let kernel = stream.device().kernel("cache_resolve", "cache_resolve", 0)?;
    let launch = Launch { blocks: (word("items", items)?, 1), threads: 512, shared_bytes: 0 };
    // SAFETY: the layouts match, every buffer has the checked shape, and the kernel begins by waiting for earlier ones.
    unsafe { kernel.launch_early(stream, launch, Together::ALONE, &params) }
}

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
        pieces: word("head_dim", 2 * head_dim * size_of::<E>() / 16)?,
        limit: word("list", list.from.len())?,
    };
    let kernel = stream.device().kernel("cache_resolve", "cache_fetch", 0)?;
    let launch = Launch { blocks: (FETCH_BLOCKS, 1), threads: 256, shared_bytes: 0 };
    // SAFETY: the layouts match; the list's entries are addresses of rows in mapped chunks and rows of kv; the kernel begins by
    // waiting for earlier ones.
    unsafe { kernel.launch_early(stream, launch, Together::ALONE, &params) }
}
