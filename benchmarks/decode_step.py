"""GPU time of whole decode steps by batch size, also without attention. `python -m benchmarks.decode_step --model DIR`.

A step is one replay of its CUDA graph, from the gather of the rows to the drawn tokens, over contexts spread by a
quarter around their mean in blocks of random order. To compare two commits run it in two checkouts, one after the
other, on the same machine: machines of one kind differ by more than a change gives.
"""

import argparse
import json
import random
import statistics
from typing import Any

import torch

from benchmarks import machine
from nanovllm import LLM

LARGE = [(rows, 900) for rows in (16, 32, 64, 80, 96, 128, 160, 192, 256)]
CASES = [(1, 300), (8, 600), *LARGE]
REPLAYS = 6  # between two events


@torch.inference_mode()
def fill_rows(llm: LLM, num_rows: int, mean_len: int) -> torch.Tensor:
    """Requests in the middle of their decoding in the first rows; their lengths [num_rows] int64."""
    state, rng = llm.model_runner.state, random.Random(num_rows)
    block_size = llm.config.kvcache_block_size
    lens = [int(mean_len * rng.uniform(0.75, 1.25)) for _ in range(num_rows)]
    blocks = list(range(llm.block_manager.num_blocks))
    rng.shuffle(blocks)
    tables = state.block_tables.cpu()
    for row, length in enumerate(lens):
        for i in range((length + 400) // block_size + 1):
            tables[row, i] = blocks.pop()
    state.block_tables.copy_(tables)
    state.last_token[:num_rows] = torch.randint(0, 10000, (num_rows,), device=state.device)
    state.temperatures[:num_rows] = 0.6
    state.seeds[:num_rows] = torch.arange(num_rows, device=state.device)
    return torch.tensor(lens, device=state.device)


@torch.inference_mode()
def milliseconds(llm: LLM, lens: torch.Tensor, repeats: int) -> list[float]:
    """Of one step, each repeat: the lengths grow by a token a step."""
    runner = llm.model_runner
    assert runner.graphs is not None
    rows = torch.arange(len(lens), device=lens.device)
    runner.graphs.clear()
    runner.state.num_cached_tokens[: len(lens)] = lens
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            runner.graphs.replay(rows)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return times[1:]  # the first captures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-seqs", type=int, nargs="+", help="instead of the usual cases")
    parser.add_argument("--context", type=int, default=900, metavar="TOKENS", help="mean, with --num-seqs; default 900")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = machine.cuda_device()
    cases = [(rows, args.context) for rows in args.num_seqs] if args.num_seqs else CASES
    llm = LLM(args.model, max_num_seqs=256, gpu_memory_utilization=0.92)
    backend: Any = llm.model_runner.backend
    results = []
    print(f"{'':18}" + "".join(f"{rows:>8}x{mean}" for rows, mean in cases))
    for name, forward in (("whole step, ms", backend.forward), ("without attention", lambda q, *_: q.contiguous())):
        backend.forward = forward
        line = f"{name:18}"
        for num_rows, mean_len in cases:
            times = milliseconds(llm, fill_rows(llm, num_rows, mean_len), args.repeats)
            results.append({"step": name, "num_rows": num_rows, "mean_len": mean_len, "ms": times})
            line += f"{statistics.median(times):12.3f}"
        print(line, flush=True)
    print(json.dumps({**machine.provenance(device), "results": results}))


if __name__ == "__main__":
    main()
