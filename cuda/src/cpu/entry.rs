//! Entry points of the vector kernels: where the instructions of an [`Isa`](crate::Isa) are enabled, one instance per number of heads.
//!
//! Tiles per number of heads (rows x heads for scores; heads x chunks for values): sixteen (AVX2: eight) sums are in
//! flight in both, more than the two multipliers' latency of four cycles needs, and with the operands they fit the
//! registers.

use super::attend_block::{BlockInput, HeadBlock, attend_block, score_block};
use super::block::BLOCK_ROWS_MAX;
use super::dot::{Bf16Pairs, QueryForm, Widened};
use super::simd::{Avx2Ops, Avx512Ops, Simd};
use crate::{Avx2, Avx512, KvElem};

/// A capability that the vector kernels can be entered with.
pub(super) trait Entry: Copy {
    /// Elements of a chunk.
    const CHUNK: usize;
    /// Most heads of a [`HeadBlock`].
    const HEADS_MAX: usize;

    /// Whether [`QueryForm::Bf16Pairs`] can be used.
    fn has_bf16_pairs(self) -> bool;

    /// Adds a block of rows to the sums of `heads`.
    fn attend<E: KvElem>(self, input: &BlockInput<'_, E>, heads: &mut HeadBlock<'_>);

    /// Final scores of a block for the heads of `q` [heads, padded head_dim], to `out` [block.padded().len(), padded heads].
    fn score<E: KvElem>(self, input: &BlockInput<'_, E>, q: &[f32], out: &mut [f32]);
}

/// Lanes between two rows of `weights` for `heads` heads.
pub(super) fn padded_heads(heads: usize) -> usize {
    heads.next_power_of_two()
}

/// Asserts the shapes that the kernels rely on; the number of heads of `q`.
fn check<A: Entry, E: KvElem>(input: &BlockInput<'_, E>, q: &[f32], weights: &[f32]) -> usize {
    let padded = input.head_dim.next_multiple_of(A::CHUNK);
    let num_heads = q.len() / padded;
    assert!(num_heads >= 1 && num_heads <= A::HEADS_MAX && q.len() == num_heads * padded);
    assert!(input.head_dim >= 1 && input.block.len() >= 1 && input.block.row_len() == 2 * input.head_dim);
    assert!(weights.len() >= BLOCK_ROWS_MAX * padded_heads(num_heads));
    num_heads
}

/// As `check`, and the sums of `heads`.
fn check_sums<A: Entry, E: KvElem>(input: &BlockInput<'_, E>, heads: &HeadBlock<'_>) {
    let num_heads = check::<A, E>(input, heads.q, heads.weights);
    assert!(heads.num == num_heads && heads.sums.len() == heads.q.len());
}

/// The kernels under one set of instructions, for one form of queries and any of the listed numbers of heads.
macro_rules! kernels {
    ($name:ident, $ops:ty, $dot:ty, $features:literal, $($heads:literal => $padded:literal, $rows:literal, $chunks:literal;)*) => {
        mod $name {
            use super::*;

            /// # Safety
            /// The machine has the instructions; shapes as for `attend_block`.
            #[target_feature(enable = $features)]
            pub unsafe fn attend<E: KvElem>(input: &BlockInput<'_, E>, heads: &mut HeadBlock<'_>) {
                // SAFETY: the instructions are enabled here; shapes as promised by the caller.
                unsafe {
                    match heads.num {
                        $($heads => attend_block::<$ops, E, $dot, $heads, $padded, $rows, $chunks>(input, heads),)*
                        other => debug_assert!(false, "no instance for {other} heads"),
                    }
                }
            }

            /// # Safety
            /// The machine has the instructions; shapes as for `score_block`.
            #[target_feature(enable = $features)]
            pub unsafe fn score<E: KvElem>(input: &BlockInput<'_, E>, num_heads: usize, q: *const f32, out: *mut f32) {
                // SAFETY: the instructions are enabled here; shapes as promised by the caller.
                unsafe {
                    match num_heads {
                        $($heads => score_block::<$ops, E, $dot, $heads, $padded, $rows>(input, q, out),)*
                        other => debug_assert!(false, "no instance for {other} heads"),
                    }
                }
            }
        }
    };
}

/// Tiles with thirty-two registers of sixteen lanes.
macro_rules! kernels_512 {
    ($name:ident, $dot:ty, $features:literal) => {
        kernels! {
            $name, Avx512Ops, $dot, $features,
            1 => 1, 16, 4;
            2 => 2, 8, 4;
            3 => 4, 4, 2;
            4 => 4, 4, 2;
            5 => 8, 2, 1;
            6 => 8, 2, 1;
            7 => 8, 2, 1;
            8 => 8, 2, 1;
        }
    };
}

kernels_512! { widened_512, Widened, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c" }
kernels_512! { pairs_512, Bf16Pairs, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c" }

// Sixteen registers of eight lanes.
kernels! {
    widened_256, Avx2Ops, Widened, "avx2,fma,f16c",
    1 => 1, 8, 4;
    2 => 2, 4, 2;
    3 => 4, 2, 2;
    4 => 4, 2, 1;
    5 => 8, 1, 1;
    6 => 8, 1, 1;
}

impl Entry for Avx512 {
    const CHUNK: usize = Avx512Ops::CHUNK;
    const HEADS_MAX: usize = Avx512Ops::HEADS_MAX;

    fn has_bf16_pairs(self) -> bool {
        self.has_bf16()
    }

    fn attend<E: KvElem>(self, input: &BlockInput<'_, E>, heads: &mut HeadBlock<'_>) {
        check_sums::<Self, E>(input, heads);
        // SAFETY: the token proves the instructions, the assertions the shapes.
        unsafe {
            match input.form {
                QueryForm::Widened => widened_512::attend(input, heads),
                QueryForm::Bf16Pairs => {
                    assert!(self.has_bf16() && E::IS_BF16);
                    pairs_512::attend(input, heads);
                }
            }
        }
    }

    fn score<E: KvElem>(self, input: &BlockInput<'_, E>, q: &[f32], out: &mut [f32]) {
        let num_heads = check::<Self, E>(input, q, out);
        // SAFETY: the token proves the instructions, the assertions the shapes.
        unsafe {
            match input.form {
                QueryForm::Widened => widened_512::score(input, num_heads, q.as_ptr(), out.as_mut_ptr()),
                QueryForm::Bf16Pairs => {
                    assert!(self.has_bf16() && E::IS_BF16);
                    pairs_512::score(input, num_heads, q.as_ptr(), out.as_mut_ptr());
                }
            }
        }
    }
}

impl Entry for Avx2 {
    const CHUNK: usize = Avx2Ops::CHUNK;
    const HEADS_MAX: usize = Avx2Ops::HEADS_MAX;

    fn has_bf16_pairs(self) -> bool {
        false
    }

    fn attend<E: KvElem>(self, input: &BlockInput<'_, E>, heads: &mut HeadBlock<'_>) {
        check_sums::<Self, E>(input, heads);
        assert!(input.form == QueryForm::Widened);
        // SAFETY: the token proves the instructions, the assertions the shapes.
        unsafe { widened_256::attend(input, heads) }
    }

    fn score<E: KvElem>(self, input: &BlockInput<'_, E>, q: &[f32], out: &mut [f32]) {
        let num_heads = check::<Self, E>(input, q, out);
        assert!(input.form == QueryForm::Widened);
        // SAFETY: the token proves the instructions, the assertions the shapes.
        unsafe { widened_256::score(input, num_heads, q.as_ptr(), out.as_mut_ptr()) }
    }
}
