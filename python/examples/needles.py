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
parser.add_argument("--json", type=Path, help="where to write the results")
args = parser.parse_args()

# %% The model. One line makes its attention floe's; with other caches it computes what it always did.
name = {"gguf_file": args.model.name} if args.model.is_file() else {}
folder = args.model.parent if args.model.is_file() else args.model
tokenizer = AutoTokenizer.from_pretrained(folder, **name)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype), **name).to(args.device).eval()
enable(model)

# %% A prompt: a novel with a sentence to remember after every eighth of it.
NEEDLES = {
    "old library": "7394182",
    "stone bridge": "5108267",
    "north tower": "9462035",
    "river mill": "2871946",
    "green chapel": "6035718",
    "salt harbour": "8219453",
    "east orchard": "1647390",
}
SENTENCE = "\n\nThe secret passkey of the {} is {}. Remember it: the passkey of the {} is {}.\n\n"
QUESTION = "\n\nQuestion: What is the secret passkey of the {}?\nAnswer: The secret passkey of the {} is"

novel = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
sentences = [
    tokenizer(SENTENCE.format(place, key, place, key), add_special_tokens=False).input_ids
    for place, key in NEEDLES.items()
]
piece = (args.tokens - sum(map(len, sentences))) // (len(sentences) + 1)
prompt: list[int] = []
for i, sentence in enumerate([*sentences, []]):
    prompt += novel[i * piece : (i + 1) * piece] + sentence
prompt_ids = torch.tensor([prompt], device=args.device)
questions = {
    place: torch.tensor(
        [tokenizer(QUESTION.format(place, place), add_special_tokens=False).input_ids], device=args.device
    )
    for place in NEEDLES
}


# %% Reading and asking.
@torch.inference_mode()
def read(cache, ids, chunk):
    """The logits after the last token."""
    for piece in ids.split(chunk, dim=1):
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits


@torch.inference_mode()
def answer(cache, logits, num_tokens=9):
    """The next tokens, greedily, and the seconds of each."""
    tokens, times = [], []
    for _ in range(num_tokens):
        tokens.append(int(logits[0, -1].argmax()))
        start = time.perf_counter()
        token = torch.tensor([[tokens[-1]]], device=args.device)
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        logits[0, -1, 0].item()
        times.append(time.perf_counter() - start)
    return tokenizer.decode(tokens), times


def row_of(label, answers, times, **more):
    right = sum(key in text for key, text in zip(NEEDLES.values(), answers))
    row = {"cache": label, "right": right, "of": len(NEEDLES), "token_ms": 1000 * sorted(times)[len(times) // 2]}
    row |= more | {"answers": answers}
    print(json.dumps(row), flush=True)
    return row


def ask_in_turn(cache):
    """One cache answers every question: what a question added is cropped off again."""
    answers, times = [], []
    for question in questions.values():
        text, took = answer(cache, read(cache, question, args.chunk))
        answers.append(text)
        times += took
        cache.crop(-(question.shape[1] + len(took)))
    return answers, times


def counts(cache):
    metrics = cache.metrics()[0]
    return metrics["kv_bytes_read"] + metrics["index_bytes_read"], metrics["full_kv_bytes"]


@torch.inference_mode()
def hit_rate_of_reading(cache, num_tokens=64):
    """Share of retrieved rows that lay on the device already, while the novel goes on."""
    story = torch.tensor([novel[len(NEEDLES) * piece :][:num_tokens]], device=args.device)
    before = cache.metrics()[0]
    for token in story.split(1, dim=1):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    after = cache.metrics()[0]
    requests, hits = (after[name] - before[name] for name in ("hot_requests", "hot_hits"))
    return hits / requests if requests else None


# %% The full cache of transformers.
start = time.perf_counter()
full = DynamicCache(config=model.config)
read(full, prompt_ids, args.chunk)
print(f"{len(prompt)} tokens read in {time.perf_counter() - start:.1f} s", flush=True)
rows = [row_of("DynamicCache", *ask_in_turn(full))]
del full

# %% floe. On the CPU one cache reads once and answers under each policy in turn.
if args.device == "cpu":
    cache = FloeCache(model.config, policy="full")
    read(cache, prompt_ids, args.chunk)
    for spec in ["full:256", *args.policies]:
        policy, _, budget = spec.rpartition(":")
        cache.set_policy(policy, int(budget))
        own, whole = counts(cache)
        answers, times = ask_in_turn(cache)
        own, whole = (after - before for after, before in zip(counts(cache), (own, whole)))
        rows.append(row_of(spec, answers, times, read_share=own / whole))

# %% On a CUDA device, where memory is laid out for one policy, each question is read with its prompt.
else:
    for spec in args.policies:
        policy, _, budget = spec.rpartition(":")
        answers, times = [], []
        for question in questions.values():
            ids = torch.cat([prompt_ids, question], dim=1)
            cache = FloeCache(model.config, policy, int(budget), max_tokens=(ids.shape[1] + 80 + 255) // 256 * 256)
            text, took = answer(cache, read(cache, ids, ids.shape[1]))
            answers.append(text)
            times += took
        rows.append(row_of(spec, answers, times, **cache.memory(), hit_rate=hit_rate_of_reading(cache)))

# %% Results.
if args.json:
    document = {"model": args.model.name, "tokens": len(prompt), "dtype": args.dtype, "rows": rows}
    args.json.write_text(json.dumps(document, indent=1))
