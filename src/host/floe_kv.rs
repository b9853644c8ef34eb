//! The floe engine as a KV backend.

use std::path::Path;

use super::backend::{AttendArgs, KvBackend, Phase};
use super::{HostError, HostResult, ModelConfig};
use crate::config::Config;
use crate::engine::{DecodeStep, Engine, PrefillStep, SequenceMemory};
use crate::ids::{LayerId, SeqId};
use crate::plan::HeadPath;
use crate::select::Policy;
use crate::shape::KvDtype;
use crate::step::StepReport;
use crate::transfer::Fetched;
#[cfg(feature = "cuda")]
use crate::view::TensorView;

/// What the decode steps of a backend read, against what full attention would have read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadCounters {
    /// Decoded tokens, counted once for all layers.
    pub steps: usize,
    /// Bytes of keys and values attended exactly.
    pub kv_bytes: u64,
    /// Bytes of summaries, codes and keys read to select and to form the tail.
    pub index_bytes: u64,
    /// Bytes of keys and values that full attention (over the spans of sliding layers) reads.
    pub full_kv_bytes: u64,
    /// Steps of a kv head, those that attended everything because the policy's estimates were too coarse, and all.
    pub doubted: (usize, usize),
    /// What the steps asked of the hot tier; all 0 without one.
    pub fetched: Fetched,
}

/// One sequence of a floe [`Engine`].
pub struct FloeBackend {
    engine: Engine,
    seq: SeqId,
    num_layers: usize,
    num_tokens: usize,
    report: StepReport,
    counters: ReadCounters,
}

impl FloeBackend {
    /// An empty sequence of `model`, stored as `kv_dtype`; other settings as in [`Config::new`].
    ///
    /// # Errors
    /// As [`Engine::open`] and [`Engine::admit`].
    pub fn new(model: &ModelConfig, kv_dtype: KvDtype, policy: Policy, budget: usize) -> HostResult<Self> {
        let config = Config::new(model.num_layers, model.heads, kv_dtype);
        Self::open(Config { policy, budget, spans: model.spans.clone(), ..config })
    }

    /// An empty sequence of an engine with this configuration.
    ///
    /// # Errors
    /// As [`Engine::open`] and [`Engine::admit`].
    pub fn open(config: Config) -> HostResult<Self> {
        let num_layers = config.num_layers;
        let mut engine = Engine::open(config)?;
        let seq = engine.admit()?;
        let (report, counters) = (StepReport::default(), ReadCounters::default());
        Ok(Self { engine, seq, num_layers, num_tokens: 0, report, counters })
    }

    /// Selects differently from now on; the stored tokens stay. See [`Engine::set_policy`].
    ///
    /// # Errors
    /// As [`Engine::set_policy`].
    pub fn set_policy(&mut self, policy: Policy, budget: usize) -> HostResult<()> {
        Ok(self.engine.set_policy(policy, budget)?)
    }

    /// Builds the indexes of the stored tokens now instead of with the next decoded token.
    ///
    /// # Errors
    /// As [`Engine::publish`].
    pub fn publish(&mut self) -> HostResult<()> {
        Ok(self.engine.publish(self.seq)?)
    }

