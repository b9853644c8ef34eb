//! Kernels over pairs of a page and a query head that asks for its tokens: which pairs there are, their logits and weights.
//!
//! `scalar` is the definition; every floating-point step is the same IEEE operation in the same order on each instruction set, so
//! results are **bit-identical** everywhere.

mod scalar;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::codes::{Pairs, Scales};
use super::dense::Part;
use super::isa::Isa;
use crate::blocks::LANES;

macro_rules! dispatch {
    ($isa:expr, $name:ident($($arg:expr),*)) => {
        match $isa {
            Isa::Scalar => scalar::$name($($arg),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value proves that the CPU has AVX2, FMA and F16C, which is all that the callee enables.
            Isa::Avx2(_) => unsafe { avx2::$name($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value proves that the CPU has AVX-512 F, BW, DQ and VL, which is all that the callee enables.
            Isa::Avx512(_) => unsafe { avx512::$name($($arg),*) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2(_) | Isa::Avx512(_) => scalar::$name($($arg),*),
        }
    };
}

/// When a page is told apart for a head: `logit + boost * reach > limit`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits<'a> {
    /// `[group]`
    pub limit: &'a [f32],
    /// `[group]`
    pub boost: &'a [f32],
    /// `[16]` reach of the entries.
    pub reach: &'a [f32],
}

/// What turns residual scores into logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lift<'a> {
    pub pairs: Pairs<'a>,
    /// Logits of all parts of the frontier, `[parts, group, 16]`.
    pub page_logits: &'a [f32],
    /// `[pages]` where the page's logit of head 0 lies among them.
    pub homes: &'a [u32],
    /// `[pages]` spread of the page, which its residuals tell apart and which leaves its logit again.
    pub of_page: &'a [f32],
    /// `[group]` logit per unit of a page's spread.
    pub by: &'a [f32],
    /// `[pages]` lanes that count; the others get minus infinity.
    pub left: &'a [u16],
    /// Scales of the key codes by page number.
    pub scales: &'a [Scales],
    /// `[group]` logit per squared scale of a token's code.
    pub spread: &'a [f32],
    /// `[group]` what weights are relative to.
    pub shift: &'a [f32],
}

/// Largest amount by which a logit may exceed the shift: sums of such exponentials over any number of tokens fit f32.
pub(crate) const RISE_MAX: f32 = 60.0;

/// Lanes of one part, by head to `masks` `[group]`, whose pages are told apart; their `exps` `[group, 16]` become 0, the others times
/// `rest` are added to `sums` `[group, 16]`. Returns the lanes of any head.
pub(crate) fn above(
    isa: Isa,
    part: Part<'_>,
    limits: Limits<'_>,
    masks: &mut [u16],
    (exps, sums): (&mut [f32], &mut [f32]),
) -> u16 {
    let group = masks.len();
    assert_eq!((part.logits.len(), part.rest.len(), exps.len()), (group * LANES, LANES, group * LANES));
    assert_eq!((limits.limit.len(), limits.boost.len(), limits.reach.len()), (group, group, LANES));
    assert_eq!(sums.len(), exps.len(), "one sum a head and lane");
    dispatch!(isa, above(part, limits, masks, (exps, sums)))
}

/// Residual scores `logits` `[pairs, 16]` become logits, and `weights` `[pairs, 16]` their exponentials,
/// `exp(min(logit - shift[h], RISE_MAX))` for the head `h` of the pair. `tops[h, lane]` is raised to the largest logit of the head;
/// `sums[h, lane]` gets the weights added in the order of the pairs; both `[group, 16]`.
pub(crate) fn lift(
    isa: Isa,
    by: &Lift<'_>,
    (logits, weights): (&mut [f32], &mut [f32]),
    (tops, sums): (&mut [f32], &mut [f32]),
) {
    let (pages, pairs) = (by.pairs.pages.len(), by.pairs.heads.len());
    assert_eq!((logits.len(), weights.len()), (pairs * LANES, pairs * LANES), "tokens of the pairs");
    assert_eq!((by.homes.len(), by.of_page.len(), by.left.len()), (pages, pages, pages), "one entry a page");
    assert_eq!((tops.len(), sums.len()), (by.shift.len() * LANES, by.shift.len() * LANES), "by head");
    dispatch!(isa, lift(by, (logits, weights), (tops, sums)));
}

/// `weights[p, lane] = exp(min(logits[p, lane] - shift[h], RISE_MAX))` for the head `h` of pair `p`.
pub(crate) fn weigh(isa: Isa, heads: &[u16], logits: &[f32], shift: &[f32], weights: &mut [f32]) {
    assert_eq!((logits.len(), weights.len()), (heads.len() * LANES, heads.len() * LANES));
    dispatch!(isa, weigh(heads, logits, shift, weights));
}

/// `best[i, lane] = max_p(logits[p, lane] - norm[h])` over the pairs `p` of page `i` and their heads `h`; `tops[i]` is the largest of
/// its lanes.
pub(crate) fn best(
    isa: Isa,
    pairs: &Pairs<'_>,
    logits: &[f32],
    norm: &[f32],
    (best, tops): (&mut [f32], &mut [f32]),
) {
    assert_eq!(logits.len(), pairs.heads.len() * LANES, "logits of the pairs");
    assert_eq!((best.len(), tops.len()), (pairs.pages.len() * LANES, pairs.pages.len()), "one row a page");
    dispatch!(isa, best(pairs, logits, norm, (best, tops)));
}

/// `out[p]` = sum of the sixteen weights of pair `p`, halves onto halves.
pub(crate) fn sums(isa: Isa, weights: &[f32], out: &mut [f32]) {
    assert_eq!(weights.len(), out.len() * LANES, "one sum a pair");
    dispatch!(isa, sums(weights, out));
}
