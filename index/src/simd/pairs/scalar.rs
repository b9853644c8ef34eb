//! The plain version of every kernel over pairs: the definition of its bits, also compiled for AVX2.

use super::{Lift, Limits, RISE_MAX};
use crate::blocks::LANES;
use crate::simd::codes::Pairs;
use crate::simd::dense::{Part, exp};
use crate::simd::vectorise::fold;

#[inline(always)]
pub(super) fn above(
    part: Part<'_>,
    limits: Limits<'_>,
    masks: &mut [u16],
    (exps, sums): (&mut [f32], &mut [f32]),
) -> u16 {
    let mut any = 0;
    let rows = part.logits.as_chunks::<LANES>().0.iter().zip(exps.as_chunks_mut::<LANES>().0);
    let rows = rows.zip(sums.as_chunks_mut::<LANES>().0);
    for ((((row, exps), sums), mask), (&limit, &boost)) in
        rows.zip(masks.iter_mut()).zip(limits.limit.iter().zip(limits.boost))
    {
        *mask = 0;
        for lane in 0..LANES {
            if part.rest[lane] > 0.0 && row[lane] + boost * limits.reach[lane] > limit {
                *mask |= 1 << lane;
                exps[lane] = 0.0;
            }
            sums[lane] += exps[lane] * part.rest[lane];
        }
        any |= *mask;
    }
    any
}

/// `exp(min(x, RISE_MAX))`
#[inline(always)]
fn weight(x: f32) -> f32 {
    exp(if x < RISE_MAX { x } else { RISE_MAX })
}

#[inline(always)]
pub(super) fn lift(
    by: &Lift<'_>,
    (logits, weights): (&mut [f32], &mut [f32]),
    (tops, sums): (&mut [f32], &mut [f32]),
) {
    let (rows, weights) = (logits.as_chunks_mut::<LANES>().0, weights.as_chunks_mut::<LANES>().0);
    let (tops, sums) = (tops.as_chunks_mut::<LANES>().0, sums.as_chunks_mut::<LANES>().0);
    for (i, (page, range)) in by.pairs.iter().enumerate() {
        let scales = by.scales[page as usize].map(|scale| half::f16::from_bits(scale).to_f32());
        for pair in range {
            let head = usize::from(by.pairs.heads[pair]);
            let base = by.page_logits[by.homes[i] as usize + head * LANES] - by.by[head] * by.of_page[i];
            for lane in 0..LANES {
                let logit = (rows[pair][lane] + base) + by.spread[head] * (scales[lane] * scales[lane]);
                let logit = if by.left[i] >> lane & 1 == 1 { logit } else { f32::NEG_INFINITY };
                let top = tops[head][lane];
                tops[head][lane] = if logit > top { logit } else { top };
                let w = weight(logit - by.shift[head]);
                (rows[pair][lane], weights[pair][lane]) = (logit, w);
                sums[head][lane] += w;
            }
        }
    }
}

#[inline(always)]
pub(super) fn weigh(heads: &[u16], logits: &[f32], shift: &[f32], weights: &mut [f32]) {
    let rows = logits.as_chunks::<LANES>().0.iter().zip(weights.as_chunks_mut::<LANES>().0);
    for (&head, (row, weights)) in heads.iter().zip(rows) {
        let shift = shift[usize::from(head)];
        row.iter().zip(weights).for_each(|(x, w)| *w = weight(x - shift));
    }
}

#[inline(always)]
pub(super) fn best(pairs: &Pairs<'_>, logits: &[f32], norm: &[f32], (best, tops): (&mut [f32], &mut [f32])) {
    let (rows, best) = (logits.as_chunks::<LANES>().0, best.as_chunks_mut::<LANES>().0);
    for (((_, range), best), top) in pairs.iter().zip(best).zip(tops) {
        *best = [f32::NEG_INFINITY; LANES];
        for (&head, row) in pairs.heads[range.clone()].iter().zip(&rows[range]) {
            let norm = norm[usize::from(head)];
            for (b, x) in best.iter_mut().zip(row) {
                *b = if x - norm > *b { x - norm } else { *b };
            }
        }
        *top = best.iter().fold(f32::NEG_INFINITY, |m, &b| if b > m { b } else { m });
    }
}

#[inline(always)]
pub(super) fn sums(weights: &[f32], out: &mut [f32]) {
    for (row, out) in weights.as_chunks::<LANES>().0.iter().zip(out) {
        *out = fold(*row);
    }
}
