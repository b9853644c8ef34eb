//! How the device learns what happened to trees.
//!
//! ```text
//! beside    upload ─> build pages, from rows in host memory ─┐
//! steps     ... step ─> step ─> step ────────────────────────┴─> announce ─> step that selects from them ...
//! ```
//! Tokens that join a tree change no page that steps look at: they go to pages that stood for nothing. So these are built on a
//! stream of their own while steps run, and made to count right before the step that needs them. Everything else (a prompt,
//! a truncation, lists of the host) is built and announced on the stream of the steps.

use std::collections::BTreeMap;
use std::ops::Range;

use floe_cuda::device::{DevRef, Device, DeviceBuffer, DeviceError, Event, Stream};
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{
    BatchEntry, Counted, Said, SequencePlace, Tables, TreePage, TreePages, announce_tree_pages,
    build_tree_pages,
};
use floe_cuda::ops::sweep::Rotation;

use super::classes::POLICY;
use super::engine::GpuEngine;
use super::layer::LayerMemory;
use super::nodes::NodeUpdate;
use super::options::Plan;
use super::report::TreeReport;
use super::tree::Outcome;
use super::trees::TreesOf;
use crate::error::Result;
use crate::ids::SeqId;
use crate::shape::PAGE_TOKENS;

/// Pages that are built at a time on the stream of the steps.
const AT_ONCE: usize = 16_384;

/// Device memory of listed pages until they count: a part for the stream of the steps, then one for each layer of each sequence.
#[derive(Debug)]
pub(super) struct Staging {
    /// Places of a layer.
    each: usize,
    listed: DeviceBuffer<TreePage>,
    log_count: DeviceBuffer<f32>,
    masks: DeviceBuffer<u16>,
    spread: DeviceBuffer<f32>,
}

impl Staging {
    pub(super) fn new(device: &Device, plan: &Plan, layers: usize) -> Result<Self> {
        let len = plan.staged(layers);
        Ok(Self {
            each: plan.built_beside(),
            listed: DeviceBuffer::zeros(device, len)?,
            log_count: DeviceBuffer::zeros(device, len)?,
            masks: DeviceBuffer::zeros(device, len)?,
            spread: DeviceBuffer::zeros(device, len)?,
        })
    }

    /// The first `num` places of layer `index`, of all sequences'.
    fn of_layer(&self, index: usize, num: usize) -> Range<usize> {
        let first = AT_ONCE + index * self.each;
        first..first + num
    }

    /// Some places: what is listed there, and what is said of it.
    fn places(&mut self, at: Range<usize>) -> Result<(DevRef<'_, TreePage>, Said<'_>), DeviceError> {
        let said = Said {
            log_count: self.log_count.view_mut().slice(at.clone())?,
            masks: self.masks.view_mut().slice(at.clone())?,
            spread: self.spread.view_mut().slice(at.clone())?,
        };
        Ok((self.listed.view().slice(at)?, said))
    }
}

impl Plan {
    /// Places of listed pages, for so many layers of all sequences together.
    fn staged(&self, layers: usize) -> usize {
        AT_ONCE + layers * self.built_beside()
    }

    /// Bytes of listed pages until they count, for so many layers of all sequences together.
    pub(super) fn staged_bytes(&self, layers: usize) -> usize {
        let place = size_of::<TreePage>() + 2 * size_of::<f32>() + size_of::<u16>();
        if self.tree { self.staged(layers) * place } else { 0 }
    }
}

/// Pages that are built beside the steps of a layer of a sequence.
#[derive(Debug)]
pub(super) struct Beside {
    built: Option<Built>,
    /// Behind the building.
    ready: Event,
    /// Behind the last announcement, if `begun`: before that the places, and the pages that it freed, are in use.
    begin: Event,
    begun: bool,
}

/// Pages that wait to be announced.
#[derive(Debug)]
struct Built {
    /// Tokens `..end` are in the trees then.
    end: usize,
    /// Where they are listed.
    at: Range<usize>,
    /// Pages of each kv head that steps look at then.
    used: Vec<u32>,
}

