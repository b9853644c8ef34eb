//! Token retrieval by a navigable graph (crate hnsw_rs), for comparison: what a user would take from the shelf.
//!
//! One graph over the tokens of a shard. Edges join keys that are near in squared distance; a search walks them by inner
//! product with the query. hnsw_rs wants distances of at least 0, so an inner product enters as its order-preserving image
//! among the non-negative floats ([`falling`]): nothing else of a distance is ever used.
//!
//! Each query head searches alone; the union of the answers is ranked by the maximum over the heads of the softmax-normalised
//! exact score. Nothing answers for what is not selected: the tail is the empty state.
//!
//! *Determinism.* Levels are drawn by hnsw_rs from a generator with a fixed seed, and its hash tables are only ever asked, never
//! walked, as long as candidates are not extended (they are not). So insertion one by one, as here, gives the same graph on
//! every run; hnsw_rs's parallel insertion would not.
//!
//! *Removal* leaves the token in the graph as a way through, never as an answer; once such tokens outnumber the others the
//! graph is built anew. *Not for* production: an insertion costs some 100 us, a token some 2 KiB.

use std::cell::Cell;

use half::bf16;
use hnsw_rs::anndists::dist::Distance;

use crate::check;
use crate::error::IndexError;
use crate::export::PageView;
use crate::flat::check_dim;
use crate::found::Found;
use crate::idmap::{IdMap, Place};
use crate::index::{Batch, Hit, KeyId, KeyIndex, MemoryReport, Query, SearchParams, TailOut};
use crate::keys16::{self, widen};
use crate::scratch::Scratch;
use crate::simd::Isa;
use crate::simd::vectorise::{Kernel, fold, vectorised};
use crate::snapshot::{Kind, Reader, Writer};

/// Layers of the graph; the next to last holds one token in `m^14`.
const LAYERS: usize = 16;

/// Widest candidate list; hnsw_rs takes memory for all of it up front.
const EF_MAX: usize = 1 << 16;

/// Graph and search constants, named as in the literature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HnswConfig {
    /// Links of a token in the upper layers; twice as many in the lowest. 2 to 256.
    pub m: usize,
    /// Candidates kept while a token is inserted.
    pub ef_construction: usize,
    /// Candidates kept while a head searches; at least the budget is used.
    pub ef_search: usize,
}

impl Default for HnswConfig {
    /// The values that hnsw_rs's own examples and the literature settle on for vectors of about 100 elements.
    fn default() -> Self {
        Self { m: 16, ef_construction: 100, ef_search: 256 }
    }
}

/// See the module documentation.
pub struct Hnsw {
    isa: Isa,
    dim: usize,
    config: HnswConfig,
    graph: Graph,
    /// `[slots, dim]` keys in order of insertion.
    keys: Vec<bf16>,
    /// `[slots]`
    ids: Vec<KeyId>,
    /// `[slots]` whether the token was removed.
    gone: Vec<bool>,
    num_gone: usize,
    map: IdMap,
    stamp: u64,
}

type Graph = hnsw_rs::hnsw::Hnsw<'static, u16, Nearness>;

impl std::fmt::Debug for Hnsw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hnsw")
            .field("dim", &self.dim)
            .field("config", &self.config)
            .field("len", &self.map.len())
            .finish_non_exhaustive()
    }
}

/// Between two keys `[dim]` the squared distance; between a query `[2 dim]` and a key the falling image of their product.
struct Nearness {
    isa: Isa,
    dim: usize,
}

/// Maps a larger product to a smaller float of at least 0: the bits of an f32, made to rise with its value, are turned round
/// and halved.
fn falling(product: f32) -> f32 {
    let bits = product.to_bits();
    let rising = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    // The largest patterns would be infinite or NaN; they belong to products below -1e38.
    f32::from_bits((!rising >> 1).min(f32::MAX.to_bits()))
}

thread_local! {
    /// Keys that this thread has compared with queries: the graph does not tell what a search walked.
    static COMPARED: Cell<usize> = const { Cell::new(0) };
}

