"""Times cases on engines and sets the results against the floor. Called by bench.py."""

import argparse
import statistics
from time import perf_counter
from typing import Any

from benchmarks.engines import Engine
from benchmarks.workload import Case, ModelBytes, floor_bytes


def measure(case: Case, engines: list[Engine], model: ModelBytes, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time `case` on each engine, the engines taking turns, so that a slow spell of the machine hits all of them."""
    seconds: dict[Engine, list[float]] = {engine: [] for engine in engines}
    for repeat in range(-1, args.repeats):  # the first is a warm-up; the next has upstream's very tokens
        tokens = case if repeat == 0 else case.refilled(args.seed + (repeat if repeat > 0 else args.repeats))
        for engine in engines:
            start = perf_counter()
            lengths = engine.generate(tokens, args.temperature)
            elapsed = perf_counter() - start
            if lengths != case.output_lens:
                raise RuntimeError(f"{engine.name} did not generate as many tokens as it was asked for")
            if repeat >= 0:
                seconds[engine].append(elapsed)
    return [
        {
            "case": case.name,
            "engine": engine.name,
            "num_seqs": len(case.prompts),
            "num_input_tokens": case.num_input_tokens,
            "num_output_tokens": case.num_output_tokens,
            "num_steps": engine.num_steps,
            "floor_bytes": floor_bytes(case, model, args.max_num_seqs),
            "seconds": [round(s, 5) for s in seconds[engine]],
        }
        for engine in engines
    ]


def add_rates(result: dict[str, Any], copy_bytes_per_s: float, num_ranks: int) -> None:
    """Tokens per second, and the share of them that the memory's bandwidth would allow at most."""
    for kind in ("input", "output"):
        rates = [result[f"num_{kind}_tokens"] / s for s in result["seconds"]]
        result[f"{kind}_tok_per_s"] = [round(f(rates), 2) for f in (statistics.median, min, max)]
    if result["num_output_tokens"] > result["num_seqs"]:  # otherwise nothing decodes, and bandwidth is no bound
        floor_s = result["floor_bytes"] / copy_bytes_per_s / num_ranks
        result["floor_tok_per_s"] = round(result["num_output_tokens"] / floor_s, 2)
        result["floor_share"] = round(floor_s / statistics.median(result["seconds"]), 4)


def table(results: list[dict[str, Any]]) -> str:
    row = "{:14} {:13} {:28} {:28} {:>7} {:>6}"
    lines = [row.format("case", "engine", "input tok/s (range)", "output tok/s (range)", "floor", "steps")]
    for result in results:
        rates = []
        for kind in ("input", "output"):
            median, low, high = result[f"{kind}_tok_per_s"]
            digits = 0 if median >= 1000 else 1
            rates.append(f"{median:,.{digits}f} ({low:,.{digits}f} – {high:,.{digits}f})")
        share = f"{result['floor_share']:.1%}" if "floor_share" in result else ""
        lines.append(row.format(result["case"], result["engine"], *rates, share, result["num_steps"] or ""))
    return "\n".join(lines)


def ratios(results: list[dict[str, Any]]) -> str:
    """The two comparisons that a reader would otherwise work out: engine against engine, together against alone."""
    median = {(r["case"], r["engine"]): r["output_tok_per_s"][0] for r in results}
    cases = list(dict.fromkeys(case for case, _ in median))
    first, *others = dict.fromkeys(engine for _, engine in median)
    lines = [
        f"{case}: {first} at {median[case, first] / median[case, other]:.2f} times the rate of {other}"
        for case in cases
        for other in others
    ]
    if len(cases) == 2:
        lines.append(f"{first}: {cases[1]} at {median[cases[1], first] / median[cases[0], first]:.2f} times {cases[0]}")
    return "\n".join(lines)
