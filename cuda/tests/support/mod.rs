//! Random shards, and how far from the f64 oracle an f32 computation may be.

#![allow(dead_code, reason = "each test file uses a part")]

use floe_cuda::twin::{StateF64, attend_f64};
use floe_cuda::{Attend, KernelError, KvElem, KvRows, Rows, append_kv};

/// Rows in slabs of equal size, the last one padded with NaN: reading past `num_rows` shows.
#[derive(Debug, Clone)]
pub struct SlabRows<E> {
    pub slabs: Vec<Vec<E>>,
    pub slab_rows: usize,
    pub num_rows: usize,
    pub head_dim: usize,
}

impl<E: KvElem> SlabRows<E> {
    /// `k` and `v` f32 [n, head_dim], rounded to `E`.
    pub fn new(k: &[f32], v: &[f32], head_dim: usize, slab_rows: usize) -> Result<Self, KernelError> {
        let num_rows = k.len() / head_dim;
        let mut flat = vec![E::from_f32(f32::NAN); num_rows.next_multiple_of(slab_rows) * 2 * head_dim];
        append_kv(k, v, head_dim, &mut flat[..num_rows * 2 * head_dim])?;
        let slabs = flat.chunks(slab_rows * 2 * head_dim).map(<[E]>::to_vec).collect();
        Ok(Self { slabs, slab_rows, num_rows, head_dim })
    }
}

impl<E: KvElem> KvRows for SlabRows<E> {
    type Elem = E;

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_rows(&self) -> usize {
        self.num_rows
    }

    fn run(&self, first: usize) -> &[E] {
        &self.slabs[first / self.slab_rows][first % self.slab_rows * 2 * self.head_dim..]
    }
}

/// Small deterministic generator (SplitMix64), so that a failing case is its parameters and a seed.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Roughly normal, variance 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| (self.bits() >> 40) as f32 / (1u64 << 24) as f32 - 0.5).sum();
        sum * 3f32.sqrt()
    }

    pub fn normals(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal() * scale).collect()
    }
}

/// The straightforward f32 computation: sums in order of the rows. Its error is the yardstick for every other path.
pub fn plain_f32<R: KvRows>(attend: &Attend<'_, R>, which: &[usize]) -> (Vec<f32>, Vec<f32>) {
    let d = attend.rows.head_dim();
    let group = attend.q.len() / d;
    let (mut out, mut lse) = (vec![0.0; group * d], vec![f32::NEG_INFINITY; group]);
    let row = |i: usize| attend.rows.run(i)[..2 * d].iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
    for h in 0..group {
        let scores: Vec<f32> = which
            .iter()
            .map(|&i| {
                let dot: f32 = attend.q[h * d..(h + 1) * d].iter().zip(row(i)).map(|(q, k)| q * k).sum();
                let s = dot * attend.params.scale;
                attend.params.softcap.map_or(s, |cap| cap * (s / cap).tanh()).min(f32::MAX)
            })
            .collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY {
            continue;
        }
        let mut norm = 0.0;
        for (&i, s) in which.iter().zip(&scores) {
            let weight = (s - max).exp();
            norm += weight;
            for (o, v) in out[h * d..(h + 1) * d].iter_mut().zip(&row(i)[d..]) {
                *o += weight * v;
            }
        }
        out[h * d..(h + 1) * d].iter_mut().for_each(|o| *o /= norm);
        lse[h] = max + norm.ln();
    }
    (out, lse)
}

/// Largest difference per head of `out`, and of `lse`.
fn errors(out: &[f32], lse: &[f32], oracle: &StateF64, h: usize) -> (f64, f64) {
    let d = oracle.out.len() / oracle.lse.len();
    let span = h * d..(h + 1) * d;
    let far = out[span.clone()].iter().zip(&oracle.out[span]).map(|(a, b)| (f64::from(*a) - b).abs());
    let lse_far =
        if f64::from(lse[h]) == oracle.lse[h] { 0.0 } else { (f64::from(lse[h]) - oracle.lse[h]).abs() };
    // Not `f64::max`, which would drop a NaN.
    (far.fold(0.0, |worst, x| if x <= worst { worst } else { x }), lse_far)
}

/// Checks a state against the oracle.
///
/// Allowed, per head: twice the error of the plain f32 computation, plus a floor. The floor comes from the rounding of the
/// scores: with `S = max_i sum_j |q_j k_ij| * |scale|` no f32 summation can promise a score better than some `eps S`, which
/// changes a weight by the factor `e^(4 eps S)`; sums of weights and values add `(16 + sqrt n) eps`. Where `4 eps S` exceeds
/// 1 the winner itself is undetermined in f32: then the output must still lie within the values.
pub fn check_against_oracle<R: KvRows>(
    attend: &Attend<'_, R>,
    which: &Rows<'_>,
    out: &[f32],
    lse: &[f32],
) -> Result<(), String> {
    let d = attend.rows.head_dim();
    let oracle = attend_f64(attend, which).map_err(|e| e.to_string())?;
    let places: Vec<usize> = match which {
        Rows::Range(range) => range.clone().collect(),
        Rows::List(list) => list.iter().map(|&i| i as usize).collect(),
    };
    let (plain_out, plain_lse) = plain_f32(attend, &places);
    let eps = f64::from(f32::EPSILON);
    for h in 0..lse.len() {
        if places.is_empty() {
            if out[h * d..(h + 1) * d].iter().any(|&x| x != 0.0) || lse[h] != f32::NEG_INFINITY {
                return Err(format!("head {h}: not the empty state"));
            }
            continue;
        }
        let (mut reach, mut value_max) = (0f64, 0f64);
        for &i in &places {
            let row = &attend.rows.run(i)[..2 * d];
            let q = &attend.q[h * d..(h + 1) * d];
            let sum: f64 =
                q.iter().zip(row).map(|(q, k)| (f64::from(*q) * f64::from(k.to_f32())).abs()).sum();
            reach = reach.max(sum * f64::from(attend.params.scale.abs()));
            value_max = row[d..].iter().map(|v| f64::from(v.to_f32()).abs()).fold(value_max, f64::max);
        }
        let doubt = 4.0 * eps * reach;
        let sums = (16.0 + (places.len() as f64).sqrt()) * eps;
        let (far, lse_far) = errors(out, lse, &oracle, h);
        let (plain_far, plain_lse_far) = errors(&plain_out, &plain_lse, &oracle, h);
        let allowed =
            if doubt > 1.0 { 2.0 * value_max } else { 2.0 * plain_far + (doubt.exp_m1() + sums) * value_max };
        if far.is_nan() || far > allowed * 1.000_001 + 1e-45 {
            return Err(format!(
                "head {h}: out is {far:e} off, {allowed:e} allowed, plain f32 {plain_far:e}"
            ));
        }
        let allowed = 2.0 * plain_lse_far + doubt + sums + 4.0 * eps * oracle.lse[h].abs();
        if reach <= f64::from(f32::MAX) && (lse_far.is_nan() || lse_far > allowed) {
            return Err(format!("head {h}: lse {} is {lse_far:e} off, {allowed:e} allowed", lse[h]));
        }
    }
    Ok(())
}
