//! Full-KV attention by candle itself: the reference that floe is compared with, in output and in time.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};

use super::backend::{AttendArgs, KvBackend};
use super::{HostError, HostResult, ModelConfig};
use crate::view::{TensorView, widen};

/// Which of candle's two CPU attentions runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CandleAttention {
    /// `softmax(Q K^T) V` from matrix products, query heads of a group in one product.
    Matmul,
    /// `candle_nn::attention::flash_attn`: no score matrix.
    #[default]
    Flash,
}

/// Keys and values of every layer as f32 candle tensors.
pub struct CandleKv {
    attention: CandleAttention,
    spans: Vec<Option<usize>>,
    layers: Vec<LayerKv>,
}

/// Keys and values of one layer, `[1, capacity, num_kv_heads, head_dim]`; the first `num_tokens` count.
#[derive(Default)]
struct LayerKv {
    kv: Option<(Tensor, Tensor)>,
    num_tokens: usize,
}

/// Tokens that a layer's tensors grow by at least.
const GROW_TOKENS: usize = 1024;

impl LayerKv {
    /// Writes `k` and `v` behind the stored tokens; all stored tokens as `[1, tokens, num_kv_heads, head_dim]`.
    fn append(&mut self, k: &Tensor, v: &Tensor) -> HostResult<(Tensor, Tensor)> {
        let (_, more, heads, dim) = k.dims4()?;
        let needed = self.num_tokens + more;
        let capacity = match &self.kv {
            Some((k, _)) => k.dim(1)?,
            None => 0,
        };
        if needed > capacity {
            let grown = needed.max(2 * capacity).next_multiple_of(GROW_TOKENS);
            let larger = |old: Option<&Tensor>| -> HostResult<Tensor> {
                let new = Tensor::zeros((1, grown, heads, dim), DType::F32, &Device::Cpu)?;
                if let Some(old) = old.filter(|_| self.num_tokens > 0) {
                    new.slice_set(&old.narrow(1, 0, self.num_tokens)?.contiguous()?, 1, 0)?;
                }
                Ok(new)
            };
            self.kv =
                Some((larger(self.kv.as_ref().map(|kv| &kv.0))?, larger(self.kv.as_ref().map(|kv| &kv.1))?));
        }
        let Some((all_k, all_v)) = &self.kv else {
            return Err(HostError::Backend("no room was made for the keys".into()));
        };
        all_k.slice_set(k, 1, self.num_tokens)?;
        all_v.slice_set(v, 1, self.num_tokens)?;
        self.num_tokens = needed;
        Ok((all_k.narrow(1, 0, needed)?, all_v.narrow(1, 0, needed)?))
    }
}

impl CandleKv {
    /// An empty sequence of `model`.
    #[must_use]
    pub fn new(model: &ModelConfig, attention: CandleAttention) -> Self {
        let layers = (0..model.num_layers).map(|_| LayerKv::default()).collect();
        Self { attention, spans: model.spans.clone(), layers }
    }

    /// Bytes of the stored keys and values.
    #[must_use]
    pub fn kv_bytes(&self) -> usize {
        let of = |layer: &LayerKv| -> usize {
            layer.kv.as_ref().map_or(0, |(k, _)| k.elem_count() / k.dims()[1].max(1)) * layer.num_tokens
        };
        2 * size_of::<f32>() * self.layers.iter().map(of).sum::<usize>()
    }
}

