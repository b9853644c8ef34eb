//! Everything above the pages: levels of node summaries and the links between them.

use super::bisect::bisect;
use super::codebook::Codes;
use crate::blocks::{Blocks, LANES, Summary};
use crate::error::IndexError;
use crate::grow::grow_by;
use crate::simd::Isa;
use crate::snapshot::{Reader, Writer};

/// The top level is scanned whole, so it may hold at most this many blocks before another level is laid over it.
const TOP_BLOCKS: usize = 16;
/// More levels than 2^32 pages can need.
const LEVELS_MAX: usize = 16;
/// Link of a block that has no parent: it belongs to the top level.
const NO_PARENT: u32 = u32::MAX;

/// Levels 1, 2, ... of node summaries. An entry of level `l` summarises block `child` of level `l - 1`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tree {
    dim: usize,
    pub levels: Vec<Blocks>,
    /// `parents[l][b]`: entry of level `l + 1` that summarises block `b` of level `l`.
    pub parents: Vec<Vec<u32>>,
}

impl Tree {
    pub fn new(dim: usize) -> Self {
        Self { dim, levels: Vec::new(), parents: vec![Vec::new()] }
    }

    /// Blocks of level `l`, the pages' being level 0.
    fn blocks<'a>(&'a self, pages: &'a Blocks, level: usize) -> &'a Blocks {
        if level == 0 { pages } else { &self.levels[level - 1] }
    }

    /// Number of the top level: its blocks have no parents.
    pub fn top(&self) -> usize {
        self.levels.len()
    }

    /// Lets the links of level `level` know about blocks added at its end.
    pub fn track(&mut self, level: usize, num_blocks: usize) {
        let links = &mut self.parents[level];
        let new = num_blocks.saturating_sub(links.len());
        grow_by(links, new, NO_PARENT);
    }

    /// Recomputes the summaries above block `block` of the page level. Exact from the children each time: no drift.
    pub fn refresh(&mut self, pages: &Blocks, block: usize) {
        self.refresh_from(pages, 0, block);
    }

    /// Writes entry `entry` of level `level + 1` from the live entries of block `block` of `level`.
    pub fn summarise(&mut self, pages: &Blocks, (level, block): (usize, usize), entry: usize) {
        let dim = self.dim;
        let mut sums = vec![0.0f64; 2 * dim];
        let mut row = vec![0.0f32; 2 * dim];
        let below = self.blocks(pages, level);
        let mut total = 0u32;
        for e in Blocks::entries(block).filter(|&e| below.count[e] > 0) {
            let (key, value) = row.split_at_mut(dim);
            below.read_key(e, key);
            below.read_value(e, value);
            let n = f64::from(below.count[e]);
            total += below.count[e];
            for (s, &x) in sums.iter_mut().zip(&row) {
                *s += n * f64::from(x);
            }
        }
        for (x, s) in row.iter_mut().zip(&sums) {
            *x = (s / f64::from(total.max(1))) as f32;
        }
        let (key, value) = row.split_at(dim);
        let (mut spread, mut reach) = (0.0f64, 0.0f32);
        let mut child = vec![0.0f32; dim];
        let below = self.blocks(pages, level);
        for e in Blocks::entries(block).filter(|&e| below.count[e] > 0) {
            below.read_key(e, &mut child);
            let d: f32 = child.iter().zip(key).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / dim as f32;
            spread += f64::from(below.count[e]) * f64::from(d + below.spread[e]);
            reach = reach.max(d + below.reach[e].to_f32());
        }
        let spread = (spread / f64::from(total.max(1))) as f32;
        let nodes = &mut self.levels[level];
        nodes.set(entry, Summary { key, value, spread, reach, count: total, child: block as u32 });
        self.parents[level][block] = entry as u32;
    }

    /// Gives block `new` of `level` an entry beside that of its sibling `old`; splits nodes upwards where there is no room.
    pub fn adopt(&mut self, pages: &Blocks, (level, old): (usize, usize), new: usize) {
        if level == self.top() {
            return;
        }
        let sibling = self.parents[level][old] as usize;
        let home = sibling / LANES;
        let entry = match self.levels[level].free_entry(home) {
            Some(entry) => entry,
            None => {
                let other = self.split_node(pages, (level, home));
                let moved = self.parents[level][old] as usize / LANES;
                debug_assert!(moved == home || moved == other);
                // Both halves have room now; the new block stays with its sibling.
                self.levels[level].free_entry(moved).unwrap_or(moved * LANES)
            }
        };
        self.summarise(pages, (level, new), entry);
        self.refresh_from(pages, level + 1, entry / LANES);
    }

