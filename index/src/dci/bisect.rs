//! Balanced top-down clustering: cut a set in two by a 2-means direction until every part fits.
//!
//! Leaves hold almost equally many points, never more than the target, so pages come out full. Cost is `n log n` with a
//! constant of one dot product a point and level; centres are found on a bounded sample.

use super::codebook::Codes;
use crate::index::MAX_DIM;
use crate::simd::Isa;
use crate::simd::vectorise::{
    Kernel, add, add_scaled, distance_sq, dot, dot_bytes, largest, nearest_byte, vectorised,
};

/// Points that a cut looks at to find its direction.
const SAMPLE: usize = 128;
/// 2-means rounds on the sample.
const ROUNDS: usize = 3;
/// Sets at least this large are cut by two threads.
const PARALLEL: usize = 4096;

/// Orders the points so that consecutive leaves of at most `target` points are clusters. Returns the order and the leaf
/// sizes.
pub(crate) fn bisect(isa: Isa, codes: &Codes, target: usize) -> (Vec<u32>, Vec<u32>) {
    let n = codes.len();
    let mut order: Vec<u32> = (0..n as u32).collect();
    let mut sizes = vec![0u32; n.div_ceil(target)];
    if n > 0 {
        Cut { isa, codes }.split(&mut order, &mut sizes);
    }
    (order, sizes)
}

#[derive(Clone, Copy)]
struct Cut<'a> {
    isa: Isa,
    codes: &'a Codes,
}

impl Cut<'_> {
    fn split(self, order: &mut [u32], sizes: &mut [u32]) {
        if sizes.len() == 1 {
            sizes[0] = order.len() as u32;
            return;
        }
        let (n, leaves) = (order.len(), sizes.len());
        let step = n.div_ceil(SAMPLE);
        let mut sample = vec![0.0; n.div_ceil(step) * self.codes.stride];
        vectorised(self.isa, Decode { codes: self.codes, order, step, sample: &mut sample });
        let plane = vectorised(self.isa, TwoMeans { sample: &sample, dim: self.codes.stride });
        drop(sample);
        let mut projected = vec![0.0f32; n];
        vectorised(self.isa, Project { plane: &plane, codes: self.codes, order, projected: &mut projected });
        let below = projected.iter().filter(|&&p| p < plane.threshold).count();
        // Neither side takes less than a quarter, so the depth stays logarithmic on any data.
        let quarter = (leaves / 4).max(1);
        let left = ((below * leaves + n / 2) / n).clamp(quarter, leaves - quarter);
        let cut = (n * left).div_ceil(leaves);
        partition(order, &projected, cut);
        drop(projected);
        let (order_left, order_right) = order.split_at_mut(cut);
        let (sizes_left, sizes_right) = sizes.split_at_mut(left);
        if n >= PARALLEL {
            rayon::join(|| self.split(order_left, sizes_left), || self.split(order_right, sizes_right));
        } else {
            self.split(order_left, sizes_left);
            self.split(order_right, sizes_right);
        }
    }
}

/// Brings the `cut` points of least projection to the front. Both sides keep their order: points stay in rising order, so
/// that the passes over their codes run through memory in one direction.
fn partition(order: &mut [u32], projected: &[f32], cut: usize) {
    let mut sorted = projected.to_vec();
    let Some(last) = cut.checked_sub(1) else { return };
    let (_, &mut pivot, _) = sorted.select_nth_unstable_by(last, f32::total_cmp);
    drop(sorted);
    let less = projected.iter().filter(|p| p.total_cmp(&pivot).is_lt()).count();
    let mut ties = cut - less;
    let mut right = Vec::with_capacity(order.len() - cut);
    let mut at = 0;
    for (i, p) in projected.iter().enumerate() {
        let side = p.total_cmp(&pivot);
        if side.is_lt() || (side.is_eq() && ties > 0) {
            ties -= usize::from(side.is_eq());
            order[at] = order[i];
            at += 1;
        } else {
            right.push(order[i]);
        }
    }
    order[at..].copy_from_slice(&right);
}