impl Distance<u16> for Nearness {
    fn eval(&self, a: &[u16], b: &[u16]) -> f32 {
        let (query, key) = match (a.len() == self.dim, b.len() == self.dim) {
            (true, true) => {
                let squared = vectorised(self.isa, Apart { a, b });
                return if squared.is_finite() { squared } else { f32::MAX };
            }
            (false, _) => (a, b),
            (true, false) => (b, a),
        };
        COMPARED.set(COMPARED.get() + 1);
        falling(vectorised(self.isa, Along { query, key }))
    }
}

struct Apart<'a> {
    a: &'a [u16],
    b: &'a [u16],
}

impl Kernel for Apart<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        let mut sums = [0.0f32; PARTS];
        let (a, b) = (self.a.chunks_exact(PARTS), self.b.chunks_exact(PARTS));
        let rest = a.remainder().iter().zip(b.remainder());
        let apart = |x: u16, y: u16| {
            let d = widen(x) - widen(y);
            d * d
        };
        let rest: f32 = rest.map(|(&x, &y)| apart(x, y)).sum();
        for (a, b) in a.zip(b) {
            for ((s, &x), &y) in sums.iter_mut().zip(a).zip(b) {
                *s += apart(x, y);
            }
        }
        fold(sums) + rest
    }
}

/// The query's f32 bits are in two planes: high halves, then low halves.
struct Along<'a> {
    query: &'a [u16],
    key: &'a [u16],
}

impl Kernel for Along<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        let mut sums = [0.0f32; PARTS];
        let (high, low) = self.query.split_at(self.key.len());
        let (high, low, key) =
            (high.chunks_exact(PARTS), low.chunks_exact(PARTS), self.key.chunks_exact(PARTS));
        let along =
            |high: u16, low: u16, k: u16| f32::from_bits(u32::from(high) << 16 | u32::from(low)) * widen(k);
        let rest = high.remainder().iter().zip(low.remainder()).zip(key.remainder());
        let rest: f32 = rest.map(|((&h, &l), &k)| along(h, l, k)).sum();
        for ((high, low), key) in high.zip(low).zip(key) {
            for (((s, &h), &l), &k) in sums.iter_mut().zip(high).zip(low).zip(key) {
                *s += along(h, l, k);
            }
        }
        fold(sums) + rest
    }
}

/// Partial sums of a distance.
const PARTS: usize = 16;

/// Working memory of a search.
#[derive(Debug, Default)]
pub(crate) struct HnswScratch {
    query: Vec<u16>,
    union: Vec<u32>,
    /// `[union]` logits of one head.
    row: Vec<f32>,
    ranked: Vec<(f32, u32)>,
}

impl Hnsw {
    /// An empty index over keys of `dim` elements.
    ///
    /// # Errors
    /// `Config` when `dim` is 0 or above `MAX_DIM`, or a constant is out of range.
    pub fn new(dim: usize, config: HnswConfig) -> Result<Self, IndexError> {
        check_dim(dim)?;
        if !(2..=256).contains(&config.m) {
            return Err(IndexError::Config { field: "m", value: config.m as f64, expected: "in 2..=256" });
        }
        for (field, value) in [("ef_construction", config.ef_construction), ("ef_search", config.ef_search)] {
            if !(1..=EF_MAX).contains(&value) {
                return Err(IndexError::Config { field, value: value as f64, expected: "in 1..=65536" });
            }
        }
        let isa = Isa::detect();
        Ok(Self {
            isa,
            dim,
            config,
            graph: empty_graph(isa, dim, &config),
            keys: Vec::new(),
            ids: Vec::new(),
            gone: Vec::new(),
            num_gone: 0,
            map: IdMap::default(),
            stamp: 0,
        })
    }

    /// The index that `snapshot` wrote. The graph is built again from its tokens, those that were removed and still are ways
    /// through included, in their order: the same one.
    ///
    /// # Errors
    /// `Snapshot` for any other bytes.
    pub fn restore(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut from = Reader::new(bytes, Kind::Hnsw)?;
        let dim = from.len()?;
        let config = HnswConfig { m: from.len()?, ef_construction: from.len()?, ef_search: from.len()? };
        let mut index = Self::new(dim, config).map_err(|_| from.damaged("a constant is out of range"))?;
        let (ids, keys) = keys16::read(&mut from, dim)?;
        let gone: Vec<bool> = from.take(ids.len())?.iter().map(|&gone| gone != 0).collect();
        from.finish()?;
        index.append(&ids, &keys);
        // A position that was cut off and decoded again is there twice, once as gone.
        index.map = IdMap::default();
        for (slot, (&id, gone)) in ids.iter().zip(&gone).enumerate() {
            if !gone {
                from.check(index.map.get(id).is_none(), "an id occurs twice")?;
                index.map.set(id, Place::Slot(slot));
            }
        }
        index.num_gone = gone.iter().filter(|gone| **gone).count();
        index.gone = gone;
        Ok(index)
    }

