//! The engine: owns every sequence and resource, and is the whole contract to host engines.

mod crew;
mod persist;
mod prefill_attend;
mod slab_book;
mod spill;

use std::collections::HashMap;

use crew::{Crew, on_threads};
use spill::Patience;

pub use persist::{SEQUENCE_KIND, SavedSequence};
pub use prefill_attend::PrefillStep;

use crate::attend::{AttentionBackend, CpuBackend};
use crate::config::Config;
use crate::decode::{StepContext, Workspaces, decode_layer, guess_shard, prefetch_layer};
use crate::error::{Error, Result};
use crate::hot::HotShard;
use crate::ids::{LayerId, SeqId, TokenPos};
use crate::page::{ShardPages, WarmMemory};
use crate::policy::PrefetchKind;
use crate::prefill;
use crate::reuse::ReuseSummary;
use crate::select::Policy;
use crate::sequence::Sequence;
use crate::sim::{Clock, SystemClock};
use crate::step::StepReport;
use crate::view::TensorView;

/// One token of one layer: what a host engine hands over at its attention.
#[derive(Clone, Copy, Debug)]
pub struct DecodeStep<'a> {
    /// Layer, `0..num_layers`.
    pub layer: LayerId,
    /// Position of the token; the next one of the layer.
    pub position: usize,
    /// Post-RoPE queries, `[1, num_q_heads, head_dim]`.
    pub q: TensorView<'a>,
    /// Pre-RoPE queries of the same shape, for decode reuse; without them nothing is reused.
    pub q_pre: Option<TensorView<'a>>,
    /// The token's post-RoPE key, `[1, num_kv_heads, head_dim]`.
    pub k_new: TensorView<'a>,
    /// The token's value, `[1, num_kv_heads, head_dim]`.
    pub v_new: TensorView<'a>,
    /// Softmax scale, applied to `q.k`; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// KV cache and attention of one model, for any number of sequences.
///
/// ```
/// use floe::{Config, DecodeStep, Engine, HeadShape, KvDtype, LayerId, StepReport, TensorView};
///
/// # fn main() -> floe::Result<()> {
/// let heads = HeadShape::new(4, 2, 8)?;
/// let mut engine = Engine::open(Config::new(1, heads, KvDtype::F32))?;
/// let seq = engine.admit()?;
///
/// let prompt = vec![0.1f32; 100 * 2 * 8];
/// let prompt = TensorView::contiguous(&prompt[..], [100, 2, 8])?;
/// engine.prefill(seq, LayerId(0), &prompt, &prompt)?;
///
/// let (q, kv) = ([0.2f32; 32], [0.3f32; 16]);
/// let step = DecodeStep {
///     layer: LayerId(0),
///     position: 100,
///     q: TensorView::contiguous(&q[..], [1, 4, 8])?,
///     q_pre: None,
///     k_new: TensorView::contiguous(&kv[..], [1, 2, 8])?,
///     v_new: TensorView::contiguous(&kv[..], [1, 2, 8])?,
///     scale: 8f32.powf(-0.5),
/// };
/// let (mut out, mut report) = ([0.0f32; 32], StepReport::default());
/// engine.decode(seq, &step, &mut out, &mut report)?;
/// assert_eq!(report.shards[0].tokens_attended, 101);
/// # Ok(())
/// # }
/// ```
pub struct Engine {
    config: Config,
    sequences: HashMap<SeqId, Sequence>,
    next_seq: u64,
    /// Own threads; `None` = those of the caller.
    crew: Option<Crew>,
    workspaces: Workspaces,
    backend: Box<dyn AttentionBackend>,
    memory: WarmMemory,
    clock: Box<dyn Clock>,
    cold: Option<spill::Cold>,
}

impl Engine {
    /// Validates the configuration and starts the worker pool.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field; [`Error::Pool`] when the threads cannot be started.
    pub fn open(config: Config) -> Result<Self> {
        config.validate()?;
        let crew = if config.threads == 0 { None } else { Some(Crew::start(config.threads)?) };
        let cold = spill::open(&config)?;
        let workspaces = Workspaces::new(config.heads.num_kv_heads());
        let backend: Box<dyn AttentionBackend> = Box::new(CpuBackend::detect());
        let memory = spill::warm_memory(&config, &*backend);
        Ok(Self {
            config,
            cold,
            sequences: HashMap::new(),
            next_seq: 0,
            crew,
            workspaces,
            memory,
            backend,
            clock: Box::new(SystemClock::start()),
        })
    }

