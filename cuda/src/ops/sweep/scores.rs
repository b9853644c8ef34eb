//! Scores of pages, and of tokens by their key sketches.

use half::f16;

use super::super::decode::Spans;
use super::super::{DeviceElem, check_aligned, word};
use super::{Rotation, RotationParams, ScanShape, Sweep, address, lane_heads, layers};
use crate::KernelError;
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream, Together};

/// Warps of a block, as in the kernels.
pub(super) const WARPS: u32 = 8;

/// Blocks of the scan of sketches that registers let run at once.
pub(super) fn blocks_at_once(shape: &ScanShape) -> u32 {
    if shape.head_dim == 256 || lane_heads(shape) == 2 { 1 } else { 2 }
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

/// Mean keys of all pages.
#[derive(Debug, Clone, Copy)]
pub struct PageKeys<'a, E> {
    /// [num_pages, head_dim] E; device.
    pub keys: DevRef<'a, E>,
    /// Pages of each item; first ones are multiples of 16; device.
    pub pages: Spans<'a>,
}

/// Key sketches of all tokens.
#[derive(Debug, Clone, Copy)]
pub struct KeyCodes<'a> {
    /// Bits of a code: 1, 2 or 4.
    pub bits: usize,
    /// [num_pages, bits, head_dim / 32, 16] u32: the key lines of `floe_index::sketch`, as they are; device.
    pub lines: DevRef<'a, u32>,
    /// [num_pages, 16] f16; device.
    pub scales: DevRef<'a, f16>,
    /// `[num_pages]` bit `t`: token `t` counts; 0: no page; device.
    pub masks: DevRef<'a, u16>,
    /// As the codes were rotated.
    pub rotation: Rotation<'a>,
    /// What a token's score gains per `|q|^2 scale^2 key_scale^2`: the expected effect of its code's error. Finite, usually
    /// `floe_index`'s `token_spread`; 0 for none.
    pub spread: f32,
}

/// Scores of all tokens, to be written.
#[derive(Debug)]
pub struct TokenScoresMut<'a> {
    /// `q.mean_key * scale`, [num_pages / 16, group, 16] f32; device.
    pub scores: DevMut<'a, f32>,
    /// What each token adds to its page's score, [num_pages, group, 16] f16; device.
    pub residuals: DevMut<'a, f16>,
    /// Log-sum-exp of all token scores, [items, group]; device.
    pub lse: DevMut<'a, f32>,
}

/// Mirrors `floe::PageParams`.
#[repr(C)]
struct PageParams {
    q: u64,
    keys: u64,
    log_count: u64,
    first: u64,
    end: u64,
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

/// Mirrors `floe::SketchParams`.
#[repr(C)]
struct SketchParams {
    q: u64,
    keys: u64,
    lines: u64,
    scales: u64,
    masks: u64,
    first: u64,
    end: u64,
    scores: u64,
    residuals: u64,
    part_lse: u64,
    arrived: u64,
    lse: u64,
    rotation: RotationParams,
    scale: f32,
    spread: f32,
    group: u32,
    num_pages: u32,
}

impl Sweep {
    /// Scores of all pages, `q.mean_key * scale + ln count`, to `scores` [num_pages / 16, group, 16] f32, and per head their
    /// log-sum-exp to `lse` [items, group]. `q` is [items, group, head_dim]. Reads every mean key once.
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
        let ScanShape { items, group, head_dim, num_pages, .. } = self.shape;
        let (spreads, spread) = match summaries.spreads {
            Some((spreads, spread)) => {
                spreads.check("spreads", num_pages)?;
                (spreads.address(), spread)
            }
            None => (0, 0.0),
        };
        if let Some(scale) = [scale, spread].into_iter().find(|scale| !scale.is_finite()) {
            return Err(KernelError::Scale { scale }.into());
        }
        q.check("q", items * group * head_dim)?;
        summaries.keys.check("keys", num_pages * head_dim)?;
        summaries.log_count.check("log_count", num_pages)?;
        self.check_spans(&summaries.pages)?;
        self.check_scores(scores.len(), None)?;
        lse.check("lse", items * group)?;
        for (field, address) in
            [("q", q.address()), ("keys", summaries.keys.address()), ("scores", scores.address())]
        {
            check_aligned(field, address)?;
        }
        let params = PageParams {
            q: q.address(),
            keys: summaries.keys.address(),
            log_count: summaries.log_count.address(),
            first: summaries.pages.first.address(),
            end: summaries.pages.end.address(),
            scores: scores.address(),
            part_lse: address(self.part_lse.view_mut()),
            arrived: address(self.arrived.view_mut()),
            lse: lse.address(),
            scale,
            group: word("group", group)?,
            num_pages: word("num_pages", num_pages)?,
            spreads,
            spread,
        };
        let name = format!("page_scores_{}_d{head_dim}", E::NAME);
        let kernel = stream.device().kernel("page_scores", &name, 0)?;
        let blocks = (self.page_blocks, word("items", items)?);
        let launch = Launch { blocks, threads: WARPS * 32, shared_bytes: 0 };
        // SAFETY: the layouts match, every buffer has the checked shape, and the kernel begins by waiting for earlier ones.
        unsafe { kernel.launch_early(stream, launch, Together::ALONE, &params) }
    }

