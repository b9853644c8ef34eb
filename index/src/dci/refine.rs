//! Refinement of full pages: a token moves to a nearer page that has room, or changes places with a token of it, whenever
//! that brings both together closer to their pages' means.
//!
//! Lloyd's algorithm under a capacity. A round lets every token look at the pages of its own and the nearest super-nodes
//! (eight-bit dot products), then applies the wishes in order of gain, each checked in f32 against the means of the round's start.

use rayon::prelude::*;

use super::bisect::Rows;
use super::codebook::{Codebook, Codes};
use crate::blocks::LANES;
use crate::simd::Isa;

/// Pages as lists of rows, grouped into blocks of at most 16 pages.
#[derive(Clone, Debug)]
pub(crate) struct Pack {
    /// `[pages]` rows of each page.
    pub members: Vec<Vec<u32>>,
    /// `[blocks]` pages of each block.
    pub blocks: Vec<Vec<u32>>,
}

/// A token's wish to be elsewhere.
#[derive(Clone, Copy, Debug)]
struct Wish {
    gain: f32,
    token: u32,
    from: u32,
    to: u32,
}

fn mean_of(rows: Rows<'_>, members: &[u32], mean: &mut [f32]) {
    mean.fill(0.0);
    let share = 1.0 / members.len().max(1) as f32;
    for &i in members {
        for (m, &x) in mean.iter_mut().zip(rows.row(i)) {
            *m += share * x;
        }
    }
}

/// `x.c - |c|^2 / 2`, the closeness of the codebook in f32.
fn closeness(x: &[f32], centre: &[f32], half_norm: f32) -> f32 {
    super::bisect::dot(x, centre) - half_norm
}

/// Mean rows of all pages, `[pages, dim]`.
pub(crate) fn page_means(rows: Rows<'_>, pack: &Pack) -> Vec<f32> {
    let mut means = vec![0.0f32; pack.members.len() * rows.dim];
    means
        .par_chunks_mut(rows.dim)
        .zip(&pack.members)
        .for_each(|(mean, members)| mean_of(rows, members, mean));
    means
}

/// One round; returns how many tokens changed page.
pub(crate) fn round(isa: Isa, rows: Rows<'_>, codes: &Codes, pack: &mut Pack, nearby: &[Vec<u32>]) -> usize {
    let dim = rows.dim;
    let means = page_means(rows, pack);
    let mut book = Codebook::new(pack.blocks.len(), dim);
    for (block, pages) in pack.blocks.iter().enumerate() {
        for (lane, &page) in pages.iter().enumerate() {
            book.set(block * LANES + lane, &means[page as usize * dim..][..dim]);
        }
    }
    let mut wishes: Vec<Wish> = (0..pack.blocks.len())
        .into_par_iter()
        .flat_map_iter(|block| wishes_of(isa, codes, pack, &book, (block, &nearby[block])))
        .collect();
    wishes.sort_unstable_by(|a, b| b.gain.total_cmp(&a.gain).then(a.token.cmp(&b.token)));
    let half_norm: Vec<f32> = means.chunks_exact(dim).map(|m| 0.5 * super::bisect::dot(m, m)).collect();
    let close = |token: u32, page: u32| {
        let page = page as usize;
        closeness(rows.row(token), &means[page * dim..][..dim], half_norm[page])
    };
    let mut moved = 0;
    for wish in wishes {
        let (from, to) = (wish.from as usize, wish.to as usize);
        // An earlier exchange may have taken the token away.
        let Some(place) = pack.members[from].iter().position(|&t| t == wish.token) else { continue };
        let gain = close(wish.token, wish.to) - close(wish.token, wish.from);
        if gain <= 0.0 {
            continue;
        }
        if pack.members[to].len() < LANES && pack.members[from].len() > 1 {
            pack.members[from].swap_remove(place);
            pack.members[to].push(wish.token);
            moved += 1;
            continue;
        }
        let partner = pack.members[to]
            .iter()
            .enumerate()
            .map(|(at, &other)| (close(other, wish.from) - close(other, wish.to), at))
            .fold((f32::NEG_INFINITY, 0), |best, x| if x.0 > best.0 { x } else { best });
        if gain + partner.0 > 0.0 {
            let other = pack.members[to][partner.1];
            pack.members[from][place] = other;
            pack.members[to][partner.1] = wish.token;
            moved += 2;
        }
    }
    moved
}

/// What the tokens of one block wish, by their codes.
fn wishes_of(
    isa: Isa,
    codes: &Codes,
    pack: &Pack,
    book: &Codebook,
    (block, nearby): (usize, &[u32]),
) -> Vec<Wish> {
    let tokens: Vec<(u32, usize)> = pack.blocks[block]
        .iter()
        .enumerate()
        .flat_map(|(lane, &page)| pack.members[page as usize].iter().map(move |&t| (t, lane)))
        .collect();
    let mut points = Codes::new(tokens.len(), codes.stride);
    for (i, &(token, _)) in tokens.iter().enumerate() {
        points.copy_from(i, codes, token as usize);
    }
    let mut dots = Vec::new();
    let mut own = vec![0.0f32; tokens.len()];
    let mut best = vec![(f32::NEG_INFINITY, 0u32); tokens.len()];
    for &other in std::iter::once(&(block as u32)).chain(nearby) {
        book.visit(isa, other as usize, &points, &mut dots, |i, close| {
            if other as usize == block {
                own[i] = close[tokens[i].1];
            }
            for (lane, &c) in close.iter().enumerate() {
                if c > best[i].0 {
                    best[i] = (c, other * LANES as u32 + lane as u32);
                }
            }
        });
    }
    let wish = |i: usize| {
        let (close, entry) = best[i];
        let (token, lane) = tokens[i];
        let from = pack.blocks[block][lane];
        let to = pack.blocks[entry as usize / LANES][entry as usize % LANES];
        (to != from).then_some(Wish { gain: close - own[i], token, from, to })
    };
    (0..tokens.len()).filter_map(wish).collect()
}
