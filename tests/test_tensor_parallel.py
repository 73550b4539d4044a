"""Two ranks over gloo on the CPU: the same tokens as one rank, and an end to every process whatever happens."""

import asyncio
import contextlib
import ctypes
import gc
import json
import mmap
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import broken_rank
import numpy as np
import pytest
import torch
from helpers import (
    HANGING_S,
    VOCAB_SIZE,
    Watch,
    assert_idle,
    assert_matches,
    child_pids,
    greedy,
    many_prompts,
    random_prompt,
    replaced,
    wait_until,
)

from nanovllm import LLM, AsyncLLM, EngineDeadError, SamplingParams
from nanovllm.engine import batch, engine_core, kv_cache, model_runner, worker_group
from nanovllm.engine.cuda_graph import batch_buckets
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.sequence import DecodingSequences, Sequence
from nanovllm.engine.step_channel import AGAIN, FIELDS, NEW, StepChannel, max_step_size
from nanovllm.engine.step_output import PendingTokens
from nanovllm.engine.worker import AWAKE_S, wait_on
from nanovllm.utils import nccl, peer_memory, threads
from nanovllm.utils.distributed import TensorParallel, check_divisible

OPTIONS: dict[str, Any] = {
    "device": "cpu", "max_model_len": 256, "kvcache_block_size": 16, "num_kvcache_blocks": 64, "max_num_seqs": 8
}  # fmt: skip


def worker_pids(llm: LLM) -> list[int]:
    return [worker.process.pid for worker in llm.model_runner.workers.members]


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def assert_gone(pids: list[int]) -> None:
    """They end, and nobody has to kill them; `test_what_is_waited_for_at_the_end` has the seconds."""
    wait_until(lambda: not any(map(is_running, pids)))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path_factory, monkeypatch) -> Iterator[None]:
    """In a directory for temporary files of its own: others' come and go in the one that all share."""
    directory = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setenv("TMPDIR", str(directory))
    num_threads, before = torch.get_num_threads(), child_pids()
    yield
    gc.collect()
    assert not list(directory.glob("nanovllm-*"))
    assert child_pids() <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nanovllm")]
    assert torch.get_num_threads() == num_threads


# ---- the same tokens ----

# Names of checkpoints, and what is odd about them for two ranks. The vocabulary of 293 divides by nothing.
SPLIT = ["qwen3", "qwen2", "llama", "llama-biases"]  # the last: one key/value head for two ranks, and all biases


@pytest.mark.parametrize("name", SPLIT)
def test_greedy_tokens_equal_transformers(checkpoints, name):
    """In chunks, with a small pool that preempts, blocks of 8, and a second call that finds prefixes cached."""
    checkpoint, prompts = checkpoints(name), many_prompts(16)
    options = {"kvcache_block_size": 8, "num_kvcache_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 48}
    with checkpoint.llm(tensor_parallel_size=2, **options) as llm:
        llm.scheduler.completion_ratio, llm.scheduler.eos = 0.0, frozenset()  # expect early ends that never come
        watch = Watch(llm)
        outputs = llm.generate(prompts, greedy(40, ignore_eos=False), use_tqdm=False)
        assert_matches(checkpoint, prompts, outputs, 40)
        assert watch.num_preemptions > 0
        assert watch.num_chunks > 0
        llm.generate(prompts[:4], greedy(5), use_tqdm=False)
        again = Watch(llm)
        assert_matches(checkpoint, prompts[:4], llm.generate(prompts[:4], greedy(40), use_tqdm=False), 40)
        assert again.num_prefix_cached_tokens > 0
        assert_idle(llm)
        pids = worker_pids(llm)
    assert_gone(pids)


def test_everything_a_request_can_ask_for(qwen3):
    """Sampling on shards, and rows that need the whole distribution: what one rank draws, and its log probabilities."""
    prompts = many_prompts(12, seed=4)
    options: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {5: 2.0}},
        {"temperature": 1.0, "n": 2},
        {"temperature": 1.0, "logits_processors": [lambda ids, logits: logits - logits.roll(len(ids))]},
    ]
    params = [
        SamplingParams(max_tokens=15, ignore_eos=True, seed=i, **options[i % len(options)]) for i in range(len(prompts))
    ]
    with qwen3.llm() as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    with qwen3.llm(tensor_parallel_size=2) as llm:
        for batch_of in (prompts, prompts[::-1]):
            step = 1 if batch_of is prompts else -1
            outputs = llm.generate(batch_of, params[::step], use_tqdm=False)[::step]
            assert [[c.token_ids for c in o.outputs] for o in outputs] == [
                [c.token_ids for c in o.outputs] for o in expected
            ]
            for output, wanted in zip(outputs, expected):
                runs = [(output.outputs[0].logprobs, wanted.outputs[0].logprobs)]
                runs.append((output.prompt_logprobs, wanted.prompt_logprobs))
                for ours, theirs in runs:
                    assert (ours is None) == (theirs is None)
                    for a, b in zip(ours or [], theirs or []):
                        assert (a is None) == (b is None)
                        for token_id in a or {}:
                            assert a[token_id].logprob == pytest.approx(b[token_id].logprob, abs=1e-4)


