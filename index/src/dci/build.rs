//! Build: tokens into pages, pages into super-nodes, and so on to the top.

use super::Dci;
use super::bisect::{Rows, bisect};
use crate::blocks::{Blocks, LANES};
use crate::index::Batch;
use crate::pages::Members;

/// Children that a node gets at build: room for two more before it has to be split.
const NODE_FILL: usize = 14;

impl Dci {
    /// Builds from a checked batch into an empty index.
    pub(super) fn build_all(&mut self, batch: &Batch<'_>) {
        let dim = self.pages.dim;
        let n = batch.ids.len();
        self.pages.frame.settle(batch.keys, batch.values);
        let mut keys = vec![0.0f32; n * dim];
        self.pages.frame.key_in(batch.keys, &mut keys);
        let (order, sizes) = bisect(Rows { data: &keys, dim }, LANES);
        let page_means = means(Rows { data: &keys, dim }, &order, &sizes);
        let starts = starts(&sizes);
        let (page_order, block_sizes) = bisect(Rows { data: &page_means, dim }, NODE_FILL);
        self.pages.blocks.add_blocks(block_sizes.len());
        let mut rows = vec![0.0f32; 3 * LANES * dim];
        let mut ids = [0u32; LANES];
        let mut at = 0;
        for (block, &size) in block_sizes.iter().enumerate() {
            for (lane, &page) in page_order[at..at + size as usize].iter().enumerate() {
                let page = page as usize;
                let members = &order[starts[page]..starts[page] + sizes[page] as usize];
                let (key_rows, rest) = rows.split_at_mut(LANES * dim);
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
            at += size as usize;
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
            let (order, sizes) = bisect(Rows { data: &centres, dim }, NODE_FILL);
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

fn starts(sizes: &[u32]) -> Vec<usize> {
    let mut at = 0;
    sizes.iter().map(|&s| (at, at += s as usize).0).collect()
}

/// Mean row of each leaf, `[leaves, dim]`.
fn means(rows: Rows<'_>, order: &[u32], sizes: &[u32]) -> Vec<f32> {
    let mut out = vec![0.0f32; sizes.len() * rows.dim];
    let mut at = 0;
    for (mean, &size) in out.chunks_exact_mut(rows.dim).zip(sizes) {
        for &i in &order[at..at + size as usize] {
            for (m, &x) in mean.iter_mut().zip(rows.row(i)) {
                *m += x / size as f32;
            }
        }
        at += size as usize;
    }
    out
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
