//! Insertion: tokens wait young; when enough wait, the oldest and its fifteen nearest become a page of the nearest super-node.

use super::Dci;
use super::bisect::bisect;
use super::codebook::Codes;
use crate::blocks::{Blocks, LANES};
use crate::index::Batch;
use crate::pages::Members;
use crate::simd::Isa;
use crate::simd::dense;

/// Most young tokens that wait before a page is made of sixteen of them.
const YOUNG_MAX: usize = 512;
/// Fewest: more than the window of a decoder, so that pages are made of tokens that left it.
const YOUNG_MIN: usize = 96;
/// Young tokens are held at sixteen times the bytes of a page's: this part of all tokens keeps them below 1 % of the index.
const YOUNG_PART: usize = 128;

/// Young tokens that wait in a tree of `num_tokens` at most, before a page is made of sixteen of them.
pub(crate) fn young_max(num_tokens: usize) -> usize {
    (num_tokens / YOUNG_PART).clamp(YOUNG_MIN, YOUNG_MAX)
}

impl Dci {
    /// Inserts a checked batch.
    pub(super) fn insert_all(&mut self, batch: &Batch<'_>) {
        let dim = self.pages.dim;
        self.pages.frame.settle(batch.keys, batch.values);
        let mut row = vec![0.0f32; 2 * dim];
        for (i, &id) in batch.ids.iter().enumerate() {
            let (key, value) = row.split_at_mut(dim);
            self.pages.frame.key_in(&batch.keys[i * dim..(i + 1) * dim], key);
            self.pages.frame.value_in(&batch.values[i * dim..(i + 1) * dim], value);
            self.pages.add_young(id, key, value);
            if self.pages.num_young >= young_max(self.pages.map.len()) {
                self.seal_oldest();
            }
        }
    }

    /// Makes a page of the oldest young token and those nearest to it.
    fn seal_oldest(&mut self) {
        let dim = self.pages.dim;
        let young = &self.pages.young;
        let oldest = (0..self.pages.num_young).min_by_key(|&e| young.child[e]).unwrap_or(0);
        let mut rows = vec![0.0f32; (2 * LANES + 1) * dim];
        let (keys, rest) = rows.split_at_mut(LANES * dim);
        let (values, centre) = rest.split_at_mut(LANES * dim);
        young.read_key(oldest, centre);
        let mut chosen = Vec::new();
        // The neighbours of the token, then the neighbours of their mean.
        for _ in 0..2 {
            chosen = self.nearest_young(centre, oldest);
            for (&e, row) in chosen.iter().zip(keys.chunks_exact_mut(dim)) {
                young.read_key(e, row);
            }
            centre.fill(0.0);
            for row in keys.chunks_exact(dim) {
                for (c, &x) in centre.iter_mut().zip(row) {
                    *c += x / LANES as f32;
                }
            }
        }
        for (&e, row) in chosen.iter().zip(values.chunks_exact_mut(dim)) {
            young.read_value(e, row);
        }
        let ids: Vec<u32> = chosen.iter().map(|&e| young.child[e]).collect();
        let entry = self.room_for_page(centre);
        self.pages.seal(entry, Members { ids: &ids, keys, values });
        for &e in chosen.iter().rev() {
            self.pages.drop_young(e);
        }
        self.tree.refresh(&self.pages.blocks, entry / LANES);
    }

