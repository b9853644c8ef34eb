//! The published tree, as a baseline: a multi-level DCI with one random projection (IceCache, arXiv 2604.10539, and its code).
//!
//! Every token is itself a node. A token's level follows from counts (one in 100 goes to level 1, one in 5 of those to level
//! 2, ...); its parent is the nearest token one level up under the lifted distance `c^2 - k.p - sqrt((c^2-|k|^2)(c^2-|p|^2))`, where `c`
//! is the largest key length. A parent's children are sorted by one projection and cut into pages of at most sixteen. A query
//! walks the levels with a beam, looks at 80 % of every opened parent's children outwards from its own projection, and ranks pages by
//! the best member that it saw; the heads search one by one and their page lists are interleaved. There are no summaries: the tail is empty.
//!
//! Left out: the published shortcut through anchors (results depend on thread timing) and re-projection when `c` grows later
//! (only the order of pages inside a parent depends on it).

use crate::blocks::LANES;
use crate::error::IndexError;
use crate::flat::check_dim;
use crate::found::Found;
use crate::index::{Batch, Hit, KeyId, KeyIndex, MemoryReport, Query, SearchParams, TailOut};
use crate::rows::Rows;
use crate::scratch::Scratch;
use crate::simd::Isa;
use crate::simd::vectorise::{Kernel, dot, vectorised};
use crate::snapshot::{Kind, Reader, Writer};

/// Part of the tokens that are promoted to level 1, and from there on.
const RATIOS: [f64; 2] = [0.01, 0.2];
/// Parents up to this many are searched exactly.
const EXACT_PARENTS: usize = 3000;
/// Beam of the search for a parent, and smallest beam of a query.
const FIELD_OF_VIEW: usize = 30;
/// Beam of a query over the number of tokens.
const FIELD_OF_VIEW_PART: f64 = 1.5e-3;
/// Part of a parent's children that a query looks at.
const VISIT: f64 = 0.8;
/// Name of the virtual root.
const ROOT: u32 = u32::MAX;

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Icecache {
    isa: Isa,
    rows: Rows,
    /// `[dim + 1]` the one direction, of length 1.
    direction: Vec<f32>,
    /// Squared length of the longest key.
    longest_sq: f32,
    /// `[rows]`
    nodes: Vec<Node>,
    root: Node,
    /// Tokens by level.
    counts: Vec<usize>,
    next_level: usize,
}

/// A token as a parent.
#[derive(Clone, Debug, Default)]
struct Node {
    level: u8,
    parent: u32,
    norm_sq: f32,
    projection: f32,
    /// Children in pages; projections rise within and across pages.
    pages: Vec<Vec<u32>>,
}

struct Dot<'a>(&'a [f32], &'a [f32]);

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        dot(self.0, self.1).clamp(-1e30, 1e30)
    }
}

/// A gaussian direction, the same for all shards and runs.
fn direction(dim: usize) -> Vec<f32> {
    let mut state = 0x1ceu64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut u: Vec<f32> = (0..=dim).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
    let length = u.iter().map(|x| x * x).sum::<f32>().sqrt();
    u.iter_mut().for_each(|x| *x /= length);
    u
}

impl Icecache {
    /// An empty index over keys of `dim` elements.
    ///
    /// # Errors
    /// `Config` when `dim` is 0 or above `MAX_DIM`.
    pub fn new(dim: usize) -> Result<Self, IndexError> {
        check_dim(dim)?;
        Ok(Self {
            isa: Isa::detect(),
            rows: Rows::new(dim),
            direction: direction(dim),
            longest_sq: 0.0,
            nodes: Vec::new(),
            root: Node { parent: ROOT, ..Node::default() },
            counts: vec![0],
            next_level: 0,
        })
    }

