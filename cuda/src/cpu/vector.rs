//! Vector attention: queries in, blocks of rows through the kernels, state out.

use std::ops::Range;

use super::attend_block::{BlockInput, HeadBlock};
use super::block::{BLOCK_ROWS_MAX, Block, Blocks};
use super::dot::QueryForm;
use super::entry::{Entry, padded_heads};
use super::scratch::VectorScratch;
use super::simd::{LANES_MAX, place_in_chunk};
use crate::{Attend, KernelError, KvElem, KvRows, Rows, StateMut};

/// Smallest group for which bf16 pairs are used. They save arithmetic; below this the memory is the limit, and work
/// that leaves more time between prefetches reads it faster (128K rows, widened against pairs: group 4 33.5 against
/// 30.5 GB/s, group 5 29.4 against 31.7).
const PAIRS_GROUP_MIN: usize = 5;

/// How a group is divided into parts of nearly equal size, each at most `HEADS_MAX`.
#[derive(Clone, Copy)]
struct HeadPlan {
    group: usize,
    num_parts: usize,
}

impl HeadPlan {
    fn new<A: Entry>(group: usize) -> Self {
        Self { group, num_parts: group.div_ceil(A::HEADS_MAX) }
    }

    /// Heads of part `i`.
    fn part(self, i: usize) -> Range<usize> {
        i * self.group / self.num_parts..(i + 1) * self.group / self.num_parts
    }
}

/// Queries [group, head_dim] to [group, padded head_dim] in one of the forms, zeros between.
fn pack_queries<A: Entry, E: KvElem>(entry: A, q: &[f32], head_dim: usize, packed: &mut [f32]) -> QueryForm {
    packed.fill(0.0);
    let chunk = A::CHUNK;
    let group = q.len() / head_dim;
    if entry.has_bf16_pairs()
        && E::IS_BF16
        && group >= PAIRS_GROUP_MIN
        && q.iter().all(|x| x.to_bits() & 0xffff == 0)
    {
        for (q, packed) in
            q.chunks_exact(head_dim).zip(packed.chunks_exact_mut(head_dim.next_multiple_of(chunk)))
        {
            for (q, packed) in q.chunks(chunk).zip(packed.chunks_exact_mut(chunk)) {
                for (pair, place) in q.chunks(2).zip(packed) {
                    let high = pair.get(1).map_or(0, |x| x.to_bits());
                    *place = f32::from_bits(high | pair[0].to_bits() >> 16);
                }
            }
        }
        return QueryForm::Bf16Pairs;
    }
    for (q, packed) in q.chunks_exact(head_dim).zip(packed.chunks_exact_mut(head_dim.next_multiple_of(chunk)))
    {
        for (q, packed) in q.chunks(chunk).zip(packed.chunks_exact_mut(chunk)) {
            for (i, &x) in q.iter().enumerate() {
                packed[place_in_chunk::<E>(i, chunk)] = x;
            }
        }
    }
    QueryForm::Widened
}

/// Running maximum and norm of one part of the group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    max: [f32; LANES_MAX],
    norm: [f32; LANES_MAX],
}

