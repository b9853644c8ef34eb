//! Working memory of the attention kernels.

use super::vector::Softmax;

/// Working memory of one call; keep one per thread and pass it again: a call of a size seen before allocates nothing.
#[derive(Debug, Default)]
pub struct AttendScratch {
    twin_scores: Vec<f32>,
    twin_sums: Vec<f64>,
    vector: VectorScratch,
}

/// Buffers of the vector kernels.
#[derive(Debug, Default)]
pub(super) struct VectorScratch {
    /// Queries in the lane order of the element type [group, padded head_dim].
    pub q: AlignedBuf,
    /// Unnormalised weighted sums of values, same shape and order.
    pub sums: AlignedBuf,
    /// Running maximum and sum of weights of each part of the group.
    pub softmax: Vec<Softmax>,
    /// Scores, then weights, of one block [rows, padded heads].
    pub weights: AlignedBuf,
}

/// f32 buffer that starts on a cache line, so that a vector load never crosses one.
#[derive(Debug, Default)]
pub(super) struct AlignedBuf(Vec<f32>);

const LINE_FLOATS: usize = 16;

impl AlignedBuf {
    /// The first `len` elements, of any earlier content.
    pub fn slice(&mut self, len: usize) -> &mut [f32] {
        grow(&mut self.0, len + LINE_FLOATS);
        let skip = self.0.as_ptr().align_offset(LINE_FLOATS * size_of::<f32>());
        &mut self.0[skip..skip + len]
    }
}

impl AttendScratch {
    /// Scores `[num_rows]` and value sums `[head_dim]` of the scalar twin.
    pub(crate) fn twin_buffers(&mut self, num_rows: usize, head_dim: usize) -> (&mut [f32], &mut [f64]) {
        grow(&mut self.twin_scores, num_rows);
        grow(&mut self.twin_sums, head_dim);
        (&mut self.twin_scores[..num_rows], &mut self.twin_sums[..head_dim])
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn vector(&mut self) -> &mut VectorScratch {
        &mut self.vector
    }
}

/// Makes room for `len` elements, never less than before.
fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}
