//! Progressive precision: a few bits per coordinate of each token's rotated residual to its page's reference means.
//!
//! With `R` the rotation, `m_k` and `m_v` the page's stored reference means (the caller's), token `t` is represented by
//!
//! ```text
//! R (key_t - m_k)   ~ k_scale_t * k_level_t[..]        k_bits in {0, 1, 2, 4}
//! R (value_t - m_v) ~ v_scale_t * v_level_t[..]        v_bits in {0, 1, 2}
//!
//! q.key_t           ~ q.m_k + k_scale_t * (R q).k_level_t                               Sketch::score
//! sum_t w_t value_t ~ (sum_t w_t) m_v + R^-1 sum_t w_t v_scale_t v_level_t              Sketch::add_weighted, finish
//! ```
//!
//! A level is an odd integer: -1 or 1; -3, -1, 1, 3; -15, ..., 15. Its top bit is its sign: plane 0 of any code is the 1-bit
//! code, planes 0 and 1 of a 4-bit code are a 2-bit code (with a scale that differs by a known factor), so a reader may stop
//! after the planes that it can afford. Codes refer to the means that they were encoded against: a caller that moves a page's
//! mean keeps the old one as reference or encodes the page's tokens again.
//!
//! # Layout
//! Slot `s` is token `s % 16` of page `s / 16`. Key codes, value codes, key scales and value scales are four arrays. A page's codes are
//! planes of 64-byte lines, one line for 32 coordinates and all 16 tokens, so that one load feeds all lanes:
//!
//! ```text
//!              lane 0        lane 1        ...     lane 15
//! key line v   [ token 0  ]  [ token 1  ]  ...     [ token 15 ]         bit b of a lane: coordinate 32 v + b
//!
//! value line v [ coord 0  ]  [ coord 1  ]  ...     [ coord 15 ]         byte i, bit j      of lane l: coordinate 32 v + l,
//!              [ coord 16 ]  [ coord 17 ]  ...     [ coord 31 ]                              token 4 i + j
//!                                                                       byte i, bit 4 + j: coordinate 32 v + 16 + l
//!
//! page of k2, dim 128:   plane 0: line 0 1 2 3 | plane 1: line 0 1 2 3        512 bytes
//! ```
//!
//! Bytes per token at dim 128: k1 18, k2 34, k4 66, v1 18, v2 34. Other dimensions are padded to a multiple of 32.
//!
//! All results are bit-identical on every instruction set (`simd::codes` says why).

mod config;
mod encode;
mod planes;
mod query;

pub use crate::simd::codes::{Pairs, Weights};
pub use config::{ParseSketchError, SketchConfig};
pub use query::PreparedQuery;

use crate::error::IndexError;
use crate::rotate::Rotation;
use crate::simd::Isa;
use crate::simd::codes::{self, LINE_DIMS, PAGE_TOKENS, PageCodes};
use planes::{Kind, Store, StoreMut};

/// The sketches of all tokens of one shard.
#[derive(Clone, Debug)]
pub struct Sketch {
    config: SketchConfig,
    isa: Isa,
    rotation: Rotation,
    num_pages: usize,
    keys: Store,
    values: Store,
}

/// Memory of one worker that encodes; allocates only while it grows.
#[derive(Clone, Debug, Default)]
pub struct EncodeScratch {
    rotated: Vec<f32>,
    padded: Vec<f32>,
    words: Vec<u32>,
}

impl Sketch {
    /// No pages yet, on the widest instruction set of this CPU.
    ///
    /// # Errors
    /// `Config` for a `dim` outside 1 to 4096.
    pub fn new(config: SketchConfig, dim: usize, seed: u64) -> Result<Self, IndexError> {
        Ok(Self {
            config,
            isa: Isa::detect(),
            rotation: Rotation::new(dim, seed)?,
            num_pages: 0,
            keys: Store::new(Kind::Key, config.k_bits(), dim),
            values: Store::new(Kind::Value, config.v_bits(), dim),
        })
    }

    /// The same sketch on another instruction set; results do not depend on it.
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// Bits kept.
    pub fn config(&self) -> SketchConfig {
        self.config
    }

    /// Coordinates of a key, a value, a query.
    pub fn dim(&self) -> usize {
        self.rotation.dim()
    }

    /// Coordinates of a row of [`Sketch::add_weighted`]'s sums: `dim` rounded up to a multiple of 32.
    pub fn padded_dim(&self) -> usize {
        self.dim().next_multiple_of(LINE_DIMS)
    }

    /// The rotation of keys, values and queries.
    pub fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    /// Pages held; slots are `0..16 * num_pages`.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Grows by empty pages or drops the last ones.
    pub fn resize_pages(&mut self, num_pages: usize) {
        self.num_pages = num_pages;
        self.keys.resize_pages(num_pages);
        self.values.resize_pages(num_pages);
    }

