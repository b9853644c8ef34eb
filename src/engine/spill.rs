//! Keeping warm memory under its limit: which slabs go to disk, and taking back what was written.

use std::sync::Arc;

use super::Engine;
use crate::attend::AttentionBackend;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ids::SeqId;
use crate::page::WarmMemory;
use crate::page::cold::{BATCH_SLABS, ColdReport, ColdTier, SpillSlab, Spilled};
use crate::page::file::{FsStorage, SlabName, Storage};

/// Whose slab it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlabKey {
    seq: SeqId,
    layer: usize,
    head: usize,
    slab: usize,
}

/// The tier that a configuration asks for.
pub(super) fn open(config: &Config) -> Result<Option<ColdTier<SlabKey>>> {
    open_on(Arc::new(FsStorage), config)
}

fn open_on(storage: Arc<dyn Storage>, config: &Config) -> Result<Option<ColdTier<SlabKey>>> {
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
    let tier = ColdTier::open(storage, &cold.folder, limit);
    tier.map(Some).map_err(|e| Error::Pool { threads: 1, reason: e.to_string() })
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
        self.cold.as_ref().map(|cold| cold.report().clone())
    }

    /// Warm bytes of all sequences; what forks share counts once.
    #[must_use]
    pub fn warm_bytes(&self) -> usize {
        self.memory.used_bytes()
    }

    /// Writes slabs out until warm memory is under its limit, as far as full slabs and working disks allow. A failed write
    /// is in [`Engine::cold_report`]; nothing is lost by it.
    pub(super) fn spill(&mut self, patience: Patience) {
        let Some(mut cold) = self.cold.take() else { return };
        while let Some(spilled) = cold.poll() {
            self.settle(spilled);
        }
        let mut warm = self.warm_bytes();
        while warm > cold.limit_bytes() {
            if cold.in_flight() == 0 && !cold.submit(self.coldest(warm - cold.limit_bytes())) {
                break;
            }
            if patience == Patience::Step {
                break;
            }
            let failed = cold.wait().is_none_or(|spilled| {
                let failed = spilled.result.is_err();
                self.settle(spilled);
                failed
            });
            if failed {
                break;
            }
            warm = self.warm_bytes();
        }
        self.cold = Some(cold);
    }

    /// Full slabs in memory of our own, longest unused first, until they make up `bytes`.
    fn coldest(&self, bytes: usize) -> Vec<SpillSlab<SlabKey>> {
        let mut found: Vec<(u64, SlabKey)> = Vec::new();
        for (seq, sequence) in &self.sequences {
            for (layer, shards) in sequence.layers.iter().enumerate() {
                for (head, shard) in shards.shards.iter().enumerate() {
                    let full = (0..shard.pages.num_slabs()).filter(|slab| shard.pages.can_spill(*slab));
                    found.extend(full.map(|slab| {
                        let used = shard.slab_used.get(slab).copied().unwrap_or(0);
                        (used, SlabKey { seq: *seq, layer, head, slab })
                    }));
                }
            }
        }
        found.sort_unstable_by_key(|(used, key)| (*used, key.slab, key.layer, key.head, key.seq));
        let (mut batch, mut sum) = (Vec::new(), 0);
        for (_, key) in found {
            if sum >= bytes || batch.len() == BATCH_SLABS {
                break;
            }
            let pages = &self.sequences[&key.seq].layers[key.layer].shards[key.head].pages;
            let Some((rows, owner)) = pages.slab_owner(key.slab) else { continue };
            sum += owner.bytes().len();
            let shard = (key.layer * self.config.heads.num_kv_heads() + key.head) as u32;
            let name = SlabName { shard, slab: key.slab as u32, rows };
            batch.push(SpillSlab { key, name, page_bytes: pages.shape().page_bytes(), bytes: owner });
        }
        batch
    }

    /// Gives up the warm memory of slabs that are durable now and that nobody wrote to meanwhile.
    fn settle(&mut self, spilled: Spilled<SlabKey>) {
        let Ok(mapped) = spilled.result else { return };
        for (slab, mapped) in spilled.slabs.into_iter().zip(mapped) {
            let SlabKey { seq, layer, head, slab: number } = slab.key;
            if let Some(sequence) = self.sequences.get_mut(&seq) {
                sequence.layers[layer].shards[head].pages.replace(number, &*slab.bytes, mapped);
            }
        }
    }
}
