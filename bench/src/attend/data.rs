//! Random shards.

use floe_cuda::{KernelError, KvElem, SliceRows};
use rayon::prelude::*;

/// Bytes of all shards of a case together, at least: eight times a large third-level cache.
const TOTAL_BYTES: usize = 256 << 20;
/// Bytes of a cache line, on which every shard starts.
const LINE: usize = 64;
/// Keys and values lie in [-VALUE_MAX, VALUE_MAX).
pub const VALUE_MAX: f64 = 2.0;

/// Shards of equal size in one allocation.
pub struct Shards<E> {
    data: Vec<E>,
    skip: usize,
    stride: usize,
    shard_len: usize,
    head_dim: usize,
}

impl<E: KvElem> Shards<E> {
    /// As many shards of `context` rows as are needed to leave the caches.
    pub fn random(context: usize, head_dim: usize) -> Self {
        let shard_len = context * 2 * head_dim;
        let line = LINE / size_of::<E>();
        let stride = shard_len.next_multiple_of(line);
        let num = TOTAL_BYTES.div_ceil(shard_len * size_of::<E>());
        let mut data = vec![E::from_f32(0.0); num * stride + line];
        let skip = data.as_ptr().align_offset(LINE);
        data.par_chunks_mut(1 << 16).enumerate().for_each(|(i, part)| {
            let mut random = Random(i as u64);
            part.iter_mut().for_each(|x| *x = E::from_f32(random.next()));
        });
        Self { data, skip, stride, shard_len, head_dim }
    }

    /// How many.
    pub fn len(&self) -> usize {
        (self.data.len() - self.skip) / self.stride
    }

    /// Rows of shard `i`.
    pub fn rows(&self, i: usize) -> Result<SliceRows<'_, E>, KernelError> {
        let start = self.skip + i * self.stride;
        SliceRows::new(&self.data[start..start + self.shard_len], self.head_dim)
    }
}

/// Queries f32 [group, head_dim].
pub fn queries(group: usize, head_dim: usize) -> Vec<f32> {
    let mut random = Random(u64::MAX);
    (0..group * head_dim).map(|_| random.next()).collect()
}

/// Lists of `num` ascending rows of `context`, one at a random place in each of `num` equal parts; as many lists as are needed
/// to leave the caches.
pub fn scattered(num: usize, context: usize, row_bytes: usize) -> Vec<Vec<u32>> {
    let mut random = Random(7);
    let mut row = |i: usize| {
        let (start, end) = (i * context / num, (i + 1) * context / num);
        (start + random.bits() as usize % (end - start)) as u32
    };
    (0..TOTAL_BYTES.div_ceil(num * row_bytes)).map(|_| (0..num).map(&mut row).collect()).collect()
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Uniform in [-VALUE_MAX, VALUE_MAX).
    fn next(&mut self) -> f32 {
        let unit = (self.bits() >> 40) as f32 / (1u64 << 24) as f32;
        (unit * 2.0 - 1.0) * VALUE_MAX as f32
    }
}
