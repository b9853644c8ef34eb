//! The tail: attention over everything that a search left, by summaries and codes.

use crate::blocks::{Blocks, LANES};
use crate::check;
use crate::error::IndexError;
use crate::found::{Found, Frontier, SILENT, YOUNG};
use crate::index::{Query, TailOut};
use crate::pages::Pages;
use crate::refine::rescale;
use crate::scratch::{Deep, Scratch};
use crate::simd::Isa;
use crate::simd::dense;
use crate::simd::pairs;
use crate::simd::prefetch::prefetch;

/// Summary weights below this share of the mass do not move the tail's value: 2^24 such summaries together weigh less than
/// 0.2 % of it. Their mass still counts in the lse.
const WEIGHT_MIN: f32 = 1e-10;

/// Mass relative to the largest logit of the search below which the weights lose digits and are taken again.
const MASS_MIN: f32 = 1e-20;

/// Blocks between asking for one and using it.
const AHEAD: usize = 3;

/// The tail state of what `found` left, in the caller's frame. `levels` are the tree's, empty for a flat index.
pub(crate) fn tail(
    isa: Isa,
    (pages, levels): (&Pages, &[Blocks]),
    (query, found, scratch): (&Query<'_>, &Found, &mut Scratch),
    state: TailOut<'_>,
) -> Result<(), IndexError> {
    let (dim, group) = (pages.dim, query.group);
    check::query(query, dim)?;
    check::tail_out(state.out, state.lse, group, dim)?;
    let frontier = &found.frontier;
    if frontier.stamp != pages.stamp || frontier.group != group {
        return Err(IndexError::StaleFound);
    }
    state.out.fill(0.0);
    if !frontier.answers {
        state.lse.fill(f32::NEG_INFINITY);
        return Ok(());
    }
    let mut deep = std::mem::take(&mut scratch.deep);
    deep.shift.clone_from(&frontier.refined.shift);
    let mut tokens = frontier.refined.weights();
    weigh(isa, frontier, (&frontier.exps, &frontier.part_shift, tokens), &deep.shift, scratch);
    if scratch.masses.iter().any(|&mass| mass < MASS_MIN) {
        again(isa, frontier, &mut deep);
        tokens = &deep.weights;
        weigh(isa, frontier, (&deep.exps, &deep.shift, tokens), &deep.shift, scratch);
    }
    let Scratch { masses, inverse, norm, .. } = &mut *scratch;
    inverse.clear();
    inverse.extend(masses.iter().map(|&mass| if mass > 0.0 { 1.0 / mass } else { 0.0 }));
    norm.clear();
    norm.extend(
        masses
            .iter()
            .zip(&deep.shift)
            .map(|(&mass, shift)| if mass > 0.0 { shift + mass.ln() } else { f32::NEG_INFINITY }),
    );
    add_residuals(pages, (frontier, tokens), scratch, state.out);
    add_parts(isa, (pages, levels), frontier, scratch, state.out);
    scratch.deep = deep;
    pages.frame.value_out(state.out);
    for (h, (lse, &norm)) in state.lse.iter_mut().zip(scratch.norm.iter()).enumerate() {
        let q = &query.q[h * dim..(h + 1) * dim];
        *lse = if norm > f32::NEG_INFINITY { norm + pages.frame.bias(q) * query.scale } else { norm };
        if norm == f32::NEG_INFINITY {
            state.out[h * dim..(h + 1) * dim].fill(0.0);
        }
    }
    Ok(())
}

/// Fills `scratch.weights` `[parts, group, 16]` with the weights of all entries, those of refined pages being their tokens' sums
/// (`scratch.carried` `[pairs]`), and `scratch.masses` `[group]`; all relative to `shift`.
fn weigh(
    isa: Isa,
    frontier: &Frontier,
    (exps, part_shift, tokens): (&[f32], &[f32], &[f32]),
    shift: &[f32],
    scratch: &mut Scratch,
) {
    let (group, refined) = (frontier.group, &frontier.refined);
    let size = group * LANES;
    let Scratch { weights, carried, masses, sums, factors, .. } = scratch;
    factors.clear();
    factors.extend(part_shift.iter().zip(shift).map(|(&old, &new)| rescale(old, new)));
    weights.resize(exps.len(), 0.0);
    for ((weights, exps), rest) in
        weights.chunks_exact_mut(size).zip(exps.chunks_exact(size)).zip(frontier.rest.chunks_exact(LANES))
    {
        let heads = weights.chunks_exact_mut(LANES).zip(exps.chunks_exact(LANES)).zip(factors.iter());
        for ((weights, exps), factor) in heads {
            for ((w, e), r) in weights.iter_mut().zip(exps).zip(rest) {
                *w = e * (r * factor);
            }
        }
    }
    carried.resize(refined.heads.len(), 0.0);
    pairs::sums(isa, tokens, carried);
    for (at, &place) in refined.places.iter().enumerate() {
        let (part, lane) = (place as usize / LANES, place as usize % LANES);
        let of_part = &mut weights[part * size..(part + 1) * size];
        for pair in refined.pairs_of(at) {
            of_part[usize::from(refined.heads[pair]) * LANES + lane] = carried[pair];
        }
    }
    sums.clear();
    sums.resize(size, 0.0);
    for weights in weights.chunks_exact(size) {
        for (sum, w) in sums.iter_mut().zip(weights) {
            *sum += w;
        }
    }
    masses.clear();
    masses
        .extend(sums.chunks_exact(LANES).map(|sums| sums.iter().map(|&s| f64::from(s)).sum::<f64>() as f32));
}

/// Exponentials relative to the largest logit that is left: for a tail far below what was selected.
fn again(isa: Isa, frontier: &Frontier, deep: &mut Deep) {
    let (group, refined) = (frontier.group, &frontier.refined);
    let Deep { logits, exps, weights, shift } = deep;
    logits.clone_from(&frontier.logits);
    for (at, &place) in refined.places.iter().enumerate() {
        let (part, lane) = (place as usize / LANES, place as usize % LANES);
        for pair in refined.pairs_of(at) {
            logits[(part * group + usize::from(refined.heads[pair])) * LANES + lane] = f32::NEG_INFINITY;
        }
    }
    shift.fill(f32::NEG_INFINITY);
    dense::maxima(isa, logits, &frontier.rest, shift);
    for (&head, row) in refined.heads.iter().zip(refined.logits().chunks_exact(LANES)) {
        let most = &mut shift[usize::from(head)];
        *most = row.iter().fold(*most, |most, &x| most.max(x));
    }
    // A head that nothing is left for keeps weights of zero.
    shift.iter_mut().filter(|s| **s == f32::NEG_INFINITY).for_each(|s| *s = 0.0);
    let mut sums = vec![0.0; group * LANES];
    exps.resize(logits.len(), 0.0);
    dense::exps(isa, (logits, &frontier.rest), shift, (exps, &mut sums));
    weights.resize(refined.logits().len(), 0.0);
    pairs::weigh(isa, &refined.heads, refined.logits(), shift, (weights, &mut sums));
}

/// Adds the values of pages, nodes and young tokens by `scratch.weights`.
fn add_parts(
    isa: Isa,
    (pages, levels): (&Pages, &[Blocks]),
    frontier: &Frontier,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let blocks_of = |level: u8| match level {
        YOUNG => &pages.young,
        0 | SILENT => &pages.blocks,
        level => &levels[usize::from(level) - 1],
    };
    let size = frontier.group * LANES;
    let Scratch { weights, inverse, .. } = scratch;
    for (at, (part, weights)) in frontier.parts.iter().zip(weights.chunks_exact_mut(size)).enumerate() {
        if let Some(ahead) = frontier.parts.get(at + AHEAD) {
            prefetch(blocks_of(ahead.level).block_values(ahead.block as usize));
        }
        let blocks = blocks_of(part.level);
        let block = part.block as usize;
        let scales = &blocks.value_scale[Blocks::entries(block)];
        let mut largest = 0.0f32;
        for (weights, inverse) in weights.chunks_exact_mut(LANES).zip(inverse.iter()) {
            for (w, s) in weights.iter_mut().zip(scales) {
                let share = *w * inverse;
                largest = if share > largest { share } else { largest };
                *w = share * s;
            }
        }
        if largest >= WEIGHT_MIN {
            dense::accumulate(isa, blocks.block_values(block), weights, out);
        }
    }
}

/// Adds the value residuals of the tokens that stand for themselves, `tokens` `[pairs, 16]` being their weights.
fn add_residuals(
    pages: &Pages,
    (frontier, tokens): (&Frontier, &[f32]),
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let Some(sketch) = pages.sketch.as_ref().filter(|sketch| sketch.config().v_bits() > 0) else { return };
    if frontier.refined.pages.is_empty() {
        return;
    }
    let Scratch { carried, residual, inverse, .. } = scratch;
    let padded = sketch.padded_dim();
    residual.clear();
    residual.resize(frontier.group * padded, 0.0);
    sketch.add_weighted(&frontier.refined.pairs(), (tokens, carried), residual);
    for ((out, residual), inverse) in
        out.chunks_exact_mut(pages.dim).zip(residual.chunks_exact_mut(padded)).zip(inverse.iter())
    {
        sketch.finish(residual);
        for (o, &r) in out.iter_mut().zip(residual.iter()) {
            *o += r * inverse;
        }
    }
}
