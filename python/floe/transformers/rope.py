"""Queries before rotary embedding, recovered from those after it."""

from __future__ import annotations

import torch


def unrotate(rotary: torch.nn.Module, rotated: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Inverts the rotary embedding of a model that pairs dimension i with i + rotary_dim / 2.

    The model's own cosines and sines are used, in the precision in which it used them, so scaled ropes (linear, dynamic,
    Llama 3, YaRN, longrope) need no special case: `q_pre = (q * cos - rotate_half(q) * sin) / (cos^2 + sin^2)`.

    Args:
        rotary: the model's rotary embedding module, `forward(x, position_ids) -> (cos, sin)`.
        rotated: `[batch, heads, tokens, head_dim]`, after the embedding.
        position_ids: `[batch or 1, tokens]`.

    Returns:
        float32, the shape of `rotated`.
    """
    cos, sin = rotary(rotated, position_ids)
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    width = cos.shape[-1]
    x, rest = rotated[..., :width].float(), rotated[..., width:].float()
    half = width // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    plain = (x * cos - turned * sin) / (cos * cos + sin * sin)
    return torch.cat((plain, rest), dim=-1) if rest.shape[-1] else plain
