//! Attention over all tokens of an item, wherever their rows lie, and the states that a step's parts leave.

use floe_cuda::device::{DevRef, Device, DeviceBuffer, DeviceError, Stream};
use floe_cuda::ops::cache::BeyondRows;
use floe_cuda::ops::{
    DecodeArgs, DecodePlan, DevState, DeviceElem, PlanShape, Spans, WholeItems, whole_decode,
};

/// A state for each query head.
#[derive(Debug)]
pub(super) struct State {
    out: DeviceBuffer<f32>,
    pub(super) lse: DeviceBuffer<f32>,
}

impl State {
    pub(super) fn new(device: &Device, heads: usize, dim: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            out: DeviceBuffer::zeros(device, heads * dim)?,
            lse: DeviceBuffer::from_slice(device, &vec![f32::NEG_INFINITY; heads])?,
        })
    }

    pub(super) fn write(&mut self) -> DevState<'_> {
        DevState { out: self.out.view_mut(), lse: self.lse.view_mut() }
    }

    pub(super) fn read(&self) -> (DevRef<'_, f32>, DevRef<'_, f32>) {
        (self.out.view(), self.lse.view())
    }
}

/// Attention over rows on the device or in place in host memory.
#[derive(Debug)]
pub(super) struct Whole {
    plan: DecodePlan,
    pub(super) state: State,
    /// Where the rows are in host memory, `[items]`.
    pub(super) warm: DeviceBuffer<u64>,
}

impl Whole {
    pub(super) fn new(device: &Device, shape: PlanShape<'_>) -> Result<Self, DeviceError> {
        let items = shape.rows_max.len();
        Ok(Self {
            plan: DecodePlan::new(device, shape)?,
            state: State::new(device, items * shape.group, shape.head_dim)?,
            warm: DeviceBuffer::zeros(device, items)?,
        })
    }

    /// Queues the attention of each item over its rows; a chunk of host memory has so many kv heads.
    pub(super) fn queue<E: DeviceElem>(
        &mut self,
        stream: &Stream,
        args: &DecodeArgs<'_, E>,
        rows: Spans<'_>,
        heads: usize,
    ) -> Result<(), DeviceError> {
        let items = WholeItems { rows, warm: self.warm.view(), heads };
        whole_decode(stream, &mut self.plan, args, items, self.state.write())
    }
}

/// Tokens of exact entries that have no row on the device.
#[derive(Debug)]
pub(super) struct Beyond {
    whole: Whole,
    first: DeviceBuffer<u32>,
    end: DeviceBuffer<u32>,
}

impl Beyond {
    pub(super) fn new(device: &Device, shape: PlanShape<'_>) -> Result<Self, DeviceError> {
        let items = shape.rows_max.len();
        Ok(Self {
            whole: Whole::new(device, shape)?,
            first: DeviceBuffer::zeros(device, items)?,
            end: DeviceBuffer::zeros(device, items)?,
        })
    }

    /// Where a step says which tokens these are.
    pub(super) fn write(&mut self) -> BeyondRows<'_> {
        BeyondRows {
            first: self.first.view_mut(),
            end: self.end.view_mut(),
            warm: self.whole.warm.view_mut(),
        }
    }

    /// Queues the attention over them.
    pub(super) fn queue<E: DeviceElem>(
        &mut self,
        stream: &Stream,
        args: &DecodeArgs<'_, E>,
        heads: usize,
    ) -> Result<(), DeviceError> {
        let rows = Spans { first: self.first.view(), end: self.end.view() };
        self.whole.queue(stream, args, rows, heads)
    }

    /// The state that they left.
    pub(super) fn read(&self) -> (DevRef<'_, f32>, DevRef<'_, f32>) {
        self.whole.state.read()
    }

    /// Adds their weight to that of the tokens beside them; waits.
    pub(super) fn add_lse(&self, lse: &mut [f32], stream: &Stream) -> Result<(), DeviceError> {
        for (lse, other) in lse.iter_mut().zip(self.whole.state.lse.read(stream)?) {
            let high = lse.max(other);
            if high > f32::NEG_INFINITY {
                *lse = high + ((*lse - high).exp() + (other - high).exp()).ln();
            }
        }
        Ok(())
    }
}
