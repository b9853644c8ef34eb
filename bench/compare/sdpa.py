"""Full attention of one decode step in PyTorch (scaled_dot_product_attention, flash backend): the shapes of `floe-bench kernel`.

Needs PyTorch with CUDA; nothing of floe. 32 query heads, 8 kv heads, head size 128, bf16, one layer. The time is the median of
graph replays over sets of inputs that together exceed the second-level cache, divided by the number of sets. Two forms are timed,
the better one counts: `enable_gqa`, and the group folded into the query length (one decode step's four heads as four queries).
The better one is also timed behind the two `index_copy_` that store the step's new key and value, as transformers' `StaticCache` does: what
a decode step of floe's engine does too.
"""

import argparse
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [(1, 4096), (1, 8192), (1, 32768), (1, 131072), (1, 524288), (4, 32768), (16, 8192), (64, 8192)]
HEADS, KV_HEADS, DIM = 32, 8, 128
ROUND_BYTES = 160 << 20


def median_us(launch, sets, replays=31):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(sets):
            launch(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(sets):
                launch(i)
        times = []
        for replay in range(replays + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if replay >= 3:
                times.append(start.elapsed_time(end) * 1e3 / sets)
    return statistics.median(times)


def copy_gb_s():
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * (1 << 30) / median_us(lambda _: b.copy_(a), 2) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", help="BATCHxCONTEXT,...", default=",".join(f"{b}x{c}" for b, c in SHAPES))
    parser.add_argument("--csv", help="also write batch,context,us,storing_us to this file, for `floe-bench step --sdpa`")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    table = ["batch,context,us,storing_us"]
    torch.manual_seed(0)
    copy = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy {copy:.0f} GB/s")
    print("| batch x context | us, enable_gqa | us, group as queries | us, storing too | GB/s | share of copy |")
    print("|---|---:|---:|---:|---:|---:|")
    for batch, context in shapes:
        size = 2 * batch * KV_HEADS * context * DIM * 2
        sets = max(2, min(160, -(-ROUND_BYTES // size)))
        shape = (sets, batch, KV_HEADS, context, DIM)
        k = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        v = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        q = torch.randn(batch, HEADS, 1, DIM, dtype=torch.bfloat16, device="cuda")
        folded = q.view(batch, KV_HEADS, HEADS // KV_HEADS, DIM)
        new = torch.randn(batch, KV_HEADS, 1, DIM, dtype=torch.bfloat16, device="cuda")
        last = torch.tensor([context - 1], device="cuda")
        attend = torch.nn.functional.scaled_dot_product_attention
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            gqa = median_us(lambda i: attend(q, k[i], v[i], enable_gqa=True), sets)
            fold = median_us(lambda i: attend(folded, k[i], v[i]), sets)
            grouped = gqa <= fold

            def store_and_attend(i):
                k[i].index_copy_(2, last, new)
                v[i].index_copy_(2, last, new)
                attend(q if grouped else folded, k[i], v[i], enable_gqa=grouped)

            storing = median_us(store_and_attend, sets)
        best = min(gqa, fold)
        rate = size / best / 1e3
        print(f"| {batch} x {context} | {gqa:.1f} | {fold:.1f} | {storing:.1f} | {rate:.0f} | {100 * rate / copy:.0f} % |", flush=True)
        table.append(f"{batch},{context},{best:.2f},{storing:.2f}")
        del k, v
    if args.csv:
        with open(args.csv, "w", encoding="utf-8") as file:
            file.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
