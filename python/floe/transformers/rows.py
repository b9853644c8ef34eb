"""The rows of a batch, in host memory: one floe sequence each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import Engine, Sequence

#: Element types that floe takes, by their names in `floe.Engine`.
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def torch_dtype(name: str) -> torch.dtype:
    """The element type that `floe.Engine` calls so."""
    return next(dtype for dtype, own in DTYPES.items() if own == name)


def row_file(folder: Path, number: int) -> Path:
    """Where a saved cache has a row of the batch."""
    return folder / f"row{number}.floe"


@dataclass
class Plan:
    """One forward pass: how many tokens it adds to each row, and which of them are no padding."""

    num_tokens: int
    #: For each row the places of its real tokens among the new ones, int64; `None` = all of them.
    real: list[torch.Tensor | None]
    #: Whether nothing was stored before it.
    first: bool
    #: Whether it is attended as the policy says; else exactly.
    sparse: bool
    #: Stream of a CUDA device on which it runs, once somebody has asked.
    stream: int | None = None

    def __post_init__(self) -> None:
        #: Whether no row has padding.
        self.whole = all(real is None for real in self.real)


@dataclass
class Tensors:
    """What one layer's attention gets: [batch, heads, tokens, head_dim], head-major as transformers has it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    #: The query before rotary embedding, for decode reuse.
    q_pre: torch.Tensor | None = None

    def of_row(self, row: int) -> list[torch.Tensor | None]:
        """One row's tensors, token-major [tokens, heads, head_dim], in place where their rows are contiguous."""
        tensors = (self.query, self.key, self.value, self.q_pre)
        return [None if tensor is None else _token_major(tensor[row]) for tensor in tensors]


class HostRows:
    """Sequences of a `floe.Engine`; tensors on the CPU."""

    def __init__(self, settings: dict[str, Any], dtype: str, batch: int):
        self.engine = Engine(**settings, dtype=dtype)
        self.dtype = torch_dtype(dtype)
        self.sequences: list[Sequence] = [self.engine.admit() for _ in range(batch)]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def wants_q_pre(self) -> bool:
        """Whether the policy reuses earlier steps, which it finds by the query before rotary embedding."""
        return self.engine.config["reuse"]

    def attend(self, layer: int, tensors: Tensors, scale: float, plan: Plan) -> torch.Tensor:
        """Stores and attends the new tokens of one layer; [batch, tokens, num_q_heads, head_dim], zeros for padding."""
        batch, num_heads, num_tokens, head_dim = tensors.query.shape
        out = torch.empty(batch, num_tokens, num_heads, head_dim)
        for row, (sequence, real) in enumerate(zip(self.sequences, plan.real, strict=True)):
            own = tensors.of_row(row)
            if real is None:
                _attend_row(sequence, layer, own, scale, out[row], plan.sparse)
                continue
            out[row].zero_()
            if len(real):
                own = [None if tensor is None else tensor.index_select(0, real) for tensor in own]
                result = torch.empty(len(real), num_heads, head_dim)
                _attend_row(sequence, layer, own, scale, result, plan.sparse)
                out[row].index_copy_(0, real, result)
        return out.to(tensors.query.dtype)

    def truncate(self, lengths: list[int]) -> None:
        """Keeps the first tokens of each row."""
        for sequence, length in zip(self.sequences, lengths, strict=True):
            sequence.truncate(length)

    def take(self, rows: list[int]) -> None:
        """Row i becomes what row `rows[i]` is; those taken more than once are forked."""
        taken: set[int] = set()
        new = []
        for row in rows:
            new.append(self.sequences[row].fork() if row in taken else self.sequences[row])
            taken.add(row)
        self.sequences = new

    def set_policy(self, policy: str, budget: int) -> None:
        """Selects differently from now on."""
        self.engine.set_policy(policy, budget)

    def save(self, folder: Path) -> int:
        """Writes each row to a file of the folder; their bytes."""
        return sum(row.save(row_file(folder, number)) for number, row in enumerate(self.sequences))

    @classmethod
    def restore(cls, settings: dict[str, Any], dtype: str, folder: Path, batch: int) -> HostRows:
        """Opens what `save` wrote."""
        rows = cls(settings, dtype, 0)
        rows.sequences = [rows.engine.restore(row_file(folder, number)) for number in range(batch)]
        return rows

    def metrics(self) -> list[dict[str, Any]]:
        """`Sequence.metrics` of each row."""
        return [row.metrics() for row in self.sequences]

    def memory(self) -> dict[str, int]:
        """`Sequence.memory` of all rows, added up."""
        total: dict[str, int] = {}
        for row in self.sequences:
            for name, num_bytes in row.memory().items():
                total[name] = total.get(name, 0) + num_bytes
        return total


def _attend_row(
    sequence: Sequence,
    layer: int,
    tensors: list[torch.Tensor | None],
    scale: float,
    out: torch.Tensor,
    sparse: bool,
) -> None:
    q, k, v, q_pre = tensors
    if not sparse:
        sequence.prefill(layer, q, k, v, scale=scale, out=out)
        return
    for token in range(out.shape[0]):
        one = slice(token, token + 1)
        before = None if q_pre is None else q_pre[one]
        sequence.decode(layer, q[one], k[one], v[one], q_pre=before, scale=scale, out=out[one])


def _token_major(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().transpose(0, 1)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
