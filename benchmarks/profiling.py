"""Where the time of a step goes: the host's part of it, and the kernels on the device. For nanovllm only."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.machine import synchronize
from benchmarks.stand_ins import stand_ins
from benchmarks.workload import Case
from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.step_output import PendingTokens, pass_time

DEVICE_STEP_S = 7e-3  # of 256 requests to the 0.6B shape, on one H100
PARTS = ("schedule", "prepare", "postprocess", "step")
RUN = 16  # steps in a row: the scheduler may do at once, for that many, what they need


class HostProfile:
    """An engine with every request of `case` decoding, and timers around the host's part of a step; a context manager.

    prepare has the copies to the device and the launch; step is all but the wait for the device's tokens. On a CPU a
    graph that does nothing stands for the model, processes that do nothing for further ranks, and for the device's step
    a pause, passed as rank 0 of several passes it, after which the same work takes longer than in a loop. The context
    lengths are those of the case's prompts. The engine is useless afterwards.
    """

    def __init__(self, llm: LLM, case: Case, num_steps: int):
        """num_steps: how many there will be."""
        self.llm, self.case, self.num_steps = llm, case, num_steps
        self.seconds: dict[str, float] = defaultdict(float)  # of the step at hand
        self.pause_s = DEVICE_STEP_S if llm.config.device.type == "cpu" else 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            start = perf_counter()
            result = function(*args)
            self.seconds[part] += perf_counter() - start
            return result

        return wrapper

    def __enter__(self) -> "HostProfile":
        with ExitStack() as stack:
            self.start(stack)
            self.cleanup = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cleanup.close()

    def start(self, stack: ExitStack) -> None:
        llm, case = self.llm, self.case
        runner: Any = llm.model_runner
        if llm.config.device.type == "cpu":
            runner.forward_prefill = lambda batch, all_tokens: (batch.rows, None)  # row numbers do for logits and ids
            runner.graphs = SimpleNamespace(replay=lambda rows: (rows,), clear=lambda: None)
            runner.sample = lambda logits, *draws: logits
            runner.advance = lambda *args: None
            llm.block_manager = llm.scheduler.block_manager = BlockManager(2**16, llm.block_manager.block_size)
            llm.input_processor.num_blocks = llm.block_manager.num_blocks
            llm.scheduler.reset(())  # nobody reads or writes a cache now, so there can be blocks for all
            stack.enter_context(stand_ins(runner))
        for part, owner, method in [
            ("schedule", llm.scheduler, "schedule"),
            ("prepare", runner, "run"),
            ("postprocess", llm.scheduler, "advance"),
            ("postprocess", llm.scheduler, "postprocess"),
        ]:
            setattr(owner, method, self.timed(part, getattr(owner, method)))
        budget = max(1, llm.config.max_num_batched_tokens - len(case.prompts))  # for prompts beside the first to decode
        num_before = 10 + 2 * case.num_input_tokens // budget
        add_requests(llm, case, [num_before + self.num_steps] * len(case.prompts), temperature=0.6)
        while llm.scheduler.waiting or not all(seq.is_decoding for seq in llm.scheduler.running):
            llm.step()
        self.check()

    def check(self) -> None:
        if len(self.llm.scheduler.running) < len(self.case.prompts) or self.llm.scheduler.num_preemptions:
            raise SystemExit(
                "error: not all requests decode together to the end: lower --num-seqs or --input-len, or raise "
                "max_num_seqs or max_model_len"
            )

    def run(self, num_warmups: int = 0) -> dict[str, float]:
        """Microseconds of host work by part, means of RUN steps after `num_warmups` others."""
        steps = []
        with mock.patch.object(PendingTokens, "wait", self.timed("wait", PendingTokens.wait)):
            for _ in range(num_warmups + RUN):
                end = perf_counter() + self.pause_s
                while perf_counter() < end:
                    pass_time()
                self.seconds.clear()
                start = perf_counter()
                self.llm.step()
                steps.append({"step": perf_counter() - start - self.seconds.pop("wait"), **self.seconds})
                self.check()
        return {part: statistics.mean(step[part] for step in steps[num_warmups:]) * 1e6 for part in PARTS}


def host_profile(llm: LLM, case: Case, num_runs: int = 20) -> dict[str, float]:
    """Microseconds of host work per decode step of the whole `case`, by part: the mean of the middle half of the runs,
    since whatever else computes on the host strikes few of them and those hard. The engine is useless afterwards."""
    with HostProfile(llm, case, (1 + num_runs) * RUN) as engine:
        engine.run()  # not counted
        runs = sorted((engine.run() for _ in range(num_runs)), key=lambda run: run["step"])
    middle = runs[num_runs // 4 : -(num_runs // 4)]
    return {part: round(statistics.mean(run[part] for run in middle), 1) for part in PARTS}


def device_profile(llm: LLM, case: Case, temperature: float, trace_file: Path, num_steps: int = 30) -> str:
    """Profile `num_steps` steps from the middle of `case`, write them as a Chrome trace, and return a table."""
    add_requests(llm, case, case.output_lens, temperature)
    for _ in range(max(0, max(case.output_lens) - num_steps) // 2):
        llm.step()
    device = llm.config.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    tables: list[str] = []

    def save(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(trace_file))
        if device.type == "cuda":
            tables.append(kernel_table(json.loads(trace_file.read_text()), num_steps))
        else:
            tables.append(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))

    num_warmups = 5  # the profiler's own start-up is slow
    schedule = torch.profiler.schedule(wait=0, warmup=num_warmups, active=num_steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=save) as profile:
        for i in range(num_warmups + num_steps):
            if llm.is_finished():  # few steps make a case: it goes on with other tokens
                case = case.refilled(1_000_000 + i)
                add_requests(llm, case, case.output_lens, temperature)
            llm.step()
            if i == num_warmups + num_steps - 1:
                synchronize(device)
            profile.step()
    while not llm.is_finished():
        llm.step()
    return tables[0]


def kernel_table(trace: dict[str, Any], num_steps: int, num_rows: int = 20) -> str:
    """Share of the GPU's time by kernel, and how long the GPU idled, from a Chrome trace of torch.profiler."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [event for event in trace["traceEvents"] if event.get("cat") in kinds]
    if not events:
        return "the trace has no GPU kernels"
    spans = sorted((float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events)
    busy, end = 0.0, spans[0][0]
    for first, last in spans:  # kernels overlap where streams do
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    wall = end - spans[0][0]
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        times[event["name"]].append(float(event["dur"]))
    total = sum(map(sum, times.values()))
    lines = [f"{'share':>6}  {'µs/step':>9}  {'calls/step':>10}  {'µs/call':>8}  kernel"]
    for name, durations in sorted(times.items(), key=lambda item: -sum(item[1]))[:num_rows]:
        lines.append(
            f"{sum(durations) / total:6.1%}  {sum(durations) / num_steps:9.1f}  {len(durations) / num_steps:10.1f}  "
            f"{sum(durations) / len(durations):8.1f}  {name[:100]}"
        )
    lines.append(f"{num_steps} steps in {wall / 1e3:.2f} ms; the GPU idled {1 - busy / wall:.1%} of that time")
    return "\n".join(lines)


def add_requests(llm: LLM, case: Case, output_lens: list[int], temperature: float) -> None:
    for prompt, output_len in zip(case.prompts, output_lens):
        llm.add_request(prompt, SamplingParams(temperature=temperature, max_tokens=output_len, ignore_eos=True))