    /// The engine's configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.engine.config()
    }

    /// Writes the sequence to `path`, index included; see [`Engine::save`]. Returns its bytes.
    ///
    /// # Errors
    /// As [`Engine::save`].
    pub fn save(&self, path: &Path) -> HostResult<u64> {
        Ok(self.engine.save(self.seq, path)?)
    }

    /// Goes on with a saved sequence in place of the own one; see [`Engine::restore`]. The own one is kept when the file
    /// is refused.
    ///
    /// # Errors
    /// As [`Engine::restore`]; [`HostError::Read`] when there is no such file, [`HostError::Backend`] for a sequence that was
    /// saved in the middle of a forward pass.
    pub fn load(&mut self, path: &Path) -> HostResult<()> {
        // Said here, because to the engine every failing read is the machine's fault.
        std::fs::metadata(path).map_err(|source| HostError::Read { path: path.to_path_buf(), source })?;
        let seq = self.engine.restore(path)?;
        let tokens = (0..self.num_layers)
            .map(|layer| self.engine.num_tokens(seq, LayerId(layer)))
            .collect::<crate::Result<Vec<_>>>()?;
        if tokens.iter().any(|of_layer| *of_layer != tokens[0]) {
            self.engine.close(seq)?;
            let reason = format!("{}: layers hold different numbers of tokens", path.display());
            return Err(HostError::Backend(reason));
        }
        self.engine.close(std::mem::replace(&mut self.seq, seq))?;
        self.num_tokens = tokens[0];
        Ok(())
    }

    /// What the decode steps read so far.
    #[must_use]
    pub fn counters(&self) -> ReadCounters {
        self.counters
    }

    /// Host memory of the sequence.
    ///
    /// # Errors
    /// None in practice: the sequence lives as long as the backend.
    pub fn memory(&self) -> HostResult<SequenceMemory> {
        Ok(self.engine.memory(self.seq)?)
    }

    /// Stores keys and values `[tokens, num_kv_heads, head_dim]` in one layer without attending.
    #[cfg(feature = "cuda")]
    pub(super) fn append(
        &mut self,
        layer: LayerId,
        (k, v): (&TensorView<'_>, &TensorView<'_>),
    ) -> HostResult<()> {
        self.engine.prefill(self.seq, layer, k, v)?;
        self.num_tokens = self.engine.num_tokens(self.seq, layer)?;
        Ok(())
    }

    /// One token of one layer.
    fn decode(&mut self, args: &AttendArgs<'_>, token: usize, out: &mut [f32]) -> HostResult<()> {
        let one = token..token + 1;
        let step = DecodeStep {
            layer: LayerId(args.layer),
            position: args.position + token,
            q: args.q.tokens(one.clone()),
            q_pre: Some(args.q_pre.tokens(one.clone())),
            k_new: args.k.tokens(one.clone()),
            v_new: args.v.tokens(one),
            scale: args.scale,
        };
        self.engine.decode(self.seq, &step, out, &mut self.report)?;
        let config = self.engine.config();
        let row_bytes = 2 * config.heads.head_dim() * config.kv_dtype.size_bytes();
        let stored = args.position + token + 1;
        let seen = config.spans.get(args.layer).copied().flatten().map_or(stored, |span| span.min(stored));
        for shard in &self.report.shards {
            self.counters.doubted.0 += usize::from(shard.path == HeadPath::ExactInDoubt);
            self.counters.doubted.1 += 1;
            self.counters.kv_bytes += shard.kv_bytes_read as u64;
            self.counters.index_bytes += shard.index_bytes_read as u64;
            self.counters.full_kv_bytes += (seen * row_bytes) as u64;
            self.counters.fetched.add(&shard.fetched);
        }
        self.counters.steps += usize::from(args.layer == 0);
        Ok(())
    }
}

impl KvBackend for FloeBackend {
    fn attend(&mut self, args: &AttendArgs<'_>, out: &mut [f32]) -> HostResult<()> {
        let num_tokens = args.q.shape()[0];
        match args.phase {
            Phase::Prefill => {
                let (layer, position, scale) = (LayerId(args.layer), args.position, args.scale);
                let step = PrefillStep { layer, position, q: args.q, k: args.k, v: args.v, scale };
                self.engine.prefill_attend(self.seq, &step, out)?;
            }
            Phase::Decode => {
                let per_token = out.len() / num_tokens.max(1);
                for (token, out) in out.chunks_exact_mut(per_token.max(1)).enumerate() {
                    self.decode(args, token, out)?;
                }
            }
        }
        if args.layer + 1 == self.num_layers {
            self.num_tokens = args.position + num_tokens;
        }
        Ok(())
    }

    fn prompt_ended(&mut self) -> HostResult<()> {
        self.publish()
    }

    fn truncate(&mut self, num_tokens: usize) -> HostResult<()> {
        self.engine.truncate(self.seq, num_tokens)?;
        self.num_tokens = self.num_tokens.min(num_tokens);
        Ok(())
    }

    fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}
