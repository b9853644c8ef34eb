//! Search: from the root down with a beam, each query head by itself; the heads' page lists are dealt out by rank.

use super::store::{NONE, ROOT, Store};
use super::{Icecache, STEP};
use crate::blocks::LANES;
use crate::found::Found;
use crate::hnsw::log_sum;
use crate::idmap::Place;
use crate::index::{Hit, KeyId, Query, SearchParams};
use crate::keys16;

/// Beam width per token of the index.
const FIELD_PER_TOKEN: f64 = 1.5e-3;
/// Least beam width.
const FIELD_MIN: f64 = 30.0;
/// Part of a node's children that a query looks at, at least.
const VISITED: f64 = 0.8;

/// How far a descent looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    /// Nodes kept from level to level.
    pub width: usize,
    /// Part of each node's children that is looked at; a node with no more children than `whole_below` is looked at whole.
    pub visited: f64,
    pub whole_below: usize,
}

/// Working memory of a descent.
#[derive(Debug, Default)]
pub(crate) struct Beam {
    /// Tokens looked at in the step under way, and their places and products.
    pub tokens: Vec<u32>,
    places: Vec<u32>,
    pub scores: Vec<f32>,
    nodes: Vec<u32>,
    ranked: Vec<(f32, u32)>,
}

impl Beam {
    /// Collects the tokens of the store that `keep` accepts.
    pub fn gather(&mut self, store: &Store, keep: impl Fn(u32) -> bool) {
        self.tokens.clear();
        self.tokens
            .extend((0..store.ids.len() as u32).filter(|&t| store.place[t as usize] != NONE && keep(t)));
    }

    /// Products of `row` with the collected tokens.
    pub fn score(&mut self, store: &Store, row: &[f32]) {
        self.places.clear();
        self.places.extend(self.tokens.iter().map(|&t| store.place[t as usize]));
        keys16::dots(store.isa, row, &store.keys, &self.places, &mut self.scores);
    }

    /// Adds the children of a node that lie nearest to `along` on its line.
    fn walk(&mut self, store: &Store, node: u32, along: f32, field: &Field) {
        let children = &store.nodes[node as usize].children;
        let n = children.len();
        let wanted = if n <= field.whole_below { n } else { (field.visited * n as f64).ceil() as usize };
        let mut low = children.partition_point(|c| c.along < along);
        let mut high = low;
        while high - low < wanted {
            for _ in 0..STEP.min(n - (high - low)) {
                let to_low = low.checked_sub(1).map(|l| along - children[l].along);
                let to_high = (high < n).then(|| children[high].along - along);
                match (to_low, to_high) {
                    (Some(l), Some(h)) if l < h => low -= 1,
                    (Some(_), None) => low -= 1,
                    _ => high += 1,
                }
            }
        }
        self.tokens.extend(children[low..high].iter().map(|c| c.token));
    }

    /// Keeps the best `width` nodes by `rank` of (token, product) for the next step; the better first, then the older.
    fn narrow(&mut self, store: &Store, width: usize, rank: impl Fn(u32, f32) -> f32) {
        self.ranked.clear();
        for (&token, &dot) in self.tokens.iter().zip(&self.scores) {
            if store.node[token as usize] != NONE {
                self.ranked.push((rank(token, dot), token));
            }
        }
        let better = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if width < self.ranked.len() {
            self.ranked.select_nth_unstable_by(width, better);
            self.ranked.truncate(width);
        }
        self.ranked.sort_unstable_by(better);
        self.nodes.clear();
        self.nodes.extend(self.ranked.iter().map(|&(_, t)| store.node[t as usize]));
    }
}

/// Working memory of a search.
#[derive(Debug, Default)]
pub(crate) struct IcecacheScratch {
    beam: Beam,
    /// `[slots]` equal to `round` where the token is excluded.
    hidden: Vec<u32>,
    round: u32,
    /// `[pages]` best score that the head has seen; NaN = none.
    best: Vec<f32>,
    /// Logits of the tokens that the head has looked at.
    logits: Vec<f32>,
    /// `[group]` pages of each head, best first.
    lists: Vec<Vec<(f32, u32)>>,
    /// `[pages]` maximum over the heads of the normalised score; NaN = not seen.
    share: Vec<f32>,
}

impl Icecache {
    /// Nearest node one level above a token that has no place yet, and the product with its key; `None` when the beam ran into
    /// nodes without children.
    pub(super) fn parent_by_beam(
        &self,
        row: &[f32],
        token: u32,
        field: Field,
        beam: &mut Beam,
    ) -> Option<(u32, f32)> {
        let store = &self.store;
        let level = usize::from(store.level[token as usize]);
        let lift = store.lift(token);
        let along = store.along[token as usize] + lift * store.line.lift;
        beam.nodes.clear();
        beam.nodes.push(ROOT);
        loop {
            let at = store.nodes[*beam.nodes.first()? as usize].level;
            beam.tokens.clear();
            let nodes = std::mem::take(&mut beam.nodes);
            for &node in &nodes {
                beam.walk(store, node, along, &field);
            }
            beam.nodes = nodes;
            beam.score(store, row);
            let width = if at == level + 1 { 1 } else { field.width };
            beam.narrow(store, width, |t, dot| dot + lift * store.lift(t));
            if at == level + 1 {
                let node = *beam.nodes.first()?;
                let upper = store.owner[node as usize];
                return Some((node, keys16::dot(store.isa, row, store.row(upper))));
            }
        }
    }

