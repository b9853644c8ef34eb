//! Sixteen summaries side by side: the unit of scoring at every level of the tree.
//!
//! A block holds 16 entries (pages, super-nodes, or single young tokens). Keys are stored by quads of dimensions so that
//! one 512-bit register holds four dimensions of all 16 entries and no horizontal sum is ever needed; values are stored
//! row by row, as the tail reads them. Entry `e` lies in block `e / 16`, lane `e % 16`. An entry with count 0 is empty.

use half::bf16;

use crate::error::IndexError;
use crate::grow::grow_by;
use crate::index::MAX_DIM;
use crate::quant::{QUAD, ZERO, quads_of, quantise};
use crate::simd::Isa;
use crate::simd::prefetch::prefetch;
use crate::snapshot::{Reader, Writer};

/// Entries in a block.
pub(crate) const LANES: usize = 16;

/// Summaries in blocks of 16; all arrays grow together.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Blocks {
    pub dim: usize,
    /// `[blocks, quads, 16, 4]` key codes, offset by 128.
    pub key_codes: Vec<u8>,
    /// `[blocks * 16]`
    pub key_scale: Vec<f32>,
    /// `[blocks * 16]` squared length of the key as stored.
    pub key_norm: Vec<f32>,
    /// `[blocks * 16]` mean squared deviation of a coordinate of the tokens' keys from the mean.
    pub spread: Vec<f32>,
    /// `[blocks * 16]` the same of the token that deviates most.
    pub reach: Vec<bf16>,
    /// `[blocks * 16, dim]`
    pub value_codes: Vec<i8>,
    /// `[blocks * 16]`
    pub value_scale: Vec<f32>,
    /// `[blocks * 16]` tokens below the entry.
    pub count: Vec<u32>,
    /// `[blocks * 16]` page, block of the level below, or token id.
    pub child: Vec<u32>,
}

impl Blocks {
    pub fn new(dim: usize) -> Self {
        Self { dim, ..Self::default() }
    }

    pub fn num_blocks(&self) -> usize {
        self.count.len() / LANES
    }

    /// Bytes of key codes in one block.
    pub fn key_stride(&self) -> usize {
        quads_of(self.dim) * QUAD * LANES
    }

    /// Adds `num` empty blocks and returns the first one's index.
    pub fn add_blocks(&mut self, num: usize) -> usize {
        let first = self.num_blocks();
        let entries = num * LANES;
        let stride = self.key_stride();
        grow_by(&mut self.key_codes, num * stride, ZERO);
        grow_by(&mut self.key_scale, entries, 0.0);
        grow_by(&mut self.key_norm, entries, 0.0);
        grow_by(&mut self.spread, entries, 0.0);
        grow_by(&mut self.reach, entries, bf16::ZERO);
        grow_by(&mut self.value_codes, entries * self.dim, 0);
        grow_by(&mut self.value_scale, entries, 0.0);
        grow_by(&mut self.count, entries, 0);
        grow_by(&mut self.child, entries, u32::MAX);
        first
    }

    /// Key codes `[quads, 16, 4]` of a block.
    pub fn block_keys(&self, block: usize) -> &[u8] {
        let stride = self.key_stride();
        &self.key_codes[block * stride..(block + 1) * stride]
    }

    /// Range of a block's entries in the arrays by entry.
    pub fn entries(block: usize) -> std::ops::Range<usize> {
        block * LANES..(block + 1) * LANES
    }

    /// Starts loading what scoring a block reads.
    pub fn prefetch_keys(&self, block: usize) {
        prefetch(self.block_keys(block));
        let entries = Self::entries(block);
        prefetch(&self.key_scale[entries.clone()]);
        prefetch(&self.spread[entries.clone()]);
        prefetch(&self.reach[entries.clone()]);
        prefetch(&self.count[entries]);
    }

    /// Reach `[16]` of a block's entries.
    pub fn block_reach(&self, block: usize) -> [f32; LANES] {
        std::array::from_fn(|lane| self.reach[block * LANES + lane].to_f32())
    }

    /// Value codes `[16, dim]` of a block.
    pub fn block_values(&self, block: usize) -> &[i8] {
        &self.value_codes[block * LANES * self.dim..(block + 1) * LANES * self.dim]
    }

    /// First unused lane of a block, as an entry. A node whose tokens were all removed keeps its place.
    pub fn free_entry(&self, block: usize) -> Option<usize> {
        Self::entries(block).find(|&e| self.child[e] == u32::MAX)
    }

    /// Writes an entry from `key` and `value` `[dim]` f32.
    pub fn set(&mut self, entry: usize, summary: Summary<'_>) {
        let (dim, isa) = (self.dim, Isa::detect());
        let (codes, scale) = self.value_slot(entry);
        *scale = quantise(isa, summary.value, codes);
        let mut row = [0i8; MAX_DIM];
        let row = &mut row[..dim];
        self.key_scale[entry] = quantise(isa, summary.key, row);
        let base = (entry / LANES) * self.key_stride() + (entry % LANES) * QUAD;
        for (quad, codes) in row.chunks(QUAD).enumerate() {
            for (slot, &code) in self.key_codes[base + quad * LANES * QUAD..].iter_mut().zip(codes) {
                *slot = (code as u8) ^ ZERO;
            }
        }
        self.key_norm[entry] = self.norm_of(entry);
        self.spread[entry] = summary.spread;
        self.reach[entry] = bf16::from_f32(summary.reach);
        self.count[entry] = summary.count;
        self.child[entry] = summary.child;
    }

    fn value_slot(&mut self, entry: usize) -> (&mut [i8], &mut f32) {
        let dim = self.dim;
        (&mut self.value_codes[entry * dim..(entry + 1) * dim], &mut self.value_scale[entry])
    }

