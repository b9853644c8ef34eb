//! Launcher of `cache_pages`: summaries and sketches of pages.

use half::f16;

use super::{CacheParams, Ingest, Tables};
use crate::device::{DevMut, DevRef, DeviceError, Launch, Stream};
use crate::ops::sweep::{Rotation, RotationParams};
use crate::ops::{DeviceElem, word};

/// Mirrors `floe::PagesParams`.
#[repr(C)]
struct PagesParams {
    cache: CacheParams,
    k: u64,
    v: u64,
    strides: [u64; 4],
    kv: u64,
    out: PageOutParams,
    dtype: u32,
    sequence: u32,
    run_first: u32,
    first_page: u32,
    in_step: u32,
    num_pages: u32,
}

/// Mirrors `floe::PageOut`.
#[repr(C)]
pub(super) struct PageOutParams {
    mean_keys: u64,
    mean_values: u64,
    pub(super) log_count: u64,
    codes: [u64; 4],
    pub(super) masks: u64,
    rotation: RotationParams,
    pub(super) spread: u64,
    key_bits: u32,
    value_bits: u32,
}

/// Which pages, and where their tokens are read.
#[derive(Debug, Clone, Copy)]
pub enum PageSource<'a> {
    /// Pages of a run; earlier tokens of the first one are read from their rows, so this comes before the run is ingested.
    Run {
        /// The run.
        run: &'a Ingest,
        /// First page.
        first: usize,
        /// How many.
        num: usize,
    },
    /// Pages of tokens that all lie in their rows.
    Rows {
        /// Index of the sequence.
        sequence: usize,
        /// First page.
        first: usize,
        /// How many.
        num: usize,
    },
    /// For every entry of the batch the page, if any, whose last token leaves the window with this step.
    Step,
}

/// Summaries of all pages; device, written.
#[derive(Debug)]
pub struct Pages<'a, E> {
    /// Mean keys [pages, head_dim].
    pub mean_keys: DevMut<'a, E>,
    /// Mean values [pages, head_dim].
    pub mean_values: DevMut<'a, E>,
    /// `ln 16`, or -inf for a page of sinks, `[pages]`.
    pub log_count: DevMut<'a, f32>,
    /// Places of each page that hold a token which counts, `[pages]`; `None`: nobody asks.
    pub masks: Option<DevMut<'a, u16>>,
    /// Mean square of the coordinates of the keys' residuals to their mean, `[pages]`, with a sketch as of 16 tokens in any case;
    /// `None`: nobody asks.
    pub spread: Option<DevMut<'a, f32>>,
    /// Sketches of keys and values.
    pub sketch: Option<PageSketch<'a>>,
}

/// Sketches of all tokens, as `floe_index::sketch` encodes and lays them out; device, written.
#[derive(Debug)]
pub struct PageSketch<'a> {
    /// Bits of a key's and of a value's code: 1 or 2, and 0 to 2.
    pub bits: [usize; 2],
    /// Key codes [pages, bits, head_dim / 32, 16].
    pub key_lines: DevMut<'a, u32>,
    /// Key scales [pages, 16].
    pub key_scales: DevMut<'a, f16>,
    /// Value codes [pages, bits, head_dim / 32, 16].
    pub value_lines: DevMut<'a, u32>,
    /// Value scales [pages, 16]; empty without value bits.
    pub value_scales: DevMut<'a, f16>,
    /// Of residuals, before they are encoded.
    pub rotation: Rotation<'a>,
}

