//! What every page index does with a query once it knows which blocks to score: logits, normalisation, selection.

use crate::blocks::{Blocks, LANES};
use crate::check;
use crate::error::IndexError;
use crate::found::{Found, Frontier, Part, SILENT, YOUNG};
use crate::idmap::Place;
use crate::index::{Hit, KeyId, Query, SearchParams, Tail, Unit};
use crate::pages::Pages;
use crate::scratch::{Hidden, Scratch};
use crate::simd::Isa;
use crate::simd::dense::{self, Scales};
use crate::simd::pairs;
use crate::simd::vectorise::dot;
use crate::topk::Ranked;

/// What a node's logit gains per unit of its tokens' variance along the query, `|q|^2 scale^2 * spread`.
///
/// The mean of `exp` over a node is more than `exp` of its mean: with Gaussian keys by half the variance. Measured on the 1.5B
/// traces without a sketch at 96, 256, 1024 tokens: error .262 .195 .120 without it, .209 .151 .092 with 0.25, .204 .149 .093 with 0.4,
/// .219 .164 .108 with 0.5, .453 .405 .319 with 1.
pub(crate) const NODE_SPREAD: f32 = 0.33;

/// Part of half the variance of a score that is added to it.
///
/// A token's exact logit is its score plus the query's product with the code's error, so its expected weight is
/// `exp(score + variance / 2)`; in theory the factor is 0.5. Measured on the 1.5B traces at 1024 tokens (k1 / k2v1): error .0527 / .0210
/// without, .0478 / .0194 with 0.25, .0540 / .0204 with 0.5: real queries lean towards directions that the codes describe well.
pub(crate) const SPREAD: f32 = 0.25;

/// Mean squared error of a coordinate's code over its squared scale, for Gaussian coordinates: `pi / 2 - 1` for signs, and the
/// distortion of the best uniform quantiser over its squared half step for 4 and 16 levels (.1188 / .498^2, .01154 / .1676^2; Max 1960).
pub(crate) fn code_error(bits: usize) -> f32 {
    match bits {
        1 => std::f32::consts::FRAC_PI_2 - 1.0,
        2 => 0.479,
        _ => 0.411,
    }
}

/// Blocks between asking for one and using it: scoring takes about 50 ns, memory about 100.
const AHEAD: usize = 3;

/// One search under way.
pub(crate) struct Pass<'a> {
    pub isa: Isa,
    pub pages: &'a Pages,
    pub scratch: &'a mut Scratch,
    pub found: &'a mut Found,
}

