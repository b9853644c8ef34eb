//! Prefetch: behind a step the next best units beyond those that it retrieved are brought into slots, for the layer's next step.
//!
//! ```text
//! stream   step of layer 0 ─> step of layer 1 ─> ...                            ─> step of layer 0
//! ahead        └> select ─> resolve  (scores of the step, other ones for the next layer) ──┘
//! ```
//! A step leaves its scores, without what it selected, in one of two sets of buffers by the layer's parity; the layer after the
//! next waits until they were read. A layer's next step waits for its rows, so that a slot is never attended before it is filled, and
//! what is hot never changes a result.

use floe_cuda::device::{DevRef, Device, DeviceBuffer, DeviceError, Event, Stream};
use floe_cuda::ops::cache::{Ahead, BatchEntry, FoundUnit, SequencePlace, Tables, resolve_ahead};
use floe_cuda::ops::{DeviceElem, Spans};

use super::chain::ChainShape;
use super::classes::POLICY;
use super::clock::{Clock, Stage};
use super::engine::GpuEngine;
use super::layer::LayerMemory;
use super::options::Plan;
use crate::error::Error;

/// The stream of all layers.
#[derive(Debug)]
pub(super) struct AheadStream {
    stream: Stream,
    /// The scores of layers of this parity, and the step's tables, have been read.
    pub(super) read: [Event; 2],
}

impl AheadStream {
    pub(super) fn new(device: &Device) -> Result<Self, DeviceError> {
        let read = [Event::new(device)?, Event::new(device)?];
        Ok(Self { stream: Stream::new(device)?, read })
    }

    /// `stream` goes on when no list is being made.
    pub(super) fn wait_for_lists(&self, stream: &Stream) -> Result<(), DeviceError> {
        self.read.iter().try_for_each(|read| stream.wait(read))
    }
}

/// What is on its way for one layer.
#[derive(Debug)]
pub(super) struct AheadMemory {
    /// Rows of the units, where they got one.
    rows: DeviceBuffer<u32>,
    /// The step is done; what was wanted behind it is there.
    ready: Event,
    pub(super) done: Event,
}

impl AheadMemory {
    /// For steps of at most `items` items.
    pub(super) fn new(device: &Device, plan: &Plan, items: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            rows: DeviceBuffer::zeros(device, items * plan.prefetch)?,
            ready: Event::new(device)?,
            done: Event::new(device)?,
        })
    }
}

/// Where each item's part of a list begins.
pub(super) fn firsts(items: usize, each: usize) -> Vec<u32> {
    (0..items).map(|item| (item * each) as u32).collect()
}

/// The next best units of a step, by item.
#[derive(Debug)]
pub(super) struct AheadList {
    pub(super) first: DeviceBuffer<u32>,
    pub(super) end: DeviceBuffer<u32>,
    pub(super) list: DeviceBuffer<u32>,
}

impl AheadList {
    pub(super) fn new(device: &Device, items: usize, units: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            first: DeviceBuffer::from_slice(device, &firsts(items, units))?,
            end: DeviceBuffer::zeros(device, items)?,
            list: DeviceBuffer::zeros(device, items * units)?,
        })
    }
}

/// The step that is followed: its entries, all sequences, and the parity of its layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Followed<'a> {
    pub(super) plan: &'a Plan,
    pub(super) batch: DevRef<'a, BatchEntry>,
    pub(super) sequences: DevRef<'a, SequencePlace>,
    pub(super) parity: usize,
}

impl AheadStream {
    /// The stream on which the next units of a step are listed and brought, which goes on behind what is queued on `stream`.
    pub(super) fn follow<E>(&self, stream: &Stream, layer: &LayerMemory<E>) -> Result<&Stream, DeviceError> {
        if let Some(memory) = &layer.ahead {
            memory.ready.record(stream)?;
            self.stream.wait(&memory.ready)?;
        }
        Ok(&self.stream)
    }

    /// Brings in what `units` lists, for a layer's next step.
    pub(super) fn fetch<E: DeviceElem>(
        &self,
        units: &AheadList,
        step: &Followed<'_>,
        (layer, clock): (&mut LayerMemory<E>, &mut Clock),
    ) -> Result<(), DeviceError> {
        let LayerMemory { kv, chunks, slots, ahead: Some(memory), .. } = layer else { return Ok(()) };
        let Followed { plan, batch, sequences, parity } = *step;
        let tables = Tables { shape: plan.shape, batch, sequences, chunks: chunks.view() };
        let ahead = Ahead {
            spans: Spans { first: units.first.view(), end: units.end.view() },
            found: units.list.view(),
            unit: if plan.by_token() { FoundUnit::Tokens } else { FoundUnit::Pages },
            most: plan.prefetch,
            rows: memory.rows.view_mut().slice(0..tables.items() * plan.prefetch)?,
        };
        let work = || resolve_ahead(&self.stream, &tables, ahead, slots.write(), kv.view_mut());
        clock.time(Stage::Ahead, &self.stream, work)?;
        self.read[parity].record(&self.stream)?;
        memory.done.record(&self.stream)
    }
}

impl<E: DeviceElem> GpuEngine<E> {
    /// A sparse step waits for the rows that were prefetched for it, and until what it overwrites has been read.
    pub(super) fn before_step(&self, layer: usize, shape: ChainShape, stream: &Stream) -> Result<(), Error> {
        if let (Some(ahead), Some(memory), false) = (&self.ahead, &self.layers[layer].ahead, shape.exact) {
            stream.wait(&memory.done)?;
            stream.wait(&ahead.read[shape.parity])?;
        }
        Ok(())
    }

    /// Prefetches behind a sparse step.
    pub(super) fn queue_ahead(
        &mut self,
        layer: usize,
        shape: ChainShape,
        stream: &Stream,
    ) -> Result<(), Error> {
        let (Some(ahead), Some(chain), false) = (&self.ahead, self.chains.get_mut(&shape), shape.exact)
        else {
            return Ok(());
        };
        let (plan, memory) = (&self.plan, &mut self.layers[layer]);
        let batch = self.batch.view().slice(0..shape.entries).map_err(DeviceError::from)?;
        let step = Followed { plan, batch, sequences: self.sequences[POLICY].view(), parity: shape.parity };
        let lists = ahead.follow(stream, memory)?;
        let Some(units) = chain.select_ahead(lists, (plan, &mut self.shared), &memory.pages)? else {
            return Ok(());
        };
        Ok(ahead.fetch(units, &step, (memory, &mut self.shared.clock))?)
    }

    /// `stream` goes on when nothing is on its way for a later step.
    pub(super) fn settle(&self, stream: &Stream) -> Result<(), Error> {
        for memory in self.layers.iter().filter_map(|memory| memory.ahead.as_ref()) {
            stream.wait(&memory.done)?;
        }
        self.trees.as_ref().map_or(Ok(()), |trees| trees.settle(stream))
    }
}
