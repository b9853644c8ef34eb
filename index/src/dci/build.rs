//! Build: tokens into pages, pages into super-nodes, and so on to the top.

use super::Dci;
use super::bisect::bisect;
use super::codebook::Codes;
use super::neighbours::Neighbours;
use super::refine::{self, Pack};
use crate::blocks::{Blocks, LANES};
use crate::index::Batch;
use crate::pages::Members;
use crate::simd::Isa;

/// Children that a node gets at build: room for two more before it has to be split.
const NODE_FILL: usize = 14;
/// Refinement rounds.
const ROUNDS: usize = 3;
/// Refinement rounds above the pages, where there are few points.
const NODE_ROUNDS: usize = 4;
/// Neighbouring super-nodes whose pages a token may join.
const NEARBY: usize = 7;

impl Dci {
    /// Builds from a checked batch into an empty index.
    pub(super) fn build_all(&mut self, batch: &Batch<'_>) {
        let dim = self.pages.dim;
        if batch.ids.is_empty() {
            return;
        }
        self.pages.frame.settle(batch.keys, batch.values);
        let (order, pack) = pack(self.isa, Codes::centred(batch.keys, &self.pages.frame.key_centre));
        self.pages.blocks.add_blocks(pack.blocks.len());
        let mut rows = vec![0.0f32; 2 * LANES * dim];
        let (keys, values) = rows.split_at_mut(LANES * dim);
        let mut ids = [0u32; LANES];
        for (block, pages) in pack.blocks.iter().enumerate() {
            for (lane, &page) in pages.iter().enumerate() {
                let members = &pack.members[page as usize];
                let m = members.len();
                for (i, &member) in members.iter().enumerate() {
                    let token = order[member as usize] as usize;
                    let (from, to) = (token * dim..(token + 1) * dim, i * dim..(i + 1) * dim);
                    ids[i] = batch.ids[token];
                    self.pages.frame.key_in(&batch.keys[from.clone()], &mut keys[to.clone()]);
                    self.pages.frame.value_in(&batch.values[from], &mut values[to]);
                }
                let members = Members { ids: &ids[..m], keys: &keys[..m * dim], values: &values[..m * dim] };
                self.pages.seal(block * LANES + lane, members);
            }
        }
        self.tree.track(0, self.pages.blocks.num_blocks());
        self.raise_tree();
    }

    /// Adds levels until the top is small enough to scan.
    pub(super) fn raise_tree(&mut self) {
        while self.tree.top_is_wide(&self.pages.blocks) {
            let dim = self.pages.dim;
            let level = self.tree.top();
            let below = if level == 0 { &self.pages.blocks } else { &self.tree.levels[level - 1] };
            let centres = block_means(below);
            let groups = group(self.isa, &Codes::of(&centres, dim));
            self.tree.raise(&self.pages.blocks, &groups);
        }
    }
}

/// The leaves of an order.
fn leaves(order: &[u32], sizes: &[u32]) -> Vec<Vec<u32>> {
    let mut rest = order;
    let take = |&size: &u32| {
        let (leaf, after) = rest.split_at(size as usize);
        rest = after;
        leaf.to_vec()
    };
    sizes.iter().map(take).collect()
}

/// Clusters points into pages and blocks of pages. Returns the order in which the pack numbers the points, which keeps those
/// of a page close together in memory.
fn pack(isa: Isa, codes: Codes) -> (Vec<u32>, Pack) {
    let (order, mut pack, codes) = cluster(isa, codes, LANES, ROUNDS);
    let means = refine::page_means(isa, &codes, &pack);
    pack.blocks = group(isa, &Codes::of(&means, codes.stride));
    (order, pack)
}

/// Clusters nodes into parents.
fn group(isa: Isa, codes: &Codes) -> Vec<Vec<u32>> {
    let (order, pack, _) = cluster(isa, codes.clone(), NODE_FILL, NODE_ROUNDS);
    let back = |members: Vec<u32>| members.into_iter().map(|i| order[i as usize]).collect();
    pack.members.into_iter().map(back).collect()
}

/// Bisection and exchange: leaves of about `target` points, at most 16. Returns the order, the leaves in it, and the codes in it.
fn cluster(isa: Isa, codes: Codes, target: usize, rounds: usize) -> (Vec<u32>, Pack, Codes) {
    let (order, sizes) = bisect(isa, &codes, target);
    let codes = codes.permuted(&order);
    let numbers: Vec<u32> = (0..order.len() as u32).collect();
    let mut pack = Pack { members: leaves(&numbers, &sizes), blocks: Vec::new() };
    for _ in 0..rounds {
        let means = regroup(isa, &codes, &mut pack);
        let nearby = nearby(isa, &means, &pack);
        refine::round(isa, &codes, &means, &mut pack, &nearby);
    }
    (order, pack, codes)
}

/// Groups the pages into blocks by their means `[pages, stride]`, which it returns.
fn regroup(isa: Isa, codes: &Codes, pack: &mut Pack) -> Vec<f32> {
    let means = refine::page_means(isa, codes, pack);
    let (order, sizes) = bisect(isa, &Codes::of(&means, codes.stride), NODE_FILL);
    pack.blocks = leaves(&order, &sizes);
    means
}

/// The blocks nearest to each block by the means of their pages' means, itself left out.
fn nearby(isa: Isa, means: &[f32], pack: &Pack) -> Vec<Vec<u32>> {
    let dim = means.len() / pack.members.len();
    let mut centres = vec![0.0f32; pack.blocks.len() * dim];
    for (centre, pages) in centres.chunks_exact_mut(dim).zip(&pack.blocks) {
        for &page in pages {
            for (c, &x) in centre.iter_mut().zip(&means[page as usize * dim..]) {
                *c += x / pages.len() as f32;
            }
        }
    }
    Neighbours::new(isa, &centres, dim).nearest_to_all(NEARBY)
}

/// Mean key of the live entries of every block, `[blocks, dim]`.
fn block_means(blocks: &Blocks) -> Vec<f32> {
    let dim = blocks.dim;
    let mut out = vec![0.0f32; blocks.num_blocks() * dim];
    let mut row = vec![0.0f32; dim];
    for (block, mean) in out.chunks_exact_mut(dim).enumerate() {
        let total: u32 = blocks.count[Blocks::entries(block)].iter().sum();
        for e in Blocks::entries(block).filter(|&e| blocks.count[e] > 0) {
            blocks.read_key(e, &mut row);
            let share = blocks.count[e] as f32 / total as f32;
            for (m, &x) in mean.iter_mut().zip(&row) {
                *m += share * x;
            }
        }
    }
    out
}