impl Beside {
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self { built: None, ready: Event::new(device)?, begin: Event::new(device)?, begun: false })
    }

    /// From here on in `stream` pages may be built beside it, unless they could be already.
    pub(super) fn may_begin(&mut self, stream: &Stream) -> Result<()> {
        if !self.begun {
            self.begin.record(stream)?;
            self.begun = true;
        }
        Ok(())
    }

    /// Whether pages wait to be announced.
    pub(super) fn is_built(&self) -> bool {
        self.built.is_some()
    }

    /// `stream` goes on when nothing is being built.
    pub(super) fn settle(&self, stream: &Stream) -> Result<()> {
        Ok(stream.wait(&self.ready)?)
    }
}

/// Pages that change, by kv head and page, and super-nodes that do, by kv head.
struct News {
    pages: Vec<TreePage>,
    nodes: Vec<(usize, NodeUpdate)>,
}

/// What outcomes by kv head come to; `used` becomes the pages of each.
fn collect(outcomes: Vec<Vec<Outcome>>, used: &mut [u32], report: &mut TreeReport) -> News {
    // Of several changes of a page the last one stands: one page of a launch has one block.
    let mut pages: BTreeMap<(u32, u32), TreePage> = BTreeMap::new();
    let mut nodes = Vec::new();
    for ((head, used), of_shard) in used.iter_mut().enumerate().zip(outcomes) {
        for outcome in of_shard {
            *used = outcome.used;
            let told = outcome.told.pages;
            if outcome.searched {
                report.searches += 1;
                report.search_us += outcome.micros;
            } else if outcome.tokens > PAGE_TOKENS {
                report.builds += 1;
                report.build_us += outcome.micros;
            } else {
                report.batches += 1;
                report.batch_us += outcome.micros;
                report.batch_pages += told.len() as u64;
            }
            nodes.extend(outcome.nodes.into_iter().map(|node| (head, node)));
            pages.extend(told.into_iter().map(|page| ((page.head, page.page), page)));
        }
    }
    let used = |head: u32| used.get(head as usize).copied().unwrap_or(0);
    News {
        pages: pages.into_values().map(|page| TreePage { used: used(page.head), ..page }).collect(),
        nodes,
    }
}

impl<E: DeviceElem> LayerMemory<E> {
    /// Queues the building of listed pages of the sequence of index `index`.
    fn build(
        &mut self,
        (plan, rotation): (&Plan, Option<Rotation<'_>>),
        (batch, sequences): (DevRef<'_, BatchEntry>, DevRef<'_, SequencePlace>),
        (index, place): (usize, SequencePlace),
        (listed, said): (DevRef<'_, TreePage>, &mut Said<'_>),
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let tables = Tables { shape: plan.shape, batch, sequences, chunks: self.chunks.view() };
        let (to, tokens) = self.pages.write_tree(rotation);
        let from = TreePages { sequence: index, place, listed, tokens };
        build_tree_pages(stream, &tables, from, self.kv.view(), (to, said))
    }

    /// Queues the announcement of built pages of the sequence of index `index`.
    fn announce(
        &mut self,
        plan: &Plan,
        (index, place): (usize, SequencePlace),
        (listed, said): (DevRef<'_, TreePage>, &Said<'_>),
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let heads = index * plan.shape.heads..(index + 1) * plan.shape.heads;
        let sums = plan.max_doubt.map(|_| self.doubt.sums.view_mut().slice(heads.clone())).transpose()?;
        let to = Counted {
            log_count: self.pages.log_count.view_mut(),
            masks: self.pages.masks.view_mut(),
            spread: self.pages.spread.view_mut(),
            tree_pages: self.pages.tree_pages.view_mut().slice(heads)?,
            sums,
        };
        announce_tree_pages(stream, (place, listed), said, to)
    }
}

impl<E: DeviceElem> GpuEngine<E> {
    /// Has the pages that the trees of a layer get with the tokens `..end` built beside the steps on `stream`.
    pub(super) fn build_beside(
        &mut self,
        (seq, layer): (SeqId, usize),
        (end, outcomes): (usize, Vec<Vec<Outcome>>),
        stream: &Stream,
    ) -> Result<()> {
        let open = self.places.get(seq)?;
        let (index, place) = (open.index, open.place());
        let Some(trees) = self.trees.as_mut().and_then(|trees| trees.of((seq, layer))) else { return Ok(()) };
        let TreesOf { of_layer, staging, beside, report } = trees;
        let mut used = of_layer.used.clone().unwrap_or_else(|| vec![0; self.plan.shape.heads]);
        let pages = collect(outcomes, &mut used, report).pages;
        let at = staging.of_layer(index * self.config.num_layers + layer, pages.len());
        of_layer.beside.may_begin(stream)?;
        beside.wait(&of_layer.beside.begin)?;
        staging.listed.write_async(at.start, &pages, beside)?;
        let (listed, mut said) = staging.places(at.clone())?;
        // Rows on the device may move meanwhile; host memory has them all.
        let place = SequencePlace { slots: 0, ..place };
        let sequences = (self.batch.view(), self.sequences[POLICY].view());
        let parts = (&self.plan, self.shared.rotation());
        self.layers[layer].build(parts, sequences, (index, place), (listed, &mut said), beside)?;
        of_layer.beside.ready.record(beside)?;
        of_layer.beside.built = Some(Built { end, at, used });
        Ok(())
    }

