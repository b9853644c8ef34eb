//! Keeping warm memory under its limit: which slabs are written to disk, which give up their memory, which come back.
//!
//! ```text
//! full slab ──write-back, ahead of need──> warm and durable ──over the limit──> on disk ──read ahead──> warm and durable
//! ```
//! What gives way is chosen by an eviction policy. An eighth of the limit is kept free or durable, so that making room is
//! letting go of memory, not waiting for a disk.

use std::sync::Arc;

use super::Engine;
use super::slab_book::{SlabBook, SlabKey, Standing};
use crate::attend::AttentionBackend;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ids::SeqId;
use crate::page::cold::{BATCH_SLABS, ColdReport, ColdTier, ReadBack, ReadSlab, SpillSlab, Spilled};
use crate::page::file::{FsStorage, SlabName, Storage};
use crate::page::{LentSlab, PageEvent, PageLife, SLAB_ROWS, ShardPages, SlabKind, WarmMemory};
use crate::sequence::SlabNote;
use crate::shape::PageShape;

/// The tier that a configuration asks for.
pub(super) fn open(config: &Config) -> Result<Option<Cold>> {
    open_on(Arc::new(FsStorage), config)
}

fn open_on(storage: Arc<dyn Storage>, config: &Config) -> Result<Option<Cold>> {
    let Some(cold) = &config.cold else { return Ok(None) };
    if !cold.folder.is_dir() {
        return Err(Error::config("cold.folder", cold.folder.display(), "must be a folder that exists"));
    }
    let Some(limit) = config.warm_limit_bytes else {
        return Err(Error::config(
            "warm_limit_bytes",
            "none",
            "must be set for a cold tier to have something to do",
        ));
    };
    let tier = ColdTier::open(storage, &cold.folder, limit)
        .map_err(|e| Error::Pool { threads: 2, reason: e.to_string() })?;
    let (book, read_ahead) = (SlabBook::new(cold.eviction), cold.read_ahead);
    Ok(Some(Cold { tier, book, read_ahead, clean_bytes: 0, chosen: Vec::new() }))
}

/// Slabs as the backend wants them. The limit is a hard one where nothing can be written out.
pub(super) fn warm_memory(config: &Config, backend: &dyn AttentionBackend) -> WarmMemory {
    let limit_bytes = match &config.cold {
        None => config.warm_limit_bytes.unwrap_or(usize::MAX),
        Some(_) => usize::MAX,
    };
    WarmMemory::new(backend.slab_source(), limit_bytes)
}

/// Whether a call may wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// A step: take what is done, submit what fits, go on.
    Step,
    /// A prefill: come back under the limit, or warm memory would grow without bound.
    Prefill,
}

/// Share of the warm limit that is kept free or durable on disk, so that room can be made without waiting for a write.
const CLEAN_PART: usize = 8;

/// The tier's workers, and which slabs may give way.
pub(super) struct Cold {
    tier: ColdTier<SlabKey>,
    book: SlabBook,
    read_ahead: usize,
    /// Warm bytes that are durable on disk too, as of the last pass over the book and what happened since.
    clean_bytes: usize,
    chosen: Vec<SlabKey>,
}

/// One layer of one sequence.
pub(super) type LayerSpot = (SeqId, usize);

