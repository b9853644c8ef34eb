"""Reports over recorded traces: what `floe replay` and `floe profile` print, as dicts."""

from __future__ import annotations

import os
from collections.abc import Sequence as AnySequence
from typing import Any, Union

from . import _floe
from ._floe import Trace

Traces = Union[Trace, str, "os.PathLike[str]", AnySequence[Union[Trace, str, "os.PathLike[str]"]]]

POLICIES = ("full", "int4", "window", "quest", "pagemean", "oracle", "floe:sketch=off", "floe")


def replay(
    traces: Traces,
    *,
    policies: AnySequence[str] = POLICIES,
    budgets: AnySequence[int] = (96, 256, 1024),
    segments: AnySequence[str] = (),
    max_queries: int = 0,
    decode_from: str = "index-until",
    seed: int = 0,
    threads: int = 0,
) -> dict[str, Any]:
    """Compares policies with full attention on recorded traces.

    Positions up to the trace's `index_until` are prefilled, the rest is decoded with the recorded queries.

    Args:
        traces: traces, or their paths.
        policies: each `NAME[:key=value[,key=value]]`, for example `floe:sketch=k1`.
        budgets: tokens attended exactly per kv head and step, sinks and window included.
        segments: segments to measure; none = all in the decoded part.
        max_queries: measure at most this many queries of each trace, evenly spaced; 0 = all.
        decode_from: where the prefill ends: `index-until`, as the trace says, or `first-query`, for policies that learn.
        seed: seed of the policies' random parts.
        threads: 0 = one per core.

    Returns:
        `{"schema", "rows"}`, one row per trace, segment, policy and budget: `mean_error`, `p95_error`, `p99_error` of
        `|o - o_full| / |o_full|`, `mass_kept`, `recall`, `tokens_read`, `bytes_read`, `index_share`, ...
    """
    return _floe.replay(
        _open(traces),
        policies=list(policies),
        budgets=list(budgets),
        segments=list(segments),
        max_queries=max_queries,
        decode_from=decode_from,
        seed=seed,
        threads=threads,
    )


def profile(
    traces: Traces,
    *,
    policy: str = "floe",
    budget: int = 256,
    unit: str = "row",
    evictions: AnySequence[str] = ("lru", "clock", "lfu", "mass", "lrfu"),
    prefetches: AnySequence[str] = ("none", "last", "next_layer", "predicted"),
    slots: AnySequence[float] = (1, 1.5, 2, 4, 8),
    max_steps: int = 0,
    link_gb_per_s: float | None = None,
    link_latency_us: float = 4.5,
    layer_us: float = 60.0,
    overlap: float = 0.0,
    seed: int = 0,
    threads: int = 0,
) -> dict[str, Any]:
    """Says what hot tiers of several sizes would do for the sequence whose shards the traces are.

    Args:
        traces: the shards of one sequence.
        policy, budget: how tokens are selected.
        unit: `row` (one token) or `page` (16 tokens): what one slot holds.
        evictions, prefetches: the ways to compare.
        slots: slots of each shard, as multiples of the units that a step retrieves.
        max_steps: decode at most this many steps; 0 = all.
        link_gb_per_s, link_latency_us, layer_us, overlap: the simulated link; bandwidth by default what was measured for
            the unit's size over PCIe 5.0.
        seed, threads: as in `replay`.

    Returns:
        `{"schema", "rows", "overlap", "stage_ns", "notes"}`. Hit rates count retrieved units only; every time in `rows`
        is simulated, those of `stage_ns` are measured.
    """
    return _floe.profile(
        _open(traces),
        policy=policy,
        budget=budget,
        unit=unit,
        evictions=list(evictions),
        prefetches=list(prefetches),
        slots=list(slots),
        max_steps=max_steps,
        link_gb_per_s=link_gb_per_s,
        link_latency_us=link_latency_us,
        layer_us=layer_us,
        overlap=overlap,
        seed=seed,
        threads=threads,
    )


def _open(traces: Traces) -> list[Trace]:
    if isinstance(traces, (Trace, str, os.PathLike)):
        traces = [traces]
    return [trace if isinstance(trace, Trace) else Trace(trace) for trace in traces]
