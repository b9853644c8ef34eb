"""The rows of a batch, in host memory: one floe sequence each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import Engine, Sequence

#: Element types that floe takes, by their names in `floe.Engine`.
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


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


class HostRows:
    """Sequences of a `floe.Engine`; tensors on the CPU."""

    def __init__(self, settings: dict[str, Any], dtype: str, batch: int):
        self.engine = Engine(**settings, dtype=dtype)
        self.sequences: list[Sequence] = [self.engine.admit() for _ in range(batch)]

    def __len__(self) -> int:
        return len(self.sequences)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, plan: Plan
    ) -> torch.Tensor:
        """Stores and attends the new tokens of one layer: [batch, heads, tokens, head_dim] in, [batch, tokens, num_q_heads,
        head_dim] out, zeros for padding."""
        batch, num_heads, num_tokens, head_dim = query.shape
        out = torch.empty(batch, num_tokens, num_heads, head_dim)
        for row, (sequence, real) in enumerate(zip(self.sequences, plan.real, strict=True)):
            qkv = [_token_major(tensor[row]) for tensor in (query, key, value)]
            if real is None:
                _attend_row(sequence, layer, qkv, scale, out[row], plan.sparse)
                continue
            out[row].zero_()
            if len(real):
                qkv = [tensor.index_select(0, real) for tensor in qkv]
                result = torch.empty(qkv[0].shape)
                _attend_row(sequence, layer, qkv, scale, result, plan.sparse)
                out[row].index_copy_(0, real, result)
        return out.to(query.dtype)

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
        return sum(row.save(folder / f"row{number}.floe") for number, row in enumerate(self.sequences))

    @classmethod
    def restore(cls, settings: dict[str, Any], dtype: str, folder: Path, batch: int) -> HostRows:
        """Opens what `save` wrote."""
        rows = cls(settings, dtype, 0)
        rows.sequences = [rows.engine.restore(folder / f"row{number}.floe") for number in range(batch)]
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
    sequence: Sequence, layer: int, qkv: list[torch.Tensor], scale: float, out: torch.Tensor, sparse: bool
) -> None:
    if not sparse:
        sequence.prefill(layer, *qkv, scale=scale, out=out)
        return
    for token in range(out.shape[0]):
        one = slice(token, token + 1)
        sequence.decode(layer, *(tensor[one] for tensor in qkv), scale=scale, out=out[one])


def _token_major(tensor: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, head_dim] as [tokens, heads, head_dim], in place where the rows are contiguous."""
    tensor = tensor.detach().transpose(0, 1)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
