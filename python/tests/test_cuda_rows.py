"""What `FloeCache` does with CUDA tensors, on the CPU: the engine on the device has a stand-in, torch's stream none."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the tests of CUDA rows are skipped")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: its tests are skipped")

import floe  # noqa: E402
from floe import _floe  # noqa: E402
from floe.transformers import FloeCache, enable  # noqa: E402
from floe.transformers.cuda_rows import CudaRows  # noqa: E402
from test_transformers import TOLERANCE, assert_same, build, prompt  # noqa: E402
from transformers import DynamicCache  # noqa: E402


class StandIn:
    """The interface of `floe._floe.CudaEngine` over an engine in host memory."""

    def __init__(
        self, num_layers, num_q_heads, num_kv_heads, head_dim, *, device, dtype, policy, budget, sinks, window,
        dense_layers=0, hot_slots, max_sequences, max_tokens, resident, seed=0,
    ):  # fmt: skip
        self.engine = floe.Engine(
            num_layers, num_q_heads, num_kv_heads, head_dim, dtype=dtype, policy=policy, budget=budget, sinks=sinks,
            window=window, dense_layers=dense_layers,
        )  # fmt: skip
        self.sequences = []
        #: Keys and values of each sequence and layer, to be gathered.
        self.stored = []
        self.hot_slots, self.most, self.layers = hot_slots, max_sequences, num_layers
        #: Sequence, layer and number of tokens.
        self.indexed = []

    def insert(self, sequence, stored=None):
        assert sum(other is not None for other in self.sequences) < self.most
        self.sequences.append(sequence)
        self.stored.append(stored or [[torch.empty(0), torch.empty(0)] for _ in range(self.layers)])
        return len(self.sequences) - 1

    def admit(self):
        return self.insert(self.engine.admit())

    def num_tokens(self, sequence, layer):
        return self.sequences[sequence].num_tokens(layer)

    def store(self, sequence, layer, k, v):
        own = self.stored[sequence][layer]
        own[:] = (torch.cat([old, new]) if len(old) else new.clone() for old, new in zip(own, (k, v)))

    def prefill(self, sequence, layer, k, v, *, stream):
        self.sequences[sequence].append(layer, k, v)
        self.store(sequence, layer, k, v)

    def index(self, sequence, layer, *, stream):
        self.indexed.append((sequence, layer, self.num_tokens(sequence, layer)))

    def gather(self, sequence, layer, first, k, v, *, stream):
        for to, rows in zip((k, v), self.stored[sequence][layer]):
            to.copy_(rows[first : first + len(to)])

    def fork(self, sequence, stream):
        return self.insert(self.sequences[sequence].fork(), [list(layer) for layer in self.stored[sequence]])

    def save(self, sequence, path):
        return self.sequences[sequence].save(path)

    def restore(self, path, stream):
        return self.insert(self.engine.restore(path))

    def attend(self, layer, sequences, q, k, v, out, *, scale, stream):
        assert len(set(sequences)) == len(sequences)
        # As the device does, [n, 1, heads, dim] and [n, heads, 1, dim] are [n, heads, dim].
        q, k, v, out = (tensor.reshape(len(sequences), -1, tensor.shape[-1]) for tensor in (q, k, v, out))
        for i, sequence in enumerate(sequences):
            self.sequences[sequence].decode(layer, q[i], k[i], v[i], scale=scale, out=out[i])
            self.store(sequence, layer, k[i : i + 1], v[i : i + 1])

    def truncate(self, sequence, num_tokens, stream):
        self.sequences[sequence].truncate(num_tokens)
        self.stored[sequence] = [[rows[:num_tokens] for rows in layer] for layer in self.stored[sequence]]

    def close(self, sequence):
        self.sequences[sequence].close()
        self.sequences[sequence] = None

    def metrics(self, stream):
        return {"steps": sum(sequence.metrics()["steps"] for sequence in self.sequences if sequence)}


@pytest.fixture
def on_device(monkeypatch):
    """Sends CPU tensors the way of CUDA tensors."""

    def open_rows(cache, key, value):
        if cache._rows is None:
            place = (key.device, cache._max_tokens, cache._resident)
            cache._rows = CudaRows(cache._settings, "float32", key.shape[0], *place)

    monkeypatch.setattr(_floe, "CudaEngine", StandIn, raising=False)
    monkeypatch.setattr(FloeCache, "open_rows", open_rows)
    monkeypatch.setattr(CudaRows, "_stream", lambda rows, plan=None: 0)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3", "llama-mha", "smollm3"])
def test_padded_batches_are_eager_attention(on_device, name):
    ids, mask = prompt(3, 50), torch.ones(3, 50, dtype=torch.long)
    for row, pads in enumerate((0, 17, 49)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    eager = build(name).generate(input_ids=ids, attention_mask=mask, **arguments)
    model = enable(build(name))
    cache = FloeCache(model.config, policy="full")
    ours = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **arguments)
    assert_same(eager, ours)
    assert cache.metrics()[0]["steps"] == 11 * 3 * len(cache._floe_layers)


@pytest.mark.parametrize("sparse_tokens", [1, 16])
def test_later_passes_are_exact_or_decoded_one_by_one(on_device, sparse_tokens):
    ids, model = prompt(2, 60), build("llama")
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 53:55] = 0
    logits = []
    ours = lambda: FloeCache(enable(model).config, policy="full", sparse_tokens=sparse_tokens)
    with torch.no_grad():
        for make in (lambda: DynamicCache(config=model.config), ours):
            cache = make()
            model(input_ids=ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
            logits.append(model(input_ids=ids[:, 50:], attention_mask=mask, past_key_values=cache).logits)
    real = mask[:, 50:].bool()
    assert (logits[0][real] - logits[1][real]).abs().max() < TOLERANCE
    assert [cache._rows.engine.sequences[row].num_tokens() for row in (0, 1)] == [60, 58]
    steps = 10 + 8 if sparse_tokens == 16 else 0
    assert cache.metrics()[0]["steps"] == steps * len(cache._floe_layers)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "llama-mha"])
def test_a_prompt_in_chunks_is_a_prompt_whatever_the_policy(on_device, name):
    ids, model = prompt(2, 400), build(name)
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, :150] = 0
    logits = []
    with torch.no_grad():
        logits.append(model(input_ids=ids, attention_mask=mask).logits)
        enable(model)
        # So small a window that a token attended sparsely would show.
        cache = FloeCache(model.config, policy="window", budget=32, sinks=16, window=16)
        # The second row's first chunk is padding alone.
        pieces = [
            model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 100), (100, 256), (256, 257 + 2), (259, 400))
        ]
        logits.append(torch.cat(pieces, dim=1))
    real = mask.bool()
    assert (logits[0][real] - logits[1][real]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_beams_fork_rows(on_device, name):
    ids = prompt(2, 40)
    arguments = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3}
    eager = build(name).generate(input_ids=ids, **arguments)
    model = enable(build(name))
    ours = model.generate(input_ids=ids, past_key_values=FloeCache(model.config, policy="full"), **arguments)
    assert torch.equal(eager, ours)


def test_a_saved_cache_goes_on(on_device, tmp_path):
    ids, model = prompt(2, 60), enable(build("qwen2-sliding"))
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    cache = FloeCache(model.config, policy="full")
    go_on = lambda cache: model(input_ids=ids[:, 50:], attention_mask=mask, past_key_values=cache).logits
    with torch.no_grad():
        model(input_ids=ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
        assert cache.save(tmp_path) > 0
        expected = go_on(cache)
        # A cache on the CPU opens what one on a device saved.
        assert (go_on(FloeCache(model.config, policy="full").restore(tmp_path)) - expected).abs().max() < TOLERANCE
    place = (torch.device("cpu"), 256, 0.0)
    rows = CudaRows.restore(FloeCache(model.config, policy="full")._settings, "float32", tmp_path, 2, place)
    assert [rows.engine.num_tokens(row, 0) for row in rows.sequences] == [50, 43]


def test_crop_select_and_refusals(on_device):
    ids, model = prompt(2, 40), enable(build("llama"))
    cache = FloeCache(model.config, policy="full")
    with torch.no_grad():
        model(input_ids=ids[:, :38], past_key_values=cache)
        first = model(input_ids=ids[:, 38:39], past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(first, model(input_ids=ids[:, 38:39], past_key_values=cache).logits)
        with pytest.raises(ValueError, match="cannot be changed"):
            cache.set_policy("window", 256)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(input_ids=ids[[1, 0], 39:], past_key_values=cache).logits
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([True, False]))
        one = model(input_ids=ids[1:, 39:], past_key_values=cache).logits
    assert (one - swapped[:1]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"eviction": "lru"}, "`eviction`: has no meaning on a CUDA device"),
        ({"threads": 2}, "`threads`: has no meaning on a CUDA device"),
    ],
)
def test_settings_without_meaning_are_refused(on_device, settings, text):
    model = enable(build("llama"))
    with pytest.raises(ValueError, match=text):
        model.generate(prompt(1, 20), past_key_values=FloeCache(model.config, policy="full", **settings), max_new_tokens=2)


def test_a_layer_is_indexed_once_its_prompt_is_stored(on_device):
    model = enable(build("llama"))
    cache = FloeCache(model.config, policy="floe:sketch=k2v1", budget=128, sinks=16, dense_layers=1)
    model.generate(prompt(1, 20), past_key_values=cache, max_new_tokens=2)
    engine = cache._rows.engine
    config = engine.engine.config
    assert (engine.hot_slots, config["policy"], config["dense_layers"]) == (512, "floe:sketch=k2v1", 1)
    assert engine.indexed == [(0, layer, 20) for layer in range(engine.layers)]


def test_floe_says_what_it_is_on_a_device(on_device):
    model = enable(build("llama"))
    cache = FloeCache(model.config, budget=128, sinks=16)
    with pytest.warns(UserWarning, match="policy `floe` is `pagemean:sketch=k1,tail=page` on a CUDA device"):
        model.generate(prompt(1, 20), past_key_values=cache, max_new_tokens=2)
    assert cache._rows.engine.engine.config["policy"].startswith("pagemean")


def test_a_build_without_the_feature_says_so(monkeypatch):
    if hasattr(_floe, "CudaEngine"):
        monkeypatch.delattr(_floe, "CudaEngine")
    with pytest.raises(ValueError, match="keys on cuda:0: this build of floe attends on the CPU"):
        CudaRows({}, "float32", 1, torch.device("cuda:0"), 256, 0.0)
