//! Device memory of one layer.

use std::ops::Range;

use bytemuck::Pod;
use floe_cuda::device::{DevMut, Device, DeviceBuffer, DeviceError, PinnedBuffer, Stream};
use floe_cuda::ops::DeviceElem;
use floe_cuda::ops::cache::{PageSketch, Pages, SequencePlace, Slots};
use floe_cuda::ops::sweep::Rotation;
use half::f16;

use super::ahead::AheadMemory;
use super::classes::LayerClass;
use super::options::GpuOptions;
use super::places::chunks_of;
use super::standing::NodeMemory;

/// Rows, summaries and slots of one layer, all sequences together.
#[derive(Debug)]
pub(super) struct LayerMemory<E> {
    /// [rows, 2, head_dim]
    pub(super) kv: DeviceBuffer<E>,
    /// Addresses of the host chunks, [sequences, chunks].
    pub(super) chunks: DeviceBuffer<u64>,
    pub(super) pages: PageMemory<E>,
    pub(super) slots: SlotMemory,
    pub(super) doubt: DoubtMemory,
    /// Rows on their way for the next step, where steps prefetch.
    pub(super) ahead: Option<AheadMemory>,
    /// Where the host chooses the pages.
    pub(super) nodes: NodeMemory<E>,
}

/// Summaries and sketches of the pages.
#[derive(Debug)]
pub(super) struct PageMemory<E> {
    /// [pages, head_dim]
    pub(super) mean_keys: DeviceBuffer<E>,
    pub(super) mean_values: DeviceBuffer<E>,
    /// `[pages]`
    pub(super) log_count: DeviceBuffer<f32>,
    /// Bits of a key's and a value's code.
    bits: [usize; 2],
    /// Of keys, [pages, bits, head_dim / 32, 16], and their scales [pages, 16].
    pub(super) key_lines: DeviceBuffer<u32>,
    pub(super) key_scales: DeviceBuffer<f16>,
    /// Of values.
    pub(super) value_lines: DeviceBuffer<u32>,
    pub(super) value_scales: DeviceBuffer<f16>,
    /// `[pages]`, with sketches or trees.
    pub(super) masks: DeviceBuffer<u16>,
    /// Mean square of a page's key residuals, `[pages]`, with a sketch or trees.
    pub(super) spread: DeviceBuffer<f32>,
    /// With trees: what a list says of each place [pages, 16], and pages of each tree [sequences, heads].
    pub(super) tokens: DeviceBuffer<u32>,
    pub(super) tree_pages: DeviceBuffer<u32>,
}

/// Which token lies in which slot.
#[derive(Debug)]
pub(super) struct SlotMemory {
    /// `[16 pages]`, `[rows]`, `[rows]`, [sequences, heads]
    pub(super) row_of_token: DeviceBuffer<u32>,
    pub(super) token_of_row: DeviceBuffer<u32>,
    pub(super) used: DeviceBuffer<u32>,
    pub(super) hand: DeviceBuffer<u32>,
    /// Rows found in slots, rows fetched, rows fetched ahead.
    pub(super) counters: DeviceBuffer<u64>,
}

/// How far the layer's estimated logits may be off, and how often that was too far.
#[derive(Debug)]
pub(super) struct DoubtMemory {
    /// Spreads summed up, [sequences, heads]; see `floe_cuda::ops::cache::DoubtCheck`.
    pub(super) sums: DeviceBuffer<[u32; 2]>,
    /// Steps of single heads that attended everything for that reason.
    pub(super) doubted: DeviceBuffer<u64>,
    /// 1 once there was one; page-locked, so that the host sees it without waiting.
    pub(super) noticed: PinnedBuffer<u32>,
    warned: bool,
}

