"""Engine and Sequence through numpy: shapes, exactness, errors, threads."""

import subprocess
import sys
import threading
import time

import floe
import numpy as np
import pytest

HEADS, KV_HEADS, DIM = 6, 2, 32


def rows(rng, tokens):
    """Random q, k, v of some tokens."""
    shape = lambda heads: (tokens, heads, DIM)
    return [rng.standard_normal(shape(heads), dtype=np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def causal(q, k, v, first):
    """Causal attention in float64: query i sees keys 0..=first + i."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    for i in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys = k[: first + i + 1, head // group].astype(np.float64)
            logits = keys @ q[i, head].astype(np.float64) / np.sqrt(DIM)
            weights = np.exp(logits - logits.max())
            out[i, head] = weights / weights.sum() @ v[: first + i + 1, head // group]
    return out


def engine(**settings):
    return floe.Engine(2, HEADS, KV_HEADS, DIM, dtype="float32", **settings)


def test_full_policy_is_exact_in_chunks_and_steps(rng):
    q, k, v = rows(rng, 150)
    seq = engine(policy="full").admit()
    out = [seq.prefill(1, q[:70], k[:70], v[:70]), seq.prefill(1, q[70:100], k[70:100], v[70:100])]
    out += [seq.decode(1, q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(100, 150)]
    out = np.concatenate(out)
    assert out.dtype == np.float32 and out.shape == (150, HEADS, DIM)
    np.testing.assert_allclose(out, causal(q, k, v, 0), atol=2e-6)
    assert (seq.num_tokens(0), seq.num_tokens(1)) == (0, 150)


def test_a_budget_of_the_context_is_exact_and_a_smaller_one_is_not(rng):
    q, k, v = rows(rng, 300)
    truth = causal(q[299:], k, v, 299)
    errors = []
    for budget in (300, 96):
        seq = engine(budget=budget, sinks=4, window=16).admit()
        seq.append(0, k[:299], v[:299])
        out = seq.decode(0, q[299:], k[299:], v[299:])
        errors.append(np.abs(out - truth).max())
        assert seq.last_step()[0]["tokens_attended"] == budget
    assert errors[0] < 2e-6 < errors[1]


def test_layouts_and_dtypes_are_read_in_place(rng):
    q, k, v = rows(rng, 40)
    outs = []
    for change in (lambda x: x, lambda x: np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2)):
        seq = engine().admit()
        outs.append(seq.prefill(0, *(change(x) for x in (q, k, v))))
    np.testing.assert_array_equal(outs[0], outs[1])
    halves = [x.astype(np.float16) for x in (q, k, v)]
    wide = [x.astype(np.float32) for x in halves]
    got, want = (engine().admit().prefill(0, *x) for x in (halves, wide))
    np.testing.assert_array_equal(got, want)


def test_two_dimensions_are_one_token_and_out_is_filled(rng):
    q, k, v = rows(rng, 1)
    out = np.full((1, HEADS, DIM), np.nan, dtype=np.float32)
    seq = engine().admit()
    assert seq.decode(0, q[0], k[0], v[0], out=out) is out
    np.testing.assert_allclose(out, causal(q, k, v, 0), atol=2e-6)


def test_truncate_fork_save_and_restore_continue_alike(rng, tmp_path):
    q, k, v = rows(rng, 401)
    host = engine(budget=96, sinks=4, window=16)
    seq = host.admit()
    seq.append(0, k[:400], v[:400])
    seq.append(1, k[:400], v[:400])
    seq.publish()
    step = lambda s: s.decode(0, q[400:], k[400:], v[400:])
    twin = seq.fork()
    num_bytes = seq.save(tmp_path / "a.floe")
    assert num_bytes == (tmp_path / "a.floe").stat().st_size > seq.memory()["kv_bytes"]
    restored = host.restore(tmp_path / "a.floe")
    first = step(seq)
    np.testing.assert_array_equal(first, step(twin))
    np.testing.assert_array_equal(first, step(restored))
    seq.truncate(400)
    assert seq.num_tokens() == 400
    np.testing.assert_array_equal(first, step(seq))
    seq.truncate(90)
    np.testing.assert_allclose(
        seq.decode(0, q[90:91], k[90:91], v[90:91]), causal(q[90:91], k, v, 90), atol=2e-6
    )


def test_metrics_add_up(rng):
    q, k, v = rows(rng, 420)
    seq = engine(budget=96, sinks=4, window=16, hot_slots=256).admit()
    seq.append(0, k[:400], v[:400])
    for i in range(400, 420):
        seq.decode(0, q[i], k[i], v[i])
    metrics = seq.metrics()
    assert metrics["steps"] == 20
    assert metrics["paths"] == {"sparse": 20 * KV_HEADS}
    assert metrics["tokens_attended_mean"] == 96
    row_bytes = 2 * DIM * 4
    assert metrics["kv_bytes_read"] == 20 * KV_HEADS * 96 * row_bytes
    assert metrics["full_kv_bytes"] == sum(range(401, 421)) * KV_HEADS * row_bytes
    assert 0 < metrics["hit_rate"] == metrics["hot_hits"] / metrics["hot_requests"] < 1
    assert set(metrics["stage_ns"]) >= {"select", "attend"}
    before = seq.decode(1, q[0], k[0], v[0])
    seq.empty_hot()
    assert seq.memory()["hot_bytes"] > 0 and before.shape == (1, HEADS, DIM)


def test_policies_change_without_losing_rows(rng):
    q, k, v = rows(rng, 301)
    host = engine(budget=96, sinks=4, window=16)
    seq = host.admit()
    seq.append(0, k[:300], v[:300])
    host.set_policy("full", 96)
    np.testing.assert_allclose(seq.decode(0, q[300], k[300], v[300]), causal(q[300:], k, v, 300), atol=2e-6)
    assert host.config["policy"] == "full"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"policy": "flow"}, "policy `flow`: unknown name"),
        ({"policy": "floe:sketch=k3"}, "option `sketch` = `k3`"),
        ({"budget": 10}, "config field `budget` = 10"),
        ({"window": 3}, "config field `window` = 3"),
        ({"dense_layers": 9}, "config field `dense_layers` = 9"),
        ({"hot_unit": "word"}, "config field `hot_unit` = word"),
        ({"eviction": "fifo"}, "eviction policy `fifo`"),
        ({"spans": [None]}, "config field `spans`"),
    ],
)
def test_settings_out_of_range_are_value_errors(settings, text):
    with pytest.raises(ValueError, match=text):
        engine(**settings)


def test_bad_shapes_and_numbers_are_value_errors_and_store_nothing(rng):
    q, k, v = rows(rng, 2)
    seq = engine().admit()
    cases = [
        ((0, q[:, :5], k, v), r"tensor `q`: expected \[2, 6, 32\], got \[2, 5, 32\]"),
        ((0, q, k[:1], v), "tensor `k`"),
        ((7, q, k, v), "layer 7: the model has 2 layers"),
        ((0, q.astype(np.float64), k, v), "float32, float16 or bfloat16 elements, got float64"),
        ((0, q[..., ::2], k, v), "rows of head_dim contiguous elements"),
        ((0, q[::-1], k, v), "not negative"),
        ((0, q[0, 0], k, v), r"a shape \[tokens, heads, head_dim\]"),
        ((0, q * np.nan, k, v), "tensor `q`: not a finite number at token 0"),
    ]
    for arguments, text in cases:
        with pytest.raises(ValueError, match=text):
            seq.prefill(*arguments)
    with pytest.raises(TypeError, match="expected a numpy array or an object with __dlpack__, got list"):
        seq.prefill(0, q.tolist(), k, v)
    frozen = np.zeros((2, HEADS, DIM), dtype=np.float32)
    frozen.flags.writeable = False
    for out, text in [
        (frozen, "can be written"),
        (np.zeros((2, HEADS, DIM)), "float32"),
        (np.zeros((1, HEADS, DIM), dtype=np.float32), "expected"),
        (np.zeros((2, DIM, HEADS), dtype=np.float32).transpose(0, 2, 1), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=f"tensor `out`.*{text}"):
            seq.prefill(0, q, k, v, out=out)
    assert seq.num_tokens() == 0


def test_a_cold_tier_changes_no_bit_and_without_one_the_limit_refuses(rng, tmp_path):
    q, k, v = rows(rng, 2001)
    limit = 64 * 1024
    outs = []
    for settings in ({}, {"warm_limit_bytes": limit, "cold_folder": tmp_path}):
        seq = engine(budget=96, sinks=4, window=16, **settings).admit()
        seq.append(0, k[:2000], v[:2000])
        outs.append(seq.decode(0, q[2000], k[2000], v[2000]))
    np.testing.assert_array_equal(*outs)
    seq = engine(warm_limit_bytes=limit).admit()
    with pytest.raises((RuntimeError, ValueError), match=f"{limit}"):
        seq.append(0, k, v)


def test_closed_sequences_and_files_have_their_own_errors(rng, tmp_path):
    host = engine()
    seq = host.admit()
    seq.close()
    with pytest.raises(ValueError, match="is not open"):
        seq.num_tokens()
    with pytest.raises(FileNotFoundError, match="cannot open: No such file"):
        host.restore(tmp_path / "none")
    with pytest.raises(OSError, match="cannot create"):
        host.admit().save(tmp_path / "no" / "folder")
    (tmp_path / "text").write_text("not a page file, but long enough to hold a header and a footer " * 4)
    with pytest.raises(ValueError, match="text: field `magic`"):
        host.restore(tmp_path / "text")


def test_other_threads_run_while_a_prompt_is_attended(rng):
    q, k, v = rows(rng, 4000)
    seq = engine().admit()
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    seq.prefill(0, q, k, v)
    end = time.perf_counter()
    done.set()
    thread.join()
    # With the interpreter's lock held there would be none.
    assert sum(start < t < end for t in ticks) >= min(5, (end - start) / 0.02)


def test_import_is_quick_and_leaves_torch_alone():
    script = (
        "import time; start = time.perf_counter(); import floe; took = time.perf_counter() - start;"
        "import sys; print(took, 'torch' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)]
    times = [float(run.stdout.split()[0]) for run in runs]
    assert min(times) < 0.3
    assert runs[0].stdout.split()[1] == "False"
