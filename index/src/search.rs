//! What every page index does with a query once it knows which blocks to score: logits, normalisation, selection, tail.

use crate::blocks::{Blocks, LANES};
use crate::check;
use crate::error::IndexError;
use crate::found::{Found, Frontier, Part, SILENT, SILENT_TOKENS, TOKENS, YOUNG};
use crate::idmap::Place;
use crate::index::{Hit, KeyId, Query, SearchParams, Tail, TailOut, Unit};
use crate::pages::Pages;
use crate::scratch::{Hidden, Scratch};
use crate::simd::Isa;
use crate::simd::dense::{self, Scales};
use crate::simd::prefetch::prefetch;
use crate::simd::vectorise::dot;
use crate::topk::Ranked;

/// Summary weights below this share of the largest one do not move the tail's value: 2^24 such summaries together
/// weigh less than 0.2 % of it. Their mass still counts in the lse.
const WEIGHT_MIN: f32 = 1e-10;

/// A page is told apart into its tokens when its average token has more than e^-2.7 = 7 % of the mass of an average token: on the
/// 1.5B traces the pages below add less than 1 % to the error at any budget up to 1024 (at e^-1.7 3 %, at e^0 30 %).
const REFINE_MIN: f32 = -2.7;

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
        for (norm, attended) in norm.iter_mut().zip(attended.iter()) {
            let max = norm.max(*attended);
            if max == f32::NEG_INFINITY {
                continue;
            }
            *norm = max + ((*norm - max).exp() + (attended - max).exp()).ln();
        }
    }

    /// Ranks and takes what the budget allows, and refines what stays behind, in the order that the unit asks for.
    pub fn choose(&mut self, params: &SearchParams) {
        self.normalise(0);
        if params.unit == Unit::Page {
            self.select(params);
            if params.tail != Tail::Off {
                self.refine();
            }
        } else {
            if self.refine() {
                self.normalise(0);
            }
            self.select(params);
        }
    }

    /// Replaces pages that hold a visible share of the mass by their tokens, one part each, scored by their codes. Returns
    /// whether any were.
    fn refine(&mut self) -> bool {
        let Some(sketch) = &self.pages.sketch else { return false };
        let Scratch { norm, pages, prepared, spread, quant, .. } = &mut *self.scratch;
        let frontier = &mut self.found.frontier;
        let group = frontier.group;
        let first = frontier.parts.len();
        let mut best = [0.0f32; LANES];
        let threshold = REFINE_MIN - (self.pages.map.len().max(1) as f32).ln();
        pages.clear();
        for part in 0..first {
            let Part { level, block } = frontier.parts[part];
            if level != 0 && level != SILENT {
                continue;
            }
            let mut lanes = dense::rank(self.isa, frontier.part(part), norm, threshold, &mut best);
            while lanes != 0 {
                let lane = lanes.trailing_zeros() as usize;
                lanes &= lanes - 1;
                let home = part * LANES + lane;
                let page = self.pages.blocks.child[block as usize * LANES + lane];
                pages.push(page);
                let level = if level == SILENT { SILENT_TOKENS } else { TOKENS };
                let at = frontier.push(Part { level, block: home as u32 });
                let left = self.pages.live[page as usize] & !frontier.taken[home];
                frontier.rest[home] = 0.0;
                for (token, rest) in frontier.rest[at * LANES..].iter_mut().enumerate() {
                    *rest = f32::from(left >> token & 1);
                }
            }
        }
        if pages.is_empty() {
            return false;
        }
        let (above, tokens) = frontier.logits.split_at_mut(first * group * LANES);
        if sketch.config().k_bits() > 0 {
            sketch.score(prepared, pages, tokens);
            self.found.index_bytes_read += pages.len() * sketch.key_bytes_per_page();
        }
        for ((part, &page_slot), rows) in
            frontier.parts[first..].iter().zip(pages.iter()).zip(tokens.chunks_exact_mut(group * LANES))
        {
            let (home, lane) = (part.block as usize / LANES, part.block as usize % LANES);
            let page = &above[home * group * LANES..(home + 1) * group * LANES];
            // The page's own spread is what the residuals tell apart: it leaves the score again.
            let entry = self.pages.entry_of[page_slot as usize] as usize;
            let of_page = if spread.is_empty() { 0.0 } else { self.pages.blocks.spread[entry] };
            for ((row, page), by) in
                rows.chunks_exact_mut(LANES).zip(page.chunks_exact(LANES)).zip(&quant.spread)
            {
                row.iter_mut().for_each(|x| *x += page[lane] - by * of_page);
            }
            let scales = sketch.key_scales(page_slot);
            for (row, &spread) in rows.chunks_exact_mut(LANES).zip(spread.iter()) {
                for (x, &scale) in row.iter_mut().zip(&scales) {
                    *x += spread * (scale * scale);
                }
            }
        }
        self.found.pages_refined = pages.len();
        self.found.tail_bytes_read += pages.len() * sketch.value_bytes_per_page();
        true
    }

    /// Ranks what is up for selection and takes tokens until the budget is full.
    fn select(&mut self, params: &SearchParams) {
        let Scratch { top, norm, .. } = &mut *self.scratch;
        let frontier = &mut self.found.frontier;
        top.start(params.budget);
        let mut best = [0.0f32; LANES];
        for part in 0..frontier.parts.len() {
            if !matches!(frontier.parts[part].level, 0 | YOUNG | TOKENS) {
                continue;
            }
            let mut lanes = dense::rank(self.isa, frontier.part(part), norm, top.threshold, &mut best);
            while lanes != 0 {
                let lane = lanes.trailing_zeros() as usize;
                lanes &= lanes - 1;
                let place = part * LANES + lane;
                if best[lane] > top.threshold {
                    top.offer(Ranked::new(best[lane], place, frontier.rest[place] as usize));
                }
            }
        }
        for item in top.finish() {
            let place = item.place();
            let (part, lane) = (frontier.parts[place / LANES], place % LANES);
            // Lanes that the entry still offers, and the ids that go with them.
            let (mut left, ids) = match part.level {
                YOUNG => (1, &self.pages.young.child[part.block as usize * LANES + lane..]),
                TOKENS => {
                    let home = part.block as usize;
                    let entry = frontier.parts[home / LANES].block as usize * LANES + home % LANES;
                    (1, &self.pages.ids[self.pages.blocks.child[entry] as usize * LANES + lane..])
                }
                _ => {
                    let page = self.pages.blocks.child[part.block as usize * LANES + lane] as usize;
                    let left = self.pages.live[page] & !frontier.taken[place];
                    (left, &self.pages.ids[page * LANES..])
                }
            };
            while left != 0 && self.found.tokens.len() < params.budget {
                let token = left.trailing_zeros() as usize;
                left &= left - 1;
                self.found.tokens.push(Hit { id: ids[token], score: item.score() });
                frontier.taken[place] |= 1 << token;
                frontier.rest[place] -= 1.0;
            }
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
        let sum: f64 = sums.iter().map(|&s| f64::from(s)).sum();
        *n += sum.ln() as f32;
    }
}

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
    log_mass(isa, (frontier, 0), &mut scratch.norm, &mut scratch.sums);
    let tokens = frontier.parts.iter().position(|p| matches!(p.level, TOKENS | SILENT_TOKENS));
    let first = tokens.unwrap_or(frontier.parts.len());
    let size = group * LANES;
    let Scratch { norm, weights, carried, .. } = scratch;
    carried.clear();
    if first < frontier.parts.len() {
        carried.resize(first * size, 0.0);
        weights.resize((frontier.parts.len() - first) * size, 0.0);
        for (at, weights) in (first..).zip(weights.chunks_exact_mut(size)) {
            dense::weigh(isa, frontier.part(at), norm, weights);
            let home = frontier.parts[at].block as usize;
            let carried = &mut carried[home / LANES * size..][..size];
            for (sum, row) in
                carried[home % LANES..].iter_mut().step_by(LANES).zip(weights.chunks_exact(LANES))
            {
                *sum = row.iter().sum();
            }
        }
    }
    add_residuals(pages, (frontier, first), scratch, state.out);
    let Scratch { norm, weights, carried, .. } = scratch;
    weights.resize(size, 0.0);
    let blocks_of = |part: &Part| match part.level {
        YOUNG => &pages.young,
        0 | SILENT => &pages.blocks,
        level => &levels[usize::from(level) - 1],
    };
    for at in 0..first {
        if let Some(ahead) = frontier.parts[..first].get(at + AHEAD) {
            prefetch(blocks_of(ahead).block_values(ahead.block as usize));
        }
        let weights = &mut weights[..size];
        let mut largest = dense::weigh(isa, frontier.part(at), norm, weights);
        // Empty without a sketch.
        for (w, &c) in weights.iter_mut().zip(carried.iter().skip(at * size)) {
            *w += c;
            largest = largest.max(*w);
        }
        if largest < WEIGHT_MIN {
            continue;
        }
        let blocks = blocks_of(&frontier.parts[at]);
        let block = frontier.parts[at].block as usize;
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

/// Adds the value residuals of the tokens that stand for themselves: `scratch.weights` holds their weights.
fn add_residuals(
    pages: &Pages,
    (frontier, first): (&Frontier, usize),
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let Some(sketch) = &pages.sketch else { return };
    if sketch.config().v_bits() == 0 || first == frontier.parts.len() {
        return;
    }
    let Scratch { pages: list, weights, residual, .. } = scratch;
    list.clear();
    list.extend(frontier.parts[first..].iter().map(|part| {
        let home = part.block as usize;
        pages.blocks.child[frontier.parts[home / LANES].block as usize * LANES + home % LANES]
    }));
    let padded = sketch.padded_dim();
    residual.clear();
    residual.resize(frontier.group * padded, 0.0);
    sketch.add_weighted(list, weights, residual);
    for (out, residual) in out.chunks_exact_mut(pages.dim).zip(residual.chunks_exact_mut(padded)) {
        sketch.finish(residual);
        for (o, &r) in out.iter_mut().zip(residual.iter()) {
            *o += r;
        }
    }
}
