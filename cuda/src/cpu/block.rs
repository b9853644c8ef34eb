//! A few rows at a time: where each lies, and the rows that come next.

use super::simd::{LINE, prefetch};
use crate::rows::checked_run;
use crate::{KernelError, KvRows, Rows};

/// Most rows of a block. Also the rows of a block of short rows.
pub(super) const BLOCK_ROWS_MAX: usize = 64;
/// Rows of a block are a multiple of this: the most that one register tile scores at once.
pub(super) const TILE_ROWS_MAX: usize = 16;
/// Bytes of a block: it and the one being prefetched fit in 48 KiB of first-level cache beside the queries and sums.
const BLOCK_BYTES: usize = 16 << 10;

/// Places of up to [`BLOCK_ROWS_MAX`] rows, each [2, head_dim].
pub(super) struct Block<'a, E> {
    rows: [&'a [E]; BLOCK_ROWS_MAX],
    /// Rows that count.
    num: usize,
    /// Elements of every row.
    row_len: usize,
}

impl<'a, E> Block<'a, E> {
    pub fn empty() -> Self {
        Self { rows: [&[]; BLOCK_ROWS_MAX], num: 0, row_len: 0 }
    }

    /// Number of rows that count.
    pub fn len(&self) -> usize {
        self.num
    }

    /// Elements of every row; 0 before the block was first filled.
    pub fn row_len(&self) -> usize {
        self.row_len
    }

    /// Asks for the first line of every row, all at once: rows lie on few or many pages, and address translations that
    /// miss run side by side here but one after the other where each is asked for between other work.
    pub fn touch(&self) {
        for row in &self.rows[..self.num] {
            prefetch(row.as_ptr());
        }
    }

    /// Asks for every line of every row: for the first block, which nothing has prefetched.
    pub fn fetch(&self) {
        self.touch();
        for row in &self.rows[..self.num] {
            for line in (LINE..size_of_val(*row)).step_by(LINE) {
                prefetch(row.as_ptr().cast::<u8>().wrapping_add(line));
            }
        }
    }

    /// All places, also of rows that do not count: what to prefetch.
    pub fn places(&self) -> &[&'a [E]; BLOCK_ROWS_MAX] {
        &self.rows
    }

    /// The rows that count, then the last of them again up to a multiple of [`TILE_ROWS_MAX`]; none if there are none.
    pub fn padded(&self) -> &[&'a [E]] {
        &self.rows[..self.num.next_multiple_of(TILE_ROWS_MAX)]
    }
}

/// Rows of a block whose rows have `row_bytes`.
pub(super) fn block_rows(row_bytes: usize) -> usize {
    let rows = BLOCK_BYTES / row_bytes.max(1);
    (rows - rows % TILE_ROWS_MAX).clamp(TILE_ROWS_MAX, BLOCK_ROWS_MAX)
}

/// Walks over chosen rows, block by block.
pub(super) struct Blocks<'a, 'w, R: KvRows> {
    rows: &'a R,
    which: &'w Rows<'w>,
    row_len: usize,
    block_rows: usize,
    done: usize,
    /// What is left of the current run, for ranges.
    run: &'a [R::Elem],
}

impl<'a, 'w, R: KvRows> Blocks<'a, 'w, R> {
    /// `which` must have been checked against the rows of the shard.
    pub fn new(rows: &'a R, which: &'w Rows<'w>) -> Self {
        let row_len = 2 * rows.head_dim();
        let block_rows = block_rows(row_len * size_of::<R::Elem>());
        Self { rows, which, row_len, block_rows, done: 0, run: &[] }
    }

    /// Fills `block` with the next rows; none are left when its length is 0.
    pub fn next_into(&mut self, block: &mut Block<'a, R::Elem>) -> Result<(), KernelError> {
        let num = (self.which.len() - self.done).min(self.block_rows);
        match self.which {
            Rows::Range(range) => {
                for (i, place) in block.rows[..num].iter_mut().enumerate() {
                    if self.run.is_empty() {
                        self.run = checked_run(self.rows, range.start + self.done + i)?;
                    }
                    (*place, self.run) = self.run.split_at(self.row_len);
                }
            }
            Rows::List(list) => {
                for (place, &row) in block.rows[..num].iter_mut().zip(&list[self.done..]) {
                    *place = &checked_run(self.rows, row as usize)?[..self.row_len];
                }
            }
        }
        if let Some(&last) = block.rows[..num].last() {
            block.rows[num..self.block_rows].fill(last);
        }
        block.num = num;
        block.row_len = self.row_len;
        self.done += num;
        Ok(())
    }
}
