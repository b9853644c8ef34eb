//! Where keys and values lie, and moving rows about.

use std::any::TypeId;
use std::ops::Range;

use crate::{KernelError, KvElem};

/// Keys and values of one shard in host memory. A row is `K[head_dim]` followed by `V[head_dim]`.
///
/// Any alignment works; slabs that start on a cache line (64 bytes) and rows of whole lines are read fastest: 256 scattered
/// rows of 512 bytes took 7.6 us from aligned and 11.8 us from misaligned memory. A long run reads equally fast from both.
pub trait KvRows: Sync {
    /// Element type of keys and values.
    type Elem: KvElem;

    /// Dimensions of a key and of a value; at least 1.
    fn head_dim(&self) -> usize;

    /// Rows that exist.
    fn num_rows(&self) -> usize;

    /// The rows from `first` (below `num_rows`) to the end of the slab that holds it, [n, 2, head_dim] with n at least 1.
    /// It may hold elements past `num_rows`; kernels do not read those.
    fn run(&self, first: usize) -> &[Self::Elem];
}

/// Which rows of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rows<'a> {
    /// Half-open.
    Range(Range<usize>),
    /// Strictly ascending.
    List(&'a [u32]),
}

impl Rows<'_> {
    /// Number of rows.
    pub fn len(&self) -> usize {
        match self {
            Self::Range(range) => range.len(),
            Self::List(list) => list.len(),
        }
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row at place `i`, which lies below `len`.
    pub(crate) fn at(&self, i: usize) -> usize {
        match self {
            Self::Range(range) => range.start + i,
            Self::List(list) => list[i] as usize,
        }
    }

    /// Refuses rows outside `0..num_rows` and lists that are not strictly ascending.
    pub(crate) fn check(&self, num_rows: usize) -> Result<(), KernelError> {
        match self {
            Self::Range(range) => check_range(range, num_rows),
            Self::List(list) => {
                for (i, pair) in list.windows(2).enumerate() {
                    if pair[0] >= pair[1] {
                        return Err(KernelError::Order { at: i + 1, previous: pair[0], next: pair[1] });
                    }
                }
                match list.last() {
                    Some(&row) if row as usize >= num_rows => Err(KernelError::Row { row, num_rows }),
                    _ => Ok(()),
                }
            }
        }
    }
}

/// Refuses a range that is reversed or leaves `0..num_rows`.
pub(crate) fn check_range(range: &Range<usize>, num_rows: usize) -> Result<(), KernelError> {
    if range.start > range.end || range.end > num_rows {
        return Err(KernelError::Range { start: range.start, end: range.end, num_rows });
    }
    Ok(())
}

/// A run from `first`, refused unless it is a whole, non-zero number of rows.
pub(crate) fn checked_run<R: KvRows>(rows: &R, first: usize) -> Result<&[R::Elem], KernelError> {
    let row_len = 2 * rows.head_dim();
    let run = rows.run(first);
    if run.is_empty() || !run.len().is_multiple_of(row_len) {
        return Err(KernelError::Run { first, len: run.len(), row_len });
    }
    Ok(run)
}

/// Key `[head_dim]` and value `[head_dim]` of one row.
pub(crate) type KeyValue<'a, E> = (&'a [E], &'a [E]);

/// Key and value of `row`, which lies below `num_rows`.
pub(crate) fn key_value<R: KvRows>(rows: &R, row: usize) -> Result<KeyValue<'_, R::Elem>, KernelError> {
    let d = rows.head_dim();
    Ok(checked_run(rows, row)?[..2 * d].split_at(d))
}

/// Rows in one slice: the simplest [`KvRows`].
#[derive(Debug, Clone, Copy)]
pub struct SliceRows<'a, E> {
    data: &'a [E],
    head_dim: usize,
}

impl<'a, E: KvElem> SliceRows<'a, E> {
    /// Rows over `data` [num_rows, 2, head_dim].
    ///
    /// # Errors
    /// `head_dim` 0, or a length that is not a whole number of rows.
    pub fn new(data: &'a [E], head_dim: usize) -> Result<Self, KernelError> {
        if head_dim == 0 {
            return Err(KernelError::EmptyHead);
        }
        let row_len = 2 * head_dim;
        if !data.len().is_multiple_of(row_len) {
            return Err(KernelError::Run { first: 0, len: data.len(), row_len });
        }
        Ok(Self { data, head_dim })
    }
}

impl<E: KvElem> KvRows for SliceRows<'_, E> {
    type Elem = E;

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_rows(&self) -> usize {
        self.data.len() / (2 * self.head_dim)
    }

    fn run(&self, first: usize) -> &[E] {
        &self.data[first * 2 * self.head_dim..]
    }
}

