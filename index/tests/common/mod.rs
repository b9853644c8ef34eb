//! Data and oracles shared by the tests.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]
#![allow(dead_code, reason = "each test file uses its part")]

use floe_index::sketch::SketchConfig;
use floe_index::{Batch, Dci, Flat, FlatTokens, Hnsw, HnswConfig, Icecache, IndexError, KeyIndex, Query};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens with queries that like some of them.
pub struct Data {
    pub dim: usize,
    pub group: usize,
    pub ids: Vec<u32>,
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    /// `[queries, group, dim]`
    pub q: Vec<f32>,
}

impl Data {
    pub fn batch(&self, range: std::ops::Range<usize>) -> Batch<'_> {
        let span = range.start * self.dim..range.end * self.dim;
        Batch { ids: &self.ids[range], keys: &self.keys[span.clone()], values: &self.values[span] }
    }

    pub fn query(&self, at: usize) -> Query<'_> {
        let size = self.group * self.dim;
        let scale = 1.0 / (self.dim as f32).sqrt();
        Query { q: &self.q[at * size..(at + 1) * size], group: self.group, scale, attended_lse: &[] }
    }
}

fn normal(rng: &mut ChaCha8Rng) -> f32 {
    // Irwin-Hall: twelve uniforms have variance one.
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

/// Drifting topics with a common offset, as post-RoPE keys have; sixteen queries near random keys.
pub fn clustered(n: usize, dim: usize, group: usize, seed: u64) -> Data {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let offset: Vec<f32> = (0..dim).map(|_| 2.0 * normal(&mut rng)).collect();
    let topics: Vec<f32> = (0..64 * dim).map(|_| normal(&mut rng)).collect();
    let mut keys = Vec::with_capacity(n * dim);
    let mut values = Vec::with_capacity(n * dim);
    for _ in 0..n {
        let topic = rng.random_range(0..64usize);
        for d in 0..dim {
            let t = topics[topic * dim + d];
            keys.push(offset[d] + t + 0.5 * normal(&mut rng));
            values.push(0.3 * t + normal(&mut rng) + 0.1);
        }
    }
    let mut q = Vec::new();
    for _ in 0..16 {
        for _ in 0..group {
            let topic = rng.random_range(0..64usize);
            q.extend((0..dim).map(|d| 2.0 * topics[topic * dim + d] + 0.5 * normal(&mut rng)));
        }
    }
    Data { dim, group, ids: (0..n as u32).map(|i| i + 16).collect(), keys, values, q }
}

/// An implementation and what may be asked of it.
pub struct Case {
    pub name: String,
    pub index: Box<dyn KeyIndex>,
    /// Unlimited effort considers every token, so it fills any budget, best first.
    pub exact: bool,
    /// The tail answers for what was not selected.
    pub summarises: bool,
    pub restore: fn(&[u8]) -> Restored,
}

/// What a restore gives.
pub type Restored = Result<Box<dyn KeyIndex>, IndexError>;

fn boxed<T: KeyIndex + 'static>(index: Result<T, IndexError>) -> Restored {
    index.map(|index| Box::new(index) as Box<dyn KeyIndex>)
}

/// Every implementation of the trait, empty.
pub fn implementations(dim: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for sketch in [SketchConfig::OFF, SketchConfig::K1, SketchConfig::K2V2] {
        cases.push(Case {
            name: format!("flat {sketch}"),
            index: boxed(Flat::with_sketch(dim, sketch)).unwrap(),
            exact: true,
            summarises: true,
            restore: |bytes| boxed(Flat::restore(bytes)),
        });
        cases.push(Case {
            name: format!("dci {sketch}"),
            index: boxed(Dci::with_sketch(dim, sketch)).unwrap(),
            exact: true,
            summarises: true,
            restore: |bytes| boxed(Dci::restore(bytes)),
        });
    }
    cases.push(Case {
        name: "tokens".into(),
        index: boxed(FlatTokens::new(dim)).unwrap(),
        exact: true,
        summarises: true,
        restore: |bytes| boxed(FlatTokens::restore(bytes)),
    });
    cases.push(Case {
        name: "hnsw".into(),
        index: boxed(Hnsw::new(dim, HnswConfig::default())).unwrap(),
        exact: false,
        summarises: false,
        restore: |bytes| boxed(Hnsw::restore(bytes)),
    });
    cases.push(Case {
        name: "icecache".into(),
        index: boxed(Icecache::new(dim, 0)).unwrap(),
        exact: false,
        summarises: false,
        restore: |bytes| boxed(Icecache::restore(bytes)),
    });
    cases
}

/// Attention in f64.
pub struct Exact {
    pub out: Vec<f64>,
    pub lse: Vec<f64>,
}

/// Attention over the tokens that `keep` accepts.
pub fn attention(data: &Data, query: &Query<'_>, keep: impl Fn(u32) -> bool) -> Exact {
    let dim = data.dim;
    let mut out = vec![0.0; query.group * dim];
    let mut lse = vec![f64::NEG_INFINITY; query.group];
    for h in 0..query.group {
        let q = &query.q[h * dim..(h + 1) * dim];
        let logits: Vec<f64> = data
            .keys
            .chunks_exact(dim)
            .zip(&data.ids)
            .map(|(k, &id)| {
                let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                if keep(id) { dot * f64::from(query.scale) } else { f64::NEG_INFINITY }
            })
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        lse[h] = max + sum.ln();
        for (l, v) in logits.iter().zip(data.values.chunks_exact(dim)) {
            let w = (l - lse[h]).exp();
            for (o, &x) in out[h * dim..(h + 1) * dim].iter_mut().zip(v) {
                *o += w * f64::from(x);
            }
        }
    }
    Exact { out, lse }
}