    /// Scores of all pages and tokens: of a page `q.mean_key * scale`, of a token the page's and
    /// `key_scale * (R q).level * scale + spread |q|^2 scale^2 key_scale^2`. `q` is [items, group, head_dim], as it is: the
    /// kernel rotates it and rounds it to eight bits a coordinate.
    ///
    /// Reads every mean key and code once, `head_dim * size_of::<E>() / 16 + bits * head_dim / 8 + 2` bytes a token, and writes
    /// `2 * group` and a sixteenth of `4 * group`.
    ///
    /// # Errors
    /// Shapes that do not fit; bits without a kernel; a scale or spread that is not finite; what the driver reports.
    pub fn token_scores<E: DeviceElem>(
        &mut self,
        stream: &Stream,
        (q, scale): (DevRef<'_, E>, f32),
        means: &PageKeys<'_, E>,
        codes: &KeyCodes<'_>,
        to: TokenScoresMut<'_>,
    ) -> Result<(), DeviceError> {
        let ScanShape { items, group, head_dim, num_pages, .. } = self.shape;
        if !matches!(codes.bits, 1 | 2 | 4) {
            return Err(DeviceError::Unsupported { field: "bits", value: codes.bits, expected: "1, 2 or 4" });
        }
        for scale in [scale, codes.spread] {
            if !scale.is_finite() {
                return Err(KernelError::Scale { scale }.into());
            }
        }
        q.check("q", items * group * head_dim)?;
        means.keys.check("keys", num_pages * head_dim)?;
        self.check_spans(&means.pages)?;
        codes.lines.check("lines", num_pages * codes.bits * head_dim / 2)?;
        codes.scales.check("scales", num_pages * 16)?;
        codes.masks.check("masks", num_pages)?;
        self.check_scores(to.scores.len(), Some(to.residuals.len()))?;
        to.lse.check("lse", items * group)?;
        for (field, address) in [
            ("q", q.address()),
            ("keys", means.keys.address()),
            ("lines", codes.lines.address()),
            ("scales", codes.scales.address()),
            ("residuals", to.residuals.address()),
        ] {
            check_aligned(field, address)?;
        }
        let params = SketchParams {
            q: q.address(),
            keys: means.keys.address(),
            lines: codes.lines.address(),
            scales: codes.scales.address(),
            masks: codes.masks.address(),
            first: means.pages.first.address(),
            end: means.pages.end.address(),
            scores: to.scores.address(),
            residuals: to.residuals.address(),
            part_lse: address(self.part_lse.view_mut()),
            arrived: address(self.arrived.view_mut()),
            lse: to.lse.address(),
            rotation: RotationParams::new(&codes.rotation, head_dim)?,
            scale,
            spread: codes.spread,
            group: word("group", group)?,
            num_pages: word("num_pages", num_pages)?,
        };
        let heads = lane_heads(&self.shape);
        let module = match (E::NAME, heads) {
            ("bf16", 1) => "sketch_scan_bf16_h1",
            ("bf16", _) => "sketch_scan_bf16_h2",
            (_, 1) => "sketch_scan_f16_h1",
            _ => "sketch_scan_f16_h2",
        };
        let name = format!("sketch_scan_k{}_{}_d{head_dim}_h{heads}", codes.bits, E::NAME);
        let kernel = stream.device().kernel(module, &name, 0)?;
        let blocks = (self.scan_blocks, word("items", items)?);
        let launch = Launch { blocks, threads: WARPS * 32, shared_bytes: 0 };
        let together = Together { layers: layers(&self.shape), cluster: 1 };
        // SAFETY: the layouts match, every buffer has the checked shape, and the kernel begins by waiting for earlier ones.
        unsafe { kernel.launch_early(stream, launch, together, &params) }
    }
}
