"""Products of few rows: every way to cut them against cuBLAS. `python -m benchmarks.products --model 0.6B 8B`.

Each is timed as in a model's step, in a CUDA graph, with weights that come from memory: a norm before a wide product,
an activation after a gated one, a norm after a narrow one. kernels/matmul.py's choices come from these tables.
"""

import argparse
import itertools
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from nanovllm.kernels.activation import silu_and_mul
from nanovllm.kernels.linear import blas_linear
from nanovllm.kernels.matmul import BLOCK_K, BLOCK_N, Tiling, matmul
from nanovllm.kernels.norm import add_rms_norm

# outputs, depth, kind: "wide" after a norm, "gated" with an activation, "narrow" before a norm, "whole" before one that
# takes no partial sums, as between ranks.
SHAPES = {
    "0.6B": {
        "qkv": (4096, 1024, "wide"),
        "o": (1024, 2048, "narrow"),
        "gate_up": (6144, 1024, "gated"),
        "down": (1024, 3072, "narrow"),
    },
    "8B": {
        "qkv": (6144, 4096, "wide"),
        "o": (4096, 4096, "narrow"),
        "gate_up": (24576, 4096, "gated"),
        "down": (4096, 12288, "narrow"),
    },
    "8B/2": {
        "qkv": (3072, 4096, "wide"),
        "o": (4096, 2048, "whole"),
        "gate_up": (12288, 4096, "gated"),
        "down": (4096, 6144, "whole"),
    },
}
SHARED_BYTES = 220 * 2**10


def candidates(num_rows: int, outputs: int, depth: int, kind: str) -> list[Tiling]:
    """Worth a try: every multiprocessor has something to do, and shared memory holds it."""
    found = []
    cuts = itertools.product((16, 32, 64, 128), (1, 2, 4, 8), (3, 4, 5, 7), (False, True))
    for block_m, num_splits, num_stages, by_tma in cuts:
        programs = outputs // BLOCK_N * -(-num_rows // block_m) * num_splits
        stage_bytes = (BLOCK_N + block_m) * BLOCK_K * 2
        if (num_splits > 1 and (kind != "narrow" or programs > 272)) or depth % (BLOCK_K * num_splits):
            continue
        if not num_rows <= 2 * block_m <= 4 * max(num_rows, 16) or stage_bytes * num_stages > SHARED_BYTES:
            continue
        if block_m >= (64 if by_tma else 0) and block_m <= (128 if by_tma else 64):
            found.append(Tiling(block_m, num_splits, num_stages, by_tma))
    return found


def chain(kind: str, inputs: Any, weight: torch.Tensor, tiling: Tiling | None) -> torch.Tensor:
    """One layer's worth; tiling: None for cuBLAS, or cuBLASLt where the engine would call it."""
    x, residual, norm = inputs
    if kind in ("wide", "gated"):
        x, _ = add_rms_norm(x, residual, norm, 1e-6)
        if tiling is not None:
            return matmul(x, weight, tiling, kind == "gated")
        out = blas_linear(x, weight)
        return silu_and_mul(out) if kind == "gated" else out
    out = blas_linear(x, weight) if tiling is None else matmul(x, weight, tiling)
    return add_rms_norm(out, residual, norm, 1e-6)[0]


def make_inputs(num_rows: int, outputs: int, depth: int, kind: str) -> tuple[Any, torch.Tensor]:
    hidden = depth if kind in ("wide", "gated") else outputs
    shapes = [(num_rows, depth), (num_rows, hidden), (hidden,)]
    x, residual, norm = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    num_weights = min(max(-(-200 * 2**20 // (2 * outputs * depth)), 3), 20)
    weights = torch.randn(num_weights, outputs, depth, device="cuda", dtype=torch.bfloat16) * depth**-0.5
    return [x, residual, norm], weights


def microseconds(kind: str, inputs: Any, weights: torch.Tensor, tiling: Any) -> float:
    def run() -> None:
        for weight in weights:
            chain(kind, inputs, weight, tiling)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        run()
        graph.capture_end()
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 2 / len(weights))
    return statistics.median(times[2:])


def error(kind: str, inputs: Any, weight: torch.Tensor, tiling: Tiling) -> float:
    expected = chain(kind, inputs, weight, None).float()
    return float((chain(kind, inputs, weight, tiling).float() - expected).norm() / expected.norm())


def compile_all(jobs: list[tuple[int, int, int, str, Tiling]]) -> None:
    """Leaves them in Triton's cache on disk; in a process of its own."""
    for num_rows, outputs, depth, kind, tiling in jobs:
        x = torch.zeros(num_rows, depth, device="cuda", dtype=torch.bfloat16)
        weight = torch.zeros(outputs, depth, device="cuda", dtype=torch.bfloat16)
        try:
            matmul(x, weight, tiling, kind == "gated")
        except Exception as problem:  # too much shared memory, say
            print(f"{tiling}: {type(problem).__name__}: {str(problem)[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--show", type=int, default=3, help="how many of the best to print")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    args = parser.parse_args()
    device = machine.cuda_device()
    named = [(model, name, shape) for model in args.model for name, shape in SHAPES[model].items()]
    cases = [(model, name, rows, *shape) for model, name, shape in named for rows in args.rows]
    jobs: dict[Any, Any] = {}
    for _, _, rows, outputs, depth, kind in cases:
        for tiling in candidates(rows, outputs, depth, kind):
            jobs[outputs, depth, kind, tiling] = (rows, outputs, depth, kind, tiling)
    num_processes = max((os.cpu_count() or 2) - 2, 1)
    print(f"{len(jobs)} kernels, compiled by {num_processes} processes", flush=True)
    parts = [list(jobs.values())[i::num_processes] for i in range(num_processes)]
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_all, parts))
    results = []
    for model, name, rows, outputs, depth, kind in cases:
        inputs, weights = make_inputs(rows, outputs, depth, kind)
        base = microseconds(kind, inputs, weights, None)
        times = []
        for tiling in candidates(rows, outputs, depth, kind):
            try:
                if error(kind, inputs, weights[0], tiling) > 1e-2:
                    print("WRONG", model, name, rows, tiling)
                times.append((microseconds(kind, inputs, weights, tiling), tiling))
            except Exception as problem:
                print(f"{tiling}: {type(problem).__name__}: {str(problem)[:100]}")
        times.sort(key=lambda entry: entry[0])
        results.append({"model": model, "product": name, "rows": rows, "cublas": base, "ours": [
            (us, repr(tiling)) for us, tiling in times
        ]})  # fmt: skip
        read = 2e6 * outputs * depth / 3.0e12
        best = "  ".join(
            f"{us:.2f} ({t.block_m} tokens, {t.num_splits} splits, {t.num_stages} stages{', TMA' * t.by_tma})"
            for us, t in times[: args.show]
        )
        print(f"{model:5} {name:8} {rows:4} rows, read {read:6.2f}, cuBLAS {base:6.2f} | {best}", flush=True)
        del weights
    if args.json:
        args.json.write_text(json.dumps({**machine.provenance(device), "results": results}))


if __name__ == "__main__":
    main()