/// Writes `n` new rows: `k` and `v`, each [n, head_dim], into `out` [n, 2, head_dim].
///
/// Elements of the same type are moved bit for bit; others pass through f32 and are rounded to nearest, ties to even.
///
/// # Errors
/// `head_dim` 0, `k` not a whole number of heads, `v` or `out` of another length than `k` asks for.
pub fn append_kv<S: KvElem, D: KvElem>(
    k: &[S],
    v: &[S],
    head_dim: usize,
    out: &mut [D],
) -> Result<(), KernelError> {
    if head_dim == 0 {
        return Err(KernelError::EmptyHead);
    }
    let whole = k.len() - k.len() % head_dim;
    check_len("k", k.len(), whole)?;
    check_len("v", v.len(), k.len())?;
    check_len("out", out.len(), 2 * k.len())?;
    for ((k, v), row) in
        k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).zip(out.chunks_exact_mut(2 * head_dim))
    {
        let (k_out, v_out) = row.split_at_mut(head_dim);
        convert(k, k_out);
        convert(v, v_out);
    }
    Ok(())
}

/// `src` to `dst` of the same length.
fn convert<S: KvElem, D: KvElem>(src: &[S], dst: &mut [D]) {
    if TypeId::of::<S>() == TypeId::of::<D>() {
        dst.copy_from_slice(bytemuck::cast_slice(src));
        return;
    }
    for (d, s) in dst.iter_mut().zip(src) {
        *d = D::from_f32(s.to_f32());
    }
}

/// Copies chosen rows, in order, to `out` [which.len(), 2, head_dim], bit for bit.
///
/// # Errors
/// Rows outside the shard, a list that is not ascending, `out` of another length.
pub fn gather_rows<R: KvRows>(rows: &R, which: &Rows<'_>, out: &mut [R::Elem]) -> Result<(), KernelError> {
    let row_len = 2 * rows.head_dim();
    if row_len == 0 {
        return Err(KernelError::EmptyHead);
    }
    which.check(rows.num_rows())?;
    check_len("out", out.len(), which.len() * row_len)?;
    for (i, dst) in out.chunks_exact_mut(row_len).enumerate() {
        dst.copy_from_slice(&checked_run(rows, which.at(i))?[..row_len]);
    }
    Ok(())
}

/// Refuses a buffer of another length than its shape asks for.
pub(crate) fn check_len(field: &'static str, len: usize, expected: usize) -> Result<(), KernelError> {
    if len != expected {
        return Err(KernelError::Length { field, len, expected });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn append_kv_of_same_type_moves_bits_and_of_another_rounds_to_nearest_even() {
        let quiet = bf16::from_bits(0x7fc1);
        let (k, v) = ([quiet, bf16::from_bits(1)], [bf16::NEG_ZERO, bf16::MAX]);
        let mut rows = [bf16::ZERO; 4];
        append_kv(&k, &v, 1, &mut rows).unwrap();
        assert_eq!(rows.map(bf16::to_bits), [k[0], v[0], k[1], v[1]].map(bf16::to_bits));

        // Half way between 1 and the next bf16, and between that and its successor.
        let mut rounded = [bf16::ZERO; 2];
        append_kv(&[1.0 + 1.0 / 256.0f32], &[1.0 + 3.0 / 256.0], 1, &mut rounded).unwrap();
        assert_eq!(rounded.map(bf16::to_f32), [1.0, 1.0 + 4.0 / 256.0]);

        let mut half = [f16::ZERO; 2];
        append_kv(&[bf16::from_f32(1.5)], &[bf16::from_f32(1e9)], 1, &mut half).unwrap();
        assert_eq!(half, [f16::from_f32(1.5), f16::INFINITY]);
    }

    #[test]
    fn append_kv_of_wrong_sizes_is_an_error_that_names_the_buffer() {
        let x = [0f32; 8];
        let mut out = [0f32; 8];
        assert_eq!(append_kv(&x[..4], &x[..4], 0, &mut out), Err(KernelError::EmptyHead));
        let error = |field, len, expected| Err(KernelError::Length { field, len, expected });
        assert_eq!(append_kv(&x[..5], &x[..5], 2, &mut out), error("k", 5, 4));
        assert_eq!(append_kv(&x[..4], &x[..6], 2, &mut out), error("v", 6, 4));
        assert_eq!(append_kv(&x[..2], &x[..2], 2, &mut out), error("out", 8, 4));
    }

    #[test]
    fn gather_rows_copies_listed_rows_bit_for_bit() {
        let data: Vec<f32> = (0..24).map(|i| f32::from_bits(0x7fc0_0000 + i)).collect();
        let rows = SliceRows::new(&data, 2).unwrap();
        let mut out = [0.0; 8];
        gather_rows(&rows, &Rows::List(&[1, 5]), &mut out).unwrap();
        let want: Vec<u32> = data[4..8].iter().chain(&data[20..]).map(|x| x.to_bits()).collect();
        assert_eq!(out.map(f32::to_bits).to_vec(), want);
        assert_eq!(
            gather_rows(&rows, &Rows::List(&[6]), &mut out),
            Err(KernelError::Row { row: 6, num_rows: 6 })
        );
        let error = gather_rows(&rows, &Rows::Range(0..3), &mut out);
        assert_eq!(error, Err(KernelError::Length { field: "out", len: 8, expected: 12 }));
    }
}
