//! Random models and an independent f64 oracle.

#![allow(dead_code, reason = "every test binary compiles this file and uses its own part of it")]

use floe::{Config, DecodeStep, Engine, HeadShape, KvDtype, LayerId, SeqId, StepReport, TensorView};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Keys, values and queries of one layer, exactly representable in bf16.
pub struct Layer {
    pub heads: HeadShape,
    pub num_tokens: usize,
    /// `[tokens, num_kv_heads, head_dim]`
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// `[tokens, num_q_heads, head_dim]`
    pub q: Vec<f32>,
}

impl Layer {
    /// Clustered keys, so that selection has something to find; a loud first token, as real models have.
    pub fn random(heads: HeadShape, num_tokens: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let dim = heads.head_dim();
        let mut normal = move || {
            let sum: f32 = (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum();
            bf16::from_f32(sum * 0.87).to_f32()
        };
        let topics: Vec<f32> = (0..8 * dim).map(|_| normal() * 2.0).collect();
        let mut rows = |n: usize, spread: f32| -> Vec<f32> {
            (0..n)
                .flat_map(|row| {
                    let topic = row / 5 % 8;
                    let base: Vec<f32> = topics[topic * dim..(topic + 1) * dim].to_vec();
                    base.into_iter()
                        .map(|t| bf16::from_f32(t + spread * normal()).to_f32())
                        .collect::<Vec<_>>()
                })
                .collect()
        };
        let mut k = rows(num_tokens * heads.num_kv_heads(), 0.7);
        k.iter_mut().take(heads.num_kv_heads() * dim).for_each(|x| *x *= 2.0);
        let v = rows(num_tokens * heads.num_kv_heads(), 1.0);
        let q = rows(num_tokens * heads.num_q_heads(), 0.7);
        Self { heads, num_tokens, k, v, q }
    }

    pub fn rows(&self, tokens: std::ops::Range<usize>) -> (TensorView<'_>, TensorView<'_>) {
        let per_token = self.heads.num_kv_heads() * self.heads.head_dim();
        let range = tokens.start * per_token..tokens.end * per_token;
        let shape = [tokens.len(), self.heads.num_kv_heads(), self.heads.head_dim()];
        (
            TensorView::contiguous(&self.k[range.clone()], shape).unwrap(),
            TensorView::contiguous(&self.v[range], shape).unwrap(),
        )
    }

    pub fn scale(&self) -> f32 {
        (self.heads.head_dim() as f32).powf(-0.5)
    }

    /// Decodes the token at `position`; `[num_q_heads, head_dim]`.
    pub fn decode(
        &self,
        engine: &mut Engine,
        seq: SeqId,
        layer: usize,
        position: usize,
    ) -> (Vec<f32>, StepReport) {
        let (k_new, v_new) = self.rows(position..position + 1);
        let shape = [1, self.heads.num_q_heads(), self.heads.head_dim()];
        let q = TensorView::contiguous(self.query(position), shape).unwrap();
        let layer = LayerId(layer);
        let step = DecodeStep { layer, position, q, q_pre: Some(q), k_new, v_new, scale: self.scale() };
        let (mut out, mut report) = (vec![f32::NAN; self.query(position).len()], StepReport::default());
        engine.decode(seq, &step, &mut out, &mut report).unwrap();
        (out, report)
    }

    /// Queries of `tokens`, `[tokens, num_q_heads, head_dim]`.
    pub fn queries(&self, tokens: std::ops::Range<usize>) -> TensorView<'_> {
        let per_token = self.heads.num_q_heads() * self.heads.head_dim();
        let shape = [tokens.len(), self.heads.num_q_heads(), self.heads.head_dim()];
        TensorView::contiguous(&self.q[tokens.start * per_token..tokens.end * per_token], shape).unwrap()
    }

    fn query(&self, position: usize) -> &[f32] {
        let per_token = self.heads.num_q_heads() * self.heads.head_dim();
        &self.q[position * per_token..][..per_token]
    }

    /// Full attention of the token at `position` over `0..=position`, every number in f64, no shared code.
    pub fn oracle(&self, position: usize) -> Vec<f64> {
        self.oracle_from(0, position)
    }

    /// Attention of the token at `position` over `first..=position`.
    pub fn oracle_from(&self, first: usize, position: usize) -> Vec<f64> {
        let (dim, kv_heads) = (self.heads.head_dim(), self.heads.num_kv_heads());
        let mut out = Vec::new();
        for (head, q) in self.query(position).chunks_exact(dim).enumerate() {
            let kv_head = head / self.heads.group();
            let row = |data: &[f32], t: usize| -> Vec<f64> {
                data[(t * kv_heads + kv_head) * dim..][..dim].iter().map(|x| f64::from(*x)).collect()
            };
            let logits: Vec<f64> = (first..=position)
                .map(|t| {
                    let dot: f64 = row(&self.k, t).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum();
                    dot * f64::from(self.scale())
                })
                .collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = logits.iter().map(|l| (l - max).exp()).sum();
            let mut sum = vec![0.0; dim];
            for (t, logit) in logits.iter().enumerate() {
                let weight = (logit - max).exp() / total;
                sum.iter_mut().zip(row(&self.v, first + t)).for_each(|(s, v)| *s += weight * v);
            }
            out.extend(sum);
        }
        out
    }
}

pub fn config(heads: HeadShape, policy: &str, budget: usize) -> Config {
    let config = Config::new(1, heads, KvDtype::Bf16);
    Config { policy: policy.parse().unwrap(), budget, threads: 2, ..config }
}

/// Largest distance, relative to the size of the oracle's vector.
pub fn worst_error(got: &[f32], want: &[f64]) -> f64 {
    let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt() / (want.len() as f64).sqrt();
    got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max) / norm
}
