//! Exact scan of every page mean; pages hold sixteen tokens in order of arrival.
//!
//! The policy `pagemean`, the right choice below a few thousand tokens, and the oracle of the tree over the same pages
//! (`Dci::flattened`). Search and tail cost one pass over all summaries.

use crate::blocks::LANES;
use crate::check;
use crate::error::IndexError;
use crate::export::PageView;
use crate::found::Found;
use crate::index::{Batch, KeyId, KeyIndex, MAX_DIM, MemoryReport, Query, SearchParams, TailOut};
use crate::pages::{Members, Pages, Removed};
use crate::scratch::Scratch;
use crate::search::Pass;
use crate::simd::Isa;
use crate::sketch::SketchConfig;
use crate::snapshot::{Kind, Reader, Writer};
use crate::tail::tail;

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Flat {
    isa: Isa,
    pages: Pages,
}

/// Refuses dimensions outside `1..=MAX_DIM`.
pub(crate) fn check_dim(dim: usize) -> Result<(), IndexError> {
    if (1..=MAX_DIM).contains(&dim) {
        return Ok(());
    }
    Err(IndexError::Config { field: "dim", value: dim as f64, expected: "in 1..=1024" })
}

impl Flat {
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
        Ok(Self { isa: Isa::detect(), pages: Pages::new(dim, sketch)? })
    }

    /// The index that `snapshot` wrote.
    ///
    /// # Errors
    /// `Snapshot` for any other bytes.
    pub fn restore(bytes: &[u8]) -> Result<Self, IndexError> {
        let mut from = Reader::new(bytes, Kind::Flat)?;
        let pages = Pages::read_from(&mut from)?;
        from.finish()?;
        let at_home = |(page, &entry): (usize, &u32)| entry == u32::MAX || entry as usize == page;
        from.check(pages.entry_of.iter().enumerate().all(at_home), "a page away from its entry")?;
        Ok(Self { isa: Isa::detect(), pages })
    }

    /// The same pages, scanned exactly.
    pub(crate) fn over(pages: Pages, isa: Isa) -> Self {
        Self { isa, pages }
    }

    /// An empty entry at the end of the page blocks, or one freed by removal: page `i` has entry `i`.
    fn next_entry(&mut self) -> usize {
        if let Some(&page) = self.pages.free.last() {
            return page as usize;
        }
        let used = self.pages.num_pages();
        if used == self.pages.blocks.count.len() {
            self.pages.blocks.add_blocks(1);
        }
        used
    }

    fn seal_young(&mut self) {
        let dim = self.pages.dim;
        let mut ids = [0; LANES];
        let mut rows = vec![0.0f32; 2 * LANES * dim];
        let (keys, values) = rows.split_at_mut(LANES * dim);
        for e in 0..LANES {
            ids[e] = self.pages.young.child[e];
            self.pages.young.read_key(e, &mut keys[e * dim..(e + 1) * dim]);
            self.pages.young.read_value(e, &mut values[e * dim..(e + 1) * dim]);
        }
        let entry = self.next_entry();
        self.pages.seal(entry, Members { ids: &ids, keys, values });
        for e in (0..LANES).rev() {
            self.pages.drop_young(e);
        }
    }

    fn append(&mut self, batch: &Batch<'_>) {
        let dim = self.pages.dim;
        self.pages.frame.settle(batch.keys, batch.values);
        let mut rows = vec![0.0f32; 2 * LANES * dim];
        let (keys, values) = rows.split_at_mut(LANES * dim);
        let mut done = 0;
        while done < batch.ids.len() {
            let take = (batch.ids.len() - done).min(LANES - self.pages.num_young);
            let span = done * dim..(done + take) * dim;
            let (keys, values) = (&mut keys[..take * dim], &mut values[..take * dim]);
            self.pages.frame.key_in(&batch.keys[span.clone()], keys);
            self.pages.frame.value_in(&batch.values[span], values);
            let ids = &batch.ids[done..done + take];
            if take == LANES {
                let entry = self.next_entry();
                self.pages.seal(entry, Members { ids, keys, values });
            } else {
                for (i, &id) in ids.iter().enumerate() {
                    let row = i * dim..(i + 1) * dim;
                    self.pages.add_young(id, &keys[row.clone()], &values[row]);
                }
                if self.pages.num_young == LANES {
                    self.seal_young();
                }
            }
            done += take;
        }
    }
}

impl KeyIndex for Flat {
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
        self.insert(batch)
    }

    fn insert(&mut self, batch: &Batch<'_>) -> Result<(), IndexError> {
        check::batch(batch, self.pages.dim, self.len(), |id| self.pages.map.get(id).is_some())?;
        self.append(batch);
        Ok(())
    }

    fn remove(&mut self, ids: &[KeyId]) -> Result<usize, IndexError> {
        Ok(ids.iter().filter(|&&id| self.pages.remove(id) != Removed::Unknown).count())
    }

    fn search(
        &self,
        query: &Query<'_>,
        exclude: &[KeyId],
        params: &SearchParams,
        scratch: &mut Scratch,
        found: &mut Found,
    ) -> Result<(), IndexError> {
        let mut pass = Pass { isa: self.isa, pages: &self.pages, scratch, found };
        pass.begin(query, exclude, params)?;
        for block in 0..self.pages.blocks.num_blocks() {
            pass.add_pages(block);
        }
        pass.add_all_young();
        pass.choose(params);
        Ok(())
    }

    fn tail(
        &self,
        query: &Query<'_>,
        _exclude: &[KeyId],
        found: &Found,
        scratch: &mut Scratch,
        state: TailOut<'_>,
    ) -> Result<(), IndexError> {
        tail(self.isa, (&self.pages, &[]), (query, found, scratch), state)
    }

    fn pages(&self) -> Option<PageView<'_>> {
        Some(PageView::of(&self.pages))
    }

    fn memory(&self) -> MemoryReport {
        self.pages.memory()
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut to = Writer::new(Kind::Flat);
        self.pages.write_to(&mut to);
        to.finish()
    }
}
