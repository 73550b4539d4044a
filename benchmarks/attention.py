"""Decode attention alone: the rate at which each backend reads keys and values. `python -m benchmarks.attention`.

Sequences of 100 to 2048 tokens on the heads of Qwen3-0.6B (16 queries, 8 keys and values, of 128) in bfloat16, pages in
random order, a CUDA graph of ten calls. Bytes are those of the keys and values that belong to the sequences.
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


def make_context(lens: list[int], page: int, device: torch.device) -> tuple[Context, int]:
    """A decode step of sequences of these lengths, and how many pages they hold."""
    counts = [-(-length // page) for length in lens]
    pages = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for table, own in zip(tables, pages):
        table[: len(own)] = own
    context = Context(
        is_prefill=False,
        num_decodes=len(lens),
        slot_mapping=torch.zeros(len(lens), dtype=torch.int64, device=device),
        block_tables=tables.to(device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        max_context_len=4096,  # a graph has to do for every length
    )
    return context, sum(counts)


@torch.inference_mode()
def measure(name: str, lens: list[int], page: int, heads: tuple[int, int, int], repeats: int) -> list[float]:
    """Bytes per second of each repeat."""
    device = torch.device("cuda")
    num_heads, num_kv_heads, head_dim = heads
    context, num_pages = make_context(lens, page, device)
    shape = (num_pages, page, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(len(lens), num_heads, head_dim, dtype=torch.bfloat16, device=device)
    k = v = torch.zeros(len(lens), num_kv_heads, head_dim, dtype=torch.bfloat16, device=device)
    backend = load_backend(name, page, heads)

    def run() -> Any:
        backend.prepare(context)
        q.add_(0)  # as in a model, some kernel comes between
        return [backend.forward(q, k, v, k_cache, v_cache, head_dim**-0.5, context) for _ in range(CALLS)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    num_bytes = sum(lens) * 2 * num_kv_heads * head_dim * 2
    rates = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        rates.append(num_bytes * CALLS / start.elapsed_time(end) * 1e3)
    return rates[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--lens", type=int, nargs=2, default=[100, 2048], metavar=("LOW", "HIGH"))
    parser.add_argument("--pages", type=int, nargs="+", default=[256, 16])
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    device = torch.device("cuda")
    report: dict[str, Any] = {"device": machine.device_name(device), "versions": machine.versions(), "results": []}
    report["commit"] = machine.git_commit()
    for num_seqs in args.num_seqs:
        rng = random.Random(0)
        lens = [rng.randint(*args.lens) for _ in range(num_seqs)]
        for page in args.pages:
            for name in BACKENDS:
                if name == "sdpa" or why_not(name, device, torch.bfloat16, page, 128):
                    continue
                rates = [rate / 1e12 for rate in measure(name, lens, page, (16, 8, 128), args.repeats)]
                row = {"backend": name, "page": page, "num_seqs": num_seqs}
                row["tb_per_s"] = [round(f(rates), 3) for f in (statistics.median, min, max)]
                report["results"].append(row)
                print(f"{num_seqs:4} sequences, pages of {page:3}, {name:10} {row['tb_per_s']} TB/s", flush=True)
    report["copy_bytes_per_s"] = round(machine.copy_bytes_per_s(device))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