    /// The sixteen young entries nearest to `centre`, `must` among them, in order of entry.
    fn nearest_young(&self, centre: &[f32], must: usize) -> Vec<usize> {
        let young = &self.pages.young;
        let mut near: Vec<(f32, usize)> = Vec::with_capacity(young.count.len());
        let mut finder = Finder::new(self.isa, centre);
        for block in 0..young.num_blocks() {
            finder.visit(young, block, |e, d| near.push((if e == must { -1.0 } else { d }, e)));
        }
        near.select_nth_unstable_by(LANES - 1, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut chosen: Vec<usize> = near[..LANES].iter().map(|x| x.1).collect();
        chosen.sort_unstable();
        chosen
    }

    /// An empty page entry in the block nearest to `key`; splits the block when it is full.
    fn room_for_page(&mut self, key: &[f32]) -> usize {
        if self.pages.blocks.num_blocks() == 0 {
            self.pages.blocks.add_blocks(1);
            self.tree.track(0, 1);
        }
        let block = self.nearest_block(key);
        if let Some(entry) = self.pages.blocks.free_entry(block) {
            return entry;
        }
        let other = self.split_pages(block);
        let block = if self.distance(block, key) <= self.distance(other, key) { block } else { other };
        // A split leaves at least half of both blocks free.
        self.pages.blocks.free_entry(block).unwrap_or(block * LANES)
    }

    /// Squared distance of `key` to the nearest page of a block.
    fn distance(&self, block: usize, key: &[f32]) -> f32 {
        let mut least = f32::INFINITY;
        Finder::new(self.isa, key).visit(&self.pages.blocks, block, |_, d| least = least.min(d));
        least
    }

    /// Page block whose super-node summary is nearest to `key`, found from the top down.
    fn nearest_block(&self, key: &[f32]) -> usize {
        let mut finder = Finder::new(self.isa, key);
        let top = self.tree.levels.last().map_or(0, Blocks::num_blocks);
        // Without levels there is one block at most.
        let mut blocks = 0..top.max(1);
        for nodes in self.tree.levels.iter().rev() {
            let mut best = (f32::INFINITY, 0);
            for block in blocks {
                finder.visit(nodes, block, |e, d| {
                    if d < best.0 {
                        best = (d, nodes.child[e] as usize);
                    }
                });
            }
            blocks = best.1..best.1 + 1;
        }
        blocks.start
    }

    /// Moves half of a full page block to a new block and gives it a place in the tree.
    fn split_pages(&mut self, block: usize) -> usize {
        let dim = self.pages.dim;
        let mut keys = vec![0.0f32; LANES * dim];
        for (e, row) in Blocks::entries(block).zip(keys.chunks_exact_mut(dim)) {
            self.pages.blocks.read_key(e, row);
        }
        let (order, sizes) = bisect(Isa::detect(), &Codes::of(&keys, dim), LANES / 2);
        let other = self.pages.blocks.add_blocks(1);
        self.tree.track(0, other + 1);
        for (i, &lane) in order[sizes[0] as usize..].iter().enumerate() {
            self.pages.move_entry(block * LANES + lane as usize, other * LANES + i);
        }
        self.tree.refresh(&self.pages.blocks, block);
        self.tree.adopt(&self.pages.blocks, (0, block), other);
        self.raise_tree();
        other
    }
}

/// Squared distances of one vector to the entries of blocks, by eight-bit codes.
struct Finder {
    isa: Isa,
    row: Vec<i8>,
    scale: f32,
    offset: i32,
    norm: f32,
}

impl Finder {
    fn new(isa: Isa, key: &[f32]) -> Self {
        let codes = Codes::of(key, key.len());
        let norm = key.iter().map(|x| x * x).sum();
        Self { isa, scale: codes.scale[0], offset: codes.offset[0], row: codes.rows, norm }
    }

    /// Calls `visit(entry, squared distance)` for the entries of a block that hold tokens.
    fn visit(&mut self, blocks: &Blocks, block: usize, mut visit: impl FnMut(usize, f32)) {
        let mut dots = [0i32; LANES];
        dense::dots(self.isa, blocks.block_keys(block), &self.row, &mut dots);
        for (e, dot) in Blocks::entries(block).zip(dots).filter(|x| blocks.count[x.0] > 0) {
            let product = (dot - self.offset) as f32 * (self.scale * blocks.key_scale[e]);
            visit(e, self.norm - 2.0 * product + blocks.key_norm[e]);
        }
    }
}