def test_a_callable_that_raises_leaves_the_ranks_in_step(qwen3):
    class Oops(Exception):
        pass

    def fail(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(ids) == 3:
            raise Oops
        return logits

    prompts = many_prompts(4, seed=5)
    with qwen3.llm(tensor_parallel_size=2) as llm:
        with pytest.raises(Oops):
            llm.generate(prompts, SamplingParams(max_tokens=9, logits_processors=[fail]), use_tqdm=False)
        assert_idle(llm)
        assert_matches(qwen3, prompts, llm.generate(prompts, greedy(20), use_tqdm=False), 20)


def test_logits_stay_where_they_are_until_somebody_asks_for_more(qwen3):
    """Of a row one score and one id travel, also where it is drawn at random."""
    gathered = []

    def watched(gather: Any) -> Any:
        return lambda tp, x: gathered.append(tuple(x.shape)) or gather(tp, x)

    prompts = many_prompts(3, seed=5)
    plain = [greedy(9), SamplingParams(temperature=0.8, seed=1, max_tokens=9, ignore_eos=True), greedy(9)]
    with qwen3.llm(tensor_parallel_size=2) as llm, replaced(TensorParallel, "all_gather", watched):
        llm.generate(prompts, plain, use_tqdm=False)
        assert gathered == [(2, 3)] * 9
        gathered.clear()
        asking = SamplingParams(max_tokens=9, top_p=0.9, ignore_eos=True)
        llm.generate(prompts, [asking, *plain[1:]], use_tqdm=False)
        shard_size = llm.model_runner.model.lm_head.shard_size
        assert gathered == [(3, shard_size)] * 9
        assert shard_size > 100


WORKER = """
import json, sys, torch
from nanovllm.engine import kv_cache, worker
from nanovllm.engine.cuda_graph import batch_buckets
from nanovllm.engine.model_runner import ModelRunner
free_bytes, path = json.loads({settings!r})
kv_cache.free_ram_bytes = lambda: free_bytes
loop = ModelRunner.loop
def loop_and_tell(self, next_step):
    with open(path, "w") as file:
        of_cache = self.num_kvcache_blocks, self.kv_cache.shape[2], self.block_size
        json.dump([*of_cache, torch.get_num_threads(), batch_buckets(self.config.max_num_seqs)], file)
    loop(self, next_step)
ModelRunner.loop = loop_and_tell
worker.main()
"""


def test_every_rank_has_the_blocks_of_the_poorest_the_same_graphs_and_its_share_of_cores(qwen3, monkeypatch, tmp_path):
    with qwen3.llm() as alone:
        rank_bytes = alone.model_runner.block_bytes // 2
    free_bytes = int(50.5 * rank_bytes * 2 / kv_cache.CPU_CACHE_SHARE)  # for 50 blocks on each of two ranks
    (tmp_path / "worker.py").write_text(WORKER.format(settings=json.dumps([free_bytes, str(tmp_path / "told")])))
    broken_rank.start_workers_with_it(monkeypatch.setattr, str(tmp_path / "worker.py"))
    monkeypatch.setattr(kv_cache, "free_ram_bytes", lambda: 10 * free_bytes)
    monkeypatch.setattr(threads, "num_cores", lambda: 6)  # so that a third is something else than one
    num_threads = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with qwen3.llm(tensor_parallel_size=2, num_kvcache_blocks=-1, max_num_seqs=64) as llm:
            assert llm.model_runner.num_kvcache_blocks == llm.block_manager.num_blocks == 50
            wait_until((tmp_path / "told").exists)
            prompts = many_prompts(3, seed=8)
            seen = set()

            def watched(run: Any) -> Any:
                return lambda *args: seen.add(torch.get_num_threads()) or run(*args)

            with replaced(llm.model_runner, "run_model", watched):
                assert_matches(qwen3, prompts, llm.generate(prompts, greedy(8), use_tqdm=False), 8)
            assert seen == {3}
            assert torch.get_num_threads() == 6, "the rest of the program is not the engine's"
            told = json.loads((tmp_path / "told").read_text())
            assert told == [50, 51, llm.config.kvcache_block_size, 3, batch_buckets(64)]
    finally:
        torch.set_num_threads(num_threads)


def test_two_engines_at_once_and_one_after_the_other(checkpoints):
    prompts = many_prompts(6, seed=6)
    with checkpoints("qwen3").llm(tensor_parallel_size=2) as a, checkpoints("llama").llm(tensor_parallel_size=2) as b:
        for _ in range(2):
            assert_matches(checkpoints("qwen3"), prompts, a.generate(prompts, greedy(10), use_tqdm=False), 10)
            assert_matches(checkpoints("llama"), prompts, b.generate(prompts, greedy(10), use_tqdm=False), 10)
        pids = worker_pids(a) + worker_pids(b)
        a.close()
        assert_matches(checkpoints("llama"), prompts, b.generate(prompts, greedy(10), use_tqdm=False), 10)
        a.close()
    assert_gone(pids)


def test_four_ranks(checkpoints):
    """More ranks than key/value heads, which are held twice."""
    checkpoint, prompts = checkpoints("qwen3"), many_prompts(6, seed=7)
    with checkpoint.llm(tensor_parallel_size=4) as llm:
        assert_matches(checkpoint, prompts, llm.generate(prompts, greedy(12), use_tqdm=False), 12)
        assert llm.model_runner.kv_cache.shape[4] == 1


# ---- what cannot be split ----


@pytest.mark.parametrize(
    ("size", "message"),
    [(3, "num_attention_heads, 4"), (8, "num_attention_heads, 4"), (0, "tensor_parallel_size"), (2.0, "tensor_par")],
)
def test_sizes_that_do_not_divide_are_refused_before_any_process_starts(qwen3, monkeypatch, size, message):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises((TypeError, ValueError), match=message):
        qwen3.llm(tensor_parallel_size=size)


def test_what_can_be_split():
    class Config:
        num_attention_heads, num_key_value_heads, intermediate_size, vocab_size = 12, 3, 24, 293

    check_divisible(Config, 3)
    check_divisible(Config, 6)  # each key/value head on two ranks
    with pytest.raises(ValueError, match="num_key_value_heads, 3"):
        check_divisible(Config, 2)
    Config.intermediate_size = 25
    with pytest.raises(ValueError, match="intermediate_size, 25"):
        check_divisible(Config, 3)
    Config.intermediate_size, Config.vocab_size = 24, 8
    with pytest.raises(ValueError, match="vocabulary of 8"):
        check_divisible(Config, 3)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("vocab_size", [64, 65, 293, 1000, 4096, 32000, 49152, 151669, 151936])
def test_every_rank_has_a_part_of_the_vocabulary(vocab_size, size):
    shard = TensorParallel(0, size).vocab_shard(vocab_size)
    parts = [min(shard, vocab_size - rank * shard) for rank in range(size)]
    assert sum(parts) == vocab_size
    assert min(parts) > 0
    assert vocab_size < 64 * size**2 or shard % 64 == 0


# ---- faults: each really happens to a real process ----


def in_the_middle(llm: LLM, act: Callable[[], None], place: Callable[[LLM], tuple[Any, str]] | None = None) -> Any:
    """Within the block the sixth step runs `act`, where it comes to `place`, by default as it begins."""

    def after_a_few_steps(function: Any) -> Any:
        count = iter(range(10**9))

        def watched(*args: Any) -> Any:
            if next(count) == 5:
                act()
            return function(*args)

        return watched

    return replaced(*(place(llm) if place else (llm.scheduler, "schedule")), after_a_few_steps)


def while_generating(llm: LLM, act: Callable[[], None], place: Callable[[LLM], tuple[Any, str]] | None = None) -> None:
    """Run `act` in the middle of a long call."""
    with in_the_middle(llm, act, place):
        llm.generate([[1, 2, 3]] * 3, SamplingParams(max_tokens=250, ignore_eos=True), use_tqdm=False)


def assert_dead_then_a_new_one(checkpoint: Any, llm: LLM, pids: list[int], message: str) -> None:
    for call in (lambda: llm.generate([[1]]), lambda: llm.add_request([1]), llm.step, lambda: list(llm.stream([[1]]))):
        with pytest.raises(EngineDeadError, match=message):
            call()
    assert_gone(pids)
    llm.close()
    llm.close()
    prompts = many_prompts(3, seed=8)
    with checkpoint.llm(tensor_parallel_size=2) as new:
        assert_matches(checkpoint, prompts, new.generate(prompts, greedy(8), use_tqdm=False), 8)


def test_a_worker_is_killed(qwen3):
    llm = qwen3.llm(tensor_parallel_size=2)
    pids = worker_pids(llm)
    with pytest.raises(EngineDeadError, match=r"rank 1 \(process \d+\) ended with exit code -9"):
        while_generating(llm, lambda: os.kill(pids[0], signal.SIGKILL))
    assert_dead_then_a_new_one(qwen3, llm, pids, "exit code -9")


def test_a_worker_is_killed_while_nothing_runs(qwen3):
    llm = qwen3.llm(tensor_parallel_size=2)
    pids = worker_pids(llm)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="exit code -9"):
        llm.generate([[1, 2, 3]], use_tqdm=False)
    llm.close()
    assert_gone(pids)


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_ranks_share_is_given_back_when_nobody_uses_it_any_more(qwen3, is_lost):
    """A lost rank is let go of at once, in the middle of what rank 0 does; memory has to wait until that ends."""
    llm = qwen3.llm(tensor_parallel_size=2)
    pids, communicator, calls = worker_pids(llm), llm.model_runner.workers.communicator, []

    def record(name: str) -> Any:
        return lambda _: lambda: calls.append((name, any(map(is_running, pids))))

    with replaced(communicator, "abort", record("abort")), replaced(communicator, "close", record("close")):
        if is_lost:
            with pytest.raises(EngineDeadError, match="exit code -9"):
                while_generating(llm, lambda: os.kill(pids[0], signal.SIGKILL))
            wait_until(lambda: bool(calls))
            assert set(calls) == {("abort", False)}
        llm.close()
        llm.close()
    assert set(calls) == {("abort", False), ("close", False)}
    assert [name for name, _ in calls].count("close") == 1
    assert calls[0] == ("abort", False)


