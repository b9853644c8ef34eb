//! Launchers of the scans over page summaries and key sketches: page scores, token scores, the best under a budget, the tail.
//!
//! ```text
//! page_scores ─ per page ─> select_topk ─ pages ─> sparse_decode ─┐
//!      │                        └─ the others ──> page_tail ──────┴─> merge_states
//!      └─ with sketch_scores: per token, the same way
//! ```
//! Scores lie in tiles of 16 units, [tiles, group, 16]: f32, a unit is a page; or f16, a tile is a page and a unit a token,
//! relative to the pages' log-sum-exp of the head. -inf: does not exist, must not be selected, or has been selected.

use half::f16;

use super::decode::{DevState, Spans};
use super::{DeviceElem, check_aligned, check_head_dim, word};
use crate::KernelError;
use crate::device::{DevMut, DevRef, Device, DeviceBuffer, DeviceError, Launch, Stream, Together};

/// As in the kernels.
const SCORE_WARPS: u32 = 8;
const SELECT_UNITS: u32 = 4096;
/// Units up to which one block selects for an item: 16 K of them took it less time than three launches, and keys of 64 K fit
/// into shared memory.
const SELECT_ONE_MAX: u32 = 16_384;
const BINS: usize = 4096;
const TAIL_PAGES: u32 = 128;

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

/// Device memory of the scans, allocated once for a shape.
#[derive(Debug)]
pub struct Scan {
    shape: ScanShape,
    part_lse: DeviceBuffer<f32>,
    part_out: DeviceBuffer<f32>,
    arrived: DeviceBuffer<u32>,
    histogram: DeviceBuffer<u32>,
    counts: DeviceBuffer<u32>,
    threshold: DeviceBuffer<u32>,
    keys: DeviceBuffer<u16>,
    score_blocks: u32,
    sketch_blocks: u32,
    tail_blocks: u32,
}

/// Scores to be selected from, or to weigh the tail with.
#[derive(Debug)]
pub enum Scores<'a> {
    /// [num_pages / 16, group, 16] f32, with ln count.
    Pages(DevMut<'a, f32>),
    /// [num_pages, group, 16] f16, relative to the pages' lse.
    Tokens(DevMut<'a, f16>),
}

/// Summaries of all pages.
#[derive(Debug, Clone, Copy)]
pub struct Summaries<'a, E> {
    /// Mean keys, [num_pages, head_dim] E; device.
    pub keys: DevRef<'a, E>,
    /// Natural log of the tokens of each page, `[num_pages]`; -inf = no page; device.
    pub log_count: DevRef<'a, f32>,
    /// Pages of each item; first ones are multiples of 16.
    pub pages: Spans<'a>,
    /// Mean squared deviation of a coordinate of each page's keys from their mean, `[pages]`, device, and what a score gains per
    /// `|q|^2 scale^2` times it, finite; `None`: nothing.
    pub spreads: Option<(DevRef<'a, f32>, f32)>,
}

/// Key sketches of all tokens.
#[derive(Debug, Clone, Copy)]
pub struct KeySketches<'a> {
    /// Bits of a code: 1, 2 or 4.
    pub bits: usize,
    /// [num_pages, bits, head_dim / 32, 16] u32: the key lines of `floe_index::sketch`, as they are; device.
    pub lines: DevRef<'a, u32>,
    /// [num_pages, 16] f16; device.
    pub scales: DevRef<'a, f16>,
    /// `[num_pages]` bit `t`: token `t` counts; device.
    pub masks: DevRef<'a, u16>,
}

/// Mirrors `floe::ScoreParams`.
#[repr(C)]
struct ScoreParams {
    q: u64,
    keys: u64,
    scales: u64,
    log_count: u64,
    masks: u64,
    first: u64,
    end: u64,
    page_scores: u64,
    scores: u64,
    part_lse: u64,
    arrived: u64,
    lse: u64,
    scale: f32,
    group: u32,
    num_pages: u32,
    spreads: u64,
    spread: f32,
}

