//! Refinement of full pages: a token moves to a nearer page that has room, or changes places with a token of it, whenever
//! that brings both together closer to their pages' means.
//!
//! Lloyd's algorithm under a capacity. A round lets every token look at the pages of its own and the nearest super-nodes
//! (eight-bit dot products), then the wishes are granted in order of gain, measured against the means of the round's start.

use rayon::prelude::*;

use super::bisect::decode;
use super::codebook::{Codebook, Codes};
use crate::blocks::LANES;
use crate::simd::Isa;
use crate::simd::vectorise::{Kernel, dot, dot_bytes, vectorised};

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

struct Mean<'a> {
    codes: &'a Codes,
    members: &'a [u32],
    mean: &'a mut [f32],
}

impl Kernel for Mean<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.mean.fill(0.0);
        let share = 1.0 / self.members.len().max(1) as f32;
        for &i in self.members {
            decode(self.codes, i, share, self.mean);
        }
    }
}

/// Mean rows of all pages, `[pages, stride]`.
pub(crate) fn page_means(isa: Isa, codes: &Codes, pack: &Pack) -> Vec<f32> {
    let mut means = vec![0.0f32; pack.members.len() * codes.stride];
    let mean = |(mean, members): (&mut [f32], &Vec<u32>)| vectorised(isa, Mean { codes, members, mean });
    means.par_chunks_mut(codes.stride).zip(&pack.members).for_each(mean);
    means
}

/// One round against the page means `means` `[pages, dim]`; returns how many tokens changed page.
pub(crate) fn round(isa: Isa, codes: &Codes, means: &[f32], pack: &mut Pack, nearby: &[Vec<u32>]) -> usize {
    let dim = means.len() / pack.members.len().max(1);
    let mut book = Codebook::new(pack.blocks.len(), dim);
    for (block, pages) in pack.blocks.iter().enumerate() {
        for (lane, &page) in pages.iter().enumerate() {
            book.set(block * LANES + lane, &means[page as usize * dim..][..dim]);
        }
    }
    let surveys: Vec<Survey> = (0..pack.blocks.len())
        .into_par_iter()
        .map(|block| wishes_of(isa, codes, pack, &book, (block, &nearby[block])))
        .collect();
    let mut own = vec![0.0f32; codes.scale.len()];
    for &(token, close) in surveys.iter().flat_map(|s| &s.own) {
        own[token as usize] = close;
    }
    let mut wishes: Vec<Wish> = surveys.into_iter().flat_map(|s| s.wishes).collect();
    wishes.sort_unstable_by(|a, b| b.gain.total_cmp(&a.gain).then(a.token.cmp(&b.token)));
    let mut trade = Trade { codes, means: Codes::of(means, dim), half_norm: Vec::new(), own };
    trade.half_norm = means.chunks_exact(dim).map(|m| 0.5 * dot(m, m)).collect();
    wishes.into_iter().map(|wish| trade.grant(isa, pack, wish)).sum()
}

/// What a look at one block's tokens found.
struct Survey {
    /// Token and its closeness to its own page.
    own: Vec<(u32, f32)>,
    wishes: Vec<Wish>,
}

/// What the exchange knows about tokens and pages.
struct Trade<'a> {
    codes: &'a Codes,
    means: Codes,
    /// `[pages]` half the squared length of the mean.
    half_norm: Vec<f32>,
    /// `[tokens]` closeness to the page that the token was in at the start of the round.
    own: Vec<f32>,
}

impl Trade<'_> {
    /// Fulfils a wish if it still helps; returns how many tokens changed page.
    fn grant(&mut self, isa: Isa, pack: &mut Pack, wish: Wish) -> usize {
        let (from, to) = (wish.from as usize, wish.to as usize);
        // An earlier exchange may have taken the token away.
        let Some(place) = pack.members[from].iter().position(|&t| t == wish.token) else { return 0 };
        if pack.members[to].len() < LANES && pack.members[from].len() > 1 {
            pack.members[from].swap_remove(place);
            pack.members[to].push(wish.token);
            self.own[wish.token as usize] += wish.gain;
            return 1;
        }
        let mut close = [0.0f32; LANES];
        let members = &pack.members[to];
        vectorised(isa, CloseTo { trade: self, tokens: members, page: from, out: &mut close });
        let mut best = (f32::NEG_INFINITY, 0);
        for (at, (&token, &close)) in members.iter().zip(&close).enumerate() {
            let gain = close - self.own[token as usize];
            if gain > best.0 {
                best = (gain, at);
            }
        }
        if wish.gain + best.0 <= 0.0 {
            return 0;
        }
        let other = pack.members[to][best.1];
        pack.members[from][place] = other;
        pack.members[to][best.1] = wish.token;
        self.own[wish.token as usize] += wish.gain;
        self.own[other as usize] += best.0;
        2
    }
}

/// Closeness of tokens to one page, by their codes.
struct CloseTo<'a, 'b> {
    trade: &'a Trade<'b>,
    tokens: &'a [u32],
    page: usize,
    out: &'a mut [f32; LANES],
}

impl Kernel for CloseTo<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (codes, means) = (self.trade.codes, &self.trade.means);
        let stride = codes.stride;
        let mean = &means.rows[self.page * stride..][..stride];
        let (scale, half_norm) = (means.scale[self.page], self.trade.half_norm[self.page]);
        for (out, &token) in self.out.iter_mut().zip(self.tokens) {
            let row = &codes.rows[token as usize * stride..][..stride];
            *out = dot_bytes(row, mean) as f32 * (scale * codes.scale[token as usize]) - half_norm;
        }
    }
}

/// How close the tokens of one block are to their pages, and what they wish.
fn wishes_of(
    isa: Isa,
    codes: &Codes,
    pack: &Pack,
    book: &Codebook,
    (block, nearby): (usize, &[u32]),
) -> Survey {
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
    let wishes = (0..tokens.len()).filter_map(wish).collect();
    Survey { own: tokens.iter().zip(&own).map(|(t, &o)| (t.0, o)).collect(), wishes }
}