impl KvBackend for CandleKv {
    fn attend(&mut self, args: &AttendArgs<'_>, out: &mut [f32]) -> HostResult<()> {
        let num_layers = self.layers.len();
        let layer = self.layers.get_mut(args.layer).ok_or_else(|| {
            HostError::argument("layer", args.layer, format!("the model has {num_layers} layers"))
        })?;
        if args.position != layer.num_tokens {
            let reason = format!("layer {} holds {} tokens", args.layer, layer.num_tokens);
            return Err(HostError::argument("position", args.position, reason));
        }
        let (k, v) = layer.append(&tensor(&args.k)?, &tensor(&args.v)?)?;
        let q = tensor(&args.q)?;
        let span = self.spans.get(args.layer).copied().flatten();
        let attended = match (self.attention, span) {
            (CandleAttention::Flash, None) => {
                let mask = AttnMask::causal_with_offset(args.position);
                flash_attn::<f32>(&q, &k, &v, args.scale, mask, None, None)?.transpose(1, 2)?
            }
            // The flash kernel knows no spans: sliding layers take the other path.
            _ => matmul_attention(&q, &k, &v, (args.position, args.scale, span))?,
        };
        let rows = attended.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        if rows.len() != out.len() {
            return Err(HostError::argument("out", out.len(), format!("{} elements are needed", rows.len())));
        }
        out.copy_from_slice(&rows);
        Ok(())
    }

    fn prompt_ended(&mut self) -> HostResult<()> {
        Ok(())
    }

    fn truncate(&mut self, num_tokens: usize) -> HostResult<()> {
        self.layers.iter_mut().for_each(|layer| layer.num_tokens = layer.num_tokens.min(num_tokens));
        Ok(())
    }

    fn num_tokens(&self) -> usize {
        self.layers.last().map_or(0, |layer| layer.num_tokens)
    }
}

/// A copy as `[1, tokens, heads, head_dim]` f32.
fn tensor(view: &TensorView<'_>) -> HostResult<Tensor> {
    let [tokens, heads, dim] = view.shape();
    let mut rows = vec![0.0f32; tokens * heads * dim];
    for (i, row) in rows.chunks_exact_mut(dim).enumerate() {
        widen(view.row(i / heads, i % heads), row);
    }
    Ok(Tensor::from_vec(rows, (1, tokens, heads, dim), &Device::Cpu)?)
}

/// `[1, tokens, num_q_heads, head_dim]` from matrix products.
fn matmul_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (position, scale, span): (usize, f32, Option<usize>),
) -> HostResult<Tensor> {
    let (_, tokens, q_heads, dim) = q.dims4()?;
    let kv_heads = k.dim(2)?;
    // A single query reads only its span; several need a mask.
    let first = match span {
        Some(span) => (position + 1).saturating_sub(span),
        None => 0,
    };
    let (k, v) = (k.narrow(1, first, k.dim(1)? - first)?, v.narrow(1, first, v.dim(1)? - first)?);
    let stored = k.dim(1)?;
    let group = q_heads / kv_heads;
    // [kv_heads, group * tokens, dim]
    let q = q.squeeze(0)?.reshape((tokens, kv_heads, group, dim))?.permute((1, 2, 0, 3))?.contiguous()?;
    let q = q.reshape((kv_heads, group * tokens, dim))?;
    let scores = (q.matmul(&k.squeeze(0)?.permute((1, 2, 0))?)? * f64::from(scale))?;
    let scores = if tokens == 1 {
        scores
    } else {
        let hidden = |query: usize, row: usize| {
            row > position + query || span.is_some_and(|span| row + span <= position + query)
        };
        let mask: Vec<f32> = (0..tokens)
            .flat_map(|query| (first..first + stored).map(move |row| (query, row)))
            .map(|(query, row)| if hidden(query, row) { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let mask = Tensor::from_vec(mask, (1, 1, tokens, stored), &Device::Cpu)?;
        let scores = scores.reshape((kv_heads, group, tokens, stored))?.broadcast_add(&mask)?;
        scores.reshape((kv_heads, group * tokens, stored))?
    };
    let weights = candle_nn::ops::softmax_last_dim(&scores)?;
    let out = weights.matmul(&v.squeeze(0)?.permute((1, 0, 2))?)?;
    debug_assert_eq!(out.dim(D::Minus1)?, dim);
    Ok(out
        .reshape((kv_heads, group, tokens, dim))?
        .permute((2, 0, 1, 3))?
        .reshape((1, tokens, q_heads, dim))?)
}
