"""Faults of the model, the device and the checkpoint: each with the reaction that the user was promised."""

import asyncio
import contextlib
import gc
import json
import math
import multiprocessing
import os
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    EOS,
    HANGING_S,
    Checkpoint,
    Watch,
    assert_idle,
    assert_matches,
    check_blocks,
    child_pids,
    copy_checkpoint,
    edit_json,
    greedy,
    make_tokenizer,
    many_prompts,
    random_prompt,
    replaced,
    resident_bytes,
    save_checkpoint,
    wait_until,
)
from safetensors.torch import load_file, save_file

from nanovllm import LLM, AsyncLLM, EngineDeadError, SamplingParams, StructuredOutputsParams
from nanovllm.config import SIZES
from nanovllm.engine import model_runner
from nanovllm.engine.cuda_graph import DecodeGraphs
from nanovllm.engine.input_processor import fold_seed

SMALL = {"device": "cpu", "num_kvcache_blocks": 40, "kvcache_block_size": 16}


def run(llm: LLM, prompts: Any, params: Any) -> list[Any]:
    return llm.generate(prompts, params, use_tqdm=False)


def told(error: BaseException) -> str:
    """All that a traceback shows of `error` itself."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def raising(error: BaseException, after: int = 1) -> Any:
    """Makes of a function one whose `after`-th call raises."""
    count = 0

    def make(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == after:
                raise error
            return function(*args, **kwargs)

        return wrapped

    return make


# ---- an exception in a forward ----

PLACES = [
    lambda llm: (llm.model_runner, "call"),
    lambda llm: (llm.model_runner, "run_model"),
    lambda llm: (model_runner.PendingTokens, "wait"),
]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("place", PLACES, ids=["call", "run_model", "wait"])
@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), KeyError(7), OSError(5, "gone")], ids=repr)
def test_an_exception_names_the_requests_of_its_step(qwen3, error, place, depth):
    """Their blocks are free, the type is what it was, and the next call works."""
    llm = qwen3.llm(num_kvcache_blocks=60, max_num_seqs=3)
    llm.depth = depth
    prompts = many_prompts(5)
    for after in (1, 3):
        if hasattr(error, "__notes__"):
            del error.__notes__
        with replaced(*place(llm), raising(error, after)), pytest.raises(type(error)) as caught:
            run(llm, prompts, greedy(8))
        assert caught.value is error
        assert_idle(llm)
        outputs = run(llm, prompts, greedy(8))
        assert_matches(qwen3, prompts, outputs, 8)
        first = outputs[0].request_id - 5  # three of the five were resident
        assert f"in a step with requests {first}, {first + 1}, {first + 2}" in told(error) or after == 1
        assert f"{first}" in told(error)
        assert str(first + 4) not in told(error).split()


def test_requests_of_others_in_the_failing_step_start_over(qwen3):
    llm = qwen3.llm()
    prompts = many_prompts(4)
    other = llm.add_request(prompts[0], greedy(10))
    llm.step()
    with (
        replaced(llm.model_runner, "run_model", raising(ValueError("odd"), 2)),
        pytest.raises(ValueError, match="odd") as caught,
    ):
        run(llm, prompts[1:], greedy(10))
    assert f"requests {other}, {other + 1}" in told(caught.value)
    assert run(llm, prompts[1:], greedy(10))
    done = {}
    while not llm.is_finished():
        done.update(llm.step()[0])
    assert_matches(qwen3, prompts[:1], [done[other]], 10)
    assert_idle(llm)


def test_many_requests_are_counted(qwen3):
    llm = qwen3.llm()
    with (
        replaced(llm.model_runner, "call", raising(ValueError("odd"))),
        pytest.raises(ValueError, match="odd") as caught,
    ):
        run(llm, [[i] for i in range(30)], greedy(2))
    assert "and 10 more" in told(caught.value)


@pytest.mark.parametrize("depth", [0, 1])
def test_out_of_memory_names_what_to_lower_and_keeps_nothing(qwen3, depth):
    """What the failed forward had allocated goes at once, though somebody (here `caught`) keeps the exception."""
    llm = qwen3.llm(max_num_batched_tokens=100, gpu_memory_utilization=0.77)
    llm.depth = depth
    kept: list[weakref.ref] = []

    def exhausted(forward: Any) -> Any:
        def wrapped(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            activations = torch.zeros(10)
            kept.append(weakref.ref(activations))
            if len(kept) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
            return forward(input_ids, positions)

        return wrapped

    prompts = many_prompts(4)
    with (
        replaced(llm.model_runner.model, "forward", exhausted),
        pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 3\.00 GiB") as caught,
    ):
        run(llm, prompts, greedy(6))
    for words in ("in a step with requests", "gpu_memory_utilization, now 0.77", "max_num_batched_tokens, now 100"):
        assert words in str(caught.value)
    assert len(kept) == 3
    assert kept[-1]() is None
    assert_idle(llm)
    assert_matches(qwen3, prompts, run(llm, prompts, greedy(6)), 6)


# ---- a device that is lost ----


class LostDevice:
    """Makes an engine believe that it runs on a CUDA device, which a forward breaks for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.is_lost = False
        self.num_asked = 0
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def synchronize(self, device: Any = None) -> None:
        self.num_asked += 1
        if self.is_lost:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def install(self, llm: LLM) -> None:
        object.__setattr__(llm.config, "device", torch.device("cuda"))

    def breaking(self, after: int) -> Any:
        count = 0

        def make(function: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count >= after:
                    self.is_lost = True
                if self.is_lost:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                return function(*args, **kwargs)

            return wrapped

        return make


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("place", PLACES, ids=["call", "run_model", "wait"])
def test_a_lost_device_is_the_end_at_once_and_for_ever(qwen3, place, depth, monkeypatch):
    llm = qwen3.llm()
    llm.depth = depth
    device = LostDevice(monkeypatch)
    device.install(llm)
    waiting = llm.add_request([9], greedy(50))
    stream = llm.stream([5], greedy(50))
    next(stream)
    with (
        replaced(*place(llm), device.breaking(3)),
        pytest.raises(
            EngineDeadError, match=r"cuda failed in a step with requests .*an illegal memory access"
        ) as caught,
    ):
        run(llm, [[1], [2]], greedy(20))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert str(waiting) in str(caught.value)
    # For ever, even if the device seemed to answer again.
    device.is_lost = False
    for use in (
        lambda: run(llm, [[1]], greedy(2)),
        lambda: next(llm.stream([1], greedy(2))),
        lambda: next(stream),
        lambda: llm.add_request([1], greedy(2)),
        llm.step,
        llm.reset_prefix_cache,
    ):
        for _ in range(2):
            with pytest.raises((EngineDeadError, StopIteration)) as again:
                use()
            if again.type is EngineDeadError:
                assert "make another LLM" in str(again.value)
                assert "illegal memory access" in str(again.value)
    llm.abort(waiting)
    device.is_lost = True
    llm.close()
    llm.close()
    assert_works_again(qwen3)


def assert_works_again(checkpoint: Checkpoint) -> None:
    prompts = many_prompts(3)
    assert_matches(checkpoint, prompts, run(checkpoint.llm(), prompts, greedy(5)), 5)


def test_a_device_that_answers_is_not_lost(qwen3, monkeypatch):
    """A CUDA error of one launch: like any other exception."""
    llm = qwen3.llm()
    device = LostDevice(monkeypatch)
    device.install(llm)
    error = RuntimeError("CUDA error: invalid configuration argument")
    with replaced(llm.model_runner, "call", raising(error, 2)), pytest.raises(RuntimeError, match="invalid") as caught:
        run(llm, [[1], [2]], greedy(20))
    assert caught.value is error
    assert device.num_asked
    assert_matches(qwen3, [[1, 2]], run(llm, [[1, 2]], greedy(6)), 6)


def test_a_lost_device_that_shows_only_in_the_recovery(qwen3, monkeypatch):
    """Ctrl-C while a step that will fail is in flight."""
    llm = qwen3.llm()
    llm.depth = 1
    device = LostDevice(monkeypatch)
    device.install(llm)
    with (
        replaced(llm.model_runner, "call", raising(KeyboardInterrupt(), 2)),
        replaced(model_runner.PendingTokens, "wait", device.breaking(1)),
        pytest.raises(EngineDeadError, match="in a step with request"),
    ):
        run(llm, [[1]], greedy(20))
    with pytest.raises(EngineDeadError):
        llm.step()


def test_threads_and_tasks_hear_of_a_lost_device(qwen3, monkeypatch):
    device = LostDevice(monkeypatch)

    async def one(llm: AsyncLLM, prompt: list[int]) -> int:
        return len([delta async for delta in llm.generate(prompt, greedy(200))])

    async def main() -> None:
        async with AsyncLLM(str(qwen3.path), **SMALL) as llm:
            device.install(llm.llm)
            with replaced(llm.llm.model_runner, "call", device.breaking(4)):
                results = await asyncio.gather(*(one(llm, [i]) for i in range(3)), return_exceptions=True)
            assert [type(result) for result in results] == [EngineDeadError] * 3
            for _ in range(2):
                with pytest.raises(EngineDeadError):
                    await one(llm, [1])
        assert not llm._thread.is_alive()

    asyncio.run(main())
    device.is_lost = False

    llm = qwen3.llm(max_model_len=400)
    device.install(llm)
    results: list[Any] = []

    def work(i: int) -> None:
        try:
            results.append(run(llm, [[i]], greedy(300)))
        except EngineDeadError as error:
            results.append(error)

    with replaced(llm.model_runner, "call", device.breaking(20)):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGING_S)
    assert [type(result) for result in results] == [EngineDeadError] * 3