impl Engine {
    /// Opens an engine whose cold files go to a storage of the caller's.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn open_on(storage: Arc<dyn Storage>, config: Config) -> Result<Self> {
        let cold = open_on(storage, &config)?;
        let mut engine = Self::open(Config { cold: None, ..config.clone() })?;
        engine.memory = warm_memory(&config, &*engine.backend);
        (engine.config, engine.cold) = (config, cold);
        Ok(engine)
    }

    /// What the cold tier has done; `None` without one.
    #[must_use]
    pub fn cold_report(&self) -> Option<ColdReport> {
        self.cold.as_ref().map(|cold| cold.tier.report().clone())
    }

    /// Warm bytes of all sequences; what forks share counts once.
    #[must_use]
    pub fn warm_bytes(&self) -> usize {
        self.memory.used_bytes()
    }

    /// Keeps warm memory under its limit after a call on one layer, as far as full slabs and working disks allow, and asks
    /// for slabs that the next layer may need. A failed write is in [`Engine::cold_report`]; nothing is lost by it.
    pub(super) fn spill(&mut self, spot: LayerSpot, patience: Patience) {
        let Some(mut cold) = self.cold.take() else { return };
        self.take_back(&mut cold);
        self.note(&mut cold, spot);
        self.relieve(&mut cold, patience);
        if patience == Patience::Step {
            let next = (spot.0, (spot.1 + 1) % self.config.num_layers);
            self.read_ahead(&mut cold, next);
        }
        self.cold = Some(cold);
    }

    /// Books what the workers are done with.
    fn take_back(&mut self, cold: &mut Cold) {
        while let Some(spilled) = cold.tier.poll() {
            self.settle(cold, spilled);
        }
        while let Some(back) = cold.tier.poll_read() {
            self.settle_read(cold, back);
        }
    }

    /// Admits the layer's new full slabs to the book and tells the policy what the step used.
    fn note(&mut self, cold: &mut Cold, (seq, layer): LayerSpot) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        cold.book.begin_step();
        for (head, shard) in sequence.layers[layer].shards.iter_mut().enumerate() {
            for slab in shard.slabs.len()..shard.pages.num_full_slabs() {
                let key = SlabKey { seq, layer, head, slab };
                let life = match shard.pages.slab_kind(slab) {
                    SlabKind::Own => PageLife::Warm,
                    SlabKind::Backed => PageLife::Backed,
                    SlabKind::Lent => PageLife::Cold,
                };
                let slot = (life != PageLife::Cold).then(|| cold.book.admit(key));
                shard.slabs.push(SlabNote { slot, life, reading: false });
            }
            for (slab, mass) in &shard.touched {
                if let Some(slot) = shard.slabs.get(*slab as usize).and_then(|note| note.slot) {
                    cold.book.used(slot, *mass);
                }
            }
        }
    }

    fn relieve(&mut self, cold: &mut Cold, patience: Patience) {
        let limit = cold.tier.limit_bytes();
        loop {
            let over = self.warm_bytes().saturating_sub(limit);
            if over > 0 {
                self.release(cold, over);
            }
            let used = self.warm_bytes();
            let dirty = (used + limit / CLEAN_PART).saturating_sub(limit).saturating_sub(cold.clean_bytes);
            if dirty > 0 && cold.tier.in_flight() == 0 {
                let batch = self.dirtiest(cold, dirty.max(used.saturating_sub(limit)));
                cold.tier.submit(batch);
            }
            if patience == Patience::Step || used <= limit {
                return;
            }
            let Some(spilled) = cold.tier.wait() else { return };
            let failed = spilled.result.is_err();
            self.settle(cold, spilled);
            if failed {
                return;
            }
        }
    }

    /// Gives up the memory of slabs that are durable, until `bytes` are free or no such slab is left.
    fn release(&mut self, cold: &mut Cold, bytes: usize) {
        let goal = self.warm_bytes().saturating_sub(bytes);
        while self.warm_bytes() > goal {
            let wanted = (self.warm_bytes() - goal).div_ceil(self.slab_bytes());
            self.choose(cold, wanted, PageLife::Backed);
            if cold.chosen.is_empty() {
                return;
            }
            for key in std::mem::take(&mut cold.chosen) {
                let Some((pages, note)) = self.slab_mut(&key) else { continue };
                let Some(life) = advance(note.life, PageEvent::Drop) else { continue };
                if pages.drop_warm(key.slab) {
                    note.life = life;
                    if let Some(slot) = note.slot.take() {
                        cold.book.release(slot);
                    }
                    cold.clean_bytes = cold.clean_bytes.saturating_sub(self.slab_bytes());
                    cold.tier.count(1, 0);
                }
            }
        }
    }

    /// Slabs to be written, first to go first, until they make up `bytes`.
    fn dirtiest(&mut self, cold: &mut Cold, bytes: usize) -> Vec<SpillSlab<SlabKey>> {
        self.choose(cold, bytes.div_ceil(self.slab_bytes()).min(BATCH_SLABS), PageLife::Warm);
        let heads = self.config.heads.num_kv_heads();
        let mut batch = Vec::with_capacity(cold.chosen.len());
        for key in std::mem::take(&mut cold.chosen) {
            let Some((pages, note)) = self.slab_mut(&key) else { continue };
            let (Some(life), Some((rows, owner))) =
                (advance(note.life, PageEvent::Write), pages.slab_owner(key.slab))
            else {
                continue;
            };
            note.life = life;
            let name = SlabName { shard: (key.layer * heads + key.head) as u32, slab: key.slab as u32, rows };
            batch.push(SpillSlab { key, name, page_bytes: pages.shape().page_bytes(), bytes: owner });
        }
        batch
    }

    /// Fills `chosen` with at most `wanted` slabs in state `life`, and counts the bytes that are clean.
    fn choose(&self, cold: &mut Cold, wanted: usize, life: PageLife) {
        let clean = std::cell::Cell::new(0);
        let standing = |slot: u32, key: &SlabKey| {
            let shard = self.sequences.get(&key.seq).map(|s| &s.layers[key.layer].shards[key.head]);
            match shard.and_then(|shard| shard.slabs.get(key.slab)) {
                Some(note) if note.slot == Some(slot) => {
                    clean.set(clean.get() + usize::from(note.life == PageLife::Backed));
                    if note.life == life { Standing::Wanted } else { Standing::Kept }
                }
                _ => Standing::Gone,
            }
        };
        cold.book.victims(wanted, standing, &mut cold.chosen);
        cold.clean_bytes = clean.get() * self.slab_bytes();
    }

    /// Slabs of a batch that is on disk now count as durable, in every fork that shares their memory, unless somebody wrote to
    /// them meanwhile.
    fn settle(&mut self, cold: &mut Cold, spilled: Spilled<SlabKey>) {
        let Ok(mapped) = spilled.result else {
            for slab in &spilled.slabs {
                if let Some((_, note)) = self.slab_mut(&slab.key) {
                    note.life = advance(note.life, PageEvent::Fail).unwrap_or(note.life);
                }
            }
            return;
        };
        for (slab, mapped) in spilled.slabs.into_iter().zip(mapped) {
            let mapped: Arc<dyn LentSlab> = mapped;
            let SlabKey { layer, head, slab: number, .. } = slab.key;
            for sequence in self.sequences.values_mut() {
                let shard = &mut sequence.layers[layer].shards[head];
                let backed = shard.pages.back(number, &*slab.bytes, &mapped);
                let Some(note) = shard.slabs.get_mut(number) else { continue };
                let written = match note.life {
                    PageLife::Warm if backed => advance(PageLife::Warm, PageEvent::Write),
                    PageLife::Writing => Some(PageLife::Writing),
                    _ => None,
                };
                let event = if backed { PageEvent::Durable } else { PageEvent::Fail };
                if let Some(life) = written.and_then(|life| advance(life, event)) {
                    note.life = life;
                    cold.clean_bytes += if backed { slab.bytes.bytes().len() } else { 0 };
                }
            }
        }
    }

    /// Asks for the slabs on disk that the layer's last step used: to be checked, and to be copied back where there is room.
    fn read_ahead(&mut self, cold: &mut Cold, (seq, layer): LayerSpot) {
        let bytes = self.slab_bytes();
        let num_heads = self.config.heads.num_kv_heads();
        let mut left = cold.read_ahead;
        for head in 0..num_heads {
            let mut i = 0;
            while left > 0 {
                let Some(sequence) = self.sequences.get(&seq) else { return };
                let shard = &sequence.layers[layer].shards[head];
                let Some((slab, _)) = shard.touched.get(i) else { break };
                i += 1;
                let slab = *slab as usize;
                let Some(note) = shard.slabs.get(slab).filter(|note| !note.reading) else { continue };
                let Some(lent) = shard.pages.lent_slab(slab) else { continue };
                let checked = match note.life {
                    PageLife::Cold => false,
                    PageLife::Mapped => true,
                    _ => continue,
                };
                let has_room = |engine: &Self, cold: &Cold| {
                    engine.warm_bytes() + (cold.tier.reading() + 1) * bytes <= cold.tier.limit_bytes()
                };
                if !has_room(self, cold) && cold.clean_bytes > 0 {
                    self.release(cold, bytes);
                }
                let room = has_room(self, cold);
                if checked && !room {
                    continue;
                }
                let into = room.then(|| (self.memory.clone(), bytes));
                let key = SlabKey { seq, layer, head, slab };
                if !cold.tier.read_ahead(ReadSlab { key, lent, into }) {
                    return;
                }
                left -= 1;
                if let Some((_, note)) = self.slab_mut(&key) {
                    note.reading = true;
                }
            }
        }
    }

    fn settle_read(&mut self, cold: &mut Cold, back: ReadBack<SlabKey>) {
        let key = back.key;
        let Some((pages, note)) = self.slab_mut(&key) else { return };
        note.reading = false;
        let Ok(copy) = back.result else {
            note.life = advance(note.life, PageEvent::Reject).unwrap_or(note.life);
            return;
        };
        let Some(life) = advance(note.life, PageEvent::Verify) else { return };
        note.life = life;
        let Some(copy) = copy else { return };
        if let Some(life) = advance(note.life, PageEvent::Load)
            && pages.adopt(key.slab, &back.lent, copy)
        {
            note.life = life;
            let slot = cold.book.admit(key);
            cold.book.used(slot, 0.0);
            note.slot = Some(slot);
            cold.tier.count(0, 1);
            cold.clean_bytes += pages.slab_size_bytes();
        }
    }

    fn slab_bytes(&self) -> usize {
        SLAB_ROWS * PageShape::new(self.config.heads.head_dim(), self.config.kv_dtype).row_bytes()
    }

    fn slab_mut(&mut self, key: &SlabKey) -> Option<(&mut ShardPages, &mut SlabNote)> {
        let sequence = self.sequences.get_mut(&key.seq)?;
        let shard = &mut sequence.layers[key.layer].shards[key.head];
        Some((&mut shard.pages, shard.slabs.get_mut(key.slab)?))
    }
}

/// The next state, or `None` when the life-cycle has no such edge: then what happened meanwhile (a cut, a write) has overtaken
/// the event, and it is void.
fn advance(life: PageLife, event: PageEvent) -> Option<PageLife> {
    life.next(event).ok()
}
