"""GPU time of a draw, in a graph, by rows and filters, checked against the twin. `python -m benchmarks.sampling`.

Logits are bfloat16 and normal, of a small spread (flat, as of random weights: top-p leaves most of the vocabulary) and
of a large one (peaked, more like a trained model's).
"""

import argparse
import json
from collections.abc import Callable

import torch

from benchmarks import machine
from nanovllm.kernels.filtering import Filters, apply_filters, filtered_argmax
from nanovllm.kernels.sampling import gumbel_argmax

SPREADS = {"flat": 0.5, "peaked": 4.0}
TEMPERATURE = 0.6
ALL = 10**9
CASES = {  # top_k, top_p, min_p
    "plain": None,
    "top-k 20": (20, 1.0, 0.0),
    "top-k 20, top-p 0.95": (20, 0.95, 0.0),
    "top-p 0.95": (ALL, 0.95, 0.0),
    "min-p 0.05": (ALL, 1.0, 0.05),
    "top-k 1000": (1000, 1.0, 0.0),
    "top-k 5000, top-p 0.9": (5000, 0.9, 0.0),
}


def make_filters(num_rows: int, vocab_size: int, top_k: int, top_p: float, min_p: float) -> Filters:
    return Filters(
        torch.full((num_rows,), min(top_k, vocab_size), device="cuda"),
        torch.full((num_rows,), top_p, dtype=torch.float64, device="cuda"),
        torch.full((num_rows,), min_p, device="cuda"),
    )


def make_draw(logits: torch.Tensor, filters: Filters | None) -> Callable[[], torch.Tensor]:
    """logits [num_rows, vocab_size] -> a function that draws from them."""
    rows = torch.arange(len(logits), device="cuda")
    draws = torch.full(rows.shape, TEMPERATURE, device="cuda"), rows * 7919, rows + 100
    if filters is None:
        return lambda: gumbel_argmax(logits, *draws)
    num_checked = min(len(logits), 64)  # the twin takes much memory
    kept = apply_filters(
        logits[:num_checked].float(), draws[0][:num_checked], Filters(*(f[:num_checked] for f in filters))
    )
    expected = gumbel_argmax(kept, *(tensor[:num_checked] for tensor in draws))
    assert torch.equal(filtered_argmax(logits, rows, *draws, filters)[:num_checked], expected), "not the twin's draws"
    return lambda: filtered_argmax(logits, rows, *draws, filters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--vocab-size", type=int, default=151_936)
    args = parser.parse_args()
    device = machine.cuda_device()
    from triton.testing import do_bench_cudagraph  # else launches from Python are what few rows take

    torch.manual_seed(0)
    results = []
    print(f"{'µs a draw, by rows':32}" + "".join(f"{rows:>8}" for rows in args.num_rows))
    for name, case in CASES.items():
        for kind, spread in SPREADS.items():
            line = f"{name + ', ' + kind:32}"
            for num_rows in args.num_rows:
                logits = (spread * torch.randn(num_rows, args.vocab_size, device=device)).bfloat16()
                filters = make_filters(num_rows, args.vocab_size, *case) if case is not None else None
                us = 1e3 * do_bench_cudagraph(make_draw(logits, filters), rep=10, return_mode="median")
                results.append({"case": name, "logits": kind, "num_rows": num_rows, "us": us})
                line += f"{us:8.0f}"
            print(line, flush=True)
    print(json.dumps({**machine.provenance(device), "results": results}))


if __name__ == "__main__":
    main()
