"""The engine at its edges: the smallest settings, the longest prompts, and more requests than anybody queues."""

import gc
import random
import sys
import tracemalloc
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Watch, assert_idle, assert_matches, greedy, many_prompts, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import Simulation

from nanovllm import LLM, SamplingParams
from nanovllm.engine.batch import prepare_decode, prepare_prefill
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.request import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_output import PendingTokens, StepOutput

# ---- the smallest settings: the answers stay those of transformers ----


@pytest.mark.parametrize("depth", [0, 1])
def test_one_sequence_at_a_time(qwen3, depth):
    llm = qwen3.llm(max_num_seqs=1)
    llm.depth = depth
    prompts, watch = many_prompts(12), Watch(llm)
    outputs = llm.generate(prompts, greedy(16), use_tqdm=False)
    assert_matches(qwen3, prompts, outputs, 16)
    assert {len(step.seq_ids) for step in watch.steps} <= {0, 1}
    assert_idle(llm)


@pytest.mark.parametrize("depth", [0, 1])
def test_blocks_of_one_token(qwen3, depth):
    """Every token is a full block: shared, registered and evicted one by one; and the pool is short."""
    llm = qwen3.llm(kvcache_block_size=1, num_kvcache_blocks=150, max_num_batched_tokens=48)
    llm.depth = depth
    llm.scheduler.completion_ratio = 0.0  # so that too many are admitted
    shared = many_prompts(1, seed=5)[0][:30]
    prompts = [shared + prompt[:20] for prompt in many_prompts(16)]
    watch = Watch(llm)
    outputs = llm.generate(prompts, greedy(24, ignore_eos=False), use_tqdm=False)
    assert_matches(qwen3, prompts, outputs, 24, eos=llm.config.eos_token_ids)
    assert watch.num_prefix_cached_tokens > 100
    assert watch.num_chunks > 0
    assert watch.num_preemptions > 0
    assert_idle(llm)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pool_of_one_block(qwen3, depth):
    """16 slots, so 17 tokens in all; the requests take turns, and the cache never helps: its one block is in use."""
    llm = qwen3.llm(num_kvcache_blocks=1)
    llm.depth = depth
    prompts = [prompt[:n] for n, prompt in enumerate([p for p in many_prompts(40) if len(p) >= 16][:16], 1)]
    lengths = [17 - len(prompt) for prompt in prompts]
    watch = Watch(llm)
    outputs = llm.generate(prompts, [greedy(n) for n in lengths], use_tqdm=False)
    assert_matches(qwen3, prompts, outputs, lengths)
    assert [len(output["token_ids"]) for output in outputs] == lengths
    assert {len(step.seq_ids) for step in watch.steps} <= {0, 1}
    with pytest.raises(ValueError, match="it needs 2 blocks of KV cache and there are 1"):
        llm.generate([prompts[3]], greedy(14), use_tqdm=False)
    assert_idle(llm)