    /// The index that `snapshot` wrote; the tree is built again from its rows.
    ///
    /// # Errors
    /// `Snapshot` for any other bytes.
    pub fn restore(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut from = Reader::new(bytes, Kind::Icecache)?;
        let rows = Rows::read_from(&mut from)?;
        from.finish()?;
        let mut index = Self::new(rows.dim)?;
        index.insert(&Batch { ids: &rows.ids, keys: &rows.keys, values: &rows.values })?;
        Ok(index)
    }

    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        vectorised(self.isa, Dot(a, b))
    }

    /// Level of the next token: levels fill in turn so that each keeps its ratio to the one below.
    fn promote(&mut self) -> usize {
        let level = self.next_level;
        self.counts[level] += 1;
        let ratio = RATIOS[level.min(1)];
        let top = self.counts.len() - 1;
        let promote = if level == top {
            self.counts[level] >= (1.0 / ratio).ceil() as usize
        } else {
            self.counts[level] as f64 + 1.0 >= self.counts[level + 1] as f64 / ratio
        };
        if promote && level == top {
            self.counts.push(0);
        }
        self.next_level = if promote { level + 1 } else { 0 };
        level
    }

    fn node(&self, row: u32) -> &Node {
        if row == ROOT { &self.root } else { &self.nodes[row as usize] }
    }

    fn children(&self, row: u32) -> impl Iterator<Item = u32> + '_ {
        self.node(row).pages.iter().flatten().copied()
    }

    /// Lifted distance (half its square) between two keys.
    fn distance(&self, a: u32, b: u32) -> f32 {
        let lift = |row: u32| (self.longest_sq - self.nodes[row as usize].norm_sq).max(0.0).sqrt();
        self.longest_sq - self.dot(self.rows.key(a as usize), self.rows.key(b as usize)) - lift(a) * lift(b)
    }

    /// Nearest token of level `level + 1`, by a beam from the root; exact while there are few.
    fn parent_of(&self, row: u32, level: usize) -> u32 {
        let width = if self.counts[level + 1] <= EXACT_PARENTS { usize::MAX } else { FIELD_OF_VIEW };
        let mut beam = vec![ROOT];
        let mut best = (f32::INFINITY, ROOT);
        loop {
            // Nodes of one beam may have children of different levels: a token hangs below the next higher level that exists.
            let mut next: Vec<(f32, u32)> = beam
                .iter()
                .flat_map(|&p| self.children(p))
                .filter(|&c| usize::from(self.nodes[c as usize].level) > level && c != row)
                .map(|c| (self.distance(row, c), c))
                .collect();
            if next.is_empty() {
                return best.1;
            }
            next.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            for &(d, c) in &next {
                if usize::from(self.nodes[c as usize].level) == level + 1 && d < best.0 {
                    best = (d, c);
                }
            }
            beam = next.into_iter().take(width).map(|x| x.1).collect();
        }
    }

    /// Puts a row among the children of its parent: into the page where its projection belongs, which splits when full.
    fn attach(&mut self, row: u32, parent: u32) {
        self.nodes[row as usize].parent = parent;
        let projection = self.nodes[row as usize].projection;
        let mut pages = std::mem::take(self.pages_mut(parent));
        let after = |r: &u32| self.nodes[*r as usize].projection <= projection;
        let at = pages.partition_point(|page| page.first().is_some_and(after)).saturating_sub(1);
        if pages.is_empty() {
            pages.push(Vec::new());
        }
        let place = pages[at].partition_point(after);
        pages[at].insert(place, row);
        if pages[at].len() > LANES {
            let high = pages[at].split_off(LANES / 2);
            pages.insert(at + 1, high);
        }
        *self.pages_mut(parent) = pages;
    }

    fn pages_mut(&mut self, row: u32) -> &mut Vec<Vec<u32>> {
        if row == ROOT { &mut self.root.pages } else { &mut self.nodes[row as usize].pages }
    }

    /// Adds the rows from `first` on, upper levels first, and moves older tokens to new parents that are nearer.
    fn grow(&mut self, first: usize, fresh: bool) {
        let dim = self.rows.dim;
        for row in first..self.rows.num_rows() {
            let key = self.rows.key(row);
            self.longest_sq = self.longest_sq.max(self.dot(key, key));
        }
        let mut order: Vec<u32> = Vec::new();
        for row in first..self.rows.num_rows() {
            let key = self.rows.key(row);
            let norm_sq = self.dot(key, key);
            let lift = (self.longest_sq - norm_sq).max(0.0).sqrt();
            let projection = self.dot(key, &self.direction[..dim]) + lift * self.direction[dim];
            let level = self.promote() as u8;
            self.nodes.push(Node { level, parent: ROOT, norm_sq, projection, pages: Vec::new() });
            order.push(row as u32);
        }
        order.sort_by_key(|&row| std::cmp::Reverse(self.nodes[row as usize].level));
        for row in order {
            let level = usize::from(self.nodes[row as usize].level);
            let top = level + 1 >= self.counts.len() || self.counts[level + 1] == 0;
            let parent = if top { ROOT } else { self.parent_of(row, level) };
            self.attach(row, parent);
            if !fresh && level > 0 {
                self.steal(row, level as u8);
            }
        }
        if fresh {
            self.pack();
        }
    }

    /// Moves tokens one level below `row` to it where it is nearer than their parent (a scan of all tokens, as published).
    fn steal(&mut self, row: u32, level: u8) {
        for other in 0..self.nodes.len() as u32 {
            let node = &self.nodes[other as usize];
            let stays = node.level + 1 != level || node.parent == ROOT || !self.rows.live[other as usize];
            if stays || self.distance(other, row) >= self.distance(other, node.parent) - 1e-8 {
                continue;
            }
            self.detach(other);
            self.attach(other, row);
        }
    }

    /// Takes a row from its page; a page that is left with few joins its neighbour.
    fn detach(&mut self, row: u32) {
        let parent = self.nodes[row as usize].parent;
        let pages = self.pages_mut(parent);
        let Some(at) = pages.iter().position(|page| page.contains(&row)) else { return };
        pages[at].retain(|&r| r != row);
        if pages[at].len() < LANES / 2
            && at + 1 < pages.len()
            && pages[at].len() + pages[at + 1].len() <= LANES
        {
            let next = pages.remove(at + 1);
            pages[at].extend(next);
        } else if pages[at].is_empty() {
            pages.remove(at);
        }
    }

    /// Cuts the children of every parent into runs of nearly equal size, as the bulk load does.
    fn pack(&mut self) {
        for row in std::iter::once(ROOT).chain(0..self.nodes.len() as u32) {
            let all: Vec<u32> = self.children(row).collect();
            let num = all.len().div_ceil(LANES);
            let pages = (0..num).map(|i| all[i * all.len() / num..(i + 1) * all.len() / num].to_vec());
            *self.pages_mut(row) = pages.collect();
        }
    }

    /// Pages of one head, best first: `(best member, parent, page of it)`.
    fn pages_of(&self, q: &[f32], num_pages: usize, found: &mut Found) -> Vec<(f32, u32, u32)> {
        let width = ((FIELD_OF_VIEW_PART * self.rows.map.len() as f64) as usize).max(FIELD_OF_VIEW);
        let length = self.dot(q, q).sqrt().max(f32::MIN_POSITIVE);
        let at = self.dot(q, &self.direction[..self.rows.dim]) / length;
        let mut pages: Vec<(f32, u32, u32)> = Vec::new();
        let mut beam = vec![ROOT];
        while !beam.is_empty() {
            let mut next: Vec<(f32, u32)> = Vec::new();
            for &parent in &beam {
                let node = self.node(parent);
                let num: usize = node.pages.iter().map(Vec::len).sum();
                let mut near: Vec<(f32, u32, u32)> = Vec::with_capacity(num);
                for (p, page) in node.pages.iter().enumerate() {
                    near.extend(
                        page.iter().map(|&c| ((self.nodes[c as usize].projection - at).abs(), c, p as u32)),
                    );
                }
                let visit = if num <= num_pages { num } else { (VISIT * num as f64).ceil() as usize };
                near.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                let mut best: Vec<f32> = vec![f32::NEG_INFINITY; node.pages.len()];
                for &(_, child, page) in &near[..visit] {
                    let score = self.dot(q, self.rows.key(child as usize));
                    best[page as usize] = best[page as usize].max(score);
                    if !self.nodes[child as usize].pages.is_empty() {
                        next.push((score, child));
                    }
                }
                found.nodes_scored += visit;
                let seen = best.iter().enumerate().filter(|b| *b.1 > f32::NEG_INFINITY);
                pages.extend(seen.map(|(p, &score)| (score, parent, p as u32)));
            }
            next.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            beam = next.into_iter().take(width).map(|x| x.1).collect();
        }
        pages.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        pages.truncate(num_pages);
        pages
    }
}