    /// Fills `found` with the tokens of the best pages.
    pub(super) fn search_pages(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        (scratch, found): (&mut IcecacheScratch, &mut Found),
    ) {
        let store = &self.store;
        scratch.round = scratch.round.wrapping_add(1).max(1);
        scratch.hidden.resize(store.ids.len().max(scratch.hidden.len()), 0);
        let mut hidden = 0;
        for id in exclude {
            if let Some(Place::Slot(slot)) = self.map.get(*id) {
                scratch.hidden[slot] = scratch.round;
                hidden += 1;
            }
        }
        let wanted = params.budget.min(self.map.len() - hidden);
        let n = store.num_slots();
        let width = (FIELD_PER_TOKEN * n as f64).floor().max(FIELD_MIN);
        let width = (width * f64::from(params.open_fraction)).ceil() as usize;
        let pages = params.budget.div_ceil(LANES);
        let mut field = Field { width, visited: VISITED, whole_below: width.min(pages.max(1)) };
        loop {
            found.tokens.clear();
            scratch.share.clear();
            scratch.share.resize(store.fill.len(), f32::NAN);
            scratch.lists.resize_with(query.group, Vec::new);
            let mut looked = 0;
            for (h, q) in query.q.chunks_exact(store.dim).enumerate() {
                let attended = query.attended_lse.get(h).copied().unwrap_or(f32::NEG_INFINITY);
                looked += self.descend(q, (query.scale, attended), (h, params.node_budget, &field), scratch);
            }
            found.nodes_scored += looked;
            found.index_bytes_read += looked * store.dim * 2;
            self.deal(wanted, scratch, found);
            // Where the published code ends the process because the beam is too narrow for the budget, look twice as far.
            if found.tokens.len() == wanted || field.width >= n || looked >= params.node_budget {
                break;
            }
            field = Field { width: 2 * field.width, visited: 1.0, ..field };
        }
    }

    /// One head's way down; its pages go to `lists[h]`, their normalised scores into `share`. Returns tokens looked at.
    fn descend(
        &self,
        q: &[f32],
        (scale, attended): (f32, f32),
        (h, most, field): (usize, usize, &Field),
        scratch: &mut IcecacheScratch,
    ) -> usize {
        let store = &self.store;
        let IcecacheScratch { beam, hidden, round, best, logits, lists, share, .. } = scratch;
        let dot: f64 = q.iter().zip(&store.line.direction).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        let length: f64 = q.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let along = if length > 0.0 { (dot / length) as f32 } else { 0.0 };
        best.clear();
        best.resize(store.fill.len(), f32::NAN);
        logits.clear();
        lists[h].clear();
        beam.nodes.clear();
        beam.nodes.push(ROOT);
        let mut looked = 0;
        while !beam.nodes.is_empty() && looked < most {
            // The published walk stops only where children outnumber what is asked for: nodes above, pages at the last step.
            let is_last = store.nodes[beam.nodes[0] as usize].level == 0;
            let field =
                Field { whole_below: if is_last { field.whole_below } else { field.width }, ..*field };
            beam.tokens.clear();
            let nodes = std::mem::take(&mut beam.nodes);
            for &node in &nodes {
                beam.walk(store, node, along, &field);
            }
            beam.nodes = nodes;
            beam.tokens.truncate(most - looked);
            looked += beam.tokens.len();
            beam.score(store, q);
            for (&token, &dot) in beam.tokens.iter().zip(&beam.scores) {
                if !store.live[token as usize] || hidden[token as usize] == *round {
                    continue;
                }
                // Products that overflow both ways are no number; they come last.
                let logit = if dot.is_nan() { f32::MIN } else { dot * scale };
                logits.push(logit);
                let page = store.place[token as usize] as usize / LANES;
                if best[page].is_nan() {
                    lists[h].push((0.0, page as u32));
                    best[page] = logit;
                } else if logit > best[page] {
                    best[page] = logit;
                }
            }
            beam.narrow(store, field.width, |_, dot| dot);
        }
        let norm = log_sum(logits, attended);
        for (score, page) in &mut lists[h] {
            *score = best[*page as usize];
            let mine = if *score == norm { 0.0 } else { *score - norm };
            let share = &mut share[*page as usize];
            *share = if share.is_nan() || mine > *share { mine } else { *share };
        }
        lists[h].sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        looked
    }

    /// Deals the heads' lists out by rank, page by page, until `wanted` tokens are selected; they then lie by score.
    fn deal(&self, wanted: usize, scratch: &mut IcecacheScratch, found: &mut Found) {
        let store = &self.store;
        let IcecacheScratch { hidden, round, lists, share, .. } = scratch;
        let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
        found.pages_opened = share.iter().filter(|s| !s.is_nan()).count();
        for rank in 0..longest {
            for list in lists.iter() {
                let Some(&(_, page)) = list.get(rank) else { continue };
                let left = wanted - found.tokens.len();
                if left == 0 {
                    break;
                }
                // A page that was dealt already has lost its share.
                let score = std::mem::replace(&mut share[page as usize], f32::NAN);
                if score.is_nan() {
                    continue;
                }
                let lanes = &store.lanes[page as usize * LANES..(page as usize + 1) * LANES];
                let visible =
                    |t: &&u32| **t != NONE && store.live[**t as usize] && hidden[**t as usize] != *round;
                let hits = lanes.iter().filter(visible).take(left);
                found.tokens.extend(hits.map(|&t| Hit { id: store.ids[t as usize], score }));
            }
        }
        found.tokens.sort_by(|a, b| b.score.total_cmp(&a.score));
    }
}
