"""`FloeCache` with tensors on a CUDA device; skipped, with the reason, where there is none."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the CUDA tests are skipped")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: the CUDA tests are skipped")

from floe import _floe  # noqa: E402
from floe.transformers import FloeCache, enable  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not hasattr(_floe, "CudaEngine"), reason="this build of floe has no feature `cuda`"),
]

#: name: (model type, settings beyond the shared ones); heads that the device has kernels for.
MODELS = {
    "llama": ("llama", {}),
    "llama-128": ("llama", {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def build(name, dtype=torch.bfloat16):
    model_type, settings = MODELS[name]
    shared = {
        "vocab_size": 97,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.15,
    }
    config = transformers.AutoConfig.for_model(model_type, **(shared | settings))
    torch.manual_seed(11)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to("cuda", dtype).eval()


def prompt(batch, tokens):
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(3)).cuda()


@torch.no_grad()
def forced(model, ids, prefill, mask=None, cache=None):
    """Logits of the tokens after the prompt, each fed as given, [batch, steps, vocabulary] of float32."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    own = lambda end: {} if mask is None else {"attention_mask": mask[:, :end]}
    model(input_ids=ids[:, :prefill], past_key_values=cache, **own(prefill))
    steps = [
        model(input_ids=ids[:, i : i + 1], past_key_values=cache, **own(i + 1)).logits.float()
        for i in range(prefill, ids.shape[1])
    ]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_full_is_as_close_to_f32_as_sdpa_is(name, padded):
    ids, mask = prompt(3, 720), None
    if padded:
        mask = torch.ones(3, 720, dtype=torch.long, device="cuda")
        for row, pads in enumerate((0, 17, 650)):
            mask[row, :pads] = 0
    truth = forced(build(name, torch.float32), ids, 700, mask)
    model = build(name)
    sdpa = forced(model, ids, 700, mask)
    cache = FloeCache(enable(model).config, policy="full", max_tokens=1024, resident=1.0)
    ours = forced(model, ids, 700, mask, cache)
    assert (ours - truth).norm() < 1.3 * (sdpa - truth).norm()
    assert cache.memory()["device_rows_bytes"] > 0


@pytest.mark.parametrize("policy", ["pagemean:sketch=k1,tail=page", "floe:sketch=k2v1"])
def test_a_sparse_policy_is_as_good_as_on_the_cpu(policy):
    ids, model = prompt(2, 4020), enable(build("llama"))
    full = forced(model, ids, 4000)
    device = FloeCache(model.config, policy=policy, budget=256, max_tokens=4352)
    ours = forced(model, ids, 4000, cache=device)
    model.cpu()
    host = []
    for name in (policy, "window"):
        cache = FloeCache(model.config, policy=name, budget=256)
        host.append((forced(model, ids.cpu(), 4000, cache=cache).cuda() - full).norm())
    error, (same, window) = (ours - full).norm(), host
    print(f"{policy}: error {error:.4f} on the device, {same:.4f} on the CPU, window {window:.4f}")
    assert error < 1.15 * same
    assert error < window
    metrics = device.metrics()[0]
    assert metrics["steps"] == 3 * 20 and metrics["exact_steps"] == 0
    assert 0 < metrics["hit_rate"] < 1
    held = device.memory()
    whole = 3 * 2 * 2 * 4000 * 2 * 64 * 2
    assert held["host_bytes"] >= whole
    assert held["device_rows_bytes"] + held["device_summary_bytes"] < 0.6 * whole


def test_crop_goes_back_and_batches_are_subset():
    ids, model = prompt(2, 1040), enable(build("qwen3"))
    cache = FloeCache(model.config, policy="pagemean:sketch=k1,tail=page", budget=256, max_tokens=2048)
    first = forced(model, ids[:, :1004], 1000, cache=cache)
    cache.crop(-4)
    with torch.no_grad():
        again = torch.cat(
            [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits.float() for i in range(1000, 1004)], dim=1
        )
        assert (again - first).norm() < 0.02 * first.norm()
        cache.batch_select_indices(torch.tensor([1]))
        one = model(input_ids=ids[1:, 1004:1005], past_key_values=cache).logits
    assert one.shape == (1, 1, 97) and cache.batch_size == 1


def test_generate_gives_the_same_tokens_as_sdpa_when_everything_is_resident():
    ids, model = prompt(1, 500), build("qwen2", torch.float16)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **arguments)
    enable(model)
    cache = FloeCache(model.config, policy="full", max_tokens=1024, resident=1.0)
    ours = model.generate(ids, past_key_values=cache, **arguments)
    assert (plain == ours).float().mean() > 0.99


