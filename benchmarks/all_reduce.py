"""Sums over two GPUs with the RMSNorm that follows: NCCL and our norm, against our kernel over peer memory.

`python -m benchmarks.all_reduce` starts the second rank itself. Microseconds a call within a CUDA graph; "after a
product" has that of a row-parallel layer, [rows, width / 2] x [width / 2, width], before each sum, and counts it in.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import machine
from nanovllm.kernels import all_reduce
from nanovllm.kernels.linear import linear
from nanovllm.kernels.norm import add_rms_norm
from nanovllm.utils.nccl import PEER_MEMORY, NcclCommunicator, make_unique_id

CALLS = 40  # in a graph
EPS = 1e-6


def microseconds(run: Callable[[int], Any], repeats: int) -> float:
    """Of one of the calls of `run`, which is told its number, in a graph: the median."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(CALLS):
            run(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for i in range(CALLS):
            run(i)
        graph.capture_end()
        times = []
        for _ in range(repeats + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times[3:])


def measure(communicator: NcclCommunicator, rows: int, width: int, repeats: int) -> dict[str, float]:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(rows, width // 2, **options)
    residual, weight = torch.randn(rows, width, **options), torch.ones(width, **options)
    product_weights = [torch.randn(width, width // 2, **options) for _ in range(CALLS)]  # more than L2 holds
    constant = torch.randn(rows, width, **options)

    def nccl(i: int, with_product: bool = False) -> None:
        out = linear(x, product_weights[i]) if with_product else constant
        add_rms_norm(communicator.all_reduce(out), residual, weight, EPS)

    def ours(i: int, with_product: bool = False, num_warps: int | None = None) -> None:
        summand = communicator.summand(rows, width, is_first=i == 0)
        assert summand is not None
        if with_product:
            linear(x, product_weights[i], out=summand.x)
        all_reduce.all_reduce_rms_norm(summand, residual, weight, EPS, num_warps)

    found = {"nccl": microseconds(nccl, repeats), "ours": microseconds(ours, repeats)}
    for num_warps in (4, 8, 16, 32):
        found[f"{num_warps} warps"] = microseconds(partial(ours, num_warps=num_warps), repeats)
    # What it costs to announce a summand after everything else that this GPU has stored; not safe to leave out.
    announce, all_reduce.ANNOUNCE = all_reduce.ANNOUNCE, "relaxed"
    found["relaxed"] = microseconds(ours, repeats)
    all_reduce.ANNOUNCE = announce
    found["product"] = microseconds(lambda i: linear(x, product_weights[i]), repeats)
    found["nccl after a product"] = microseconds(lambda i: nccl(i, True), repeats)
    found["ours after a product"] = microseconds(lambda i: ours(i, True), repeats)
    return {name: round(value, 2) for name, value in found.items()}


@torch.inference_mode()
def run_rank(rank: int, unique_id: bytes, args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.cuda.set_device(rank)
    communicator = NcclCommunicator(unique_id, rank, 2)
    results = []
    for width in args.widths:
        os.environ[PEER_MEMORY] = "1"
        communicator.share_memory(width, torch.bfloat16)
        if communicator.peers is None:
            raise SystemExit("these GPUs cannot read each other's memory")
        results += [
            {"width": width, "rows": rows, **measure(communicator, rows, width, args.repeats)} for rows in args.rows
        ]
        communicator.all_reduce(torch.zeros(1, device="cuda")).item()  # or the other rank might still read
        communicator.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 128, 256])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    device = machine.cuda_device(2)
    unique_id = make_unique_id()
    peer = multiprocessing.get_context("spawn").Process(target=run_rank, args=(1, unique_id, args), daemon=True)
    peer.start()
    results = run_rank(0, unique_id, args)
    peer.join()
    print(json.dumps({**machine.provenance(device), "microseconds": results}))
    columns = list(results[0])
    print(" | ".join(columns))
    for row in results:
        print(" | ".join(f"{row[name]!s:>{len(name)}}" for name in columns))


if __name__ == "__main__":
    main()
