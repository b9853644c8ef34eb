//! Missing rows of many items, listed for a kernel that brings them.

use floe_cuda::device::{Device, DeviceBuffer, DeviceError};
use floe_cuda::ops::cache::FetchList;

/// From as many items on, missing rows are brought by a kernel of their own instead of the blocks that find places for them. Of 8
/// items (batch 1) the blocks do it in 7 to 8 us; beside those of 64 the tail took twice as long.
const APART: usize = 32;

/// Rows to be brought.
#[derive(Debug)]
pub(super) struct FetchMemory {
    from: DeviceBuffer<u64>,
    to: DeviceBuffer<u32>,
    /// Zero at the start of a step.
    pub(super) num: DeviceBuffer<u32>,
}

impl FetchMemory {
    /// Room for what so many items retrieve; `None` where there are few.
    pub(super) fn new(device: &Device, items: usize, retrieved: usize) -> Result<Option<Self>, DeviceError> {
        if items < APART {
            return Ok(None);
        }
        let rows = items * retrieved;
        let (from, to) = (DeviceBuffer::zeros(device, rows)?, DeviceBuffer::zeros(device, rows)?);
        Ok(Some(Self { from, to, num: DeviceBuffer::zeros(device, 1)? }))
    }

    pub(super) fn write(&mut self) -> FetchList<'_> {
        FetchList { from: self.from.view_mut(), to: self.to.view_mut(), num: self.num.view_mut() }
    }
}