    fn append(&mut self, ids: &[KeyId], keys: &[bf16]) {
        let mut bits = vec![0u16; self.dim];
        for (&id, key) in ids.iter().zip(keys.chunks_exact(self.dim)) {
            let slot = self.ids.len();
            for (b, k) in bits.iter_mut().zip(key) {
                *b = k.to_bits();
            }
            self.graph.insert_slice((&bits, slot));
            self.keys.extend_from_slice(key);
            self.ids.push(id);
            self.gone.push(false);
            self.map.set(id, Place::Slot(slot));
        }
    }

    /// Builds the graph anew from the tokens that are left.
    fn sweep(&mut self) {
        let mut ids = Vec::with_capacity(self.map.len());
        let mut keys = Vec::with_capacity(self.map.len() * self.dim);
        for slot in (0..self.ids.len()).filter(|&s| !self.gone[s]) {
            ids.push(self.ids[slot]);
            keys.extend_from_slice(&self.keys[slot * self.dim..(slot + 1) * self.dim]);
        }
        self.graph = empty_graph(self.isa, self.dim, &self.config);
        self.keys.clear();
        self.ids.clear();
        self.gone.clear();
        self.num_gone = 0;
        self.append(&ids, &keys);
    }

    /// Slots of the candidates of every head into `union`, without removed and excluded ones.
    fn collect(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        scratch: &mut HnswScratch,
    ) {
        let HnswScratch { query: bits, union, .. } = scratch;
        let hidden = exclude.iter().filter(|&&id| self.map.get(id).is_some()).count();
        let available = self.map.len() - hidden;
        let effort = (self.config.ef_search as f64 * f64::from(params.open_fraction)).ceil() as usize;
        // Removed and excluded tokens take up places in the answer.
        let ef = effort.max(params.budget).min(params.node_budget).max(1);
        let ef = ef.saturating_add(hidden + self.num_gone).min(self.ids.len());
        union.clear();
        for q in query.q.chunks_exact(self.dim) {
            bits.clear();
            bits.extend(q.iter().map(|x| (x.to_bits() >> 16) as u16));
            bits.extend(q.iter().map(|x| x.to_bits() as u16));
            union.extend(self.graph.search(bits, ef, ef).iter().map(|n| n.d_id as u32));
        }
        self.settle(exclude, union);
        // The graph need not be connected, and a budget may ask for most of it: then every token is a candidate.
        if union.len() < params.budget.min(available) && params.node_budget >= self.ids.len() {
            union.clear();
            union.extend(0..self.ids.len() as u32);
            self.settle(exclude, union);
        }
    }

    /// Bytes of the graph, keys included, as hnsw_rs 0.3 lays it out. Walks every token.
    fn graph_bytes(&self) -> usize {
        // A shared point with its data and layer table, and its place in the table of its layer.
        const POINT: usize = 16 + 56 + (16 + 8 + 24 + LAYERS * 24) + 8;
        // A pointer to a shared (point, distance).
        const LINK: usize = 8 + 16 + 16;
        let num_points = self.ids.len();
        if num_points == 0 {
            return 0;
        }
        let points = self.graph.get_point_indexation().into_iter();
        let links: usize = points.map(|p| p.get_neighborhood_id().iter().map(Vec::len).sum::<usize>()).sum();
        num_points * (POINT + 2 * self.dim) + links * LINK
    }

    fn settle(&self, exclude: &[KeyId], union: &mut Vec<u32>) {
        union.retain(|&slot| {
            !self.gone[slot as usize] && exclude.binary_search(&self.ids[slot as usize]).is_err()
        });
        union.sort_unstable();
        union.dedup();
    }
}