/// Mirrors `floe::TailParams`.
#[repr(C)]
struct TailParams {
    scores: u64,
    values: u64,
    lse: u64,
    first: u64,
    end: u64,
    part_out: u64,
    part_sum: u64,
    arrived: u64,
    out: u64,
    out_lse: u64,
    group: u32,
    num_pages: u32,
}

/// Mirrors `floe::SelectParams`.
#[repr(C)]
struct SelectParams {
    scores: u64,
    lse: u64,
    first: u64,
    end: u64,
    ids: u64,
    keys: u64,
    histogram: u64,
    counts: u64,
    threshold: u64,
    arrived: u64,
    list_first: u64,
    list_end: u64,
    list: u64,
    group: u32,
    budget: u32,
    num_units: u32,
    list_len: u32,
    units_max: u32,
}

/// What to select and where to put it.
#[derive(Debug)]
pub struct Select<'a> {
    /// Pages of each item.
    pub pages: Spans<'a>,
    /// [items, group] to subtract from page scores; `None` for token scores, which are relative already.
    pub lse: Option<DevRef<'a, f32>>,
    /// What the list says of a unit, `[units]`; `None`: its number. Device.
    pub ids: Option<DevRef<'a, u32>>,
    /// Units of an item at most.
    pub budget: u32,
    /// Where each item's list begins in `list`, `[items]`; device.
    pub list_first: DevRef<'a, u32>,
    /// Where it ends, `[items]`, written; device.
    pub list_end: DevMut<'a, u32>,
    /// Room for `budget` entries an item; device.
    pub list: DevMut<'a, u32>,
}

/// Memory of `page_scores` between blocks, and their number.
pub(super) struct PageParts {
    pub(super) part_lse: u64,
    pub(super) arrived: u64,
    pub(super) blocks: u32,
}

