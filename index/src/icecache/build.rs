//! Build: levels, then parents from the top down, then pages.

use half::bf16;

use super::search::Beam;
use super::store::{NONE, ROOT, Store};
use super::{EXACT_MAX, Icecache, PLACING_FIELD};
use crate::idmap::Place;
use crate::index::KeyId;
use crate::keys16::{self, Tiles, widen};

/// Every so many tokens of the lowest level one gets its exact parent when there are too many candidates for all.
const ANCHOR_EVERY: usize = 60;
/// Anchors to either side whose parents are a token's candidates.
const ANCHOR_REACH: usize = 60;
/// A candidate is accepted up to this multiple of the distance of its farthest child so far.
const ANCHOR_SLACK: f32 = 1.02;
/// Tokens whose parents are sought at a time.
const CHUNK: usize = 1024;

/// Rows `[n, dim]` bf16 and slots of the batch, in the same order.
struct Fresh<'a> {
    keys: &'a [bf16],
    dim: usize,
}

impl Fresh<'_> {
    fn row(&self, i: u32) -> &[bf16] {
        &self.keys[i as usize * self.dim..(i as usize + 1) * self.dim]
    }

    fn widened(&self, of: &[u32], out: &mut Vec<f32>) {
        out.clear();
        out.extend(of.iter().flat_map(|&i| self.row(i)).map(|k| widen(k.to_bits())));
    }
}

impl Icecache {
    /// Builds from checked tokens, keys `[n, dim]`, into an empty index. Slot `i` is row `i`.
    pub(super) fn build_all(&mut self, ids: &[KeyId], keys: &[bf16]) {
        let dim = self.store.dim;
        self.reset();
        let fresh = Fresh { keys, dim };
        let mut row = Vec::new();
        for (i, &id) in ids.iter().enumerate() {
            fresh.widened(&[i as u32], &mut row);
            let slot = self.store.add_token(id, self.levels.assign(), &row);
            self.map.set(id, Place::Slot(slot as usize));
        }
        let top = self.levels.top();
        let mut by_level = vec![Vec::new(); top + 1];
        for slot in 0..ids.len() as u32 {
            by_level[usize::from(self.store.level[slot as usize])].push(slot);
        }
        let roots = by_level.get(top).cloned().unwrap_or_default();
        self.store.nodes[ROOT as usize].level = top;
        self.store.load(ROOT, &roots, |t| fresh.row(t).to_vec());
        for level in (0..top).rev() {
            self.assign_parents(&fresh, &by_level[level], &by_level[level + 1]);
            let mut children = vec![Vec::new(); self.store.nodes.len()];
            for &token in &by_level[level] {
                children[self.store.parent[token as usize] as usize].push(token);
            }
            for &upper in &by_level[level + 1] {
                let node = self.store.node[upper as usize];
                self.store.load(node, &children[node as usize], |t| fresh.row(t).to_vec());
            }
        }
    }