    /// All pages, writable.
    pub fn span_mut(&mut self) -> SpanMut<'_> {
        SpanMut {
            dim: self.rotation.dim(),
            isa: self.isa,
            rotation: &self.rotation,
            num_pages: self.num_pages,
            keys: self.keys.as_mut(),
            values: self.values.as_mut(),
        }
    }

    /// See [`SpanMut::encode`].
    ///
    /// # Panics
    /// As `SpanMut::encode`.
    pub fn encode(
        &mut self,
        slot: usize,
        k_residual: Option<&[f32]>,
        v_residual: Option<&[f32]>,
        scratch: &mut EncodeScratch,
    ) {
        self.span_mut().encode(slot, k_residual, v_residual, scratch);
    }

    /// Moves the codes and scales of `from` to `to` and empties `from`.
    ///
    /// # Panics
    /// When a slot does not exist.
    pub fn move_slot(&mut self, from: usize, to: usize) {
        if from == to {
            return;
        }
        let mut words = [0; codes::WORDS_MAX];
        for store in [&mut self.keys, &mut self.values] {
            let words = &mut words[..store.words_per_token()];
            if !words.is_empty() {
                let scale = store.get(from, words);
                store.as_mut().put(to, words, scale);
            }
        }
        self.clear_slot(from);
    }

    /// Empties a slot: it scores 0 and adds nothing.
    ///
    /// # Panics
    /// When the slot does not exist.
    pub fn clear_slot(&mut self, slot: usize) {
        let words = [0; codes::WORDS_MAX];
        for store in [&mut self.keys, &mut self.values] {
            let words = &words[..store.words_per_token()];
            if !words.is_empty() {
                store.as_mut().put(slot, words, 0);
            }
        }
    }

    /// Residual scores of whole pages: `out[p][t] = softmax scale * q_h . residual_t` for the head `h` and the tokens `t` of the page of
    /// pair `p`, `out` `[pairs][16]` f32; 0 for empty slots. Add `q_h . m_k * softmax scale` of the page's reference mean. The codes
    /// of a page are read once for all its heads.
    ///
    /// # Panics
    /// When a page or head does not exist, `query` was prepared by another sketch, or `out` has another length.
    pub fn score(&self, query: &PreparedQuery, pairs: &Pairs<'_>, out: &mut [f32]) {
        codes::score(self.isa, &self.keys.codes(), &query.codes, pairs, out);
    }

    /// Adds weighted value residuals of whole pages, still rotated: `acc[h] += sum_p sum_t weight_p[t] * R residual_t` over the pairs
    /// `p` of head `h` and the tokens `t` of their pages, `acc` `[group][padded_dim]` f32. Products of weight and scale are rounded to
    /// 1/127 of the pair's sum times the page's largest scale.
    ///
    /// # Panics
    /// When a page or head does not exist, a slice has another length, or the sketch keeps no value bits.
    pub fn add_weighted(&self, pairs: &Pairs<'_>, weights: Weights<'_>, acc: &mut [f32]) {
        assert!(self.config.v_bits() > 0, "sketch {} keeps no value bits", self.config);
        codes::add_weighted(self.isa, &self.values.codes(), pairs, weights, acc);
    }

    /// Rotates one head's sums back: `acc` `[padded_dim]` f32, of which the first `dim` are the result. Add the weights' sum times the
    /// mean value of each page.
    ///
    /// # Panics
    /// When `acc` is shorter than `dim`.
    pub fn finish(&self, acc: &mut [f32]) {
        self.rotation.apply_inverse(&mut acc[..self.rotation.dim()]);
    }

    /// Writes the decoded key residual of a slot, rotated back, to `out` `[dim]` f32.
    ///
    /// # Panics
    /// When the slot does not exist, `out` has another length, or the sketch keeps no key bits.
    pub fn key_residual(&self, slot: usize, out: &mut [f32]) {
        self.decode(&self.keys, self.config.k_bits(), slot, out);
    }

    /// Writes the decoded value residual of a slot, rotated back, to `out` `[dim]` f32.
    ///
    /// # Panics
    /// When the slot does not exist, `out` has another length, or the sketch keeps no value bits.
    pub fn value_residual(&self, slot: usize, out: &mut [f32]) {
        self.decode(&self.values, self.config.v_bits(), slot, out);
    }

    fn decode(&self, store: &Store, bits: usize, slot: usize, out: &mut [f32]) {
        assert!(bits > 0, "sketch {} keeps no such bits", self.config);
        let mut words = [0; codes::WORDS_MAX];
        let words = &mut words[..store.words_per_token()];
        let scale = half::f16::from_bits(store.get(slot, words)).to_f32();
        let lines = words.len() / bits;
        for (i, out) in out.iter_mut().enumerate() {
            let bit = |plane: usize| (words[plane * lines + i / LINE_DIMS] >> (i % LINE_DIMS)) & 1;
            let code = (0..bits).fold(0, |code, plane| 2 * code + bit(plane) as i32);
            *out = scale * (2 * code - ((1 << bits) - 1)) as f32;
        }
        self.rotation.apply_inverse(out);
    }

    /// Key codes and scales of all pages.
    pub fn key_codes(&self) -> PageCodes<'_> {
        self.keys.codes()
    }

    /// Value codes and scales of all pages.
    pub fn value_codes(&self) -> PageCodes<'_> {
        self.values.codes()
    }

    /// Host bytes owned: codes and scales.
    pub fn size_bytes(&self) -> usize {
        self.keys.size_bytes() + self.values.size_bytes()
    }

    /// Bytes that scoring a page reads.
    pub fn key_bytes_per_page(&self) -> usize {
        self.keys.snapshot_bytes_per_page()
    }

    /// Bytes that summing a page's values reads.
    pub fn value_bytes_per_page(&self) -> usize {
        self.values.snapshot_bytes_per_page()
    }

    /// Bytes that [`Sketch::write_to`] appends for a page.
    pub fn snapshot_bytes_per_page(&self) -> usize {
        self.keys.snapshot_bytes_per_page() + self.values.snapshot_bytes_per_page()
    }

    /// Appends key lines, key scales, value lines and value scales, little-endian, without header or checksum.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        self.keys.write_to(out);
        self.values.write_to(out);
    }

    /// Replaces the contents of all present pages by what `write_to` of a sketch of equal configuration appended.
    ///
    /// # Errors
    /// `Snapshot` when `bytes` is not [`Sketch::snapshot_bytes_per_page`] times the number of pages long.
    pub fn read_from(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        let keys = self.num_pages * self.keys.snapshot_bytes_per_page();
        if bytes.len() != self.num_pages * self.snapshot_bytes_per_page() {
            return Err(IndexError::Snapshot { what: "length of the codes", offset: bytes.len() });
        }
        self.keys.read_from(&bytes[..keys]);
        self.values.read_from(&bytes[keys..]);
        Ok(())
    }
}

