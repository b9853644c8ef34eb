//! The tail: attention over everything that a search left, by summaries and codes.

use crate::blocks::{Blocks, LANES};
use crate::check;
use crate::error::IndexError;
use crate::found::{Found, Frontier, Part, SILENT, YOUNG};
use crate::index::{Query, TailOut};
use crate::pages::Pages;
use crate::scratch::{Deep, Scratch};
use crate::simd::Isa;
use crate::simd::codes::Weights;
use crate::simd::dense;
use crate::simd::pairs;
use crate::simd::prefetch::prefetch;

/// Mass relative to the largest logit of the search below which the weights lose digits and are taken again.
const MASS_MIN: f64 = 1e-20;

/// The values of a page's tokens are told apart for a head when the page has more than e^-1 = 37 % of an average page's part of the
/// tail. On the traces of the 1.5B, 0.5B and 135M models that spares 18, 34 and 12 % of the sums and adds 1.0, 2.2 and 0.5 % to the
/// error at 256 tokens (at e^-0.5 31, 48 and 24 % and 2.7, 5 and 1.5 %).
const VALUE_MIN: f32 = -1.0;

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
    let levels = |level: u8| match level {
        YOUNG => &pages.young,
        0 | SILENT => &pages.blocks,
        level => &levels[usize::from(level) - 1],
    };
    let (mut tokens, mut shift) = (frontier.refined.weights(), frontier.shift.as_slice());
    weigh(isa, levels, frontier, (&frontier.exps, tokens), scratch);
    if scratch.masses.iter().any(|&mass| mass < MASS_MIN) {
        again(isa, frontier, &mut deep);
        (tokens, shift) = (&deep.weights, &deep.shift);
        weigh(isa, levels, frontier, (&deep.exps, tokens), scratch);
    }
    let Scratch { masses, inverse, norm, .. } = &mut *scratch;
    inverse.clear();
    inverse.extend(masses.iter().map(|&mass| if mass > 0.0 { (1.0 / mass) as f32 } else { 0.0 }));
    norm.clear();
    norm.extend(
        masses
            .iter()
            .zip(shift)
            .map(|(&mass, shift)| if mass > 0.0 { shift + mass.ln() as f32 } else { f32::NEG_INFINITY }),
    );
    add_residuals(pages, (frontier, tokens), scratch, state.out);
    add_parts(isa, levels, frontier, scratch, state.out);
    for (out, inverse) in state.out.chunks_exact_mut(dim).zip(&scratch.inverse) {
        out.iter_mut().for_each(|x| *x *= inverse);
    }
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

/// Fills `scratch.weights` `[parts, group, 16]` with the weights of all entries times the scales of their values, those of refined
/// pages being their tokens' sums (`scratch.carried` `[pairs]`), and `scratch.masses` `[group]` with the sums of the weights.
fn weigh<'a>(
    isa: Isa,
    blocks_of: impl Fn(u8) -> &'a Blocks,
    frontier: &Frontier,
    (exps, tokens): (&[f32], &[f32]),
    scratch: &mut Scratch,
) {
    let refined = &frontier.refined;
    let size = frontier.group * LANES;
    let Scratch { weights, carried, masses, sums, .. } = scratch;
    weights.resize(exps.len(), 0.0);
    sums.clear();
    sums.resize(size, 0.0);
    let scales_of = |part: usize| {
        let Part { level, block } = frontier.parts[part];
        &blocks_of(level).value_scale[Blocks::entries(block as usize)]
    };
    for (at, (weights, exps)) in weights.chunks_exact_mut(size).zip(exps.chunks_exact(size)).enumerate() {
        dense::weigh(isa, exps, (frontier.rest_of(at), scales_of(at)), weights, sums);
    }
    masses.clear();
    masses.extend(sums.chunks_exact(LANES).map(|sums| sums.iter().map(|&s| f64::from(s)).sum::<f64>()));
    carried.resize(refined.heads.len(), 0.0);
    pairs::sums(isa, tokens, carried);
    for ((_, range), &place) in refined.pairs().iter().zip(&refined.places) {
        let (part, lane) = (place as usize / LANES, place as usize % LANES);
        let of_part = &mut weights[part * size..(part + 1) * size];
        let scale = scales_of(part)[lane];
        for (&head, &mass) in refined.heads[range.clone()].iter().zip(&carried[range]) {
            of_part[usize::from(head) * LANES + lane] = mass * scale;
            masses[usize::from(head)] += f64::from(mass);
        }
    }
}

/// Exponentials relative to the largest logit that is left: for a tail far below what was selected.
fn again(isa: Isa, frontier: &Frontier, deep: &mut Deep) {
    let (group, refined) = (frontier.group, &frontier.refined);
    let Deep { logits, exps, weights, shift, sums } = deep;
    logits.clone_from(&frontier.logits);
    for (at, &place) in refined.places.iter().enumerate() {
        let (part, lane) = (place as usize / LANES, place as usize % LANES);
        for pair in refined.pairs_of(at) {
            logits[(part * group + usize::from(refined.heads[pair])) * LANES + lane] = f32::NEG_INFINITY;
        }
    }
    shift.clear();
    shift.resize(group, f32::NEG_INFINITY);
    dense::maxima(isa, logits, &frontier.rest, shift);
    for (&head, row) in refined.heads.iter().zip(refined.logits().chunks_exact(LANES)) {
        let most = &mut shift[usize::from(head)];
        *most = row.iter().fold(*most, |most, &x| most.max(x));
    }
    // A head that nothing is left for keeps weights of zero.
    shift.iter_mut().filter(|s| **s == f32::NEG_INFINITY).for_each(|s| *s = 0.0);
    sums.resize(group * LANES, 0.0);
    exps.resize(logits.len(), 0.0);
    dense::exps(isa, (logits, &frontier.rest), shift, (exps, sums));
    weights.resize(refined.logits().len(), 0.0);
    pairs::weigh(isa, &refined.heads, refined.logits(), shift, weights);
}

/// Adds the values of pages, nodes and young tokens by `scratch.weights`.
fn add_parts<'a>(
    isa: Isa,
    blocks_of: impl Fn(u8) -> &'a Blocks,
    frontier: &Frontier,
    scratch: &Scratch,
    out: &mut [f32],
) {
    let size = frontier.group * LANES;
    for (at, (part, weights)) in frontier.parts.iter().zip(scratch.weights.chunks_exact(size)).enumerate() {
        if let Some(ahead) = frontier.parts.get(at + AHEAD) {
            prefetch(blocks_of(ahead.level).block_values(ahead.block as usize));
        }
        dense::accumulate(isa, blocks_of(part.level).block_values(part.block as usize), weights, out);
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
    let Scratch { carried, residual, masses, least, .. } = scratch;
    let padded = sketch.padded_dim();
    residual.clear();
    residual.resize(frontier.group * padded, 0.0);
    let share = VALUE_MIN.exp() * LANES as f32 / pages.map.len().max(1) as f32;
    least.clear();
    least.extend(masses.iter().map(|&mass| share * mass as f32));
    sketch.add_weighted(&frontier.refined.pairs(), Weights { tokens, sums: carried, least }, residual);
    for (out, residual) in out.chunks_exact_mut(pages.dim).zip(residual.chunks_exact_mut(padded)) {
        sketch.finish(residual);
        for (o, &r) in out.iter_mut().zip(residual.iter()) {
            *o += r;
        }
    }
}
