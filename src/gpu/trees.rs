//! Trees of the open sequences: when tokens join them, and when the device learns of it.
//!
//! ```text
//! tokens   ... in trees on the device | submitted: workers insert them | newest 16 or fewer
//!                                     |<------------- window to window + 15, attended exactly ------------->|
//! ```
//! Sixteen tokens are submitted once their rows are queued, and the device hears of them in the step in which they leave the window,
//! whatever the workers did in between: results do not depend on timing. Should the workers not be done by then, the step
//! waits, and [`TreeReport::waits`] counts it.
//!
//! All layers of a model come to that step in the same token. So that it does not pay for all of their work, each layer submits its
//! tokens, and has the device build the pages, a few tokens earlier or later than the others, all of them before that step.

use std::collections::HashMap;
use std::sync::Arc;

use floe_cuda::device::{Device, DeviceError, Event, PinnedBuffer, Stream};
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{BatchEntry, CacheShape};
use rayon::ThreadPool;

use super::announce::{Beside, Staging};
use super::chain::ChainShape;
use super::engine::{GpuEngine, published};
use super::options::{GpuOptions, Plan};
use super::report::TreeReport;
use super::tree::{Asked, ListShape, Outcome, Place, Rows, TreeShape, TreeShard};
use crate::error::{Error, Result};
use crate::ids::{LayerId, SeqId};
use crate::shape::PAGE_TOKENS;

/// Steps before the one that needs them in which tokens join a tree that is searched.
const LEAD: usize = 2;

/// Trees of a layer of a sequence.
#[derive(Debug)]
pub(super) struct LayerTrees {
    shards: Vec<Arc<TreeShard>>,
    /// Host chunks of the rows, as far as they were needed.
    chunks: Arc<Vec<Place>>,
    /// Tokens `..submitted` are in the trees or on their way.
    submitted: usize,
    /// Tokens `..applied` are in the trees that the device knows.
    pub(super) applied: usize,
    /// Pages of each kv head on the device; `None`: not told yet.
    pub(super) used: Option<Vec<u32>>,
    /// Where the host chooses: `log_count` of the super-nodes on the device, [heads, nodes each].
    pub(super) stands: Vec<f32>,
    /// What is built beside steps.
    pub(super) beside: Beside,
    /// Where the step copies its queries to.
    queries: Option<Arc<PinnedBuffer<u8>>>,
}

/// Trees of all open sequences.
#[derive(Debug)]
pub(super) struct Trees {
    pool: ThreadPool,
    open: HashMap<SeqId, Vec<Option<LayerTrees>>>,
    staging: Staging,
    /// Where pages are built beside steps.
    beside: Stream,
    pub(super) report: TreeReport,
}

impl Trees {
    pub(super) fn new(device: &Device, (plan, options): (&Plan, &GpuOptions), layers: usize) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if options.tree_threads == 0 { cores.div_ceil(2) } else { options.tree_threads };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("floe-tree-{i}"))
            .build()
            .map_err(|error| Error::config("tree_threads", threads, error.to_string()))?;
        Ok(Self {
            pool,
            open: HashMap::new(),
            staging: Staging::new(device, plan, options.max_sequences * layers)?,
            beside: Stream::new(device)?,
            report: TreeReport { threads, ..TreeReport::default() },
        })
    }

    /// Waits for the workers and forgets a sequence.
    pub(super) fn close(&mut self, seq: SeqId) {
        for layer in self.open.remove(&seq).into_iter().flatten().flatten() {
            layer.shards.iter().for_each(|shard| shard.rest());
        }
    }

    /// `stream` goes on when nothing is being built beside it.
    pub(super) fn settle(&self, stream: &Stream) -> Result<()> {
        let mut layers = self.open.values().flatten().flatten();
        layers.try_for_each(|layer| layer.beside.settle(stream))
    }

    /// Trees of a layer of a sequence, and what all share.
    pub(super) fn of(&mut self, (seq, layer): (SeqId, usize)) -> Option<TreesOf<'_>> {
        let of_layer = self.open.get_mut(&seq)?.get_mut(layer)?.as_mut()?;
        let Self { staging, beside, report, .. } = self;
        Some(TreesOf { of_layer, staging, beside, report })
    }
}

