//! Keys, values and queries of one shard, synthetic or from a trace.

use std::path::Path;

use anyhow::{Context, ensure};
use floe::trace::{Rope, Rotation, SynthRequest, Trace};
use floe_index::{Batch, Query};
use half::bf16;

/// Tokens at the start that engines attend always and never give to an index.
const NUM_SINKS: usize = 16;
/// Tokens inserted after the build, sixteen at a time.
const NUM_INSERTED: usize = 1024;

/// One shard.
pub struct Data {
    /// What it is, for people.
    pub name: String,
    /// Elements of a key.
    pub dim: usize,
    /// Query heads.
    pub group: usize,
    /// Tokens that the index is built from; those after them are inserted.
    pub num_built: usize,
    /// `[built + inserted]` positions.
    ids: Vec<u32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `[built, 2, dim]` as a cache in host memory holds them.
    pub rows: Vec<bf16>,
    /// `[queries, group, dim]`
    queries: Vec<f32>,
    scale: f32,
}

impl Data {
    /// `n` synthetic tokens of 128 elements and a group of 4 heads, written to and read back from a file under `folder`.
    /// With `num_needles` half of the queries look for one of them.
    pub fn synthetic(
        n: usize,
        num_queries: usize,
        num_needles: usize,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let request = SynthRequest {
            num_tokens: NUM_SINKS + n + NUM_INSERTED,
            num_queries: NUM_INSERTED,
            head_dim: 128,
            group: 4,
            num_needles,
            rope: Rope::NeoxHalf,
            seed: 0,
        };
        let path = folder.join(format!("floe-bench-{}-{n}.safetensors", std::process::id()));
        let read = request.write(&path, &mut |_| {}).and_then(|()| Trace::open(&path));
        // The file is mapped: its name is of no further need, whether it was written whole or not.
        let removed = std::fs::remove_file(&path);
        let trace = read?;
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
        Self::of(&trace, "synthetic".to_owned(), n, num_queries)
    }

    /// `n` tokens that repeat the prefilled part of a trace as often as it takes, ending where it ends; every token is turned by
    /// rotary embedding from its old position to its new one, as if the text had been read again and again. Queries follow
    /// likewise.
    pub fn tiled(trace: &Trace, n: usize, num_queries: usize) -> anyhow::Result<Self> {
        let meta = trace.meta();
        let (dim, first) = (meta.head_dim, meta.first_query_pos);
        let most = Self::most(trace);
        ensure!(n > 0 && most > 0, "{} has no tokens before its first query", trace.name());
        let rotation = Rotation::new(meta.rope, dim, meta.rope_theta);
        let mut turned = vec![0.0f64; dim];
        let mut turn = |row: &[bf16], by: f64, to: &mut Vec<f32>| {
            turned.iter_mut().zip(row).for_each(|(t, x)| *t = x.to_f64());
            rotation.rotate(&mut turned, by);
            to.extend(turned.iter().map(|&x| bf16::from_f64(x).to_f32()));
        };
        let num_inserted = NUM_INSERTED.min(meta.num_tokens - first);
        let (mut keys, mut values, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..n + num_inserted {
            // Counted back from the end of the prefill, so that the last repetition is whole.
            let source = if i < n { first - 1 - (n - 1 - i) % most } else { first + i - n };
            let row = source * dim..(source + 1) * dim;
            turn(&trace.k()[row.clone()], (NUM_SINKS + i) as f64 - source as f64, &mut keys);
            values.extend(trace.v()[row.clone()].iter().map(|x| x.to_f32()));
            if i < n {
                rows.extend(keys[i * dim..].iter().map(|&x| bf16::from_f32(x)));
                rows.extend_from_slice(&trace.v()[row]);
            }
        }
        let num_queries = num_queries.min(meta.num_queries);
        let mut queries = Vec::new();
        for i in 0..num_queries {
            let by = (NUM_SINKS + n) as f64 - first as f64;
            for head in trace.query(i * meta.num_queries / num_queries).chunks_exact(dim) {
                turn(head, by, &mut queries);
            }
        }
        Ok(Self {
            name: "tiled".to_owned(),
            dim,
            group: meta.group(),
            num_built: n,
            ids: (NUM_SINKS..NUM_SINKS + n + num_inserted).map(|t| t as u32).collect(),
            keys,
            values,
            rows,
            queries,
            scale: meta.softmax_scale as f32,
        })
    }

    /// The first `n` tokens of a trace after its sinks.
    pub fn real(trace: &Trace, n: usize, num_queries: usize) -> anyhow::Result<Self> {
        Self::of(trace, trace.name(), n, num_queries)
    }

    /// Tokens that a build from `trace` can hold so that every query sees them all.
    pub fn most(trace: &Trace) -> usize {
        trace.meta().first_query_pos.saturating_sub(NUM_SINKS)
    }

    fn of(trace: &Trace, name: String, n: usize, num_queries: usize) -> anyhow::Result<Self> {
        ensure!(n > 0 && n <= Self::most(trace), "{name} has no {n} tokens before its first query");
        let meta = trace.meta();
        let dim = meta.head_dim;
        let tokens = NUM_SINKS..(NUM_SINKS + n + NUM_INSERTED).min(meta.num_tokens);
        let span = tokens.start * dim..tokens.end * dim;
        let widen = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let (k, v) = (&trace.k()[span.clone()], &trace.v()[span]);
        let rows = k.chunks_exact(dim).zip(v.chunks_exact(dim)).take(n);
        let num_queries = num_queries.min(meta.num_queries);
        let query = |i: usize| widen(trace.query(i * meta.num_queries / num_queries));
        Ok(Self {
            name,
            dim,
            group: meta.group(),
            num_built: n,
            ids: tokens.map(|t| t as u32).collect(),
            keys: widen(k),
            values: widen(v),
            rows: rows.flat_map(|(k, v)| k.iter().chain(v)).copied().collect(),
            queries: (0..num_queries).flat_map(query).collect(),
            scale: meta.softmax_scale as f32,
        })
    }

    /// Tokens in all.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Queries.
    pub fn num_queries(&self) -> usize {
        self.queries.len() / (self.group * self.dim)
    }

    /// Tokens by their order.
    pub fn batch(&self, range: std::ops::Range<usize>) -> Batch<'_> {
        let span = range.start * self.dim..range.end * self.dim;
        Batch { ids: &self.ids[range], keys: &self.keys[span.clone()], values: &self.values[span] }
    }

    /// A query that knows nothing of what is attended elsewhere.
    pub fn query(&self, at: usize) -> Query<'_> {
        let size = self.group * self.dim;
        let q = &self.queries[at * size..(at + 1) * size];
        Query { q, group: self.group, scale: self.scale, attended_lse: &[] }
    }

    /// Place of a token among the built ones.
    pub fn place(&self, id: u32) -> usize {
        id as usize - NUM_SINKS
    }
}