def test_a_worker_hangs(qwen3):
    llm = qwen3.llm(tensor_parallel_size=2, worker_timeout_s=1.5)
    pids = worker_pids(llm)
    with pytest.raises(EngineDeadError, match=r"has not moved for 1\.5 s, and was killed: exit code -9"):
        while_generating(llm, lambda: os.kill(pids[0], signal.SIGSTOP))
    assert_gone(pids)
    llm.close()


BROKEN_WORKER = """
import os, time
from nanovllm.engine import worker
from nanovllm.layers.linear import RowParallelLinear
count, forward = 0, RowParallelLinear.forward
def breaking(self, x):
    global count
    count += 1
    if count == 21:
        {act}
    return forward(self, x)
RowParallelLinear.forward = breaking
worker.main()
"""


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("time.sleep(600)", r"rank 1 \(process \d+\) has not moved for 1\.5 s, and was killed: exit code -9"),
        ("raise KeyError('a layer')", "ended with exit code 1: KeyError: 'a layer'"),
        # Its standard error is a pipe that nobody reads any more.
        ("r, w = os.pipe(); os.dup2(w, 2); os.close(r); os.close(w); 0 / 0", "exit code 1: ZeroDivisionError: "),
    ],
)
def test_a_worker_hangs_or_raises_inside_a_layer(qwen3, monkeypatch, tmp_path, capfd, act, message):
    """While rank 0 waits for it in a sum, and while all its other threads live."""
    (tmp_path / "worker.py").write_text(BROKEN_WORKER.format(act=act))
    broken_rank.start_workers_with_it(monkeypatch.setattr, str(tmp_path / "worker.py"))
    llm = qwen3.llm(tensor_parallel_size=2, worker_timeout_s=1.5)
    pids = worker_pids(llm)
    with pytest.raises(EngineDeadError, match=message):
        llm.generate([[1, 2, 3]], greedy(50), use_tqdm=False)
    assert_gone(pids)
    llm.close()


def test_a_worker_is_killed_whose_child_lives_on(qwen3, monkeypatch, tmp_path):
    """It has a copy of the worker's side of the socket, at which there is no end then."""
    path = tmp_path / "child"
    act = f"os.fork() or (open({str(path)!r}, 'w').write(f'{{os.getpid()}} '), time.sleep(600))"
    (tmp_path / "worker.py").write_text(BROKEN_WORKER.format(act=act))
    broken_rank.start_workers_with_it(monkeypatch.setattr, str(tmp_path / "worker.py"))
    with qwen3.llm(tensor_parallel_size=2) as llm:
        pids, group = worker_pids(llm), llm.model_runner.workers
        llm.generate([[1, 2, 3]], greedy(50), use_tqdm=False)
        wait_until(lambda: path.exists() and path.read_text().endswith(" "))
        child = int(path.read_text())
        try:
            os.kill(pids[0], signal.SIGKILL)
            wait_until(lambda: group.failure is not None)
            with pytest.raises(EngineDeadError, match="exit code -9"):
                llm.generate([[1, 2, 3]], use_tqdm=False)
            assert is_running(child)
        finally:
            os.kill(child, signal.SIGKILL)
    assert_gone(pids)


def test_an_idle_engine_is_not_taken_for_a_hanging_one(qwen3):
    """Ranks agree on how far they are, whatever was asked for, so that nobody seems to be behind."""
    with qwen3.llm(tensor_parallel_size=2, worker_timeout_s=1.0) as llm:
        params = SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=1, top_p=0.9)
        llm.generate(many_prompts(3), params, use_tqdm=False)
        progress = llm.model_runner.workers.channel.progress
        wait_until(lambda: progress[0] == progress[1])
        assert progress[0] == llm.model_runner.tp.num_steps << 20 > 0
        time.sleep(2.5)
        llm.generate([[1]], greedy(3), use_tqdm=False)


@pytest.mark.parametrize(("sig", "error"), [(signal.SIGTERM, SystemExit(3)), (signal.SIGALRM, TimeoutError("late"))])
def test_what_a_signals_handler_raises_propagates_and_the_ranks_go_on(qwen3, sig, error):
    """As with one rank, where it leaves nobody waiting."""

    def handle(*_: Any) -> None:
        in_step.append("run_model" in {frame.name for frame in traceback.extract_stack()})
        raise error

    in_step: list[bool] = []
    llm = qwen3.llm(tensor_parallel_size=2)
    previous = signal.signal(sig, handle)
    try:
        with pytest.raises(type(error)) as caught:
            while_generating(llm, lambda: os.kill(os.getpid(), sig), lambda llm: (llm.model_runner, "run_model"))
        assert caught.value is error
        assert signal.getsignal(sig) is handle
    finally:
        signal.signal(sig, previous)
    assert in_step == [False]
    prompts = many_prompts(3, seed=8)
    assert_matches(qwen3, prompts, llm.generate(prompts, greedy(8), use_tqdm=False), 8)
    llm.close()


def test_an_exit_within_a_step_propagates(qwen3):
    """The program's `except Exception` must not catch it; the ranks are lost."""
    llm = qwen3.llm(tensor_parallel_size=2)
    pids = worker_pids(llm)
    with pytest.raises(SystemExit) as caught:
        while_generating(llm, lambda: sys.exit(3), lambda llm: (llm.model_runner, "run_model"))
    assert caught.value.code == 3
    with pytest.raises(EngineDeadError, match="rank 0 failed in a step: SystemExit: 3"):
        llm.generate([[1]], use_tqdm=False)
    assert_gone(pids)
    llm.close()


def test_a_worker_is_killed_where_nobody_waits_for_processes(qwen3):
    """As some daemons set it up: then the system tells no one how a process ended, and `Popen` says 0."""
    llm = qwen3.llm(tensor_parallel_size=2)
    pids, previous = worker_pids(llm), signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(EngineDeadError, match=rf"rank 1 \(process {pids[0]}\) ended with an unknown exit code"):
            while_generating(llm, lambda: os.kill(pids[0], signal.SIGKILL))
        llm.close()
    finally:
        signal.signal(signal.SIGCHLD, previous)
    assert_gone(pids)


def test_an_exception_in_a_workers_step(qwen3, capfd):
    """Here for a step that is not the next one, which only the worker is told."""
    llm = qwen3.llm(tensor_parallel_size=2)
    pids = worker_pids(llm)

    def lie(send: Any) -> Any:
        def sends(step: Any) -> bytes:
            told = send(step)
            channel = llm.model_runner.workers.channel
            channel.slots[(channel.num_sent - 1) % len(channel.slots), 1] = 77
            return told

        return sends

    with (
        replaced(llm.model_runner.workers.channel, "send", lie),
        pytest.raises(EngineDeadError, match="exit code 1: ValueError: step 1: the channel holds number 77"),
    ):
        llm.generate([[1, 2, 3]], use_tqdm=False)
    assert "Traceback" in capfd.readouterr().err  # where it happened is told as well
    assert_gone(pids)
    llm.close()