/// `ln(sum exp(x) + exp(attended))`.
pub(crate) fn log_sum(logits: &[f32], attended: f32) -> f32 {
    let max = logits.iter().copied().fold(attended, f32::max);
    if !max.is_finite() {
        return max;
    }
    let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
    max + (sum + f64::from((attended - max).exp())).ln() as f32
}

fn empty_graph(isa: Isa, dim: usize, config: &HnswConfig) -> Graph {
    Graph::new(config.m, 0, LAYERS, config.ef_construction, Nearness { isa, dim })
}

impl KeyIndex for Hnsw {
    fn dim(&self) -> usize {
        self.dim
    }

    fn len(&self) -> usize {
        self.map.len()
    }

    fn build(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        if !self.is_empty() {
            return Err(IndexError::NotEmpty { len: self.len() });
        }
        self.insert(batch)
    }

    fn insert(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        check::batch(batch, self.dim, self.len(), |id| self.map.get(id).is_some())?;
        self.append(batch.ids, &keys16::narrowed(batch.keys));
        self.stamp += 1;
        Ok(())
    }

    fn remove(&mut self, ids: &[KeyId]) -> Result<usize, IndexError> {
        let mut removed = 0;
        for &id in ids {
            if let Some(Place::Slot(slot)) = self.map.get(id) {
                self.map.remove(id);
                self.gone[slot] = true;
                removed += 1;
            }
        }
        self.num_gone += removed;
        self.stamp += u64::from(removed > 0);
        if self.num_gone > self.map.len() {
            self.sweep();
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
        check::query(query, self.dim)?;
        check::exclude(exclude)?;
        check::params(params)?;
        found.begin_without_tail(query.group, self.stamp);
        if params.budget == 0 || self.is_empty() {
            return Ok(());
        }
        let scratch = &mut scratch.hnsw;
        COMPARED.set(0);
        self.collect(query, exclude, params, scratch);
        let HnswScratch { union, row, ranked, .. } = scratch;
        let n = union.len();
        found.nodes_scored = COMPARED.get() + n;
        found.index_bytes_read = found.nodes_scored * self.dim * size_of::<bf16>();
        ranked.clear();
        ranked.extend(union.iter().map(|&slot| (f32::NEG_INFINITY, slot)));
        for (h, q) in query.q.chunks_exact(self.dim).enumerate() {
            keys16::dots(self.isa, q, &self.keys, union, row);
            row.iter_mut().for_each(|x| *x *= query.scale);
            let attended = query.attended_lse.get(h).copied().unwrap_or(f32::NEG_INFINITY);
            let norm = log_sum(row, attended);
            for ((best, _), &x) in ranked.iter_mut().zip(row.iter()) {
                // A product that overflows has no share to speak of; it still is the head's favourite.
                let share = if x == norm { 0.0 } else { x - norm };
                *best = if share > *best { share } else { *best };
            }
        }
        let best_first = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if params.budget < n {
            ranked.select_nth_unstable_by(params.budget - 1, best_first);
            ranked.truncate(params.budget);
        }
        ranked.sort_unstable_by(best_first);
        let hit = |&(score, slot): &(f32, u32)| Hit { id: self.ids[slot as usize], score };
        found.tokens.extend(ranked.iter().map(hit));
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
        found.empty_tail(query, (self.dim, self.stamp), state)
    }

    fn pages(&self) -> Option<PageView<'_>> {
        None
    }

    fn memory(&self) -> MemoryReport {
        MemoryReport {
            ids_bytes: 4 * self.ids.capacity() + self.gone.capacity() + self.map.size_bytes(),
            rows_bytes: 2 * self.keys.capacity() + self.graph_bytes(),
            ..MemoryReport::default()
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut to = Writer::new(Kind::Hnsw);
        to.len(self.dim);
        for x in [self.config.m, self.config.ef_construction, self.config.ef_search] {
            to.len(x);
        }
        keys16::write(&mut to, &self.ids, self.keys.chunks_exact(self.dim));
        to.bytes(&self.gone.iter().map(|&gone| u8::from(gone)).collect::<Vec<u8>>());
        to.finish()
    }
}