/// A run of pages, writable on its own, so that workers may encode disjoint runs at once. Slots count from its first page.
#[derive(Debug)]
pub struct SpanMut<'a> {
    dim: usize,
    isa: Isa,
    rotation: &'a Rotation,
    num_pages: usize,
    keys: StoreMut<'a>,
    values: StoreMut<'a>,
}

impl SpanMut<'_> {
    /// Pages of the run.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// The first `num_pages` pages and the others.
    ///
    /// # Panics
    /// When the run is shorter.
    pub fn split_at(self, num_pages: usize) -> (Self, Self) {
        let (keys, keys_rest) = self.keys.split_at(num_pages);
        let (values, values_rest) = self.values.split_at(num_pages);
        let rest =
            Self { num_pages: self.num_pages - num_pages, keys: keys_rest, values: values_rest, ..self };
        (Self { num_pages, keys, values, ..self }, rest)
    }

    /// Encodes a token's residuals to its page's reference means, `[dim]` f32 each, replacing what the slot held. A residual that the
    /// sketch keeps no bits of is ignored; `None` leaves that half of the slot as it is. Coordinates of the rotated residual
    /// beyond 65504 are clamped to it (scales are f16), and scales below 6e-8 become zero.
    ///
    /// # Panics
    /// When the slot does not exist or a residual has another length.
    pub fn encode(
        &mut self,
        slot: usize,
        k_residual: Option<&[f32]>,
        v_residual: Option<&[f32]>,
        scratch: &mut EncodeScratch,
    ) {
        assert!(slot < self.num_pages * PAGE_TOKENS, "slot {slot} of {} pages", self.num_pages);
        for (store, residual) in [(&mut self.keys, k_residual), (&mut self.values, v_residual)] {
            let Some(residual) = residual else { continue };
            if store.bits() == 0 {
                continue;
            }
            let EncodeScratch { rotated, padded, words } = scratch;
            rotated.clear();
            rotated.extend_from_slice(residual);
            self.rotation.apply(rotated);
            padded.resize(self.dim.next_multiple_of(LINE_DIMS), 0.0);
            encode::pad(rotated, padded);
            words.resize(store.bits() * padded.len() / LINE_DIMS, 0);
            let scale = encode::encode(self.isa, store.bits(), self.dim, padded, words);
            store.put(slot, words, scale);
        }
    }
}
