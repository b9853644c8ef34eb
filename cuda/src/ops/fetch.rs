//! Launchers of the gather from host memory: pages or rows.

use super::{DeviceElem, PAGE_ROWS, check_aligned, word};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream, Together};

/// Blocks of a launch at most. The link is full from 32 blocks on; more only take multiprocessors from other work.
const BLOCKS_MAX: u32 = 64;
/// Warps of a block, as in `fetch.cu`.
const WARPS: u32 = 8;
/// 16-byte pieces that a warp takes at a time, as in `fetch.cu`.
const WARP_PIECES: u32 = 128;

/// Mirrors `floe::FetchParams`.
#[repr(C)]
struct FetchParams {
    host: u64,
    kv: u64,
    from: u64,
    slot: u64,
    num: u64,
    fault: u64,
    units: u32,
    pieces: u32,
    host_units: u32,
    num_units: u32,
}

/// What to bring where; a unit is a page or a row.
#[derive(Debug, Clone, Copy)]
pub struct Fetch<'a, E> {
    /// [host_units, rows of a unit, 2, head_dim] E; host-mapped.
    pub host: DevRef<'a, E>,
    /// Units of `host`, or [`Fetch::NOWHERE`] to leave one out, `[units]`; device.
    pub from: DevRef<'a, u32>,
    /// Units of `kv`, none twice, `[units]`; device.
    pub slot: DevRef<'a, u32>,
    /// How many of the listed units count, one word; device. `None`: all.
    pub num: Option<DevRef<'a, u32>>,
}

impl<E> Fetch<'_, E> {
    /// Source of a unit that is not copied.
    pub const NOWHERE: u32 = u32::MAX;
}

/// Copies pages of 16 rows from host memory into slots of `kv` [num_rows, 2, head_dim]. One launch for all heads of a layer.
///
/// # Errors
/// Shapes that do not fit each other; what the driver reports.
pub fn fetch_pages<E: DeviceElem>(
    stream: &Stream,
    fetch: &Fetch<'_, E>,
    head_dim: usize,
    kv: DevMut<'_, E>,
) -> Result<(), DeviceError> {
    launch(stream, fetch, PAGE_ROWS * 2 * head_dim, kv)
}

/// Copies single rows from host memory into rows of `kv` [num_rows, 2, head_dim].
///
/// # Errors
/// As [`fetch_pages`].
pub fn fetch_rows<E: DeviceElem>(
    stream: &Stream,
    fetch: &Fetch<'_, E>,
    head_dim: usize,
    kv: DevMut<'_, E>,
) -> Result<(), DeviceError> {
    launch(stream, fetch, 2 * head_dim, kv)
}

fn launch<E: DeviceElem>(
    stream: &Stream,
    fetch: &Fetch<'_, E>,
    unit_len: usize,
    kv: DevMut<'_, E>,
) -> Result<(), DeviceError> {
    if unit_len == 0 || !unit_len.is_multiple_of(16) {
        return Err(DeviceError::Unsupported {
            field: "head_dim",
            value: unit_len,
            expected: "a multiple of 8",
        });
    }
    let units = fetch.from.len();
    fetch.slot.check("slot", units)?;
    if let Some(num) = fetch.num {
        num.check("num", 1)?;
    }
    let (host_units, num_units) = (fetch.host.len() / unit_len, kv.len() / unit_len);
    fetch.host.check("host", host_units * unit_len)?;
    kv.check("kv", num_units * unit_len)?;
    check_aligned("host", fetch.host.address())?;
    check_aligned("kv", kv.address())?;
    let params = FetchParams {
        host: fetch.host.address(),
        kv: kv.address(),
        from: fetch.from.address(),
        slot: fetch.slot.address(),
        num: fetch.num.map_or(0, |num| num.address()),
        fault: stream.device().fault_address(),
        units: word("units", units)?,
        pieces: word("head_dim", unit_len / 8)?,
        host_units: word("host", host_units)?,
        num_units: word("kv", num_units)?,
    };
    let kernel = stream.device().kernel("fetch", "fetch", 0)?;
    // Pieces are numbered through all units; the kernel steps beyond the last by less than this.
    word("units", units * unit_len / 8 + (BLOCKS_MAX * WARPS * WARP_PIECES) as usize)?;
    let blocks = (params.units * params.pieces).div_ceil(WARP_PIECES * WARPS).min(BLOCKS_MAX);
    let launch = Launch { blocks: (blocks, 1), threads: WARPS * 32, shared_bytes: 0 };
    // SAFETY: the layouts match, every buffer has the checked shape, and the kernel begins by waiting for earlier ones.
    unsafe { kernel.launch_early(stream, launch, Together { layers: 1, cluster: 1 }, &params) }
}