    /// Empties an entry.
    pub fn clear(&mut self, entry: usize) {
        let dim = self.dim;
        let base = (entry / LANES) * self.key_stride() + (entry % LANES) * QUAD;
        for d in 0..dim {
            self.key_codes[base + (d / QUAD) * LANES * QUAD + d % QUAD] = ZERO;
        }
        self.value_codes[entry * dim..(entry + 1) * dim].fill(0);
        self.key_scale[entry] = 0.0;
        self.key_norm[entry] = 0.0;
        self.spread[entry] = 0.0;
        self.reach[entry] = bf16::ZERO;
        self.value_scale[entry] = 0.0;
        self.count[entry] = 0;
        self.child[entry] = u32::MAX;
    }

    /// Copies an entry to another place, codes and all.
    pub fn copy(&mut self, from: usize, to: usize) {
        let (dim, stride) = (self.dim, self.key_stride());
        let base = |e: usize| (e / LANES) * stride + (e % LANES) * QUAD;
        for quad in 0..quads_of(dim) {
            let (a, b) = (base(from) + quad * LANES * QUAD, base(to) + quad * LANES * QUAD);
            self.key_codes.copy_within(a..a + QUAD, b);
        }
        self.value_codes.copy_within(from * dim..(from + 1) * dim, to * dim);
        self.key_scale[to] = self.key_scale[from];
        self.key_norm[to] = self.key_norm[from];
        self.spread[to] = self.spread[from];
        self.reach[to] = self.reach[from];
        self.value_scale[to] = self.value_scale[from];
        self.count[to] = self.count[from];
        self.child[to] = self.child[from];
    }

    /// Key of an entry as f32 `[dim]`.
    pub fn read_key(&self, entry: usize, out: &mut [f32]) {
        let base = (entry / LANES) * self.key_stride() + (entry % LANES) * QUAD;
        let scale = self.key_scale[entry];
        for (d, o) in out.iter_mut().enumerate() {
            let code = self.key_codes[base + (d / QUAD) * LANES * QUAD + d % QUAD];
            *o = (i32::from(code) - i32::from(ZERO)) as f32 * scale;
        }
    }

    /// Value of an entry as f32 `[dim]`.
    pub fn read_value(&self, entry: usize, out: &mut [f32]) {
        let scale = self.value_scale[entry];
        for (o, &code) in out.iter_mut().zip(&self.value_codes[entry * self.dim..]) {
            *o = f32::from(code) * scale;
        }
    }

    /// Appends everything but what follows from the codes.
    pub fn write_to(&self, to: &mut Writer) {
        to.len(self.num_blocks());
        to.bytes(&self.key_codes);
        to.f32s(&self.key_scale);
        to.f32s(&self.spread);
        to.u16s(&self.reach.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        to.signed(&self.value_codes);
        to.f32s(&self.value_scale);
        to.u32s(&self.count);
        to.u32s(&self.child);
    }

    /// What `write_to` appended. Links are not checked here.
    pub fn read_from(dim: usize, from: &mut Reader<'_>) -> Result<Self, IndexError> {
        let num_blocks = from.len()?;
        let mut blocks = Self::new(dim);
        // At most 2^32 blocks of less than 2^18 bytes: no product overflows 64 bits.
        let entries = num_blocks * LANES;
        blocks.key_codes = from.take(num_blocks * blocks.key_stride())?.to_vec();
        blocks.key_scale = from.f32s(entries)?;
        blocks.spread = from.f32s(entries)?;
        blocks.reach = from.u16s(entries)?.into_iter().map(bf16::from_bits).collect();
        from.check(blocks.reach.iter().all(|x| x.is_finite()), "a number is not finite")?;
        blocks.value_codes = from.signed(entries * dim)?;
        blocks.value_scale = from.f32s(entries)?;
        blocks.count = from.u32s(entries)?;
        blocks.child = from.u32s(entries)?;
        blocks.key_norm = vec![0.0; entries];
        for entry in 0..entries {
            blocks.key_norm[entry] = blocks.norm_of(entry);
            let used = blocks.child[entry] != u32::MAX;
            from.check(used || blocks.count[entry] == 0, "tokens in an unused entry")?;
        }
        Ok(blocks)
    }

    /// Squared length of an entry's key as stored.
    fn norm_of(&self, entry: usize) -> f32 {
        let base = (entry / LANES) * self.key_stride() + (entry % LANES) * QUAD;
        let code = |d: usize| {
            i64::from(self.key_codes[base + (d / QUAD) * LANES * QUAD + d % QUAD]) - i64::from(ZERO)
        };
        let norm: i64 = (0..self.dim).map(|d| code(d) * code(d)).sum();
        norm as f32 * self.key_scale[entry] * self.key_scale[entry]
    }

    /// Host bytes owned.
    pub fn size_bytes(&self) -> usize {
        self.key_codes.capacity()
            + self.value_codes.capacity()
            + 2 * self.reach.capacity()
            + 4 * (self.key_scale.capacity()
                + self.key_norm.capacity()
                + self.spread.capacity()
                + self.value_scale.capacity()
                + self.count.capacity()
                + self.child.capacity())
    }
}

/// What an entry is written from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Summary<'a> {
    /// `[dim]` f32
    pub key: &'a [f32],
    /// `[dim]` f32
    pub value: &'a [f32],
    /// See `Blocks::spread`.
    pub spread: f32,
    /// See `Blocks::reach`.
    pub reach: f32,
    /// Tokens it stands for.
    pub count: u32,
    /// Page, block or token id.
    pub child: u32,
}
