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
        hot_slots, max_sequences, max_tokens, resident, seed=0,
    ):  # fmt: skip
        self.engine = floe.Engine(
            num_layers, num_q_heads, num_kv_heads, head_dim, dtype=dtype, policy=policy, budget=budget, sinks=sinks,
            window=window,
        )  # fmt: skip
        self.sequences = []
        self.hot_slots, self.most = hot_slots, max_sequences

    def admit(self):
        assert len(self.sequences) < self.most
        self.sequences.append(self.engine.admit())
        return len(self.sequences) - 1

    def prefill(self, sequence, layer, k, v, *, stream):
        self.sequences[sequence].append(layer, k, v)

    def attend(self, layer, sequences, q, k, v, out, *, scale, stream):
        assert len(set(sequences)) == len(sequences)
        # As the device does, [n, 1, heads, dim] and [n, heads, 1, dim] are [n, heads, dim].
        q, k, v, out = (tensor.reshape(len(sequences), -1, tensor.shape[-1]) for tensor in (q, k, v, out))
        for i, sequence in enumerate(sequences):
            self.sequences[sequence].decode(layer, q[i], k[i], v[i], scale=scale, out=out[i])

    def truncate(self, sequence, num_tokens, stream):
        self.sequences[sequence].truncate(num_tokens)

    def close(self, sequence):
        self.sequences[sequence].close()

    def metrics(self, stream):
        return {"steps": sum(sequence.metrics()["steps"] for sequence in self.sequences)}


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


def test_later_tokens_are_decoded_one_by_one(on_device):
    ids, model = prompt(2, 60), build("llama")
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 53:55] = 0
    logits = []
    with torch.no_grad():
        for make in (lambda: DynamicCache(config=model.config), lambda: FloeCache(enable(model).config, policy="full")):
            cache = make()
            model(input_ids=ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
            logits.append(model(input_ids=ids[:, 50:], attention_mask=mask, past_key_values=cache).logits)
    real = mask[:, 50:].bool()
    assert (logits[0][real] - logits[1][real]).abs().max() < TOLERANCE
    assert [cache._rows.engine.sequences[row].num_tokens() for row in (0, 1)] == [60, 58]


def test_crop_select_and_refusals(on_device, tmp_path):
    ids, model = prompt(2, 40), enable(build("llama"))
    cache = FloeCache(model.config, policy="full")
    with torch.no_grad():
        model(input_ids=ids[:, :38], past_key_values=cache)
        first = model(input_ids=ids[:, 38:39], past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(first, model(input_ids=ids[:, 38:39], past_key_values=cache).logits)
        for call, text in [
            (lambda: cache.reorder_cache(torch.tensor([0, 0])), "cannot be forked"),
            (lambda: cache.save(tmp_path / "no"), "cannot be saved"),
            (lambda: cache.set_policy("window", 256), "cannot be changed"),
        ]:
            with pytest.raises(ValueError, match=text):
                call()
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(input_ids=ids[[1, 0], 39:], past_key_values=cache).logits
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([True, False]))
        one = model(input_ids=ids[1:, 39:], past_key_values=cache).logits
    assert (one - swapped[:1]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dense_layers": 1}, "`dense_layers`: must be 0 on a CUDA device"),
        ({"threads": 2}, "`threads`: has no meaning on a CUDA device"),
    ],
)
def test_settings_without_meaning_are_refused(on_device, settings, text):
    model = enable(build("llama"))
    with pytest.raises(ValueError, match=text):
        model.generate(prompt(1, 20), past_key_values=FloeCache(model.config, policy="full", **settings), max_new_tokens=2)


def test_floe_says_what_it_is_on_a_device(on_device):
    model = enable(build("llama"))
    cache = FloeCache(model.config, budget=128, sinks=16)
    with pytest.warns(UserWarning, match="policy `floe` is `pagemean:sketch=k1,tail=page` on a CUDA device"):
        model.generate(prompt(1, 20), past_key_values=cache, max_new_tokens=2)
    assert cache._rows.engine.hot_slots == 512


def test_a_build_without_the_feature_says_so(monkeypatch):
    if hasattr(_floe, "CudaEngine"):
        monkeypatch.delattr(_floe, "CudaEngine")
    with pytest.raises(ValueError, match="keys on cuda:0: this build of floe attends on the CPU"):
        CudaRows({}, "float32", 1, torch.device("cuda:0"), 256, 0.0)
