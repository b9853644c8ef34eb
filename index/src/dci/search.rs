//! Search: open the nodes that hold most of the estimated mass, level by level, then rank what was opened.

use super::Dci;
use crate::blocks::{Blocks, LANES};
use crate::error::IndexError;
use crate::found::Found;
use crate::index::{KeyId, Query, SearchParams, Tail};
use crate::refine::{REACH, threshold};
use crate::scratch::Scratch;
use crate::search::{NODE_SPREAD, Pass};

/// Nodes of an upper level are opened until they could hold this many times the super-nodes that will be opened.
const SLACK: usize = 16;

impl Dci {
    pub(super) fn search_tree(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        (scratch, found): (&mut Scratch, &mut Found),
    ) -> Result<(), IndexError> {
        let mut pass = Pass { isa: self.isa, pages: &self.pages, scratch, found };
        pass.begin(query, exclude, params)?;
        let blocks = self.pages.blocks.num_blocks();
        let wanted = ((blocks as f64 * f64::from(params.open_fraction)).ceil() as usize).max(1);
        let unlimited = wanted >= blocks && params.node_budget == usize::MAX && params.open_mass == 0.0;
        if self.tree.top() == 0 || unlimited {
            for block in 0..blocks {
                pass.add_pages(block);
            }
            pass.add_all_young();
        } else {
            self.descend(&mut pass, wanted, params);
        }
        pass.choose(params);
        Ok(())
    }

    /// Scores nodes from the top down and opens `wanted` page blocks at most.
    fn descend(&self, pass: &mut Pass<'_>, wanted: usize, params: &SearchParams) {
        self.hide_above(pass.scratch);
        let mut opened = std::mem::take(&mut pass.scratch.opened);
        let mut ranked = std::mem::take(&mut pass.scratch.ranked);
        opened.clear();
        opened.extend(0..self.tree.levels[self.tree.top() - 1].num_blocks() as u32);
        for level in (1..=self.tree.top()).rev() {
            let nodes = &self.tree.levels[level - 1];
            let first = pass.found.frontier.parts.len();
            for &block in &opened {
                pass.add_nodes(nodes, level as u8, block as usize);
            }
            // Blocks that could be opened and still leave the rest of the descent within the node budget.
            let afford = params.node_budget.saturating_sub(pass.found.nodes_scored) / LANES;
            let quota = if level == 1 {
                wanted.min(afford)
            } else {
                (SLACK * wanted).div_ceil(LANES.pow(level as u32 - 1)).max(1).min(afford / 2)
            };
            pass.rank_nodes(nodes, (first, params.open_mass), &mut ranked);
            let quota = quota.min(ranked.len());
            if quota > 0 && quota < ranked.len() {
                ranked.select_nth_unstable_by(quota - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            }
            ranked.truncate(quota);
            ranked.sort_unstable_by_key(|r| r.1);
            opened.clear();
            for &(_, place) in ranked.iter() {
                let frontier = &mut pass.found.frontier;
                let part = frontier.parts[place as usize / LANES];
                let entry = part.block as usize * LANES + place as usize % LANES;
                frontier.rest[place as usize] = 0.0;
                opened.push(nodes.child[entry]);
            }
            opened.sort_unstable();
        }
        if params.tail == Tail::Page {
            // Every page answers for itself: the nodes do not.
            pass.found.frontier.clear();
            let mut next = opened.iter().peekable();
            for block in 0..self.pages.blocks.num_blocks() {
                match next.next_if(|&&b| b as usize == block) {
                    Some(_) => pass.add_pages(block),
                    None => pass.add_silent_pages(block),
                }
            }
        } else {
            pass.add_opened(&opened);
        }
        pass.add_all_young();
        pass.scratch.opened = opened;
        pass.scratch.ranked = ranked;
    }

    /// Counts the excluded tokens below every node.
    fn hide_above(&self, scratch: &mut Scratch) {
        scratch.hidden_above.resize(self.tree.top().max(scratch.hidden_above.len()), Vec::new());
        let (below, above) = (&scratch.hidden, &mut scratch.hidden_above);
        above[0].clear();
        above[0].extend(
            below.iter().map(|h| (self.tree.parents[0][h.entry as usize / LANES], h.lanes.count_ones())),
        );
        merge(&mut above[0]);
        for level in 1..self.tree.top() {
            let (lower, upper) = above.split_at_mut(level);
            upper[0].clear();
            upper[0].extend(
                lower[level - 1].iter().map(|&(e, n)| (self.tree.parents[level][e as usize / LANES], n)),
            );
            merge(&mut upper[0]);
        }
    }
}

/// Sorts by entry and adds up the counts of equal ones.
fn merge(counts: &mut Vec<(u32, u32)>) {
    counts.sort_unstable();
    counts.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 += next.1;
        }
        same
    });
}

impl Pass<'_> {
    /// Estimated log mass of every node scored since part `first`, largest over the heads, normalised over these nodes; nodes that may
    /// hold too little by `open_mass` are left out.
    fn rank_nodes(&mut self, nodes: &Blocks, (first, open_mass): (usize, f32), ranked: &mut Vec<(f32, u32)>) {
        self.normalise(first);
        let Scratch { norm, quant, .. } = &*self.scratch;
        let frontier = &self.found.frontier;
        let threshold = threshold(open_mass, self.pages);
        ranked.clear();
        for part in first..frontier.parts.len() {
            let rest = frontier.rest_of(part);
            let reach = nodes.block_reach(frontier.parts[part].block as usize);
            for lane in (0..LANES).filter(|&lane| rest[lane] > 0.0) {
                let (mut best, mut may_hold) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
                let heads = frontier.logits_of(part).chunks_exact(LANES).zip(norm);
                for ((row, norm), by) in heads.zip(&quant.spread) {
                    let score = row[lane] - norm;
                    best = best.max(score);
                    may_hold = may_hold.max(score + by * (REACH / NODE_SPREAD) * reach[lane]);
                }
                if may_hold > threshold {
                    ranked.push((best + rest[lane].ln(), (part * LANES + lane) as u32));
                }
            }
        }
    }
}