    /// Has the steps that are queued on `stream` from now on see the pages that were built beside those before, if any.
    pub(super) fn announce_built(&mut self, (seq, layer): (SeqId, usize), stream: &Stream) -> Result<()> {
        let open = self.places.get(seq)?;
        let of = (open.index, open.place());
        let Some(trees) = self.trees.as_mut().and_then(|trees| trees.of((seq, layer))) else { return Ok(()) };
        let TreesOf { of_layer, staging, .. } = trees;
        let Some(Built { end, at, used }) = of_layer.beside.built.take() else { return Ok(()) };
        stream.wait(&of_layer.beside.ready)?;
        let (listed, said) = staging.places(at)?;
        self.layers[layer].announce(&self.plan, of, (listed, &said), stream)?;
        of_layer.beside.begun = false;
        (of_layer.applied, of_layer.used) = (end, Some(used));
        Ok(())
    }

    /// Tells the device what happened to the trees of a layer, by kv head, on the stream of the steps.
    pub(super) fn apply(
        &mut self,
        (seq, layer): (SeqId, usize),
        outcomes: Vec<Vec<Outcome>>,
        stream: &Stream,
    ) -> Result<()> {
        let heads = self.plan.shape.heads;
        let open = self.places.get(seq)?;
        let of = (open.index, open.place());
        let Some(trees) = self.trees.as_mut().and_then(|trees| trees.of((seq, layer))) else { return Ok(()) };
        let TreesOf { of_layer, staging, report, .. } = trees;
        let memory = &mut self.layers[layer];
        let first = of_layer.used.is_none();
        if first {
            memory.pages.tree_pages.write_async(of.0 * heads, &vec![0; heads], stream)?;
        }
        let mut used = of_layer.used.clone().unwrap_or_else(|| vec![0; heads]);
        let News { pages, nodes } = collect(outcomes, &mut used, report);
        for part in pages.chunks(AT_ONCE) {
            staging.listed.write_async(0, part, stream)?;
            let (listed, mut said) = staging.places(0..part.len())?;
            let sequences = (self.batch.view(), self.sequences[POLICY].view());
            let parts = (&self.plan, self.shared.rotation());
            memory.build(parts, sequences, of, (listed, &mut said), stream)?;
            memory.announce(&self.plan, of, (listed, &said), stream)?;
        }
        let each = self.plan.nodes_each(self.options.max_tokens);
        if each > 0 && (!nodes.is_empty() || first) {
            let start = of.0 * heads * each;
            for (head, update) in nodes {
                let at = head * each + update.node as usize;
                of_layer.stands[at] = update.log_count;
                if let Some(summary) = update.summary {
                    memory.nodes.write(start + at, &summary, stream)?;
                }
            }
            memory.nodes.log_count.write_async(start, &of_layer.stands, stream)?;
        }
        of_layer.beside.begun = false;
        of_layer.used = Some(used);
        Ok(())
    }
}