impl<E: DeviceElem> Pages<'_, E> {
    /// What kernels take, and the number of pages.
    pub(super) fn params(&self, head_dim: usize) -> Result<(PageOutParams, u32), DeviceError> {
        let num_pages = self.log_count.len();
        self.mean_keys.check("mean_keys", num_pages * head_dim)?;
        self.mean_values.check("mean_values", num_pages * head_dim)?;
        if let Some(masks) = &self.masks {
            masks.check("masks", num_pages)?;
        }
        if let Some(spread) = &self.spread {
            spread.check("spread", num_pages)?;
        }
        let mut out = PageOutParams {
            mean_keys: self.mean_keys.address(),
            mean_values: self.mean_values.address(),
            log_count: self.log_count.address(),
            codes: [0; 4],
            masks: self.masks.as_ref().map_or(0, DevMut::address),
            rotation: RotationParams::NONE,
            spread: self.spread.as_ref().map_or(0, DevMut::address),
            key_bits: 0,
            value_bits: 0,
        };
        if let Some(sketch) = &self.sketch {
            if !matches!(sketch.bits, [1 | 2, 0..=2]) {
                let value = 10 * sketch.bits[0] + sketch.bits[1];
                let expected = "1 or 2 of keys, 0 to 2 of values";
                return Err(DeviceError::Unsupported { field: "bits", value, expected });
            }
            let per_bit = num_pages * head_dim / 2;
            sketch.key_lines.check("key_lines", sketch.bits[0] * per_bit)?;
            sketch.key_scales.check("key_scales", num_pages * 16)?;
            sketch.value_lines.check("value_lines", sketch.bits[1] * per_bit)?;
            sketch.value_scales.check("value_scales", if sketch.bits[1] > 0 { num_pages * 16 } else { 0 })?;
            out.codes = [
                sketch.key_lines.address(),
                sketch.key_scales.address(),
                sketch.value_lines.address(),
                sketch.value_scales.address(),
            ];
            out.rotation = RotationParams::new(&sketch.rotation, head_dim)?;
            [out.key_bits, out.value_bits] = sketch.bits.map(|bits| bits as u32);
        }
        Ok((out, word("pages", num_pages)?))
    }
}

/// Builds pages of 16 consecutive tokens from their rows `kv` [rows, 2, head_dim] or a run of the host engine's.
///
/// # Errors
/// Shapes that do not fit; what the driver reports.
pub fn build_pages<E: DeviceElem>(
    stream: &Stream,
    tables: &Tables<'_>,
    source: PageSource<'_>,
    kv: DevRef<'_, E>,
    pages: Pages<'_, E>,
) -> Result<(), DeviceError> {
    let shape = tables.shape;
    kv.check("kv", kv.len() / shape.row_len() * shape.row_len())?;
    let (out, num_pages) = pages.params(shape.head_dim)?;
    let mut params = PagesParams {
        cache: tables.params()?,
        k: 0,
        v: 0,
        strides: [0; 4],
        kv: kv.address(),
        out,
        dtype: 0,
        sequence: 0,
        run_first: 0,
        first_page: 0,
        in_step: 1,
        num_pages,
    };
    let blocks = match source {
        PageSource::Step => (1, word("items", tables.items())?),
        PageSource::Rows { sequence, first, num } => {
            if sequence >= tables.sequences.len() {
                let expected = "one of the sequences";
                return Err(DeviceError::Unsupported { field: "sequence", value: sequence, expected });
            }
            params.in_step = 0;
            params.sequence = word("sequence", sequence)?;
            params.run_first = u32::MAX;
            params.first_page = word("page", first)?;
            (word("pages", num)?, params.cache.heads)
        }
        PageSource::Run { run, first, num } => {
            let ([k0, k1], [v0, v1]) = (run.k.strides_64(), run.v.strides_64());
            for (field, tensor) in [("k", &run.k), ("v", &run.v)] {
                tensor.expect(field, [run.k.shape()[0], shape.heads, shape.head_dim])?;
            }
            if run.first + run.k.shape()[0] < (first + num) * 16 || run.sequence >= tables.sequences.len() {
                let expected = "pages whose tokens the run holds or follows";
                return Err(DeviceError::Unsupported { field: "page", value: first + num, expected });
            }
            params.in_step = 0;
            (params.k, params.v, params.strides) = (run.k.address(), run.v.address(), [k0, k1, v0, v1]);
            params.dtype = run.k.dtype() as u32;
            params.sequence = word("sequence", run.sequence)?;
            params.run_first = word("position", run.first)?;
            params.first_page = word("page", first)?;
            (word("pages", num)?, params.cache.heads)
        }
    };
    let name = format!("cache_pages_{}_d{}", E::NAME, shape.head_dim);
    let kernel = stream.device().kernel("cache_pages", &name, 0)?;
    // SAFETY: the layouts match, every buffer has the checked shape, and whoever made the tensors vouches for theirs.
    unsafe { kernel.launch(stream, Launch { blocks, threads: 512, shared_bytes: 0 }, &params) }
}
