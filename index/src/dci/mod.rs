//! The tree of pages: tokens -> pages of at most 16 -> super-nodes of at most 16 pages -> ... -> top.
//!
//! Level 0 blocks hold page summaries; entry `b` of level 1 summarises block `b'` of level 0 (its `child`), and so on up to
//! a top level of few blocks that every search scans whole.

mod bisect;
mod build;
mod codebook;
mod insert;
mod neighbours;
mod refine;
mod search;
mod tree;

use crate::check;
use crate::error::IndexError;
use crate::export::PageView;
use crate::flat::{Flat, check_dim};
use crate::found::Found;
use crate::index::{Batch, KeyId, KeyIndex, MemoryReport, Query, SearchParams, TailOut};
use crate::pages::{Pages, Removed};
use crate::scratch::Scratch;
use crate::simd::Isa;
use crate::sketch::SketchConfig;
use crate::snapshot::{Kind, Reader, Writer};
use crate::tail::tail;
pub(crate) use insert::young_max;
use tree::Tree;

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Dci {
    isa: Isa,
    pages: Pages,
    tree: Tree,
}

impl Dci {
    /// An empty index over keys of `dim` elements.
    ///
    /// # Errors
    /// `Config` when `dim` is 0 or above `MAX_DIM`.
    pub fn new(dim: usize) -> Result<Self, IndexError> {
        Self::with_sketch(dim, SketchConfig::OFF)
    }

    /// The same with residual codes beside every page.
    ///
    /// # Errors
    /// `Config` when `dim` is 0 or above `MAX_DIM`.
    pub fn with_sketch(dim: usize, sketch: SketchConfig) -> Result<Self, IndexError> {
        check_dim(dim)?;
        Ok(Self { isa: Isa::detect(), pages: Pages::new(dim, sketch)?, tree: Tree::new(dim) })
    }

    /// The index that `snapshot` wrote.
    ///
    /// # Errors
    /// `Snapshot` for any other bytes.
    pub fn restore(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut from = Reader::new(bytes, Kind::Dci)?;
        let pages = Pages::read_from(&mut from)?;
        let tree = Tree::read_from(&pages.blocks, &mut from)?;
        from.finish()?;
        Ok(Self { isa: Isa::detect(), pages, tree })
    }

    /// The same pages without the tree: the oracle of every search.
    pub fn flattened(&self) -> Flat {
        Flat::over(self.pages.clone(), self.isa)
    }

    /// Super-nodes, each of up to sixteen pages ([`PageView::super_node_of`]); 0 where the tree has no level above its pages.
    pub fn num_super_nodes(&self) -> usize {
        if self.tree.top() == 0 { 0 } else { self.tree.parents[0].len() }
    }

    /// Tokens below a super-node, and the mean squared deviation of a coordinate of their keys from their mean.
    ///
    /// # Panics
    /// When there is no such super-node.
    pub fn super_node(&self, node: usize) -> (u32, f32) {
        let (entry, nodes) = self.node_entry(node);
        (nodes.count[entry], nodes.spread[entry])
    }

    /// Writes a super-node's mean key and mean value in the caller's frame, `[dim]` f32 each.
    ///
    /// # Panics
    /// When there is no such super-node or an output has another length.
    pub fn super_node_means(&self, node: usize, key: &mut [f32], value: &mut [f32]) {
        let (entry, nodes) = self.node_entry(node);
        nodes.read_key(entry, key);
        nodes.read_value(entry, value);
        let frame = &self.pages.frame;
        key.iter_mut().zip(&frame.key_centre).for_each(|(x, c)| *x += c);
        value.iter_mut().zip(&frame.value_centre).for_each(|(x, c)| *x += c);
    }

    fn node_entry(&self, node: usize) -> (usize, &crate::blocks::Blocks) {
        (self.tree.parents[0][node] as usize, &self.tree.levels[0])
    }

    /// Tokens in sealed pages over slots of sealed pages; 1 when there is no page.
    pub fn fill(&self) -> f64 {
        let live: u32 = self.pages.live.iter().map(|l| l.count_ones()).sum();
        let pages = self.pages.num_pages() - self.pages.free.len();
        if pages == 0 { 1.0 } else { f64::from(live) / (pages * crate::blocks::LANES) as f64 }
    }
}

impl KeyIndex for Dci {
    fn dim(&self) -> usize {
        self.pages.dim
    }

    fn len(&self) -> usize {
        self.pages.map.len()
    }

    fn build(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        if !self.is_empty() {
            return Err(IndexError::NotEmpty { len: self.len() });
        }
        check::batch(batch, self.pages.dim, 0, |_| false)?;
        self.build_all(batch);
        Ok(())
    }

    fn insert(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        check::batch(batch, self.pages.dim, self.len(), |id| self.pages.map.get(id).is_some())?;
        self.insert_all(batch);
        Ok(())
    }

    fn remove(&mut self, ids: &[KeyId]) -> Result<usize, IndexError> {
        let mut removed = 0;
        for &id in ids {
            match self.pages.remove(id) {
                Removed::Unknown => {}
                Removed::Young => removed += 1,
                Removed::Paged { entry } => {
                    removed += 1;
                    self.tree.refresh(&self.pages.blocks, entry / crate::blocks::LANES);
                }
            }
        }
        Ok(removed)
    }

    fn search(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        scratch: &mut Scratch,
        found: &mut Found,
    ) -> Result<(), IndexError> {
        self.search_tree(query, exclude, params, (scratch, found))
    }

    fn tail(
        &self,
        query: &Query<'_>,
        _exclude: &[KeyId],
        found: &Found,
        scratch: &mut Scratch,
        state: TailOut<'_>,
    ) -> Result<(), IndexError> {
        let from = (&self.pages, self.tree.levels.as_slice());
        tail(self.isa, from, (query, found, scratch), state)
    }

    fn pages(&self) -> Option<PageView<'_>> {
        Some(PageView::of(&self.pages))
    }

    fn memory(&self) -> MemoryReport {
        MemoryReport { tree_bytes: self.tree.size_bytes(), ..self.pages.memory() }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut to = Writer::new(Kind::Dci);
        self.pages.write_to(&mut to);
        self.tree.write_to(&mut to);
        to.finish()
    }
}
