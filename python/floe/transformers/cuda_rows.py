"""The rows of a batch on a CUDA device: hot rows and summaries there, everything else in host memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from .. import _floe
from .rows import Plan, Tensors, row_file, torch_dtype

#: What the device runs for the policy `floe`, as long as nobody asks for a sketch of it by name: half of the device memory of `floe`'s own
#: (13 against 23 % of the keys and values at 31K tokens), and no trees for the host to build before the first token. It errs more.
DEVICE_FLOE = "pagemean:sketch=k1,tail=page"
#: The same policy with its trees.
TREE_FLOE = "floe:sketch=k2v1"

_SETTINGS = (
    "num_layers", "num_q_heads", "num_kv_heads", "head_dim", "policy", "budget", "sinks", "window", "dense_layers", "seed",
)  # fmt: skip


class CudaRows:
    """Sequences of the engine on a CUDA device. All its work is queued on torch's current stream."""

    def __init__(
        self, settings: dict[str, Any], dtype: str, batch: int, device: torch.device, max_tokens: int, resident: float
    ):
        if not hasattr(_floe, "CudaEngine"):
            raise ValueError(f"keys on {device}: this build of floe attends on the CPU; it has no feature `cuda`")
        settings = dict(settings)
        # As many as a step retrieves, and enough for the newest tokens besides.
        hot_slots = settings.pop("hot_slots", 0) or max(512, settings["budget"])
        unknown = [name for name in settings if name not in _SETTINGS]
        if unknown:
            raise ValueError(f"config field `{unknown[0]}`: has no meaning on a CUDA device")
        if settings["policy"] == "floe":
            warnings.warn(
                f"policy `floe` is `{DEVICE_FLOE}` on a CUDA device; `{TREE_FLOE}` has trees there too, for twice the memory",
                stacklevel=2,
            )
            settings["policy"] = DEVICE_FLOE
        self.device = device
        self.dtype = torch_dtype(dtype)
        self.engine = _floe.CudaEngine(
            **settings,
            device=device.index or 0,
            dtype=dtype,
            hot_slots=hot_slots,
            max_sequences=batch,
            max_tokens=max_tokens,
            resident=resident,
        )
        self.sequences: list[int] = [self.engine.admit() for _ in range(batch)]

    def __len__(self) -> int:
        return len(self.sequences)

    #: The device reuses no earlier steps.
    wants_q_pre = False

    def attend(self, layer: int, tensors: Tensors, scale: float, plan: Plan) -> torch.Tensor:
        """As `HostRows.attend`."""
        query, key, value = tensors.query, tensors.key, tensors.value
        if not plan.sparse:
            return self._exactly(layer, query, key, value, scale, plan)
        if plan.num_tokens == 1 and plan.whole:
            # The common step. Each operation counts here: the device waits for Python more than for the device.
            batch, num_heads, _, head_dim = query.shape
            out = torch.empty(batch, 1, num_heads, head_dim, dtype=query.dtype, device=query.device)
            self.engine.attend(layer, self.sequences, query, key, value, out, scale=scale, stream=self._stream(plan))
            return out
        steps = [self._step(layer, query, key, value, scale, (plan, token)) for token in range(plan.num_tokens)]
        return torch.stack(steps, dim=1)

    def _exactly(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, plan: Plan
    ) -> torch.Tensor:
        """By SDPA: over the new rows, and before them those that are stored, brought back row by row of the batch."""
        stream = self._stream(plan)
        at_once = plan.first and plan.whole
        if at_once:
            grouped = query.shape[1] != key.shape[1]
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
            out = out.transpose(1, 2)
        else:
            out = query.new_zeros(query.shape).transpose(1, 2).contiguous()
        for row, (sequence, real) in enumerate(zip(self.sequences, plan.real, strict=True)):
            one = slice(row, row + 1)
            q, k, v = (tensor[one] for tensor in (query, key, value))
            if real is not None:
                real = real.to(self.device)
                q, k, v = (tensor.index_select(2, real) for tensor in (q, k, v))
            if not q.shape[2]:
                continue
            if not at_once:
                stored = 0 if plan.first else self.engine.num_tokens(sequence, layer)
                keys, values = (k, v) if stored == 0 else self._after_stored(layer, sequence, stored, k, v, stream)
                mask = causal_lower_right(q.shape[2], keys.shape[2])
                grouped = q.shape[1] != k.shape[1]
                attended = scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=grouped)
                attended = attended.transpose(1, 2)[0]
                if real is None:
                    out[row] = attended
                else:
                    out[row].index_copy_(0, real, attended)
            self.engine.prefill(sequence, layer, k[0].transpose(0, 1), v[0].transpose(0, 1), stream=stream)
            if plan.first:
                # Threads of the host build this layer's trees while the device goes on with the next layers.
                self.engine.index(sequence, layer, stream=stream)
        return out.contiguous()

    def _after_stored(
        self, layer: int, sequence: int, stored: int, key: torch.Tensor, value: torch.Tensor, stream: int
    ) -> list[torch.Tensor]:
        """Stored keys and values, and behind them new ones: [1, heads, tokens, head_dim] each, one layer's at a time."""
        _, heads, num_tokens, head_dim = key.shape
        # In the cache's type, as it stores the new rows too.
        both = [torch.empty(1, heads, stored + num_tokens, head_dim, dtype=self.dtype, device=key.device) for _ in "kv"]
        k, v = (tensor[0, :, :stored].transpose(0, 1) for tensor in both)
        self.engine.gather(sequence, layer, 0, k, v, stream=stream)
        for tensor, new in zip(both, (key, value)):
            tensor[:, :, stored:] = new
        return [tensor.to(key.dtype) for tensor in both]

    def _step(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        at: tuple[Plan, int],
    ) -> torch.Tensor:
        plan, token = at
        q, k, v = (tensor.select(2, token) for tensor in (query, key, value))
        rows = [row for row, real in enumerate(plan.real) if real is None or token in real]
        out = q.new_zeros(q.shape)
        if rows:
            some = torch.tensor(rows, device=self.device)
            part = torch.empty((len(rows), *q.shape[1:]), dtype=q.dtype, device=q.device)
            chosen = (tensor.index_select(0, some) for tensor in (q, k, v))
            sequences = [self.sequences[row] for row in rows]
            self.engine.attend(layer, sequences, *chosen, part, scale=scale, stream=self._stream(plan))
            out.index_copy_(0, some, part)
        return out

    def truncate(self, lengths: list[int]) -> None:
        """As `HostRows.truncate`; only a few tokens, once a row no longer lies on the device whole."""
        for sequence, length in zip(self.sequences, lengths, strict=True):
            self.engine.truncate(sequence, length, self._stream())

    def take(self, rows: list[int]) -> None:
        """As `HostRows.take`, for at most as many rows as the cache was opened for."""
        for row, sequence in enumerate(self.sequences):
            if row not in rows:
                self.engine.close(sequence)
        taken: set[int] = set()
        new = []
        for row in rows:
            new.append(self.engine.fork(self.sequences[row], self._stream()) if row in taken else self.sequences[row])
            taken.add(row)
        self.sequences = new

    def set_policy(self, policy: str, budget: int) -> None:
        """Not on a device: its memory is laid out for the policy it was opened with."""
        raise ValueError(f"policy `{policy}`, budget {budget}: cannot be changed on a CUDA device once tokens are stored")

    def save(self, folder: Path) -> int:
        """As `HostRows.save`; waits for the device."""
        return sum(self.engine.save(row, row_file(folder, number)) for number, row in enumerate(self.sequences))

    @classmethod
    def restore(
        cls, settings: dict[str, Any], dtype: str, folder: Path, batch: int, place: tuple[torch.device, int, float]
    ) -> CudaRows:
        """Opens what `save`, or `HostRows.save`, wrote. `place`: device, `max_tokens` and `resident`."""
        rows = cls(settings, dtype, batch, *place)
        for number, sequence in enumerate(rows.sequences):
            rows.engine.close(sequence)
            rows.sequences[number] = rows.engine.restore(row_file(folder, number), rows._stream())
        return rows

    def metrics(self) -> list[dict[str, Any]]:
        """One dict for all rows; waits for the device."""
        return [self.engine.metrics(self._stream())]

    def memory(self) -> dict[str, int]:
        """Bytes on the device and in host memory."""
        return self.engine.memory()

    def _stream(self, plan: Plan | None = None) -> int:
        """torch's current stream; asked for once a forward pass."""
        if plan is None:
            return torch.cuda.current_stream(self.device).cuda_stream
        if plan.stream is None:
            plan.stream = self._stream()
        return plan.stream