/// Trees of a layer of a sequence, and what all share.
pub(super) struct TreesOf<'a> {
    pub(super) of_layer: &'a mut LayerTrees,
    pub(super) staging: &'a mut Staging,
    pub(super) beside: &'a Stream,
    pub(super) report: &'a mut TreeReport,
}

impl LayerTrees {
    fn new(device: &Device, plan: &Plan, (capacity, max_tokens): (usize, usize)) -> Result<Self> {
        let shape = plan.shape;
        let nodes = plan.nodes_each(max_tokens);
        let lists = plan.listed.map(|_| ListShape { most: plan.listed_most(capacity), nodes });
        let shard = |head| {
            let room = plan.pages_each(capacity);
            TreeShard::new(TreeShape { head, dim: shape.head_dim, sinks: shape.sinks, room, lists })
                .map(Arc::new)
        };
        let shards = (0..shape.heads).map(shard).collect::<Result<_>>()?;
        let stands = vec![f32::NEG_INFINITY; shape.heads * nodes];
        Ok(Self {
            shards,
            chunks: Arc::default(),
            submitted: 0,
            applied: 0,
            used: None,
            stands,
            beside: Beside::new(device)?,
            queries: None,
        })
    }

    /// Whether each tree has done the next sixteen tokens, and the pages can be built beside steps.
    fn next_is_ready(&self, room: usize) -> bool {
        let next = self.applied + PAGE_TOKENS;
        let pages = self.shards.iter().map(|shard| shard.ready(next)).sum::<Option<usize>>();
        pages.is_some_and(|pages| pages <= room)
    }

    /// What happened up to the tokens `..end`, by kv head, and whether it was waited for.
    fn take(&self, end: usize) -> Result<(Vec<Vec<Outcome>>, bool)> {
        let taken = self.shards.iter().map(|shard| shard.take(end, self.applied < end));
        let taken = taken.collect::<Result<Vec<_>>>()?;
        let waited = taken.iter().any(|(_, waited)| *waited);
        Ok((taken.into_iter().map(|(outcomes, _)| outcomes).collect(), waited))
    }
}

impl<E: DeviceElem> GpuEngine<E> {
    /// Begins to build the trees of a layer over all tokens stored in it, on threads of their own: for when its prompt is complete, so
    /// that the work overlaps the next layers'. Without this call the layer's first sparse step does it, and waits. Nothing to do
    /// where pages are runs of tokens, or in a layer that attends everything.
    ///
    /// # Errors
    /// Unknown sequence or layer; what the driver reports.
    pub fn index(&mut self, seq: SeqId, layer: LayerId, stream: &Stream) -> Result<()> {
        let stored = self.num_tokens(seq, layer)?;
        if self.classes.plan(layer.0).exact {
            return Ok(());
        }
        let end = published(stored + 1, self.plan.shape.window) * PAGE_TOKENS;
        self.submit_trees((seq, layer.0), end, stream)
    }

    /// Waits until everything that was begun with [`GpuEngine::index`] or by steps is in the trees.
    pub fn wait_for_trees(&self) {
        let layers = self.trees.iter().flat_map(|trees| trees.open.values()).flatten().flatten();
        layers.flat_map(|layer| &layer.shards).for_each(|shard| shard.rest());
    }

    /// Has the tokens `..end` of a layer, whose rows are queued, join its trees.
    fn submit_trees(&mut self, (seq, layer): (SeqId, usize), end: usize, stream: &Stream) -> Result<()> {
        let Some(trees) = &mut self.trees else { return Ok(()) };
        let open = self.places.get(seq)?;
        let layers = trees.open.entry(seq).or_default();
        layers.resize_with(self.config.num_layers, || None);
        let of_layer = match &mut layers[layer] {
            Some(of_layer) => of_layer,
            none => none.insert(LayerTrees::new(
                &self.device,
                &self.plan,
                (open.capacity, self.options.max_tokens),
            )?),
        };
        if end <= of_layer.submitted {
            return Ok(());
        }
        let have = of_layer.chunks.len();
        if have < open.chunks[layer].len() {
            let fresh = open.chunks[layer][have..].iter().map(|&chunk| self.host.shared(chunk));
            Arc::make_mut(&mut of_layer.chunks).extend(fresh);
        }
        let written = Arc::new(Event::for_sleepers(&self.device)?);
        written.record(stream)?;
        let chunks = of_layer.chunks.clone();
        let rows = Rows { first: of_layer.submitted, end, chunks, written };
        for shard in &of_layer.shards {
            shard.submit::<E>(rows.clone(), &trees.pool);
        }
        of_layer.submitted = end;
        Ok(())
    }

