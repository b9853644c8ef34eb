"""Types of the native half of floe."""

import os
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

__version__: str

class SupportsDlpack(Protocol):
    """A tensor of any framework."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

#: float32, float16 or bfloat16, in host memory, rows of head_dim contiguous; other dimensions may be strided. Read in place.
Tensor = npt.NDArray[Any] | SupportsDlpack
StrPath = str | os.PathLike[str]

@final
class Engine:
    """KV cache and attention of one model, for any number of sequences.

    Args:
        num_layers, num_q_heads, num_kv_heads, head_dim: shape of the model; the query heads of a group share a kv head.
        dtype: how keys and values are stored: `bfloat16`, `float16` or `float32`.
        policy: `NAME[:key=value[,key=value]]`, for example `full`, `floe`, `floe:sketch=k1`, `quest`.
        budget: tokens attended exactly per kv head and step, sinks and window included. At least the context: exact.
        sinks, window: first and last tokens, always attended.
        dense_layers: first layers that attend to everything.
        spans: for each layer the tokens that it attends at most (sliding windows), or None.
        threads: own worker threads; 0 = one per core, shared.
        seed: of everything random.
        hot_slots, hot_unit, eviction, prefetch: hot tier of each kv head; 0 slots = none.
        warm_limit_bytes: bytes of keys and values in memory, all sequences together; None = as much as the machine has.
        cold_folder: where what is above that limit goes; without one, tokens that do not fit are refused.

    Raises:
        ValueError: a setting out of range; the text names the field and the value.
        RuntimeError: the worker threads cannot be started.
    """

    def __init__(
        self,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: str = "bfloat16",
        policy: str = "floe",
        budget: int = 256,
        sinks: int = 16,
        window: int = 64,
        dense_layers: int = 0,
        spans: list[int | None] | None = None,
        threads: int = 0,
        seed: int = 0,
        hot_slots: int = 0,
        hot_unit: str = "row",
        eviction: str = "lrfu",
        prefetch: str = "none",
        cold_folder: StrPath | None = None,
        warm_limit_bytes: int | None = None,
    ) -> None: ...
    def admit(self) -> Sequence:
        """Opens an empty sequence."""
    def restore(self, path: StrPath) -> Sequence:
        """Opens a sequence that `Sequence.save` wrote. The file is mapped; a page is read when a step first needs it.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or holds another model's shape.
        """
    def set_policy(self, policy: str, budget: int) -> None:
        """Selects differently from now on; every sequence keeps its keys and values."""
    @property
    def config(self) -> dict[str, Any]:
        """The settings in force."""

@final
class Sequence:
    """One sequence of an engine. Closed when the last reference goes."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Appends keys and values [tokens, num_kv_heads, head_dim], keys after rotary embedding, without attending. Chunks
        of any size give the same cache."""
    def prefill(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        out: Tensor | None = None,
    ) -> Any:
        """Appends prompt tokens and attends causally with their queries, exactly, whatever the policy.

        Args:
            layer: 0 to num_layers - 1.
            q: [tokens, num_q_heads, head_dim], after rotary embedding.
            k, v: [tokens, num_kv_heads, head_dim].
            scale: of the logits; 1 / sqrt(head_dim) by default.
            out: where the result goes, contiguous float32.

        Returns:
            `out`, or a new float32 array [tokens, num_q_heads, head_dim].

        Raises:
            ValueError: a shape, type or number that does not fit; nothing is stored then.
        """
    def decode(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_pre: Tensor | None = None,
        scale: float | None = None,
        out: Tensor | None = None,
    ) -> Any:
        """Appends one token, [1, heads, head_dim] or [heads, head_dim], and attends as the policy says. `q_pre` is the
        query before rotary embedding, for decode reuse. Otherwise as `prefill`."""
    def publish(self) -> None:
        """Builds the indexes of everything appended now, instead of during the next step."""
    def truncate(self, num_tokens: int) -> None:
        """Forgets the tokens at and after `num_tokens` in every layer."""
    def fork(self) -> Sequence:
        """A new sequence with the same contents; pages and indexes are shared until one side changes them."""
    def save(self, path: StrPath) -> int:
        """Writes the sequence to a file, whole or not at all; its bytes."""
    def close(self) -> None:
        """Frees the sequence now; any later call on it is a ValueError."""
    def empty_hot(self) -> None:
        """Empties the hot tier: the next steps take longer and give the same bits."""
    def resize_hot(self, slots: int) -> None:
        """Gives every kv head this many empty slots."""
    def num_tokens(self, layer: int = 0) -> int:
        """Tokens stored in a layer."""
    def memory(self) -> dict[str, int]:
        """Bytes: `kv_bytes`, `kv_allocated_bytes`, `index_bytes`, `hot_bytes`."""
    def metrics(self) -> dict[str, Any]:
        """Sums over all decode steps, a step being one token of one layer: `steps`, `tokens_attended_mean`,
        `kv_bytes_read`, `index_bytes_read`, `full_kv_bytes` (what attention over every token would have read), `hit_rate`
        of the hot tier (None without one), `bytes_moved`, `paths` (steps of kv heads by path), `stage_ns`, ..."""
    def last_step(self) -> list[dict[str, Any]]:
        """The last decode step, one dict a kv head: `path`, `tokens_attended`, `retrieved` (positions), `stage_ns`, ..."""

@final
class CudaEngine:
    """The engine on a CUDA device, for tensors there; only in builds with the feature `cuda`. `floe.transformers` uses it.

    Sequences are numbers. Work is queued on `stream`, the address of a CUDA stream (`torch.cuda.current_stream().cuda_stream`);
    tensors may be freed once it is queued, by an allocator that reuses memory in order of the stream, as torch's does.

    Args:
        device: number of the device.
        policy: `full`, `floe` or `pagemean`, with at most two bits of a key; `pagemean` picks tokens by a sketch, pages
            (`unit=page`) without.
        dense_layers: first layers that attend to everything; all of their rows have room on the device.
        hot_slots: rows of each kv head that stay on the device beside sinks and newest tokens.
        max_sequences, max_tokens: of a sequence; their summaries are allocated at once.
        resident: part of the keys and values for which there is room on the device.

    Raises:
        ValueError: a setting that the device cannot serve; the text names the field.
        RuntimeError: no driver, no device, no memory.
    """

    def __init__(
        self,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        device: int = 0,
        dtype: str = "bfloat16",
        policy: str,
        budget: int,
        sinks: int = 16,
        window: int = 64,
        dense_layers: int = 0,
        hot_slots: int,
        max_sequences: int,
        max_tokens: int,
        resident: float = 0.0,
        seed: int = 0,
    ) -> None: ...
    def admit(self) -> int:
        """Opens an empty sequence; its number."""
    def prefill(self, sequence: int, layer: int, k: SupportsDlpack, v: SupportsDlpack, *, stream: int) -> None:
        """Appends keys and values [tokens, num_kv_heads, head_dim] of a prompt."""
    def index(self, sequence: int, layer: int, *, stream: int) -> None:
        """Has threads of the host build a layer's page trees over what is stored in it; else its first sparse step does, and waits.
        Nothing to do where the policy has no trees."""
    def gather(
        self, sequence: int, layer: int, first: int, k: SupportsDlpack, v: SupportsDlpack, *, stream: int
    ) -> None:
        """Copies stored keys and values from position `first` on, as many as `k` and `v` [tokens, num_kv_heads, head_dim] hold: of
        the cache's own type, rows at multiples of 16 bytes. What is not on the device comes over the link."""
    def attend(
        self,
        layer: int,
        sequences: list[int],
        q: SupportsDlpack,
        k: SupportsDlpack,
        v: SupportsDlpack,
        out: SupportsDlpack,
        *,
        scale: float,
        stream: int,
    ) -> None:
        """Appends one token to each sequence and attends: [n, heads, head_dim], or with a dimension of one token beside the
        heads. `out` receives [n, num_q_heads, head_dim] in its own type."""
    def truncate(self, sequence: int, num_tokens: int, stream: int) -> None:
        """Forgets the tokens at and after `num_tokens`."""
    def fork(self, sequence: int, stream: int) -> int:
        """Opens a sequence with the contents of another; its number. Complete chunks of 256 tokens in host memory are shared.
        Waits for the device."""
    def save(self, sequence: int, path: StrPath) -> int:
        """Writes a sequence to a file, whole or not at all; its bytes. `Engine.restore` reads it too. Waits for the device."""
    def restore(self, path: StrPath, stream: int) -> int:
        """Opens a sequence from a file that `save` or `Sequence.save` wrote; its number.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or holds another model's shape.
        """
    def close(self, sequence: int) -> None:
        """Frees a sequence; waits for the device."""
    def num_tokens(self, sequence: int, layer: int) -> int:
        """Tokens stored in a layer."""
    def metrics(self, stream: int) -> dict[str, Any]:
        """Steps, hits, bytes moved, sparse steps of single kv heads and how many of those attended everything because estimates
        would have been too coarse, and in words the rule by which a step is exact; waits for the stream."""
    def memory(self) -> dict[str, int]:
        """`device_rows_bytes`, `device_summary_bytes`, `host_bytes`."""

