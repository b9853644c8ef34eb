//! IceCache's index (arXiv 2604.10539, ICLR 2026) as a baseline: a tree of tokens over one random projection, its top pages, and
//! no tail.
//!
//! ```text
//! level 2          o                 every token lies on one level; a token above level 0 owns the tokens
//! level 1     o    o     o           one level below that are nearest to it (keys lifted to a sphere)
//! level 0   ooooo oooo ooooooo       |..16..|..16..| pages: runs of a node's children along one random line
//! ```
//!
//! A search keeps the best `max(30, .0015 n)` tokens from level to level, looks at nearly all of their children, and ranks pages by
//! the best token that it saw in them. Each query head searches alone; pages are dealt out from the heads' lists by rank. Cost per
//! search is linear in the number of tokens.
//!
//! Constants are those of the published code (bf16 branch). Where this differs from it, and why:
//! - pages are filled until the budget of *tokens* is used up (there: a number of pages), so that policies compare at equal budget;
//! - a search that cannot fill the budget looks twice as far again (there: the process ends); `open_fraction` scales the beam and
//!   `node_budget` limits the tokens that a head looks at;
//! - the projections of a prompt's keys are the right ones (there: of another token and head, by a wrong reshape);
//! - a token's parent is the nearest of all where at most 3000 are eligible, and found by the anchor shortcut above that; the
//!   shortcut runs in order on one thread (there: racing threads), so results repeat;
//! - removal, which is missing there: a token with children stays as a signpost;
//! - tokens of the window that are in the index are skipped, and the ranking of pages is not told of the attended mass;
//! - the index holds its own bf16 keys, page by page; with an engine behind it they would be the engine's rows.

mod build;
mod insert;
mod levels;
mod search;
mod snapshot;
mod store;

use crate::check;
use crate::error::IndexError;
use crate::export::PageView;
use crate::flat::check_dim;
use crate::found::Found;
use crate::idmap::IdMap;
use crate::index::{Batch, KeyId, KeyIndex, MemoryReport, Query, SearchParams, TailOut};
use crate::keys16;
use crate::scratch::Scratch;
use crate::simd::Isa;
use crate::snapshot::{Kind, Reader, Writer};
use levels::Levels;
use search::Field;
pub(crate) use search::IcecacheScratch;
use store::{Line, Store};

/// Eligible parents up to which all are compared.
const EXACT_MAX: usize = 3000;
/// Children looked at in one go: nodes with no more are looked at whole.
const STEP: usize = 128;
/// Search for a parent at build.
const PLACING_FIELD: Field = Field { width: 30, visited: 1.0, whole_below: 30 };
/// Search for a parent while decoding.
const INSERT_FIELD: Field = Field { width: 20, visited: 0.6, whole_below: 20 };

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Icecache {
    store: Store,
    levels: Levels,
    map: IdMap,
    stamp: u64,
}

impl Icecache {
    /// An empty index over keys of `dim` elements; `seed` draws the line (the published code draws one for each prompt).
    ///
    /// # Errors
    /// `Config` when `dim` is 0 or above `MAX_DIM`.
    pub fn new(dim: usize, seed: u64) -> Result<Self, IndexError> {
        check_dim(dim)?;
        Ok(Self {
            store: Store::new(Isa::detect(), draw_line(dim, seed)),
            levels: Levels::default(),
            map: IdMap::default(),
            stamp: 0,
        })
    }

    /// The index that `snapshot` wrote, link by link.
    ///
    /// # Errors
    /// `Snapshot` for any other bytes.
    pub fn restore(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut from = Reader::new(bytes, Kind::Icecache)?;
        let dim = from.len()?;
        let empty = Self::new(dim, 0).map_err(|_| from.damaged("dimension"))?;
        let (store, levels, map) = snapshot::read(&mut from, empty.store)?;
        from.finish()?;
        Ok(Self { store, levels, map, stamp: 0 })
    }

    /// Tokens over page slots; 1 when there is no page.
    pub fn fill(&self) -> f64 {
        let slots = self.store.num_pages() * crate::blocks::LANES;
        if slots == 0 { 1.0 } else { self.store.num_slots() as f64 / slots as f64 }
    }

    /// Forgets everything but the line.
    fn reset(&mut self) {
        self.store = Store::new(self.store.isa, self.store.line.clone());
        self.levels = Levels::default();
    }
}

