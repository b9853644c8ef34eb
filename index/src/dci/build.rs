//! Build: tokens into pages, pages into super-nodes, and so on to the top.

use super::Dci;
use super::bisect::{Rows, bisect};
use super::codebook::{Codebook, Codes};
use super::refine::{self, Pack};
use crate::blocks::{Blocks, LANES};
use crate::index::Batch;
use crate::pages::Members;
use crate::simd::Isa;

/// Children that a node gets at build: room for two more before it has to be split.
const NODE_FILL: usize = 14;
/// Refinement rounds.
const ROUNDS: usize = 3;
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
        let mut keys = vec![0.0f32; batch.keys.len()];
        self.pages.frame.key_in(batch.keys, &mut keys);
        let rows = Rows { data: &keys, dim };
        let codes = Codes::of(&keys, dim);
        let (order, sizes) = bisect(self.isa, rows, &codes, LANES);
        let mut pack = Pack { members: leaves(&order, &sizes), blocks: Vec::new() };
        for _ in 0..ROUNDS {
            let means = regroup(self.isa, rows, &mut pack);
            let nearby = nearby(self.isa, Rows { data: &means, dim }, &pack);
            refine::round(self.isa, &codes, &means, &mut pack, &nearby);
        }
        regroup(self.isa, rows, &mut pack);
        self.pages.blocks.add_blocks(pack.blocks.len());
        let mut buffer = vec![0.0f32; 3 * LANES * dim];
        let mut ids = [0u32; LANES];
        for (block, pages) in pack.blocks.iter().enumerate() {
            for (lane, &page) in pages.iter().enumerate() {
                let members = &pack.members[page as usize];
                let (key_rows, rest) = buffer.split_at_mut(LANES * dim);
                let (value_rows, raw) = rest.split_at_mut(LANES * dim);
                let m = members.len() * dim;
                for (i, &token) in members.iter().enumerate() {
                    ids[i] = batch.ids[token as usize];
                    let from = token as usize * dim..(token as usize + 1) * dim;
                    key_rows[i * dim..(i + 1) * dim].copy_from_slice(&keys[from.clone()]);
                    raw[i * dim..(i + 1) * dim].copy_from_slice(&batch.values[from]);
                }
                self.pages.frame.value_in(&raw[..m], &mut value_rows[..m]);
                let members =
                    Members { ids: &ids[..members.len()], keys: &key_rows[..m], values: &value_rows[..m] };
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
            let (order, sizes) =
                bisect(self.isa, Rows { data: &centres, dim }, &Codes::of(&centres, dim), NODE_FILL);
            let mut rest = order.as_slice();
            let groups: Vec<Vec<u32>> = sizes
                .iter()
                .map(|&size| {
                    let (group, after) = rest.split_at(size as usize);
                    rest = after;
                    group.to_vec()
                })
                .collect();
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

/// Groups the pages into blocks by their means `[pages, dim]`, which it returns.
fn regroup(isa: Isa, rows: Rows<'_>, pack: &mut Pack) -> Vec<f32> {
    let means = refine::page_means(isa, rows, pack);
    let (order, sizes) =
        bisect(isa, Rows { data: &means, dim: rows.dim }, &Codes::of(&means, rows.dim), NODE_FILL);
    pack.blocks = leaves(&order, &sizes);
    means
}

/// The blocks nearest to each block by the means of their pages' means, itself left out.
fn nearby(isa: Isa, means: Rows<'_>, pack: &Pack) -> Vec<Vec<u32>> {
    let dim = means.dim;
    let num = pack.blocks.len();
    let mut book = Codebook::new(num.div_ceil(LANES), dim);
    let mut points = Codes::new(num, dim);
    let mut mean = vec![0.0f32; dim];
    for (block, pages) in pack.blocks.iter().enumerate() {
        mean.fill(0.0);
        for &page in pages {
            for (m, &x) in mean.iter_mut().zip(means.row(page)) {
                *m += x / pages.len() as f32;
            }
        }
        book.set(block, &mean);
        points.set(block, &mean);
    }
    let mut near: Vec<Vec<(f32, u32)>> = vec![Vec::new(); num];
    let mut dots = Vec::new();
    for block in 0..book.num_blocks() {
        book.visit(isa, block, &points, &mut dots, |i, close| {
            near[i].extend(close.iter().enumerate().map(|(lane, &c)| (c, (block * LANES + lane) as u32)));
        });
    }
    near.into_iter()
        .enumerate()
        .map(|(i, mut near)| {
            near.retain(|x| x.1 as usize != i && (x.1 as usize) < num);
            near.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            near.truncate(NEARBY);
            near.into_iter().map(|x| x.1).collect()
        })
        .collect()
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
