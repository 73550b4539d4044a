"""Speed of this engine, and of others beside it. See --help; docs/benchmarks.md has what was measured.

Prints a line a result and, last, all of it as one line of JSON.
"""

from time import perf_counter

PROCESS_START = perf_counter()  # before the imports, which are part of starting up

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.engines import ENGINES, Engine, NanoVLLM
from benchmarks.measure import add_rates, measure, ratios, table
from benchmarks.workload import WORKLOADS, Case, ModelBytes, make_case, span
from nanovllm.config import find_checkpoint, load_hf_config, resolve_device, resolve_dtype


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="directory or hub id (default: Qwen/Qwen3-0.6B on a GPU, otherwise a demo model of 135M)")
    add("--engine", choices=ENGINES, default="nanovllm")
    add(
        "--compare", choices=ENGINES, action="append", default=[], metavar="ENGINE",
        help="run this engine too, in turn with the first, both loaded; may be repeated",
    )  # fmt: skip
    add(
        "--workload", choices=WORKLOADS, nargs="+", default=[], metavar="NAME",
        help="one or more. bench: 256 requests of 100-1024 in and out, as upstream (default on a GPU); bs1: one of 128 "
        "in, 512 out; prefill: 256 of 1024 in, 1 out; small: one of 16 in, 32 out, then 16 of them together",
    )  # fmt: skip
    add("--repeats", type=int, default=3, help="timed runs, each with fresh tokens, after a warm-up (default: 3)")
    add("--temperature", type=float, default=0.6)
    add("--top-k", type=int, help="of all requests, as the next two are (default: off)")
    add("--top-p", type=float)
    add("--repetition-penalty", type=float)
    add("--seed", type=int, default=0)
    sizes = parser.add_argument_group("sizes (default: the workload's)")
    sizes.add_argument("--num-seqs", type=int, help="requests")
    sizes.add_argument("--input-len", type=span, help="tokens of a prompt, N or LOW-HIGH")
    sizes.add_argument("--output-len", type=span, help="tokens of an output, N or LOW-HIGH")
    engine = parser.add_argument_group("engine (as in nanovllm.Config)")
    engine.add_argument("--max-model-len", type=int, default=4096)
    engine.add_argument("--max-num-seqs", type=int, default=512)
    engine.add_argument("--max-num-batched-tokens", type=int, default=16384)
    engine.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    engine.add_argument("--tensor-parallel-size", type=int, default=1)
    engine.add_argument("--enforce-eager", action="store_true")
    engine.add_argument("--dtype", default="auto")
    engine.add_argument("--device", default="auto")
    engine.add_argument("--attention-backend", help="nanovllm only, like the next four")
    engine.add_argument("--deterministic", action="store_true")
    engine.add_argument("--kvcache-block-size", type=int, default=256)
    engine.add_argument("--num-kvcache-blocks", type=int, default=-1)
    engine.add_argument("--depth", type=int, choices=(0, 1), help="steps to launch ahead (default: 1 on a GPU)")
    group = parser.add_argument_group("instead of the timed runs, or of their workload (nanovllm only)")
    more = group.add_mutually_exclusive_group()
    more.add_argument("--host-profile", action="store_true", help="host work per decode step of the workload")
    more.add_argument("--profile", type=Path, metavar="FILE", help="write a Chrome trace, print time by kernel")
    more.add_argument("--plot", type=Path, metavar="FILE", help="tokens/s by number of requests, as a picture")
    args = parser.parse_args(argv)
    args.engines = list(dict.fromkeys([args.engine, *args.compare]))
    if (args.host_profile or args.profile or args.plot) and args.engines != ["nanovllm"]:
        parser.error("--host-profile, --profile and --plot work with nanovllm only")
    if args.plot and args.workload:
        parser.error("--plot has workloads of its own: leave --workload out")
    if (args.host_profile or args.profile) and len(args.workload) > 1:
        parser.error("--host-profile and --profile take one workload")
    if args.plot and args.output_len == (1, 1):
        parser.error("--plot is about decoding: --output-len must be above 1")
    for name in ("repeats", "num_seqs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    with errors_in_one_line():
        device = resolve_device(args.device)
        model = str(find_checkpoint(args.model or default_model(device)))
        hf_config = load_hf_config(Path(model))
        dtype = resolve_dtype(args.dtype, device, hf_config)
        cases = make_cases(args, device, hf_config.vocab_size)
        if not args.host_profile:  # which has lengths of its own
            check_lengths(cases, args.max_model_len, hf_config)
    report: dict[str, Any] = {
        "model": Path(model).name,
        "dtype": str(dtype).removeprefix("torch."),
        **machine.provenance(device),
        "num_devices": args.tensor_parallel_size,
        "argv": sys.argv[1:] if argv is None else argv,
    }
    print(f"{report['model']} in {report['dtype']} on {report['device']}, commit {report['commit']}")
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()), flush=True)

    if args.host_profile and device.type == "cpu" and args.num_kvcache_blocks == -1:
        args.num_kvcache_blocks = 1  # the model will not run, so there need not be a cache
    engines: list[Engine] = []
    try:
        for name in args.engines:
            with errors_in_one_line():
                engines.append(ENGINES[name](model, device, dtype, args))
            engines[-1].generate(Case("first token", [[1] * 16], [1], 2), args.temperature)
            if len(engines) == 1:
                report["first_token_s"] = round(perf_counter() - PROCESS_START, 2)
                print(f"first token {report['first_token_s']} s after the start of the process")
        if args.host_profile or args.profile:
            profile(engines[0], cases[-1], args, report)
        else:
            model_bytes = ModelBytes.of(hf_config, dtype.itemsize)
            report["results"] = [result for case in cases for result in measure(case, engines, model_bytes, args)]
        report["memory_bytes"] = machine.memory_bytes(device)
    finally:
        while engines:
            engines.pop().close()  # or there might be no memory for the copy
    report["copy_bytes_per_s"] = round(machine.copy_bytes_per_s(device))
    if "results" in report:
        print_results(report, args)
    print(json.dumps(report))
    return report


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """For what the command line asks for and cannot have; an error while something runs keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def default_model(device: torch.device) -> str:
    if device.type == "cuda":
        return "Qwen/Qwen3-0.6B"
    from nanovllm.utils.demo import demo_model_path

    return demo_model_path()


def make_cases(args: argparse.Namespace, device: torch.device, vocab_size: int) -> list[Case]:
    if args.plot:
        sizes = [2**i for i in range(20) if 2**i <= (args.num_seqs or (256 if device.type == "cuda" else 16))]
        shapes = [(f"{size} together", size, (128, 128), (64, 64)) for size in sizes]
    else:
        names = args.workload or ["bench" if device.type == "cuda" else "small"]
        shapes = [shape for name in names for shape in WORKLOADS[name]]
    return [
        make_case(
            name,
            num_seqs if args.plot else args.num_seqs or num_seqs,
            args.input_len or input_len,
            args.output_len or output_len,
            args.seed + i * bool(args.plot),  # or the cases of a plot would begin with the same prompts
            vocab_size,
        )
        for i, (name, num_seqs, input_len, output_len) in enumerate(shapes)
    ]


def check_lengths(cases: list[Case], max_model_len: int, hf_config: Any) -> None:
    """Engines would end what is longer before its time, or refuse it, when other cases have run already."""
    model_len = min(max_model_len, getattr(hf_config, "max_position_embeddings", max_model_len))
    for case in cases:
        needed = max(len(prompt) + output_len for prompt, output_len in zip(case.prompts, case.output_lens))
        if needed > model_len:
            raise ValueError(
                f"a request of {case.name!r} has {needed} tokens in and out, and max_model_len={model_len} (the lesser "
                "of --max-model-len and the model's own): choose shorter ones by --input-len and --output-len"
            )


def profile(engine: Engine, case: Case, args: argparse.Namespace, report: dict[str, Any]) -> None:
    from benchmarks.profiling import device_profile, host_profile

    assert isinstance(engine, NanoVLLM)
    if args.profile:
        engine.generate(case.refilled(args.seed + 1), args.temperature)  # a warm-up
        print(device_profile(engine.llm, case, args.temperature, args.profile))
    else:
        report["num_seqs"] = len(case.prompts)
        report["host_us_per_step"] = host_profile(engine.llm, case)
        parts = ", ".join(f"{part} {us:.0f}" for part, us in report["host_us_per_step"].items())
        print(f"host work per decode step of {len(case.prompts)} requests, µs: {parts}")


def print_results(report: dict[str, Any], args: argparse.Namespace) -> None:
    results, copy_bytes_per_s = report["results"], report["copy_bytes_per_s"]
    for result in results:
        add_rates(result, copy_bytes_per_s, report["num_devices"])
    print(table(results))
    if len(results) > 1 and not args.plot:
        print(ratios(results))
    print(
        f"floor: the share of the tokens/s that reading weights and KV at the measured copy speed of "
        f"{copy_bytes_per_s / 1e9:,.1f} GB/s would allow; memory in use {report['memory_bytes'] / 2**30:.1f} GiB"
    )
    if args.plot:
        from benchmarks.plot import plot_batch_sizes

        plot_batch_sizes(args.plot, f"{report['model']}, {report['dtype']}, {report['device']}", results)
        print(f"drawn to {args.plot}")


if __name__ == "__main__":
    main()
