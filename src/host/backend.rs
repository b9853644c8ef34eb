//! The seam: what an inference engine needs of a KV cache, and all that a KV cache learns of the engine.

use super::HostResult;
use crate::view::TensorView;

/// Which part of a run a call belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Prompt tokens: attended exactly, because every later token builds on their states.
    Prefill,
    /// Tokens that follow the prompt, one after the other: a sparse backend may select here.
    Decode,
}

/// Consecutive tokens of one layer at the moment of attention. All tensors are host memory.
#[derive(Clone, Copy, Debug)]
pub struct AttendArgs<'a> {
    /// Layer, `0..num_layers`.
    pub layer: usize,
    /// Position of the first token: the number of tokens stored in the layer.
    pub position: usize,
    /// Prompt or decode.
    pub phase: Phase,
    /// Queries after rotary embedding, `[tokens, num_q_heads, head_dim]`.
    pub q: TensorView<'a>,
    /// The same queries before rotary embedding: what decode reuse compares.
    pub q_pre: TensorView<'a>,
    /// Keys after rotary embedding, `[tokens, num_kv_heads, head_dim]`.
    pub k: TensorView<'a>,
    /// Values, `[tokens, num_kv_heads, head_dim]`.
    pub v: TensorView<'a>,
    /// Softmax scale, applied to `q.k`.
    pub scale: f32,
}

/// A KV cache that also attends. One backend holds one sequence.
///
/// The engine calls [`attend`](KvBackend::attend) once per layer and forward pass, layers in ascending order. Rotary embedding is done; a backend
/// never rotates. `examples/own_backend.rs` implements the trait in a hundred lines.
pub trait KvBackend {
    /// Stores keys and values, then attends causally with each query over everything stored up to its own position (or the
    /// layer's span). `out` receives `[tokens, num_q_heads, head_dim]` f32.
    ///
    /// # Errors
    /// When a shape or position does not fit; what is stored is then unspecified, and `truncate` restores a known state.
    fn attend(&mut self, args: &AttendArgs<'_>, out: &mut [f32]) -> HostResult<()>;

    /// Hears that the prompt is stored and decoding follows: the time to build an index, so that the first decoded token
    /// need not wait for it.
    ///
    /// # Errors
    /// When the index cannot be built.
    fn prompt_ended(&mut self) -> HostResult<()>;

    /// Forgets the tokens at and after `num_tokens` in every layer: refused drafts, or the previous question.
    ///
    /// # Errors
    /// When the backend cannot forget.
    fn truncate(&mut self, num_tokens: usize) -> HostResult<()>;

    /// Tokens stored in every layer (between forward passes all layers hold the same number).
    fn num_tokens(&self) -> usize;
}
