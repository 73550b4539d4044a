"""Attention alone, by backend and shape: `python -m benchmarks.attention`.

Decodes (the default) are rated by the keys and values that they read, and runs of more new tokens a sequence
(`--new-tokens`: chunks behind a prefix, or whole prompts) by their arithmetic, two products of what a query may see.
bfloat16, pages in random order, a CUDA graph of ten calls.
"""

import argparse
import json
import random
import statistics
from typing import Any

import torch

from benchmarks import machine
from nanovllm.attention import BACKENDS, load_backend, why_not
from nanovllm.utils.context import Context

CALLS = 10  # in a graph


def make_context(lens: list[int], new_tokens: int, page: int, device: torch.device) -> tuple[Context, int]:
    """A step of sequences of these lengths, the last `new_tokens` of each new, and how many pages they hold."""
    counts = [-(-length // page) for length in lens]
    pages = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for table, own in zip(tables, pages):
        table[: len(own)] = own
    is_prefill = new_tokens > 1
    q_lens = [min(new_tokens, length) for length in lens]
    starts = torch.tensor([0, *q_lens]).cumsum(0)
    context = Context(
        is_prefill=is_prefill,
        num_decodes=0 if is_prefill else len(lens),
        slot_mapping=torch.zeros(sum(q_lens), dtype=torch.int64, device=device),
        block_tables=tables.to(device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        # A decode's graph has to do for every length.
        max_context_len=max(lens) if is_prefill else max(4096, *lens),
        cu_seqlens_q=starts.to(device, torch.int32) if is_prefill else None,
        max_seqlen_q=max(q_lens),
    )
    return context, sum(counts)


@torch.inference_mode()
def measure(
    name: str, lens: list[int], new_tokens: int, page: int, heads: tuple[int, int, int], repeats: int
) -> list[float]:
    """Seconds of a call, each repeat."""
    device = torch.device("cuda")
    num_heads, num_kv_heads, head_dim = heads
    context, num_pages = make_context(lens, new_tokens, page, device)
    num_tokens = len(context.slot_mapping)
    shape = (num_pages, page, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(num_tokens, num_heads, head_dim, dtype=torch.bfloat16, device=device)
    backend = load_backend(name, page, heads)

    def run() -> Any:
        backend.prepare(context)
        q.add_(0)  # as in a model, some kernel comes between
        return [backend.forward(q, k_cache, v_cache, head_dim**-0.5, context) for _ in range(CALLS)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / CALLS / 1e3)
    return seconds[2:]


def work(lens: list[int], new_tokens: int, heads: tuple[int, int, int]) -> tuple[float, str]:
    """What a call has to do at least, in 10^12 of the unit that is given with it."""
    num_heads, num_kv_heads, head_dim = heads
    if new_tokens == 1:
        return sum(lens) * 2 * num_kv_heads * head_dim * 2 / 1e12, "TB"
    pairs = sum(length * n - n * (n - 1) // 2 for length in lens for n in [min(new_tokens, length)])
    return pairs * num_heads * head_dim * 4 / 1e12, "TFLOP"


def parse_heads(text: str) -> tuple[int, int, int]:
    num_heads, num_kv_heads, head_dim = map(int, text.split("x"))
    return num_heads, num_kv_heads, head_dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--lens", type=int, nargs=2, default=[100, 2048], metavar=("LOW", "HIGH"))
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[1], help="of each; 1, a decode, if absent")
    parser.add_argument("--pages", type=int, nargs="+", default=[256, 16])
    parser.add_argument(
        "--heads", type=parse_heads, nargs="+", default=[(16, 8, 128)], metavar="QxKVxDIM",
        help="queries, keys and values, head_dim; those of Qwen3-0.6B, 16x8x128, if absent",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    device = machine.cuda_device()
    report: dict[str, Any] = {**machine.provenance(device), "results": []}
    cases = [
        (heads, new_tokens, num_seqs, page)
        for heads in args.heads
        for new_tokens in args.new_tokens
        for num_seqs in args.num_seqs
        for page in args.pages
    ]
    for heads, new_tokens, num_seqs, page in cases:
        rng = random.Random(0)
        lens = [rng.randint(*args.lens) for _ in range(num_seqs)]
        amount, unit = work(lens, new_tokens, heads)
        for name in BACKENDS:
            if name == "sdpa" or why_not(name, device, torch.bfloat16, page, heads[2]):
                continue
            rates = [amount / seconds for seconds in measure(name, lens, new_tokens, page, heads, args.repeats)]
            row = {"backend": name, "heads": heads, "page": page, "num_seqs": num_seqs, "new_tokens": new_tokens}
            row["lens"], row["unit"] = args.lens, f"{unit}/s"
            row["rate"] = [round(f(rates), 3) for f in (statistics.median, min, max)]
            report["results"].append(row)
            print(
                f"heads {heads}, {num_seqs:4} sequences of {args.lens}, {new_tokens:5} new, pages of {page:3}, "
                f"{name:10} {row['rate']} {row['unit']}",
                flush=True,
            )
    report["copy_bytes_per_s"] = round(machine.copy_bytes_per_s(device))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