@final
class Trace:
    """A recorded long context: keys, values and some queries of one kv head of one layer. What opened is valid.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no trace; the text names the field.
    """

    def __init__(self, path: StrPath) -> None: ...
    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def meta(self) -> dict[str, Any]:
        """The metadata, as `write_trace` takes them."""
    @property
    def k(self) -> npt.NDArray[np.float32]:
        """Keys after rotary embedding, [num_tokens, head_dim]; a new array each time."""
    @property
    def v(self) -> npt.NDArray[np.float32]:
        """Values, [num_tokens, head_dim]; a new array each time."""
    @property
    def q(self) -> npt.NDArray[np.float32]:
        """Queries after rotary embedding, [num_queries, group, head_dim]; a new array each time."""
    @property
    def q_pre(self) -> npt.NDArray[np.float32]:
        """Queries before rotary embedding, [num_queries, group, head_dim]; a new array each time."""
    def tensor(self, name: str) -> TraceTensor:
        """`k`, `v`, `q` or `q_pre` in the file's own bfloat16, in place."""

@final
class TraceTensor:
    """A tensor of a trace for `torch.from_dlpack` and the like: bfloat16, read-only, in the mapped file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def write_trace(
    path: StrPath, meta: dict[str, Any], k: Tensor, v: Tensor, q: Tensor, q_pre: Tensor
) -> None:
    """Writes a format-1 trace, whole or not at all; tensors are rounded to bfloat16.

    Args:
        path: the file.
        meta: `model`, `layer`, `kv_head`, `num_layers`, `num_q_heads`, `num_kv_heads`, `head_dim`, `rope` (`neox-half`,
            `interleaved` or `none`), `rope_theta`, `softmax_scale`, `num_tokens`, `num_queries`, `first_query_pos`,
            `index_until`, `segments` (name: [start, end)), `text`, `licence`; optional `rope_offset`, `extra`.
        k, v: [num_tokens, head_dim]; q, q_pre: [num_queries, group, head_dim].

    Raises:
        ValueError: a field or shape that does not fit, a number that is not finite.
        OSError: the file cannot be written.
    """

def replay(traces: list[Trace], **plan: Any) -> dict[str, Any]:
    """`floe.replay` without defaults."""

def profile(traces: list[Trace], **plan: Any) -> dict[str, Any]:
    """`floe.profile` without defaults."""
