//! Entry points of the vector kernels: where the instructions of an [`Isa`] are enabled, one instance per number of heads.
//!
//! Tiles per number of heads (rows x heads for scores; heads x chunks for values): sixteen (AVX2: eight) sums are in
//! flight in both, more than the two multipliers' latency of four cycles needs, and with the operands they fit the
//! registers.

use super::attend_block::{BlockInput, HeadBlock, attend_block, score_block};
use super::block::BLOCK_ROWS_MAX;
use super::simd::{Avx2Ops, Avx512Ops};
use crate::{Avx2, Avx512, KvElem};

/// A capability that the vector kernels can be entered with.
pub(super) trait Entry: Copy {
    /// Elements of a chunk.
    const CHUNK: usize;
    /// Most heads of a [`HeadBlock`].
    const HEADS_MAX: usize;

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

macro_rules! entry {
    ($token:ty, $ops:ty, $features:literal, $($heads:literal => $padded:literal, $rows:literal, $chunks:literal;)*) => {
        const _: () = {
            use super::simd::Simd;

            #[target_feature(enable = $features)]
            unsafe fn attend<E: KvElem>(input: &BlockInput<'_, E>, heads: &mut HeadBlock<'_>) {
                // SAFETY: the instructions are enabled here; shapes as promised by the caller.
                unsafe {
                    match heads.num {
                        $($heads => attend_block::<$ops, E, $heads, $padded, $rows, $chunks>(input, heads),)*
                        other => debug_assert!(false, "no instance for {other} heads"),
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn score<E: KvElem>(input: &BlockInput<'_, E>, num_heads: usize, q: *const f32, out: *mut f32) {
                // SAFETY: the instructions are enabled here; shapes as promised by the caller.
                unsafe {
                    match num_heads {
                        $($heads => score_block::<$ops, E, $heads, $padded, $rows>(input, q, out),)*
                        other => debug_assert!(false, "no instance for {other} heads"),
                    }
                }
            }

            impl Entry for $token {
                const CHUNK: usize = <$ops>::CHUNK;
                const HEADS_MAX: usize = <$ops>::HEADS_MAX;

                fn attend<E: KvElem>(self, input: &BlockInput<'_, E>, heads: &mut HeadBlock<'_>) {
                    check::<Self, E>(input, heads.q, heads.weights);
                    let padded = input.head_dim.next_multiple_of(Self::CHUNK);
                    assert!(heads.q.len() == heads.num * padded && heads.sums.len() == heads.q.len());
                    // SAFETY: the token proves the instructions; the assertions the shapes.
                    unsafe { attend(input, heads) }
                }

                fn score<E: KvElem>(self, input: &BlockInput<'_, E>, q: &[f32], out: &mut [f32]) {
                    let num_heads = check::<Self, E>(input, q, out);
                    // SAFETY: the token proves the instructions; `check` the shapes.
                    unsafe { score(input, num_heads, q.as_ptr(), out.as_mut_ptr()) }
                }
            }
        };
    };
}

entry! {
    Avx512, Avx512Ops, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c",
    1 => 1, 16, 4;
    2 => 2, 8, 4;
    3 => 4, 4, 2;
    4 => 4, 4, 2;
    5 => 8, 2, 1;
    6 => 8, 2, 1;
    7 => 8, 2, 1;
    8 => 8, 2, 1;
}

entry! {
    Avx2, Avx2Ops, "avx2,fma,f16c",
    1 => 1, 8, 4;
    2 => 2, 4, 2;
    3 => 4, 2, 2;
    4 => 4, 2, 1;
    5 => 8, 1, 1;
    6 => 8, 1, 1;
}
