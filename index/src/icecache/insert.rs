//! Insertion of a batch and removal.

use half::bf16;

use super::search::Beam;
use super::store::{NONE, ROOT};
use super::{EXACT_MAX, INSERT_FIELD, Icecache};
use crate::idmap::Place;
use crate::index::KeyId;
use crate::keys16::widen;

/// A token moves to a new parent that is nearer by more than this.
const STEAL_MARGIN: f32 = 1e-8;

impl Icecache {
    /// Adds checked tokens, keys `[n, dim]`, upper levels first.
    pub(super) fn insert_all(&mut self, ids: &[KeyId], keys: &[bf16]) {
        let dim = self.store.dim;
        let mut row = vec![0.0f32; dim];
        let mut fresh = Vec::with_capacity(ids.len());
        for (&id, key) in ids.iter().zip(keys.chunks_exact(dim)) {
            row.iter_mut().zip(key).for_each(|(x, k)| *x = widen(k.to_bits()));
            let slot = self.store.add_token(id, self.levels.assign(), &row);
            self.map.set(id, Place::Slot(slot as usize));
            fresh.push(slot);
        }
        let top = self.levels.top();
        self.store.nodes[ROOT as usize].level = top;
        let mut beam = Beam::default();
        for level in (0..=top).rev() {
            for (&token, key) in fresh.iter().zip(keys.chunks_exact(dim)) {
                if usize::from(self.store.level[token as usize]) != level {
                    continue;
                }
                row.iter_mut().zip(key).for_each(|(x, k)| *x = widen(k.to_bits()));
                let (node, dot) = self.parent_of(&row, token, (level, top), &mut beam);
                self.store.parent_dot[token as usize] = dot;
                self.store.attach(node, token, key);
                if level > 0 {
                    self.steal(&row, token, level - 1);
                }
            }
        }
    }

    fn parent_of(
        &self,
        row: &[f32],
        token: u32,
        (level, top): (usize, usize),
        beam: &mut Beam,
    ) -> (u32, f32) {
        if level == top {
            return (ROOT, 0.0);
        }
        if self.levels.counts[level + 1] > EXACT_MAX
            && let Some(nearest) = self.parent_by_beam(row, token, INSERT_FIELD, beam)
        {
            return nearest;
        }
        let store = &self.store;
        beam.gather(store, |t| usize::from(store.level[t as usize]) == level + 1);
        beam.score(store, row);
        let lift = store.lift(token);
        let mut best = (f32::NEG_INFINITY, 0.0, NONE);
        for (&upper, &dot) in beam.tokens.iter().zip(&beam.scores) {
            let score = dot + lift * store.lift(upper);
            if score > best.0 || best.2 == NONE {
                best = (score, dot, store.node[upper as usize]);
            }
        }
        (best.2, best.1)
    }

    /// Moves the older tokens of the level below that are nearer to `token` than to their parent. Looks at all of them.
    fn steal(&mut self, row: &[f32], token: u32, level: usize) {
        let store = &self.store;
        let mut beam = Beam::default();
        // Tokens of the batch that belong there have no place yet.
        beam.gather(store, |t| usize::from(store.level[t as usize]) == level);
        beam.score(store, row);
        let lift = store.lift(token);
        let home = store.node[token as usize];
        let mut moved = Vec::new();
        for (&other, &dot) in beam.tokens.iter().zip(&beam.scores) {
            let own = store.lift(other);
            let parent = store.parent[other as usize];
            let now = match store.owner[parent as usize] {
                NONE => f32::NEG_INFINITY,
                upper => store.parent_dot[other as usize] + own * store.lift(upper),
            };
            if dot + own * lift > now + STEAL_MARGIN {
                moved.push((other, dot));
            }
        }
        for (other, dot) in moved {
            let key = self.store.detach(other);
            self.store.parent_dot[other as usize] = dot;
            self.store.attach(home, other, &key);
        }
    }

    /// Takes a token out; one with children stays as a signpost until it has none.
    pub(super) fn remove_one(&mut self, id: KeyId) -> bool {
        let Some(Place::Slot(slot)) = self.map.get(id) else { return false };
        self.map.remove(id);
        self.store.live[slot] = false;
        let mut token = slot as u32;
        loop {
            let node = self.store.node[token as usize];
            let has_children = node != NONE && !self.store.nodes[node as usize].children.is_empty();
            if has_children || self.store.live[token as usize] {
                return true;
            }
            let parent = self.store.parent[token as usize];
            self.levels.counts[usize::from(self.store.level[token as usize])] -= 1;
            self.store.detach(token);
            self.store.drop_token(token);
            match self.store.owner[parent as usize] {
                NONE => return true,
                above => token = above,
            }
        }
    }
}
