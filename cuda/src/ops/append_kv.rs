//! Launcher of `append_kv`.

use super::{DeviceElem, check_aligned, word};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream};

/// Mirrors `floe::AppendParams`.
#[repr(C)]
struct AppendParams {
    k: u64,
    v: u64,
    to: u64,
    kv: u64,
    fault: u64,
    rows: u32,
    pieces: u32,
    num_rows: u32,
}

/// New rows and where they go.
#[derive(Debug, Clone, Copy)]
pub struct NewRows<'a, E> {
    /// Keys [rows, head_dim]; device.
    pub k: DevRef<'a, E>,
    /// Values [rows, head_dim]; device.
    pub v: DevRef<'a, E>,
    /// Row of `kv` for each, none twice, or [`NewRows::NOWHERE`] to leave it out, `[rows]`; device.
    pub to: DevRef<'a, u32>,
}

impl<E> NewRows<'_, E> {
    /// Place of a row that is not written: of a sequence that is absent this step.
    pub const NOWHERE: u32 = u32::MAX;
}

/// Writes new keys and values as rows of `kv` [num_rows, 2, head_dim], bit for bit. `head_dim` is a multiple of 8.
///
/// # Errors
/// Shapes that do not fit each other; what the driver reports.
pub fn append_kv<E: DeviceElem>(
    stream: &Stream,
    new: &NewRows<'_, E>,
    head_dim: usize,
    kv: DevMut<'_, E>,
) -> Result<(), DeviceError> {
    if head_dim == 0 || !head_dim.is_multiple_of(8) {
        return Err(DeviceError::Unsupported {
            field: "head_dim",
            value: head_dim,
            expected: "a multiple of 8",
        });
    }
    let rows = new.to.len();
    new.k.check("k", rows * head_dim)?;
    new.v.check("v", rows * head_dim)?;
    let num_rows = kv.len() / (2 * head_dim);
    kv.check("kv", num_rows * 2 * head_dim)?;
    for (field, address) in [("k", new.k.address()), ("v", new.v.address()), ("kv", kv.address())] {
        check_aligned(field, address)?;
    }
    let params = AppendParams {
        k: new.k.address(),
        v: new.v.address(),
        to: new.to.address(),
        kv: kv.address(),
        fault: stream.device().fault_address(),
        rows: word("rows", rows)?,
        pieces: word("head_dim", head_dim / 8)?,
        num_rows: word("kv", num_rows)?,
    };
    let pieces = word("rows", rows * head_dim / 4)?;
    let kernel = stream.device().kernel("append_kv", "append_kv", 0)?;
    let launch = Launch { blocks: (pieces.div_ceil(128), 1), threads: 128, shared_bytes: 0 };
    // SAFETY: the layouts match and every buffer has the checked shape.
    unsafe { kernel.launch(stream, launch, &params) }
}
