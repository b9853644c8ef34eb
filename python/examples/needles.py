"""Needles in a novel: does a model answer from a floe cache as it answers from a full one?

A notebook as a script: the cells (`# %%`) run one by one in an editor, or all of them with

    python examples/needles.py --model FOLDER_OR_GGUF --text NOVEL.txt --tokens 8000
"""

# %% What to run.
import argparse
import json
import time
from pathlib import Path

import torch
from floe.transformers import FloeCache, enable
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", type=Path, required=True, help="folder of a model, or a GGUF file")
parser.add_argument("--text", type=Path, required=True, help="a long text")
parser.add_argument("--tokens", type=int, default=8000, help="length of the prompt")
parser.add_argument("--policies", nargs="+", default=["floe:256", "floe:1024", "window:256"], help="POLICY:BUDGET")
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
parser.add_argument("--chunk", type=int, default=2048, help="tokens of one forward pass of the prompt")
parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer, which is slow to make from a GGUF file")
parser.add_argument("--json", type=Path, help="where to write the results")
args = parser.parse_args()

# %% The model. One line makes its attention floe's; with other caches it computes what it always did.
name = {"gguf_file": args.model.name} if args.model.is_file() else {}
folder = args.model.parent if args.model.is_file() else args.model
tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or folder, **({} if args.tokenizer else name))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype), **name).to(args.device).eval()
enable(model)

# %% A prompt: a novel with a sentence to remember in every gap.
#: Sentence, what a question repeats of it before the model goes on, what it has to go on with.
NEEDLES = [
    ("The secret passkey of the old library is", "7394182"),
    ("The stone bridge was painted in the colour", "turquoise"),
    ("The keeper of the north tower is a man called", "Balthasar Quill"),
    ("The river mill burnt down in the year", "1764"),
    ("The number of silver bells in the green chapel is", "58"),
    ("The dog of the harbour master is called", "Pepperdine"),
    ("The telephone number of the east orchard is", "551 9036"),
    ("The treasure of the west cellar lies under the marble", "fountain"),
    ("The favourite dish of the ferryman is", "roasted parsnips"),
    ("The password of the night watch is", "crimson falcon"),
]
NOTE = "\n\nRemember this: {0} {1}. Once more: {0} {1}.\n\n"
ANSWER_TOKENS = 9
QUESTION = "\n\nQuestion: complete the sentence to be remembered.\nAnswer: {0}"


def tokens(text):
    return tokenizer(text, add_special_tokens=False).input_ids


novel = tokens(args.text.read_text(encoding="utf-8"))
sentences = [tokens(NOTE.format(*needle)) for needle in NEEDLES]
piece = (args.tokens - sum(map(len, sentences))) // (len(sentences) + 1)
prompt: list[int] = []
for i, sentence in enumerate([*sentences, []]):
    prompt += novel[i * piece : (i + 1) * piece] + sentence
prompt_ids = torch.tensor([prompt], device=args.device)
questions = [torch.tensor([tokens(QUESTION.format(start))], device=args.device) for start, _ in NEEDLES]
#: What the novel goes on with.
story = torch.tensor([novel[len(NEEDLES) * piece + piece :][:64]], device=args.device)


# %% Reading and asking.
@torch.inference_mode()
def read(cache, ids, chunk):
    """The logits after the last token, which are there when this returns."""
    for piece in ids.split(chunk, dim=1):
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    logits[0, -1, 0].item()
    return logits


@torch.inference_mode()
def answer(cache, logits, num_tokens):
    """The next tokens, greedily."""
    tokens = []
    for _ in range(num_tokens):
        tokens.append(int(logits[0, -1].argmax()))
        token = torch.tensor([[tokens[-1]]], device=args.device)
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    return tokenizer.decode(tokens)


def ask_in_turn(cache):
    """One cache answers every question: what a question added is cropped off again."""
    answers = []
    for question in questions:
        answers.append(answer(cache, read(cache, question, args.chunk), ANSWER_TOKENS))
        cache.crop(-(question.shape[1] + ANSWER_TOKENS))
    return answers