/// Every `step`-th point as f32.
struct Decode<'a> {
    codes: &'a Codes,
    order: &'a [u32],
    step: usize,
    sample: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let stride = self.codes.stride;
        for (row, &i) in self.sample.chunks_exact_mut(stride).zip(self.order.iter().step_by(self.step)) {
            decode(self.codes, i, 1.0, row);
        }
    }
}

/// `sum += by * point`.
#[inline(always)]
pub(super) fn decode(codes: &Codes, i: u32, by: f32, sum: &mut [f32]) {
    let scale = by * codes.scale[i as usize];
    let row = &codes.rows[i as usize * codes.stride..][..codes.stride];
    for (s, &code) in sum.iter_mut().zip(row) {
        *s += scale * f32::from(code);
    }
}

/// The plane between two means.
struct Plane {
    /// Signed codes of the direction; its length does not matter.
    direction: [i8; MAX_DIM],
    /// Projections in units of the direction's codes.
    threshold: f32,
}

struct TwoMeans<'a> {
    sample: &'a [f32],
    dim: usize,
}

impl Kernel for TwoMeans<'_> {
    type Output = Plane;

    #[inline(always)]
    fn run(self) -> Plane {
        let dim = self.dim;
        let mut buffer = [0.0f32; 6 * MAX_DIM];
        let mut parts = buffer.chunks_exact_mut(MAX_DIM).map(|part| &mut part[..dim]);
        let mut next = || parts.next().unwrap_or_default();
        let (low, high, direction, mean) = (next(), next(), next(), next());
        let sums = [next(), next()];
        let rows = || self.sample.chunks_exact(dim);
        let num = self.sample.len() / dim;
        for row in rows() {
            add_scaled(mean, 1.0 / num as f32, row);
        }
        // Far ends: the point farthest from the mean, and the point farthest from that one.
        low.copy_from_slice(far(self.sample, mean));
        high.copy_from_slice(far(self.sample, low));
        let mut threshold = 0.0;
        for _ in 0..ROUNDS {
            for ((d, &h), &l) in direction.iter_mut().zip(high.iter()).zip(low.iter()) {
                *d = h - l;
            }
            threshold = 0.5 * (dot(high, direction) + dot(low, direction));
            sums[0].fill(0.0);
            sums[1].fill(0.0);
            let mut counts = [0usize; 2];
            for row in rows() {
                let side = usize::from(dot(row, direction) >= threshold);
                counts[side] += 1;
                add(sums[side], row);
            }
            if counts.contains(&0) {
                break;
            }
            for (c, &s) in low.iter_mut().zip(sums[0].iter()) {
                *c = s / counts[0] as f32;
            }
            for (c, &s) in high.iter_mut().zip(sums[1].iter()) {
                *c = s / counts[1] as f32;
            }
        }
        let mut codes = [0i8; MAX_DIM];
        let unit = largest(direction) / 127.0;
        if unit >= f32::MIN_POSITIVE {
            for (code, &d) in codes.iter_mut().zip(direction.iter()) {
                *code = nearest_byte(d / unit);
            }
            threshold /= unit;
        }
        Plane { direction: codes, threshold }
    }
}

/// The row farthest from a point, the first of equals.
#[inline(always)]
fn far<'a>(sample: &'a [f32], from: &[f32]) -> &'a [f32] {
    let mut best = (f32::NEG_INFINITY, from.len());
    for (i, row) in sample.chunks_exact(from.len()).enumerate() {
        let d = distance_sq(row, from);
        if d > best.0 {
            best = (d, i * from.len());
        }
    }
    sample.get(best.1..best.1 + from.len()).unwrap_or(&sample[..from.len()])
}

struct Project<'a> {
    plane: &'a Plane,
    codes: &'a Codes,
    order: &'a [u32],
    projected: &'a mut [f32],
}

impl Kernel for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let stride = self.codes.stride;
        let direction = &self.plane.direction[..stride];
        for (projected, &i) in self.projected.iter_mut().zip(self.order) {
            let row = &self.codes.rows[i as usize * stride..][..stride];
            *projected = dot_bytes(row, direction) as f32 * self.codes.scale[i as usize];
        }
    }
}