def test_an_exception_in_rank_0s_step(qwen3):
    llm = qwen3.llm(tensor_parallel_size=2)
    pids = worker_pids(llm)

    def fail(_: Any) -> Any:
        def fails(*args: Any) -> Any:
            raise MemoryError("none left")

        return fails

    with replaced(llm.model_runner, "run_model", fail), pytest.raises(EngineDeadError, match="MemoryError: none left"):
        llm.generate([[1, 2, 3]], use_tqdm=False)
    assert_dead_then_a_new_one(qwen3, llm, pids, "MemoryError")


def test_a_worker_that_cannot_start(qwen3, monkeypatch):
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen:
        kwargs["env"]["PYTHONPATH"] = "/nowhere"
        kwargs["cwd"] = "/"
        started.append(popen([sys.executable, "-S", *args[0][1:]], **kwargs))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(EngineDeadError, match=r"rank 1 .* ended with exit code 1"):
        qwen3.llm(tensor_parallel_size=2)
    assert_gone([process.pid for process in started])


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen]:
    """Every process that is started from here."""
    processes: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen:
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return processes


def test_a_worker_dies_while_the_ranks_meet(qwen3, started, monkeypatch):
    """Rank 0 would wait for it in there for ever."""
    is_over = threading.Event()

    def wait_for_nobody(*args: Any) -> TensorParallel:
        started[0].kill()
        assert is_over.wait(HANGING_S)
        raise RuntimeError("nobody came")

    monkeypatch.setattr(worker_group, "connect", wait_for_nobody)
    with pytest.raises(EngineDeadError, match="exit code -9"):
        qwen3.llm(tensor_parallel_size=2)
    is_over.set()
    for thread in threading.enumerate():
        if thread.name == "nanovllm-connect":
            thread.join()
    assert_gone([process.pid for process in started])


def test_a_worker_dies_before_the_ranks_meet(qwen3, started, monkeypatch):
    """It has said that it is ready. Rank 0 must not wait for the file that is gone, as torch's store would."""

    def failing(*_: Any) -> None:
        raise AssertionError("it waits for five minutes, and nothing else can run")

    def kill_and_connect(*args: Any) -> TensorParallel:
        started[0].kill()
        os.waitid(os.P_PID, started[0].pid, os.WEXITED | os.WNOWAIT)
        return connect(*args)

    connect = worker_group.connect
    monkeypatch.setattr(worker_group, "connect", kill_and_connect)
    monkeypatch.setattr(torch.distributed, "FileStore", failing)
    with pytest.raises(EngineDeadError, match="exit code -9"):
        qwen3.llm(tensor_parallel_size=2)
    assert_gone([process.pid for process in started])


def test_a_worker_dies_while_the_cache_is_sized(qwen3, started):
    """Rank 0 may hear of it from gloo first."""

    def kill(choose: Any) -> Any:
        def chosen(runner: ModelRunner) -> int:
            started[0].kill()
            return choose(runner)

        return chosen

    with replaced(ModelRunner, "_choose_num_blocks", kill), pytest.raises(EngineDeadError, match="exit code -9"):
        qwen3.llm(tensor_parallel_size=2, num_kvcache_blocks=-1)
    assert_gone([process.pid for process in started])


def test_what_only_a_worker_refuses_is_known_at_the_start(qwen3, started):
    """As a second GPU with less free memory would, after rank 0 has all it needs."""
    with (
        replaced(ModelRunner, "_choose_num_blocks", lambda _: lambda runner: 20),
        replaced(model_runner, "check_cache_fits", lambda _: lambda *args: None),
        pytest.raises(EngineDeadError, match="exit code 1: ValueError: num_kvcache_blocks=2147483647"),
    ):
        qwen3.llm(tensor_parallel_size=2, num_kvcache_blocks=2**31 - 1)
    assert_gone([process.pid for process in started])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_all_ranks_refuse_is_no_death(qwen3, started, num_ranks):
    with pytest.raises(ValueError, match="num_kvcache_blocks=2147483647"):
        qwen3.llm(tensor_parallel_size=num_ranks, num_kvcache_blocks=2**31 - 1)
    assert len(started) == num_ranks - 1
    assert_gone([process.pid for process in started])


def test_what_an_aborted_communicator_leaves_is_no_number_of_blocks(qwen3, started):
    """NCCL's abort raises nothing: what was to be gathered is whatever lay there."""

    def kill(gather: Any) -> Any:
        def gathered(tp: TensorParallel, tensor: torch.Tensor) -> torch.Tensor:
            started[0].kill()
            return torch.zeros(2, *tensor.shape, dtype=tensor.dtype)

        return gathered

    with replaced(TensorParallel, "all_gather", kill), pytest.raises(EngineDeadError, match="exit code -9"):
        qwen3.llm(tensor_parallel_size=2, num_kvcache_blocks=-1)


def test_a_worker_that_hangs_while_it_starts(qwen3, started, monkeypatch):
    """As a driver may that it waits for; it has more time than in a step."""
    monkeypatch.setattr(worker_group, "START_PATIENCE", 2)
    popen = subprocess.Popen

    def stop(*args: Any, **kwargs: Any) -> subprocess.Popen:
        process = popen(*args, **kwargs)
        os.kill(process.pid, signal.SIGSTOP)
        return process

    monkeypatch.setattr(subprocess, "Popen", stop)
    with pytest.raises(EngineDeadError, match=r"rank 1 .* has not moved for 2 s, and was killed: exit code -9"):
        qwen3.llm(tensor_parallel_size=2, worker_timeout_s=1.0)
    assert started
    assert_gone([process.pid for process in started])


def test_modules_are_found_where_rank_0_finds_them(qwen3, tmp_path):
    """The package may lie beside others that are called as the standard library's are."""
    (tmp_path / "nanovllm").symlink_to(Path(worker_group.__file__).parents[1])
    (tmp_path / "asyncio.py").write_text("raise SystemExit('not this one')")
    script = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(next(i for i, path in enumerate(sys.path) if path.endswith("-packages")), {str(tmp_path)!r})
