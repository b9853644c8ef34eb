//! One admitted sequence: its shards, layer by layer.

use std::sync::Arc;

use crate::config::Config;
use crate::error::Result;
use crate::hot::HotShard;
use crate::ids::TokenPos;
use crate::page::{PageLife, PageTable, ShardPages, WarmMemory};
use crate::reuse::{ReuseCache, cache};
use crate::select::{Selector, selector};
use crate::shape::{PAGE_TOKENS, PageShape};

/// What the cold tier knows of a full slab.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlabNote {
    /// Its place in the book of slabs that may give way; `None` while it is on disk only.
    pub(crate) slot: Option<u32>,
    pub(crate) life: PageLife,
    /// It is being read ahead.
    pub(crate) reading: bool,
}

/// One (sequence, layer, kv head).
pub(crate) struct Shard {
    pub(crate) pages: ShardPages,
    /// Shared with forks until it changes.
    pub(crate) selector: Arc<dyn Selector>,
    pub(crate) reuse: Box<dyn ReuseCache>,
    /// Place among the shards of the model, layers outermost.
    place: usize,
    /// Slots, when the configuration asks for them.
    pub(crate) hot: Option<HotShard>,
    /// Tokens `0..published` are known to the selector; the rest are young and always attended.
    pub(crate) published: usize,
    /// What the cold tier knows of each full slab.
    pub(crate) slabs: Vec<SlabNote>,
    /// Slabs that the last step read, ascending, with the attention mass on each where somebody weighs it.
    pub(crate) touched: Vec<(u32, f32)>,
    /// Tokens that a selector to be built anew learns at once, as the one before it had; 0 = all there are.
    pub(crate) first_batch: usize,
}

impl Shard {
    fn new(config: &Config, memory: &WarmMemory, place: usize) -> Result<Self> {
        let shape = PageShape::new(config.heads.head_dim(), config.kv_dtype);
        Ok(Self {
            pages: ShardPages::with_memory(shape, memory),
            selector: selector(config)?.into(),
            reuse: cache(config, place),
            place,
            hot: HotShard::new(config),
            published: 0,
            first_batch: 0,
            slabs: Vec::new(),
            touched: Vec::new(),
        })
    }

    /// The selector for a change: a copy first, when forks see it too.
    pub(crate) fn selector_mut(&mut self) -> Result<&mut dyn Selector> {
        if Arc::get_mut(&mut self.selector).is_none() {
            self.selector = self.selector.fork()?.into();
        }
        Ok(Arc::get_mut(&mut self.selector).expect("a copy just made, or found to have one owner"))
    }

    /// Notes which slabs a step touched, for the choice of what goes to disk and what comes back; `weigh` gives the mass of a
    /// token.
    pub(crate) fn touch(&mut self, table: &PageTable, mut weigh: impl FnMut(&ShardPages, TokenPos) -> f32) {
        self.touched.clear();
        for entry in table.entries() {
            let slab = ShardPages::slab_of_page(entry.page) as u32;
            let rows = (0..PAGE_TOKENS as u32).filter(|row| entry.rows >> row & 1 == 1);
            let mass: f32 = rows.map(|row| weigh(&self.pages, entry.page * PAGE_TOKENS as u32 + row)).sum();
            match self.touched.last_mut() {
                Some((last, sum)) if *last == slab => *sum += mass,
                _ => self.touched.push((slab, mass)),
            }
        }
    }

    /// A shard with the same contents. Slots are not taken along: they are a cache.
    fn fork(&self, config: &Config) -> Self {
        Self {
            pages: self.pages.clone(),
            selector: self.selector.clone(),
            reuse: self.reuse.fork(),
            place: self.place,
            hot: HotShard::new(config),
            published: self.published,
            first_batch: self.first_batch,
            slabs: Vec::new(),
            touched: Vec::new(),
        }
    }

    /// Replaces the selector by a fresh one for `config`, which has heard of no token yet.
    pub(crate) fn reselect(&mut self, config: &Config) -> Result<()> {
        self.selector = selector(config)?.into();
        self.reuse = cache(config, self.place);
        self.published = 0;
        self.first_batch = 0;
        Ok(())
    }

    /// Forgets the tokens at and after `num_tokens` in every part.
    pub(crate) fn truncate(&mut self, num_tokens: usize) -> Result<()> {
        if num_tokens < self.published {
            self.published = self.selector_mut()?.truncate(num_tokens as u32)? as usize;
        }
        self.reuse.truncate(num_tokens as u32);
        if let Some(hot) = &mut self.hot {
            hot.truncate(num_tokens, &self.pages)?;
        }
        self.pages.truncate(num_tokens);
        self.slabs.truncate(self.pages.num_full_slabs());
        self.touched.clear();
        Ok(())
    }
}

/// The shards of one layer. All hold the same number of tokens.
pub(crate) struct LayerShards {
    pub(crate) shards: Vec<Shard>,
    pub(crate) num_tokens: usize,
    /// Tokens that the layer attends at most (sliding-window layers).
    pub(crate) span: Option<usize>,
}

impl LayerShards {
    /// Forgets the tokens at and after `num_tokens`.
    pub(crate) fn truncate(&mut self, num_tokens: usize) -> Result<()> {
        self.shards.iter_mut().try_for_each(|shard| shard.truncate(num_tokens))?;
        self.num_tokens = num_tokens;
        Ok(())
    }
}

/// Every layer of one sequence. Layers advance independently: a host engine decodes layer after layer.
pub(crate) struct Sequence {
    pub(crate) layers: Vec<LayerShards>,
}

impl Sequence {
    /// A sequence with the same contents.
    pub(crate) fn fork(&self, config: &Config) -> Self {
        let layer = |layer: &LayerShards| LayerShards {
            shards: layer.shards.iter().map(|shard| shard.fork(config)).collect(),
            num_tokens: layer.num_tokens,
            span: layer.span,
        };
        Self { layers: self.layers.iter().map(layer).collect() }
    }

    /// No tokens yet; slabs will come from `memory`.
    pub(crate) fn new(config: &Config, memory: &WarmMemory) -> Result<Self> {
        let layer = |layer: usize| -> Result<LayerShards> {
            let shards = (0..config.heads.num_kv_heads())
                .map(|head| Shard::new(config, memory, layer * config.heads.num_kv_heads() + head))
                .collect::<Result<_>>()?;
            Ok(LayerShards { shards, num_tokens: 0, span: config.spans.get(layer).copied().flatten() })
        };
        Ok(Self { layers: (0..config.num_layers).map(layer).collect::<Result<_>>()? })
    }
}