def test_a_pool_of_one_block_of_one_token(qwen3):
    """The least that can be asked for: one token in, one out, since the last token is never computed."""
    llm = qwen3.llm(num_kvcache_blocks=1, kvcache_block_size=1, max_num_seqs=1, max_num_batched_tokens=1)
    prompts = [[i] for i in range(1, 20)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert_matches(qwen3, prompts, outputs, 1)
    for prompt, params in (([1], greedy(2)), ([1, 2], greedy(1))):
        with pytest.raises(ValueError, match="it needs 2 blocks of KV cache and there are 1"):
            llm.generate([prompt], params, use_tqdm=False)
    assert_idle(llm)


@pytest.mark.parametrize("budget", [7, 512])
def test_a_prompt_of_all_but_one_of_max_model_len(qwen3, budget):
    """It gets its one token, whatever `max_tokens` says; one token more is refused."""
    llm = qwen3.llm(max_model_len=81, num_kvcache_blocks=5, max_num_batched_tokens=budget)
    prompts = [random_prompt(random.Random(i), 80) for i in range(6)]
    watch = Watch(llm)
    for max_tokens in (1, 64, None):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert_matches(qwen3, prompts, outputs, 1)
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert (watch.num_chunks > 0) == (budget == 7)
    with pytest.raises(ValueError, match="81 tokens, and max_model_len=81 leaves no room"):
        llm.generate([[1] * 81], greedy(1), use_tqdm=False)
    assert_idle(llm)


# ---- what can never fit is refused, and everything else ends ----


@settings(max_examples=300, derandomize=True)
@given(
    num_blocks=st.integers(1, 6),
    block_size=st.integers(1, 5),
    max_model_len=st.integers(2, 40),
    requests=st.lists(st.tuples(st.integers(1, 40), st.none() | st.integers(1, 40)), min_size=1, max_size=6),
    depth=st.integers(0, 1),
    budget=st.sampled_from([1, 3, 50]),
)
def test_a_request_is_refused_or_ends(num_blocks, block_size, max_model_len, requests, depth, budget):
    """Refused exactly if its tokens but the last do not fit the whole pool; the error says by how much."""
    processor = InputProcessor.__new__(InputProcessor)
    processor.config = SimpleNamespace(max_model_len=max_model_len, kvcache_block_size=block_size)
    processor.num_blocks = num_blocks
    sim = Simulation(num_blocks, block_size, max_num_seqs=3, budget=budget, depth=depth)
    num_accepted = 0
    for i, (num_prompt, max_tokens) in enumerate(requests):
        prompt = [1 + (i + j) % 7 for j in range(num_prompt)]
        room = max_model_len if max_tokens is None else min(max_model_len, num_prompt + max_tokens)
        needed = -(-(num_prompt if max_tokens is None else room - 1) // block_size)
        params = SamplingParams(max_tokens=max_tokens)
        if num_prompt >= max_model_len:
            with pytest.raises(ValueError, match="leaves no room"):
                processor._max_num_tokens(prompt, params, "prompt")
            continue
        if needed > num_blocks:
            with pytest.raises(ValueError, match=f"needs {needed} blocks of KV cache and there are {num_blocks}"):
                processor._max_num_tokens(prompt, params, "prompt")
            continue
        num_tokens = processor._max_num_tokens(prompt, params, "prompt")
        assert num_prompt < num_tokens <= max_model_len
        sim.add(prompt, num_tokens - num_prompt)
        num_accepted += 1
    sim.run()
    assert len(sim.finished) == num_accepted


# ---- many ----


def count_alive() -> int:
    gc.collect()
    return sum(type(found) in (Request, Sequence) for found in gc.get_objects())


def test_ten_thousand_requests_of_mixed_sizes(qwen3):
    llm = qwen3.llm(num_kvcache_blocks=300, max_num_seqs=128, max_num_batched_tokens=140)
    alive = count_alive()
    llm.generate([[1, 2]], greedy(5), use_tqdm=False)
    assert count_alive() == alive
    rng = random.Random(0)
    different = many_prompts(50)
    prompts = [rng.choice(different) for _ in range(10_000)]
    lengths = [rng.choice([1, 1, 2, 3, 5, 8, 64 if rng.random() < 0.05 else 4]) for _ in prompts]
    params = {n: greedy(n) for n in lengths}
    watch = Watch(llm, check=False)
    outputs = llm.generate(prompts, [params[n] for n in lengths], use_tqdm=False)
    qwen3.answers(different, 64)  # or transformers would be asked for each of the ten thousand
    assert_matches(qwen3, prompts, outputs, lengths)
    assert watch.num_prefix_cached_tokens > 10_000
    assert watch.num_chunks > 20
    assert max(len(step.seq_ids) for step in watch.steps) > 40
    assert len(llm.block_manager._hash_to_block_id) <= 300
    assert_idle(llm)
    del outputs, watch, llm.scheduler.schedule, llm.scheduler.postprocess
    assert count_alive() == alive


class Untouched(deque):
    """A queue whose head, tail and length are all that a step may ask for: everything else takes longer with more."""

    def refuse(self, *args: Any) -> Any:
        raise AssertionError("the whole queue is walked")

    __iter__ = __reversed__ = __contains__ = index = remove = count = copy = insert = rotate = refuse  # type: ignore

    def __getitem__(self, i: Any) -> Any:
        assert i in (0, -1)
        return super().__getitem__(i)


class UntouchedDict(dict):
    def refuse(self, *args: Any) -> Any:
        raise AssertionError("all requests are walked")

    __iter__ = keys = values = items = copy = refuse  # type: ignore[assignment]


def flood(llm: LLM, num_requests: int) -> list[int]:
    """Queue short requests, whose answers are `expected`; from now on the device is a pretence and the host is not."""

    def call(method: str, seqs: list[Sequence], is_prefill: bool) -> PendingTokens:
        assert method == "run"
        step = prepare_prefill(seqs) if is_prefill else prepare_decode(seqs)
        return PendingTokens(step, StepOutput(torch.tensor([1 + sum(seq.prompt_token_ids) % 200 for seq in seqs])))

    llm.model_runner.call = call  # type: ignore[method-assign]
    params = greedy(2)
    return [llm.add_request(prompt(i), params) for i in range(num_requests)]


def prompt(i: int) -> list[int]:
    return [i % 256, i // 256 % 256, i // 65536]


def expected(i: int) -> list[int]:
    return [1 + sum(prompt(i)) % 200] * 2


def calls_per_step(llm: LLM, num_requests: int, num_steps: int) -> list[int]:
    """Functions called in each of the first steps, Python's and C's; C's that could walk a queue are refused."""
    flood(llm, num_requests)
    llm.scheduler.waiting = Untouched(llm.scheduler.waiting)
    llm._requests = UntouchedDict(llm._requests)
    counts = []
    for _ in range(num_steps):
        counts.append(0)

        def profile(frame: Any, event: str, arg: Any) -> None:
            counts[-1] += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            llm.step()
        finally:
            sys.setprofile(None)
    return counts


def peak_bytes(llm: LLM, num_requests: int) -> int:
    """The most that is alive, of what the steps allocate while they work the queue off; checks every answer."""
    ids = flood(llm, num_requests)
    gc.collect()
    tracemalloc.start()
    i = peak = num_steps = 0
    while not llm.is_finished():
        finished, _ = llm.step()
        for request_id, token_ids in finished:  # first come, first served, and all of the same length
            assert request_id == ids[i]
            assert token_ids == expected(i)
            i += 1
        num_steps += 1
        if num_steps % max(num_requests // 200, 1) == 0:
            gc.collect()  # a request and its sequences refer to each other
            peak = max(peak, tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert i == num_requests
    assert_idle(llm)
    return peak


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_costs_the_same_however_many_wait(qwen3, depth):
    counts = []
    gc.disable()  # its callbacks would be counted
    try:
        for num_requests in (100, 100_000):
            llm = qwen3.llm(max_num_seqs=8, num_kvcache_blocks=40)
            llm.depth = depth
            counts.append(calls_per_step(llm, num_requests, 20))
            assert len(llm.scheduler.waiting) < num_requests - 50
    finally:
        gc.enable()
    assert counts[0] == counts[1]
    assert min(counts[0]) > 50


def test_a_stream_costs_the_same_however_many_are_in_it(qwen3, monkeypatch):
    """Functions called for its first hundred deltas, and comparisons of requests when it is left."""
    counts, num_compared = [], 0

    def compare(self: Request, other: object) -> bool:
        nonlocal num_compared
        num_compared += 1
        return self is other

    monkeypatch.setattr(Request, "__eq__", compare)
    gc.disable()  # its callbacks would be counted
    try:
        for num_requests in (100, 3000):
            llm = qwen3.llm(max_num_seqs=8, num_kvcache_blocks=40)
            flood(llm, 0)
            stream = llm.stream([prompt(i) for i in range(num_requests)], greedy(50))
            next(stream)  # queues them
            counts.append(0)

            def profile(frame: Any, event: str, arg: Any) -> None:
                counts[-1] += event in ("call", "c_call")

            sys.setprofile(profile)
            try:
                for _ in range(100):
                    next(stream)
            finally:
                sys.setprofile(None)
            stream.close()
            assert_idle(llm)
    finally:
        gc.enable()
    assert counts[0] == counts[1]
    assert counts[0] > 1000
    assert num_compared == 0


def test_a_hundred_thousand_requests_before_the_first_step(qwen3):
    """All finish, in memory that does not grow with their number."""
    llm = qwen3.llm(max_num_seqs=64, num_kvcache_blocks=100)
    llm.depth = 1
    peak_bytes(llm, 500)  # what is allocated once
    few, many = peak_bytes(llm, 2_000), peak_bytes(llm, 100_000)
    print(few, many)
    assert many - few < 98_000  # less than a byte for each request more
