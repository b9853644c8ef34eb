"""The attention function and the mask builder that transformers know under the name "floe"."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .layer import LAYER_OF_KEY, FloeLayer, StoredLength
from .rope import unrotate

NAME = "floe"

#: Attribute of an attention module: the decoder's rotary embedding.
ROTARY = "_floe_rotary"

#: `model_type`s whose tests pass: grouped-query attention, rotary embedding with paired halves, no softcap, no sinks.
SUPPORTED = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")


class Recorder(Protocol):
    """Sees what every attention of a forward pass sees."""

    def saw(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None: ...


RECORDER: ContextVar[Recorder | None] = ContextVar("floe_recorder", default=None)


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Switches a model's attention to floe and returns it.

    With a `FloeCache` it attends through floe; with any other cache, or none, it computes what `sdpa` computes.

    Raises:
        ValueError: the model's family is not supported.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in SUPPORTED:
        raise ValueError(f"model type `{model_type}`: not supported; supported are {', '.join(SUPPORTED)}")
    model.set_attn_implementation(NAME)
    rotary = model.get_decoder().rotary_emb
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
            # Past torch's own book-keeping: the module is the decoder's, not the layer's.
            object.__setattr__(module, ROTARY, rotary)
    return model


def floe_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: `query` [batch, num_q_heads, tokens, head_dim] in, [batch, tokens, num_q_heads, head_dim]
    out. Rows that a `FloeCache` handed on are attended by it, all others by SDPA."""
    recorder = RECORDER.get()
    if recorder is not None:
        recorder.saw(module, query, key, value)
    layer: FloeLayer | None = getattr(key, LAYER_OF_KEY, None)
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: floe does not form attention weights; use the attention `eager`")
    if attention_mask is not None:
        raise ValueError(
            "an attention mask beyond causality and padding (packed sequences, blocks, an own mask): FloeCache takes an "
            "attention_mask of two dimensions, [batch, tokens]"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("floe computes no gradients: call the model under torch.no_grad()")
    if dropout:
        raise ValueError(f"attention dropout {dropout}: floe attends in inference only; call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_pre = None
    if layer.cache.wants_q_pre:
        q_pre = before_rotation(module, query, kwargs.get("position_ids"))
    return layer.attend(query, key, value, q_pre, scale), None


def before_rotation(
    module: torch.nn.Module, query: torch.Tensor, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Queries of an enabled model's attention module before their rotary embedding, float32."""
    if not getattr(module, "use_rope", True):
        # Some layers of SmolLM3 have no positions.
        return query.float()
    if position_ids is None:
        raise ValueError("no position_ids reached the attention: decode reuse needs them")
    return unrotate(getattr(module, ROTARY), query, position_ids)


def floe_mask(*, kv_length: int, q_length: int, batch_size: int, **kwargs: Any) -> torch.Tensor | None:
    """Builds the mask of a forward pass. For the layers of a `FloeCache` it tells the cache which of the new tokens are
    padding and returns nothing: causality is the engine's. For all others it is the mask of `sdpa`."""
    if not isinstance(kv_length, StoredLength):
        return sdpa_mask(kv_length=kv_length, q_length=q_length, batch_size=batch_size, **kwargs)
    if kwargs.get("mask_function") is not causal_mask_function:
        # Some models build a sliding mask without having a sliding layer: refuse it only where it is used.
        return torch.empty(batch_size, 0, q_length, int(kv_length))
    kv_length.cache.plan(batch_size, q_length, kwargs.get("attention_mask"))
    return None


AttentionInterface.register(NAME, floe_attention)
AttentionMaskInterface.register(NAME, floe_mask)