    /// Sets `parent` and `parent_dot` of `tokens` from `uppers`, which have their places already.
    fn assign_parents(&mut self, fresh: &Fresh<'_>, tokens: &[u32], uppers: &[u32]) {
        if uppers.len() <= EXACT_MAX {
            self.assign_exactly(fresh, tokens, uppers);
            return;
        }
        let is_lowest = self.store.level[tokens[0] as usize] == 0;
        if !is_lowest {
            let mut beam = Beam::default();
            for &token in tokens {
                self.assign_by_beam(fresh, token, uppers, &mut beam);
            }
            return;
        }
        let anchors: Vec<u32> = tokens.iter().copied().step_by(ANCHOR_EVERY).collect();
        self.assign_exactly(fresh, &anchors, uppers);
        let mut farthest = vec![f32::NEG_INFINITY; self.store.nodes.len()];
        for &anchor in &anchors {
            let node = self.store.parent[anchor as usize] as usize;
            farthest[node] = farthest[node].max(self.distance_to_parent(anchor));
        }
        let (mut beam, mut near, mut row) = (Beam::default(), Vec::new(), Vec::new());
        for (i, &token) in tokens.iter().enumerate().filter(|(i, _)| i % ANCHOR_EVERY != 0) {
            let at = i / ANCHOR_EVERY;
            near.clear();
            let reach = (at + 1).saturating_sub(ANCHOR_REACH)..anchors.len().min(at + 1 + ANCHOR_REACH);
            near.extend(anchors[reach].iter().map(|&a| self.store.parent[a as usize]));
            near.sort_unstable();
            near.dedup();
            fresh.widened(&[token], &mut row);
            let lift = self.store.lift(token);
            let mut best = (f32::NEG_INFINITY, 0.0, NONE);
            for &node in &near {
                let upper = self.store.owner[node as usize];
                let dot = keys16::dot(self.store.isa, &row, fresh.row(upper));
                let score = dot + lift * self.store.lift(upper);
                if score > best.0 || best.2 == NONE {
                    best = (score, dot, node);
                }
            }
            let distance = self.store.radius_sq as f32 - best.0;
            if distance <= ANCHOR_SLACK * farthest[best.2 as usize] {
                self.store.parent[token as usize] = best.2;
                self.store.parent_dot[token as usize] = best.1;
            } else {
                self.assign_by_beam(fresh, token, uppers, &mut beam);
            }
            let node = self.store.parent[token as usize] as usize;
            farthest[node] = farthest[node].max(self.distance_to_parent(token));
        }
    }

    fn distance_to_parent(&self, token: u32) -> f32 {
        let upper = self.store.owner[self.store.parent[token as usize] as usize];
        let lifts = self.store.lift(token) * self.store.lift(upper);
        self.store.radius_sq as f32 - self.store.parent_dot[token as usize] - lifts
    }

    /// The nearest of all candidates.
    fn assign_exactly(&mut self, fresh: &Fresh<'_>, tokens: &[u32], uppers: &[u32]) {
        let store = &mut self.store;
        let (mut row, mut lifts, mut best) = (Vec::new(), Vec::new(), Vec::new());
        fresh.widened(uppers, &mut row);
        lifts.extend(uppers.iter().map(|&u| store.lift(u)));
        let tiles = Tiles::new(&row, &lifts, fresh.dim);
        for chunk in tokens.chunks(CHUNK) {
            fresh.widened(chunk, &mut row);
            lifts.clear();
            lifts.extend(chunk.iter().map(|&t| store.lift(t)));
            tiles.nearest(store.isa, &row, &lifts, &mut best);
            for ((&token, &(score, at)), &lift) in chunk.iter().zip(&best).zip(&lifts) {
                let upper = uppers[at as usize];
                store.parent[token as usize] = store.node[upper as usize];
                store.parent_dot[token as usize] = score - lift * store.lift(upper);
            }
        }
    }

    fn assign_by_beam(&mut self, fresh: &Fresh<'_>, token: u32, uppers: &[u32], beam: &mut Beam) {
        let mut row = Vec::new();
        fresh.widened(&[token], &mut row);
        let Some((node, dot)) = self.parent_by_beam(&row, token, PLACING_FIELD, beam) else {
            return self.assign_exactly(fresh, &[token], uppers);
        };
        self.store.parent[token as usize] = node;
        self.store.parent_dot[token as usize] = dot;
    }
}

impl Store {
    /// Whether every array agrees with every other; for tests.
    #[cfg(test)]
    pub fn check(&self) {
        let mut seen = 0;
        for (n, node) in self.nodes.iter().enumerate() {
            for c in &node.children {
                assert_eq!(self.parent[c.token as usize], n as u32);
                assert_eq!(self.lanes[self.place[c.token as usize] as usize], c.token);
                assert_eq!(usize::from(self.level[c.token as usize]), node.level);
            }
            assert!(node.children.is_sorted_by(|a, b| a.along.total_cmp(&b.along).is_le()));
            seen += node.children.len();
        }
        assert_eq!(seen, self.num_slots());
        let filled: u32 = self.fill.iter().sum();
        assert_eq!(filled as usize, seen);
        assert_eq!(self.lanes.iter().filter(|&&t| t != NONE).count(), seen);
    }
}
