"""Traces, replay and profile through numpy."""

import floe
import numpy as np
import pytest


def meta(**changes):
    fields = {
        "model": "tiny",
        "layer": 1,
        "kv_head": 0,
        "num_layers": 2,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rope": "none",
        "rope_theta": 10000.0,
        "softmax_scale": 0.25,
        "num_tokens": 600,
        "num_queries": 40,
        "first_query_pos": 560,
        "index_until": 560,
        "segments": {"text": (560, 600)},
        "text": "random numbers",
        "licence": "CC0-1.0",
    }
    return fields | changes


def tensors(rng, tokens=600, queries=40):
    k, v = (rng.standard_normal((tokens, 16), dtype=np.float32) for _ in range(2))
    q = rng.standard_normal((queries, 2, 16), dtype=np.float32)
    return k, v, q, q


def bf16(x):
    """Rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_what_is_written_is_read(rng, tmp_path):
    k, v, q, q_pre = tensors(rng)
    path = tmp_path / "t.safetensors"
    floe.write_trace(path, meta(extra={"note": "x"}), k, v, q, q_pre)
    trace = floe.Trace(path)
    for name, given in (("k", k), ("v", v), ("q", q), ("q_pre", q_pre)):
        np.testing.assert_array_equal(getattr(trace, name), bf16(given))
        assert trace.tensor(name).shape == given.shape
    assert trace.meta["segments"] == {"text": [560, 600]}
    assert trace.meta["extra"] == {"note": "x"}
    assert (trace.name, trace.path) == ("t.safetensors", path)


def test_bad_traces_name_the_field(rng, tmp_path):
    k, v, q, q_pre = tensors(rng)
    path = tmp_path / "t.safetensors"
    cases = [
        (meta(layer=5), (k, v, q, q_pre), "layer is 5"),
        (meta(rope="spiral"), (k, v, q, q_pre), "config field `rope` = spiral"),
        (meta(num_tokens="many"), (k, v, q, q_pre), "`num_tokens`"),
        (meta(), (k[:10], v, q, q_pre), r"tensor `k`: expected the metadata's shape \[600, 16\], got \[10, 16\]"),
        (meta(), (k, v * np.inf, q, q_pre), "tensor v holds"),
    ]
    for fields, data, text in cases:
        with pytest.raises(ValueError, match=text):
            floe.write_trace(path, fields, *data)
    short = meta()
    del short["licence"]
    with pytest.raises(ValueError, match="`licence` is missing"):
        floe.write_trace(path, short, k, v, q, q_pre)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="cannot create"):
        floe.write_trace(tmp_path / "no" / "t", meta(), k, v, q, q_pre)
    (tmp_path / "bad").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="bad: header length"):
        floe.Trace(tmp_path / "bad")


def test_replay_gives_the_rows_of_the_command(bundled_trace):
    report = floe.replay(bundled_trace, policies=["full", "window", "floe"], budgets=[256], max_queries=24, threads=2)
    assert report["schema"] == "floe-replay/1"
    errors = {
        policy: np.mean([row["mean_error"] for row in report["rows"] if row["policy"] == policy])
        for policy in ("full", "window", "floe")
    }
    assert errors["full"] < 1e-5 < errors["floe"] < 0.2 * errors["window"]


def test_profile_puts_every_policy_beside_the_optimum(bundled_trace):
    report = floe.profile(
        floe.Trace(bundled_trace), evictions=["lru", "mass"], prefetches=["none"], slots=[1, 4], max_steps=24, threads=2
    )
    assert len(report["rows"]) == 4
    for row in report["rows"]:
        assert 0 <= row["hit_rate"] <= row["belady_hit_rate"] <= 1
    assert "simulated" in report["notes"]


def test_reports_refuse_what_they_cannot_do(bundled_trace, tmp_path):
    with pytest.raises(ValueError, match="replay field `budgets` is empty"):
        floe.replay(bundled_trace, budgets=[])
    with pytest.raises(ValueError, match="config field `decode_from` = now"):
        floe.replay(bundled_trace, decode_from="now")
    with pytest.raises(ValueError, match="no segment `prologue`"):
        floe.replay(bundled_trace, segments=["prologue"])
    with pytest.raises(ValueError, match="eviction policy `fifo`"):
        floe.profile(bundled_trace, evictions=["fifo"])
    with pytest.raises(FileNotFoundError):
        floe.replay(tmp_path / "none")