    /// Brings the device's trees to the state that the step at `position` sees, and says how many pages the largest one has.
    pub(super) fn follow_trees(
        &mut self,
        (seq, layer): (SeqId, usize),
        position: usize,
        stream: &Stream,
    ) -> Result<usize> {
        let window = self.plan.shape.window;
        let end = published(position + 1, window) * PAGE_TOKENS;
        self.submit_trees((seq, layer), end, stream)?;
        // Ahead of need, sixteen at a time: what is taken in a step must not depend on what came later.
        let (lead, late) = match self.plan.listed {
            None => (end + window / PAGE_TOKENS * PAGE_TOKENS, layer % PAGE_TOKENS),
            // A search sees the tree as it is: tokens join it just before the step that needs them.
            Some(_) => (published(position + 1 + LEAD, window) * PAGE_TOKENS, 0),
        };
        let ahead = (position.saturating_sub(late) / PAGE_TOKENS * PAGE_TOKENS).min(lead);
        loop {
            let submitted = self.layer_trees((seq, layer)).map_or(ahead, |trees| trees.submitted);
            if submitted + PAGE_TOKENS > ahead {
                break;
            }
            self.submit_trees((seq, layer), submitted + PAGE_TOKENS, stream)?;
        }
        match self.plan.listed {
            None => self.follow_pages((seq, layer), (position, end), stream)?,
            Some(_) => self.follow_lists((seq, layer), end, stream)?,
        }
        let used = self.layer_trees((seq, layer)).and_then(|trees| trees.used.as_ref());
        Ok(used.and_then(|used| used.iter().max()).map_or(0, |&pages| pages as usize))
    }

    /// Has pages built that a later step needs, and announces those that the step at `position` needs: all tokens `..end`.
    fn follow_pages(
        &mut self,
        of: (SeqId, usize),
        (position, end): (usize, usize),
        stream: &Stream,
    ) -> Result<()> {
        let (window, room) = (self.plan.shape.window, self.plan.built_beside());
        let Some(trees) = self.layer_trees(of) else { return Ok(()) };
        if trees.used.is_none() && trees.applied == end {
            return self.apply(of, Vec::new(), stream);
        }
        // Tokens since the last sixteen left the window: layers take turns.
        let turn = position.saturating_sub(window) % PAGE_TOKENS > of.1 % (PAGE_TOKENS - 1);
        if trees.applied == end && turn {
            trees.beside.may_begin(stream)?;
            if !trees.beside.is_built() && trees.next_is_ready(room) {
                let next = end + PAGE_TOKENS;
                let (outcomes, _) = trees.take(next)?;
                self.build_beside(of, (next, outcomes), stream)?;
            }
            return Ok(());
        }
        if trees.applied < end {
            self.announce_built(of, stream)?;
        }
        let Some(trees) = self.layer_trees(of).filter(|trees| trees.applied < end) else { return Ok(()) };
        let (outcomes, waited) = trees.take(end)?;
        trees.applied = end;
        let pages = outcomes.iter().flatten().map(|outcome| outcome.told.pages.len()).sum::<usize>();
        let beside = outcomes.iter().all(|of_shard| of_shard.len() == 1 && of_shard[0].told.beside);
        if let Some(trees) = &mut self.trees {
            trees.report.waits += u64::from(waited);
        }
        if !beside || pages > room {
            return self.apply(of, outcomes, stream);
        }
        // The device is behind, else the workers had been done in time: it gets to the pages before it gets to this step.
        self.build_beside(of, (end, outcomes), stream)?;
        self.announce_built(of, stream)
    }

