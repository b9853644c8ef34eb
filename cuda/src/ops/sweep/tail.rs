//! The state of what was not selected, and attention beside it.

use half::f16;

use super::super::decode::{DevState, Join, Lists, Spans, SparseCall, When, queue_sparse};
use super::super::plan::DecodePlan;
use super::super::{DecodeArgs, DeviceElem, check_aligned, word};
use super::{Rotation, RotationParams, ScanShape, Sweep, TokenScores, address, lane_heads, layers};
use crate::device::{DevRef, Device, DeviceError, Launch, Stream, Together};

/// Warps of a block at most.
const WARPS_MAX: u32 = 8;
/// Stages of a warp's ring, as in `tail.cuh`.
const STAGES: usize = 2;
/// Static shared memory of a block, and what the device keeps for itself.
const SHARED_OTHER: usize = 3 << 10;

/// What stands in the tail.
#[derive(Debug, Clone, Copy)]
pub enum TailUnits<'a> {
    /// Pages, by their scores [num_pages / 16, group, 16] f32 with ln count; device.
    Pages(DevRef<'a, f32>),
    /// Tokens, by their scores; each by its page's mean value and, with codes, its own residual to it.
    Tokens(TokenScores<'a>, Option<ValueCodes<'a>>),
}

/// Value sketches of all tokens.
#[derive(Debug, Clone, Copy)]
pub struct ValueCodes<'a> {
    /// Bits of a code: 1 or 2.
    pub bits: usize,
    /// [num_pages, bits, head_dim / 32, 16] u32: the value lines of `floe_index::sketch`, as they are; device.
    pub lines: DevRef<'a, u32>,
    /// [num_pages, 16] f16; device.
    pub scales: DevRef<'a, f16>,
    /// As the codes were rotated.
    pub rotation: Rotation<'a>,
}

/// What a tail is made of.
#[derive(Debug, Clone, Copy)]
pub struct TailArgs<'a, E> {
    /// Units and their scores; those with -inf are left out.
    pub units: TailUnits<'a>,
    /// Log-sum-exp that weights are relative to, [items, group]: of all units, selected ones included. Device.
    pub lse: DevRef<'a, f32>,
    /// Mean values [num_pages, head_dim] E; device.
    pub values: DevRef<'a, E>,
    /// Pages of each item.
    pub pages: Spans<'a>,
}

/// How a tail of some unit runs: one block to a multiprocessor, so that attention fits beside.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TailShape {
    pub(super) warps: u32,
    pub(super) shared_bytes: u32,
    /// Blocks of an item.
    pub(super) blocks: u32,
}

impl TailShape {
    /// `unit` 0, 1, 2: tokens with so many bits of value; 3: pages.
    pub(super) fn new(device: &Device, shape: &ScanShape, unit: usize) -> Result<Self, DeviceError> {
        let (bits, tokens) = if unit == 3 { (0, false) } else { (unit, true) };
        let width = 4 * lane_heads(shape);
        let row = if shape.head_dim == 96 { 16 } else { shape.head_dim / 8 };
        // 16-byte pieces, as `Tail` in `tail.cuh` counts them.
        let codes = if bits > 0 { bits * 16 * row + 32 } else { 0 };
        let stage = 16 * row + codes + if tokens { 32 * width } else { 0 } + 4 * width;
        let warp = STAGES * stage + 4 * width + if bits > 0 { 16 * width } else { 0 };
        let properties = device.properties();
        let mut warps = WARPS_MAX;
        while warps > 1 && warps as usize * warp * 16 + SHARED_OTHER > properties.shared_bytes_max {
            warps /= 2;
        }
        let bytes = warps as usize * warp * 16;
        Ok(Self { warps, shared_bytes: word("shared memory", bytes)?, blocks: 0 })
    }
}

/// Mirrors `floe::TailParams`.
#[repr(C)]
struct TailParams {
    scores: u64,
    residuals: u64,
    lse: u64,
    values: u64,
    lines: u64,
    scales: u64,
    first: u64,
    end: u64,
    part_out: u64,
    part_sum: u64,
    arrived: u64,
    out: u64,
    out_lse: u64,
    rotation: RotationParams,
    group: u32,
    num_pages: u32,
}

/// Attention that is queued behind a tail and joined with it.
#[derive(Debug)]
pub struct Beside<'a, E> {
    /// How attention is divided over blocks.
    pub plan: &'a mut DecodePlan,
    /// Queries and rows.
    pub args: DecodeArgs<'a, E>,
    /// What is attended exactly; complete before the tail is queued.
    pub lists: Lists<'a, E>,
}

