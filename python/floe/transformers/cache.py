"""`FloeCache`: keys and values in a floe engine, one sequence for each row of the batch."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from .. import Engine
from .cuda_rows import CudaRows
from .layer import FloeLayer
from .rows import DTYPES, HostRows, Plan, Tensors

_MANIFEST = "cache.json"
_SLIDING = "sliding.safetensors"


class FloeCache(Cache):
    """A cache whose full-attention layers live in a floe engine; sliding-window layers stay with transformers.

    The model has to be prepared by `floe.transformers.enable`. A forward pass of several tokens is attended exactly (a
    prompt, whole or in chunks; the check of drafted tokens), one of a single token as the policy says.

    Tensors on the CPU are attended there. With tensors on a CUDA device (a wheel with the feature `cuda`) hot rows and summaries
    lie on the device and everything else in host memory; forward passes of several tokens are attended by SDPA, for which the
    stored rows of one layer at a time are brought back to the device.

    Args:
        config: the model's configuration.
        policy: how tokens are selected: `full`, `floe`, `floe:sketch=k1`, `quest`, ...
        budget: tokens attended exactly per kv head and step, sinks and window included.
        sinks, window: first and last tokens, always attended.
        dense_layers: first layers that attend to everything.
        sparse_tokens: forward passes of at most this many tokens, after the first, are attended as the policy says. 1 =
            single tokens; more lets assisted generation check its drafts sparsely.
        dtype: how keys and values are stored; `None` = as the model computes them.
        max_tokens: on a CUDA device, where summaries are allocated at once: tokens of a row at most; `None` = the model's
            `max_position_embeddings`.
        resident: on a CUDA device, the part of the keys and values that may stay there; a row that fits is attended whole.
        engine: further settings of `floe.Engine`: `threads`, `seed`, `hot_slots`, `cold_folder`, ...

    Raises:
        ValueError: a setting out of range, or a kind of layer that is not supported.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: str = "floe",
        budget: int = 256,
        *,
        sinks: int = 16,
        window: int = 64,
        dense_layers: int = 0,
        sparse_tokens: int = 1,
        dtype: torch.dtype | None = None,
        max_tokens: int | None = None,
        resident: float = 0.0,
        **engine: Any,
    ):
        if sparse_tokens < 1:
            raise ValueError(f"config field `sparse_tokens` = {sparse_tokens}: must be at least 1")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"config field `dtype` = {dtype}: must be bfloat16, float16 or float32")
        config = config.get_text_config(decoder=True)
        kinds, kwargs = get_layer_types_and_kwargs(config)
        unknown = [(n, kind) for n, kind in enumerate(kinds) if kind not in ("full_attention", "sliding_attention")]
        if unknown:
            raise ValueError(f"layer {unknown[0][0]} is of type `{unknown[0][1]}`: FloeCache does not support it")
        self._sliding_window: int | None = kwargs.get("sliding_window")
        self._floe_layers = [FloeLayer(self, index) for index in range(kinds.count("full_attention"))]
        if not self._floe_layers:
            warnings.warn("every layer has a sliding window: FloeCache leaves all of them to transformers", stacklevel=2)
        own = iter(self._floe_layers)
        super().__init__(
            layers=[
                next(own) if kind == "full_attention" else DynamicSlidingWindowLayer(self._sliding_window)
                for kind in kinds
            ]
        )
        num_heads = config.num_attention_heads
        self._settings: dict[str, Any] = {
            "num_layers": max(1, len(self._floe_layers)),
            "num_q_heads": num_heads,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or num_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            "policy": policy,
            "budget": budget,
            "sinks": sinks,
            "window": window,
            "dense_layers": dense_layers,
            **engine,
        }
        self._dtype = dtype
        #: As given; may be set between forward passes.
        self.sparse_tokens = sparse_tokens
        # Opened once for nothing, so that a wrong setting is refused here and not in the middle of a prompt.
        Engine(**self._settings, dtype=DTYPES[dtype or torch.bfloat16])
        self._max_tokens = max_tokens or config.max_position_embeddings
        self._resident = resident
        #: `None` before the first forward pass.
        self._rows: HostRows | CudaRows | None = None
        #: Which stored tokens are no padding, [batch, tokens] on the CPU; `None` = all.
        self._real: torch.Tensor | None = None
        self._plan: Plan | None = None

    # The forward pass, in the order of the calls.

    def plan(self, batch: int, num_tokens: int, mask: torch.Tensor | None) -> None:
        """Before the first layer of a forward pass: notes which of its tokens are padding. `mask` [batch, all tokens] is
        the model's attention mask, `None` without padding."""
        lengths = {layer.num_tokens for layer in self._floe_layers}
        stored = min(lengths)
        if len(lengths) > 1:
            raise ValueError("an earlier forward pass was cut short: call crop(0) on the FloeCache to undo it")
        if self._rows is not None and len(self._rows) != batch:
            raise ValueError(f"a batch of {batch} rows: this FloeCache holds {len(self._rows)}")
        if mask is not None:
            if mask.shape[-1] != stored + num_tokens:
                got = mask.shape[-1]
                raise ValueError(f"attention_mask of {got} tokens: {stored} are stored and {num_tokens} are new")
            mask = None if bool(mask.all()) else mask.to(device="cpu", dtype=torch.bool)
        before = None if self._real is None else self._real[:, :stored]
        after = None if mask is None else mask[:, :stored]
        if not _same_padding(before, after):
            raise ValueError("attention_mask differs from the one with which the stored tokens came")
        new = [None] * batch if mask is None else [_real_places(row[stored:]) for row in mask]
        sparse = stored > 0 and num_tokens <= self.sparse_tokens
        self._plan = Plan(num_tokens, new, first=stored == 0, sparse=sparse)
        self._real = mask

    def check_planned(self, key: torch.Tensor) -> None:
        """Refuses rows whose forward pass went past floe's mask builder: they would be attended wrongly."""
        plan = self._plan
        if plan is None or (len(plan.real), plan.num_tokens) != (key.shape[0], key.shape[2]):
            raise ValueError(
                "the forward pass did not come through floe's mask builder: call floe.transformers.enable(model) first, and "
                "pass an attention_mask of two dimensions or none"
            )

    def open_rows(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Opens a sequence for each row, as the first keys say: dtype, device, batch."""
        if key.dtype not in DTYPES:
            raise ValueError(f"keys of {key.dtype}: floe takes bfloat16, float16 and float32")
        expected = (self._settings["num_kv_heads"], self._settings["head_dim"])
        for name, tensor in (("keys", key), ("values", value)):
            got = (tensor.shape[1], tensor.shape[3])
            if got != expected:
                raise ValueError(f"{name} of (heads, head_dim) {got}: the configuration says {expected}")
        if self._rows is not None:
            return
        dtype, batch = DTYPES[self._dtype or key.dtype], key.shape[0]
        if key.device.type == "cpu":
            self._rows = HostRows(self._settings, dtype, batch)
        elif key.device.type == "cuda":
            self._rows = CudaRows(self._settings, dtype, batch, key.device, self._max_tokens, self._resident)
        else:
            raise ValueError(f"keys on {key.device}: floe attends on the CPU and on CUDA devices")

    @property
    def wants_q_pre(self) -> bool:
        """Whether the attention function has to turn the queries of this forward pass back."""
        return self._plan is not None and self._plan.sparse and self._rows is not None and self._rows.wants_q_pre

    def attend(self, layer: int, tensors: Tensors, scale: float) -> torch.Tensor:
        """Stores and attends the new tokens of one layer of the engine; [batch, tokens, num_q_heads, head_dim]."""
        out = self._rows.attend(layer, tensors, scale, self._plan)
        if layer + 1 == len(self._floe_layers):
            self._plan = None
        return out

    # What generation does to a cache between forward passes.

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens: -n of them, or, as older versions of transformers call it, all but the first n."""
        # Assisted generation passes a tensor.
        tokens_to_remove = int(tokens_to_remove)
        stored = min((layer.num_tokens for layer in self._floe_layers), default=0)
        keep = max(0, stored + tokens_to_remove) if tokens_to_remove <= 0 else min(stored, tokens_to_remove)
        if self._real is not None:
            self._real = self._real[:, :keep]
        if self._rows is not None:
            real = None if self._real is None else self._real.sum(dim=1).tolist()
            self._rows.truncate(real or [keep] * len(self._rows))
        for layer in self.layers:
            if isinstance(layer, FloeLayer):
                layer.num_tokens = keep
            elif layer.is_initialized:
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` is; rows taken more than once are forked, not copied."""
        self._take(beam_idx.tolist())
        for layer in self._stock_layers():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (numbers, or a mask) of the batch."""
        numbers = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._take(numbers.tolist())
        for layer in self._stock_layers():
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in succession."""
        self._take([row for row in range(self.batch_size) for _ in range(repeats)])
        for layer in self._stock_layers():
            layer.batch_repeat_interleave(repeats)

    def reset(self) -> None:
        """Empties the cache; the next forward pass may have another batch size."""
        self._rows, self._real, self._plan = None, None, None
        for number, layer in enumerate(self.layers):
            if isinstance(layer, FloeLayer):
                layer.num_tokens, layer.is_initialized = 0, False
            else:
                self.layers[number] = DynamicSlidingWindowLayer(self._sliding_window)

    def _take(self, rows: list[int]) -> None:
        if self._rows is not None:
            self._rows.take(rows)
        if self._real is not None:
            self._real = self._real[rows]

    def _stock_layers(self) -> list[DynamicSlidingWindowLayer]:
        return [layer for layer in self.layers if not isinstance(layer, FloeLayer) and layer.is_initialized]

    # Persistence and measurement.

    def save(self, folder: str | os.PathLike[str]) -> int:
        """Writes the cache to a folder, which is made if need be; its bytes."""
        folder = Path(folder)
        if self._rows is None:
            raise ValueError("this FloeCache is empty: there is nothing to save")
        folder.mkdir(parents=True, exist_ok=True)
        num_bytes = self._rows.save(folder)
        tensors = {}
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, FloeLayer) and layer.is_initialized:
                tensors[f"{number}.keys"] = layer.keys.contiguous()
                tensors[f"{number}.values"] = layer.values.contiguous()
        manifest = {
            "kind": "floe-cache/1",
            "batch": len(self._rows),
            "num_tokens": self.get_seq_length(),
            "real": None if self._real is None else self._real.int().tolist(),
            "dtype": DTYPES[self._rows.dtype],
        }
        save_file(tensors, folder / _SLIDING)
        # Last, so that a folder with a manifest is complete.
        (folder / _MANIFEST).write_text(json.dumps(manifest))
        return num_bytes + (folder / _SLIDING).stat().st_size

    def restore(self, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> FloeCache:
        """Fills this cache, which must be empty, from a folder that `save` wrote, on whichever device, and returns it.

        Raises:
            ValueError: not a saved cache, one of another model, or this cache holds tokens.
            OSError: a file cannot be read.
        """
        folder = Path(folder)
        if self.get_seq_length():
            raise ValueError(f"this FloeCache holds {self.get_seq_length()} tokens: restore into an empty one")
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest.get("kind") != "floe-cache/1":
            raise ValueError(f"{folder / _MANIFEST}: field `kind` = {manifest.get('kind')}: must be floe-cache/1")
        device = torch.device(device)
        saved = (manifest["dtype"], folder, manifest["batch"])
        if device.type == "cuda":
            place = (device, self._max_tokens, self._resident)
            rows = CudaRows.restore(self._settings, *saved, place)
        else:
            rows = HostRows.restore(self._settings, *saved)
        tensors = load_file(folder / _SLIDING, device=str(device))
        for number, layer in enumerate(self.layers):
            if isinstance(layer, FloeLayer):
                layer.num_tokens, layer.is_initialized = manifest["num_tokens"], True
            elif f"{number}.keys" in tensors:
                keys, values = tensors[f"{number}.keys"], tensors[f"{number}.values"]
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values, layer.cumulative_length = keys, values, manifest["num_tokens"]
        self._rows = rows
        self._real = None if manifest["real"] is None else torch.tensor(manifest["real"], dtype=torch.bool)
        return self

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first forward pass."""
        return -1 if self._rows is None else len(self._rows)

    def set_policy(self, policy: str, budget: int) -> None:
        """Selects differently from now on; the stored tokens stay."""
        settings = self._settings | {"policy": policy, "budget": budget}
        if self._rows is None:
            Engine(**settings, dtype=DTYPES[self._dtype or torch.bfloat16])
        else:
            self._rows.set_policy(policy, budget)
        self._settings = settings

    def metrics(self) -> list[dict[str, Any]]:
        """What the decode steps did, `Sequence.metrics` of each row; on a CUDA device one dict for all rows."""
        return [] if self._rows is None else self._rows.metrics()

    def memory(self) -> dict[str, int]:
        """Bytes of all rows: `Sequence.memory`, added up; on a CUDA device `device_rows_bytes`, `device_summary_bytes` and
        `host_bytes`."""
        return {} if self._rows is None else self._rows.memory()


def _real_places(row: torch.Tensor) -> torch.Tensor | None:
    return None if bool(row.all()) else row.nonzero().flatten()


def _same_padding(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        other = b if a is None else a
        return other is None or bool(other.all())
    return torch.equal(a, b)
