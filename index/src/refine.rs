//! Telling pages apart into their tokens: which pages, for which heads, and the tokens' logits and weights.

use crate::blocks::{Blocks, LANES};
use crate::found::{Frontier, Part, SILENT, room_for};
use crate::pages::Pages;
use crate::scratch::Scratch;
use crate::search::{NODE_SPREAD, Pass, attend, ln_sum};
use crate::simd::dense;
use crate::simd::pairs::{self as kernels, Lift, Limits, RISE_MAX};
use crate::simd::vectorise::add;

/// What the log mass that an entry may hold exceeds its own estimate by, per unit of `|q|^2 scale^2 * reach`: a lone token far from
/// the mean may hold a head's whole mass and hardly move mean and variance of its page.
///
/// A needle is such a token. 51 questions for one of many pairs to SmolLM2-135M at 7.9K tokens, 256 attended, next-token KL to Full-KV
/// (largest of a question), page-head pairs told apart of 1,630: 0.1 .039 (1.6), 186; 0.2 .0029 (.02), 238; 0.3 .0024 (.02), 308. By the
/// page's variance instead: 0.3 .034 (1.6), 233; 1.0 .0022 (.02), 573.
pub(crate) const REACH: f32 = 0.25;

impl Pass<'_> {
    /// Replaces pages that hold a visible share of a head's mass by their tokens, scored by their codes, and brings `norm` up to date.
    pub(crate) fn refine(&mut self, detail: f32) {
        let Some(sketch) = self.pages.sketch.as_ref().filter(|sketch| sketch.config().k_bits() > 0) else {
            return;
        };
        let group = self.found.frontier.group;
        // A part holds at most sixteen pages.
        let most = self.found.frontier.parts.len() * LANES;
        self.found.frontier.refined.reserve(most, group);
        let Scratch { homes, of_page, best, tops, expected, carried, deep, .. } = &mut *self.scratch;
        room_for(homes, most);
        room_for(of_page, most);
        room_for(best, most * LANES);
        room_for(tops, most.max(group * LANES));
        room_for(expected, most);
        room_for(carried, most * group);
        deep.reserve(most, group);
        self.tell_apart(detail);
        let Frontier { refined, logits: page_logits, shift, exps, rest, .. } = &mut self.found.frontier;
        if refined.pages.is_empty() {
            return;
        }
        let Scratch { norm, prepared, spread, quant, homes, of_page, sums, tops, attended, .. } =
            &mut *self.scratch;
        homes.clear();
        homes.extend(refined.places.iter().map(|&place| {
            let (part, lane) = (place as usize / LANES, place as usize % LANES);
            (part * group * LANES + lane) as u32
        }));
        of_page.clear();
        let entry = |&page: &u32| self.pages.entry_of[page as usize] as usize;
        of_page.extend(refined.pages.iter().map(|page| self.pages.blocks.spread[entry(page)]));
        tops.clear();
        tops.resize(group * LANES, f32::NEG_INFINITY);
        let (pairs, left, logits, weights) = refined.tokens_mut();
        sketch.score(prepared, &pairs, logits);
        let scales = sketch.key_codes().scales;
        let by = &quant.spread;
        let lift = Lift { pairs, page_logits, homes, of_page, by, left, scales, spread, shift };
        kernels::lift(self.isa, &lift, (logits, weights), (tops, sums));
        let rise = shift.iter().zip(tops.chunks_exact(LANES));
        if rise.into_iter().any(|(shift, tops)| tops.iter().any(|top| top - shift > RISE_MAX)) {
            for (shift, tops) in shift.iter_mut().zip(tops.chunks_exact(LANES)) {
                *shift = tops.iter().fold(*shift, |most, &top| most.max(top));
            }
            // Tokens far above all page means: everything is taken again relative to them.
            sums.clear();
            sums.resize(group * LANES, 0.0);
            dense::exps(self.isa, (page_logits, rest), shift, (exps, sums));
            kernels::weigh(self.isa, pairs.heads, logits, shift, weights);
            for (at, (_, range)) in pairs.iter().enumerate() {
                for pair in range {
                    exps[homes[at] as usize + usize::from(pairs.heads[pair]) * LANES] = 0.0;
                }
            }
            sums.fill(0.0);
            let rows = weights.chunks_exact(LANES).zip(pairs.heads);
            for (weights, &head) in rows {
                add(&mut sums[usize::from(head) * LANES..][..LANES], weights);
            }
            for (exps, rest) in exps.chunks_exact(group * LANES).zip(rest.chunks_exact(LANES)) {
                add_mass(exps, rest, sums);
            }
        }
        norm.clear();
        norm.extend(shift.iter().zip(sums.chunks_exact(LANES)).map(|(shift, sums)| shift + ln_sum(sums)));
        attend(norm, attended);
        let num_pages = pairs.pages.len();
        self.found.pages_refined = num_pages;
        self.found.index_bytes_read += num_pages * sketch.key_bytes_per_page();
        self.found.tail_bytes_read += num_pages * sketch.value_bytes_per_page();
    }

    /// Lists the pages to be told apart with their heads, takes them out of the exponentials of the parts, and adds up the others in
    /// `scratch.sums`.
    fn tell_apart(&mut self, detail: f32) {
        let Scratch { norm, quant, boost, limit, masks, sums, .. } = &mut *self.scratch;
        let Frontier { parts, logits, rest, taken, exps, refined, group, .. } = &mut self.found.frontier;
        let group = *group;
        let threshold = threshold(detail, self.pages);
        limit.clear();
        limit.extend(norm.iter().map(|norm| norm + threshold));
        boost.clear();
        boost.extend(quant.spread.iter().map(|by| by * (REACH / NODE_SPREAD)));
        masks.resize(group, 0);
        sums.clear();
        sums.resize(group * LANES, 0.0);
        for (at, &Part { level, block }) in parts.iter().enumerate() {
            let exps = &mut exps[at * group * LANES..(at + 1) * group * LANES];
            let rest = &rest[at * LANES..(at + 1) * LANES];
            if level != 0 && level != SILENT {
                add_mass(exps, rest, sums);
                continue;
            }
            let part = dense::Part { logits: &logits[at * group * LANES..(at + 1) * group * LANES], rest };
            let entries = Blocks::entries(block as usize);
            let limits = Limits { limit, boost, reach: &self.pages.blocks.block_reach(block as usize) };
            let mut lanes = kernels::above(self.isa, part, limits, masks, (exps, sums));
            while lanes != 0 {
                let lane = lanes.trailing_zeros() as usize;
                lanes &= lanes - 1;
                let page = self.pages.blocks.child[entries.start + lane];
                let place = at * LANES + lane;
                refined.pages.push(page);
                refined.places.push(place as u32);
                refined.left.push(self.pages.live[page as usize] & !taken[place]);
                push_heads(masks, lane, &mut refined.heads);
                refined.ends.push(refined.heads.len() as u32);
            }
        }
    }
}