impl DoubtMemory {
    fn new(device: &Device, sums: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            sums: DeviceBuffer::zeros(device, sums)?,
            doubted: DeviceBuffer::zeros(device, 1)?,
            noticed: PinnedBuffer::zeros(device, 1)?,
            warned: false,
        })
    }

    /// Says once that the layer has heads in doubt: in the first step of it that is queued after one was seen.
    pub(super) fn warn(&mut self, layer: usize) {
        if !self.warned && self.noticed.peek(0) == Some(1) {
            self.warned = true;
            tracing::warn!(
                layer,
                "estimates are too coarse for queries of this layer: its heads in doubt attend everything (max_doubt)"
            );
        }
    }
}

impl<E: DeviceElem> LayerMemory<E> {
    /// Of a layer of a class.
    pub(super) fn new(
        device: &Device,
        class: &LayerClass,
        options: &GpuOptions,
    ) -> Result<Self, DeviceError> {
        let (plan, chunks) = (&class.plan, chunks_of(options.max_tokens));
        let (dim, heads) = (plan.shape.head_dim, plan.shape.heads);
        let pages = if plan.exact { 0 } else { options.page_tokens / 16 };
        let bits = plan.bits;
        let sketched = |bits: usize| if bits > 0 { pages } else { 0 };
        let rows = if plan.exact { 0 } else { class.rows };
        let items = options.max_batch.next_power_of_two() * heads;
        let ahead = || AheadMemory::new(device, plan, items);
        let mut memory = Self {
            kv: DeviceBuffer::zeros(device, class.rows * 2 * dim)?,
            chunks: DeviceBuffer::zeros(device, options.max_sequences * chunks)?,
            pages: PageMemory {
                mean_keys: DeviceBuffer::zeros(device, pages * dim)?,
                mean_values: DeviceBuffer::zeros(device, pages * dim)?,
                log_count: DeviceBuffer::zeros(device, pages)?,
                bits,
                key_lines: DeviceBuffer::zeros(device, bits[0] * pages * dim / 2)?,
                key_scales: DeviceBuffer::zeros(device, sketched(bits[0]) * 16)?,
                value_lines: DeviceBuffer::zeros(device, bits[1] * pages * dim / 2)?,
                value_scales: DeviceBuffer::zeros(device, sketched(bits[1]) * 16)?,
                masks: DeviceBuffer::zeros(device, if plan.tree { pages } else { sketched(bits[0]) })?,
                spread: DeviceBuffer::zeros(device, if plan.tree { pages } else { sketched(bits[0]) })?,
                tokens: DeviceBuffer::zeros(device, if plan.tree { pages * 16 } else { 0 })?,
                tree_pages: DeviceBuffer::zeros(
                    device,
                    if plan.tree { options.max_sequences * heads } else { 0 },
                )?,
            },
            slots: SlotMemory {
                row_of_token: DeviceBuffer::zeros(device, plan.token_words(options, pages))?,
                token_of_row: DeviceBuffer::zeros(device, rows)?,
                used: DeviceBuffer::zeros(device, rows)?,
                hand: DeviceBuffer::zeros(device, options.max_sequences * heads)?,
                counters: DeviceBuffer::zeros(device, 3)?,
            },
            doubt: DoubtMemory::new(device, options.max_sequences * heads)?,
            ahead: (plan.prefetch > 0).then(ahead).transpose()?,
            nodes: NodeMemory::new(device, plan.nodes(options), dim)?,
        };
        let stream = Stream::new(device)?;
        memory.slots.row_of_token.fill_bytes(0xff, &stream)?;
        memory.slots.token_of_row.fill_bytes(0xff, &stream)?;
        stream.synchronize()?;
        Ok(memory)
    }

    /// Bytes held: rows, and everything beside them.
    pub(super) fn size_bytes(&self) -> (usize, usize) {
        let (pages, slots) = (&self.pages, &self.slots);
        let means = pages.mean_keys.view().len() + pages.mean_values.view().len();
        let words = [
            &pages.key_lines,
            &pages.value_lines,
            &pages.tokens,
            &pages.tree_pages,
            &slots.row_of_token,
            &slots.token_of_row,
            &slots.used,
            &slots.hand,
        ];
        let nodes = self.nodes.mean_keys.view().len() + self.nodes.mean_values.view().len();
        let beside = (means + nodes) * size_of::<E>()
            + self.nodes.log_count.view().len() * 8
            + words.map(|words| words.view().len() * 4).iter().sum::<usize>()
            + (pages.log_count.view().len() + pages.spread.view().len()) * 4
            + self.chunks.view().len() * 8
            + [&pages.key_scales, &pages.value_scales]
                .map(|scales| scales.view().len() * 2)
                .iter()
                .sum::<usize>()
            + pages.masks.view().len() * 2;
        (self.kv.view().len() * size_of::<E>(), beside)
    }
}

