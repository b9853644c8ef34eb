//! A budgeted step over summaries and sketches, in as few passes as it takes: scores, selection, tail, exact attention.
//!
//! ```text
//! page_scores  or  token_scores ─> select ─> (the caller finds or fetches rows) ─> tail ─┐
//!   mean keys       mean keys,                                        sparse_decode ─────┴─> state
//!                   key codes                     mean values, value codes
//! ```
//! Every key summary and code is read once by the scores, every value summary and code once by the tail. On Hopper the kernels
//! overlap: each takes its places on the device while its predecessor finishes, attention runs beside the tail and joins its
//! state, so that no launch merges.
//!
//! Units are pages or tokens. A page's score and what its tokens add to it are kept apart: [num_pages / 16, group, 16] f32 and
//! [num_pages, group, 16] f16; -inf: does not exist, must not be selected, or has been selected. A token's score is the sum.
//! Pages between an item's last and the next multiple of 16 are read but count for nothing; their values must be finite.

mod scores;
mod select;
mod tail;

use half::f16;

use super::decode::Spans;
use super::{check_head_dim, word};
use crate::KernelError;
use crate::device::{DevMut, DevRef, Device, DeviceBuffer, DeviceError};

pub use scores::{KeyCodes, PageKeys, Summaries, TokenScoresMut};
pub use select::{Selection, UnitsMut};
pub use tail::{Beside, TailArgs, TailUnits, ValueCodes};

/// What scans are made for.
#[derive(Debug, Clone, Copy)]
pub struct ScanShape {
    /// Items.
    pub items: usize,
    /// Query heads of an item, 1 to 16.
    pub group: usize,
    /// Dimensions of a head: 64, 96, 128 or 256.
    pub head_dim: usize,
    /// Most pages of one item.
    pub pages_max: usize,
    /// Pages of all items, a multiple of 16: every item begins at a multiple of 16.
    pub num_pages: usize,
}

/// The rotation of sketches, as `floe_index::rotate` has it.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// [rounds, head_dim] f32, random sign / sqrt(block); one round where `head_dim` is a power of two, else two; device.
    pub signs: DevRef<'a, f32>,
    /// Before the second round coordinate `i` takes what coordinate `order[i]` has, `[head_dim]`; `None` with one round; device.
    pub order: Option<DevRef<'a, u32>>,
}

/// Mirrors `floe::RotationParams`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct RotationParams {
    signs: u64,
    order: u64,
}

impl RotationParams {
    pub(in crate::ops) const NONE: Self = Self { signs: 0, order: 0 };

    pub(in crate::ops) fn new(rotation: &Rotation<'_>, head_dim: usize) -> Result<Self, DeviceError> {
        let rounds = if head_dim.is_power_of_two() { 1 } else { 2 };
        rotation.signs.check("rotation.signs", rounds * head_dim)?;
        match rotation.order {
            Some(order) if rounds == 2 => order.check("rotation.order", head_dim)?,
            None if rounds == 1 => {}
            _ => {
                let expected = "an order of coordinates for two rounds, none for one";
                return Err(DeviceError::Unsupported { field: "rotation rounds", value: rounds, expected });
            }
        }
        Ok(Self { signs: rotation.signs.address(), order: rotation.order.map_or(0, |order| order.address()) })
    }
}

/// Device memory of the passes, allocated once for a shape.
#[derive(Debug)]
pub struct Sweep {
    shape: ScanShape,
    part_lse: DeviceBuffer<f32>,
    part_out: DeviceBuffer<f32>,
    /// [items, 2]
    arrived: DeviceBuffer<u32>,
    page_blocks: u32,
    scan_blocks: u32,
    cluster: u32,
    select_pages: u32,
    tail: [tail::TailShape; 4],
}

impl Sweep {
    /// Allocates.
    ///
    /// # Errors
    /// A group or head size without a kernel, sizes beyond 32 bits, no memory.
    pub fn new(device: &Device, shape: ScanShape) -> Result<Self, DeviceError> {
        check_head_dim(shape.head_dim)?;
        if !(1..=16).contains(&shape.group) {
            return Err(DeviceError::Unsupported { field: "group", value: shape.group, expected: "1 to 16" });
        }
        if !shape.num_pages.is_multiple_of(16) {
            let expected = "a multiple of 16";
            return Err(DeviceError::Unsupported { field: "num_pages", value: shape.num_pages, expected });
        }
        let items = word("items", shape.items)?;
        let tiles = word("pages_max", shape.pages_max.div_ceil(16))?;
        word("tokens", shape.num_pages * 16)?;
        // As many blocks as run at once, and no more: each ends with a join.
        let per_item = |per_multiprocessor: u32, warps: u32| {
            let fill =
                device.properties().multiprocessors * per_multiprocessor / (items * layers(&shape)).max(1);
            tiles.div_ceil(warps).min(fill).max(1)
        };
        let page_blocks = per_item(3, scores::WARPS);
        let scan_blocks = per_item(scores::blocks_at_once(&shape), scores::WARPS);
        let mut tail = [tail::TailShape::default(); 4];
        for (bits, tail) in tail.iter_mut().enumerate() {
            *tail = tail::TailShape::new(device, &shape, bits)?;
            tail.blocks = per_item(1, tail.warps);
        }
        let tail_blocks = tail.iter().map(|tail| tail.blocks).max().unwrap_or(1);
        let states = shape.items * tail_blocks.max(page_blocks).max(scan_blocks) as usize * shape.group;
        let (cluster, select_pages) = select::division(device, &shape)?;
        Ok(Self {
            part_lse: DeviceBuffer::zeros(device, states)?,
            part_out: DeviceBuffer::zeros(
                device,
                shape.items * tail_blocks as usize * shape.group * shape.head_dim,
            )?,
            arrived: DeviceBuffer::zeros(device, 2 * shape.items)?,
            page_blocks,
            scan_blocks,
            cluster,
            select_pages,
            tail,
            shape,
        })
    }

    fn check_spans(&self, pages: &Spans<'_>) -> Result<(), KernelError> {
        pages.first.check("first", self.shape.items)?;
        pages.end.check("end", self.shape.items)
    }

    fn check_scores(&self, scores: usize, residuals: Option<usize>) -> Result<(), KernelError> {
        let ScanShape { group, num_pages, .. } = self.shape;
        crate::rows::check_len("scores", scores, num_pages * group)?;
        residuals.map_or(Ok(()), |len| crate::rows::check_len("residuals", len, num_pages * group * 16))
    }
}

/// Blocks in z: eight heads each.
fn layers(shape: &ScanShape) -> u32 {
    if shape.group > 8 { 2 } else { 1 }
}

/// Heads of a lane in kernels that take up to eight heads at a time.
fn lane_heads(shape: &ScanShape) -> usize {
    if shape.group > 4 { 2 } else { 1 }
}

/// Scores of tokens, to be read.
#[derive(Debug, Clone, Copy)]
pub struct TokenScores<'a> {
    /// [num_pages / 16, group, 16] f32; device.
    pub scores: DevRef<'a, f32>,
    /// [num_pages, group, 16] f16; device.
    pub residuals: DevRef<'a, f16>,
}

/// Where a kernel's result goes that every block contributes to.
fn address<T>(view: DevMut<'_, T>) -> u64 {
    view.address()
}