/// Appends the heads whose mask has bit `lane`, eight at a time and without a branch for each.
fn push_heads(masks: &[u16], lane: usize, heads: &mut Vec<u16>) {
    for (eight, masks) in masks.chunks(8).enumerate() {
        let byte = masks.iter().rev().fold(0, |byte, mask| 2 * byte + usize::from(mask >> lane & 1));
        let (set, len) = &BITS_OF[byte];
        let start = heads.len();
        heads.extend_from_slice(set);
        heads.truncate(start + len);
        if eight > 0 {
            heads[start..].iter_mut().for_each(|head| *head += 8 * eight as u16);
        }
    }
}

/// The bits set in each byte, rising, and their number.
static BITS_OF: [([u16; 8], usize); 256] = {
    let mut all = [([0; 8], 0); 256];
    let mut byte = 0;
    while byte < 256 {
        let mut bit = 0;
        while bit < 8 {
            if byte >> bit & 1 == 1 {
                all[byte].0[all[byte].1] = bit;
                all[byte].1 += 1;
            }
            bit += 1;
        }
        byte += 1;
    }
    all
};

/// Log share of the whole mass that is `times` as much as an average token's.
pub(crate) fn threshold(times: f32, pages: &Pages) -> f32 {
    times.ln() - (pages.map.len().max(1) as f32).ln()
}

/// `sums[h, lane] += exps[h, lane] * rest[lane]`
fn add_mass(exps: &[f32], rest: &[f32], sums: &mut [f32]) {
    for (sums, exps) in sums.chunks_exact_mut(LANES).zip(exps.chunks_exact(LANES)) {
        for ((sum, e), r) in sums.iter_mut().zip(exps).zip(rest) {
            *sum += e * r;
        }
    }
}
