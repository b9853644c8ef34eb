//! Every instruction set against the scalar definition, bit for bit, and the definition against f64.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::index::Query;
use crate::quant::quads_of;

struct Case {
    rng: ChaCha8Rng,
    dim: usize,
    group: usize,
}

impl Case {
    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| 4.0 * self.rng.random::<f32>() - 2.0).collect()
    }

    fn rest(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.rng.random_range(0..18u32)).saturating_sub(2) as f32).collect()
    }
}

/// Runs `check` for shapes that reach every remainder path.
fn each_case(mut check: impl FnMut(&mut Case)) {
    for dim in [1, 3, 4, 15, 64, 80, 96, 128, 250, 576] {
        for group in 1..=9 {
            let rng = ChaCha8Rng::seed_from_u64(dim as u64 * 100 + group as u64);
            check(&mut Case { rng, dim, group });
        }
    }
}

/// The result of `run` on every instruction set must equal the scalar one in every bit.
fn same<T: PartialEq + std::fmt::Debug>(case: &Case, run: impl Fn(Isa) -> Vec<T>) -> Vec<T> {
    let wanted = run(Isa::Scalar);
    for isa in Isa::all_available() {
        assert_eq!(run(isa), wanted, "{isa:?} dim {} group {}", case.dim, case.group);
    }
    wanted
}

