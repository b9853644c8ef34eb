//! The decoder: residual blocks of attention and feed-forward, attention through a [`KvBackend`].

use std::ops::Range;
use std::time::{Duration, Instant};

use candle_core::quantized::QMatMul;
use candle_core::{Device, Tensor};
use candle_nn::ops::rms_norm;

use super::backend::{AttendArgs, KvBackend, Phase};
use super::config::{Family, ModelConfig};
use super::gguf::Gguf;
use super::linear::Linear;
use super::rope::{Phases, Rope, factors};
use super::{HostError, HostResult};
use crate::view::TensorView;

/// Weights of one model.
pub struct Decoder {
    config: ModelConfig,
    embedding: QMatMul,
    layers: Vec<Block>,
    norm: Tensor,
    head: Linear,
}

struct Block {
    rope: Rope,
    attn_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    /// Norms of each query and key row, where the family has them.
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    out: Linear,
    post_attn_norm: Option<Tensor>,
    ffn_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    post_ffn_norm: Option<Tensor>,
}

/// Consecutive tokens after the last block.
pub struct Hidden {
    /// Normed states, `[tokens, hidden]`.
    states: Tensor,
    /// Time spent inside the KV backend.
    pub attend_time: Duration,
}

impl Decoder {
    /// Reads all weights.
    ///
    /// # Errors
    /// [`HostError::Tensor`] naming the tensor that is missing or misshapen; [`HostError::Field`].
    pub fn load(gguf: &mut Gguf) -> HostResult<Self> {
        let config = ModelConfig::from_gguf(gguf)?;
        let vocab_shape = [config.vocab, config.hidden];
        let embedding = gguf.quantised("token_embd.weight", &vocab_shape)?;
        let head_name = if gguf.has("output.weight") { "output.weight" } else { "token_embd.weight" };
        let head = Linear::new(gguf.quantised(head_name, &vocab_shape)?, None)?;
        let factors = factors(gguf, config.heads.head_dim())?;
        let layers = (0..config.num_layers)
            .map(|layer| Block::load(gguf, &config, layer, factors.as_deref()))
            .collect::<HostResult<_>>()?;
        let norm = gguf.dense("output_norm.weight", &[config.hidden])?;
        Ok(Self { config, embedding: QMatMul::from_qtensor(embedding)?, layers, norm, head })
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Runs `tokens`, which follow everything that `kv` holds.
    ///
    /// # Errors
    /// [`HostError::Argument`] for no tokens or a token outside the vocabulary; errors of the backend. The backend then
    /// holds the tokens in some layers: truncate it before it is used again.
    pub fn forward(&self, tokens: &[u32], phase: Phase, kv: &mut dyn KvBackend) -> HostResult<Hidden> {
        if tokens.is_empty() {
            return Err(HostError::argument("tokens", "[]", "at least one token is needed"));
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= self.config.vocab) {
            return Err(HostError::argument(
                "tokens",
                token,
                format!("the vocabulary has {}", self.config.vocab),
            ));
        }
        let position = kv.num_tokens();
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        let mut x = self.embedding.embedding(&ids)?;
        if self.config.family == Family::Gemma3 {
            x = (x * (self.config.hidden as f64).sqrt())?;
        }
        let mut attend_time = Duration::ZERO;
        // Neighbouring layers nearly always share their rotary base.
        let mut phases: Option<(f64, Phases)> = None;
        for (layer, block) in self.layers.iter().enumerate() {
            let theta = self.config.rope_theta[layer];
            if phases.as_ref().is_none_or(|(of, _)| *of != theta) {
                phases = Some((theta, block.rope.phases(position, tokens.len())));
            }
            let Some((_, phases)) = &phases else { continue };
            x = block.forward(
                &self.config,
                &x,
                &mut |rows, scale, out| {
                    let [q, q_pre, k, v] = rows;
                    let args = AttendArgs { layer, position, phase, q, q_pre, k, v, scale };
                    let started = Instant::now();
                    let attended = kv.attend(&args, out);
                    attend_time += started.elapsed();
                    attended
                },
                phases,
            )?;
        }
        let states = rms_norm(&x, &self.norm, self.config.norm_eps)?;
        Ok(Hidden { states, attend_time })
    }

    /// Logits of the last of the tokens, `[vocab]`.
    ///
    /// # Errors
    /// None beyond those of candle's products.
    pub fn last_logits(&self, hidden: &Hidden) -> HostResult<Vec<f32>> {
        Ok(self.logits(hidden, 1)?.flatten_all()?.to_vec1()?)
    }

    /// Logits of the last `keep` tokens, `[keep, vocab]`.
    ///
    /// # Errors
    /// [`HostError::Argument`] when `keep` is 0 or more than the tokens.
    pub fn logits(&self, hidden: &Hidden, keep: usize) -> HostResult<Tensor> {
        let tokens = hidden.states.dim(0)?;
        match tokens.checked_sub(keep) {
            Some(first) => self.logits_of(hidden, first..tokens),
            None => Err(HostError::argument("keep", keep, format!("must be 1 to the {tokens} tokens"))),
        }
    }

    /// Logits of some of the tokens, `[tokens.len(), vocab]`.
    ///
    /// # Errors
    /// [`HostError::Argument`] when `tokens` is empty or reaches beyond the tokens run.
    pub fn logits_of(&self, hidden: &Hidden, tokens: Range<usize>) -> HostResult<Tensor> {
        let run = hidden.states.dim(0)?;
        if tokens.is_empty() || tokens.end > run {
            let reason = format!("must be some of the {run} tokens");
            return Err(HostError::argument("tokens", format!("{tokens:?}"), reason));
        }
        self.head.forward(&hidden.states.narrow(0, tokens.start, tokens.len())?)
    }
}

/// Attention of one block: `[q, q_pre, k, v]`, the scale, and where the output goes.
type AttendFn<'f> = dyn FnMut([TensorView<'_>; 4], f32, &mut [f32]) -> HostResult<()> + 'f;

