//! Nearest earlier query, obviously.

/// Squared distance of `q` `[dim]` to every row of `ring` `[rows, dim]`, to `out` `[rows]`.
pub fn distances(ring: &[f32], q: &[f32], out: &mut [f32]) {
    for (row, out) in ring.chunks_exact(q.len()).zip(out) {
        let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
        *out = row.iter().zip(q).map(square).sum::<f64>() as f32;
    }
}

/// The row of `ring` `[rows, dim]` nearest to `q` and its squared distance, if that is below `bound`; the lower row of equals.
pub fn match_scan(ring: &[f32], q: &[f32], bound: f32) -> Option<(usize, f32)> {
    let mut all = vec![0.0; ring.len() / q.len()];
    distances(ring, q, &mut all);
    let best = |best: Option<(usize, f32)>, (row, d): (usize, &f32)| match best {
        Some((_, least)) if *d >= least => best,
        Some(_) | None => (*d < bound).then_some((row, *d)).or(best),
    };
    all.iter().enumerate().fold(None, best)
}