/// A normalised Gaussian direction of `dim + 1` coordinates, the last one for the lift.
fn draw_line(dim: usize, seed: u64) -> Line {
    let mut state = seed;
    // SplitMix64 (Steele, Lea, Flood 2014).
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    // Twelve uniforms sum to variance one (Irwin-Hall), by exact arithmetic on every machine.
    let normals: Vec<f64> = (0..=dim).map(|_| (0..12).map(|_| uniform()).sum::<f64>() - 6.0).collect();
    let length = normals.iter().map(|x| x * x).sum::<f64>().sqrt();
    let unit = |x: &f64| (x / length) as f32;
    Line { direction: normals[..dim].iter().map(unit).collect(), lift: unit(&normals[dim]) }
}

impl KeyIndex for Icecache {
    fn dim(&self) -> usize {
        self.store.dim
    }

    fn len(&self) -> usize {
        self.map.len()
    }

    fn build(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        if !self.is_empty() {
            return Err(IndexError::NotEmpty { len: self.len() });
        }
        check::batch(batch, self.store.dim, 0, |_| false)?;
        self.build_all(batch.ids, &keys16::narrowed(batch.keys));
        self.stamp += 1;
        Ok(())
    }

    fn insert(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        check::batch(batch, self.store.dim, self.len(), |id| self.map.get(id).is_some())?;
        if self.is_empty() {
            self.build_all(batch.ids, &keys16::narrowed(batch.keys));
        } else {
            self.insert_all(batch.ids, &keys16::narrowed(batch.keys));
        }
        self.stamp += 1;
        Ok(())
    }

    fn remove(&mut self, ids: &[KeyId]) -> Result<usize, IndexError> {
        let removed = ids.iter().filter(|&&id| self.remove_one(id)).count();
        self.stamp += u64::from(removed > 0);
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
        check::query(query, self.store.dim)?;
        check::exclude(exclude)?;
        check::params(params)?;
        found.begin_without_tail(query.group, self.stamp);
        if params.budget > 0 && !self.is_empty() {
            self.search_pages(query, exclude, params, (&mut scratch.icecache, found));
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
        found.empty_tail(query, (self.store.dim, self.stamp), state)
    }

    fn pages(&self) -> Option<PageView<'_>> {
        None
    }

    fn memory(&self) -> MemoryReport {
        MemoryReport {
            ids_bytes: 4 * self.store.ids.capacity() + self.map.size_bytes(),
            tree_bytes: self.store.tree_bytes(),
            rows_bytes: 2 * self.store.keys.capacity(),
            ..MemoryReport::default()
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut to = Writer::new(Kind::Icecache);
        snapshot::write(self, &mut to);
        to.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch_of(n: usize, dim: usize) -> (Vec<u32>, Vec<f32>) {
        let keys = (0..n * dim).map(|i| (((i * 7919) % 104_729) as f32 * 0.001).sin() * 3.0).collect();
        ((0..n as u32).collect(), keys)
    }

    #[test]
    fn tree_stays_sound_through_builds_insertions_and_removals() {
        let (n, dim) = (2600, 64);
        let (ids, keys) = batch_of(n, dim);
        let batch = |range: std::ops::Range<usize>| {
            let rows = &keys[range.start * dim..range.end * dim];
            (ids[range].to_vec(), rows.to_vec())
        };
        let mut index = Icecache::new(dim, 1).unwrap();
        let (i, k) = batch(0..1500);
        index.build(&Batch { ids: &i, keys: &k, values: &k }).unwrap();
        index.store.check();
        let built = index.fill();
        assert!(built > 0.8, "{built}");
        for at in (1500..2600).step_by(20) {
            let (i, k) = batch(at..at + 20);
            index.insert(&Batch { ids: &i, keys: &k, values: &k }).unwrap();
            index.store.check();
        }
        assert_eq!(index.levels.counts.iter().sum::<usize>(), n);
        for part in ids.chunks(130).rev() {
            index.remove(part).unwrap();
            index.store.check();
        }
        assert_eq!((index.len(), index.store.num_slots(), index.store.num_pages()), (0, 0, 0));
    }

    #[test]
    fn equal_input_gives_the_same_tree() {
        let (n, dim) = (5000, 64);
        let (ids, keys) = batch_of(n, dim);
        let build = || {
            let mut index = Icecache::new(dim, 3).unwrap();
            index.build(&Batch { ids: &ids, keys: &keys, values: &keys }).unwrap();
            index.store.lanes
        };
        assert_eq!(build(), build());
    }
}