fn case_scales(seed: usize) -> Vec<f32> {
    (0..LANES).map(|lane| 0.1 + (lane * seed % 5) as f32).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn logits_are_the_dot_products_of_codes_and_query_on_every_set() {
    each_case(|case| {
        let (dim, group) = (case.dim, case.group);
        let q = case.floats(group * dim);
        let keys: Vec<u8> = (0..quads_of(dim) * 64).map(|_| case.rng.random_range(1..=255)).collect();
        let mut scales: Vec<f32> = case.floats(LANES).iter().map(|x| x.abs()).collect();
        scales[3] = 1e36;
        scales[4] = 0.0;
        let mut quant = QuantQuery::default();
        let spreads: Vec<f32> = case.floats(LANES).iter().map(|x| x.abs()).collect();
        quant.set(&q, &Query { q: &q, group, scale: 0.25, attended_lse: &[] }, 0.5);
        let run = |isa| {
            let mut out = vec![0.0; group * LANES];
            logits(isa, &keys, Scales { key: &scales, spread: &spreads }, &quant, &mut out);
            bits(&out)
        };
        let out = same(case, run);
        for (h, q) in q.chunks_exact(dim).enumerate() {
            let largest = q.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
            for lane in (0..LANES).filter(|&l| l != 3) {
                let scale = f64::from(scales[lane]) * 0.25;
                let code = |d: usize| f64::from(keys[d / 4 * 64 + lane * 4 + d % 4]) - 128.0;
                let half: f64 = q.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() * 0.0625 * 0.5;
                let share = half * f64::from(spreads[lane]);
                let exact: f64 = (0..dim).map(|d| f64::from(q[d]) * code(d)).sum::<f64>() * scale + share;
                // Half a step of the query for each code, plus the rounding of three f32 operations.
                let norm: f64 = (0..dim).map(|d| code(d).abs()).sum::<f64>() * scale;
                let bound = norm * largest / 32000.0 * 0.51 + 1e-6 * (norm * largest + share);
                let got = f64::from(f32::from_bits(out[h * LANES + lane]));
                assert!((got - exact).abs() <= bound, "dim {dim} lane {lane}: {got} against {exact}");
            }
        }
    });
}

#[test]
fn dots_are_exact_integers_on_every_set() {
    each_case(|case| {
        let (dim, rows) = (case.dim, case.group);
        let stride = quads_of(dim) * 4;
        let keys: Vec<u8> = (0..stride * LANES).map(|_| case.rng.random()).collect();
        let data: Vec<i8> = (0..rows * stride).map(|_| case.rng.random()).collect();
        let out = same(case, |isa| {
            let mut out = vec![0; rows * LANES];
            dots(isa, &keys, &data, &mut out);
            out
        });
        let at = |r: usize, lane: usize| {
            (0..stride)
                .map(|d| i32::from(keys[d / 4 * 64 + lane * 4 + d % 4]) * i32::from(data[r * stride + d]))
                .sum()
        };
        assert_eq!(out[(rows - 1) * LANES + 5], at(rows - 1, 5));
    });
}

#[test]
fn exponential_is_within_two_ulp_of_f64_and_zero_far_below() {
    let mut x = 0.0f32;
    while x > -86.5 {
        let exact = f64::from(x).exp();
        assert!((f64::from(scalar::exp(x)) - exact).abs() <= 2.0 * exact * f64::from(f32::EPSILON), "{x}");
        x -= 0.0137;
    }
    assert_eq!((scalar::exp(0.0), scalar::exp(-88.0), scalar::exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
}

#[test]
fn sums_over_parts_have_the_same_bits_on_every_set() {
    each_case(|case| {
        let (parts, group) = (7, case.group);
        let mut logits = case.floats(parts * group * LANES);
        logits[9] = -300.0;
        let rest = case.rest(parts * LANES);
        let max = same(case, |isa| {
            let mut max = vec![f32::NEG_INFINITY; group];
            maxima(isa, &logits, &rest, &mut max);
            bits(&max)
        });
        let max: Vec<f32> = max.into_iter().map(f32::from_bits).collect();
        same(case, |isa| {
            let mut sums = vec![0.0; group * LANES];
            masses(isa, &logits, &rest, &max, &mut sums);
            bits(&sums)
        });
        let part = Part { logits: &logits[..group * LANES], rest: &rest[..LANES] };
        same(case, |isa| {
            let mut best = [0.0; LANES];
            let lanes = rank(isa, part, &max, -1.0, &mut best);
            let mut all = bits(&best);
            all.push(u32::from(lanes));
            all
        });
        let of_all = same(case, |isa| {
            let mut sums = vec![0.0; group * LANES];
            let mut all = vec![0.0; logits.len()];
            exps(isa, (&logits, &rest), &max, (&mut all, &mut sums));
            [bits(&all), bits(&sums)].concat()
        });
        let mut sums = vec![0.0; group * LANES];
        masses(Isa::Scalar, &logits, &rest, &max, &mut sums);
        assert_eq!(of_all[logits.len()..], bits(&sums));
        let scales = case_scales(parts);
        same(case, |isa| {
            let (mut weights, mut sums) = (vec![0.0; group * LANES], vec![0.25; group * LANES]);
            let exps = &logits[..group * LANES];
            weigh(isa, exps, (&rest[..LANES], &scales), &mut weights, &mut sums);
            for at in 0..group * LANES {
                let weight = exps[at] * rest[at % LANES];
                assert_eq!((weights[at], sums[at]), (weight * scales[at % LANES], 0.25 + weight));
            }
            [bits(&weights), bits(&sums)].concat()
        });
    });
}

#[test]
fn weighted_sums_of_values_have_the_same_bits_on_every_set() {
    each_case(|case| {
        let (dim, group) = (case.dim, case.group);
        let values: Vec<i8> = (0..LANES * dim).map(|_| case.rng.random_range(-127..=127)).collect();
        let weights = case.floats(group * LANES);
        let start = case.floats(group * dim);
        let out = same(case, |isa| {
            let mut out = start.clone();
            accumulate(isa, &values, &weights, &mut out);
            bits(&out)
        });
        let (h, d) = (group - 1, dim - 1);
        let exact: f64 = f64::from(start[h * dim + d])
            + (0..LANES)
                .map(|e| f64::from(weights[h * LANES + e]) * f64::from(values[e * dim + d]))
                .sum::<f64>();
        assert!((f64::from(f32::from_bits(out[h * dim + d])) - exact).abs() < 1e-3);
    });
}
