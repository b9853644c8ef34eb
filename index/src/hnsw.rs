//! Token retrieval by the graph of the crate `hnsw_rs`, for comparison.
//!
//! Inner products become Euclidean distances by the usual lift: a key gets one coordinate more that brings it to the length of
//! the longest key, a query gets zero there, and the nearest lifted key is the one with the largest product. The heads of a
//! group search one by one; their answers are united and ranked exactly. There are no summaries, so the tail is empty. The graph
//! cannot forget: removed tokens are filtered out of answers. Build by one thread, so that equal input gives an equal graph.

use std::fmt;

use hnsw_rs::anndists::dist::distances::Distance;
use hnsw_rs::hnsw::Hnsw as Graph;

use crate::error::IndexError;
use crate::flat::check_dim;
use crate::found::Found;
use crate::index::{Batch, KeyId, KeyIndex, MemoryReport, Query, SearchParams, TailOut};
use crate::rows::Rows;
use crate::scratch::Scratch;
use crate::simd::Isa;
use crate::simd::vectorise::{Kernel, distance_sq, dot, vectorised};
use crate::snapshot::{Kind, Reader, Writer};

/// Links of a node, twice that on the ground layer: the crate's recommendation for hundreds of dimensions.
const LINKS: usize = 24;
/// Width of the search that places a node.
const EF_CONSTRUCTION: usize = 200;
const LAYERS: usize = 16;
/// Width of a query over the tokens asked for, where `node_budget` does not set it.
const EF_OVER_BUDGET: usize = 2;

/// See the module documentation.
pub struct Hnsw {
    isa: Isa,
    rows: Rows,
    graph: Graph<'static, f32, Lifted>,
    /// Length that the lift brings keys to; fixed by the first batch.
    length: f64,
}

impl fmt::Debug for Hnsw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hnsw").field("len", &self.rows.map.len()).field("length", &self.length).finish()
    }
}

/// Squared distance of lifted rows.
#[derive(Clone, Copy, Debug)]
struct Lifted(Isa);

struct Far<'a>(&'a [f32], &'a [f32]);

impl Kernel for Far<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        distance_sq(self.0, self.1)
    }
}

impl Distance<f32> for Lifted {
    fn eval(&self, a: &[f32], b: &[f32]) -> f32 {
        vectorised(self.0, Far(a, b)).min(f32::MAX)
    }
}

impl Hnsw {
    /// An empty index over keys of `dim` elements.
    ///
    /// # Errors
    /// `Config` when `dim` is 0 or above `MAX_DIM`.
    pub fn new(dim: usize) -> Result<Self, IndexError> {
        check_dim(dim)?;
        let isa = Isa::detect();
        let graph = Graph::new(LINKS, 1024, LAYERS, EF_CONSTRUCTION, Lifted(isa));
        Ok(Self { isa, rows: Rows::new(dim), graph, length: 0.0 })
    }

    /// The index that `snapshot` wrote; the graph is built again from its rows.
    ///
    /// # Errors
    /// `Snapshot` for any other bytes.
    pub fn restore(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut from = Reader::new(bytes, Kind::Hnsw)?;
        let rows = Rows::read_from(&mut from)?;
        from.finish()?;
        let mut index = Self::new(rows.dim)?;
        index.insert(&Batch { ids: &rows.ids, keys: &rows.keys, values: &rows.values })?;
        Ok(index)
    }

    /// A row of the graph: the vector and the coordinate that completes its length.
    fn lift(&self, key: &[f32]) -> Vec<f32> {
        let norm: f64 = key.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let mut row = key.to_vec();
        row.push((self.length * self.length - norm).max(0.0).sqrt() as f32);
        row
    }
}

impl KeyIndex for Hnsw {
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
        if first == 0 {
            let norm = |key: &[f32]| key.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            self.length = batch.keys.chunks_exact(self.rows.dim).map(norm).fold(0.0, f64::max).sqrt();
        }
        self.rows.extend(batch);
        for row in first..self.rows.num_rows() {
            self.graph.insert_slice((&self.lift(self.rows.key(row)), row));
        }
        Ok(())
    }

    fn remove(&mut self, ids: &[KeyId]) -> Result<usize, IndexError> {
        Ok(ids.iter().filter(|&&id| self.rows.remove(id).is_some()).count())
    }

    fn search(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        scratch: &mut Scratch,
        found: &mut Found,
    ) -> Result<(), IndexError> {
        self.rows.begin(query, exclude, params, found)?;
        let rows = &self.rows;
        scratch.candidates.clear();
        let there = |row: &usize| rows.live[*row] && exclude.binary_search(&rows.ids[*row]).is_err();
        let width = match params.node_budget {
            usize::MAX => EF_OVER_BUDGET * params.budget,
            nodes => nodes.max(params.budget),
        };
        for q in query.q.chunks_exact(rows.dim) {
            if params.budget == 0 || rows.map.len() == 0 {
                continue;
            }
            // The length of a query does not change the order of its neighbours; equal to the keys' it keeps f32 in range.
            let norm = f64::from(dot(q, q)).sqrt();
            let by = if norm > 0.0 { (self.length / norm) as f32 } else { 0.0 };
            let mut lifted: Vec<f32> = q.iter().map(|x| x * by).collect();
            lifted.push(0.0);
            let near = self.graph.search_filter(&lifted, params.budget, width, Some(&there));
            scratch.candidates.extend(near.iter().map(|n| n.d_id as u32));
        }
        scratch.candidates.sort_unstable();
        scratch.candidates.dedup();
        rows.score(self.isa, query, scratch, found);
        rows.select(query, params, scratch, found);
        found.frontier.rest.clear();
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
        // Each node keeps its own copy of the row and, on the ground layer, up to twice `LINKS` links of 24 bytes.
        let nodes = self.rows.num_rows() * (4 * (self.rows.dim + 1) + 2 * LINKS * 24);
        let own = self.rows.memory();
        MemoryReport { tree_bytes: nodes, ..own }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut to = Writer::new(Kind::Hnsw);
        self.rows.write_to(&mut to);
        to.finish()
    }
}
