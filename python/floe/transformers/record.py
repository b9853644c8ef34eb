"""Recording what a model's attention sees as format-1 traces."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .. import write_trace
from .attention import NAME, RECORDER, before_rotation, enable


class _Shards:
    """Collects, for some layers, the keys and values of all tokens and the queries of the last ones."""

    def __init__(self, layers: Iterable[int], first_query: int):
        self.first_query = first_query
        self.position_ids = torch.empty(1, 0, dtype=torch.long)
        self.kept: dict[int, dict[str, list[torch.Tensor]]] = {
            layer: {"k": [], "v": [], "q": [], "q_pre": []} for layer in layers
        }
        self.scale: dict[int, float] = {}
        self.rotated: dict[int, bool] = {}

    def saw(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        kept = self.kept.get(module.layer_idx)
        if kept is None:
            return
        self.scale[module.layer_idx] = float(module.scaling)
        # Some layers of SmolLM3 have no positions.
        self.rotated[module.layer_idx] = bool(getattr(module, "use_rope", True))
        num_tokens = query.shape[2]
        # The cache returns all keys so far; the new ones are the last.
        for name, tensor in (("k", key), ("v", value)):
            kept[name].append(_rounded(tensor[0, :, -num_tokens:]))
        skip = max(0, self.first_query - int(self.position_ids[0, 0]))
        if skip < num_tokens:
            query = query[:, :, skip:]
            kept["q"].append(_rounded(query[0]))
            before = before_rotation(module, query, self.position_ids[:, skip:].to(query.device))
            kept["q_pre"].append(_rounded(before[0]))


def record(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor] | torch.Tensor,
    layers: Iterable[int] | None,
    heads: Iterable[int] | None,
    path: str | os.PathLike[str],
    *,
    num_queries: int = 256,
    index_until: int | None = None,
    segments: Mapping[str, tuple[int, int]] | None = None,
    text: str = "unnamed",
    licence: str = "unknown",
    chunk: int = 2048,
) -> list[Path]:
    """Reads a text with a model and writes one trace for each of some layers and kv heads.

    The model's own full attention is used and left as it was. Queries before rotary embedding are those after it, turned
    back (`unrotate`).

    Args:
        model: a causal language model of a supported family.
        inputs: token ids [1, tokens], or a tokenizer's output; one row, no padding.
        layers, heads: layers and kv heads; `None` = all.
        path: folder of the traces, made if need be. A file is named `MODEL_L<layer>H<head>.safetensors`.
        num_queries: the last positions, whose queries are recorded.
        index_until: prefill length of a replay; by default the position of the first query.
        segments: named ranges [start, end) of positions; by default `text`, the positions of the queries.
        text, licence: metadata.
        chunk: tokens of one forward pass.

    Returns:
        The files.

    Raises:
        ValueError: an argument out of range, or an unsupported model.
        OSError: a file cannot be written.
    """
    ids = inputs if isinstance(inputs, torch.Tensor) else inputs["input_ids"]
    mask = None if isinstance(inputs, torch.Tensor) else inputs.get("attention_mask")
    if ids.dim() != 2 or ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
        raise ValueError(f"inputs of shape {tuple(ids.shape)}: must be one row without padding")
    num_tokens = ids.shape[1]
    if not 1 <= num_queries <= num_tokens:
        raise ValueError(f"num_queries = {num_queries}: must be 1 to the {num_tokens} tokens")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1")
    config = model.config.get_text_config(decoder=True)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = _chosen("layers", layers, config.num_hidden_layers)
    heads = _chosen("heads", heads, num_kv_heads)
    first_query = num_tokens - num_queries

    shards = _Shards(layers, first_query)
    attention = model.config._attn_implementation
    enable(model)
    token = RECORDER.set(shards)
    try:
        with torch.no_grad():
            cache = DynamicCache(config=config)
            for start in range(0, num_tokens, chunk):
                end = min(start + chunk, num_tokens)
                shards.position_ids = torch.arange(start, end)[None]
                model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        RECORDER.reset(token)
        if attention != NAME:
            model.set_attn_implementation(attention)

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    name = str(getattr(config, "_name_or_path", "") or getattr(model.config, "_name_or_path", "") or config.model_type)
    stem = re.sub(r"[^0-9a-z.]+", "-", Path(name).name.lower()).strip("-") or config.model_type
    group = config.num_attention_heads // num_kv_heads
    files = []
    for layer in layers:
        whole = {kind: torch.cat(pieces, dim=1) for kind, pieces in shards.kept[layer].items()}
        for head in heads:
            file = folder / f"{stem}_L{layer}H{head}.safetensors"
            of_group = slice(head * group, (head + 1) * group)
            meta = _meta(config, layer, head) | {
                "rope": "neox-half" if shards.rotated[layer] else "none",
                "model": name,
                "num_kv_heads": num_kv_heads,
                "head_dim": whole["k"].shape[-1],
                "softmax_scale": shards.scale[layer],
                "num_tokens": num_tokens,
                "num_queries": num_queries,
                "first_query_pos": first_query,
                "index_until": first_query if index_until is None else index_until,
                "segments": dict(segments or {"text": (first_query, num_tokens)}),
                "text": text,
                "licence": licence,
            }
            write_trace(
                file,
                meta,
                whole["k"][head],
                whole["v"][head],
                whole["q"][of_group].transpose(0, 1),
                whole["q_pre"][of_group].transpose(0, 1),
            )
            files.append(file)
    return files


def _meta(config: Any, layer: int, head: int) -> dict[str, Any]:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    extra = {} if rope.get("rope_type", "default") == "default" else {"rope_parameters": str(rope)}
    return {
        "layer": layer,
        "kv_head": head,
        "num_layers": config.num_hidden_layers,
        "num_q_heads": config.num_attention_heads,
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "extra": extra,
    }


def _chosen(field: str, given: Iterable[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if given is None else list(given)
    wrong = [number for number in chosen if not 0 <= number < count]
    if wrong:
        raise ValueError(f"{field} = {wrong[0]}: the model has {count}")
    return chosen


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, rounded to what a trace holds."""
    return tensor.detach().to(device="cpu", dtype=torch.bfloat16, copy=True)
