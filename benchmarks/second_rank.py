"""What more ranks add to the host's part of a decode step: `python -m benchmarks.second_rank --model DIR`.

Two engines in one process, of one rank and of several, take turns of 16 steps, and what counts is the difference
within a turn: from one moment to the next a host does the same work at half the speed or at twice. On a CPU processes
that do nothing stand for the ranks, see `HostProfile`. The last line is JSON.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.profiling import PARTS, RUN, HostProfile
from benchmarks.workload import make_case, span
from nanovllm import LLM

NUM_WARMUPS = 4  # steps of each turn that are not counted: before them the other engine had the caches


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or a hub id")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ranks", type=int, default=2, help="of the engine with several (default: %(default)s)")
    parser.add_argument("--num-seqs", type=int, default=256, help="requests of each engine (default: %(default)s)")
    parser.add_argument("--input-len", type=span, default=(100, 512), metavar="N[-M]", help="default: 100-512")
    parser.add_argument("--turns", type=int, default=22, help="of each engine (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.ranks < 2 or args.turns < 2:
        parser.error("--ranks and --turns must be at least 2")
    with ExitStack() as stack:
        engines = []
        for num_ranks, memory in ((1, 0.45), (args.ranks, 0.9)):  # the first engine's counts for the second
            llm = LLM(
                args.model,
                device=args.device,
                dtype=args.dtype,
                tensor_parallel_size=num_ranks,
                max_num_seqs=args.num_seqs,
                gpu_memory_utilization=memory,
                num_kvcache_blocks=1 if args.device == "cpu" else -1,  # HostProfile needs none there
            )
            stack.callback(llm.close)
            case = make_case("bench", args.num_seqs, args.input_len, (1, 1), 0, llm.config.hf_config.vocab_size)
            engines.append(stack.enter_context(HostProfile(llm, case, (1 + args.turns) * (NUM_WARMUPS + RUN))))
        turns = [tuple(engine.run(NUM_WARMUPS) for engine in engines) for _ in range(1 + args.turns)]
        del turns[0]
    report = {"model": Path(args.model).name, **machine.provenance(llm.config.device), "ranks": args.ranks}
    print(f"{report['model']}, {args.num_seqs} requests, {report['device']}, commit {report['commit']}")
    print(f"medians of {len(turns)} turns (quartiles), µs a step")
    print(f"{'':12}{'1 rank':>22}{f'{args.ranks} ranks':>22}{'added':>22}")
    for part in PARTS:
        one, several = ([turn[i][part] for turn in turns] for i in (0, 1))
        report[part] = [quartiles(one), quartiles(several), quartiles([b - a for a, b in zip(one, several)])]
        cells = (f"{median:,.0f} ({low:,.0f} – {high:,.0f})" for low, median, high in report[part])
        print(f"{part:12}" + "".join(f"{cell:>22}" for cell in cells))
    print(json.dumps(report))
    return report


def quartiles(values: list[float]) -> list[float]:
    return [round(value, 1) for value in statistics.quantiles(values, n=4, method="inclusive")]


if __name__ == "__main__":
    main()
