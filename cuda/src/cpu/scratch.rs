//! Working memory of the attention kernels.

/// Working memory of one call; keep one per thread and pass it again: a call of a size seen before allocates nothing.
#[derive(Debug, Default)]
pub struct AttendScratch {
    twin_scores: Vec<f32>,
    twin_sums: Vec<f64>,
}

impl AttendScratch {
    /// Scores [num_rows] and value sums [head_dim] of the scalar twin.
    pub(crate) fn twin_buffers(&mut self, num_rows: usize, head_dim: usize) -> (&mut [f32], &mut [f64]) {
        grow(&mut self.twin_scores, num_rows);
        grow(&mut self.twin_sums, head_dim);
        (&mut self.twin_scores[..num_rows], &mut self.twin_sums[..head_dim])
    }
}

/// Makes room for `len` elements, never less than before.
fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}