impl Pass<'_> {
    /// Checks the input, brings the query into the frame and marks what is excluded.
    pub fn begin(
        &mut self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
    ) -> Result<(), IndexError> {
        check::query(query, self.pages.dim)?;
        check::exclude(exclude)?;
        check::params(params)?;
        let scratch = &mut *self.scratch;
        scratch.q.resize(query.q.len(), 0.0);
        self.pages.frame.query_in(query.q, &mut scratch.q);
        let heads = query.q.chunks_exact(self.pages.dim);
        scratch.attended.clear();
        let attended =
            query.attended_lse.iter().zip(heads).map(|(lse, q)| lse - self.pages.frame.bias(q) * query.scale);
        scratch.attended.extend(attended);
        scratch.quant.set(&scratch.q, query, NODE_SPREAD);
        self.found.clear();
        self.found.frontier.group = query.group;
        self.found.frontier.stamp = self.pages.stamp;
        self.found.frontier.answers = params.tail != Tail::Off;
        scratch.spread.clear();
        if let Some(sketch) = &self.pages.sketch
            && sketch.config().k_bits() > 0
        {
            let bits = sketch.config().k_bits();
            sketch.prepare(query, bits, &mut scratch.prepared);
            let by = SPREAD * code_error(bits) * query.scale * query.scale;
            scratch.spread.extend(query.q.chunks_exact(self.pages.dim).map(|q| by * dot(q, q)));
        }
        hide(self.pages, exclude, scratch);
        Ok(())
    }

    /// Scores a block of the young tokens.
    fn add_young(&mut self, block: usize) {
        let (young, num) = (&self.pages.young, self.pages.num_young);
        let at = self.add(young, Part { level: YOUNG, block: block as u32 });
        let frontier = &mut self.found.frontier;
        for e in Blocks::entries(block) {
            let there = e < num && self.scratch.hidden_young.binary_search(&(e as u32)).is_err();
            frontier.rest[at * LANES + e % LANES] = f32::from(u8::from(there));
        }
    }

    /// Scores all young tokens.
    pub fn add_all_young(&mut self) {
        for block in 0..self.pages.num_young.div_ceil(LANES) {
            self.add_young(block);
        }
    }

    /// Scores the pages of scattered blocks, which are up for selection.
    pub fn add_opened(&mut self, opened: &[u32]) {
        for (i, &block) in opened.iter().enumerate() {
            if let Some(&ahead) = opened.get(i + AHEAD) {
                self.pages.blocks.prefetch_keys(ahead as usize);
            }
            self.add_pages(block as usize);
        }
    }

    /// Scores the pages of a block, which are up for selection.
    pub fn add_pages(&mut self, block: usize) {
        self.found.pages_opened += LANES;
        self.add_pages_as(0, block);
    }

    /// Scores the pages of a block for the tail alone.
    pub fn add_silent_pages(&mut self, block: usize) {
        self.add_pages_as(SILENT, block);
    }

    fn add_pages_as(&mut self, level: u8, block: usize) {
        let at = self.add(&self.pages.blocks, Part { level, block: block as u32 });
        let blocks = &self.pages.blocks;
        let frontier = &mut self.found.frontier;
        fill_rest(&mut frontier.rest[at * LANES..], blocks, block);
        let from = self.scratch.hidden.partition_point(|h| (h.entry as usize) < block * LANES);
        for h in self.scratch.hidden[from..].iter().take_while(|h| h.entry as usize / LANES == block) {
            let place = at * LANES + h.entry as usize % LANES;
            frontier.taken[place] = h.lanes;
            frontier.rest[place] -= h.lanes.count_ones() as f32;
        }
    }

    /// Scores the nodes of a block of tree level `level`, all of which are unopened so far.
    pub fn add_nodes(&mut self, nodes: &Blocks, level: u8, block: usize) -> usize {
        let at = self.add(nodes, Part { level, block: block as u32 });
        let frontier = &mut self.found.frontier;
        fill_rest(&mut frontier.rest[at * LANES..], nodes, block);
        let hidden = &self.scratch.hidden_above[usize::from(level) - 1];
        let from = hidden.partition_point(|h| (h.0 as usize) < block * LANES);
        for &(e, num) in hidden[from..].iter().take_while(|h| h.0 as usize / LANES == block) {
            frontier.rest[at * LANES + e as usize % LANES] -= num as f32;
        }
        at
    }

    fn add(&mut self, blocks: &Blocks, part: Part) -> usize {
        let frontier = &mut self.found.frontier;
        let at = frontier.push(part);
        let size = frontier.group * LANES;
        let block = part.block as usize;
        dense::logits(
            self.isa,
            blocks.block_keys(block),
            Scales {
                key: &blocks.key_scale[Blocks::entries(block)],
                spread: &blocks.spread[Blocks::entries(block)],
            },
            &self.scratch.quant,
            &mut frontier.logits[at * size..(at + 1) * size],
        );
        self.found.nodes_scored += LANES;
        self.found.index_bytes_read += blocks.key_stride() + LANES * 12;
        self.found.tail_bytes_read += LANES * (blocks.dim + 4);
        at
    }

    /// Log normaliser of each head over everything scored since part `first` and what is attended anyway.
    pub fn normalise(&mut self, first: usize) {
        let Scratch { norm, sums, attended, .. } = &mut *self.scratch;
        log_mass(self.isa, (&self.found.frontier, first), norm, sums);
        attend(norm, attended);
    }

    /// Exponentials of every part's logits and, in `norm`, the log normaliser over them and what is attended anyway.
    fn weigh_parts(&mut self) {
        let Scratch { norm, sums, attended, .. } = &mut *self.scratch;
        let frontier = &mut self.found.frontier;
        let shift = &mut frontier.shift;
        shift.clear();
        shift.resize(frontier.group, f32::NEG_INFINITY);
        dense::maxima(self.isa, &frontier.logits, &frontier.rest, shift);
        sums.clear();
        sums.resize(frontier.group * LANES, 0.0);
        frontier.exps.resize(frontier.logits.len(), 0.0);
        let of_parts = (frontier.logits.as_slice(), frontier.rest.as_slice());
        dense::exps(self.isa, of_parts, shift, (&mut frontier.exps, sums));
        norm.clear();
        norm.extend(shift.iter().zip(sums.chunks_exact(LANES)).map(|(shift, sums)| shift + ln_sum(sums)));
        attend(norm, attended);
    }

    /// Ranks and takes what the budget allows, and tells pages apart into tokens, in the order that the unit asks for.
    pub fn choose(&mut self, params: &SearchParams) {
        self.weigh_parts();
        if params.unit == Unit::Page {
            self.select(params);
            if params.tail != Tail::Off {
                self.refine(params.detail);
            }
        } else {
            self.refine(params.detail);
            self.select(params);
        }
    }

    /// Ranks what is up for selection and takes tokens until the budget is full.
    fn select(&mut self, params: &SearchParams) {
        self.scratch.top.start(params.budget);
        self.rank_tokens();
        self.offer_parts();
        self.offer_tokens();
        let frontier = &mut self.found.frontier;
        let first_token = frontier.parts.len() * LANES;
        for item in self.scratch.top.finish() {
            let place = item.place();
            let score = item.score();
            if place >= first_token {
                let (at, lane) = ((place - first_token) / LANES, place % LANES);
                let home = frontier.refined.places[at] as usize;
                let id = self.pages.ids[frontier.refined.pages[at] as usize * LANES + lane];
                self.found.tokens.push(Hit { id, score });
                frontier.refined.take(at, lane);
                frontier.taken[home] |= 1 << lane;
                frontier.rest[home] -= 1.0;
                continue;
            }
            let (part, lane) = (frontier.parts[place / LANES], place % LANES);
            let entry = part.block as usize * LANES + lane;
            // Lanes that the entry still offers, and the ids that go with them.
            let (mut left, ids) = if part.level == YOUNG {
                (1, &self.pages.young.child[entry..])
            } else {
                let page = self.pages.blocks.child[entry] as usize;
                (self.pages.live[page] & !frontier.taken[place], &self.pages.ids[page * LANES..])
            };
            while left != 0 && self.found.tokens.len() < params.budget {
                let token = left.trailing_zeros() as usize;
                left &= left - 1;
                self.found.tokens.push(Hit { id: ids[token], score });
                frontier.taken[place] |= 1 << token;
                frontier.rest[place] -= 1.0;
            }
        }
    }

    /// Offers young tokens and the pages that were not told apart.
    fn offer_parts(&mut self) {
        let Scratch { top, norm, .. } = &mut *self.scratch;
        let frontier = &self.found.frontier;
        let mut refined = frontier.refined.places.iter().peekable();
        let mut best = [0.0f32; LANES];
        for part in 0..frontier.parts.len() {
            let mut apart = 0u16;
            while let Some(place) = refined.next_if(|&&place| place as usize / LANES == part) {
                apart |= 1 << (*place as usize % LANES);
            }
            if !matches!(frontier.parts[part].level, 0 | YOUNG) {
                continue;
            }
            let mut lanes = dense::rank(self.isa, frontier.part(part), norm, top.threshold, &mut best);
            lanes &= !apart;
            while lanes != 0 {
                let lane = lanes.trailing_zeros() as usize;
                lanes &= lanes - 1;
                let place = part * LANES + lane;
                if best[lane] > top.threshold {
                    top.offer(Ranked::new(best[lane], place, frontier.rest[place] as usize));
                }
            }
        }
    }

    /// Scores the tokens of pages that were told apart; the best ones of each page tell what the selection must reach.
    fn rank_tokens(&mut self) {
        let Scratch { top, norm, best, tops, expected, .. } = &mut *self.scratch;
        let Frontier { refined, parts, .. } = &self.found.frontier;
        best.resize(refined.pages.len() * LANES, 0.0);
        tops.resize(refined.pages.len(), 0.0);
        pairs::best(self.isa, &refined.pairs(), refined.logits(), norm, (best, tops));
        expected.clear();
        for (top, &place) in tops.iter_mut().zip(&refined.places) {
            if parts[place as usize / LANES].level == SILENT {
                *top = f32::NEG_INFINITY;
            } else {
                expected.push(*top);
            }
        }
        top.expect(expected);
    }

    /// Offers the tokens of pages that were told apart.
    fn offer_tokens(&mut self) {
        let Scratch { top, best, tops, .. } = &mut *self.scratch;
        let Frontier { parts, .. } = &self.found.frontier;
        for (at, (&most, best)) in tops.iter().zip(best.as_chunks::<LANES>().0).enumerate() {
            if most <= top.threshold {
                continue;
            }
            for (lane, &score) in best.iter().enumerate() {
                // Lanes that are not left score minus infinity, which no threshold lies below.
                if score > top.threshold {
                    top.offer(Ranked::new(score, (parts.len() + at) * LANES + lane, 1));
                }
            }
        }
    }
}