    /// The configuration the engine was opened with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Opens an empty sequence over all layers and heads.
    ///
    /// # Errors
    /// When the policy cannot be set up for the model's shape.
    pub fn admit(&mut self) -> Result<SeqId> {
        let sequence = Sequence::new(&self.config, &self.memory)?;
        let seq = SeqId(self.next_seq);
        self.next_seq += 1;
        self.sequences.insert(seq, sequence);
        Ok(seq)
    }

    /// Appends `[tokens, num_kv_heads, head_dim]` post-RoPE keys and values to one layer. Chunks of any size, any number
    /// of times, give the same cache; nothing is stored when an error is returned.
    ///
    /// # Errors
    /// Unknown sequence or layer, a shape that does not fit the model, a key or value that is not finite.
    pub fn prefill(
        &mut self,
        seq: SeqId,
        layer: LayerId,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
    ) -> Result<()> {
        let heads = self.config.heads;
        let shape = [k.shape()[0], heads.num_kv_heads(), heads.head_dim()];
        check_rows(k, v, ("k", "v"), shape)?;
        let sequence = self.sequences.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?;
        let num_layers = sequence.layers.len();
        let shards =
            sequence.layers.get_mut(layer.0).ok_or(Error::UnknownLayer { got: layer.0, num_layers })?;
        check_room(shards.num_tokens, shape[0])?;
        on_threads(self.crew.as_ref(), || prefill::append(shards, k, v))?;
        self.spill((seq, layer.0), Patience::Prefill);
        Ok(())
    }

    /// Appends one token to one layer and attends with its queries; `out` receives `[num_q_heads, head_dim]` f32. Nothing
    /// is stored when an error is returned.
    ///
    /// # Errors
    /// Unknown sequence or layer, a position that is not the layer's next, a shape that does not fit the model, a number
    /// that is not finite.
    pub fn decode(
        &mut self,
        seq: SeqId,
        step: &DecodeStep<'_>,
        out: &mut [f32],
        report: &mut StepReport,
    ) -> Result<()> {
        let heads = self.config.heads;
        let q_shape = [1, heads.num_q_heads(), heads.head_dim()];
        for (field, view) in [("q", Some(&step.q)), ("q_pre", step.q_pre.as_ref())] {
            if let Some(view) = view {
                view.expect(field, q_shape)?;
                check_finite(field, view)?;
            }
        }
        check_rows(
            &step.k_new,
            &step.v_new,
            ("k_new", "v_new"),
            [1, heads.num_kv_heads(), heads.head_dim()],
        )?;
        if out.len() != heads.num_q_heads() * heads.head_dim() {
            return Err(Error::shape("out", format!("{q_shape:?}"), format!("{} elements", out.len())));
        }
        if !step.scale.is_finite() || step.scale <= 0.0 {
            return Err(Error::config("scale", step.scale, "must be finite and above 0"));
        }
        let sequence = self.sequences.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?;
        let num_layers = sequence.layers.len();
        let layer =
            sequence.layers.get(step.layer.0).ok_or(Error::UnknownLayer { got: step.layer.0, num_layers })?;
        if step.position != layer.num_tokens {
            let expected = layer.num_tokens;
            return Err(Error::Position { seq, layer: step.layer, got: step.position, expected });
        }
        check_room(layer.num_tokens, 1)?;
        let context = StepContext {
            config: &self.config,
            backend: &*self.backend,
            clock: &*self.clock,
            workspaces: &self.workspaces,
            layer: step.layer.0,
            scale: step.scale,
            q: step.q,
            q_pre: step.q_pre,
        };
        let stored = layer.num_tokens;
        let layers = &mut sequence.layers;
        on_threads(self.crew.as_ref(), || {
            let layer = &mut layers[step.layer.0];
            prefill::append(layer, &step.k_new, &step.v_new)
                .and_then(|()| decode_layer(&context, layer, out, report))
                .or_else(|error| layer.truncate(stored).and(Err(error)))?;
            let target = match self.config.hot.prefetch {
                PrefetchKind::None => return Ok(()),
                PrefetchKind::Last => step.layer.0,
                PrefetchKind::NextLayer | PrefetchKind::Predicted => (step.layer.0 + 1) % num_layers,
            };
            prefetch_layer(&context, &mut layers[target])
        })?;
        self.spill((seq, step.layer.0), Patience::Step);
        Ok(())
    }