def ask_both_ways(cache):
    """With the question attended exactly, as a prompt is, and as the policy says, as what a model generates is."""
    answers = {}
    for way, cache.sparse_tokens in {"exact question": 1, "sparse question": 64}.items():
        answers[way] = ask_in_turn(cache)
    return answers


def row_of(label, answers, times, **more):
    row = {"cache": label}
    for way, texts in answers.items():
        row[f"{way}: right"] = sum(key in text for (_, key), text in zip(NEEDLES, texts))
        row[f"{way}: same"] = sum(text.strip() == full.strip() for text, full in zip(texts, full_answers))
    row |= {"of": len(NEEDLES), "token_ms": 1000 * sorted(times)[len(times) // 2]} | more | {"answers": answers}
    print(json.dumps(row), flush=True)
    return row


@torch.inference_mode()
def go_on(cache):
    """Seconds of each token of the story behind the prompt, and what the cache counted meanwhile."""
    before, times = counts(cache), []
    for token in story.split(1, dim=1):
        start = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1, 0].item()
        times.append(time.perf_counter() - start)
    cache.crop(-story.shape[1])
    return times, {name: value - before[name] for name, value in counts(cache).items()}


def counts(cache):
    metrics = cache.metrics()[0] if isinstance(cache, FloeCache) else {}
    return {name: value for name, value in metrics.items() if isinstance(value, int)}


def device_bytes():
    """Memory of the device in use, by whomever."""
    if args.device == "cpu":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def floe(spec):
    """An empty cache of POLICY:BUDGET."""
    policy, _, budget = spec.rpartition(":")
    room = {} if args.device == "cpu" else {"max_tokens": (len(prompt) + 128 + 255) // 256 * 256}
    return FloeCache(model.config, policy, int(budget), **room)


# %% The full cache of transformers.
read(DynamicCache(config=model.config), prompt_ids[:, : args.chunk], args.chunk)  # to warm up
start, held = time.perf_counter(), device_bytes()
full = DynamicCache(config=model.config)
read(full, prompt_ids, args.chunk)
more = {"read_s": time.perf_counter() - start, "device_bytes": device_bytes() - held}
full_answers = ask_in_turn(full)
rows = [row_of("DynamicCache", {"exact question": full_answers}, go_on(full)[0], **more)]

# %% floe. On the CPU one cache reads once and answers under each policy in turn.
if args.device == "cpu":
    cache = floe("full:256")
    read(cache, prompt_ids, args.chunk)
    for spec in ["full:256", *args.policies]:
        policy, _, budget = spec.rpartition(":")
        cache.set_policy(policy, int(budget))
        answers = ask_both_ways(cache)
        times, seen = go_on(cache)
        share = (seen["kv_bytes_read"] + seen["index_bytes_read"]) / seen["full_kv_bytes"]
        rows.append(row_of(spec, answers, times, read_share=share))

# %% On a CUDA device memory is laid out for one policy, so each reads for itself; times in two rounds, in turns with the full cache.
else:
    for spec in args.policies:
        start, held = time.perf_counter(), device_bytes()
        cache = floe(spec)
        read(cache, prompt_ids, args.chunk)
        more = {"read_s": time.perf_counter() - start}
        answers = ask_both_ways(cache)
        more["device_bytes"] = device_bytes() - held
        for number in (1, 2):
            more[f"full_ms_{number}"] = 1000 * sorted(go_on(full)[0])[story.shape[1] // 2]
            times, seen = go_on(cache)
            more[f"token_ms_{number}"] = 1000 * sorted(times)[len(times) // 2]
        more["hit_rate"] = seen["hot_hits"] / max(1, seen["hot_requests"])
        more["bytes_a_token"] = seen["bytes_moved"] / len(times)
        more["full_kv_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
        more["in_doubt"] = seen["head_steps_in_doubt"] / max(1, seen["head_steps"])
        rows.append(row_of(spec, answers, times, **more, **cache.memory()))
        cache.reset()

# %% Results.
if args.json:
    document = {"model": args.model.name, "tokens": len(prompt), "dtype": args.dtype, "rows": rows}
    args.json.write_text(json.dumps(document, indent=1))
