//! The sketch against its own decoded residuals in f64, against theory, and across instruction sets bit by bit.

use floe_index::Query;
use floe_index::simd::Isa;
use floe_index::sketch::{EncodeScratch, PreparedQuery, Sketch, SketchConfig};
use proptest::prelude::*;

/// Standard normal numbers by Box and Muller over SplitMix64.
struct Gaussian(u64);

impl Gaussian {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }

    fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

fn all_configs() -> Vec<SketchConfig> {
    [0, 1, 2, 4]
        .into_iter()
        .flat_map(|k| [0, 1, 2].map(|v| SketchConfig::new(k, v).expect("a known width")))
        .collect()
}

fn filled(config: SketchConfig, dim: usize, rows: &[Vec<f32>], isa: Isa) -> Sketch {
    let mut sketch = Sketch::new(config, dim, 11).expect("a valid dimension").with_isa(isa);
    sketch.resize_pages(rows.len().div_ceil(16));
    let mut scratch = EncodeScratch::default();
    for (slot, row) in rows.iter().enumerate() {
        sketch.encode(slot, Some(row), Some(row), &mut scratch);
    }
    sketch
}

fn bytes(sketch: &Sketch) -> Vec<u8> {
    let mut out = Vec::new();
    sketch.write_to(&mut out);
    out
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Residuals at which a kernel could round, overflow or divide differently.
fn adversarial(dim: usize) -> Vec<Vec<f32>> {
    let mut spike = vec![0.0; dim];
    spike[dim / 2] = 3.0e4;
    let mut outlier = Gaussian(5).vec(dim);
    outlier[0] = 1.0e6;
    vec![
        vec![0.0; dim],
        vec![-0.0; dim],
        vec![1.0; dim],
        vec![f32::MIN_POSITIVE / 4.0; dim],
        vec![3.0e-8; dim],
        vec![f32::MAX; dim],
        (0..dim).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect(),
        (0..dim).map(|i| (i as f32 - 3.0) * 1.0e-3).collect(),
        (0..dim).map(|i| 10.0f32.powi(i as i32 % 9 - 4)).collect(),
        spike,
        outlier,
        Gaussian(6).vec(dim).iter().map(|x| x * 1.0e-6).collect(),
    ]
}

#[test]
fn codes_scores_and_sums_are_the_same_bits_on_every_instruction_set() {
    for dim in [1, 31, 64, 80, 96, 128, 256, 576] {
        let mut rows = adversarial(dim);
        let mut gaussian = Gaussian(dim as u64);
        rows.extend((0..70).map(|_| gaussian.vec(dim)));
        for config in all_configs() {
            for group in [1, 2, 3, 4, 5, 6, 7, 8, 11, 16] {
                let q = gaussian.vec(group * dim);
                let weights = gaussian.vec(6 * group * 16);
                let mut reference = None;
                for isa in Isa::all_available() {
                    let sketch = filled(config, dim, &rows, isa);
                    let (scores, sums) = scores_and_sums(&sketch, &q, group, &weights);
                    let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                    let got = (bytes(&sketch), bits(scores), bits(sums));
                    let expected = reference.get_or_insert_with(|| got.clone());
                    assert!(*expected == got, "{config}, dim {dim}, group {group}, {isa:?}");
                }
            }
        }
    }
}

fn scores_and_sums(sketch: &Sketch, q: &[f32], group: usize, weights: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let pages: Vec<u32> = (0..sketch.num_pages() as u32).rev().collect();
    let (mut scores, mut sums) = (Vec::new(), Vec::new());
    let mut prepared = PreparedQuery::default();
    for planes in [1, 2, 4].into_iter().filter(|p| *p <= sketch.config().k_bits()) {
        sketch.prepare(&Query { q, group, scale: 0.3, attended_lse: &[] }, planes, &mut prepared);
        let mut out = vec![f32::NAN; pages.len() * group * 16];
        sketch.score(&prepared, &pages, &mut out);
        scores.extend(out);
    }
    if sketch.config().v_bits() > 0 {
        sums.resize(group * sketch.padded_dim(), 0.0);
        sketch.add_weighted(&pages, &weights[..pages.len() * group * 16], &mut sums);
    }
    (scores, sums)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_residual_gets_the_same_codes_on_every_instruction_set(
        row in proptest::collection::vec(any::<f32>(), 1..200),
        k in prop::sample::select(vec![1u8, 2, 4]),
        v in 1..=2u8,
    ) {
        let config = SketchConfig::new(k, v).unwrap();
        let rows = [row];
        let dim = rows[0].len();
        let expected = bytes(&filled(config, dim, &rows, Isa::Scalar));
        for isa in Isa::all_available() {
            prop_assert_eq!(&bytes(&filled(config, dim, &rows, isa)), &expected, "{:?}", isa);
        }
    }
}

#[test]
fn scores_agree_with_decoded_residuals_within_the_query_rounding() {
    for (dim, group) in [(64, 3), (80, 7), (128, 4), (576, 2)] {
        let mut gaussian = Gaussian(1);
        let rows: Vec<_> = (0..64).map(|_| gaussian.vec(dim)).collect();
        for config in [SketchConfig::K1, SketchConfig::K2, SketchConfig::K4V2] {
            let sketch = filled(config, dim, &rows, Isa::detect());
            let q = gaussian.vec(group * dim);
            let mut prepared = PreparedQuery::default();
            sketch.prepare(
                &Query { q: &q, group, scale: 0.5, attended_lse: &[] },
                config.k_bits(),
                &mut prepared,
            );
            let pages = [3, 0, 2];
            let mut out = vec![0.0; pages.len() * group * 16];
            sketch.score(&prepared, &pages, &mut out);
            let mut residual = vec![0.0; dim];
            for (i, page) in pages.iter().enumerate() {
                for (g, q) in q.chunks(dim).enumerate() {
                    for t in 0..16 {
                        sketch.key_residual(*page as usize * 16 + t, &mut residual);
                        let exact = 0.5 * dot(q, &residual);
                        // Half a step for every coordinate, whose mean magnitude is at most its root mean square, plus the
                        // rounding of two rotations in f32.
                        let norm = dot(&residual, &residual).sqrt();
                        let rounding = 40.0 * f64::from(f32::EPSILON) * 0.5 * dot(q, q).sqrt() * norm;
                        let bound =
                            f64::from(prepared.steps()[g]) / 2.0 * norm * (dim as f64).sqrt() + rounding;
                        let got = f64::from(out[(i * group + g) * 16 + t]);
                        assert!(
                            (got - exact).abs() <= bound,
                            "{config} dim {dim} page {page} token {t}: {got} {exact}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn sums_agree_with_decoded_residuals_within_the_weight_rounding() {
    for (dim, group) in [(64, 3), (80, 7), (128, 4), (576, 2)] {
        let mut gaussian = Gaussian(2);
        let rows: Vec<_> = (0..64).map(|_| gaussian.vec(dim)).collect();
        for config in [SketchConfig::K1V1, SketchConfig::K2V2] {
            let sketch = filled(config, dim, &rows, Isa::detect());
            let pages = [1u32, 3];
            let weights: Vec<f32> =
                gaussian.vec(pages.len() * group * 16).iter().map(|x| (3.0 * x).exp()).collect();
            let padded = sketch.padded_dim();
            let mut acc = vec![0.0; group * padded];
            sketch.add_weighted(&pages, &weights, &mut acc);
            let mut residual = vec![0.0; dim];
            for (g, acc) in acc.chunks_mut(padded).enumerate() {
                sketch.finish(acc);
                let mut exact = vec![0.0f64; dim];
                let mut bound_sq = 0.0;
                for (i, page) in pages.iter().enumerate() {
                    let mut most: f64 = 0.0;
                    let mut norm_most: f64 = 0.0;
                    for t in 0..16 {
                        sketch.value_residual(*page as usize * 16 + t, &mut residual);
                        let w = f64::from(weights[(i * group + g) * 16 + t]);
                        let norm = dot(&residual, &residual).sqrt();
                        most = most.max(w * norm);
                        norm_most = norm_most.max(norm);
                        for (exact, x) in exact.iter_mut().zip(&residual) {
                            *exact += w * f64::from(*x);
                        }
                    }
                    // 1/254 of the largest product for each of 16 tokens; scales differ from norms by less than 3.
                    bound_sq += (16.0 * 3.0 * most / 254.0).powi(2);
                }
                let off: f64 = exact.iter().zip(&acc[..dim]).map(|(e, a)| (e - f64::from(*a)).powi(2)).sum();
                assert!(off <= bound_sq, "{config} dim {dim}: {} {}", off.sqrt(), bound_sq.sqrt());
            }
        }
    }
}
