"""One full-attention layer of a `FloeCache`, as transformers sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .rows import Tensors

if TYPE_CHECKING:
    from .cache import FloeCache

#: Attribute by which a key tensor says which layer handed it on.
LAYER_OF_KEY = "_floe_layer"


class StoredLength(int):
    """A number of keys that knows its cache: how the mask builder finds it."""

    cache: FloeCache

    def __new__(cls, value: int, cache: FloeCache) -> StoredLength:
        length = super().__new__(cls, value)
        length.cache = cache
        return length


class FloeLayer(CacheLayerMixin):
    """Stores nothing itself: rows pass through `update` to the attention function, which hands them to the engine."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, cache: FloeCache, index: int):
        super().__init__()
        self.cache = cache
        #: Number of the layer in the engine.
        self.index = index
        #: Tokens stored, padding included.
        self.num_tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Checks the model's tensors against the configuration before anything is stored."""
        self.cache.open_rows(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks the new rows, [batch, num_kv_heads, tokens, head_dim], as this layer's and hands them on."""
        self.cache.check_planned(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        setattr(key_states, LAYER_OF_KEY, self)
        return key_states, value_states

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        q_pre: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Stores the rows and attends: [batch, tokens, num_q_heads, head_dim] of the query's dtype, zeros for padding."""
        out = self.cache.attend(self.index, Tensors(query, key, value, q_pre), scale)
        self.num_tokens += query.shape[2]
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return StoredLength(self.num_tokens + query_length, self.cache), 0

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return -1
