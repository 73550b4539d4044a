"""Speed by number of ranks: `python -m benchmarks.scaling --model DIR --plot scaling.png`.

Runs bench.py in a process of its own for each model and number of ranks, one after the other, with what other arguments
there are (`--repeats 5`, say) handed on to it. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.plot import plot_scaling

BENCH = Path(__file__).parent.parent / "bench.py"


def run_bench(argv: list[str]) -> dict[str, Any]:
    """The report of a run of bench.py."""
    process = subprocess.run([sys.executable, str(BENCH), *argv], stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        sys.exit(f"error: bench.py {' '.join(argv)} ended with exit code {process.returncode}")
    report: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return report


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="directories or hub ids")
    parser.add_argument("--ranks", type=int, nargs="+", help="1, 2, 4, ... as many as there are GPUs, if absent")
    parser.add_argument("--workload", nargs="+", default=["bs1", "bench"], help="of bench.py (default: bs1 bench)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="output tokens/s by number of ranks, as a picture")
    args, others = parser.parse_known_args(argv)
    for option in ("--compare", "--profile", "--host-profile", "--engine"):
        if any(other.split("=")[0] == option for other in others):
            parser.error(f"{option} is for bench.py by itself")
    ranks = sorted(set(args.ranks or [2**i for i in range(10) if 2**i <= max(1, torch.cuda.device_count())]))
    reports = []
    for model in args.model:
        for size in ranks:
            options = ["--model", model, "--workload", *args.workload, "--tensor-parallel-size", str(size), *others]
            reports.append(run_bench(options))
            for result in reports[-1]["results"]:
                median, low, high = result["output_tok_per_s"]
                print(
                    f"{reports[-1]['model']:16} {result['case']:14} {size} ranks  "
                    f"{median:,.1f} ({low:,.1f} – {high:,.1f}) output tok/s",
                    flush=True,
                )
    if args.plot:
        plot_scaling(args.plot, reports)
        print(f"drawn to {args.plot}")
    print(json.dumps(reports))
    return reports


if __name__ == "__main__":
    main()
