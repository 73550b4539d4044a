"""AsyncLLM: deltas for many tasks, cancellation, errors and closing."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import HANGING_S, assert_idle, assert_matches, greedy, many_prompts, replaced, wait_until

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.async_llm import _Stream

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def make(qwen3, **kwargs) -> AsyncLLM:
    return AsyncLLM(
        str(qwen3.path), device="cpu", max_model_len=256, kvcache_block_size=16, num_kvcache_blocks=400, **kwargs
    )


@pytest.fixture
def llm(qwen3):
    llm = make(qwen3)
    yield llm
    llm.close()
    assert "nanovllm-engine" not in {thread.name for thread in threading.enumerate()}


async def collect(llm: AsyncLLM, prompt, params) -> tuple[str, list[int]]:
    text, token_ids, reasons = "", [], []
    async for delta in llm.generate(prompt, params):
        text += delta.text
        token_ids += delta.token_ids
        reasons.append(delta.finish_reason)
    assert all(reason is None for reason in reasons[:-1])
    assert reasons[-1] is not None
    return text, token_ids


async def idle(llm: AsyncLLM) -> None:
    """Wait until the engine thread has nothing left."""
    await asyncio.to_thread(wait_until, lambda: not llm.llm._requests and not llm._thread.streams)
    assert_idle(llm.llm)


@contextlib.contextmanager
def halting(llm: AsyncLLM, may_go_on: Callable[[], bool]) -> Iterator[threading.Event]:
    """Within the block no request gets beyond its hundredth token before it may; the event says that one is there."""
    has_halted = threading.Event()

    def halted(schedule):
        def wrapped():
            if any(seq.num_completion_tokens >= 100 for seq in llm.llm.scheduler.running):
                has_halted.set()
                wait_until(may_go_on)
            return schedule()

        return wrapped

    with replaced(llm.llm.scheduler, "schedule", halted):
        yield has_halted


def test_many_tasks_at_once(qwen3, llm):
    prompts = many_prompts(12)

    async def main():
        loop, num_answers = asyncio.get_running_loop(), 0

        def asking(schedule):
            def wrapped():
                nonlocal num_answers
                answered = threading.Event()
                loop.call_soon_threadsafe(answered.set)
                assert answered.wait(HANGING_S), "the event loop stands still during a step"
                num_answers += 1
                return schedule()

            return wrapped

        with replaced(llm.llm.scheduler, "schedule", asking):
            collecting = (collect(llm, prompt, greedy(5 + 3 * i)) for i, prompt in enumerate(prompts))
            results = await asyncio.gather(*collecting)
        await idle(llm)
        return results, num_answers

    results, num_answers = asyncio.run(main())
    assert_matches(qwen3, prompts, [ids for _, ids in results], [5 + 3 * i for i in range(12)])
    outputs = llm.llm.generate(prompts, [greedy(5 + 3 * i) for i in range(12)], use_tqdm=False)
    assert [text for text, _ in results] == [output["text"] for output in outputs]
    assert num_answers > 10
    # Another event loop works as well.
    assert asyncio.run(collect(llm, prompts[0], greedy(5)))[1] == results[0][1]


def test_several_prompts_and_samples_in_one_call(llm):
    async def main():
        found = {}
        async for delta in llm.generate(["ab", "cd"], SamplingParams(n=2, seed=1, max_tokens=6, ignore_eos=True)):
            key = delta.request_id, delta.index
            found[key] = found.get(key, 0) + len(delta.token_ids)
        return found

    assert list(asyncio.run(main()).values()) == [6] * 4
    assert asyncio.run(main()).keys() != asyncio.run(main()).keys()

    async def nothing():
        return [delta async for delta in llm.generate([])]

    assert asyncio.run(nothing()) == []


def test_a_step_looks_at_no_stream_that_waits(qwen3):
    """However many there are; each gets its own, be it tokens, an exception or the end that it was left before."""
    prompts = [[i % 100 + 1] for i in range(2000)]
    looked_at: list[int] = []  # in each step
    num_waiting = []
    all_are_there = threading.Event()

    def stepping(step):
        def wrapped():
            assert all_are_there.wait(HANGING_S)
            looked_at.append(0)
            num_waiting.append(len(llm._thread.streams))
            return step()

        return wrapped

    def counting(take):
        def wrapped(stream):
            looked_at[-1] += 1
            return take(stream)

        return wrapped

    def broken(output_ids, logits):
        raise OSError("no disk")

    async def main():
        tasks = [asyncio.create_task(collect(llm, prompt, greedy(2))) for prompt in prompts]
        raising = SamplingParams(logits_processors=[broken])
        tasks.insert(1000, asyncio.create_task(collect(llm, [[1], [2]], raising)))
        left = asyncio.create_task(collect(llm, [3], LONG))
        await asyncio.to_thread(wait_until, lambda: len(llm._thread.streams) + len(llm._thread.orders) == 2002)
        all_are_there.set()
        await asyncio.to_thread(wait_until, lambda: len(num_waiting) > 1)
        left.cancel()
        *results, _ = await asyncio.gather(*tasks, left, return_exceptions=True)
        assert isinstance(results.pop(1000), OSError)
        assert left.cancelled()
        await idle(llm)
        return results

    llm = make(qwen3, max_num_seqs=16)
    with replaced(_Stream, "take", counting), replaced(llm.llm, "_step", stepping):
        results = asyncio.run(main())
    assert max(looked_at) <= 16 + 1, "who ran, and who left"
    assert not llm._thread.changed
    assert max(num_waiting) > 2000
    assert sum(num > 1000 for num in num_waiting) > 50
    outputs = llm.llm.generate(prompts[:100], greedy(2), use_tqdm=False)
    assert results == [(output["text"], output["token_ids"]) for output in outputs] * 20
    assert_matches(qwen3, prompts[:100], [token_ids for _, token_ids in results[:100]], 2)
    llm.close()


@pytest.mark.parametrize("how", ["cancel", "timeout", "aclose", "break"])
def test_leaving_early_aborts_and_leaves_others_alone(qwen3, llm, how):
    has_left = threading.Event()

    async def leave(is_in_the_middle):
        stream = llm.generate("abc", LONG)
        if how == "cancel":
            task = asyncio.create_task(collect(llm, "abc", LONG))
            assert await asyncio.to_thread(is_in_the_middle.wait, HANGING_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(collect(llm, "abc", LONG), 0.05)
        elif how == "aclose":
            await anext(stream)
            await stream.aclose()
        else:
            async for _ in stream:
                break
            del stream
            gc.collect()

    async def main():
        other = asyncio.create_task(collect(llm, [5, 6, 7], greedy(60)))
        with halting(llm, has_left.is_set) as is_in_the_middle:
            await leave(is_in_the_middle)
            has_left.set()
            result = await other
        await idle(llm)
        return result

    assert_matches(qwen3, [[5, 6, 7]], [asyncio.run(main())[1]], 60)
    stats = llm.llm.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]


def test_bad_arguments_are_raised_to_the_caller(qwen3, llm):
    async def main():
        for prompt, params in (("", None), ("a", SamplingParams(n=1000)), (5, None)):
            with pytest.raises((TypeError, ValueError)):
                await collect(llm, prompt, params)
        await idle(llm)
        return await collect(llm, [1, 2], greedy(5))

    assert_matches(qwen3, [[1, 2]], [asyncio.run(main())[1]], 5)


def test_an_exception_in_the_thread_reaches_every_waiter(qwen3, llm):
    """And whoever comes later is served."""

    def broken(output_ids, logits):
        if len(output_ids) == 3:
            raise OSError("no disk")
        return logits

    async def main():
        # What a user's callable raises concerns the task that brought it, and its other prompt.
        waiters = [collect(llm, [i + 1], greedy(40)) for i in range(3)]
        waiters.append(collect(llm, [[9], [8]], SamplingParams(logits_processors=[broken], ignore_eos=True)))
        *others, error = await asyncio.gather(*waiters, return_exceptions=True)
        assert isinstance(error, OSError)
        assert_matches(qwen3, [[1], [2], [3]], [token_ids for _, token_ids in others], 40)
        await idle(llm)
        with replaced(llm.llm.model_runner, "call", lambda _: lambda *args: 1 / 0):
            waiters = [collect(llm, [i + 1], LONG) for i in range(3)]
            results = await asyncio.gather(*waiters, return_exceptions=True)
            assert [type(result) for result in results] == [ZeroDivisionError] * 3
            with replaced(llm.llm, "_recover", lambda _: lambda: 1 / 0), pytest.raises(ZeroDivisionError):
                await collect(llm, [1], LONG)
        return await collect(llm, [1, 2], greedy(5))

    assert_matches(qwen3, [[1, 2]], [asyncio.run(main())[1]], 5)


def test_chat(qwen3):
    """The deltas of one conversation or several are `LLM.chat`'s texts, by the model's template or another."""
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{{ tools[0].function.name }}{{ x }}>"
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
    kwargs = {"chat_template": template, "tools": tools, "chat_template_kwargs": {"x": "?"}}

    async def texts(llm, messages, **kwargs):
        found = {}
        async for delta in llm.chat(messages, greedy(8), **kwargs):
            found[delta.request_id] = found.get(delta.request_id, "") + delta.text
        return [found[request_id] for request_id in sorted(found)]

    async def main():
        async with make(qwen3) as llm:
            with pytest.raises(ValueError, match="no chat template"):
                await anext(llm.chat(messages))
            conversations = [messages, [*messages, {"role": "assistant", "content": "yes"}]]
            one, several = await asyncio.gather(texts(llm, messages, **kwargs), texts(llm, conversations, **kwargs))
            await idle(llm)
            assert llm.get_tokenizer() is llm.llm.tokenizer
            assert llm.get_default_sampling_params() == SamplingParams()
            expected = llm.llm.chat(conversations, greedy(8), use_tqdm=False, **kwargs)
            assert [output.prompt for output in expected] == ["[user:hi]look?>", "[user:hi][assistant:yes]look?>"]
            assert several == [output["text"] for output in expected]
            assert one == several[:1]

    asyncio.run(main())


def test_closing(qwen3):
    async def main():
        llm = make(qwen3)
        with halting(llm, lambda: llm._thread.is_closing) as are_in_the_middle:
            async with llm:
                waiting = [asyncio.create_task(collect(llm, [i + 1], LONG)) for i in range(3)]
                assert await asyncio.to_thread(are_in_the_middle.wait, HANGING_S)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, RuntimeError) and "closed" in str(result) for result in results)
        with pytest.raises(RuntimeError, match="closed"):
            await collect(llm, [1], LONG)
        await llm.aclose()
        llm.close()

    asyncio.run(main())


def test_ctrl_c_while_closing(qwen3, monkeypatch):
    """The next close() does what is left."""
    llm = make(qwen3)
    join = threading.Thread.join

    def strike(thread: threading.Thread, *args: Any) -> None:
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", strike)
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    assert hasattr(llm.llm.model_runner, "kv_cache")
    llm.close()
    assert not hasattr(llm.llm.model_runner, "kv_cache")


def test_an_event_loop_that_is_gone(qwen3, llm):
    """A loop that was stopped without closing its tasks leaves no request behind."""
    loop = asyncio.new_event_loop()
    stream = llm.generate("abc", LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    wait_until(lambda: not llm._thread.streams)
    assert_idle(llm.llm)
    assert_matches(qwen3, [[1, 2]], [asyncio.run(collect(llm, [1, 2], greedy(5)))[1]], 5)
    with contextlib.suppress(RuntimeError, StopIteration):
        stream.aclose().send(None)


def test_it_is_collected_like_any_other_object(qwen3):
    llm = make(qwen3)
    assert asyncio.run(collect(llm, [1], greedy(2)))[1]
    thread = llm._thread
    del llm
    gc.collect()
    thread.join(HANGING_S)
    assert not thread.is_alive()