    /// Moves half of the entries of a full block of level `level + 1` into a new block.
    fn split_node(&mut self, pages: &Blocks, (level, block): (usize, usize)) -> usize {
        let dim = self.dim;
        let nodes = &mut self.levels[level];
        let mut keys = vec![0.0f32; LANES * dim];
        for (e, row) in Blocks::entries(block).zip(keys.chunks_exact_mut(dim)) {
            nodes.read_key(e, row);
        }
        let (order, sizes) = bisect(Isa::detect(), &Codes::of(&keys, dim), LANES / 2);
        let other = nodes.add_blocks(1);
        for (i, &lane) in order[sizes[0] as usize..].iter().enumerate() {
            let (from, to) = (block * LANES + lane as usize, other * LANES + i);
            nodes.copy(from, to);
            nodes.clear(from);
            self.parents[level][nodes.child[to] as usize] = to as u32;
        }
        self.track(level + 1, other + 1);
        self.refresh_from(pages, level + 1, block);
        self.adopt(pages, (level + 1, block), other);
        other
    }

    /// `refresh` from block `block` of `level` upwards.
    fn refresh_from(&mut self, pages: &Blocks, level: usize, block: usize) {
        let mut block = block;
        for level in level..self.top() {
            let entry = self.parents[level][block];
            if entry == NO_PARENT {
                return;
            }
            self.summarise(pages, (level, block), entry as usize);
            block = entry as usize / LANES;
        }
    }

    /// Whether the top level is due for another level over it.
    pub fn top_is_wide(&self, pages: &Blocks) -> bool {
        let limit = if self.top() == 0 { 1 } else { TOP_BLOCKS };
        self.blocks(pages, self.top()).num_blocks() > limit
    }

    /// Lays a new level over the top: one entry for each of its blocks, grouped as `groups` says.
    pub fn raise(&mut self, pages: &Blocks, groups: &[Vec<u32>]) {
        let level = self.top();
        let num_blocks = self.blocks(pages, level).num_blocks();
        self.track(level, num_blocks);
        let mut nodes = Blocks::new(self.dim);
        nodes.add_blocks(groups.len());
        self.levels.push(nodes);
        self.parents.push(vec![NO_PARENT; groups.len()]);
        for (g, members) in groups.iter().enumerate() {
            for (i, &block) in members.iter().enumerate() {
                self.summarise(pages, (level, block as usize), g * LANES + i);
            }
        }
    }

    /// Appends the levels; the links follow from them.
    pub fn write_to(&self, to: &mut Writer) {
        to.len(self.levels.len());
        for level in &self.levels {
            level.write_to(to);
        }
    }

    /// What `write_to` appended for a tree over `pages`, every link checked.
    pub fn read_from(pages: &Blocks, from: &mut Reader<'_>) -> Result<Self, IndexError> {
        let mut tree = Self::new(pages.dim);
        let num_levels = from.len()?;
        from.check(num_levels <= LEVELS_MAX, "number of levels")?;
        tree.parents[0] = vec![NO_PARENT; pages.num_blocks()];
        for level in 0..num_levels {
            let nodes = Blocks::read_from(pages.dim, from)?;
            for (entry, &block) in nodes.child.iter().enumerate().filter(|e| *e.1 != u32::MAX) {
                let link = tree.parents[level].get_mut(block as usize);
                let link = link.ok_or_else(|| from.damaged("child of a node"))?;
                from.check(*link == NO_PARENT, "two parents for one node")?;
                *link = entry as u32;
                let below = &tree.blocks(pages, level).count[Blocks::entries(block as usize)];
                let total: u64 = below.iter().map(|&c| u64::from(c)).sum();
                from.check(total == u64::from(nodes.count[entry]), "tokens of a node")?;
            }
            from.check(!tree.parents[level].contains(&NO_PARENT), "a node without a parent")?;
            tree.parents.push(vec![NO_PARENT; nodes.num_blocks()]);
            tree.levels.push(nodes);
        }
        let wanted = if num_levels == 0 { pages.num_blocks() <= 1 } else { pages.num_blocks() > 0 };
        from.check(wanted, "pages without a tree or a tree without pages")?;
        Ok(tree)
    }

    pub fn size_bytes(&self) -> usize {
        self.levels.iter().map(Blocks::size_bytes).sum::<usize>()
            + self.parents.iter().map(|p| 4 * p.capacity()).sum::<usize>()
    }
}