    /// Builds the indexes of a prefilled sequence now, all shards in parallel, instead of during the first step.
    ///
    /// # Errors
    /// Unknown sequence, or an index that refuses its keys.
    pub fn publish(&mut self, seq: SeqId) -> Result<()> {
        use rayon::prelude::*;
        let sequence = self.sequences.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?;
        on_threads(self.crew.as_ref(), || {
            sequence
                .layers
                .par_iter_mut()
                .filter(|l| l.span.is_none())
                .flat_map(|l| l.shards.par_iter_mut())
                .try_for_each(prefill::publish)
        })
    }

    /// Appends to `found`, per kv head and ascending, the positions that a step of `layer` with these queries would retrieve;
    /// stores nothing and attends to nothing but sinks and window. `q` is `[1, num_q_heads, head_dim]`. A search with
    /// another layer's queries is a guess at what the layer will ask for. Allocates; meant for profiles.
    ///
    /// # Errors
    /// Unknown sequence or layer, queries that do not fit the model, an index that refuses them.
    pub fn guess(
        &self,
        seq: SeqId,
        layer: LayerId,
        q: &TensorView<'_>,
        scale: f32,
        found: &mut Vec<TokenPos>,
    ) -> Result<()> {
        let heads = self.config.heads;
        q.expect("q", [1, heads.num_q_heads(), heads.head_dim()])?;
        check_finite("q", q)?;
        let sequence = self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        let num_layers = sequence.layers.len();
        let layer = sequence.layers.get(layer.0).ok_or(Error::UnknownLayer { got: layer.0, num_layers })?;
        let context = StepContext {
            config: &self.config,
            backend: &*self.backend,
            clock: &*self.clock,
            workspaces: &self.workspaces,
            layer: 0,
            scale,
            q: *q,
            q_pre: None,
        };
        layer
            .shards
            .iter()
            .enumerate()
            .try_for_each(|(head, shard)| guess_shard(&context, (head, shard), found))
    }

    /// Forgets the tokens at and after `num_tokens` in every layer, as speculative decoding does with refused drafts. A
    /// layer that holds fewer is left as it is.
    ///
    /// # Errors
    /// Unknown sequence, or an index that cannot remove.
    pub fn truncate(&mut self, seq: SeqId, num_tokens: usize) -> Result<()> {
        let sequence = self.sequences.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?;
        for layer in &mut sequence.layers {
            if num_tokens < layer.num_tokens {
                layer.truncate(num_tokens)?;
            }
        }
        Ok(())
    }

