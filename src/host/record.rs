//! Recording: a KV backend that attends exactly and writes what it sees as format-1 traces, with what the model said.

use std::path::{Path, PathBuf};

use half::bf16;

use super::backend::{AttendArgs, KvBackend, Phase};
use super::logits::LogitsFile;
use super::{FloeBackend, HostError, HostResult, Model, PREFILL_TOKENS, Pairing};
use crate::shape::KvDtype;
use crate::trace::{Rope, Segment, Tensor, TraceMeta, TraceWriter};
use crate::view::{TensorView, widen};

/// What to record of a text.
#[derive(Clone, Debug)]
pub struct RecordPlan {
    /// Layers; empty = all.
    pub layers: Vec<usize>,
    /// kv heads; empty = all.
    pub heads: Vec<usize>,
    /// Positions with keys and values.
    pub num_tokens: usize,
    /// Queries, at the last positions.
    pub num_queries: usize,
    /// What the text is, for the metadata.
    pub text: String,
    /// Licence of the text, for the metadata.
    pub licence: String,
}

/// Full attention that writes the chosen shards.
pub struct Recorder {
    inner: FloeBackend,
    shards: Vec<Shard>,
    first_query: usize,
    num_tokens: usize,
    /// Path and origin of the logits.
    logits: (PathBuf, [(&'static str, String); 3]),
}

/// Queries whose logits are computed at once: 40 MB with a vocabulary of 150,000.
const LOGITS_AT_ONCE: usize = 64;

struct Shard {
    layer: usize,
    head: usize,
    path: PathBuf,
    writer: TraceWriter,
}

impl Recorder {
    /// Starts one trace per layer and head in `folder`, which exists, named after `model`.
    ///
    /// # Errors
    /// [`HostError::Argument`] for a layer, head or length that the model does not have; [`HostError::Trace`] when a
    /// file cannot be made.
    pub fn create(model: &Model, plan: &RecordPlan, folder: &Path) -> HostResult<Self> {
        let config = model.config();
        let all = |given: &[usize], count: usize, field: &'static str| -> HostResult<Vec<usize>> {
            match given.iter().find(|x| **x >= count) {
                Some(bad) => Err(HostError::argument(field, bad, format!("the model has {count}"))),
                None if given.is_empty() => Ok((0..count).collect()),
                None => Ok(given.to_vec()),
            }
        };
        if plan.num_queries == 0 || plan.num_queries > plan.num_tokens {
            let reason = format!("must be 1 to the {} tokens", plan.num_tokens);
            return Err(HostError::argument("queries", plan.num_queries, reason));
        }
        let first_query = plan.num_tokens - plan.num_queries;
        let layers = all(&plan.layers, config.num_layers, "layers")?;
        let heads = all(&plan.heads, config.heads.num_kv_heads(), "heads")?;
        let stem: String = model
            .name
            .chars()
            .map(|c| if c.is_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
            .collect();
        let mut shards = Vec::new();
        for (layer, head) in layers.iter().flat_map(|l| heads.iter().map(move |h| (*l, *h))) {
            let meta = TraceMeta {
                model: model.name.clone(),
                layer,
                kv_head: head,
                num_layers: config.num_layers,
                num_q_heads: config.heads.num_q_heads(),
                num_kv_heads: config.heads.num_kv_heads(),
                head_dim: config.heads.head_dim(),
                rope: match config.pairing {
                    Pairing::Interleaved => Rope::Interleaved,
                    Pairing::Halves => Rope::NeoxHalf,
                },
                rope_theta: config.rope_theta[layer],
                softmax_scale: f64::from(config.scale),
                num_tokens: plan.num_tokens,
                num_queries: plan.num_queries,
                first_query_pos: first_query,
                index_until: first_query,
                rope_offset: 0,
                segments: vec![Segment { name: "text".into(), start: first_query, end: plan.num_tokens }],
                text: plan.text.clone(),
                licence: plan.licence.clone(),
                extra: std::collections::BTreeMap::new(),
            };
            let path = folder.join(format!("{stem}_L{layer}H{head}.safetensors"));
            let writer = TraceWriter::create(&path, meta)?;
            shards.push(Shard { layer, head, path, writer });
        }
        let full = "full".parse().map_err(|_| HostError::Backend("policy `full` is gone".into()))?;
        // f32, so that the recorded numbers come from unrounded keys and values.
        let inner = FloeBackend::new(
            config,
            KvDtype::F32,
            full,
            crate::Config::new(1, config.heads, KvDtype::F32).budget,
        )?;
        let about = [("model", &model.name), ("text", &plan.text), ("licence", &plan.licence)];
        let logits = folder.join(format!("{stem}_logits.safetensors"));
        let logits = (logits, about.map(|(field, value)| (field, value.clone())));
        Ok(Self { inner, shards, first_query, num_tokens: plan.num_tokens, logits })
    }

    /// Runs the text and completes the files; `progress` hears of every part that is done. The traces' paths, and last that of
    /// the logits ([format](super::TOP)).
    ///
    /// # Errors
    /// [`HostError::Argument`] when the tokens are not as many as planned; errors of the model and of the files.
    pub fn run(
        mut self,
        model: &Model,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize),
    ) -> HostResult<Vec<PathBuf>> {
        if tokens.len() != self.num_tokens {
            let reason = format!("{} were planned", self.num_tokens);
            return Err(HostError::argument("tokens", tokens.len(), reason));
        }
        let (path, about) = self.logits.clone();
        let first_query = self.first_query;
        let mut logits = LogitsFile::new(path, (tokens, first_query, model.config().vocab), about);
        let mut done = 0;
        for part in tokens.chunks(PREFILL_TOKENS) {
            let hidden = model.decoder.forward(part, Phase::Prefill, &mut self)?;
            let mut from = first_query.saturating_sub(done);
            while from < part.len() {
                let to = part.len().min(from + LOGITS_AT_ONCE);
                logits.push(&model.decoder.logits_of(&hidden, from..to)?)?;
                from = to;
            }
            done += part.len();
            progress(part.len());
        }
        let mut paths = self.finish()?;
        paths.push(logits.finish()?);
        Ok(paths)
    }

    /// Gives the complete traces their names; their paths.
    fn finish(self) -> HostResult<Vec<PathBuf>> {
        let finish = |shard: Shard| -> HostResult<PathBuf> {
            shard.writer.finish()?;
            Ok(shard.path)
        };
        self.shards.into_iter().map(finish).collect()
    }
}

impl KvBackend for Recorder {
    fn attend(&mut self, args: &AttendArgs<'_>, out: &mut [f32]) -> HostResult<()> {
        let tokens = args.k.shape()[0];
        let group = args.q.shape()[1] / args.k.shape()[1].max(1);
        let queries = self.first_query.saturating_sub(args.position).min(tokens)..tokens;
        for shard in self.shards.iter_mut().filter(|shard| shard.layer == args.layer) {
            let own = shard.head..shard.head + 1;
            shard.writer.append(Tensor::K, &rows(&args.k, 0..tokens, own.clone()))?;
            shard.writer.append(Tensor::V, &rows(&args.v, 0..tokens, own))?;
            let of_group = shard.head * group..(shard.head + 1) * group;
            shard.writer.append(Tensor::Q, &rows(&args.q, queries.clone(), of_group.clone()))?;
            shard.writer.append(Tensor::QPre, &rows(&args.q_pre, queries.clone(), of_group))?;
        }
        self.inner.attend(args, out)
    }

    fn prompt_ended(&mut self) -> HostResult<()> {
        Ok(())
    }

    fn truncate(&mut self, num_tokens: usize) -> HostResult<()> {
        if num_tokens < self.inner.num_tokens() {
            return Err(HostError::Backend("a trace that is being written cannot forget tokens".into()));
        }
        Ok(())
    }

    fn num_tokens(&self) -> usize {
        self.inner.num_tokens()
    }
}

/// The rows of some tokens and heads, rounded to bf16.
fn rows(view: &TensorView<'_>, tokens: std::ops::Range<usize>, heads: std::ops::Range<usize>) -> Vec<bf16> {
    let mut wide = vec![0.0f32; view.shape()[2]];
    let mut rounded = Vec::with_capacity(tokens.len() * heads.len() * wide.len());
    for token in tokens {
        for head in heads.clone() {
            widen(view.row(token, head), &mut wide);
            rounded.extend(wide.iter().map(|x| bf16::from_f32(*x)));
        }
    }
    rounded
}