impl<E: DeviceElem> PageMemory<E> {
    /// Queues a copy of everything that is kept of `from` (pages) to the pages from `to` on.
    pub(super) fn copy(&mut self, from: Range<usize>, to: usize, stream: &Stream) -> Result<(), DeviceError> {
        let pages = self.log_count.view().len();
        let part = |len: usize| {
            let each = len / pages.max(1);
            (from.start * each..from.end * each, to * each)
        };
        copy_part(&mut self.mean_keys, part, stream)?;
        copy_part(&mut self.mean_values, part, stream)?;
        copy_part(&mut self.log_count, part, stream)?;
        copy_part(&mut self.key_lines, part, stream)?;
        copy_part(&mut self.key_scales, part, stream)?;
        copy_part(&mut self.value_lines, part, stream)?;
        copy_part(&mut self.value_scales, part, stream)?;
        copy_part(&mut self.masks, part, stream)?;
        copy_part(&mut self.spread, part, stream)
    }

    pub(super) fn write<'a>(&'a mut self, rotation: Option<Rotation<'a>>) -> Pages<'a, E> {
        self.write_tree(rotation).0
    }

    /// The pages, and what a list says of their places.
    pub(super) fn write_tree<'a>(
        &'a mut self,
        rotation: Option<Rotation<'a>>,
    ) -> (Pages<'a, E>, DevMut<'a, u32>) {
        let tokens = self.tokens.view_mut();
        let pages = Pages {
            mean_keys: self.mean_keys.view_mut(),
            mean_values: self.mean_values.view_mut(),
            log_count: self.log_count.view_mut(),
            masks: some(&mut self.masks),
            spread: some(&mut self.spread),
            sketch: rotation.map(|rotation| PageSketch {
                bits: self.bits,
                key_lines: self.key_lines.view_mut(),
                key_scales: self.key_scales.view_mut(),
                value_lines: self.value_lines.view_mut(),
                value_scales: self.value_scales.view_mut(),
                rotation,
            }),
        };
        (pages, tokens)
    }
}

/// A buffer that is there.
fn some<T>(buffer: &mut DeviceBuffer<T>) -> Option<DevMut<'_, T>> {
    let view = buffer.view_mut();
    (!view.is_empty()).then_some(view)
}

fn copy_part<T: Pod>(
    buffer: &mut DeviceBuffer<T>,
    part: impl Fn(usize) -> (Range<usize>, usize),
    stream: &Stream,
) -> Result<(), DeviceError> {
    let (from, to) = part(buffer.view().len());
    if from.is_empty() { Ok(()) } else { buffer.copy_within(from, to, stream) }
}

impl SlotMemory {
    /// No slot of a place of so many kv heads holds anything.
    pub(super) fn forget(
        &mut self,
        place: &SequencePlace,
        heads: usize,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let (first, each) = (place.tokens as usize, place.tokens_each as usize);
        let rows = place.rows as usize..place.rows as usize + place.rows_each as usize * heads;
        self.row_of_token.fill_range(first..first + each * heads, 0xff, stream)?;
        self.token_of_row.fill_range(rows.clone(), 0xff, stream)?;
        self.used.fill_range(rows, 0, stream)
    }

    pub(super) fn write(&mut self) -> Slots<'_> {
        Slots {
            row_of_token: self.row_of_token.view_mut(),
            token_of_row: self.token_of_row.view_mut(),
            used: self.used.view_mut(),
            hand: self.hand.view_mut(),
            counters: self.counters.view_mut(),
        }
    }
}