#: Rows of the cache that stay on the device: sinks, newest tokens and slots; or all of them.
RESIDENT = [("pagemean:sketch=k1,tail=page", 0.0), ("floe:sketch=k2v1", 0.0), ("full", 1.0)]


@pytest.mark.parametrize(("policy", "resident"), RESIDENT)
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_chunks_is_as_close_to_f32_as_sdpa_is(policy, resident, padded):
    ids, mask = prompt(2, 3000), None
    if padded:
        mask = torch.ones(2, 3000, dtype=torch.long, device="cuda")
        mask[1, :1200] = 0
    real = torch.ones(2, 1500, dtype=torch.bool) if mask is None else mask[:, 1500:].bool().cpu()

    @torch.no_grad()
    def last(model, cache=None):
        if cache is None:
            return model(input_ids=ids, attention_mask=mask).logits[:, 1500:].float()[real]
        pieces = []
        for a, b in ((0, 1000), (1000, 1500), (1500, 1502), (1502, 3000)):
            own = {} if mask is None else {"attention_mask": mask[:, :b]}
            pieces.append(model(input_ids=ids[:, a:b], past_key_values=cache, **own).logits)
        return torch.cat(pieces[2:], dim=1).float()[real]

    truth, sdpa = last(build("llama-128", torch.float32)), last(build("llama-128"))
    model = enable(build("llama-128"))
    ours = last(model, FloeCache(model.config, policy=policy, budget=256, max_tokens=4096, resident=resident))
    assert (ours - truth).norm() < 1.3 * (sdpa - truth).norm()


@pytest.mark.parametrize(("policy", "resident"), RESIDENT)
def test_beams_and_saved_caches_go_on_as_copies_of_the_prompt_would(policy, resident, tmp_path):
    ids, model = prompt(2, 2100), enable(build("llama-128"))
    settings = {"policy": policy, "budget": 256, "max_tokens": 2560, "resident": resident}
    caches = [FloeCache(model.config, **settings) for _ in range(2)]
    beams = torch.tensor([1, 1])
    with torch.no_grad():
        for rows, cache in zip((ids, ids[beams]), caches):
            model(input_ids=rows[:, :2000], past_key_values=cache)
            for i in range(2000, 2020):
                model(input_ids=rows[:, i : i + 1], past_key_values=cache)
        caches[0].reorder_cache(beams)
        caches[0].save(tmp_path)
        caches.append(FloeCache(model.config, **settings).restore(tmp_path, "cuda"))
        for i in range(2020, 2040):
            # The two rows go different ways.
            token = torch.stack([ids[0, i], ids[1, i]])[:, None]
            logits = [model(input_ids=token, past_key_values=cache).logits.float() for cache in caches]
            for other in logits[1:]:
                # A restored row's tree is built anew, all tokens at once, and errs in other places.
                assert (other - logits[0]).norm() < (0.1 if policy.startswith("floe") else 0.02) * logits[0].norm()
    assert not torch.equal(logits[0][0], logits[0][1])


def test_beam_search_gives_the_same_tokens_as_sdpa():
    ids, model = prompt(2, 500), build("qwen2", torch.float16)
    arguments = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    plain = model.generate(ids, **arguments)
    enable(model)
    cache = FloeCache(model.config, policy="full", max_tokens=1024, resident=1.0)
    ours = model.generate(ids, past_key_values=cache, **arguments)
    assert (plain == ours).float().mean() > 0.99


def test_refusals():
    model = enable(build("llama"))
    ids = prompt(1, 300)
    cases = [
        (build("llama", torch.float32), {}, "must be bfloat16 or float16 on a CUDA device"),
        (model, {"threads": 2}, "`threads`: has no meaning on a CUDA device"),
        (model, {"policy": "quest"}, "the cuda backend runs"),
        (model, {"resident": 2.0}, "config field `resident` = 2"),
    ]
    for one, settings, text in cases:
        cache = FloeCache(enable(one).config, **({"policy": "full"} | settings))
        with pytest.raises(ValueError, match=text):
            one.generate(ids, past_key_values=cache, max_new_tokens=2)
    cache = FloeCache(model.config, policy="full", max_tokens=512, resident=1.0)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    with pytest.raises((ValueError, RuntimeError), match="places for sequences"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="cannot be changed on a CUDA device"):
        cache.set_policy("window", 256)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="tokens of the sequence"):
        forced(model, prompt(1, 700), 600, cache=FloeCache(model.config, policy="full", max_tokens=512))