    /// Tells the device what the host lists for the step that needs all tokens `..end` in the trees.
    fn follow_lists(&mut self, of: (SeqId, usize), end: usize, stream: &Stream) -> Result<()> {
        let Some(trees) = self.layer_trees(of) else { return Ok(()) };
        let (outcomes, waited) = trees.take(end)?;
        trees.applied = end;
        let news = outcomes.iter().any(|of_shard| !of_shard.is_empty()) || trees.used.is_none();
        let fresh = outcomes.iter().all(|of_shard| of_shard.iter().any(|outcome| outcome.searched));
        if let Some(trees) = &mut self.trees {
            trees.report.waits += u64::from(waited);
            trees.report.stale_lists += u64::from(!fresh);
        }
        if news { self.apply(of, outcomes, stream) } else { Ok(()) }
    }

    fn layer_trees(&mut self, of: (SeqId, usize)) -> Option<&mut LayerTrees> {
        Some(self.trees.as_mut()?.of(of)?.of_layer)
    }

    /// Says whose super-nodes the step's entries have.
    pub(super) fn enter_nodes(&mut self, shape: &ChainShape, stream: &Stream) -> Result<()> {
        let each = self.plan.nodes_each(self.options.max_tokens);
        let Some(chain) = self.chains.get_mut(shape).filter(|_| each > 0) else { return Ok(()) };
        let of = |entry: &BatchEntry| if entry.tokens == 0 { u32::MAX } else { entry.sequence };
        let sequences: Vec<u32> = self.batch.entries[..shape.entries].iter().map(of).collect();
        Ok(chain.enter((&self.plan, each), &sequences, stream)?)
    }

    /// Has the host list the pages for the queries of the step just queued, for the steps to come: wherever it is done with the last.
    pub(super) fn ask_trees(
        &mut self,
        (sequences, layer): (&[SeqId], usize),
        (shape, scale): (&ChainShape, f32),
        stream: &Stream,
    ) -> Result<()> {
        if self.plan.listed.is_none() {
            return Ok(());
        }
        let CacheShape { heads, group, head_dim, .. } = self.plan.shape;
        let (Some(trees), Some(chain)) = (&mut self.trees, self.chains.get(shape)) else { return Ok(()) };
        let len = heads * group * head_dim;
        for (entry, seq) in sequences.iter().enumerate() {
            let of_seq = trees.open.get_mut(seq).and_then(|layers| layers.get_mut(layer));
            let Some(Some(of_layer)) = of_seq else { continue };
            if !of_layer.shards.iter().all(|shard| shard.is_idle()) {
                continue;
            }
            let queries = match &of_layer.queries {
                Some(queries) => queries.clone(),
                None => Arc::new(PinnedBuffer::zeros(&self.device, len * size_of::<E>())?),
            };
            of_layer.queries = Some(queries.clone());
            let from = chain.queries().slice(entry * len..(entry + 1) * len).map_err(DeviceError::from)?;
            queries.copy_from(from, stream)?;
            let written = Arc::new(Event::new(&self.device)?);
            written.record(stream)?;
            for shard in &of_layer.shards {
                let (queries, written) = (queries.clone(), written.clone());
                shard.ask::<E>(Asked { queries, group, scale, written }, &trees.pool);
            }
        }
        Ok(())
    }

    /// Forgets what the trees of a sequence hold at and after position `num_tokens`, and what was about to leave the window.
    pub(super) fn truncate_trees(&mut self, seq: SeqId, num_tokens: usize, stream: &Stream) -> Result<()> {
        let end = published(num_tokens + 1, self.plan.shape.window) * PAGE_TOKENS;
        for layer in 0..self.config.num_layers {
            // What was built holds the pages of what happened first.
            self.announce_built((seq, layer), stream)?;
            let Some(trees) = self.layer_trees((seq, layer)) else { continue };
            let outcomes = trees.shards.iter().map(|shard| shard.truncate(end)).collect::<Result<_>>()?;
            trees.submitted = trees.submitted.min(end);
            trees.applied = trees.submitted;
            // What was forgotten may have shared its chunks with another sequence, and is written elsewhere from now on.
            trees.chunks = Arc::default();
            self.apply((seq, layer), outcomes, stream)?;
        }
        Ok(())
    }
}
