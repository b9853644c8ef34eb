//! Where codes and scales of many pages lie, and how one token's codes get in and out.

use crate::grow::grow_by;
use crate::simd::codes::{LINE_DIMS, Line, PAGE_TOKENS, PageCodes, Scales};

/// Which of a token's two rows a store holds; the two are laid out for opposite sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Summed over coordinates: lane = token.
    Key,
    /// Summed over tokens: lane = coordinate.
    Value,
}

/// Codes and scales of one kind for all pages.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Store {
    kind: Kind,
    /// Bits per code; with 0 nothing is stored.
    bits: usize,
    /// Lines of one plane of one page: `dim / 32`, rounded up.
    lines_per_plane: usize,
    /// `[pages][bits][lines_per_plane]`.
    lines: Vec<Line>,
    /// `[pages]`.
    scales: Vec<Scales>,
}

impl Store {
    pub(super) fn new(kind: Kind, bits: usize, dim: usize) -> Self {
        Self { kind, bits, lines_per_plane: dim.div_ceil(LINE_DIMS), lines: Vec::new(), scales: Vec::new() }
    }

    pub(super) fn resize_pages(&mut self, num_pages: usize) {
        if self.bits > 0 {
            let per_page = self.bits * self.lines_per_plane;
            self.lines.truncate(num_pages * per_page);
            self.scales.truncate(num_pages);
            let new = num_pages - self.scales.len();
            grow_by(&mut self.lines, new * per_page, Line::default());
            grow_by(&mut self.scales, new, [0; PAGE_TOKENS]);
        }
    }

    pub(super) fn codes(&self) -> PageCodes<'_> {
        PageCodes { bits: self.bits, lines: &self.lines, scales: &self.scales }
    }

    pub(super) fn as_mut(&mut self) -> StoreMut<'_> {
        StoreMut {
            kind: self.kind,
            bits: self.bits,
            lines_per_plane: self.lines_per_plane,
            lines: &mut self.lines,
            scales: &mut self.scales,
        }
    }

    /// Copies the codes of `slot` to `words` `[bits][lines_per_plane]` and returns the scale's bits.
    pub(super) fn get(&self, slot: usize, words: &mut [u32]) -> u16 {
        let (page, token) = (slot / PAGE_TOKENS, slot % PAGE_TOKENS);
        let per_page = words.len();
        for (word, line) in words.iter_mut().zip(&self.lines[page * per_page..]) {
            *word = match self.kind {
                Kind::Key => line.0[token],
                Kind::Value => gather(line, token),
            };
        }
        self.scales[page][token]
    }

    /// Words of one token.
    pub(super) fn words_per_token(&self) -> usize {
        self.bits * self.lines_per_plane
    }

    pub(super) fn size_bytes(&self) -> usize {
        self.lines.capacity() * size_of::<Line>() + self.scales.capacity() * size_of::<Scales>()
    }

    /// Bytes that [`Store::write_to`] appends for a page.
    pub(super) fn snapshot_bytes_per_page(&self) -> usize {
        if self.bits == 0 {
            return 0;
        }
        self.words_per_token() * size_of::<Line>() + size_of::<Scales>()
    }

    /// Appends lines, then scales, as little-endian words.
    pub(super) fn write_to(&self, out: &mut Vec<u8>) {
        out.reserve(self.snapshot_bytes_per_page() * self.scales.len());
        out.extend(self.lines.iter().flat_map(|line| line.0).flat_map(u32::to_le_bytes));
        out.extend(self.scales.iter().flatten().flat_map(|scale| scale.to_le_bytes()));
    }

    /// Fills all pages from what `write_to` gave for as many pages.
    pub(super) fn read_from(&mut self, bytes: &[u8]) {
        let (lines, scales) = bytes.split_at(self.lines.len() * size_of::<Line>());
        let words = self.lines.iter_mut().flat_map(|line| &mut line.0);
        for (word, bytes) in words.zip(lines.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        for (scale, bytes) in self.scales.iter_mut().flatten().zip(scales.as_chunks::<2>().0) {
            *scale = u16::from_le_bytes(*bytes);
        }
    }
}

/// A run of pages of a [`Store`], writable.
#[derive(Debug)]
pub(super) struct StoreMut<'a> {
    kind: Kind,
    bits: usize,
    lines_per_plane: usize,
    lines: &'a mut [Line],
    scales: &'a mut [Scales],
}

impl StoreMut<'_> {
    /// Bits per code.
    pub(super) fn bits(&self) -> usize {
        self.bits
    }

    /// The first `num_pages` pages and the others.
    pub(super) fn split_at(self, num_pages: usize) -> (Self, Self) {
        let num_lines = num_pages * self.bits * self.lines_per_plane;
        let (lines, lines_rest) = self.lines.split_at_mut(num_lines);
        let (scales, scales_rest) = self.scales.split_at_mut(if self.bits > 0 { num_pages } else { 0 });
        let first = Self { lines, scales, ..self };
        (first, Self { lines: lines_rest, scales: scales_rest, ..self })
    }

    /// Puts `words` `[bits][lines_per_plane]` and the scale's bits in place of what `slot` held.
    pub(super) fn put(&mut self, slot: usize, words: &[u32], scale: u16) {
        let (page, token) = (slot / PAGE_TOKENS, slot % PAGE_TOKENS);
        for (&word, line) in words.iter().zip(&mut self.lines[page * words.len()..]) {
            match self.kind {
                Kind::Key => line.0[token] = word,
                Kind::Value => scatter(line, token, word),
            }
        }
        self.scales[page][token] = scale;
    }
}

/// Bits of a value line that belong to coordinate `lane` and to coordinate `16 + lane` of `token`, in the lane's word.
fn value_bits(token: usize) -> (usize, usize) {
    let low = 8 * (token / 4) + token % 4;
    (low, low + 4)
}

fn scatter(line: &mut Line, token: usize, word: u32) {
    let (low, high) = value_bits(token);
    let keep = !(1 << low | 1 << high);
    for (lane, to) in line.0.iter_mut().enumerate() {
        *to = (*to & keep) | ((word >> lane) & 1) << low | ((word >> (16 + lane)) & 1) << high;
    }
}

fn gather(line: &Line, token: usize) -> u32 {
    let (low, high) = value_bits(token);
    line.0.iter().enumerate().fold(0, |word, (lane, from)| {
        word | ((from >> low) & 1) << lane | ((from >> high) & 1) << (16 + lane)
    })
}