    /// Empties the hot tier of a sequence: its next steps take longer and give the same bits.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn empty_hot(&mut self, seq: SeqId) -> Result<()> {
        self.hot_shards(seq)?.for_each(|hot| hot.iter_mut().for_each(HotShard::clear));
        Ok(())
    }

    /// Gives every kv head of a sequence another number of slots, empty ones; 0 takes the hot tier away. A sequence that was
    /// admitted without one has none to resize.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn resize_hot(&mut self, seq: SeqId, slots: usize) -> Result<()> {
        self.hot_shards(seq)?.for_each(|hot| *hot = hot.as_ref().and_then(|hot| hot.resized(slots)));
        Ok(())
    }

    fn hot_shards(&mut self, seq: SeqId) -> Result<impl Iterator<Item = &mut Option<HotShard>>> {
        let sequence = self.sequences.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?;
        Ok(sequence.layers.iter_mut().flat_map(|l| &mut l.shards).map(|shard| &mut shard.hot))
    }

    /// Changes how tokens are selected from now on. Every sequence keeps its keys and values; selectors start anew and
    /// learn all stored tokens with the next step, or with [`Engine::publish`].
    ///
    /// # Errors
    /// [`Error::Config`] when the budget cannot hold sinks and window; the engine is then unchanged.
    pub fn set_policy(&mut self, policy: Policy, budget: usize) -> Result<()> {
        let config = Config { policy, budget, ..self.config.clone() };
        config.validate()?;
        for layer in self.sequences.values_mut().flat_map(|sequence| &mut sequence.layers) {
            layer.shards.iter_mut().try_for_each(|shard| shard.reselect(&config))?;
        }
        self.config = config;
        Ok(())
    }

    /// Frees a sequence. Its id is never given out again.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn close(&mut self, seq: SeqId) -> Result<()> {
        self.sequences.remove(&seq).map(drop).ok_or(Error::UnknownSequence(seq))
    }

    /// Tokens stored in one layer.
    ///
    /// # Errors
    /// Unknown sequence or layer.
    pub fn num_tokens(&self, seq: SeqId, layer: LayerId) -> Result<usize> {
        let sequence = self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        let num_layers = sequence.layers.len();
        sequence
            .layers
            .get(layer.0)
            .map(|l| l.num_tokens)
            .ok_or(Error::UnknownLayer { got: layer.0, num_layers })
    }

    /// What the reuse caches of one layer hold and have learnt, in order of kv heads.
    ///
    /// # Errors
    /// Unknown sequence or layer.
    pub fn reuse_summary(&self, seq: SeqId, layer: LayerId) -> Result<Vec<ReuseSummary>> {
        let sequence = self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        let num_layers = sequence.layers.len();
        let layer = sequence.layers.get(layer.0).ok_or(Error::UnknownLayer { got: layer.0, num_layers })?;
        Ok(layer.shards.iter().map(|shard| shard.reuse.summary()).collect())
    }

    /// Host bytes of a sequence: exact keys and values, and what the policy keeps beside them.
    ///
    /// # Errors
    /// Unknown sequence.
    pub fn memory(&self, seq: SeqId) -> Result<SequenceMemory> {
        let sequence = self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        let shards = || sequence.layers.iter().flat_map(|l| &l.shards);
        let row_bytes = |pages: &ShardPages| pages.num_tokens() * pages.shape().row_bytes();
        Ok(SequenceMemory {
            kv_bytes: shards().map(|s| row_bytes(&s.pages)).sum(),
            kv_allocated_bytes: shards().map(|s| s.pages.size_bytes()).sum(),
            index_bytes: shards()
                .map(|s| {
                    let selector = s.selector.size_bytes() / std::sync::Arc::strong_count(&s.selector);
                    selector + s.reuse.summary().size_bytes
                })
                .sum(),
            hot_bytes: shards().filter_map(|s| s.hot.as_ref()).map(HotShard::size_bytes).sum(),
            hot_pins_out: shards().filter_map(|s| s.hot.as_ref()).map(HotShard::pins_out).sum(),
        })
    }
}

/// Host bytes of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceMemory {
    /// Keys and values of the stored tokens.
    pub kv_bytes: usize,
    /// Slabs allocated for them.
    pub kv_allocated_bytes: usize,
    /// What the policy keeps beside them: summaries, codes, tree, earlier states. What forks share of the index counts in equal parts for each.
    pub index_bytes: usize,
    /// Slots of the hot tier.
    pub hot_bytes: usize,
    /// Pins of the hot tier that were not handed back; between steps anything but 0 is a leak.
    pub hot_pins_out: usize,
}

fn check_rows(
    k: &TensorView<'_>,
    v: &TensorView<'_>,
    names: (&'static str, &'static str),
    shape: [usize; 3],
) -> Result<()> {
    k.expect(names.0, shape)?;
    v.expect(names.1, shape)?;
    if k.dtype() != v.dtype() {
        return Err(Error::shape(names.1, format!("{} like {}", k.dtype(), names.0), v.dtype().to_string()));
    }
    check_finite(names.0, k)?;
    check_finite(names.1, v)
}

fn check_finite(field: &'static str, view: &TensorView<'_>) -> Result<()> {
    match view.first_not_finite() {
        Some((token, element)) => Err(Error::NotFinite { field, token, element }),
        None => Ok(()),
    }
}

fn check_room(stored: usize, more: usize) -> Result<()> {
    // Positions are 32 bits, and the kernels list rows by them.
    if stored.checked_add(more).is_none_or(|n| n > u32::MAX as usize / 2) {
        return Err(Error::config(
            "position",
            stored,
            format!("a layer holds at most {} tokens", u32::MAX / 2),
        ));
    }
    Ok(())
}
