//! Super-nodes that stand for pages which are not on the device: a layer's memory of them, and their state in a step.

use floe_cuda::device::{DevRef, Device, DeviceBuffer, DeviceError, Stream};
use floe_cuda::ops::sweep::{Sweep, TailArgs, TailUnits};
use floe_cuda::ops::{DeviceElem, ScanShape, Spans, Summaries};

use super::nodes::Summary;
use super::options::{GpuOptions, Plan};
use super::whole::State;

/// Super-nodes that stand for pages which are not on the device, [sequences, heads, nodes each].
#[derive(Debug)]
pub(super) struct NodeMemory<E> {
    /// [nodes, head_dim]
    pub(super) mean_keys: DeviceBuffer<E>,
    pub(super) mean_values: DeviceBuffer<E>,
    /// `[nodes]`
    pub(super) log_count: DeviceBuffer<f32>,
    pub(super) spread: DeviceBuffer<f32>,
}

impl<E: DeviceElem> NodeMemory<E> {
    pub(super) fn new(device: &Device, nodes: usize, dim: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            mean_keys: DeviceBuffer::zeros(device, nodes * dim)?,
            mean_values: DeviceBuffer::zeros(device, nodes * dim)?,
            log_count: DeviceBuffer::from_slice(device, &vec![f32::NEG_INFINITY; nodes])?,
            spread: DeviceBuffer::zeros(device, nodes)?,
        })
    }

    /// Queues what is written of node `at`, its count aside.
    pub(super) fn write(&mut self, at: usize, summary: &Summary, stream: &Stream) -> Result<(), DeviceError> {
        let narrow = |x: &[f32]| x.iter().map(|x| E::from_f32(*x)).collect::<Vec<E>>();
        let dim = summary.key.len();
        self.mean_keys.write_async(at * dim, &narrow(&summary.key), stream)?;
        self.mean_values.write_async(at * dim, &narrow(&summary.value), stream)?;
        self.spread.write_async(at, &[summary.spread], stream)
    }
}

/// Super-nodes of the items, and their state.
#[derive(Debug)]
pub(super) struct Standing {
    sweep: Sweep,
    first: DeviceBuffer<u32>,
    end: DeviceBuffer<u32>,
    /// Sequence of each entry that `first` and `end` are of.
    of: Vec<u32>,
    scores: DeviceBuffer<f32>,
    lse: DeviceBuffer<f32>,
    pub(super) state: State,
}

impl Standing {
    pub(super) fn new(
        device: &Device,
        plan: &Plan,
        options: &GpuOptions,
        entries: usize,
    ) -> Result<Self, DeviceError> {
        let cache = plan.shape;
        let (items, num) = (entries * cache.heads, plan.nodes(options));
        let each = plan.nodes_each(options.max_tokens);
        let scan = ScanShape {
            items,
            group: cache.group,
            head_dim: cache.head_dim,
            pages_max: each,
            num_pages: num,
        };
        Ok(Self {
            sweep: Sweep::new(device, scan)?,
            first: DeviceBuffer::zeros(device, items)?,
            end: DeviceBuffer::zeros(device, items)?,
            of: vec![u32::MAX; entries],
            scores: DeviceBuffer::zeros(device, num * cache.group)?,
            lse: DeviceBuffer::zeros(device, items * cache.group)?,
            state: State::new(device, items * cache.group, cache.head_dim)?,
        })
    }

    /// Says whose super-nodes the entries have, `each` of a kv head; `u32::MAX`: those of nobody.
    pub(super) fn enter(
        &mut self,
        heads: usize,
        each: usize,
        sequences: &[u32],
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        if self.of[..] == *sequences {
            return Ok(());
        }
        let (mut first, mut end) = (Vec::new(), Vec::new());
        for &sequence in sequences {
            for head in 0..heads {
                let there = sequence != u32::MAX;
                let start = if there { (sequence as usize * heads + head) * each } else { 0 };
                first.push(start as u32);
                end.push(if there { (start + each) as u32 } else { 0 });
            }
        }
        self.first.write_async(0, &first, stream)?;
        self.end.write_async(0, &end, stream)?;
        self.of = sequences.to_vec();
        Ok(())
    }

    /// Queues their state for the queries of a step.
    pub(super) fn queue<E: DeviceElem>(
        &mut self,
        stream: &Stream,
        query: (DevRef<'_, E>, f32),
        nodes: &NodeMemory<E>,
    ) -> Result<(), DeviceError> {
        let pages = Spans { first: self.first.view(), end: self.end.view() };
        let summaries = Summaries {
            keys: nodes.mean_keys.view(),
            log_count: nodes.log_count.view(),
            pages,
            spreads: Some((nodes.spread.view(), floe_index::export::PAGE_SPREAD)),
        };
        self.sweep.page_scores(stream, query, &summaries, self.scores.view_mut(), self.lse.view_mut())?;
        let units = TailUnits::Pages(self.scores.view());
        let args = TailArgs { units, lse: self.lse.view(), values: nodes.mean_values.view(), pages };
        self.sweep.tail(stream, &args, self.state.write())
    }
}