impl Sweep {
    /// The state of all units that were not selected. On Hopper it begins to read values and codes beside the kernel queued just before:
    /// they, and the ranges of pages, were written by work queued before the selection.
    ///
    /// Reads every mean value and value code once. Weights have sixteen bits and more on mean values, eight bits relative to the
    /// largest of 256 tokens on residuals.
    ///
    /// # Errors
    /// Shapes that do not fit; bits without a kernel; what the driver reports.
    pub fn tail<E: DeviceElem>(
        &mut self,
        stream: &Stream,
        args: &TailArgs<'_, E>,
        state: DevState<'_>,
    ) -> Result<(), DeviceError> {
        let ScanShape { items, group, head_dim, num_pages, .. } = self.shape;
        args.values.check("values", num_pages * head_dim)?;
        args.lse.check("lse", items * group)?;
        self.check_spans(&args.pages)?;
        state.out.check("out", items * group * head_dim)?;
        state.lse.check("lse", items * group)?;
        let mut params = TailParams {
            scores: 0,
            residuals: 0,
            lse: args.lse.address(),
            values: args.values.address(),
            lines: 0,
            scales: 0,
            first: args.pages.first.address(),
            end: args.pages.end.address(),
            part_out: address(self.part_out.view_mut()),
            part_sum: address(self.part_lse.view_mut()),
            arrived: address(self.arrived.view_mut()),
            out: state.out.address(),
            out_lse: state.lse.address(),
            rotation: RotationParams::NONE,
            group: word("group", group)?,
            num_pages: word("num_pages", num_pages)?,
        };
        let unit = match &args.units {
            TailUnits::Pages(scores) => {
                self.check_scores(scores.len(), None)?;
                params.scores = scores.address();
                3
            }
            TailUnits::Tokens(TokenScores { scores, residuals }, codes) => {
                self.check_scores(scores.len(), Some(residuals.len()))?;
                (params.scores, params.residuals) = (scores.address(), residuals.address());
                match codes {
                    None => 0,
                    Some(codes) => {
                        if !matches!(codes.bits, 1 | 2) {
                            let expected = "1 or 2";
                            return Err(DeviceError::Unsupported {
                                field: "bits",
                                value: codes.bits,
                                expected,
                            });
                        }
                        codes.lines.check("lines", num_pages * codes.bits * head_dim / 2)?;
                        codes.scales.check("scales", num_pages * 16)?;
                        (params.lines, params.scales) = (codes.lines.address(), codes.scales.address());
                        params.rotation = RotationParams::new(&codes.rotation, head_dim)?;
                        codes.bits
                    }
                }
            }
        };
        for (field, address) in [
            ("scores", params.scores),
            ("residuals", params.residuals),
            ("values", params.values),
            ("lines", params.lines),
            ("scales", params.scales),
        ] {
            check_aligned(field, address)?;
        }
        let heads = lane_heads(&self.shape);
        let module = match (E::NAME, heads) {
            ("bf16", 1) => "tail_bf16_h1",
            ("bf16", _) => "tail_bf16_h2",
            (_, 1) => "tail_f16_h1",
            _ => "tail_f16_h2",
        };
        let name = format!("tail_{}_{}_d{head_dim}_h{heads}", ["v0", "v1", "v2", "pages"][unit], E::NAME);
        let how = self.tail[unit];
        let kernel = stream.device().kernel(module, &name, how.shared_bytes)?;
        let blocks = (how.blocks, word("items", items)?);
        let launch = Launch { blocks, threads: how.warps * 32, shared_bytes: how.shared_bytes };
        let together = Together { layers: layers(&self.shape), cluster: 1 };
        // SAFETY: the layouts match, every buffer has the checked shape, and the kernel begins by waiting for earlier ones.
        unsafe { kernel.launch_early(stream, launch, together, &params) }
    }

    /// A tail, and exact attention that runs beside it and joins the tail's state to its own: `state` is that of all tokens of
    /// both. `tail_state` is where the tail's own state lies in between.
    ///
    /// # Errors
    /// As [`Sweep::tail`] and [`sparse_decode`](crate::ops::sparse_decode).
    pub fn tail_and_decode<E: DeviceElem>(
        &mut self,
        stream: &Stream,
        args: &TailArgs<'_, E>,
        mut tail_state: DevState<'_>,
        beside: Beside<'_, E>,
        state: DevState<'_>,
    ) -> Result<(), DeviceError> {
        let between = DevState { out: tail_state.out.reborrow(), lse: tail_state.lse.reborrow() };
        self.tail(stream, args, between)?;
        let join = Some(Join { out: tail_state.out.as_ref(), lse: tail_state.lse.as_ref() });
        let call = SparseCall { args: beside.args, lists: beside.lists, join };
        queue_sparse(stream, beside.plan, &call, When::BesideLast, state)
    }
}
