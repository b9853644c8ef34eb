//! Launchers of `cache_resolve` and `cache_fetch`: rows for the tokens of a step, and the rows that are missing.

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
    /// Rows found in slots, rows fetched, and rows fetched ahead, since they were last cleared.
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
    step.whole.first.check("row_first", items)?;
    step.whole.end.check("row_end", items)?;
    let list_each = shape.fixed_max() + step.retrieved;
    step.list.check("list", items * list_each)?;
    step.list_end.check("list_end", items)?;
    let ahead = Ahead { spans: step.spans, found: step.found, unit: step.unit, most: step.retrieved };
    let params = ResolveParams {
        row_first: step.whole.first.address(),
        row_end: step.whole.end.address(),
        list: step.list.address(),
        list_end: step.list_end.address(),
        list_each: word("list", list_each)?,
        ahead: 0,
        ..params::<E>(tables, &ahead, &slots, fetch)?
    };
    launch(stream, items, &params)
}

/// Gives slots to tokens that a later step may want, and lists what has to be fetched into them. Runs behind the step's own
/// [`resolve`], which goes before: only slots that were last used earlier than a step ago are given away, so a token may get none.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn resolve_ahead<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    ahead: Ahead<'_>,
    slots: Slots<'_>,
    fetch: &mut FetchList<'_>,
) -> Result<(), DeviceError> {
    launch(stream, tables.items(), &params::<E>(tables, &ahead, &slots, fetch)?)
}

/// Of [`resolve_ahead`].
fn params<E: DeviceElem>(
    tables: &Tables<'_>,
    ahead: &Ahead<'_>,
    slots: &Slots<'_>,
    fetch: &FetchList<'_>,
) -> Result<ResolveParams, DeviceError> {
    let (shape, items) = (tables.shape, tables.items());
    if ahead.most > RETRIEVED_MAX {
        return Err(DeviceError::Unsupported {
            field: "retrieved",
            value: ahead.most,
            expected: "at most 4096",
        });
    }
    ahead.spans.first.check("found_first", items)?;
    ahead.spans.end.check("found_end", items)?;
    let (num_rows, num_tokens) = (slots.used.len(), slots.row_of_token.len());
    slots.token_of_row.check("token_of_row", num_rows)?;
    slots.hand.check("hand", tables.sequences.len() * shape.heads)?;
    slots.counters.check("counters", 3)?;
    fetch.from.check("from", items * ahead.most)?;
    fetch.to.check("to", items * ahead.most)?;
    fetch.num.check("num_fetch", 1)?;
    Ok(ResolveParams {
        cache: tables.params()?,
        row_first: 0,
        row_end: 0,
        found_first: ahead.spans.first.address(),
        found_end: ahead.spans.end.address(),
        found: ahead.found.address(),
        row_of_token: slots.row_of_token.address(),
        token_of_row: slots.token_of_row.address(),
        used: slots.used.address(),
        hand: slots.hand.address(),
        list: 0,
        list_end: 0,
        from: fetch.from.address(),
        to: fetch.to.address(),
        num_fetch: fetch.num.address(),
        counters: slots.counters.address(),
        list_each: 0,
        retrieved: word("retrieved", ahead.most)?,
        row_bytes: word("row", shape.row_len() * size_of::<E>())?,
        num_rows: word("rows", num_rows)?,
        num_tokens: word("tokens", num_tokens)?,
        unit_shift: if ahead.unit == FoundUnit::Pages { 4 } else { 0 },
        ahead: 1,
    })
}

fn launch(stream: &Stream, items: usize, params: &ResolveParams) -> Result<(), DeviceError> {
    let kernel = stream.device().kernel("cache_resolve", "cache_resolve", 0)?;
    let launch = Launch { blocks: (word("items", items)?, 1), threads: 512, shared_bytes: 0 };
    // SAFETY: the layouts match, every buffer has the checked shape, and the kernel begins by waiting for earlier ones.
    unsafe { kernel.launch_early(stream, launch, Together::ALONE, params) }
}

/// What a fetch takes for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchPace {
    /// The link: a step waits for it. It is full from 32 blocks on.
    Full,
    /// A few blocks, so that steps beside it find places on the device and on the link.
    Beside,
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
    (list, pace): (&FetchList<'_>, FetchPace),
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
    let blocks = if pace == FetchPace::Full { 64 } else { 8 };
    let launch = Launch { blocks: (blocks, 1), threads: 256, shared_bytes: 0 };
    // SAFETY: the layouts match; the list's entries are addresses of rows in mapped chunks and rows of kv; the kernel begins by
    // waiting for earlier ones.
    unsafe { kernel.launch_early(stream, launch, Together::ALONE, &params) }
}