impl Block {
    fn load(
        gguf: &mut Gguf,
        config: &ModelConfig,
        layer: usize,
        factors: Option<&[f32]>,
    ) -> HostResult<Self> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (hidden, wide) = (config.hidden, config.feed_forward);
        let head_dim = config.heads.head_dim();
        let q_rows = config.heads.num_q_heads() * head_dim;
        let kv_rows = config.heads.num_kv_heads() * head_dim;
        let mut linear = |part: &str, rows: usize, width: usize| -> HostResult<Linear> {
            let weights = gguf.quantised(&name(&format!("{part}.weight")), &[rows, width])?;
            let bias = name(&format!("{part}.bias"));
            let bias = if gguf.has(&bias) { Some(gguf.dense(&bias, &[rows])?) } else { None };
            Linear::new(weights, bias)
        };
        let (q, k, v) = (
            linear("attn_q", q_rows, hidden)?,
            linear("attn_k", kv_rows, hidden)?,
            linear("attn_v", kv_rows, hidden)?,
        );
        let out = linear("attn_output", hidden, q_rows)?;
        let (gate, up) = (linear("ffn_gate", wide, hidden)?, linear("ffn_up", wide, hidden)?);
        let down = linear("ffn_down", hidden, wide)?;
        let mut norm = |part: &str, width: usize| gguf.dense(&name(part), &[width]);
        let gemma = config.family == Family::Gemma3;
        let qk_norm = match config.family {
            Family::Llama | Family::Qwen2 => None,
            Family::Qwen3 | Family::Gemma3 => {
                let q = norm("attn_q_norm.weight", head_dim)?.to_vec1()?;
                Some((q, norm("attn_k_norm.weight", head_dim)?.to_vec1()?))
            }
        };
        Ok(Self {
            rope: Rope::new(config.pairing, config.rope_theta[layer], head_dim, factors),
            attn_norm: norm("attn_norm.weight", hidden)?,
            post_attn_norm: if gemma { Some(norm("post_attention_norm.weight", hidden)?) } else { None },
            ffn_norm: norm("ffn_norm.weight", hidden)?,
            post_ffn_norm: if gemma { Some(norm("post_ffw_norm.weight", hidden)?) } else { None },
            q,
            k,
            v,
            qk_norm,
            out,
            gate,
            up,
            down,
        })
    }

    /// `x` [tokens, hidden] through attention and feed-forward.
    fn forward(
        &self,
        config: &ModelConfig,
        x: &Tensor,
        attend: &mut AttendFn<'_>,
        phases: &Phases,
    ) -> HostResult<Tensor> {
        let (heads, eps) = (config.heads, config.norm_eps);
        let (tokens, dim) = (x.dim(0)?, heads.head_dim());
        let (q_heads, kv_heads) = (heads.num_q_heads(), heads.num_kv_heads());

        let normed = rms_norm(x, &self.attn_norm, eps)?;
        let rows = |linear: &Linear| -> HostResult<Vec<f32>> {
            Ok(linear.forward(&normed)?.flatten_all()?.to_vec1()?)
        };
        let (mut q, mut k, v) = (rows(&self.q)?, rows(&self.k)?, rows(&self.v)?);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            norm_rows(&mut q, q_norm, eps);
            norm_rows(&mut k, k_norm, eps);
        }
        let q_pre = q.clone();
        self.rope.rotate(phases, q_heads, &mut q);
        self.rope.rotate(phases, kv_heads, &mut k);
        let mut out = vec![0.0f32; q.len()];
        let (q_shape, kv_shape) = ([tokens, q_heads, dim], [tokens, kv_heads, dim]);
        let views = [
            TensorView::contiguous(&q[..], q_shape)?,
            TensorView::contiguous(&q_pre[..], q_shape)?,
            TensorView::contiguous(&k[..], kv_shape)?,
            TensorView::contiguous(&v[..], kv_shape)?,
        ];
        attend(views, config.scale, &mut out)?;
        let out = self.out.forward(&Tensor::from_vec(out, (tokens, q_heads * dim), &Device::Cpu)?)?;
        let x = (x + norm_if(&self.post_attn_norm, out, eps)?)?;

        let normed = rms_norm(&x, &self.ffn_norm, eps)?;
        let gate = self.gate.forward(&normed)?;
        // Gemma's gate is the tanh form of GELU, the others' SiLU.
        let gate = if config.family == Family::Gemma3 { gate.gelu()? } else { gate.silu()? };
        let wide = (gate * self.up.forward(&normed)?)?;
        let out = norm_if(&self.post_ffn_norm, self.down.forward(&wide)?, eps)?;
        Ok((x + out)?)
    }
}

fn norm_if(weight: &Option<Tensor>, x: Tensor, eps: f32) -> HostResult<Tensor> {
    match weight {
        Some(weight) => Ok(rms_norm(&x, weight, eps)?),
        None => Ok(x),
    }
}

/// RMS norm of every row of `weight.len()` elements.
fn norm_rows(rows: &mut [f32], weight: &[f32], eps: f32) {
    for row in rows.chunks_exact_mut(weight.len()) {
        let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
        let factor = (mean + eps).sqrt().recip();
        row.iter_mut().zip(weight).for_each(|(x, w)| *x *= factor * w);
    }
}