/// See [`sparse_decode`](super::sparse_decode()); `attend`, `which` and the shape of `state` have been checked.
pub(super) fn sparse_decode<A: Entry, R: KvRows>(
    entry: A,
    attend: &Attend<'_, R>,
    which: &Rows<'_>,
    scratch: &mut VectorScratch,
    state: StateMut<'_>,
) -> Result<(), KernelError> {
    let d = attend.rows.head_dim();
    let padded = d.next_multiple_of(A::CHUNK);
    let plan = HeadPlan::new::<A>(state.lse.len());
    let VectorScratch { q, sums, weights, softmax } = scratch;
    let q = q.slice(plan.group * padded);
    let form = pack_queries::<A, R::Elem>(entry, attend.q, d, q);
    let sums = sums.slice(plan.group * padded);
    sums.fill(0.0);
    let weights = weights.slice(BLOCK_ROWS_MAX * padded_heads(A::HEADS_MAX));
    softmax.clear();
    softmax.resize(plan.num_parts, Softmax { max: [f32::NEG_INFINITY; LANES_MAX], norm: [0.0; LANES_MAX] });

    let mut blocks = Blocks::new(attend.rows, which);
    let (mut block, mut next) = (Block::empty(), Block::empty());
    blocks.next_into(&mut block)?;
    block.fetch();
    while block.len() > 0 {
        blocks.next_into(&mut next)?;
        next.touch();
        for (i, softmax) in softmax.iter_mut().enumerate() {
            let part = plan.part(i);
            let span = part.start * padded..part.end * padded;
            // Only the first pass over the block brings in the next one.
            let ahead = if i == 0 { next.places() } else { block.places() };
            let input = BlockInput { block: &block, next: ahead, head_dim: d, form, params: attend.params };
            let mut heads = HeadBlock {
                num: part.len(),
                q: &q[span.clone()],
                sums: &mut sums[span],
                max: &mut softmax.max,
                norm: &mut softmax.norm,
                weights,
            };
            entry.attend(&input, &mut heads);
        }
        std::mem::swap(&mut block, &mut next);
    }
    for (i, softmax) in softmax.iter().enumerate() {
        for (lane, h) in plan.part(i).enumerate() {
            // The heads' lanes repeat with the padded number of heads; lanes that an ISA does not have stay zero.
            let norm: f32 = softmax.norm.iter().skip(lane).step_by(padded_heads(plan.part(i).len())).sum();
            let out = &mut state.out[h * d..(h + 1) * d];
            if norm == 0.0 {
                out.fill(0.0);
                state.lse[h] = f32::NEG_INFINITY;
                continue;
            }
            let sums = &sums[h * padded..(h + 1) * padded];
            let inverse = 1.0 / norm;
            for (out, sums) in out.chunks_mut(A::CHUNK).zip(sums.chunks_exact(A::CHUNK)) {
                for (i, x) in out.iter_mut().enumerate() {
                    *x = sums[place_in_chunk::<R::Elem>(i, A::CHUNK)] * inverse;
                }
            }
            state.lse[h] = softmax.max[lane] + norm.ln();
        }
    }
    Ok(())
}

/// See [`score_rows`](super::score_rows()); all arguments have been checked. `out` is [group, range.len()].
pub(super) fn score_rows<A: Entry, R: KvRows>(
    entry: A,
    attend: &Attend<'_, R>,
    range: Range<usize>,
    scratch: &mut VectorScratch,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let d = attend.rows.head_dim();
    let padded = d.next_multiple_of(A::CHUNK);
    let plan = HeadPlan::new::<A>(attend.q.len() / d);
    let num_rows = range.len();
    let q = scratch.q.slice(plan.group * padded);
    let form = pack_queries::<A, R::Elem>(entry, attend.q, d, q);
    let weights = scratch.weights.slice(BLOCK_ROWS_MAX * padded_heads(A::HEADS_MAX));

    let which = Rows::Range(range);
    let mut blocks = Blocks::new(attend.rows, &which);
    let (mut block, mut next) = (Block::empty(), Block::empty());
    blocks.next_into(&mut block)?;
    let mut done = 0;
    while block.len() > 0 {
        blocks.next_into(&mut next)?;
        for i in 0..plan.num_parts {
            let part = plan.part(i);
            let input =
                BlockInput { block: &block, next: next.places(), head_dim: d, form, params: attend.params };
            entry.score(&input, &q[part.start * padded..part.end * padded], weights);
            let stride = padded_heads(part.len());
            for (lane, h) in part.enumerate() {
                let scores = weights[lane..].iter().step_by(stride);
                for (x, &score) in out[h * num_rows + done..][..block.len()].iter_mut().zip(scores) {
                    *x = score;
                }
            }
        }
        done += block.len();
        std::mem::swap(&mut block, &mut next);
    }
    Ok(())
}
