//! Register tiles: the two inner loops of attention, over keys and over values.
//!
//! A key or value row is read in chunks of two registers, converted once for all heads of a tile. The `T * H` scores of
//! a tile of `T` rows and `H` heads are independent sums that are reduced together: `T * HP` is the number of lanes, so
//! the reduced register is the tile itself, [T, HP], with the heads padded to `HP`, a power of two.

#![allow(
    clippy::needless_range_loop,
    reason = "the loops over rows, heads and chunks unroll into registers; indices say which, iterators would hide it"
)]

use super::dot::Dot;
use super::simd::{LANES_MAX, LINE, Simd, prefetch};
use crate::KvElem;

/// One chunk of a value of `head_dim` elements: the part from `at` on, zeros after the last.
///
/// # Safety
/// [`Simd`]; `p` is valid for `head_dim` elements, `at` is below it.
#[inline(always)]
unsafe fn load_at<S: Simd, E: KvElem>(p: *const E, at: usize, head_dim: usize) -> [S::V; 2] {
    // SAFETY: the caller's obligations; only what lies before `head_dim` is read.
    unsafe {
        if at + S::CHUNK <= head_dim {
            S::load_chunk(p.add(at))
        } else {
            S::load_chunk_part(p.add(at), head_dim - at)
        }
    }
}

/// Asks for the lines of one chunk.
#[inline(always)]
fn prefetch_chunk<S: Simd, E>(p: *const E) {
    for line in (0..S::CHUNK * size_of::<E>()).step_by(LINE) {
        prefetch(p.cast::<u8>().wrapping_add(line));
    }
}

/// Scores `q.k` of `T` rows and `H` heads, [T, HP] in lane order; the padding heads are zero.
///
/// # Safety
/// - The obligations of [`Simd`].
/// - `q` is valid for [H, padded head_dim] f32 in the form of `D`: whole chunks, zeros after `head_dim`.
/// - Every one of `keys` is valid for `head_dim` elements.
#[inline(always)]
pub(super) unsafe fn score_tile<
    S: Simd,
    E: KvElem,
    D: Dot<S, E>,
    const H: usize,
    const HP: usize,
    const T: usize,
>(
    q: *const f32,
    keys: [*const E; T],
    ahead: [*const E; T],
    head_dim: usize,
) -> S::V {
    let padded = head_dim.next_multiple_of(S::CHUNK);
    // SAFETY: every chunk starts below `head_dim` and, in the queries, ends at or before `padded`.
    unsafe {
        let mut sums = [[S::splat(0.0); H]; T];
        for at in (0..head_dim).step_by(S::CHUNK) {
            // Every place is written before it is read.
            let mut k = [D::query(q.add(at)); T];
            for t in 0..T {
                let key = keys[t].add(at);
                k[t] = if at + S::CHUNK <= head_dim { D::key(key) } else { D::key_part(key, head_dim - at) };
                prefetch_chunk::<S, E>(ahead[t].wrapping_add(at));
            }
            for h in 0..H {
                let query = D::query(q.add(h * padded + at));
                for t in 0..T {
                    sums[t][h] = D::add(sums[t][h], k[t], query);
                }
            }
        }
        let mut parts = [S::splat(0.0); LANES_MAX];
        for t in 0..T {
            for h in 0..H {
                parts[t * HP + h] = sums[t][h];
            }
        }
        S::reduce(&parts)
    }
}

/// Values of some rows and their weights.
#[derive(Clone, Copy)]
pub(super) struct Weighted<'a, E> {
    /// The rows, each [2, head_dim]; only the value is read.
    pub rows: &'a [&'a [E]],
    /// Rows to prefetch, at least as many.
    pub ahead: &'a [&'a [E]],
    /// f32 [rows.len(), HP].
    pub weights: *const f32,
    /// Elements of a value.
    pub head_dim: usize,
}

/// `sums = sums * factor + weights * values` over `C` chunks of the values from dimension `at`, for `H` heads.
///
/// # Safety
/// - The obligations of [`Simd`].
/// - `at` is a multiple of the chunk, `at + (C - 1)` chunks lies below `head_dim`; every row has 2 `head_dim` elements.
/// - `weights` is valid for [rows.len(), HP] f32, `sums` for [H, padded head_dim], `factor` for `[H]`.
#[inline(always)]
pub(super) unsafe fn value_tile<S: Simd, E: KvElem, const H: usize, const HP: usize, const C: usize>(
    from: Weighted<'_, E>,
    at: usize,
    factor: *const f32,
    sums: *mut f32,
) {
    let d = from.head_dim;
    let padded = d.next_multiple_of(S::CHUNK);
    // SAFETY: chunks start below `head_dim` and end at or before `padded`; weights are read for the rows that are there.
    unsafe {
        let mut tile = [[[S::splat(0.0); 2]; C]; H];
        for h in 0..H {
            let factor = S::splat(*factor.add(h));
            for c in 0..C {
                let p = sums.add(h * padded + at + c * S::CHUNK);
                tile[h][c] = [S::mul(S::load(p), factor), S::mul(S::load(p.add(S::LANES)), factor)];
            }
        }
        for (t, (row, ahead)) in from.rows.iter().zip(from.ahead).enumerate() {
            let value = row.as_ptr().add(d);
            let ahead = ahead.as_ptr().wrapping_add(d);
            let mut v = [[S::splat(0.0); 2]; C];
            for c in 0..C {
                v[c] = load_at::<S, E>(value, at + c * S::CHUNK, d);
                prefetch_chunk::<S, E>(ahead.wrapping_add(at + c * S::CHUNK));
            }
            for h in 0..H {
                let weight = S::splat(*from.weights.add(t * HP + h));
                for c in 0..C {
                    tile[h][c][0] = S::fma(v[c][0], weight, tile[h][c][0]);
                    tile[h][c][1] = S::fma(v[c][1], weight, tile[h][c][1]);
                }
            }
        }
        for h in 0..H {
            for c in 0..C {
                let p = sums.add(h * padded + at + c * S::CHUNK);
                S::store(p, tile[h][c][0]);
                S::store(p.add(S::LANES), tile[h][c][1]);
            }
        }
    }
}
