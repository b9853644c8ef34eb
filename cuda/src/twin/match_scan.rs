//! Nearest earlier query, obviously.

use crate::cpu::PLANE;

/// Squared distance of `q` `[dim]` to every row of `ring` `[rows, dim]`, to `out` `[rows]`.
pub fn distances(ring: &[f32], q: &[f32], out: &mut [f32]) {
    for (row, out) in ring.chunks_exact(q.len()).zip(out) {
        let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
        *out = row.iter().zip(q).map(square).sum::<f64>() as f32;
    }
}

/// The row of `ring` `[planes, rows, PLANE]` nearest to `q` `[planes, PLANE]` and its squared distance, if that is below `bound`; the
/// lower row of equals.
pub fn match_scan(ring: &[f32], q: &[f32], bound: f32) -> Option<(usize, f32)> {
    let rows = ring.len() / q.len();
    let mut best: Option<(usize, f32)> = None;
    for row in 0..rows {
        let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
        let plane = |(i, q): (usize, &[f32])| -> f64 {
            ring[(i * rows + row) * PLANE..][..PLANE].iter().zip(q).map(square).sum()
        };
        let distance = q.chunks_exact(PLANE).enumerate().map(plane).sum::<f64>() as f32;
        if distance < best.map_or(bound, |(_, least)| least) {
            best = Some((row, distance));
        }
    }
    best
}