import nanovllm
assert nanovllm.__file__.startswith({str(tmp_path)!r})
sys.path.insert(0, Path("/tmp"))  # a mistake, of which Python says nothing
llm = nanovllm.LLM({str(qwen3.path)!r}, tensor_parallel_size=2, **{OPTIONS!r})
print(llm.generate([[1, 2]], nanovllm.SamplingParams(max_tokens=3), use_tqdm=False)[0]["token_ids"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd="/", env=environment, capture_output=True, text=True, timeout=HANGING_S
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("[")


def test_modules_of_the_current_directory_get_in_nobodys_way(qwen3, monkeypatch, tmp_path):
    """Neither where PYTHONSAFEPATH means nothing yet, before Python 3.11."""
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen:
        del kwargs["env"]["PYTHONSAFEPATH"]
        return popen(*args, **kwargs)

    for name in ("ctypes", "json", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    with qwen3.llm(tensor_parallel_size=2) as llm:
        assert len(llm.generate([[1, 2]], greedy(3), use_tqdm=False)[0]["token_ids"]) == 3


def test_of_four_ranks_the_one_that_was_killed_is_named(qwen3):
    """Survivors fail because of it, and may be seen first."""
    llm = qwen3.llm(tensor_parallel_size=4)
    pids = worker_pids(llm)
    with pytest.raises(EngineDeadError, match=rf"rank 3 \(process {pids[2]}\) ended with exit code -9") as caught:
        while_generating(llm, lambda: os.kill(pids[2], signal.SIGKILL))
    assert str(caught.value).startswith("rank 3")
    assert_gone(pids)
    llm.close()


def test_an_exception_while_a_worker_is_waited_for_at_the_end(qwen3):
    """As a handler of SIGTERM raises it: what is left to do is done all the same."""
    llm = qwen3.llm(tensor_parallel_size=2)
    pids, group = worker_pids(llm), llm.model_runner.workers
    os.kill(pids[0], signal.SIGSTOP)  # it cannot end by itself

    def leave(wait: Any) -> Any:
        def waits(*args: Any, **kwargs: Any) -> Any:
            if not left:
                left.append(True)
                raise SystemExit(3)
            return wait(*args, **kwargs)

        return waits

    left: list[bool] = []
    with replaced(group.members[0].process, "wait", leave), pytest.raises(SystemExit):
        llm.close()
    assert left
    assert not [pid for pid in pids if is_running(pid)]
    assert all(worker.socket.fileno() == -1 for worker in group.members)
    llm.close()


def test_ctrl_c_while_the_engine_is_not_yet_the_users(qwen3, started, monkeypatch):
    """The ranks are there and nobody has registered how they end."""

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_core, "weakref", types.SimpleNamespace(finalize=interrupted))
    with pytest.raises(KeyboardInterrupt):
        qwen3.llm(tensor_parallel_size=2)
    gc.collect()
    assert started
    assert_gone([process.pid for process in started])


def test_ctrl_c_while_a_worker_is_waited_for_at_the_end(qwen3):
    llm = qwen3.llm(tensor_parallel_size=2)
    pids = worker_pids(llm)
    os.kill(pids[0], signal.SIGSTOP)  # it cannot end by itself

    def strike(wait: Any) -> Any:
        def waits(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return wait(*args, **kwargs)

        return waits

    with replaced(llm.model_runner.workers.members[0].process, "wait", strike), pytest.raises(KeyboardInterrupt):
        llm.close()
    assert not [pid for pid in pids if is_running(pid)]
    assert not hasattr(llm.model_runner, "kv_cache")


def test_the_garbage_collector_ends_ranks_from_any_thread(qwen3):
    """Also from the one that watches over them."""
    llm = qwen3.llm(tensor_parallel_size=2)
    group = llm.model_runner.workers
    pids, errors = worker_pids(llm), []

    def collect(describe: Any) -> Any:
        def described(*args: Any) -> str:
            try:
                assert threading.current_thread() is group._watcher
                group.stop()
            except BaseException as error:
                errors.append(error)
            return describe(*args)

        return described

    with replaced(group, "_describe", collect):
        os.kill(pids[0], signal.SIGKILL)
        group._watcher.join(HANGING_S)
    assert not group._watcher.is_alive()
    assert not errors
    assert all(worker.socket.fileno() == -1 for worker in group.members)
    llm.close()
    assert_gone(pids)


def test_nothing_of_an_engine_stays_in_the_process(qwen3, monkeypatch):
    """Neither descriptors nor threads, those that Python knows nothing of included; also after a failed start."""

    def num_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def thread_ids() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    qwen3.llm(tensor_parallel_size=2).close()  # the first use of gloo may keep something
    files_before, threads_before = num_files(), thread_ids()
    engines = []
    for _ in range(3):
        engines.append(qwen3.llm(tensor_parallel_size=2))  # kept: closed is closed
        assert thread_ids() - threads_before
        engines[-1].generate([[1, 2, 3]], greedy(3), use_tqdm=False)
        engines[-1].close()
        assert num_files() == files_before
        wait_until(lambda: thread_ids() <= threads_before)  # the system takes its time with those that were joined

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", fail)
    for _ in range(3):
        with pytest.raises(OSError, match="no more processes"):
            qwen3.llm(tensor_parallel_size=2)
    assert num_files() == files_before
    wait_until(lambda: thread_ids() <= threads_before)


def test_threads_are_as_many_as_before_after_a_step():
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        assert threads.share_of_cores(2) == min(7, max(1, threads.num_cores() // 2))
        with threads.limited_threads(3):
            assert torch.get_num_threads() == 3
            with contextlib.suppress(ZeroDivisionError), threads.limited_threads(2):
                assert torch.get_num_threads() == 2
                raise ZeroDivisionError
            assert torch.get_num_threads() == 3
            with threads.limited_threads(None):
                assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 7
        torch.set_num_threads(1)  # by the user, or OMP_NUM_THREADS: not more on any rank
        assert threads.share_of_cores(2) == 1
    finally:
        torch.set_num_threads(before)


def test_made_in_one_thread_and_used_and_closed_in_another(qwen3, monkeypatch):
    """As AsyncLLM does it. How many threads torch computes with is a setting of each."""
    monkeypatch.setattr(threads, "num_cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        llm, prompts = qwen3.llm(tensor_parallel_size=2), many_prompts(2, seed=3)
        with ThreadPoolExecutor(1) as executor:
            outputs = executor.submit(llm.generate, prompts, greedy(5), use_tqdm=False).result(HANGING_S)
            executor.submit(llm.close).result(HANGING_S)
            assert executor.submit(torch.get_num_threads).result(HANGING_S) == 2
        assert_matches(qwen3, prompts, outputs, 5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_in_a_process_with_many_files(qwen3):
    """Descriptors beyond 1023, which `select` cannot wait for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
        for _ in range(1100):
            held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        with qwen3.llm(tensor_parallel_size=2) as llm:
            assert min(worker.socket.fileno() for worker in llm.model_runner.workers.members) > 1023
            pids = worker_pids(llm)
            with pytest.raises(EngineDeadError, match="exit code -9"):
                while_generating(llm, lambda: os.kill(pids[0], signal.SIGKILL))


def test_numbers_of_numpy(qwen3):
    options: dict[str, Any] = {"tensor_parallel_size": np.int64(2), "gpu_memory_utilization": np.float32(0.5)}
    with qwen3.llm(**options) as llm:
        assert len(llm.generate([[1, 2, 3]], greedy(3), use_tqdm=False)[0]["token_ids"]) == 3


def test_an_abort_does_not_hold_up_who_calls_nccl(monkeypatch):
    """The abort waits for captured graphs, and who has them may be at its next call."""
    is_waiting, may_end = threading.Event(), threading.Event()

    class Library:
        def ncclCommAbort(self, comm: Any) -> int:
            is_waiting.set()
            assert may_end.wait(HANGING_S)
            return 0

    monkeypatch.setattr(nccl, "nccl", Library)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    communicator = nccl.NcclCommunicator.__new__(nccl.NcclCommunicator)
    communicator.comm, communicator._lock = object(), threading.Lock()
    thread = threading.Thread(target=communicator.abort)
    thread.start()
    assert is_waiting.wait(HANGING_S)
    with pytest.raises(RuntimeError, match="aborted"):
        communicator.all_reduce(torch.zeros(3))
    may_end.set()
    thread.join()


@pytest.mark.parametrize("given", [None, "eth7"])
def test_nccl_meets_on_this_host_and_leaves_the_environment_alone(monkeypatch, given):
    seen = []

    class Library:
        def ncclGetUniqueId(self, unique_id: Any) -> int:
            seen.append(os.environ.get("NCCL_SOCKET_IFNAME"))
            return 0

        def ncclCommInitRank(self, *args: Any) -> int:
            return self.ncclGetUniqueId(None)

    monkeypatch.setattr(nccl, "nccl", Library)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    if given:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", given)
    nccl.NcclCommunicator(nccl.make_unique_id(), 0, 2)
    assert seen == [given or "lo"] * 2
    assert os.environ.get("NCCL_SOCKET_IFNAME") == given


@pytest.mark.parametrize(("version", "name"), [("11.8", "so.11.0"), ("12.6", "so.12"), ("13.0", "so.13")])
def test_cudas_runtime_is_found_beside_torch(monkeypatch, tmp_path, version, name):
    path = tmp_path / "nvidia" / "of_cuda" / "lib" / f"libcudart.{name}"
    path.parent.mkdir(parents=True)

    def load(name: str) -> Any:
        if name != str(path) or not path.exists():
            raise OSError("no such file")
        return types.SimpleNamespace(cudaGetErrorString=types.SimpleNamespace())

    monkeypatch.setattr(torch, "__path__", [str(tmp_path / "torch")])
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(RuntimeError, match=f"{path.name}, which tensor_parallel_size > 1 uses"):
        peer_memory.cudart.__wrapped__()
    path.touch()
    assert peer_memory.cudart.__wrapped__().cudaGetErrorString.restype == ctypes.c_char_p


def test_the_asyncio_engine(qwen3):
    """Its thread steps the ranks; a lost one reaches every task, and closing is as ever."""
    prompts = many_prompts(4, seed=11)

    async def complete(llm: AsyncLLM, prompt: list[int], num_tokens: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return [token for delta in [d async for d in llm.generate(prompt, params)] for token in delta.token_ids]

    async def main() -> tuple[list[list[int]], list[Any], list[int]]:
        async with AsyncLLM(str(qwen3.path), tensor_parallel_size=2, **OPTIONS) as llm:
            pids = worker_pids(llm.llm)
            texts = await asyncio.gather(*(complete(llm, prompt, 10) for prompt in prompts))
            with in_the_middle(llm.llm, lambda: os.kill(pids[0], signal.SIGKILL)):
                long = [complete(llm, prompt, 150) for prompt in prompts]
                return texts, await asyncio.gather(*long, return_exceptions=True), pids

    texts, errors, pids = asyncio.run(main())
    assert_gone(pids)
    with qwen3.llm() as llm:
        assert texts == [o["token_ids"] for o in llm.generate(prompts, greedy(10), use_tqdm=False)]
    assert [type(error) for error in errors] == [EngineDeadError] * 4
    assert all("exit code -9" in str(error) for error in errors)


def test_ctrl_c(qwen3):
    """It reaches rank 0 alone, as KeyboardInterrupt; the call's requests are gone, the engine and its ranks are not."""
    prompts = many_prompts(5, seed=9)
    places: list[Callable[[LLM], tuple[Any, str]]] = [
        lambda llm: (llm.scheduler, "schedule"),
        lambda llm: (llm.model_runner.workers.channel, "send"),  # here and there the other rank would be left waiting
        lambda llm: (llm.model_runner, "run_model"),
        lambda llm: (PendingTokens, "wait"),
        lambda llm: (llm.scheduler, "postprocess"),
    ]
    with qwen3.llm(tensor_parallel_size=2) as llm:
        for place in places:
            with pytest.raises(KeyboardInterrupt):
                while_generating(llm, lambda: os.kill(os.getpid(), signal.SIGINT), place)
            assert_idle(llm)
            assert_matches(qwen3, prompts, llm.generate(prompts, greedy(12), use_tqdm=False), 12)
        os.kill(worker_pids(llm)[0], signal.SIGINT)  # as a terminal would, if it could
        assert_matches(qwen3, prompts, llm.generate(prompts, greedy(12), use_tqdm=False), 12)


def test_what_is_waited_for_at_the_end():
    """No process survives the engine by five seconds; what takes longer than this on a slow machine is work."""
    assert worker_group.END_S + 5 * worker_group.POLL_S < 5


def test_nothing_has_a_name(qwen3):
    """Memory that the ranks share: none is in /dev/shm, or System V's, where it could outlive them."""
    with qwen3.llm(tensor_parallel_size=2) as llm:
        llm.generate([[1, 2, 3]], greedy(3), use_tqdm=False)
        for pid in (os.getpid(), *worker_pids(llm)):
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            assert any(line.endswith("/memfd:nanovllm (deleted)") for line in maps)
            assert not [line for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")]
            assert not [line for line in maps if "/SYSV" in line]


LOOPBACK = "0100007F"  # 127.0.0.1, as the kernel prints it


def tcp_sockets(pid: int) -> dict[str, tuple[str, str]]:
    """By inode, of each that a process has open: its address and its peer's, which is all zeros if it listens."""
    inodes, found = set(), {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines():
            _, local, remote, *others = line.split()
            if others[6] in inodes:
                found[others[6]] = local.partition(":")[0], remote.partition(":")[0]
    return found


def test_ranks_meet_in_private(qwen3):
    """In a file that has no name, and then over the loopback interface alone."""
    stores = []

    def watched(connect: Any) -> Any:
        def wrapped(boot: dict[str, Any], *args: Any) -> Any:
            found = connect(boot, *args)
            stores.append(os.stat(boot["store"]))
            return found

        return wrapped

    before = tcp_sockets(os.getpid())
    with replaced(worker_group, "connect", watched), qwen3.llm(tensor_parallel_size=2) as llm:
        (store,) = stores
        assert store.st_nlink == 0
        assert store.st_size, "they met elsewhere"
        llm.generate([[1, 2, 3]], greedy(3), use_tqdm=False)
        for pid in (os.getpid(), *worker_pids(llm)):
            peers = {pair for inode, pair in tcp_sockets(pid).items() if inode not in before}
            assert (LOOPBACK, LOOPBACK) in peers, "they speak through something else"
            assert peers <= {(LOOPBACK, LOOPBACK), (LOOPBACK, "00000000")}


def test_what_outlives_an_engine_writes_into_nobodys_files(qwen3, tmp_path):
    """torch's FileStore opens its file by name once more when it is destroyed."""
    llm = qwen3.llm(tensor_parallel_size=2)
    ranks, store = llm.model_runner.tp, llm.model_runner.workers.store
    llm.close()
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    with contextlib.ExitStack() as files:
        while store not in {files.enter_context(path.open("r+b")).fileno() for _ in range(20)}:
            pass
        del llm, ranks
        gc.collect()
    assert path.read_bytes() == b"hello"


def test_no_thread_can_be_started(qwen3, monkeypatch):
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            qwen3.llm(tensor_parallel_size=2)
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_del(qwen3):
    llm = qwen3.llm(tensor_parallel_size=2)
    pids = worker_pids(llm)
    assert all(map(is_running, pids))
    del llm
    gc.collect()
    assert_gone(pids)


def test_workers_end_by_themselves(qwen3, monkeypatch):
    """Also where a fork of this process holds copies of their sockets."""
    monkeypatch.setattr(worker_group, "END_S", HANGING_S)
    llm = qwen3.llm(tensor_parallel_size=2)
    group = llm.model_runner.workers
    copies = [os.dup(worker.socket.fileno()) for worker in group.members]
    llm.close()
    for copy in copies:
        os.close(copy)
    assert [worker.process.returncode for worker in group.members] == [0]


def test_an_idle_worker_sleeps(qwen3):
    with qwen3.llm(tensor_parallel_size=2) as llm:
        llm.generate([[1, 2, 3]], use_tqdm=False)
        pid = worker_pids(llm)[0]

        def cpu_s() -> float:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        time.sleep(0.3)
        before = cpu_s()
        time.sleep(1.5)
        assert cpu_s() - before < 0.5


# ---- programs ----

PROGRAM = """
import sys, time
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, device="cpu", max_model_len=256, kvcache_block_size=16,
          num_kvcache_blocks=64, max_num_seqs=8)
print(llm.model_runner.workers.members[0].process.pid, flush=True)
print(llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
      [0]["token_ids"], flush=True)
"""
SLEEP = "time.sleep(600)\n"


@contextlib.contextmanager
def program(code: str, checkpoint: Any) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", code, str(checkpoint.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_script_without_a_main_guard_and_the_interpreters_exit(qwen3, tmp_path):
    """Also from a directory of its own, whose files must not get in the way of the worker's imports."""
    (tmp_path / "script.py").write_text(PROGRAM)
    if sys.version_info >= (3, 11):  # before, the script itself imports it
        (tmp_path / "json.py").write_text("raise ImportError('not the one')")
    (tmp_path / "script.py").chmod(0o644)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(qwen3.path)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}, cwd=tmp_path,
    )  # fmt: skip
    out, _ = process.communicate(timeout=HANGING_S)
    assert process.returncode == 0
    pid, answer = out.splitlines()
    with qwen3.llm() as llm:
        assert answer == str(llm.generate([[1, 2, 3]], greedy(5), use_tqdm=False)[0]["token_ids"])
    assert_gone([int(pid)])


STREAMS = """
import json, os
output, = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
process = llm.model_runner.workers.members[0].process
streams = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
with open(sys.argv[2], "w") as file:
    json.dump([output["token_ids"], streams], file)
"""


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_are_closed(qwen3, tmp_path, closed):
    """As of some daemons: what workers inherit, or open, must not get a number where they have a stream."""
    script = f'exec "$0" -c "$1" "$2" "$3" {closed}'
    path = tmp_path / "said"
    command = ["sh", "-c", script, sys.executable, PROGRAM + STREAMS, str(qwen3.path), str(path)]
    process = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=HANGING_S)
    assert process.returncode == 0
    token_ids, streams = json.loads(path.read_text())
    with qwen3.llm() as llm:
        assert token_ids == llm.generate([[1, 2, 3]], greedy(5), use_tqdm=False)[0]["token_ids"]
    assert not [name for name in streams if "memfd" in name]
    assert closed == "<&-" or streams[2] == os.devnull


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_rank_0s_process_ends_from_outside(qwen3, sig):
    with program(PROGRAM + SLEEP, qwen3) as process:
        pid = int(process.stdout.readline())
        process.stdout.readline()
        assert is_running(pid)
        process.send_signal(sig)
        process.wait(timeout=HANGING_S)
        assert_gone([pid])


FORK = """
import os
child = os.fork()
if child == 0:
    try:
        llm.generate([[1, 2, 3]], use_tqdm=False)
    except BaseException as error:
        print(f"{type(error).__name__}\\n", end="", flush=True)  # at once, also with PYTHONUNBUFFERED
    time.sleep(600)
print(f"{child}\\n", end="", flush=True)
time.sleep(600)
"""


def test_a_fork_of_rank_0s_process(qwen3):
    """It cannot use the ranks, and they do not live on for it."""
    with program(PROGRAM + FORK, qwen3) as process:
        pid = int(process.stdout.readline())
        process.stdout.readline()
        said = sorted(process.stdout.readline().strip() for _ in range(2))
        assert said[1] == "EngineDeadError"
        child = int(said[0])
        try:
            assert is_running(pid)
            process.kill()
            process.wait(timeout=HANGING_S)
            assert is_running(child)
            assert_gone([pid])
        finally:
            os.kill(child, signal.SIGKILL)


KILLED_IN_THE_START = """
import os, signal, subprocess, sys, time
from nanovllm import LLM
popen = subprocess.Popen
def start(*args, **kwargs):
    worker = popen(*args, **kwargs)
    print(worker.pid, flush=True)
    return worker
subprocess.Popen = start
LLM(sys.argv[1], tensor_parallel_size=2, device="cpu", num_kvcache_blocks=64)
time.sleep(600)
"""


def test_rank_0_is_killed_while_a_worker_imports(qwen3):
    """Then no thread of the worker's looks after anything."""
    with program(KILLED_IN_THE_START, qwen3) as process:
        pid = int(process.stdout.readline())
        maps = Path(f"/proc/{pid}/maps")
        wait_until(lambda: "/libc10" in maps.read_text())  # of torch
        os.kill(pid, signal.SIGSTOP)  # so that it does not come any further
        assert "memfd:nanovllm" not in maps.read_text()
        process.kill()
        process.wait(timeout=HANGING_S)
        assert_gone([pid])


def test_rank_0_is_killed_while_a_worker_is_stopped(qwen3):
    with program(PROGRAM + SLEEP, qwen3) as process:
        pid = int(process.stdout.readline())
        process.stdout.readline()
        os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait(timeout=HANGING_S)
        assert_gone([pid])


FORK_IN_THE_START = """
import os, signal, subprocess, sys, time
from nanovllm import LLM
popen = subprocess.Popen
def start(*args, **kwargs):
    worker = popen(*args, **kwargs)
    child = os.fork()
    if child == 0:
        time.sleep(600)
    print(f"{worker.pid} {child}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
subprocess.Popen = start
LLM(sys.argv[1], tensor_parallel_size=2, device="cpu", num_kvcache_blocks=64)
"""


def test_a_fork_outlives_rank_0_that_is_killed_while_it_starts(qwen3):
    """A worker may have had another parent before its first line runs, and the fork has all that rank 0 had."""
    with program(FORK_IN_THE_START, qwen3) as process:
        pid, child = map(int, process.stdout.readline().split())
        try:
            process.wait(timeout=HANGING_S)
            assert is_running(child)
            assert_gone([pid])
        finally:
            os.kill(child, signal.SIGKILL)


SIGPIPE = """
import os, signal
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
group = llm.model_runner.workers
worker = group.members[0]
os.kill(worker.process.pid, signal.SIGKILL)
worker.process.wait()
os.write(worker.bell, b"0")  # as a step does that comes before the death is known. Not a step: gloo may write as well
while group.failure is None:
    time.sleep(0.01)
try:
    llm.generate([[1, 2, 3]], use_tqdm=False)
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
llm.close()
"""


def test_a_worker_dies_where_a_broken_pipe_is_deadly(qwen3):
    """As in programs for the command line, which end so when their reader does."""
    with program(PROGRAM + SIGPIPE, qwen3) as process:
        said = process.communicate(timeout=HANGING_S)[0].splitlines()
    assert process.returncode == 0
    assert re.fullmatch(r"EngineDeadError: rank 1 .*exit code -9", said[-1])


def test_a_directory_that_is_gone_costs_no_descriptors(qwen3, monkeypatch):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(os, "getcwd", lambda: (_ for _ in ()).throw(FileNotFoundError(2, "No such file or directory")))
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            qwen3.llm(tensor_parallel_size=2)
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_in_a_notebook(qwen3):
    """A kernel has an event loop, threads and no file of its own."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cell = PROGRAM.replace("sys.argv[1]", repr(str(qwen3.path)))
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell), nbformat.v4.new_code_cell("llm.close()")]
    )
    nbclient.NotebookClient(notebook, timeout=HANGING_S, startup_timeout=HANGING_S, kernel_name="python3").execute()
    text = "".join(output.get("text", "") for output in notebook.cells[0].outputs if output.get("name") == "stdout")
    pid, answer = text.splitlines()
    assert len(eval(answer)) == 5
    assert_gone([int(pid)])


# ---- the channel ----


def test_the_largest_step_fits(qwen3):
    """512 sequences that come with 39,998 cached tokens each, in one step of a token and its log probability each."""
    max_seqs, block_size, length = 512, 16, 40000
    seqs = []
    for row in range(max_seqs):
        seq = Sequence([1] * length, SamplingParams(prompt_logprobs=1), length + 1, block_size)
        seq.block_table = [row * 2500 + i for i in range(2500)]
        seq.row, seq.num_scheduled_tokens, seq.num_cached_tokens = row, 1, length - 2
        seqs.append(seq)
    step = batch.prepare_prefill(seqs)
    assert step.num_updates == 512 * 2500
    assert step.num_logprob_runs == 512
    size = max_step_size(max_seqs, max_seqs, 2500)
    assert len(step.data) == size
    sender = StepChannel(2, size)
    receiver = StepChannel(2, size, os.dup(sender.fd))
    for _ in range(6):  # more than there are slots
        assert sender.has_room()
        received = receiver.receive(sender.send(step))
        receiver.done(1)
        assert all(getattr(received, name) == getattr(step, name) for name in FIELDS)
        assert (received.data == step.data).all()
    for _ in range(4):
        assert sender.has_room()
        sender.send(step)
    assert not sender.has_room()
    for channel in (sender, receiver):
        os.close(channel.fd)


def test_most_steps_are_the_one_before_once_more(qwen3):
    """Of the same sequences without a new block; not of a prompt, nor of the step after one."""
    prompts = many_prompts(3)
    sent: list[tuple[bytes, Any]] = []

    def noted(send: Any) -> Any:
        def sends(step: Any) -> bytes:
            told = send(step)
            sent.append((told, step))
            return told

        return sends

    with (
        qwen3.llm(tensor_parallel_size=2, kvcache_block_size=16) as llm,
        replaced(llm.model_runner.workers.channel, "send", noted),
    ):
        outputs = llm.generate(prompts, greedy(40), use_tqdm=False)
    assert_matches(qwen3, prompts, outputs, 40)
    again = [step for told, step in sent if told == AGAIN]
    assert not any(step.is_prefill or step.num_updates for step in again)
    assert len(sent) > len(again) > 25


def test_a_step_once_more_is_the_step_that_was_made():
    seqs = []
    for row in (3, 1):
        seq = Sequence([1] * (30 + row), SamplingParams(), 99, 16)
        seq.block_table, seq.row, seq.num_slots, seq.num_device_blocks = [row, row + 4, row + 8], row, 48, 3
        seq.num_cached_tokens = len(seq) - 1
        seqs.append(seq)
    decoding = DecodingSequences(seqs)
    sender = StepChannel(2, 100)
    receiver = StepChannel(2, 100, os.dup(sender.fd))
    told = []
    for number in range(9):
        if number == 5:
            seqs[1].block_table.append(12)  # which `grown` tells of, since nobody has grown after the start
        step = batch.prepare_decode(decoding)
        told.append(sender.send(step))
        received = receiver.receive(told[-1])
        receiver.done(1)
        assert all(getattr(received, name) == getattr(step, name) for name in FIELDS)
        assert (received.data == step.data).all()
        assert step.num_updates == (number == 5)
        for seq in seqs:
            seq.num_cached_tokens, seq.num_tokens = seq.num_tokens, seq.num_tokens + 1
    assert told == [NEW] + 4 * [AGAIN] + 2 * [NEW] + 2 * [AGAIN]
    with pytest.raises(ValueError, match="step 10: told by the byte b'x'"):
        receiver.receive(b"x")
    late = StepChannel(2, 100, os.dup(sender.fd))
    with pytest.raises(ValueError, match="step 1: told"):
        late.receive(AGAIN)
    for channel in (sender, receiver, late):
        os.close(channel.fd)


@pytest.mark.parametrize("ended_by", ["pipe", "socket"])
@pytest.mark.parametrize("pause_s", [0.0, 1.5 * AWAKE_S])
def test_a_rank_gets_each_step_once_whether_it_looks_or_sleeps(pause_s, ended_by):
    seq = Sequence([1, 2], SamplingParams(), 9, 16)
    seq.block_table, seq.row, seq.num_scheduled_tokens = [0], 0, 2
    step = batch.prepare_prefill([seq])
    sender = StepChannel(2, 100)
    receiver = StepChannel(2, 100, os.dup(sender.fd))
    ear, bell = os.pipe()
    ours, theirs = socket.socketpair()
    received: list[int | None] = []

    def receive() -> None:
        next_step = wait_on(ear, theirs, receiver, 1)
        while (step := next_step()) is not None:
            received.append(step.num_tokens)
        received.append(None)

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    for num_tokens in range(9):
        time.sleep(pause_s)
        while not sender.has_room():
            time.sleep(0.001)
        step.num_tokens = num_tokens
        os.write(bell, sender.send(step))
    wait_until(lambda: len(received) == 9)
    time.sleep(pause_s)
    if ended_by == "socket":  # as where a fork holds copies of the pipe's end
        ours.shutdown(socket.SHUT_WR)
    else:
        os.close(bell)
    thread.join(10)
    assert received == [*range(9), None]
    for descriptor in (ear, sender.fd, receiver.fd, *([bell] if ended_by == "socket" else [])):
        os.close(descriptor)
    for sock in (ours, theirs):
        sock.close()


@pytest.mark.parametrize(("field", "value"), [(0, -1), (0, 10**9), (1, 0), (1, 2)])
def test_what_cannot_have_been_sent_is_refused(field, value):
    sender = StepChannel(2, 100)
    receiver = StepChannel(2, 100, os.dup(sender.fd))
    seq = Sequence([1, 2], SamplingParams(), 9, 16)
    seq.block_table, seq.row, seq.num_scheduled_tokens = [0], 0, 2
    sender.send(batch.prepare_prefill([seq]))
    sender.slots[0, field] = value
    with pytest.raises(ValueError, match="step 1"):
        receiver.receive(NEW)
    for channel in (sender, receiver):
        os.close(channel.fd)


@pytest.mark.parametrize("call", [(os, "ftruncate"), (mmap, "mmap")])
def test_memory_that_cannot_be_had_costs_no_descriptors(monkeypatch, call):
    def fail(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(*call, fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        StepChannel(2, 100)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_step_says_all_a_rank_needs_of_random_batches():
    """What a rank makes of the integers are the tensors that rank 0 has."""
    rng = random.Random(3)
    for _ in range(20):
        seqs = []
        for row in rng.sample(range(8), rng.randrange(1, 8)):
            seq = Sequence(random_prompt(rng, rng.randrange(2, 60), VOCAB_SIZE), SamplingParams(), 99, 4, seed=row - 3)
            seq.block_table, seq.row = list(range(row * 20, row * 20 + seq.num_blocks)), row
            seq.num_cached_tokens = rng.randrange(len(seq))
            seq.num_scheduled_tokens = rng.randrange(1, len(seq) - seq.num_cached_tokens + 1)
            seqs.append(seq)
        step = batch.prepare_prefill(seqs)
        made = batch.prefill_batch(step, torch.device("cpu"))
        begin = 0
        for i, seq in enumerate(seqs):
            first, last = seq.num_cached_tokens, seq.num_cached_tokens + seq.num_scheduled_tokens
            end = begin + seq.num_scheduled_tokens
            assert made.cu_seqlens_q[i : i + 2].tolist() == [begin, end]
            assert made.input_ids[begin:end].tolist() == seq.token_ids[first:last]
            assert made.positions[begin:end].tolist() == list(range(first, last))
            assert made.slot_mapping[begin:end].tolist() == [
                seq.block_table[p // 4] * 4 + p % 4 for p in range(first, last)
            ]
            assert (made.rows[i], made.context_lens[i], made.seeds[i]) == (seq.row, last, seq.seed)
            assert made.temperatures[i] == seq.sampling_params.temperature
            begin = end
