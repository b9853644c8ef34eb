//! Balanced top-down clustering: cut a set in two by a 2-means direction until every part fits.
//!
//! Leaves hold almost equally many points, never more than the target, so pages come out full. Cost is `n log n` with a
//! constant of one dot product a point and level; centres are found on a bounded sample.

/// Points that a cut looks at to find its direction.
const SAMPLE: usize = 256;
/// 2-means rounds on the sample.
const ROUNDS: usize = 4;
/// Sets at least this large are cut by two threads.
const PARALLEL: usize = 4096;

/// Rows `[n, dim]`, row-major f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    pub data: &'a [f32],
    pub dim: usize,
}

impl<'a> Rows<'a> {
    pub fn len(&self) -> usize {
        self.data.len() / self.dim
    }

    pub fn row(&self, i: u32) -> &'a [f32] {
        &self.data[i as usize * self.dim..][..self.dim]
    }
}

/// Dot product in sixteen interleaved partial sums, which the compiler keeps in registers.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks_a, chunks_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in chunks_a.zip(chunks_b) {
        for ((s, x), y) in sums.iter_mut().zip(x).zip(y) {
            *s += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Orders the rows so that consecutive leaves of at most `target` rows are clusters. Returns the order and the leaf sizes.
pub(crate) fn bisect(rows: Rows<'_>, target: usize) -> (Vec<u32>, Vec<u32>) {
    let n = rows.len();
    let mut order: Vec<u32> = (0..n as u32).collect();
    let mut sizes = vec![0u32; n.div_ceil(target)];
    if n > 0 {
        split(rows, &mut order, &mut sizes);
    }
    (order, sizes)
}

fn split(rows: Rows<'_>, order: &mut [u32], sizes: &mut [u32]) {
    if sizes.len() == 1 {
        order.sort_unstable();
        sizes[0] = order.len() as u32;
        return;
    }
    let (n, leaves) = (order.len(), sizes.len());
    let (direction, threshold) = two_means(rows, order);
    let mut keyed: Vec<(f32, u32)> = order.iter().map(|&i| (dot(rows.row(i), &direction), i)).collect();
    let below = keyed.iter().filter(|k| k.0 < threshold).count();
    // Neither side takes less than a quarter, so the depth stays logarithmic on any data.
    let quarter = (leaves / 4).max(1);
    let left = ((below * leaves + n / 2) / n).clamp(quarter, leaves - quarter);
    let cut = (n * left).div_ceil(leaves);
    if cut < n {
        keyed.select_nth_unstable_by(cut, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    }
    for (o, k) in order.iter_mut().zip(&keyed) {
        *o = k.1;
    }
    drop(keyed);
    let (order_left, order_right) = order.split_at_mut(cut);
    let (sizes_left, sizes_right) = sizes.split_at_mut(left);
    if n >= PARALLEL {
        rayon::join(|| split(rows, order_left, sizes_left), || split(rows, order_right, sizes_right));
    } else {
        split(rows, order_left, sizes_left);
        split(rows, order_right, sizes_right);
    }
}

/// Direction and threshold of the plane between two means of a sample.
fn two_means(rows: Rows<'_>, order: &[u32]) -> (Vec<f32>, f32) {
    let step = order.len().div_ceil(SAMPLE);
    let sample: Vec<u32> = order.iter().step_by(step).copied().collect();
    let dim = rows.dim;
    let mut mean = vec![0.0f32; dim];
    for &i in &sample {
        for (m, &x) in mean.iter_mut().zip(rows.row(i)) {
            *m += x / sample.len() as f32;
        }
    }
    // Far ends: the point farthest from the mean, and the point farthest from that one.
    let far = |from: &[f32]| {
        let mut best = (f32::NEG_INFINITY, sample[0]);
        for &i in &sample {
            let d: f32 = rows.row(i).iter().zip(from).map(|(a, b)| (a - b) * (a - b)).sum();
            if d > best.0 {
                best = (d, i);
            }
        }
        best.1
    };
    let a = rows.row(far(&mean));
    let mut low = a.to_vec();
    let mut high = rows.row(far(a)).to_vec();
    let mut direction = vec![0.0f32; dim];
    let mut threshold = 0.0;
    for _ in 0..ROUNDS {
        for ((d, &h), &l) in direction.iter_mut().zip(&high).zip(&low) {
            *d = h - l;
        }
        threshold = 0.5 * (dot(&high, &direction) + dot(&low, &direction));
        let mut sums = [vec![0.0f32; dim], vec![0.0f32; dim]];
        let mut counts = [0usize; 2];
        for &i in &sample {
            let side = usize::from(dot(rows.row(i), &direction) >= threshold);
            counts[side] += 1;
            for (s, &x) in sums[side].iter_mut().zip(rows.row(i)) {
                *s += x;
            }
        }
        if counts.contains(&0) {
            break;
        }
        for (centre, (sum, count)) in [&mut low, &mut high].into_iter().zip(sums.iter().zip(counts)) {
            for (c, s) in centre.iter_mut().zip(sum) {
                *c = s / count as f32;
            }
        }
    }
    (direction, threshold)
}
