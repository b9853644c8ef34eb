//! What every page index does with a query once it knows which blocks to score: logits, normalisation, selection, tail.

use crate::blocks::{Blocks, LANES};
use crate::check;
use crate::error::IndexError;
use crate::found::{Found, Frontier, Part, YOUNG};
use crate::idmap::Place;
use crate::index::{Hit, KeyId, Query, SearchParams, Tail, TailOut};
use crate::pages::Pages;
use crate::scratch::{Hidden, Scratch};
use crate::simd::Isa;
use crate::simd::dense;
use crate::topk::Ranked;

/// Summary weights below this share of the largest one do not move the tail's value: 2^24 such summaries together
/// weigh less than 0.2 % of it. Their mass still counts in the lse.
const WEIGHT_MIN: f32 = 1e-10;

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
        scratch.quant.set(&scratch.q, query.group, query.scale);
        self.found.clear();
        self.found.frontier.group = query.group;
        self.found.frontier.stamp = self.pages.stamp;
        self.found.frontier.candidates = 0;
        self.found.frontier.answers = params.tail != Tail::Off;
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
            frontier.lanes[at * LANES + e % LANES] = u16::from(there);
        }
    }

    /// Scores all young tokens.
    pub fn add_all_young(&mut self) {
        for block in 0..self.pages.num_young.div_ceil(LANES) {
            self.add_young(block);
        }
    }

    /// Scores the pages of a block.
    pub fn add_pages(&mut self, block: usize) {
        let at = self.add(&self.pages.blocks, Part { level: 0, block: block as u32 });
        let blocks = &self.pages.blocks;
        let frontier = &mut self.found.frontier;
        for e in Blocks::entries(block) {
            if blocks.count[e] > 0 {
                frontier.rest[at * LANES + e % LANES] = blocks.count[e] as f32;
                frontier.lanes[at * LANES + e % LANES] = self.pages.live[blocks.child[e] as usize];
            }
        }
        let from = self.scratch.hidden.partition_point(|h| (h.entry as usize) < block * LANES);
        for h in self.scratch.hidden[from..].iter().take_while(|h| h.entry as usize / LANES == block) {
            let place = at * LANES + h.entry as usize % LANES;
            frontier.lanes[place] &= !h.lanes;
            frontier.rest[place] = frontier.lanes[place].count_ones() as f32;
        }
    }

    /// Scores the nodes of a block of tree level `level`, all of which are unopened so far.
    pub fn add_nodes(&mut self, nodes: &Blocks, level: u8, block: usize) -> usize {
        let at = self.add(nodes, Part { level, block: block as u32 });
        let frontier = &mut self.found.frontier;
        for e in Blocks::entries(block) {
            frontier.rest[at * LANES + e % LANES] = nodes.count[e] as f32;
        }
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
            &blocks.key_scale[Blocks::entries(block)],
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
        for (norm, attended) in norm.iter_mut().zip(attended.iter()) {
            let max = norm.max(*attended);
            if max == f32::NEG_INFINITY {
                continue;
            }
            *norm = max + ((*norm - max).exp() + (attended - max).exp()).ln();
        }
    }

    /// Ranks the candidates and takes tokens until the budget is full.
    pub fn select(&mut self, params: &SearchParams) {
        let Scratch { top, norm, .. } = &mut *self.scratch;
        let frontier = &mut self.found.frontier;
        top.start(params.budget);
        let mut best = [0.0f32; LANES];
        for part in 0..frontier.candidates {
            let mut lanes = dense::rank(self.isa, frontier.part(part), norm, top.threshold, &mut best);
            while lanes != 0 {
                let lane = lanes.trailing_zeros() as usize;
                lanes &= lanes - 1;
                let place = part * LANES + lane;
                if best[lane] > top.threshold {
                    top.offer(Ranked::new(best[lane], place, frontier.rest[place] as usize));
                }
            }
            if frontier.parts[part].level == 0 {
                self.found.pages_opened += LANES;
            }
        }
        for item in top.finish() {
            let place = item.place();
            let part = frontier.parts[place / LANES];
            let entry = part.block as usize * LANES + place % LANES;
            let base = match part.level {
                YOUNG => None,
                _ => Some(self.pages.blocks.child[entry] as usize * LANES),
            };
            while frontier.lanes[place] != 0 && self.found.tokens.len() < params.budget {
                let lane = frontier.lanes[place].trailing_zeros() as usize;
                let id = match base {
                    None => self.pages.young.child[entry],
                    Some(base) => self.pages.ids[base + lane],
                };
                self.found.tokens.push(Hit { id, score: item.score() });
                frontier.lanes[place] &= frontier.lanes[place] - 1;
                frontier.rest[place] -= 1.0;
            }
        }
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
        let sum: f64 = sums.iter().map(|&s| f64::from(s)).sum();
        *n += sum.ln() as f32;
    }
}

/// The tail state of what `found` left, in the caller's frame. `level` gives the blocks of a part's level.
pub(crate) fn tail<'p>(
    isa: Isa,
    pages: &'p Pages,
    (query, found, scratch): (&Query<'_>, &Found, &mut Scratch),
    level: impl Fn(u8) -> &'p Blocks,
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
    let Scratch { norm, sums, weights, .. } = scratch;
    log_mass(isa, (frontier, 0), norm, sums);
    weights.resize(group * LANES, 0.0);
    for (at, part) in frontier.parts.iter().enumerate() {
        let largest = dense::weigh(isa, frontier.part(at), norm, weights);
        if largest < WEIGHT_MIN {
            continue;
        }
        let blocks = level(part.level);
        let block = part.block as usize;
        let scales = &blocks.value_scale[Blocks::entries(block)];
        for w in weights.chunks_exact_mut(LANES) {
            for (w, &s) in w.iter_mut().zip(scales) {
                *w *= s;
            }
        }
        dense::accumulate(isa, blocks.block_values(block), weights, state.out);
    }
    pages.frame.value_out(state.out);
    for (h, (lse, &norm)) in state.lse.iter_mut().zip(norm.iter()).enumerate() {
        let q = &query.q[h * dim..(h + 1) * dim];
        *lse = if norm > f32::NEG_INFINITY { norm + pages.frame.bias(q) * query.scale } else { norm };
        if norm == f32::NEG_INFINITY {
            state.out[h * dim..(h + 1) * dim].fill(0.0);
        }
    }
    Ok(())
}
