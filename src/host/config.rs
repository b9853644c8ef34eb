//! The shape of a model, from the metadata of its GGUF file.

use super::gguf::Gguf;
use super::rope::Pairing;
use super::{HostError, HostResult};
use crate::shape::HeadShape;

/// Model families with a decoder here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama and everything stored as `llama`: SmolLM2, Mistral, TinyLlama. GGUF permutes the rows of Q and K, so rotary
    /// pairs are neighbours.
    Llama,
    /// Qwen2 and Qwen2.5: biases on Q, K and V.
    Qwen2,
    /// Qwen3: norms on Q and K.
    Qwen3,
    /// Gemma 3: norms on Q and K, norms after attention and feed-forward, five sliding layers to each global one.
    Gemma3,
}

/// What a decoder has to know of a model.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Family.
    pub family: Family,
    /// Attention layers.
    pub num_layers: usize,
    /// Heads of every layer.
    pub heads: HeadShape,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward part.
    pub feed_forward: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Softmax scale.
    pub scale: f32,
    /// Tokens that the model was trained for.
    pub context: usize,
    /// Which dimensions rotate together.
    pub pairing: Pairing,
    /// Rotary base of each layer, `[num_layers]`.
    pub rope_theta: Vec<f64>,
    /// Tokens that each layer attends at most; empty when no layer is limited, else `[num_layers]`.
    pub spans: Vec<Option<usize>>,
}

/// Of six Gemma 3 layers, the last is global (Gemma 3 report, section 2).
const GEMMA3_PATTERN: usize = 6;

/// Rotary base of Gemma 3's sliding layers (Gemma 3 report, section 2).
const GEMMA3_LOCAL_THETA: f64 = 10_000.0;

impl ModelConfig {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// [`HostError::Field`] naming the field that is missing or not supported.
    pub fn from_gguf(gguf: &Gguf) -> HostResult<Self> {
        let name = gguf.text("general.architecture")?.unwrap_or("missing");
        let family = match name {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "gemma3" => Family::Gemma3,
            _ => return Err(HostError::field("general.architecture", name, "llama, qwen2, qwen3 or gemma3")),
        };
        let key = |field: &str| format!("{name}.{field}");
        let num_layers = gguf.required_count(&key("block_count"))?;
        let hidden = gguf.required_count(&key("embedding_length"))?;
        let num_q_heads = gguf.required_count(&key("attention.head_count"))?;
        let num_kv_heads = gguf.count(&key("attention.head_count_kv"))?.unwrap_or(num_q_heads);
        let head_dim = match gguf.count(&key("attention.key_length"))? {
            Some(dim) => dim,
            None => hidden / num_q_heads.max(1),
        };
        let heads = HeadShape::new(num_q_heads, num_kv_heads, head_dim)?;
        for (field, wanted) in [("attention.value_length", head_dim), ("rope.dimension_count", head_dim)] {
            if let Some(found) = gguf.count(&key(field))?.filter(|found| *found != wanted) {
                return Err(HostError::field(key(field), found, format!("the length of a key, {wanted}")));
            }
        }
        for field in ["expert_count", "attn_logit_softcapping", "final_logit_softcapping"] {
            if gguf.value(&key(field)).is_some_and(|v| v.to_u64().map_or(true, |n| n > 0)) {
                return Err(HostError::field(key(field), "present", "absent: such models are not supported"));
            }
        }
        match gguf.text(&key("rope.scaling.type"))? {
            None | Some("none") => {}
            Some(other) => return Err(HostError::field(key("rope.scaling.type"), other, "none")),
        }
        let theta = gguf.number(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        let span = gguf.count(&key("attention.sliding_window"))?;
        let sliding = |layer: usize| family == Family::Gemma3 && !(layer + 1).is_multiple_of(GEMMA3_PATTERN);
        let spans = match (family, span) {
            (Family::Gemma3, Some(span)) => (0..num_layers).map(|l| sliding(l).then_some(span)).collect(),
            (Family::Gemma3, None) => {
                return Err(HostError::field(
                    key("attention.sliding_window"),
                    "missing",
                    "a number of tokens",
                ));
            }
            (_, Some(span)) if num_layers > 0 => vec![Some(span); num_layers],
            _ => Vec::new(),
        };
        let tokens = gguf.list("tokenizer.ggml.tokens")?.map(<[_]>::len);
        let vocab = match gguf.count(&key("vocab_size"))?.or(tokens) {
            Some(vocab) => vocab,
            None => return Err(HostError::field(key("vocab_size"), "missing", "a number of tokens")),
        };
        Ok(Self {
            family,
            num_layers,
            heads,
            hidden,
            feed_forward: gguf.required_count(&key("feed_forward_length"))?,
            vocab,
            norm_eps: gguf.number(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-5) as f32,
            scale: (head_dim as f32).powf(-0.5),
            context: gguf.required_count(&key("context_length"))?,
            pairing: if family == Family::Llama { Pairing::Interleaved } else { Pairing::Halves },
            rope_theta: (0..num_layers)
                .map(|l| if sliding(l) { GEMMA3_LOCAL_THETA } else { theta })
                .collect(),
            spans,
        })
    }
}