/// `ln` of a sum in f64.
pub(crate) fn ln_sum(sums: &[f32]) -> f32 {
    sums.iter().map(|&s| f64::from(s)).sum::<f64>().ln() as f32
}

/// Adds to each log mass what is attended anyway; nothing where that is not known.
pub(crate) fn attend(norm: &mut [f32], attended: &[f32]) {
    for (norm, attended) in norm.iter_mut().zip(attended) {
        let max = norm.max(*attended);
        if max > f32::NEG_INFINITY {
            *norm = max + ((*norm - max).exp() + (attended - max).exp()).ln();
        }
    }
}

/// Tokens below the entries of a block.
fn fill_rest(rest: &mut [f32], blocks: &Blocks, block: usize) {
    for (rest, &count) in rest.iter_mut().zip(&blocks.count[Blocks::entries(block)]) {
        // Counts stay below 2^31, and signed conversion is one instruction.
        *rest = count as i32 as f32;
    }
}

/// Finds the excluded tokens' pages. Ids that are not held are skipped.
fn hide(pages: &Pages, exclude: &[KeyId], scratch: &mut Scratch) {
    scratch.hidden.clear();
    scratch.hidden_young.clear();
    for &id in exclude {
        match pages.map.get(id) {
            None => {}
            Some(Place::Young(entry)) => scratch.hidden_young.push(entry as u32),
            Some(Place::Slot(slot)) => {
                let entry = pages.entry_of[slot / LANES];
                scratch.hidden.push(Hidden { entry, lanes: 1 << (slot % LANES) });
            }
        }
    }
    scratch.hidden_young.sort_unstable();
    scratch.hidden.sort_unstable_by_key(|h| h.entry);
    scratch.hidden.dedup_by(|next, kept| {
        let same = next.entry == kept.entry;
        if same {
            kept.lanes |= next.lanes;
        }
        same
    });
}

/// `norm[h] = ln sum rest exp(logit)` over all parts since `first`; -inf where nothing is left. `sums` is working memory.
fn log_mass(isa: Isa, (frontier, first): (&Frontier, usize), norm: &mut Vec<f32>, sums: &mut Vec<f32>) {
    let (logits, rest) =
        (&frontier.logits[first * frontier.group * LANES..], &frontier.rest[first * LANES..]);
    norm.clear();
    norm.resize(frontier.group, f32::NEG_INFINITY);
    dense::maxima(isa, logits, rest, norm);
    sums.clear();
    sums.resize(frontier.group * LANES, 0.0);
    dense::masses(isa, logits, rest, norm, sums);
    for (n, sums) in norm.iter_mut().zip(sums.chunks_exact(LANES)) {
        *n += ln_sum(sums);
    }
}
