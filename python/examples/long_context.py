"""Time and memory of one token at a long context: transformers' own cache beside floe's, on a CUDA device.

The model has random weights in the shape of a real one, since time and memory do not depend on them; hit rates do, and are
worse than a trained model's, whose attention stays with the same tokens for longer.

    python examples/long_context.py --shape llama-3.1-8b --tokens 31000
"""

# %% What to run.
import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from floe.transformers import FloeCache, enable
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

SHAPES = {
    "qwen2.5-1.5b": (
        "qwen2",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    ),
    "llama-3.1-8b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
}
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
parser.add_argument("--tokens", type=int, default=31000)
parser.add_argument("--steps", type=int, default=48, help="timed tokens of each cache")
parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024])
parser.add_argument("--rounds", type=int, default=2, help="each cache is timed this many times, in turns")
parser.add_argument("--json", type=Path)
args = parser.parse_args()
WARM = 8

# %% A model in that shape.
model_type, settings = SHAPES[args.shape]
config = AutoConfig.for_model(
    model_type, **settings, vocab_size=32000, max_position_embeddings=131072, pad_token_id=0, eos_token_id=None
)
torch.manual_seed(1)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
ids = torch.randint(2, 32000, (1, args.tokens), device="cuda")
capacity = (args.tokens + WARM + args.steps + 255) // 256 * 256


# %% One cache: the prompt, some tokens to warm up, the timed ones. Memory is the device's own count, before and after.
@torch.inference_mode()
def run(label, attention, make):
    model.set_attn_implementation(attention)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, free_before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    cache = make()
    start = time.perf_counter()
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    torch.cuda.synchronize()
    prefill_s = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARM + args.steps):
        token = out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    torch_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    row = {
        "cache": label,
        "prefill_s": prefill_s,
        # Waits for what the prompt left to do, such as floe's trees.
        "first_token_ms": 1000 * times[0],
        "token_ms": 1000 * statistics.median(times[WARM:]),
        "token_p95_ms": 1000 * sorted(times[WARM:])[int(0.95 * args.steps)],
        "torch_peak_bytes": torch_bytes,
        "device_bytes": free_before - torch.cuda.mem_get_info()[0],
    }
    if isinstance(cache, FloeCache):
        row |= cache.memory() | {k: v for k, v in cache.metrics()[0].items() if k != "rule"}
    print(json.dumps(row), flush=True)
    return row


# %% In turns, so that a change of the machine's clocks falls on all of them.
enable(model)
rows = []
for _ in range(args.rounds):
    rows.append(run("DynamicCache, sdpa", "sdpa", lambda: DynamicCache(config=config)))
    for budget in args.budgets:
        make = lambda: FloeCache(config, policy="floe", budget=budget, max_tokens=capacity)
        rows.append(run(f"floe:{budget}", "floe", make))
kv_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * 128 * args.tokens
print(f"keys and values of {args.tokens} tokens: {kv_bytes / 1e6:.0f} MB")
if args.json:
    args.json.write_text(json.dumps({"shape": args.shape, "tokens": args.tokens, "kv_bytes": kv_bytes, "rows": rows}))
