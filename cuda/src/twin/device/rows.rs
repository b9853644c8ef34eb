//! Twins of the device kernels that move rows: `append_kv`, `fetch_pages`, `fetch_rows`.

use crate::rows::check_len;
use crate::{KernelError, KvElem};

/// Place of a row, or source of a unit, that is left out.
pub const NOWHERE: u32 = u32::MAX;

/// Writes `k[i]` and `v[i]` [rows, head_dim] to row `to[i]` of `kv` [num_rows, 2, head_dim]; rows bound for [`NOWHERE`] are left out.
///
/// # Errors
/// Shapes that do not fit each other, rows outside `kv`.
pub fn append_rows<E: KvElem>(k: &[E], v: &[E], to: &[u32], kv: &mut [E]) -> Result<(), KernelError> {
    let d = k.len().checked_div(to.len()).unwrap_or(0);
    if d == 0 && !to.is_empty() {
        return Err(KernelError::EmptyHead);
    }
    check_len("k", k.len(), to.len() * d)?;
    check_len("v", v.len(), k.len())?;
    for (i, &row) in to.iter().enumerate().filter(|(_, row)| **row != NOWHERE) {
        let at = row as usize * 2 * d;
        let num_rows = kv.len() / (2 * d);
        let place = kv.get_mut(at..at + 2 * d).ok_or(KernelError::Row { row, num_rows })?;
        place[..d].copy_from_slice(&k[i * d..(i + 1) * d]);
        place[d..].copy_from_slice(&v[i * d..(i + 1) * d]);
    }
    Ok(())
}

/// Copies unit `from[i]` of `host`, unless that is [`NOWHERE`], to unit `slot[i]` of `kv`; a unit is `unit_len` elements.
///
/// # Errors
/// Lists of different length, units outside `host` or `kv`.
pub fn fetch_units<E: KvElem>(
    host: &[E],
    unit_len: usize,
    from: &[u32],
    slot: &[u32],
    kv: &mut [E],
) -> Result<(), KernelError> {
    check_len("slot", slot.len(), from.len())?;
    for (&from, &slot) in from.iter().zip(slot).filter(|(from, _)| **from != NOWHERE) {
        let unit = |index: u32| index as usize * unit_len..(index as usize + 1) * unit_len;
        let outside = |row, len: usize| KernelError::Row { row, num_rows: len / unit_len.max(1) };
        let source = host.get(unit(from)).ok_or_else(|| outside(from, host.len()))?;
        let len = kv.len();
        kv.get_mut(unit(slot)).ok_or_else(|| outside(slot, len))?.copy_from_slice(source);
    }
    Ok(())
}
