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


# %% Reading, asking. The same cache answers every question: what a question added is cropped off again.
@torch.inference_mode()
def read(cache):
    for chunk in prompt_ids.split(args.chunk, dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def ask(cache, question, num_tokens=9):
    """The answer, greedily, and the seconds of one token."""
    logits = model(input_ids=question, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    answer, times = [], []
    for _ in range(num_tokens):
        answer.append(int(logits[0, -1].argmax()))
        start = time.perf_counter()
        token = torch.tensor([[answer[-1]]], device=args.device)
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        logits[0, -1, 0].item()
        times.append(time.perf_counter() - start)
    cache.crop(-(question.shape[1] + num_tokens))
    return tokenizer.decode(answer), sorted(times)[len(times) // 2]


def bytes_read(cache):
    """Bytes that the decode steps read, and those that full attention would have read."""
    if not isinstance(cache, FloeCache):
        return 0, 0
    metrics = cache.metrics()[0]
    return metrics["kv_bytes_read"] + metrics["index_bytes_read"], metrics["full_kv_bytes"]


def ask_all(label, cache):
    before = bytes_read(cache)
    answers, times = zip(*(ask(cache, question) for question in questions.values()))
    right = sum(key in answer for key, answer in zip(NEEDLES.values(), answers))
    row = {"cache": label, "right": right, "of": len(NEEDLES), "token_ms": 1000 * sorted(times)[len(times) // 2]}
    if isinstance(cache, FloeCache):
        own, full = (after - b for after, b in zip(bytes_read(cache), before))
        row["read_share"] = own / full
    print(json.dumps(row | {"answers": answers}), flush=True)
    return row | {"answers": answers}


# %% The full cache of transformers, then floe: read once, answer under each policy.
start = time.perf_counter()
full = DynamicCache(config=model.config)
read(full)
print(f"{len(prompt)} tokens read in {time.perf_counter() - start:.1f} s", flush=True)
rows = [ask_all("DynamicCache", full)]
del full

cache = FloeCache(model.config, policy="full")
read(cache)
for spec in ["full:256", *args.policies]:
    policy, _, budget = spec.rpartition(":")
    cache.set_policy(policy, int(budget))
    rows.append(ask_all(spec, cache))

if args.json:
    document = {"model": args.model.name, "tokens": len(prompt), "dtype": args.dtype, "rows": rows}
    args.json.write_text(json.dumps(document, indent=1))
