"""`floe.transformers` on tiny random models of each family: policy `full` is eager attention."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the transformers tests are skipped")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: its tests are skipped")

import floe  # noqa: E402
from floe.transformers import SUPPORTED, FloeCache, enable, record, unrotate  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

# Tiny models: more threads only wait for one another.
torch.set_num_threads(1)

#: Largest difference of logits in f32 between floe's full attention and eager attention.
TOLERANCE = 1e-4

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}

#: name: (model type, settings beyond the shared ones)
MODELS = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-rope-dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 40}),
    "llama-rope-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-rope-longrope": ("llama", {"rope_parameters": LONGROPE}),
    # SmolLM and SmolLM2 are Llamas with tied embeddings and a large rope base.
    "smollm2": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 2, "sliding_window": None}),
    "qwen2-moe": ("qwen2_moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}),
}


def build(name, dtype=torch.float32):
    """The same random model for the same name."""
    model_type, settings = MODELS[name]
    shared = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.3,
    }
    config = transformers.AutoConfig.for_model(model_type, **(shared | settings))
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    # Zero biases, as they are made, would hide a mistake with them.
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompt(batch, tokens, seed=3):
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def both(name, inputs, cache=None, **arguments):
    """Tokens and logits of generation with eager attention and with floe."""
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | arguments
    eager = build(name).generate(**inputs, **arguments)
    # A model of its own: dynamic rope changes its frequencies as it goes.
    model = enable(build(name))
    cache = cache or FloeCache(model.config, policy="full")
    ours = model.generate(**inputs, past_key_values=cache, **arguments)
    return eager, ours, cache


def assert_same(eager, ours):
    assert torch.equal(eager.sequences, ours.sequences)
    worst = max((a - b).abs().max().item() for a, b in zip(eager.logits, ours.logits, strict=True))
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_full_policy_is_eager_attention(name):
    eager, ours, cache = both(name, {"input_ids": prompt(1, 60)})
    assert_same(eager, ours)
    assert cache.get_seq_length() == 71
    assert len(set(ours.sequences[0, 60:].tolist())) > 1, "a model that repeats one token proves little"


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3", "smollm3"])
def test_padded_batches(name):
    ids, mask = prompt(3, 50), torch.ones(3, 50, dtype=torch.long)
    for row, pads in enumerate((0, 17, 49)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    eager, ours, cache = both(name, {"input_ids": ids, "attention_mask": mask})
    assert_same(eager, ours)
    # Padding is not stored.
    tokens = [row.num_tokens() for row in cache._rows.sequences]
    assert tokens == [61, 44, 12]


def test_padding_may_stand_on_the_right():
    model, ids = build("qwen2"), prompt(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    run = lambda: model(input_ids=ids, attention_mask=mask, position_ids=positions, **cache).logits[mask.bool()]
    with torch.no_grad():
        cache = {}
        eager = run()
        enable(model)
        cache = {"past_key_values": FloeCache(model.config, policy="full")}
        assert (run() - eager).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_chunked_prefill(name):
    ids, mask = prompt(2, 50), torch.ones(2, 50, dtype=torch.long)
    ids[1, :23], mask[1, :23] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    whole, ours, _ = both(name, inputs)
    model = enable(build(name))
    cache = FloeCache(model.config, policy="full")
    chunked = model.generate(
        **inputs,
        past_key_values=cache,
        prefill_chunk_size=16,
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert_same(whole, chunked)
    assert_same(whole, ours)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3"])
def test_beam_search_forks(name):
    ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    eager, ours, cache = both(name, inputs, num_beams=3, num_return_sequences=3, output_scores=True)
    assert torch.equal(eager.sequences, ours.sequences)
    assert (eager.sequences_scores - ours.sequences_scores).abs().max() < TOLERANCE
    assert cache.batch_size == 6


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3"])
def test_assisted_generation_crops(name):
    # A repeating prompt, so that some drafts are accepted and some are not.
    inputs = {"input_ids": prompt(1, 15).repeat(1, 4)}
    eager, ours, cache = both(name, inputs, prompt_lookup_num_tokens=4, max_new_tokens=30)
    assert torch.equal(eager.sequences, ours.sequences)
    assert cache.get_seq_length() == eager.past_key_values.get_seq_length()


def test_sampling_draws_the_same_tokens():
    arguments = {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 2}
    out = []
    for cache in (lambda model: None, lambda model: FloeCache(enable(model).config, policy="full")):
        model = build("qwen2")
        own = {"past_key_values": cache(model)}
        transformers.set_seed(5)
        out.append(model.generate(prompt(1, 40), max_new_tokens=20, **arguments, **{k: v for k, v in own.items() if v}))
    assert torch.equal(*out)


def test_a_conversation_goes_on():
    out = []
    for floe_cache in (False, True):
        model = build("qwen3")
        cache = FloeCache(enable(model).config, policy="full") if floe_cache else DynamicCache(config=model.config)
        first = model.generate(prompt(1, 30), past_key_values=cache, max_new_tokens=6, do_sample=False)
        more = torch.cat([first, prompt(1, 12, seed=4)], dim=1)
        out.append(model.generate(more, past_key_values=cache, max_new_tokens=6, do_sample=False))
    assert torch.equal(*out)


def test_the_policy_may_change_between_tokens():
    model = enable(build("llama"))
    ids = prompt(1, 302)
    cache = FloeCache(model.config, policy="window", budget=20, sinks=4, window=16)
    with torch.no_grad():
        model(input_ids=ids[:, :300], past_key_values=cache)
        model(input_ids=ids[:, 300:301], past_key_values=cache)
        cache.set_policy("full", 20)
        model(input_ids=ids[:, 301:], past_key_values=cache)
    assert cache.metrics()[0]["paths"] == {"sparse": 6, "exact": 6}


def test_crop_goes_back(rng):
    model = enable(build("qwen3"))
    ids = prompt(2, 60)
    cache = FloeCache(model.config, policy="floe", budget=40, sinks=4, window=16)
    with torch.no_grad():
        model(input_ids=ids[:, :50], past_key_values=cache)
        first = model(input_ids=ids[:, 50:51], past_key_values=cache).logits
        for tokens in (ids[:, 51:55], ids[:, 55:56]):
            model(input_ids=tokens, past_key_values=cache)
        cache.crop(-6)
        again = model(input_ids=ids[:, 50:51], past_key_values=cache).logits
    assert torch.equal(first, again)


def test_rows_are_selected_repeated_and_reset():
    model = enable(build("qwen2-sliding"))
    ids = prompt(3, 40)
    cache = FloeCache(model.config, policy="full")
    step = lambda rows: model(input_ids=ids[rows, 39:], past_key_values=cache).logits
    with torch.no_grad():
        model(input_ids=ids[:, :39], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 6
        repeated = step([0, 0, 1, 1, 2, 2])
        cache.crop(-1) if not any(cache.is_sliding) else None
        cache.batch_select_indices(torch.tensor([5, 0]))
        assert cache.batch_size == 2 and cache.get_seq_length() == 40
        cache.reset()
        assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)
        model(input_ids=ids[:, :39], past_key_values=cache)
        plain = step([0, 1, 2])
    assert (repeated[::2] - plain).abs().max() < TOLERANCE
    assert (repeated[::2] - repeated[1::2]).abs().max() < TOLERANCE


def test_saved_caches_continue(tmp_path):
    model = enable(build("qwen2-sliding"))
    ids, mask = prompt(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, :7] = 0
    settings = {"policy": "floe", "budget": 36, "sinks": 4, "window": 16}
    cache = FloeCache(model.config, **settings)
    with torch.no_grad():
        model(input_ids=ids[:, :49], attention_mask=mask[:, :49], past_key_values=cache)
        assert cache.save(tmp_path / "chat") > cache.memory()["kv_bytes"]
        restored = FloeCache(model.config, **settings).restore(tmp_path / "chat")
        steps = [
            model(input_ids=ids[:, 49:], attention_mask=mask, past_key_values=c).logits for c in (cache, restored)
        ]
    assert torch.equal(*steps)
    with pytest.raises(ValueError, match="holds 50 tokens"):
        restored.restore(tmp_path / "chat")
    manifest = json.loads((tmp_path / "chat" / "cache.json").read_text()) | {"kind": "other"}
    (tmp_path / "chat" / "cache.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="must be floe-cache/1"):
        FloeCache(model.config, **settings).restore(tmp_path / "chat")
    with pytest.raises(FileNotFoundError):
        FloeCache(model.config, **settings).restore(tmp_path / "none")


def test_sparse_policies_attend_to_their_budget_and_get_better_with_it():
    model = build("llama")
    ids = prompt(1, 301)
    with torch.no_grad():
        eager = model(input_ids=ids).logits[0, -1]
        enable(model)
        errors = []
        for budget in (24, 96, 301):
            cache = FloeCache(model.config, policy="floe", budget=budget, sinks=4, window=16)
            model(input_ids=ids[:, :300], past_key_values=cache)
            logits = model(input_ids=ids[:, 300:], past_key_values=cache).logits[0, -1]
            errors.append((logits - eager).norm().item())
            assert cache.metrics()[0]["tokens_attended_mean"] == min(budget, 301)
            assert cache.metrics()[0]["steps"] == 3
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < TOLERANCE


def test_drafts_are_checked_sparsely_when_asked():
    model = enable(build("llama"))
    ids = prompt(1, 204)
    logits = []
    for sparse_tokens, pieces in ((4, [200, 4]), (1, [200, 1, 1, 1, 1]), (1, [200, 4])):
        cache = FloeCache(model.config, budget=40, sinks=4, window=16, sparse_tokens=sparse_tokens)
        with torch.no_grad():
            out = [model(input_ids=piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
        logits.append(torch.cat(out[1:], dim=1))
    assert (logits[0] - logits[1]).abs().max() < TOLERANCE
    assert (logits[0] - logits[2]).abs().max() > TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-rope-yarn", "smollm3"])
def test_reuse_gets_the_queries_before_rotation(name, monkeypatch):
    from floe.transformers import rows

    model = enable(build(name))
    seen = {}
    hooked = model.model.layers[1].self_attn
    hooked = getattr(hooked, "q_norm", hooked.q_proj)
    hooked.register_forward_hook(lambda _m, _i, out: seen.update(pre=out.detach()))
    attend_row = rows._attend_row

    def spy(sequence, layer, tensors, *rest):
        if layer == 1 and tensors[3] is not None:
            before = seen["pre"].view(1, 1, 4, -1)[0]
            assert (tensors[3] - before).abs().max() < 5e-6 * before.abs().max()
            seen["checked"] = True
        attend_row(sequence, layer, tensors, *rest)

    monkeypatch.setattr(rows, "_attend_row", spy)
    cache = FloeCache(model.config, policy="reuse:min=64,lottery=0.2", budget=64, sinks=4, window=16)
    ids = prompt(1, 300)
    with torch.no_grad():
        model(input_ids=ids[:, :280], past_key_values=cache)
        for i in range(280, 300):
            # The same token again and again: its queries match those before.
            model(input_ids=ids[:, 280:281], past_key_values=cache)
    assert seen["checked"]
    cache = FloeCache(model.config, policy="full")
    with torch.no_grad():
        model(input_ids=ids[:, :20], past_key_values=cache)
    assert not cache.wants_q_pre


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = build("qwen3", dtype)
    ids = prompt(1, 60)
    with torch.no_grad():
        wide = build("qwen3").to(torch.float32)(input_ids=ids).logits[0, -1]
        eager = model(input_ids=ids).logits[0, -1].float()
        enable(model)
        cache = FloeCache(model.config, policy="full")
        model(input_ids=ids[:, :59], past_key_values=cache)
        ours = model(input_ids=ids[:, 59:], past_key_values=cache).logits[0, -1].float()
    assert cache._rows.engine.config["dtype"] == str(dtype).removeprefix("torch.")
    # As far from the f32 model as eager attention in the same type is.
    assert (ours - wide).norm() < 1.5 * (eager - wide).norm() + 1e-3


@pytest.mark.parametrize("cache", [None, DynamicCache, "no"])
def test_other_caches_compute_what_sdpa_computes(cache):
    ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    arguments = {"max_new_tokens": 8, "do_sample": False, "use_cache": cache != "no"}
    out = []
    for prepare in (lambda m: m.set_attn_implementation("sdpa"), enable):
        model = build("qwen2-sliding")
        prepare(model)
        own = {"past_key_values": DynamicCache(config=model.config)} if cache is DynamicCache else {}
        out.append(model.generate(input_ids=ids, attention_mask=mask, **arguments, **own))
    assert torch.equal(*out)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("smollm3", "mixtral", "qwen2-moe", "qwen3-moe")])
def test_unrotated_queries_are_those_before_the_embedding(name):
    model = build(name)
    attention = model.model.layers[1].self_attn
    seen = {}
    hooked = getattr(attention, "q_norm", attention.q_proj)
    hooked.register_forward_hook(lambda _m, _i, out: seen.update(pre=out.detach()))

    class Seen:
        def saw(self, module, query, key, value):
            if module.layer_idx == 1:
                seen["post"] = query

    from floe.transformers.attention import RECORDER

    enable(model)
    token = RECORDER.set(Seen())
    with torch.no_grad():
        model(input_ids=prompt(1, 60))
    RECORDER.reset(token)
    plain = unrotate(model.model.rotary_emb, seen["post"], torch.arange(60)[None])
    before = seen["pre"].view(1, 60, 4, -1).transpose(1, 2)
    assert (seen["post"] - before).abs().max() > 0.1
    assert (plain - before).abs().max() < 5e-6 * before.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "qwen3", "smollm3"])
def test_recorded_traces_hold_what_attention_saw(name, tmp_path):
    model = build(name)
    ids = prompt(1, 90)
    attention = model.config._attn_implementation
    files = record(model, ids, [0, 1], [1], tmp_path, num_queries=30, chunk=32, text="random", licence="CC0-1.0")
    assert model.config._attn_implementation == attention
    assert [file.name for file in files] == [f"{model.config.model_type}_L{layer}H1.safetensors" for layer in (0, 1)]
    trace = floe.Trace(files[1])
    assert trace.meta["num_tokens"] == 90 and trace.meta["first_query_pos"] == 60
    # The trace's attention is the model's: the input of the output projection of those heads.
    seen = {}
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _m, i, _o: seen.update(out=i[0]))
    with torch.no_grad():
        model(input_ids=ids)
    dim, group = trace.meta["head_dim"], 2
    truth = seen["out"].view(90, 4, dim)[60:, group : 2 * group].numpy()
    span = model.config.sliding_window if name == "qwen2-sliding" else None
    for j in (0, 13, 29):
        first = 0 if span is None else max(0, 60 + j - span + 1)
        k, v = trace.k[first : 61 + j], trace.v[first : 61 + j]
        weights = np.exp(trace.q[j] @ k.T * trace.meta["softmax_scale"])
        out = weights / weights.sum(-1, keepdims=True) @ v
        assert np.linalg.norm(out - truth[j]) < 0.03 * np.linalg.norm(truth[j])
    np.testing.assert_allclose(
        torch.from_dlpack(trace.tensor("k")).float().numpy(), trace.k
    )  # the file's own bfloat16, in place


def test_recorded_traces_replay(tmp_path):
    files = record(build("llama"), {"input_ids": prompt(1, 300)}, [2], None, tmp_path, num_queries=40)
    rows = floe.replay(files, policies=["full", "floe"], budgets=[128])["rows"]
    assert all(row["mean_error"] < 1e-5 for row in rows if row["policy"] == "full")
    assert len({row["trace"] for row in rows}) == 2


class TestRefusals:
    """What is not supported says so before any token is produced."""

    def test_model_types(self):
        config = transformers.AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=32, vocab_size=97)
        with pytest.raises(ValueError, match="model type `gpt2`: not supported; supported are llama"):
            enable(AutoModelForCausalLM.from_config(config))
        assert {MODELS[name][0] for name in MODELS} == set(SUPPORTED)

    def test_layer_types(self):
        config = transformers.AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
        with pytest.raises(ValueError, match="layer 0 is of type `linear_attention`"):
            FloeCache(config)

    def test_only_sliding_layers_are_said_to_be_left_alone(self):
        config = transformers.AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=24)
        with pytest.warns(UserWarning, match="every layer has a sliding window"):
            FloeCache(config)

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"policy": "flow"}, "policy `flow`: unknown name"),
            ({"budget": 8}, "config field `budget` = 8"),
            ({"sparse_tokens": 0}, "config field `sparse_tokens` = 0"),
            ({"dtype": torch.float64}, "config field `dtype` = torch.float64"),
        ],
    )
    def test_settings(self, settings, text):
        with pytest.raises(ValueError, match=text):
            FloeCache(build("llama").config, **settings)

    def test_a_model_that_was_not_enabled(self):
        for attention in ("eager", "sdpa"):
            model = build("llama")
            model.set_attn_implementation(attention)
            with pytest.raises(ValueError, match=r"call floe\.transformers\.enable\(model\)"):
                model.generate(prompt(1, 20), past_key_values=FloeCache(model.config), max_new_tokens=2)

    def test_another_model(self):
        model = enable(build("llama"))
        with pytest.raises(ValueError, match=r"keys of \(heads, head_dim\) \(2, 16\): the configuration says \(4, 16\)"):
            model.generate(prompt(1, 20), past_key_values=FloeCache(build("llama-mha").config), max_new_tokens=2)

    def test_gradients_masks_and_weights(self):
        model = enable(build("llama"))
        run = lambda **arguments: model(
            input_ids=prompt(1, 20), past_key_values=FloeCache(model.config), **arguments
        )
        with pytest.raises(ValueError, match="computes no gradients"):
            run()
        with torch.no_grad():
            with pytest.raises(ValueError, match="pass an attention_mask of two dimensions"):
                run(attention_mask=torch.zeros(1, 1, 20, 20))
            with pytest.raises(ValueError, match="attention_mask of 30 tokens: 0 are stored and 20 are new"):
                run(attention_mask=torch.ones(1, 30, dtype=torch.long))

    def test_a_batch_or_mask_that_changes(self):
        model = enable(build("llama"))
        cache = FloeCache(model.config)
        step = lambda rows, mask: model(input_ids=prompt(rows, 1), attention_mask=mask, past_key_values=cache)
        with torch.no_grad():
            model(input_ids=prompt(2, 20), past_key_values=cache)
            with pytest.raises(ValueError, match="a batch of 3 rows: this FloeCache holds 2"):
                step(3, None)
            mask = torch.ones(2, 21, dtype=torch.long)
            mask[0, 3] = 0
            with pytest.raises(ValueError, match="attention_mask differs"):
                step(2, mask)
            assert step(2, None).logits.shape == (2, 1, 97)

    def test_records(self, tmp_path):
        model = build("llama")
        for arguments, text in [
            ({"layers": [9]}, "layers = 9: the model has 3"),
            ({"heads": [2]}, "heads = 2: the model has 2"),
            ({"num_queries": 0}, "num_queries = 0"),
            ({"inputs": prompt(2, 20)}, "must be one row"),
        ]:
            call = {"inputs": prompt(1, 20), "layers": None, "heads": None, "num_queries": 5} | arguments
            with pytest.raises(ValueError, match=text):
                record(model, path=tmp_path, **call)
