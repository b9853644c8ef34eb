//! One admitted sequence: its shards, layer by layer.

use std::sync::Arc;

use crate::config::Config;
use crate::error::Result;
use crate::hot::HotShard;
use crate::page::{PageTable, ShardPages, WarmMemory};
use crate::reuse::{ReuseCache, cache};
use crate::select::{Selector, selector};
use crate::shape::PageShape;

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
    /// Position of the last step that touched each slab.
    pub(crate) slab_used: Vec<u64>,
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
            slab_used: Vec::new(),
        })
    }

    /// The selector for a change: a copy first, when forks see it too.
    pub(crate) fn selector_mut(&mut self) -> Result<&mut dyn Selector> {
        if Arc::get_mut(&mut self.selector).is_none() {
            self.selector = self.selector.fork()?.into();
        }
        Ok(Arc::get_mut(&mut self.selector).expect("a copy just made, or found to have one owner"))
    }

    /// Notes which slabs a step touched, for the choice of what goes to disk.
    pub(crate) fn touch(&mut self, table: &PageTable, position: u32) {
        self.slab_used.resize(self.pages.num_slabs(), 0);
        for entry in table.entries() {
            self.slab_used[ShardPages::slab_of_page(entry.page)] = u64::from(position);
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
            slab_used: self.slab_used.clone(),
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
