//! Insertion: tokens wait young; when enough wait, the oldest and its fifteen nearest become a page of the nearest super-node.

use super::Dci;
use super::bisect::{Rows, bisect};
use crate::blocks::{Blocks, LANES};
use crate::index::Batch;
use crate::pages::Members;

/// Young tokens that wait before a page is made of sixteen of them.
const YOUNG_MAX: usize = 512;

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
            if self.pages.num_young >= YOUNG_MAX {
                self.seal_oldest();
            }
        }
    }

    /// Makes a page of the oldest young token and those nearest to it.
    fn seal_oldest(&mut self) {
        let dim = self.pages.dim;
        let young = &self.pages.young;
        let num = self.pages.num_young;
        let mut keys = vec![0.0f32; num * dim];
        for (e, row) in keys.chunks_exact_mut(dim).enumerate() {
            young.read_key(e, row);
        }
        let oldest = (0..num).min_by_key(|&e| young.child[e]).unwrap_or(0);
        let mut centre = keys[oldest * dim..(oldest + 1) * dim].to_vec();
        let mut chosen: Vec<usize> = Vec::new();
        for _ in 0..2 {
            chosen = nearest(&keys, &centre, oldest);
            centre.fill(0.0);
            for &e in &chosen {
                for (c, &x) in centre.iter_mut().zip(&keys[e * dim..(e + 1) * dim]) {
                    *c += x / LANES as f32;
                }
            }
        }
        chosen.sort_unstable();
        let ids: Vec<u32> = chosen.iter().map(|&e| young.child[e]).collect();
        let mut key_rows = vec![0.0f32; LANES * dim];
        let mut value_rows = vec![0.0f32; LANES * dim];
        for (i, &e) in chosen.iter().enumerate() {
            key_rows[i * dim..(i + 1) * dim].copy_from_slice(&keys[e * dim..(e + 1) * dim]);
            young.read_value(e, &mut value_rows[i * dim..(i + 1) * dim]);
        }
        let entry = self.room_for_page(&centre);
        self.pages.seal(entry, Members { ids: &ids, keys: &key_rows, values: &value_rows });
        for &e in chosen.iter().rev() {
            self.pages.drop_young(e);
        }
        self.tree.refresh(&self.pages.blocks, entry / LANES);
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
        let mut row = vec![0.0f32; self.pages.dim];
        Blocks::entries(block)
            .filter(|&e| self.pages.blocks.count[e] > 0)
            .map(|e| {
                self.pages.blocks.read_key(e, &mut row);
                row.iter().zip(key).map(|(a, b)| (a - b) * (a - b)).sum::<f32>()
            })
            .fold(f32::INFINITY, f32::min)
    }

    /// Page block whose super-node summary is nearest to `key`, found from the top down.
    fn nearest_block(&self, key: &[f32]) -> usize {
        let mut row = vec![0.0f32; self.pages.dim];
        let mut blocks: Vec<usize> = match self.tree.levels.last() {
            None => return (0..self.pages.blocks.num_blocks()).last().unwrap_or(0),
            Some(top) => (0..top.num_blocks()).collect(),
        };
        for nodes in self.tree.levels.iter().rev() {
            let mut best = (f32::INFINITY, 0);
            for e in blocks.iter().flat_map(|&b| Blocks::entries(b)).filter(|&e| nodes.count[e] > 0) {
                nodes.read_key(e, &mut row);
                let d = row.iter().zip(key).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
                if d < best.0 {
                    best = (d, nodes.child[e] as usize);
                }
            }
            blocks = vec![best.1];
        }
        blocks[0]
    }

    /// Moves half of a full page block to a new block and gives it a place in the tree.
    fn split_pages(&mut self, block: usize) -> usize {
        let dim = self.pages.dim;
        let mut keys = vec![0.0f32; LANES * dim];
        for (e, row) in Blocks::entries(block).zip(keys.chunks_exact_mut(dim)) {
            self.pages.blocks.read_key(e, row);
        }
        let (order, sizes) = bisect(Rows { data: &keys, dim }, LANES / 2);
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

/// The sixteen entries nearest to `centre`, `must` among them.
fn nearest(keys: &[f32], centre: &[f32], must: usize) -> Vec<usize> {
    let mut by_distance: Vec<(f32, usize)> = keys
        .chunks_exact(centre.len())
        .enumerate()
        .map(|(e, row)| {
            let d: f32 = row.iter().zip(centre).map(|(a, b)| (a - b) * (a - b)).sum();
            (if e == must { -1.0 } else { d }, e)
        })
        .collect();
    by_distance.select_nth_unstable_by(LANES - 1, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    by_distance[..LANES].iter().map(|x| x.1).collect()
}