impl KeyIndex for Icecache {
    fn dim(&self) -> usize {
        self.rows.dim
    }

    fn len(&self) -> usize {
        self.rows.map.len()
    }

    fn build(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        if !self.is_empty() {
            return Err(IndexError::NotEmpty { len: self.len() });
        }
        self.insert(batch)
    }

    fn insert(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        self.rows.check(batch)?;
        let first = self.rows.num_rows();
        self.rows.extend(batch);
        self.grow(first, first == 0);
        Ok(())
    }

    fn remove(&mut self, ids: &[KeyId]) -> Result<usize, IndexError> {
        // A token stays in the tree as a parent; its page is no longer allowed to return it.
        Ok(ids.iter().filter(|&&id| self.rows.remove(id).is_some()).count())
    }

    fn search(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        _scratch: &mut Scratch,
        found: &mut Found,
    ) -> Result<(), IndexError> {
        self.rows.begin(query, exclude, params, found)?;
        // Pages are 90 % full and may hold excluded tokens: twice the pages fill the budget.
        let num_pages = 2 * params.budget.div_ceil(LANES) + exclude.len();
        let heads = query.q.chunks_exact(self.rows.dim);
        let lists: Vec<_> = heads.map(|q| self.pages_of(q, num_pages, found)).collect();
        found.index_bytes_read = found.nodes_scored * self.rows.dim * 4;
        let mut taken = std::collections::HashSet::new();
        for rank in 0..num_pages {
            for (score, parent, page) in lists.iter().filter_map(|list| list.get(rank)) {
                if found.tokens.len() >= params.budget {
                    return Ok(());
                }
                if !taken.insert((*parent, *page)) {
                    continue;
                }
                found.pages_opened += 1;
                for &row in &self.node(*parent).pages[*page as usize] {
                    let id = self.rows.ids[row as usize];
                    let there = self.rows.live[row as usize] && exclude.binary_search(&id).is_err();
                    if there && found.tokens.len() < params.budget {
                        found.tokens.push(Hit { id, score: score * query.scale });
                    }
                }
            }
        }
        Ok(())
    }

    fn tail(
        &self,
        query: &Query<'_>,
        _exclude: &[KeyId],
        found: &Found,
        _scratch: &mut Scratch,
        state: TailOut<'_>,
    ) -> Result<(), IndexError> {
        self.rows.no_tail(query, found, state)
    }

    fn memory(&self) -> MemoryReport {
        let nodes = self
            .nodes
            .iter()
            .map(|n| size_of::<Node>() + n.pages.iter().map(|p| 24 + 4 * p.capacity()).sum::<usize>());
        MemoryReport { tree_bytes: nodes.sum(), ..self.rows.memory() }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut to = Writer::new(Kind::Icecache);
        self.rows.write_to(&mut to);
        to.finish()
    }
}
