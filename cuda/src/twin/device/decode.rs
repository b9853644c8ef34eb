//! Twin of the device kernels `dense_decode`, `sparse_decode` and `fetch_attend`: attention over the rows that lists name.

use crate::rows::{check_len, check_range};
use crate::twin::StateF64;
use crate::{AttendParams, KernelError, KvElem};

/// Queries and rows of all items in host memory.
#[derive(Debug, Clone, Copy)]
pub struct HostKv<'a, E> {
    /// [items, group, head_dim].
    pub q: &'a [E],
    /// [num_rows, 2, head_dim].
    pub kv: &'a [E],
    /// Query heads of an item.
    pub group: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Scale and softcap.
    pub params: AttendParams,
}

/// Per item a half-open range, of entries or of rows; both `[items]`.
#[derive(Debug, Clone, Copy)]
pub struct HostSpans<'a> {
    /// First.
    pub first: &'a [u32],
    /// One past the last.
    pub end: &'a [u32],
}

/// How an item's span names rows.
#[derive(Debug, Clone, Copy)]
pub enum TileRows<'a> {
    /// The span is of rows.
    Range,
    /// The span is of these rows.
    Rows(&'a [u32]),
    /// The span is of pages of 16 rows, of which bit `r` of the page's mask says whether row `r` counts.
    Pages {
        /// Slots of pages.
        slots: &'a [u32],
        /// One mask per slot, or none: all rows.
        masks: Option<&'a [u16]>,
    },
}

impl TileRows<'_> {
    /// Rows of a span, in its order.
    fn of(&self, first: usize, end: usize) -> Result<Vec<usize>, KernelError> {
        let (len, span) = (|n: usize| check_range(&(first..end), n), first..end);
        Ok(match self {
            Self::Range => span.collect(),
            Self::Rows(rows) => {
                len(rows.len())?;
                rows[span].iter().map(|&row| row as usize).collect()
            }
            Self::Pages { slots, masks } => {
                len(slots.len())?;
                span.flat_map(|entry| {
                    let mask = masks.map_or(u16::MAX, |masks| masks[entry]);
                    let slot = slots[entry] as usize;
                    (0..16).filter(move |r| mask >> r & 1 == 1).map(move |r| 16 * slot + r)
                })
                .collect()
            }
        })
    }
}

/// States of all items: `out` [items, group, head_dim], `lse` [items, group].
///
/// # Errors
/// Shapes that do not fit each other, spans outside the lists, rows outside `kv`.
pub fn decode_lists<E: KvElem>(
    host: &HostKv<'_, E>,
    spans: HostSpans<'_>,
    rows: &TileRows<'_>,
) -> Result<StateF64, KernelError> {
    let (d, group, items) = (host.head_dim, host.group, spans.first.len());
    if d == 0 {
        return Err(KernelError::EmptyHead);
    }
    check_len("end", spans.end.len(), items)?;
    check_len("q", host.q.len(), items * group * d)?;
    let num_rows = host.kv.len() / (2 * d);
    let mut state =
        StateF64 { out: vec![0.0; items * group * d], lse: vec![f64::NEG_INFINITY; items * group] };
    for item in 0..items {
        let listed = rows.of(spans.first[item] as usize, spans.end[item] as usize)?;
        if let Some(&row) = listed.iter().find(|&&row| row >= num_rows) {
            return Err(KernelError::Row { row: row as u32, num_rows });
        }
        for head in item * group..(item + 1) * group {
            let q = &host.q[head * d..(head + 1) * d];
            state.lse[head] = head_state(host, q, &listed, &mut state.out[head * d..(head + 1) * d]);
        }
    }
    Ok(state)
}

/// One head: writes `out`, returns lse.
fn head_state<E: KvElem>(host: &HostKv<'_, E>, q: &[E], rows: &[usize], out: &mut [f64]) -> f64 {
    let d = host.head_dim;
    let wide = |x: &E| f64::from(x.to_f32());
    let scores: Vec<f64> = rows
        .iter()
        .map(|&row| {
            let key = &host.kv[2 * row * d..][..d];
            let dot: f64 = q.iter().zip(key).map(|(q, k)| wide(q) * wide(k)).sum();
            let scaled = dot * f64::from(host.params.scale);
            host.params.softcap.map_or(scaled, |cap| f64::from(cap) * (scaled / f64::from(cap)).tanh())
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return max;
    }
    let mut sum = 0.0;
    for (&row, score) in rows.iter().zip(&scores) {
        let weight = (score - max).exp();
        sum += weight;
        for (o, v) in out.iter_mut().zip(&host.kv[(2 * row + 1) * d..][..d]) {
            *o += weight * wide(v);
        }
    }
    out.iter_mut().for_each(|o| *o /= sum);
    max + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_masks_and_row_lists_name_the_same_rows() {
        let kv: Vec<f32> = (0..48 * 4).map(|i| (i % 13) as f32 - 6.0).collect();
        let params = AttendParams { scale: 0.5, softcap: Some(5.0) };
        let host = HostKv { q: &[1.0, -0.5, 0.25, 2.0], kv: &kv, group: 2, head_dim: 2, params };
        let spans = |end| HostSpans { first: &[0], end };
        let pages = TileRows::Pages { slots: &[2, 0], masks: Some(&[0b101, 0x8000]) };
        let by_page = decode_lists(&host, spans(&[2]), &pages).unwrap();
        let by_row = decode_lists(&host, spans(&[3]), &TileRows::Rows(&[32, 34, 15])).unwrap();
        assert_eq!((&by_page.out, &by_page.lse), (&by_row.out, &by_row.lse));
        assert!(decode_lists(&host, spans(&[1]), &TileRows::Rows(&[48])).is_err());
    }
}