/// Queries with their scale, and what they are compared with.
type PageQuery<'a, 's, E> = ((DevRef<'a, E>, f32), &'s Summaries<'a, E>);

/// See [`Scan::page_scores`].
pub(super) fn queue_page_scores<E: DeviceElem>(
    stream: &Stream,
    shape: &ScanShape,
    parts: &PageParts,
    ((q, scale), summaries): PageQuery<'_, '_, E>,
    (scores, lse): (DevMut<'_, f32>, DevMut<'_, f32>),
) -> Result<(), DeviceError> {
    let ScanShape { items, group, head_dim, num_pages, .. } = *shape;
    let (spreads, spread) = match summaries.spreads {
        Some((spreads, spread)) => {
            spreads.check("spreads", num_pages)?;
            (spreads.address(), spread)
        }
        None => (0, 0.0),
    };
    for scale in [scale, spread] {
        if !scale.is_finite() {
            return Err(KernelError::Scale { scale }.into());
        }
    }
    q.check("q", items * group * head_dim)?;
    summaries.keys.check("keys", num_pages * head_dim)?;
    summaries.log_count.check("log_count", num_pages)?;
    summaries.pages.first.check("first", items)?;
    summaries.pages.end.check("end", items)?;
    scores.check("scores", num_pages * group)?;
    lse.check("lse", items * group)?;
    for (field, address) in
        [("q", q.address()), ("keys", summaries.keys.address()), ("scores", scores.address())]
    {
        check_aligned(field, address)?;
    }
    let params = ScoreParams {
        q: q.address(),
        keys: summaries.keys.address(),
        scales: 0,
        log_count: summaries.log_count.address(),
        masks: 0,
        first: summaries.pages.first.address(),
        end: summaries.pages.end.address(),
        page_scores: 0,
        scores: scores.address(),
        part_lse: parts.part_lse,
        arrived: parts.arrived,
        lse: lse.address(),
        scale,
        group: word("group", group)?,
        num_pages: word("num_pages", num_pages)?,
        spreads,
        spread,
    };
    let kernel = stream.device().kernel("page_scores", &format!("page_scores_{}_d{head_dim}", E::NAME), 0)?;
    let launch =
        Launch { blocks: (parts.blocks, word("items", items)?), threads: SCORE_WARPS * 32, shared_bytes: 0 };
    // SAFETY: the layouts match, every buffer has the checked shape, and the kernel begins by waiting for earlier ones.
    unsafe { kernel.launch_early(stream, launch, Together { layers: 1, cluster: 1 }, &params) }
}

impl Scan {
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
        let pages = word("pages_max", shape.pages_max)?;
        word("tokens", shape.num_pages * 16)?;
        // Enough blocks to fill the device a few times over, and no more: each ends with a join.
        let per_item = |per_multiprocessor: u32, blocks: u32| {
            let fill = (device.properties().multiprocessors * per_multiprocessor).div_ceil(items.max(1));
            blocks.min(fill).max(1)
        };
        let score_blocks = per_item(3, pages.div_ceil(16 * SCORE_WARPS));
        let tail_blocks = per_item(2, pages.div_ceil(TAIL_PAGES));
        let states = shape.items * tail_blocks.max(score_blocks) as usize * shape.group;
        let select_blocks = (pages * 16).div_ceil(SELECT_UNITS).max(1) as usize;
        Ok(Self {
            part_lse: DeviceBuffer::zeros(device, states)?,
            part_out: DeviceBuffer::zeros(
                device,
                shape.items * tail_blocks as usize * shape.group * shape.head_dim,
            )?,
            arrived: DeviceBuffer::zeros(device, 2 * shape.items)?,
            histogram: DeviceBuffer::zeros(device, shape.items * BINS)?,
            counts: DeviceBuffer::zeros(device, 2 * shape.items * select_blocks)?,
            threshold: DeviceBuffer::zeros(device, 2 * shape.items)?,
            keys: DeviceBuffer::zeros(device, shape.num_pages * 16)?,
            score_blocks,
            sketch_blocks: per_item(4, pages.div_ceil(SCORE_WARPS)),
            tail_blocks,
            shape,
        })
    }

    fn check_spans(&self, pages: &Spans<'_>) -> Result<(), KernelError> {
        pages.first.check("first", self.shape.items)?;
        pages.end.check("end", self.shape.items)
    }

    /// Scores of all pages, `q.mean_key * scale + ln count`, to `scores` [num_pages / 16, group, 16] f32, and per head their
    /// log-sum-exp to `lse` [items, group]. `q` is [items, group, head_dim].
    ///
    /// Reads every mean key once.
    ///
    /// # Errors
    /// Shapes that do not fit; a scale that is not finite; what the driver reports.
    pub fn page_scores<E: DeviceElem>(
        &mut self,
        stream: &Stream,
        (q, scale): (DevRef<'_, E>, f32),
        summaries: &Summaries<'_, E>,
        scores: DevMut<'_, f32>,
        lse: DevMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let parts = PageParts {
            part_lse: self.part_lse.view_mut().address(),
            arrived: self.arrived.view_mut().address(),
            blocks: self.score_blocks,
        };
        queue_page_scores(stream, &self.shape, &parts, ((q, scale), summaries), (scores, lse))
    }

    /// Scores of all tokens, relative to the pages' `lse`, to `scores` [num_pages, group, 16] f16:
    /// `(page score - ln count) + key_scale * q.level - lse`. `q` [items, group, head_dim] f16 is rotated as the sketches are and
    /// multiplied with the softmax scale.
    ///
    /// Reads every code once: `bits * head_dim / 8 + 2` bytes a token, and writes `2 * group`.
    ///
    /// # Errors
    /// Shapes that do not fit; bits without a kernel; what the driver reports.
    pub fn sketch_scores(
        &mut self,
        stream: &Stream,
        q: DevRef<'_, f16>,
        sketches: &KeySketches<'_>,
        pages: &PageScores<'_>,
        scores: DevMut<'_, f16>,
    ) -> Result<(), DeviceError> {
        let ScanShape { items, group, head_dim, num_pages, .. } = self.shape;
        let KeySketches { bits, lines, scales, masks } = *sketches;
        if !matches!(bits, 1 | 2 | 4) {
            return Err(DeviceError::Unsupported { field: "bits", value: bits, expected: "1, 2 or 4" });
        }
        q.check("q", items * group * head_dim)?;
        lines.check("lines", num_pages * bits * head_dim / 2)?;
        scales.check("scales", num_pages * 16)?;
        masks.check("masks", num_pages)?;
        pages.scores.check("page scores", num_pages * group)?;
        pages.log_count.check("log_count", num_pages)?;
        pages.lse.check("lse", items * group)?;
        self.check_spans(&pages.pages)?;
        scores.check("scores", num_pages * group * 16)?;
        for (field, address) in
            [("lines", lines.address()), ("scales", scales.address()), ("scores", scores.address())]
        {
            check_aligned(field, address)?;
        }
        let params = ScoreParams {
            q: q.address(),
            keys: lines.address(),
            scales: scales.address(),
            log_count: pages.log_count.address(),
            masks: masks.address(),
            first: pages.pages.first.address(),
            end: pages.pages.end.address(),
            page_scores: pages.scores.address(),
            scores: scores.address(),
            part_lse: 0,
            arrived: 0,
            lse: pages.lse.address(),
            scale: 1.0,
            group: word("group", group)?,
            num_pages: word("num_pages", num_pages)?,
            spreads: 0,
            spread: 0.0,
        };
        let kernel =
            stream.device().kernel("sketch_scores", &format!("sketch_scores_k{bits}_d{head_dim}"), 0)?;
        let blocks = (self.sketch_blocks, word("items", items)?);
        let launch = Launch { blocks, threads: SCORE_WARPS * 32, shared_bytes: 0 };
        // SAFETY: the layouts match and every buffer has the checked shape.
        unsafe { kernel.launch(stream, launch, &params) }
    }

    /// The best units of each item: by the largest score over the group (less `lse`), in steps of 1/128 nat from -24 to 8, equal
    /// steps by number. The list holds first those above the last step taken, then those of that step, each by number. The
    /// scores of what was selected become -inf.
    ///
    /// # Errors
    /// Shapes that do not fit; what the driver reports.
    pub fn select_topk(
        &mut self,
        stream: &Stream,
        select: Select<'_>,
        scores: Scores<'_>,
    ) -> Result<(), DeviceError> {
        let ScanShape { items, group, num_pages, pages_max, .. } = self.shape;
        self.check_spans(&select.pages)?;
        let (suffix, address, per_page) = match &scores {
            Scores::Pages(scores) => {
                scores.check("scores", num_pages * group)?;
                ("f32", scores.address(), 1)
            }
            Scores::Tokens(scores) => {
                scores.check("scores", num_pages * group * 16)?;
                ("f16", scores.address(), 16)
            }
        };
        if let Some(lse) = select.lse {
            lse.check("lse", items * group)?;
        }
        if let Some(ids) = select.ids {
            ids.check("ids", num_pages * per_page)?;
        }
        select.list_first.check("list_first", items)?;
        select.list_end.check("list_end", items)?;
        let params = SelectParams {
            scores: address,
            lse: select.lse.map_or(0, |lse| lse.address()),
            first: select.pages.first.address(),
            end: select.pages.end.address(),
            ids: select.ids.map_or(0, |ids| ids.address()),
            keys: self.keys.view_mut().address(),
            histogram: self.histogram.view_mut().address(),
            counts: self.counts.view_mut().address(),
            threshold: self.threshold.view_mut().address(),
            arrived: self.arrived.view_mut().address(),
            list_first: select.list_first.address(),
            list_end: select.list_end.address(),
            list: select.list.address(),
            group: word("group", group)?,
            budget: select.budget,
            num_units: word("units", num_pages * per_page)?,
            list_len: word("list", select.list.len())?,
            units_max: word("units", pages_max * per_page)?,
        };
        if params.units_max <= SELECT_ONE_MAX {
            let shared_bytes = 2 * params.units_max;
            let kernel =
                stream.device().kernel("select_topk", &format!("select_one_{suffix}"), 2 * SELECT_ONE_MAX)?;
            let launch = Launch { blocks: (1, word("items", items)?), threads: 1024, shared_bytes };
            // SAFETY: the layouts match and every buffer has the checked shape.
            return unsafe { kernel.launch(stream, launch, &params) };
        }
        let blocks = word("units", pages_max * per_page)?.div_ceil(SELECT_UNITS).max(1);
        let launch = Launch { blocks: (blocks, word("items", items)?), threads: 512, shared_bytes: 0 };
        for name in
            [format!("select_keys_{suffix}"), "select_count".to_owned(), format!("select_list_{suffix}")]
        {
            let kernel = stream.device().kernel("select_topk", &name, 0)?;
            // SAFETY: the layouts match and every buffer has the checked shape.
            unsafe { kernel.launch(stream, launch, &params)? };
        }
        Ok(())
    }

    /// The state of all units that were not selected, each represented by its page's mean value: `values` [num_pages, head_dim].
    ///
    /// # Errors
    /// Shapes that do not fit; what the driver reports.
    pub fn page_tail<E: DeviceElem>(
        &mut self,
        stream: &Stream,
        scores: &Scores<'_>,
        values: DevRef<'_, E>,
        pages: &PageScores<'_>,
        state: DevState<'_>,
    ) -> Result<(), DeviceError> {
        let ScanShape { items, group, head_dim, num_pages, .. } = self.shape;
        values.check("values", num_pages * head_dim)?;
        pages.lse.check("lse", items * group)?;
        self.check_spans(&pages.pages)?;
        state.out.check("out", items * group * head_dim)?;
        state.lse.check("lse", items * group)?;
        let (unit, address) = match scores {
            Scores::Pages(scores) => {
                scores.check("scores", num_pages * group)?;
                ("pages", scores.address())
            }
            Scores::Tokens(scores) => {
                scores.check("scores", num_pages * group * 16)?;
                ("tokens", scores.address())
            }
        };
        check_aligned("scores", address)?;
        check_aligned("values", values.address())?;
        let params = TailParams {
            scores: address,
            values: values.address(),
            lse: pages.lse.address(),
            first: pages.pages.first.address(),
            end: pages.pages.end.address(),
            part_out: self.part_out.view_mut().address(),
            part_sum: self.part_lse.view_mut().address(),
            arrived: self.arrived.view_mut().address(),
            out: state.out.address(),
            out_lse: state.lse.address(),
            group: word("group", group)?,
            num_pages: word("num_pages", num_pages)?,
        };
        let width = if group <= 8 { 8 } else { 16 };
        let name = format!("page_tail_{unit}_{}_d{head_dim}_g{width}", E::NAME);
        let kernel = stream.device().kernel("page_tail", &name, 0)?;
        let blocks = (self.tail_blocks, word("items", items)?);
        let launch = Launch { blocks, threads: 256, shared_bytes: 0 };
        // SAFETY: the layouts match and every buffer has the checked shape.
        unsafe { kernel.launch(stream, launch, &params) }
    }
}

/// What `page_scores` wrote, for those that build on it.
#[derive(Debug, Clone, Copy)]
pub struct PageScores<'a> {
    /// [num_pages / 16, group, 16] f32; device. Not read by `page_tail`.
    pub scores: DevRef<'a, f32>,
    /// `[num_pages]`; device. Not read by `page_tail`.
    pub log_count: DevRef<'a, f32>,
    /// [items, group]; device.
    pub lse: DevRef<'a, f32>,
    /// Pages of each item.
    pub pages: Spans<'a>,
}