# ---- a model that computes nonsense ----

BAD = 200


@contextlib.contextmanager
def broken_token(llm: LLM) -> Iterator[None]:
    """Whatever contains the token BAD has NaN for its logits from there on; BAD itself is drawn as before."""
    model = llm.model_runner.model
    weight = model.model.embed_tokens.weight
    with torch.inference_mode():
        if model.lm_head.weight is weight:
            model.lm_head.weight = torch.nn.Parameter(weight.clone(), False)
        row = weight[BAD].clone()
        weight[BAD] = math.nan
        yield
        weight[BAD] = row


def without_bad(prompt: list[int]) -> list[int]:
    return [token if token != BAD else 1 for token in prompt]


def never_bad(checkpoint: Checkpoint, prompts: list[list[int]], num_tokens: int) -> None:
    assert all(BAD not in tokens[:num_tokens] for tokens, _ in checkpoint.answers(prompts, 64))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("late", [0, 1, 2])
def test_who_shares_blocks_with_a_broken_request_starts_over(qwen3, depth, late):
    """They were admitted in the same step, while that step was in flight, or while both were computing."""
    rng = random.Random(4)
    prefix, other = without_bad(random_prompt(rng, 40)), without_bad(random_prompt(rng, 21))
    sharer = [*prefix, 3, 4, 5]
    never_bad(qwen3, [sharer, other], 12)
    llm = qwen3.llm(max_num_batched_tokens=60)
    llm.depth = depth
    watch, done = Watch(llm), {}
    with broken_token(llm):
        # In two chunks: the prefix is registered a step before the token that breaks the request.
        broken = llm.add_request([*prefix, *[7] * 30, BAD], greedy(12))
        unrelated = llm.add_request(other, greedy(12))
        for _ in range(late):
            done.update(llm.step()[0])
        logprobs = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
        (output,) = run(llm, [sharer], logprobs)
        while not llm.is_finished():
            done.update(llm.step()[0])
    assert done[broken] == []
    assert_matches(qwen3, [sharer, other], [output, done[unrelated]], 12)
    shared = [seq for seq in watch.seqs.values() if seq.prompt_token_ids == sharer]
    assert output.metrics.num_preemptions == shared[0].num_preemptions
    # Once the broken one is known there is nothing left to share, and nobody has to start over.
    shares = late < 2 or depth == 1
    assert sum(max(step.prefix_cached.values(), default=0) for step in watch.steps) == (32 if shares else 0)
    assert output.metrics.num_preemptions == shares
    assert output.metrics.num_cached_prompt_tokens == (32 if shares else 0), "as it was when it came"
    assert len(output.outputs[0].logprobs) == 12
    assert output.outputs[0].cumulative_logprob == pytest.approx(
        run(llm, [sharer], logprobs)[0].outputs[0].cumulative_logprob
    )
    assert [seq.num_preemptions for seq in watch.seqs.values() if seq.prompt_token_ids == other] == [0]
    assert_idle(llm)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_broken_sample_does_not_take_its_siblings_along(qwen3, depth, victim):
    """One of four has no token to draw; the three that share its prompt start over and answer as ever."""
    llm = qwen3.llm()
    llm.depth = depth
    params = {"n": 4, "seed": 3, "max_tokens": 20, "ignore_eos": True}
    (expected,) = run(llm, "a prompt of more than one block", SamplingParams(**params))
    position, asked = len(expected.prompt_token_ids) + 5, 0

    def breaking(sample: Any) -> Any:
        def sample_broken(logits: Any, temperatures: Any, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            nonlocal asked
            broken = (seeds == fold_seed(3, victim)) & (positions == position)
            asked += int(broken.sum())
            return sample(logits.masked_fill(broken[:, None], math.nan), temperatures, seeds, positions)

        return sample_broken

    watch = Watch(llm)
    llm.reset_prefix_cache()
    with replaced(llm.model_runner, "sample", breaking):
        (output,) = run(llm, "a prompt of more than one block", SamplingParams(**params))
    for i, (completion, clean) in enumerate(zip(output.outputs, expected.outputs, strict=True)):
        length, reason = (5, "error") if i == victim else (20, "length")
        assert completion.token_ids == clean.token_ids[:length]
        assert completion.finish_reason == reason
    # Who has read what another computed is asked once more, alone.
    assert asked == (1 if victim == 0 else 2)
    seqs = {seq.index: seq for seq in watch.seqs.values()}
    assert [seqs[i].num_preemptions for i in range(4)] == [int(i != victim or victim > 0) for i in range(4)]
    assert_idle(llm)


def test_a_mask_that_leaves_nothing_ends_all_samples_at_once(qwen3):
    llm = qwen3.llm()
    watch = Watch(llm)
    params = SamplingParams(n=40, allowed_token_ids=[65], bad_words=[make_tokenizer().decode([65])], max_tokens=5)
    (output,) = run(llm, "a prompt of more than one block", params)
    assert [completion.finish_reason for completion in output.outputs] == ["error"] * 40
    assert len(watch.steps) <= 3
    assert watch.num_preemptions == 0
    assert_idle(llm)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("fault", ["contradiction", "callable", "nothing allowed"])
def test_who_has_nothing_left_to_draw_is_alone_with_it(qwen3, fault, depth):
    """The blocks of its prompt are as good as ever: whoever shares them goes on, and later ones find them."""

    def fails(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(ids) == 3:
            raise ZeroDivisionError("not mine")
        return logits

    rng = random.Random(3)
    beginning = random_prompt(rng, 48)
    prompts = [beginning + random_prompt(rng, 5) for _ in range(6)]
    bad = {
        "contradiction": SamplingParams(temperature=0, max_tokens=9, min_tokens=5, allowed_token_ids=[EOS]),
        "callable": SamplingParams(temperature=0, max_tokens=9, logits_processors=[fails]),
        "nothing allowed": SamplingParams(
            temperature=0, max_tokens=9, logits_processors=[lambda ids, logits: logits * math.nan]
        ),
    }[fault]
    llm = qwen3.llm()
    llm.depth = depth
    run(llm, [beginning], greedy(1))
    ids = [llm.add_request(prompt, greedy(20)) for prompt in prompts[:5]]
    llm.step()
    ids.append(llm.add_request(prompts[5], bad))
    seqs = [llm._requests[request_id].seqs[0] for request_id in ids]
    done, errors = {}, 0
    while not llm.is_finished():
        try:
            done.update(llm.step()[0])
        except ZeroDivisionError:
            errors += 1
    assert errors == (fault == "callable")
    assert seqs[5].finish_reason == "error"
    assert_matches(qwen3, prompts[:5], [done[request_id] for request_id in ids[:5]], 20)
    assert [seq.num_preemptions for seq in seqs] == [0] * 6
    (output,) = run(llm, [prompts[5] + [7]], greedy(5))
    assert output.metrics.num_cached_prompt_tokens == 48
    assert_matches(qwen3, [prompts[5] + [7]], [output], 5)


@pytest.mark.parametrize("depth", [0, 1])
def test_nan_in_a_block_of_the_cache(qwen3, depth):
    """As a flipped bit might leave it. Who only reads it loses time, who computed it ends with an error."""
    llm = qwen3.llm(max_num_batched_tokens=40)
    llm.depth = depth
    rng = random.Random(1)
    prompt = random_prompt(rng, 50)
    long = prompt[:32] + random_prompt(rng, 100)

    def poison(block_id: int) -> None:
        with torch.inference_mode():
            llm.model_runner.kv_cache[:, :, block_id] = math.nan

    # In a cached block that nobody holds.
    run(llm, [prompt], greedy(2))
    (cached,) = [block.block_id for block in llm.block_manager.blocks if block.uid and block.token_ids == prompt[:16]]
    poison(cached)
    watch = Watch(llm)
    (output,) = run(llm, [prompt], greedy(9))
    assert watch.num_prefix_cached_tokens == 48
    assert output.metrics.num_preemptions == 1
    assert_matches(qwen3, [prompt], [output], 9)
    (output,) = run(llm, [prompt], greedy(9))  # and it is not found again
    assert (output.metrics.num_cached_prompt_tokens, output.metrics.num_preemptions) == (48, 0)
    assert_matches(qwen3, [prompt], [output], 9)

    # In one that two are working with: the first computed it.
    llm.reset_prefix_cache()
    ids = [llm.add_request(prompt, greedy(30))]
    for _ in range(3):
        llm.step()
    ids.append(llm.add_request(long, greedy(9)))
    llm.step()
    first, second = (llm._requests[request_id].seqs[0] for request_id in ids)
    assert first.is_decoding
    assert 0 < second.num_cached_tokens < len(long)
    (shared, _) = sorted(set(first.block_table) & set(second.block_table))
    poison(shared)
    done = {}
    while not llm.is_finished():
        done.update(llm.step()[0])
    assert first.finish_reason == "error"
    assert done[ids[0]] == qwen3.answers([prompt], 64)[0][0][: len(done[ids[0]])]
    assert second.num_preemptions == 1
    assert_matches(qwen3, [long], [done[ids[1]]], 9)
    assert_matches(qwen3, [prompt], run(llm, [prompt], greedy(9)), 9)
    assert_idle(llm)


@pytest.mark.parametrize("seed", range(8))
def test_broken_requests_among_many(qwen3, seed):
    """Whatever the settings, those that contain the broken token end with an error and all others are right."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    llm = qwen3.llm(
        kvcache_block_size=block_size,
        num_kvcache_blocks=rng.choice([100, 160, 1000]) // block_size + 8,
        max_num_seqs=rng.choice([3, 8, 64]),
        max_num_batched_tokens=rng.choice([7, 30, 200]),
    )
    llm.depth = seed % 2
    llm.scheduler.completion_ratio = rng.choice([0.0, 0.5])
    watch = Watch(llm)
    texts = [without_bad(random_prompt(rng, 50)) for _ in range(2)]
    prompts, is_broken = [], []
    for _ in range(30):
        prompt = rng.choice(texts)[: rng.randrange(20, 50)] + without_bad(random_prompt(rng, rng.randrange(1, 9)))
        is_broken.append(rng.random() < 0.3)
        prompts.append([*prompt, BAD, *rng.choice(texts)[: rng.randrange(9)]] if is_broken[-1] else prompt)
    healthy = [prompt for prompt, broken in zip(prompts, is_broken) if not broken]
    answers = [tokens[:15] for tokens, _ in qwen3.answers(healthy, 64)]
    healthy = [prompt for prompt, tokens in zip(healthy, answers) if BAD not in tokens]
    with broken_token(llm):
        outputs = run(llm, prompts, greedy(15))
    right = []
    for prompt, broken, output in zip(prompts, is_broken, outputs):
        if broken:
            assert (output.outputs[0].finish_reason, output["token_ids"]) == ("error", [])
        elif prompt in healthy:
            right.append(output)
    assert_matches(qwen3, healthy, right, 15)
    assert watch.num_prefix_cached_tokens > 0
    assert watch.num_preemptions > 0
    assert_idle(llm)


# ---- start and end ----


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    threads, children = set(threading.enumerate()), child_pids()
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(HANGING_S)
        assert not thread.is_alive(), thread
    assert child_pids() <= children
    assert not multiprocessing.active_children()


def parts(llm: LLM) -> list[weakref.ref]:
    runner = llm.model_runner
    return [weakref.ref(part) for part in (runner.model, runner.kv_cache, runner.state)]


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("how", ["close", "exit", "with", "del", "AsyncLLM.close", "del AsyncLLM"])
def test_every_end_gives_everything_back(qwen3, how):
    if "AsyncLLM" in how:
        llm = AsyncLLM(str(qwen3.path), **SMALL)
        refs, stream = parts(llm.llm), llm.generate([1, 2], greedy(5))
        asyncio.run(anext(stream))
        del stream
    else:
        llm = qwen3.llm()
        refs = parts(llm)
        run(llm, [[1, 2], [3]], greedy(3))
        llm.add_request([7], greedy(30))
        llm.depth = 1
        llm.step()  # is in flight
    if how.startswith("del"):
        del llm
    elif how == "with":
        with llm:
            pass
    else:
        end = getattr(llm, how.rpartition(".")[2])
        end()
        end()
    gc.collect()
    wait_until(lambda: [ref() for ref in refs] == [None] * 3)  # a thread may be on its way out
    assert_works_again(qwen3)


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("raises", [False, True])
def test_an_engine_keeps_no_callable_and_no_callable_keeps_an_engine(qwen3, raises):
    """Not even one that knows the engine: when its request has ended nobody has it."""
    llm = qwen3.llm()

    def callable_of(llm: LLM) -> Any:
        def processor(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            assert llm.stats()["num_running"] == 1
            if raises and len(token_ids) == 2:
                raise RuntimeError("boom")
            return logits

        return processor

    processor = callable_of(llm)
    known = weakref.ref(processor)
    with pytest.raises(RuntimeError, match="boom") if raises else contextlib.nullcontext():
        llm.generate([[1, 2]], SamplingParams(max_tokens=4, logits_processors=[processor]), use_tqdm=False)
    del processor
    gc.collect()
    assert known() is None
    refs = parts(llm)
    del llm
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


@pytest.mark.usefixtures("nothing_stays")
def test_memory_returns_to_the_baseline(qwen3):
    """Engines one after the other and two at once, each with 64 MiB of cache that was written."""
    num_blocks = 2**26 // qwen3.llm().model_runner.block_bytes

    def use() -> LLM:
        llm = qwen3.llm(num_kvcache_blocks=num_blocks)
        with torch.inference_mode():
            llm.model_runner.kv_cache.fill_(1.0)
        assert_matches(qwen3, [[1, 2]], run(llm, [[1, 2]], greedy(3)), 3)
        return llm

    use().close()
    gc.collect()
    baseline = resident_bytes()
    for _ in range(3):
        first, second = use(), use()
        # Not the process's size: malloc may hand out again what another test has returned.
        assert all(llm.model_runner.kv_cache.nbytes >= 2**26 for llm in (first, second))
        first.close()
        del second
        gc.collect()
        assert resident_bytes() < baseline + 2**25


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, ValueError])
@pytest.mark.parametrize("name", ["load_model", "load_backend", "RequestState"])
def test_a_failed_start_keeps_nothing(qwen3, monkeypatch, name, error):
    """Not even while somebody holds the exception, as notebooks do."""
    built: list[weakref.ref] = []
    build = model_runner.build_model

    def noting(*args: Any) -> Any:
        model = build(*args)
        built.append(weakref.ref(model))
        return model

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(model_runner, "build_model", noting)
        patch.setattr(model_runner, name, fail)
        for start in (qwen3.llm, lambda: AsyncLLM(str(qwen3.path), **SMALL)):
            with pytest.raises(error, match="in the middle") as caught:
                start()
            assert built.pop()() is None
            if error is torch.OutOfMemoryError:
                assert "while the engine started" in str(caught.value)
                assert "gpu_memory_utilization, now 0.9" in str(caught.value)
    assert_works_again(qwen3)


# ---- checkpoints and tokenizers ----


def truncate(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1])


def replace_json(name: str, content: str) -> Any:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).write_text(content)

    return change


def config(**changes: Any) -> Any:
    return lambda path: edit_json(path / "config.json", path / "config.json", **changes)


def index(where: str) -> Any:
    return replace_json("model.safetensors.index.json", json.dumps({"weight_map": {"model.norm.weight": where}}))


def last_norm(change: Any) -> Any:
    """Another tensor in place of `model.norm.weight`, in the shard that has it."""

    def replace(path: Path) -> None:
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            if "model.norm.weight" in tensors:
                tensors.update(change(tensors.pop("model.norm.weight")))
                file.unlink()
                save_file(tensors, file)

    return replace


def tokenizer_in_python(path: Path) -> None:
    for file in path.glob("*token*"):
        file.unlink()
    transformers.ByT5Tokenizer().save_pretrained(path)


DEEP = "[" * 10**5
WRONG_SIZES = {
    "vocab_size": 10**6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
BROKEN = {
    "truncated last shard": truncate,
    "missing last shard": lambda path: sorted(path.glob("*.safetensors"))[-1].unlink(),
    "broken index": replace_json("model.safetensors.index.json", "{"),
    "only .bin": lambda path: [file.rename(file.with_suffix(".bin")) for file in path.glob("*.safetensors")],
    "no config": lambda path: (path / "config.json").unlink(),
    "config is no JSON": replace_json("config.json", "{"),
    "unknown model": replace_json("config.json", '{"model_type": "zzz", "auto_map": {"AutoConfig": "evil.Config"}}'),
    "another family": replace_json("config.json", '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'),
    "eos is no id": replace_json("generation_config.json", '{"eos_token_id": "the end"}'),
    "eos is half an id": replace_json("generation_config.json", '{"eos_token_id": [1.5]}'),
    "bad recommendation": replace_json("generation_config.json", '{"temperature": -3}'),
    "no tokenizer": lambda path: [file.unlink() for file in path.glob("*token*")],
    "broken tokenizer": replace_json("tokenizer.json", "{"),
    "tokenizer in Python": tokenizer_in_python,
    "deep config": replace_json("config.json", DEEP),
    "deep generation config": replace_json("generation_config.json", DEEP),
    "deep index": replace_json("model.safetensors.index.json", DEEP),
    "generation config is a list": replace_json("generation_config.json", "[]"),
    "index points out": index("../model/model.safetensors"),
    "index points away": index("/etc/passwd"),
    "index points to a directory": index("."),
    "index with a long name": index("x" * 5000),
    "index with a number": replace_json("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": 3}}'),
    "index without tensors": replace_json("model.safetensors.index.json", '{"weight_map": {}}'),
    "architectures is a number": config(architectures=3),
    "architectures is a string": config(architectures="Qwen3ForCausalLM"),
    "architectures of lists": config(architectures=[["Qwen3ForCausalLM"]]),
    "a layer too many": config(num_hidden_layers=3, layer_types=None),
    "a layer too few": config(num_hidden_layers=1, layer_types=None),
    "60,000 layers": config(num_hidden_layers=60_000, layer_types=None),
    "a billion layers": config(num_hidden_layers=10**9, layer_types=None),
    "size is no number": config(hidden_size="48"),
    **{f"another {name}": config(**{name: value}) for name, value in WRONG_SIZES.items()},
    **{f"huge {name}": config(**{name: 10**12}) for name in WRONG_SIZES},
    **{f"the largest {name}": config(**{name: SIZES[name]}) for name in WRONG_SIZES},
    "all sizes the largest": config(**{name: SIZES[name] for name in WRONG_SIZES}),
    "untied head": config(tie_word_embeddings=False),
    "partial rotation": config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "rope of text": config(rope_parameters={"rope_theta": "abc"}),
    "rope of nothing": config(rope_parameters={"rope_theta": 0}),
    "tensor is missing": last_norm(lambda tensor: {}),
    "tensor has another name": last_norm(lambda tensor: {"model.norm.wait": tensor}),
    "tensor has another shape": last_norm(lambda tensor: {"model.norm.weight": tensor[None].clone()}),
    "tensor of integers": last_norm(lambda tensor: {"model.norm.weight": tensor.to(torch.int32)}),
    "tensor of float8": last_norm(lambda tensor: {"model.norm.weight": tensor.to(torch.float8_e4m3fn)}),
}
# Told by what the config says, for which the directory does not matter.
WITHOUT_PATH = ("another family", "partial rotation", *(what for what in BROKEN if what.startswith("architectures")))


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_before_it_takes_memory(qwen3, tmp_path, monkeypatch, what):
    path = save_checkpoint(tmp_path / "model", qwen3.model, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    assert run(LLM(path, **SMALL), [[1]], greedy(2))
    BROKEN[what](path)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("memory was taken, or somebody was asked")

    monkeypatch.setattr(model_runner, "build_model", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        LLM(path, **SMALL)
    assert str(path) in str(caught.value) or what in WITHOUT_PATH
    assert len(str(caught.value)) < 600


def with_tokenizer(qwen3: Checkpoint, path: Path, tokenizer: Any, **generation: Any) -> LLM:
    copy_checkpoint(qwen3.path, path, eos_token_id=None)
    for file in [*path.glob("*token*"), path / "generation_config.json"]:
        file.unlink()
    tokenizer.save_pretrained(path)
    transformers.GenerationConfig(**generation).save_pretrained(path)
    return LLM(path, **SMALL)


def test_a_tokenizer_without_eos_and_without_a_template(qwen3, tmp_path):
    backend = make_tokenizer().backend_tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    llm = with_tokenizer(qwen3, tmp_path / "model", tokenizer)
    assert llm.tokenizer.eos_token_id is None
    assert llm.config.eos_token_ids == frozenset()
    (output,) = run(llm, "abc", SamplingParams(temperature=0, max_tokens=20, min_tokens=5))
    assert output.outputs[0].finish_reason == "length"
    assert_matches(qwen3, [make_tokenizer().encode("abc")], [output["token_ids"]], 20)
    choices = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    (output,) = run(llm, "abc", choices)
    assert output["text"] in ("yes", "no")
    assert output.outputs[0].finish_reason == "stop"
    with pytest.raises(ValueError, match="no chat template: pass chat_template="):
        llm.chat([{"role": "user", "content": "hi"}])
    assert_idle(llm)


def test_a_tokenizer_with_more_ids_than_the_model(qwen3, tmp_path):
    """They cannot be in a prompt; where they are an end or a bad word they change nothing."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(60)])
    beyond = len(tokenizer) - 1
    assert beyond > qwen3.model.config.vocab_size
    llm = with_tokenizer(qwen3, tmp_path / "model", tokenizer, eos_token_id=[EOS, beyond])
    assert llm.config.eos_token_ids == {EOS}
    with pytest.raises(ValueError, match=rf"contains {beyond}: the token ids of this model go from 0 to 292"):
        run(llm, f"abc<extra {59}>", greedy(4))
    with pytest.raises(ValueError, match=rf"stop_token_ids contains {beyond}"):
        run(llm, "abc", SamplingParams(stop_token_ids=[beyond]))
    params = SamplingParams(temperature=0, max_tokens=20, min_tokens=20, bad_words=["<extra 59>"], stop=["<extra 58>"])
    (output,) = run(llm, "abc", params)
    plain = SamplingParams(temperature=0, max_tokens=20, min_tokens=20)
    assert output["token_ids"] == run(llm, "abc", plain)[0]["token_ids"]
    assert EOS not in output["token_ids"]
    assert_idle(llm)


# ---- aborts and threads ----


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "state", ["waiting", "mid-prefill", "prefilled", "running", "preempted", "finished", "unknown"]
)
def test_abort_frees_the_blocks_and_keeps_what_there_is(qwen3, state, depth):
    llm = qwen3.llm(max_num_batched_tokens=20, max_num_seqs=2, num_kvcache_blocks=16)
    llm.depth = depth
    prompts = [random_prompt(random.Random(1), 50), [5, 6], [7]]
    (aborted, kept, third) = (llm.add_request(prompt, greedy(20)) for prompt in prompts)
    seq, done = llm._requests[aborted].seqs[0], {}
    if state == "waiting":  # while the other two run
        aborted, third = third, aborted
        seq = llm._requests[aborted].seqs[0]
    steps = {
        "waiting": 1,
        "mid-prefill": 2,
        "prefilled": 3,
        "running": 10,
        "preempted": 9,
        "finished": 60,
        "unknown": 3,
    }
    for _ in range(steps[state]):
        done.update(llm.step()[0])
    if state == "preempted":
        llm._drain()
        llm.scheduler.preempt(seq)
    observed = {
        "waiting": seq.status.name == "WAITING" and not seq.token_ids[1:],
        "mid-prefill": 0 < seq.num_cached_tokens < 50,
        "prefilled": seq.num_cached_tokens == 50,
        "running": seq.num_completion_tokens > 5 and seq.status.name == "RUNNING",
        "preempted": seq.num_preemptions == 1 and seq.status.name == "WAITING" and seq.num_completion_tokens > 0,
        "finished": aborted in done,
        "unknown": True,
    }
    assert observed[state]
    for _ in range(3):
        llm.abort(aborted if state != "unknown" else 10**9)
    check_blocks(llm.block_manager, [*llm.scheduler.running, *llm.scheduler.waiting])
    if state != "unknown":
        assert seq.block_table == []
        assert seq.finish_reason == ("length" if state == "finished" else "abort")
        assert seq not in llm.scheduler.running
        assert seq not in llm.scheduler.waiting
    while not llm.is_finished():
        done.update(llm.step()[0])
    expected = dict(zip(sorted([aborted, kept, third]), (tokens[:20] for tokens, _ in qwen3.answers(prompts, 64))))
    assert done.keys() == expected.keys()
    for request_id, tokens in done.items():
        full = 20 if request_id != aborted or state in ("finished", "unknown") else len(tokens)
        assert tokens == expected[request_id][:full]
    assert_idle(llm)


def test_a_thread_that_fails_does_not_mix_with_others(qwen3):
    """Steps of four threads fail now and then: each call raises that very exception or returns its own results."""
    llm = qwen3.llm()
    rng = random.Random(0)
    failed, served, wrong = [], [], []

    class Boom(Exception):
        pass

    def unreliable(call: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            if rng.random() < 0.03:
                raise Boom
            return call(*args)

        return wrapped

    def work(i: int) -> None:
        for k in range(6):
            prompts = many_prompts(3, seed=10 * i + k)
            try:
                outputs = run(llm, prompts, greedy(10))
            except Boom as error:
                failed.append(error)
                continue
            except BaseException as error:
                wrong.append(error)
                continue
            served.append((prompts, outputs))

    with replaced(llm.model_runner, "call", unreliable):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGING_S)
    assert not wrong
    assert len(failed) + len(served) == 24
    assert failed
    assert served
    for prompts, outputs in served:
        assert_matches(qwen3, prompts, outputs, 10)
    assert_idle(llm)


# ---- the end, once more ----


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ctrl_c_while_an_engine_closes(qwen3, num_ranks):
    """Wherever it strikes, the next `close` gives back what is left."""
    for place in ("gc.collect", "workers.stop", "graphs.clear"):
        llm = qwen3.llm(tensor_parallel_size=num_ranks)
        runner = llm.model_runner
        workers = {worker.process.pid for worker in runner.workers.members} if runner.workers is not None else set()
        target: tuple[Any, str] | None = (model_runner.gc, "collect")
        if place == "workers.stop":
            target = (runner.workers, "stop") if runner.workers is not None else None
        elif place == "graphs.clear":
            runner.graphs = DecodeGraphs(runner, 4)
            target = (runner.graphs, "clear")
        if target is None:
            continue
        with replaced(*target, raising(KeyboardInterrupt(), 1)), pytest.raises(KeyboardInterrupt):
            llm.close()
        assert not runner.is_closed
        llm.close()
        assert runner.is_closed
        assert not {"model", "kv_cache", "state", "tp"} & set(vars(runner))
        assert not child_pids() & workers
        llm.close()
        with pytest.raises(RuntimeError, match="has been closed"):
            llm.generate([[1]])


@pytest.mark.parametrize("use", ["generate", "step", "stream", "AsyncLLM"])
def test_a_fork_cannot_use_the_engine(qwen3, use):
    """Its threads are not there, so that it would wait for them for ever; nor is who holds the lock."""
    engine = AsyncLLM(str(qwen3.path), **SMALL)
    llm = engine.llm
    run(llm, [[1, 2]], greedy(3))
    reader, writer = os.pipe()
    held, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: llm._lock.hold(lambda: held.set() or done.wait()))
    thread.start()
    held.wait()

    async def generate() -> None:
        async for _ in engine.generate([1, 2], greedy(3)):
            pass

    child = os.fork()
    if child == 0:
        uses = {
            "generate": lambda: llm.generate([[1, 2]], greedy(3), use_tqdm=False),
            "step": llm.step,
            "stream": lambda: list(llm.stream([[1, 2]], greedy(3))),
            "AsyncLLM": lambda: asyncio.run(generate()),
        }
        try:
            uses[use]()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    done.set()
    thread.join()
    told = os.read(reader, 1000).decode()
    assert told.startswith(
        f"EngineDeadError: this engine belongs to process {os.getpid()}, of which this one is a fork"
    )
    for fd in (reader, writer):
        os.close(fd)
    assert_matches(qwen3, [[1, 2]], run(llm, [[1, 2]], greedy(3)), 3)
    engine.close()
