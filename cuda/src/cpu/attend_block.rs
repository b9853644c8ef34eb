//! One block of rows through scores, online softmax and weighted sum.
//!
//! For each head: `m' = max(m, max s)`, `w = exp(s - m')`, `sums = sums exp(m - m') + w.V`, `l = l exp(m - m') + sum w`
//! (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).

use super::block::{BLOCK_ROWS_MAX, Block};
use super::dot::{Dot, QueryForm};
use super::simd::{LANES_MAX, Simd, soft_cap};
use super::tile::{Weighted, score_tile, value_tile};
use crate::{AttendParams, KvElem};

/// Part of a group that is kept in registers at once, and what has been summed for it so far.
pub(super) struct HeadBlock<'a> {
    /// Number of heads.
    pub num: usize,
    /// Packed queries [num, padded head_dim].
    pub q: &'a [f32],
    /// Weighted sums of values, same shape, in the element type's lane order.
    pub sums: &'a mut [f32],
    /// Running maximum, `[lanes]`: head `h` in the lanes that equal `h` modulo the padded number of heads.
    pub max: &'a mut [f32; LANES_MAX],
    /// Running sum of weights: the sum over those lanes.
    pub norm: &'a mut [f32; LANES_MAX],
    /// Scratch [BLOCK_ROWS_MAX, padded heads].
    pub weights: &'a mut [f32],
}

/// A block and what is common to all heads.
pub(super) struct BlockInput<'a, E> {
    /// Rows to read now; at least one.
    pub block: &'a Block<'a, E>,
    /// Rows to prefetch meanwhile, as many as a block can have.
    pub next: &'a [&'a [E]; BLOCK_ROWS_MAX],
    /// Dimensions of a head.
    pub head_dim: usize,
    /// How the queries are packed.
    pub form: QueryForm,
    /// Scale and softcap.
    pub params: AttendParams,
}

/// Final scores of a block into `out` [block.padded().len(), HP]; rows that only pad the block score -inf.
///
/// # Safety
/// - The obligations of [`Simd`].
/// - `q` is valid for [H, padded head_dim], `out` for [block.padded().len(), HP].
/// - Rows of the block have 2 `head_dim` elements.
#[inline(always)]
pub(super) unsafe fn score_block<
    S: Simd,
    E: KvElem,
    D: Dot<S, E>,
    const H: usize,
    const HP: usize,
    const T: usize,
>(
    input: &BlockInput<'_, E>,
    q: *const f32,
    out: *mut f32,
) {
    let rows = input.block.padded();
    // SAFETY: rows are padded to a multiple of every `T`, so that each tile has `T` rows and one register of `out`.
    unsafe {
        let (scale, limit) = (S::splat(input.params.scale), S::splat(f32::MAX));
        for (tile, keys) in rows.chunks_exact(T).enumerate() {
            let mut places = [std::ptr::null(); T];
            let mut ahead = [std::ptr::null(); T];
            for t in 0..T {
                places[t] = keys[t].as_ptr();
                ahead[t] = input.next[tile * T + t].as_ptr();
            }
            let dots = score_tile::<S, E, D, H, HP, T>(q, places, ahead, input.head_dim);
            let mut scores = S::mul(dots, scale);
            if let Some(cap) = input.params.softcap {
                scores = soft_cap::<S>(scores, cap);
            }
            // Beyond f32 counts as the largest f32, so that `inf - inf` cannot come up.
            S::store(out.add(tile * S::LANES), S::min(limit, scores));
        }
        for lane in input.block.len() * HP..rows.len() * HP {
            *out.add(lane) = f32::NEG_INFINITY;
        }
    }
}

/// Adds a block to `heads`.
///
/// # Safety
/// - The obligations of [`Simd`].
/// - `heads.num == H`; `heads.q` and `heads.sums` are [H, padded head_dim], `heads.weights` at least [BLOCK_ROWS_MAX, HP].
/// - Rows of the block have 2 `head_dim` elements.
#[inline(always)]
pub(super) unsafe fn attend_block<
    S: Simd,
    E: KvElem,
    D: Dot<S, E>,
    const H: usize,
    const HP: usize,
    const T: usize,
    const C: usize,
>(
    input: &BlockInput<'_, E>,
    heads: &mut HeadBlock<'_>,
) {
    debug_assert!(heads.num == H && heads.weights.len() >= BLOCK_ROWS_MAX * HP);
    let lanes = input.block.padded().len() * HP;
    let weights = heads.weights.as_mut_ptr();
    // SAFETY: `weights` holds `lanes` floats, a whole number of registers; the rest as promised by the caller.
    unsafe {
        score_block::<S, E, D, H, HP, T>(input, heads.q.as_ptr(), weights);

        let old_max = S::load(heads.max.as_ptr());
        let mut max = S::load(weights);
        for lane in (S::LANES..lanes).step_by(S::LANES) {
            max = S::max(max, S::load(weights.add(lane)));
        }
        let max = S::max(S::fold_max::<HP>(max), old_max);
        // A head whose scores are all -inf: any finite maximum makes all its weights zero.
        let shift = S::max(max, S::splat(f32::MIN));
        let factor = S::exp(S::sub(old_max, shift));
        let mut norm = S::mul(S::load(heads.norm.as_ptr()), factor);
        for lane in (0..lanes).step_by(S::LANES) {
            let weight = S::exp(S::sub(S::load(weights.add(lane)), shift));
            norm = S::add(norm, weight);
            S::store(weights.add(lane), weight);
        }
        S::store(heads.max.as_mut_ptr(), max);
        S::store(heads.norm.as_mut_ptr(), norm);
        let mut factors = [0.0; LANES_MAX];
        S::store(factors.as_mut_ptr(), factor);

        let rows = &input.block.padded()[..input.block.len()];
        let from = Weighted { rows, ahead: input.next, weights, head_dim: input.head_dim };
        let sums = heads.sums.as_mut_ptr();
        let mut at = 0;
        while at + C * S::CHUNK <= input.head_dim {
            value_tile::<S, E, H, HP, C>(from, at, factors.as_ptr(), sums);
            at += C * S::CHUNK;
        }
        while at < input.head_dim {
            value_tile::<S, E, H, HP, 1>(from, at, factors.as_ptr(), sums);
            at += S::CHUNK;
        }
    }
}
