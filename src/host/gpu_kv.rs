//! The engine on a CUDA device as a KV backend: the model stays on the CPU, its keys, values and decode attention move to the device.

use floe_cuda::device::{Device, Stream};
use floe_cuda::ops::DeviceElem;

use super::backend::{AttendArgs, KvBackend, Phase};
use super::{FloeBackend, HostResult};
use crate::config::{Config, HotConfig};
use crate::gpu::{GpuEngine, GpuMemory, GpuOptions, GpuReport, HostLayerStep};
use crate::ids::{LayerId, SeqId};
use crate::select::Policy;
use crate::view::TensorView;

/// One sequence of a [`GpuEngine`] whose cache holds elements of type `E`.
///
/// Prompt tokens are attended exactly on the CPU, over a copy in host memory that lives until the prompt ends; their rows are
/// handed to the device as they come.
pub struct GpuBackend<E: DeviceElem> {
    engine: GpuEngine<E>,
    stream: Stream,
    seq: SeqId,
    config: Config,
    /// All stored tokens while a prompt is read.
    prompt: Option<FloeBackend>,
    num_tokens: usize,
}

impl<E: DeviceElem> GpuBackend<E> {
    /// An empty sequence of at most `max_tokens` tokens on the first device. With `keep_all` there is room for all its rows there, as far as
    /// its free memory goes, and steps are exact as long as that is faster; otherwise `config.hot.slots` rows of a kv head are there, beside
    /// sinks and newest tokens. Layers that attend everything (policy `full`, `config.dense_layers`) read in host memory what has no room:
    /// [`GpuReport::link_steps`] says how often.
    ///
    /// # Errors
    /// As [`Device::open`], [`GpuEngine::open`] and [`GpuEngine::admit`].
    pub fn open(config: Config, max_tokens: usize, keep_all: bool) -> HostResult<Self> {
        let device = Device::open(0).map_err(crate::Error::from)?;
        let stream = Stream::new(&device).map_err(crate::Error::from)?;
        let hot = if keep_all { 1.0 } else { 0.0 };
        let (free, _) = device.memory().map_err(crate::Error::from)?;
        let options = GpuOptions::for_load(&config, 1, max_tokens, hot).within(&config, free / 10 * 9)?;
        let mut engine = GpuEngine::open(&device, config.clone(), options)?;
        let seq = engine.admit(None)?;
        Ok(Self { engine, stream, seq, config, prompt: None, num_tokens: 0 })
    }

    /// What the device did so far. Waits for it.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn report(&self) -> HostResult<GpuReport> {
        Ok(self.engine.report(&self.stream)?)
    }

    /// Bytes held.
    #[must_use]
    pub fn memory(&self) -> GpuMemory {
        self.engine.memory()
    }

    /// The stored tokens in host memory, for exact attention of more prompt tokens.
    fn prompt(&mut self) -> HostResult<&mut FloeBackend> {
        let prompt = match self.prompt.take() {
            Some(prompt) => prompt,
            None => self.copy_stored()?,
        };
        Ok(self.prompt.insert(prompt))
    }

    fn copy_stored(&self) -> HostResult<FloeBackend> {
        let hot = HotConfig { slots: 0, ..self.config.hot };
        let config = Config { policy: Policy::full(), hot, ..self.config.clone() };
        let mut copy = FloeBackend::open(config)?;
        let heads = self.config.heads;
        let shape = [self.num_tokens, heads.num_kv_heads(), heads.head_dim()];
        for layer in (0..self.config.num_layers).map(LayerId).filter(|_| self.num_tokens > 0) {
            let [k, v] = self.engine.rows_host(self.seq, layer, 0..self.num_tokens)?;
            let (k, v) = (TensorView::contiguous(&k[..], shape)?, TensorView::contiguous(&v[..], shape)?);
            copy.append(layer, (&k, &v))?;
        }
        Ok(copy)
    }

    /// One token of one layer.
    fn decode(&mut self, args: &AttendArgs<'_>, token: usize, out: &mut [f32]) -> HostResult<()> {
        let one = token..token + 1;
        let step = HostLayerStep {
            layer: LayerId(args.layer),
            sequences: &[self.seq],
            positions: &[args.position + token],
            q: args.q.tokens(one.clone()),
            k_new: args.k.tokens(one.clone()),
            v_new: args.v.tokens(one),
            scale: args.scale,
        };
        Ok(self.engine.attend_host(&step, out, &self.stream)?)
    }
}

impl<E: DeviceElem> KvBackend for GpuBackend<E> {
    fn attend(&mut self, args: &AttendArgs<'_>, out: &mut [f32]) -> HostResult<()> {
        let num_tokens = args.q.shape()[0];
        match args.phase {
            Phase::Prefill => {
                self.prompt()?.attend(args, out)?;
                let rows = (&args.k, &args.v);
                self.engine.prefill_host(self.seq, LayerId(args.layer), rows, &self.stream)?;
            }
            Phase::Decode => {
                self.prompt = None;
                let per_token = out.len() / num_tokens.max(1);
                for (token, out) in out.chunks_exact_mut(per_token.max(1)).enumerate() {
                    self.decode(args, token, out)?;
                }
            }
        }
        if args.layer + 1 == self.config.num_layers {
            self.num_tokens = args.position + num_tokens;
        }
        Ok(())
    }

    fn prompt_ended(&mut self) -> HostResult<()> {
        self.prompt = None;
        for layer in (0..self.config.num_layers).map(LayerId) {
            self.engine.index(self.seq, layer, &self.stream)?;
        }
        self.engine.wait_for_trees();
        Ok(())
    }

    fn truncate(&mut self, num_tokens: usize) -> HostResult<()> {
        self.prompt = None;
        self.engine.truncate(self.seq, num_tokens, &self.stream)?;
        self.num_tokens = self.num_tokens.min(num_tokens);
        Ok(())
    }

    fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}
