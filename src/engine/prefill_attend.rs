//! Prefill with queries: what a host engine calls for every layer of a prompt.

use super::crew::on_threads;
use super::spill::Patience;
use super::{Engine, check_finite, check_room, check_rows};
use crate::error::{Error, Result};
use crate::ids::{LayerId, SeqId, TokenPos};
use crate::prefill;
use crate::view::TensorView;

/// Consecutive prompt tokens of one layer with their queries.
#[derive(Clone, Copy, Debug)]
pub struct PrefillStep<'a> {
    /// Layer, `0..num_layers`.
    pub layer: LayerId,
    /// Position of the first token; the next one of the layer.
    pub position: usize,
    /// Post-RoPE queries, `[tokens, num_q_heads, head_dim]`.
    pub q: TensorView<'a>,
    /// Post-RoPE keys, `[tokens, num_kv_heads, head_dim]`.
    pub k: TensorView<'a>,
    /// Values, `[tokens, num_kv_heads, head_dim]`.
    pub v: TensorView<'a>,
    /// Softmax scale, applied to `q.k`; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl Engine {
    /// Appends prompt tokens to one layer and attends causally with their queries: exact, over every stored token (or
    /// the layer's span), whatever the policy. `out` receives `[tokens, num_q_heads, head_dim]` f32. Nothing is stored
    /// when the arguments are refused.
    ///
    /// Costs `O(tokens * stored)`; the rows are read once for every 32 tokens.
    ///
    /// # Errors
    /// Unknown sequence or layer, a position that is not the layer's next, a shape that does not fit the model, a number
    /// that is not finite.
    pub fn prefill_attend(&mut self, seq: SeqId, step: &PrefillStep<'_>, out: &mut [f32]) -> Result<()> {
        let heads = self.config.heads;
        let num_tokens = step.q.shape()[0];
        let q_shape = [num_tokens, heads.num_q_heads(), heads.head_dim()];
        step.q.expect("q", q_shape)?;
        check_finite("q", &step.q)?;
        check_rows(&step.k, &step.v, ("k", "v"), [num_tokens, heads.num_kv_heads(), heads.head_dim()])?;
        if Some(out.len()) != q_shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) {
            return Err(Error::shape("out", format!("{q_shape:?}"), format!("{} elements", out.len())));
        }
        if !step.scale.is_finite() {
            return Err(Error::config("scale", step.scale, "must be finite"));
        }
        let sequence = self.sequences.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?;
        let num_layers = sequence.layers.len();
        let layer = sequence
            .layers
            .get_mut(step.layer.0)
            .ok_or(Error::UnknownLayer { got: step.layer.0, num_layers })?;
        if step.position != layer.num_tokens {
            let expected = layer.num_tokens;
            return Err(Error::Position { seq, layer: step.layer, got: step.position, expected });
        }
        check_room(layer.num_tokens, num_tokens)?;
        // Cold pages are checked before anything is stored.
        let seen = layer.span.map_or(0, |span| (layer.num_tokens + 1).saturating_sub(span));
        let seen = seen as TokenPos..layer.num_tokens as TokenPos;
        layer.shards.iter().try_for_each(|shard| shard.pages.verify(seen.clone()))?;
        on_threads(self.crew.as_ref(), || {
            prefill::append(layer, &step.k, &step.v)?;
            prefill::attend(&*self.backend, layer, (&step.q, step.scale), out)
        })?;
        self.spill((seq, step.layer.0), Patience::Prefill);
        Ok(())
    }
}
