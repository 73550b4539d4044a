"""The request API: samples and seeds, streams and aborts, chats, threads, and all that can be wrong in a field."""

import contextlib
import dataclasses
import gc
import inspect
import io
import math
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.auto
from helpers import (
    EOS,
    HANGING_S,
    VOCAB_SIZE,
    Watch,
    assert_idle,
    assert_matches,
    check_blocks,
    copy_checkpoint,
    greedy,
    make_tokenizer,
    many_prompts,
    random_prompt,
    replaced,
    wait_until,
)

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.engine.fair_lock import FairLock
from nanovllm.utils import progress
from nanovllm.utils.validation import WrongTypeError

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module", params=[0, 1], ids=["depth 0", "depth 1"])
def llm(qwen3, request) -> LLM:
    llm = qwen3.llm()
    llm.depth = request.param
    return llm


@pytest.fixture(scope="module")
def chat_llm(qwen3, tmp_path_factory) -> LLM:
    """With a chat template that shows what it is given."""
    path = copy_checkpoint(qwen3.path, tmp_path_factory.mktemp("chat") / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
        "{% if tools %}(tools {{ tools[0].function.name }}){% endif %}"
        "{% if enable_thinking is defined %}(thinking {{ enable_thinking }}){% endif %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    for file in path.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(path)
    return LLM(str(path), device="cpu", max_model_len=200, max_num_seqs=8, kvcache_block_size=16)


def drain(llm: LLM, limit: int = 1000) -> dict[int, list[list[int]]]:
    done: dict[int, list[list[int]]] = {}
    for _ in range(limit):
        if llm.is_finished():
            assert_idle(llm)
            return done
        for request_id, token_ids in llm.step()[0]:
            done.setdefault(request_id, []).append(token_ids)
    raise AssertionError("it never ends")


# ---- samples and seeds ----


@pytest.mark.parametrize("budget", [16384, 24])
def test_samples_differ_and_share_the_blocks_of_their_prompt(qwen3, budget):
    llm, prompt = qwen3.llm(max_num_batched_tokens=budget), many_prompts(1)[0]
    watch = Watch(llm)
    request_id = llm.add_request(prompt, SamplingParams(n=5, max_tokens=40, ignore_eos=True))
    for _ in range(20):
        llm.step()
    tables = [seq.block_table for seq in llm.scheduler.running]
    assert len(tables) == 5
    shared = len(prompt) // 16 - (len(prompt) % 16 == 0)  # the last token is computed by each
    assert shared >= 4
    assert all(table[:shared] == tables[0][:shared] for table in tables)
    assert len({table[-1] for table in tables}) == 5
    assert watch.num_prefix_cached_tokens == 4 * 16 * shared
    (completions,) = drain(llm).values()
    assert len(completions) == len({tuple(c) for c in completions}) == 5
    assert request_id in watch.llm._requests or llm.is_finished()


def sampled(llm: LLM, params: SamplingParams, prompt=(1, 2, 3), others=()) -> list[list[int]]:
    outputs = llm.generate([*(p for p, _ in others), list(prompt)], [*(s for _, s in others), params], use_tqdm=False)
    return [completion.token_ids for completion in outputs[-1].outputs]


def test_a_seed_gives_the_same_in_any_batch_and_after_a_restart(qwen3):
    params = SamplingParams(n=3, seed=11, temperature=1.2, top_k=40, max_tokens=20, ignore_eos=True)
    expected = sampled(qwen3.llm(), params)
    llm = qwen3.llm(num_kvcache_blocks=30, max_num_batched_tokens=17, seed=5)
    watch = Watch(llm)
    for seed in range(3):
        prompts = many_prompts(10, seed=seed)
        others = [(p, SamplingParams(seed=11, top_p=0.9, max_tokens=5 + i)) for i, p in enumerate(prompts)]
        assert sampled(llm, params, others=others) == expected
    assert watch.num_chunks > 0
    assert sampled(llm, dataclasses.replace(params, n=1)) == expected[:1], "the first sample is that of n=1"
    assert sampled(llm, dataclasses.replace(params, seed=12)) != expected
    for seed in (-(2**63), 2**63 - 1, 0):
        edge = dataclasses.replace(params, seed=seed)
        assert sampled(llm, edge) == sampled(llm, edge) != expected


def test_samples_of_neighbouring_seeds_differ(qwen3):
    """Sample 1 of seed 11 is not sample 0 of seed 12, which a sum of the two would make of it."""
    params = SamplingParams(n=4, seed=11, max_tokens=12, ignore_eos=True)
    found = [sampled(qwen3.llm(), dataclasses.replace(params, seed=seed)) for seed in (11, 12, 13)]
    assert len({tuple(tokens) for tokens_of_seed in found for tokens in tokens_of_seed}) == 12


def test_a_clone_shares_no_lists(qwen3):
    params = SamplingParams(stop=["x"], stop_token_ids=[1], logit_bias={2: 1.0}, seed=3)
    clone = params.clone()
    assert clone == params
    clone.stop.append("y")
    clone.stop_token_ids.append(4)
    clone.logit_bias[5] = 1.0
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (["x"], [1], {2: 1.0})


def test_an_output_knows_how_much_of_its_prompt_was_cached(qwen3):
    llm, prompt = qwen3.llm(), list(range(1, 41))
    outputs = [llm.generate(prompt, greedy(1), use_tqdm=False)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 32]  # blocks of 16, and the last token is computed


def test_what_a_preempted_request_left_in_the_cache_is_no_cached_prompt(qwen3):
    """It finds its own blocks when it comes back; the prompts have nothing in common, but for the last two."""
    llm = qwen3.llm(num_kvcache_blocks=16, max_num_batched_tokens=64)
    llm.scheduler.completion_ratio = 0.0  # it admits more than will fit
    watch, rng = Watch(llm), random.Random(0)
    prompts = [random_prompt(rng, 33) for _ in range(5)]
    prompts.append(prompts[4])
    params = SamplingParams(temperature=0, max_tokens=80, logit_bias={EOS: -100})
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 0, 0, 32]
    again = [seq.seq_id for seq in watch.seqs.values() if seq.num_preemptions]
    assert any(step.prefix_cached.get(seq_id) for step in watch.steps for seq_id in again[:-1])


def test_a_callable_without_a_signature(qwen3):
    """What takes Python does not know what, as of functions written in C, is given two arguments."""

    class Opaque:
        __signature__ = "none"

        def __call__(self, output_ids, logits):
            return logits

    with pytest.raises(TypeError):
        inspect.signature(Opaque())
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logits_processors=[Opaque()])
    assert_matches(qwen3, [[1, 2]], qwen3.llm().generate([1, 2], params, use_tqdm=False), 5)


def test_without_a_seed_every_request_is_another(qwen3):
    llm = qwen3.llm()
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    found = [tuple(sampled(llm, p)[0]) for p in (params, params, dataclasses.replace(params, seed=-1)) for _ in (0, 1)]
    assert len(set(found)) == 6
    # The engine's own seed makes the whole run reproducible.
    again = [tuple(sampled(other := qwen3.llm(), params)[0]), tuple(sampled(other, params)[0])]
    assert again == found[:2]


# ---- streams ----


def test_a_stream_is_lazy_but_checks_at_once(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.stream("")
    stream = llm.stream("abc", LONG)
    assert llm.is_finished(), "nothing is queued before somebody reads"
    assert next(stream).text is not None
    assert not llm.is_finished()
    stream.close()
    assert_idle(llm)
    assert list(llm.stream([])) == []


@pytest.mark.parametrize("depth", [0, 1])
def test_leaving_a_stream_aborts_its_requests_and_no_others(qwen3, depth):
    llm = qwen3.llm(num_kvcache_blocks=100)
    llm.depth = depth
    other = llm.add_request([5, 6, 7], greedy(30))
    for delta in llm.stream(many_prompts(6), LONG):
        assert delta.finish_reason is None
        if len(delta.token_ids) and llm.stats()["num_running"] > 3:
            break
    del delta
    gc.collect()
    assert llm.stats()["num_running"] + llm.stats()["num_waiting"] == 1
    assert_matches(qwen3, [[5, 6, 7]], [drain(llm)[other][0]], 30)
    with contextlib.suppress(ZeroDivisionError):
        for _ in llm.stream("abc", LONG):
            _ = 1 / 0
    gc.collect()
    assert_idle(llm)


def test_streams_beside_each_other(qwen3, llm):
    """Two half-read streams and a `generate` in one engine; each gets what is its own."""
    first, second = llm.stream([1, 2], greedy(20)), llm.stream([[3], [4]], greedy(12))
    tokens: dict[int, list[int]] = {}
    for _ in range(3):
        for delta in (next(first), next(second)):
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert_matches(qwen3, [[9]], llm.generate([9], greedy(7), use_tqdm=False), 7)
    for delta in [*second, *first]:
        tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert_matches(qwen3, [[1, 2], [3], [4]], [tokens[i] for i in sorted(tokens)], [20, 12, 12])
    assert_idle(llm)


def test_the_last_delta_of_each_completion_says_how_it_ended(llm):
    ends: dict[tuple[int, int], list[str | None]] = {}
    for delta in llm.stream(["ab", "cd"], SamplingParams(n=2, max_tokens=6, ignore_eos=True)):
        ends.setdefault((delta.request_id, delta.index), []).append(delta.finish_reason)
    assert len(ends) == 4
    for reasons in ends.values():
        assert reasons == [None] * 5 + ["length"]


# ---- aborts ----


@pytest.mark.parametrize("depth", [0, 1])
def test_abort_in_every_state(qwen3, depth):
    """Waiting, in the middle of its prompt, with a step in flight, decoding, preempted, finished, unknown."""
    llm = qwen3.llm(max_num_batched_tokens=20, max_num_seqs=3, num_kvcache_blocks=14)
    llm.depth = depth
    keep, prompts = [], many_prompts(8)
    for num_steps in (0, 1, 2, 3, 5, 9, 15, 40):
        ids = [llm.add_request(prompt, greedy(12)) for prompt in prompts[:6]]
        for _ in range(num_steps):
            keep += llm.step()[0]
        for request_id in ids[::2]:
            llm.abort(request_id)
            llm.abort(request_id)  # harmless
        check_blocks(llm.block_manager, [*llm.scheduler.running, *llm.scheduler.waiting])
        done = dict(keep)
        done.update((i, tokens) for i, (tokens, *_) in drain(llm).items())
        keep = []
        assert sorted(done) == ids
        for request_id, prompt in zip(ids, prompts):
            expected = qwen3.answers([prompt], 64)[0][0][:12]
            found = done[request_id]
            assert found == expected[: len(found)]
            assert len(found) == 12 or request_id in ids[::2]
        llm.abort(10**9)
    assert_idle(llm)


def test_an_aborted_request_says_so(llm):
    deltas = []
    for delta in llm.stream("abc", SamplingParams(n=2, max_tokens=50, ignore_eos=True)):
        deltas.append(delta)
        if len(deltas) == 7:
            llm.abort(delta.request_id)
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["abort", "abort"]
    assert len(deltas) < 20


def test_an_abort_of_what_is_no_request_id(qwen3, llm):
    """vLLM's ids are strings, and it takes lists of them: refused, instead of quietly aborting nothing."""
    for wrong in ("3", [3], None, 1.0, -1):
        with pytest.raises(ValueError, match="request_id must be an integer"):
            llm.abort(wrong)
    assert_matches(qwen3, [[1, 2]], llm.generate([1, 2], greedy(6), use_tqdm=False), 6)


@pytest.mark.parametrize("within", [True, False])
def test_abort_from_another_thread(llm, within):
    """While that is within a step, or between two."""
    found: list[Any] = []
    is_running, is_aborted = threading.Event(), threading.Event()

    def work() -> None:
        params = dataclasses.replace(LONG, max_tokens=250)
        if within:
            found.extend(llm.generate(["ab"], params, use_tqdm=False))
            return
        deltas = llm.stream(["ab"], params)
        length = len(next(deltas).token_ids)
        is_running.set()
        assert is_aborted.wait(HANGING_S)
        for delta in deltas:
            length += len(delta.token_ids)
        found.append((delta.finish_reason, length))

    def waiting(schedule: Any) -> Any:
        def wrapped() -> Any:
            is_running.set()
            wait_until(lambda: llm._aborts)
            return schedule()

        return wrapped

    thread = threading.Thread(target=work)
    with replaced(llm.scheduler, "schedule", waiting if within else lambda schedule: schedule):
        thread.start()
        assert is_running.wait(HANGING_S)
        llm.abort(next(iter(llm._requests)))
        is_aborted.set()
        thread.join(HANGING_S)
    if not within:
        assert found == [("abort", 1 + llm.depth)], "what was in flight counts"
        assert_idle(llm)
        return
    (output,) = found
    assert output.outputs[0].finish_reason == "abort"
    assert len(output["token_ids"]) < 250
    assert_idle(llm)


def test_abort_from_within_a_step(llm):
    """A user's callable may end its own request; the step does so when it is over."""

    def enough(output_ids, logits):
        if len(output_ids) == 4:
            llm.abort(max(llm._requests))
        return logits

    params = SamplingParams(max_tokens=50, ignore_eos=True, logits_processors=[enough])
    outputs = llm.generate([[1, 2], [3]], [greedy(20), params], use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "abort"]
    assert len(outputs[1]["token_ids"]) == 5
    assert_idle(llm)


# ---- interruptions of what only this API has ----


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stream_survives_the_interruption_of_others(qwen3, depth):
    """Another call fails in the middle of steps; a half-read stream with stop strings and n goes on as before."""
    llm = qwen3.llm(num_kvcache_blocks=60)
    llm.depth = depth
    params = SamplingParams(n=2, seed=5, max_tokens=40, ignore_eos=True, stop=["zzz"], logprobs=1)
    (expected,) = llm.generate("abc", params, use_tqdm=False)
    places = [
        (llm.scheduler, "postprocess"), (llm, "_finish"), (llm, "_report"), (llm.model_runner, "call"),
        (llm.scheduler, "finish"), (llm.scheduler, "advance"),
    ]  # fmt: skip
    for owner, name in places:
        for when in ("before", "after"):
            text, tokens = {}, {}
            for i, delta in enumerate(llm.stream("abc", params)):
                text[delta.index] = text.get(delta.index, "") + delta.text
                tokens.setdefault(delta.index, []).extend(delta.token_ids)
                if i in (3, 11, 40):

                    def failing(function, when=when):
                        def wrapped(*args):
                            if when == "after":
                                function(*args)
                            raise KeyboardInterrupt

                        return wrapped

                    with replaced(owner, name, failing), pytest.raises(KeyboardInterrupt):
                        llm.generate([[1]], greedy(2), use_tqdm=False)
            assert [text[i] for i in range(2)] == [completion.text for completion in expected.outputs]
            assert [tokens[i] for i in range(2)] == [completion.token_ids for completion in expected.outputs]
            assert_idle(llm)


# ---- chats ----


def test_chat(chat_llm):
    message, params = {"role": "user", "content": "hi"}, greedy(6)

    def prompt_of(*args, **kwargs):
        return chat_llm.chat(*args, params, use_tqdm=False, **kwargs)[0].prompt

    assert prompt_of([message]) == "[user:hi]>"
    assert prompt_of([message], add_generation_prompt=False) == "[user:hi]"
    assert prompt_of([message], chat_template_kwargs={"enable_thinking": False}) == "[user:hi](thinking False)>"
    tools = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
    assert prompt_of([message], tools=tools) == "[user:hi](tools look)>"
    assert prompt_of([message], chat_template="{{ messages[0].content }}!") == "hi!"
    outputs = chat_llm.chat([[message], [message, {"role": "assistant", "content": "yes"}]], params, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["[user:hi]>", "[user:hi][assistant:yes]>"]
    (direct,) = chat_llm.generate("[user:hi]>", params, use_tqdm=False)
    assert direct["token_ids"] == outputs[0]["token_ids"]
    assert "".join(d.text for d in chat_llm.stream(chat_llm.chat_prompts([message]), params)) == outputs[0]["text"]
    assert chat_llm.get_tokenizer() is chat_llm.tokenizer


def test_a_chat_that_goes_on_with_its_last_message(chat_llm):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    kwargs = {"add_generation_prompt": False, "continue_final_message": True}
    (output,) = chat_llm.chat(messages, greedy(6), use_tqdm=False, **kwargs)
    assert output.prompt == "[user:hi][assistant:Well,"
    with pytest.raises(ValueError, match="continue_final_message"):
        chat_llm.chat(messages, greedy(6), use_tqdm=False, continue_final_message=True)


def test_a_content_of_parts_is_their_text(chat_llm):
    """As vLLM gives it to templates that expect a text; they would print the list."""
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    (prompt,) = chat_llm.chat_prompts(messages)
    assert prompt["prompt"] == "[user:hi\nthere][assistant:yes]>"
    assert messages[0]["content"] is parts
    image = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
    with pytest.raises(ValueError, match=r"image_url.*only text"):
        chat_llm.chat([{"role": "user", "content": [*parts, image]}], use_tqdm=False)


@pytest.mark.parametrize(
    "template", ["{% for", "{{ raise_exception('roles must alternate') }}", "{{ 1 + messages }}", "{{ a.b.c }}"]
)
def test_a_template_that_fails(chat_llm, template):
    with pytest.raises(ValueError, match=r"the chat template cannot put these messages into words: ."):
        chat_llm.chat([{"role": "user", "content": "hi"}], chat_template=template, use_tqdm=False)


@pytest.mark.parametrize("name", ["tools", "chat_template", "add_generation_prompt", "tokenize", "conversation"])
def test_bad_chat_template_kwargs(chat_llm, name):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match=f"chat_template_kwargs contains.*{name}"):
        chat_llm.chat(messages, chat_template_kwargs={name: True}, use_tqdm=False)
    with pytest.raises(TypeError, match="chat_template_kwargs must be a dict"):
        chat_llm.chat(messages, chat_template_kwargs=[name], use_tqdm=False)


def test_bad_chats(llm, chat_llm):
    with pytest.raises(ValueError, match=r"no chat template: pass chat_template="):
        llm.chat([{"role": "user", "content": "hi"}])
    wrong = ["hi", None, 3, [], [[]], ["hi"], [{"role": "user", "content": "a"}, "hi"], {"role": "user"}, [1]]
    wrong += [[{"content": "hi"}], [{"role": 1, "content": "hi"}]]
    for messages in wrong:
        with pytest.raises(TypeError, match="messages must be"):
            chat_llm.chat(messages, use_tqdm=False)
    with pytest.raises(TypeError, match="templat"):
        chat_llm.chat([{"role": "user", "content": "hi"}], templat="x")
    for name in ("add_generation_prompt", "continue_final_message"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
            chat_llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False, **{name: "no"})
    for message in ({"role": "user", "content": None}, {"role": "user"}, {"role": "user", "content": 5}):
        with pytest.raises(TypeError, match=r"content of a message must be a string .*, got (None|5) from 'user'"):
            chat_llm.chat([message], use_tqdm=False)
    call = {"role": "assistant", "content": None, "tool_calls": []}
    template = "{{ messages[0].tool_calls }}"
    assert chat_llm.chat_prompts([call], chat_template=template)[0]["prompt"] == "[]", "a call needs no content"
    assert_idle(chat_llm)


def test_arguments_of_tool_calls_are_objects(chat_llm):
    """As OpenAI has them they are JSON, which a template would write as one string."""
    template = (
        "{% for m in messages %}<{{ m.content }}>{% for c in m.tool_calls %}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )

    def call(arguments: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "weather", "arguments": arguments}}

    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [call('{"city": "Paris"}'), call(""), call({"a": 1})],
    }
    before = str(message)
    (prompt,) = chat_llm.chat_prompts([message], chat_template=template)
    assert prompt["prompt"] == '<>{"city": "Paris"}{}{"a": 1}'
    assert str(message) == before
    message["tool_calls"] = [call("{city")]
    with pytest.raises(ValueError, match=r"arguments that are no JSON: '\{city'"):
        chat_llm.chat_prompts([message], chat_template=template)


def test_the_tokenizer_that_is_handed_out_is_the_users(chat_llm):
    """What it is told to do, which it keeps as a state, is not done to prompts."""
    text = "a text of several words, which is not to be cut off"
    whole = chat_llm.input_processor.make_requests(text, None)[0].prompt_token_ids
    tokenizer = chat_llm.get_tokenizer()
    assert len(tokenizer(text, truncation=True, max_length=4)["input_ids"]) == 4 < len(whole)
    tokenizer.backend_tokenizer.enable_truncation(4)
    try:
        assert chat_llm.input_processor.make_requests(text, None)[0].prompt_token_ids == whole
    finally:
        tokenizer.backend_tokenizer.no_truncation()
    assert chat_llm.get_tokenizer() is tokenizer is chat_llm.tokenizer


def test_inside_autocast(qwen3, llm):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = llm.generate([[1, 2, 3]], greedy(8), use_tqdm=False)
        with qwen3.llm() as other:
            assert_matches(qwen3, [[1, 2, 3]], other.generate([[1, 2, 3]], greedy(8), use_tqdm=False), 8)
    assert_matches(qwen3, [[1, 2, 3]], outputs, 8)


def test_outside_of_autocast(llm, monkeypatch):
    """Torch's own is not entered: Ctrl-C inside it would leave its count of nested blocks wrong for good."""
    entered = []
    enter = torch.autocast.__enter__
    monkeypatch.setattr(torch.autocast, "__enter__", lambda self: (entered.append(self), enter(self))[1])
    llm.generate([[1, 2, 3]], greedy(8), use_tqdm=False)
    assert entered == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        llm.generate([[1, 2, 3]], greedy(8), use_tqdm=False)
    assert len(entered) > 1


def test_a_template_runs_in_a_sandbox(chat_llm):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        chat_llm.chat([{"role": "user", "content": "hi"}], chat_template=template, use_tqdm=False)
    assert_idle(chat_llm)


# ---- everything else ----


class Terminal(io.StringIO):
    """Takes `num_writes`, and then fails as a pipe does that nobody reads."""

    def __init__(self, num_writes: float):
        super().__init__()
        self.num_writes = num_writes

    def write(self, text: str) -> int:
        self.num_writes -= 1
        if self.num_writes < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("num_writes", [math.inf, 3, 0])
def test_a_progress_bar_never_costs_the_outputs(qwen3, llm, monkeypatch, num_writes):
    prompts = many_prompts(6)
    terminal = Terminal(num_writes)
    monkeypatch.setattr(sys, "stderr", terminal)
    outputs = llm.generate(prompts, greedy(8), use_tqdm=True)
    assert_matches(qwen3, prompts, outputs, 8)
    if num_writes == math.inf:
        assert "6/6" in terminal.getvalue()
        assert "output tok/s" in terminal.getvalue()
    else:
        assert terminal.num_writes < 0
    terminal.close()
    assert_matches(qwen3, prompts, llm.generate(prompts, greedy(8), use_tqdm=True), 8)


def test_stats_and_reset_prefix_cache(qwen3):
    llm = qwen3.llm(num_kvcache_blocks=40, max_num_seqs=2)
    idle = {"num_waiting": 0, "num_running": 0, "num_free_blocks": 40, "num_blocks": 40, "num_preemptions": 0}
    assert llm.stats() == idle
    prompt = many_prompts(1)[0]
    for i in range(4):
        llm.add_request([i, *prompt[1:]], greedy(5))
    llm.step()
    stats = llm.stats()
    assert (stats["num_waiting"], stats["num_running"], stats["num_free_blocks"]) == (2, 2, 40 - 2 * 5)
    drain(llm)
    assert llm.stats() == idle
    assert llm.generate(prompt, greedy(2), use_tqdm=False)[0].metrics.num_cached_prompt_tokens == 0
    assert llm.generate(prompt, greedy(2), use_tqdm=False)[0].metrics.num_cached_prompt_tokens == 64
    llm.reset_prefix_cache()
    assert llm.generate(prompt, greedy(2), use_tqdm=False)[0].metrics.num_cached_prompt_tokens == 0
    # In the middle of other people's requests as well.
    request_id = llm.add_request(prompt, greedy(20))
    for _ in range(5):
        llm.step()
    llm.reset_prefix_cache()
    assert_matches(qwen3, [prompt], [drain(llm)[request_id][0]], 20)


def test_progress_shows_requests_and_both_rates(llm, capsys):
    llm.generate(["ab", "cd"], greedy(4))
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "prompt +" in shown
    assert "output tok/s" in shown
    llm.generate(["ab"], greedy(4), use_tqdm=False)
    assert capsys.readouterr().err == ""
    assert progress.tqdm is tqdm.auto.tqdm, "which is a widget in notebooks"


def test_threads_get_their_own_results(qwen3):
    """Both are served together: neither waits for the other to end."""
    llm = qwen3.llm()
    results: dict[int, Any] = {}
    lengths, prompts = [400, 20, 20], [many_prompts(6, seed=s) for s in range(3)]

    def work(i: int) -> None:
        outputs = llm.generate(prompts[i], greedy(lengths[i]), use_tqdm=False)
        results[i] = outputs, llm.stats()["num_running"]

    have_come = []

    def counted(enqueue: Any) -> Any:
        def wrapped(*args: Any) -> None:
            have_come.append(args)
            enqueue(*args)

        return wrapped

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    with replaced(llm, "_enqueue", counted):

        def start() -> None:
            for thread in threads:
                thread.start()
            wait_until(lambda: len(have_come) == 3)

        llm._lock.hold(start)  # none begins before all are there
        for thread in threads:
            thread.join(HANGING_S)
    assert len(results) == 3
    for i in range(1, 3):
        assert_matches(qwen3, prompts[i], results[i][0], lengths[i])
    assert all(len(output["token_ids"]) > 100 for output in results[0][0])
    assert results[1][1] >= 6 and results[2][1] >= 6, "the short calls waited for the long one"
    assert_idle(llm)


def test_the_lock_is_had_in_turn():
    """Whoever has let go of it waits for those who waited before; a plain lock it would have again at once."""
    lock, turns, is_over = FairLock(), [], threading.Event()

    def work(name: str) -> None:
        while not is_over.is_set():
            lock.hold(lambda: turns.append(name))

    def wait_for_one_inside() -> int:
        while lock._turnstile.acquire(blocking=False):
            lock._turnstile.release()
        return len(turns)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]

    def start() -> None:
        for thread in threads:
            thread.start()
        wait_for_one_inside()

    lock.hold(start)
    for _ in range(100):
        num_turns = lock.hold(wait_for_one_inside)
        assert lock.hold(lambda: len(turns)) > num_turns, "the one inside the turnstile was passed"
    is_over.set()
    for thread in threads:
        thread.join(HANGING_S)
    assert not lock.is_mine


def test_the_lock_survives_ctrl_c_while_it_waits():
    lock, has_it, is_over, main = FairLock(), threading.Event(), threading.Event(), threading.get_ident()

    def interrupt() -> None:
        has_it.set()
        while lock._turnstile.acquire(blocking=False):  # until the main thread waits inside
            lock._turnstile.release()
        signal.pthread_kill(main, signal.SIGINT)
        is_over.wait(HANGING_S)

    thread = threading.Thread(target=lock.hold, args=(interrupt,))
    thread.start()
    assert has_it.wait(HANGING_S)
    with pytest.raises(KeyboardInterrupt):
        lock.hold(lambda: pytest.fail("it was not waited for"))
    assert not lock.is_mine
    is_over.set()
    thread.join(HANGING_S)
    other = threading.Thread(target=lock.hold, args=(lambda: None,))  # which comes through the turnstile
    other.start()
    other.join(HANGING_S)
    assert not other.is_alive()


def test_an_engine_that_was_closed_says_so(qwen3, capsys):
    llm = qwen3.llm()
    llm.close()
    llm.close()
    for use in (lambda: llm.generate("a"), lambda: next(llm.stream("a")), lambda: llm.add_request("a")):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    assert "Generating" not in capsys.readouterr().err


# ---- what is wrong in a field ----

INT, FLOAT, STR = "integer", "number", "string"
BAD_FIELDS: list[tuple[str, Any, str]] = [
    *[("n", value, "at least 1") for value in (0, -1, 1.0, "2", None, True)],
    *[("temperature", value, "0.0 to 1000000.0") for value in (-0.1, 1e7, math.nan, math.inf, "1", None)],
    *[("top_p", value, "1") for value in (0, -0.5, 1.01, math.nan, "1", None)],
    *[("top_k", value, "-1") for value in (-2, 1.5, "5", None, True)],
    *[("min_p", value, "0.0 to 1.0") for value in (-0.1, 1.1, math.nan, "0", None)],
    *[(f"{name}_penalty", value, "-2.0 to 2.0") for name in ("presence", "frequency") for value in (-2.1, 2.1, "1")],
    *[("repetition_penalty", value, "1e-06 to") for value in (0, -1.0, 1e-7, 1e7, math.inf, "1", None)],
    *[("seed", value, str(2**63 - 1)) for value in (2**63, -(2**63) - 1, 1.0, "1")],
    *[("stop", value, "non-empty string|list") for value in ("", [""], ["a", ""], [1], 3, b"a", {"a": 1})],
    *[("stop_token_ids", value, "at least 0|list") for value in ([-1], [1.0], ["a"], 5, "5", [True])],
    *[("ignore_eos", value, "True or False") for value in (0, "no", None)],
    *[("max_tokens", value, "at least 1") for value in (0, -5, 1.0, "8")],
    *[("min_tokens", value, "at least 0") for value in (-1, 1.0, "1", None)],
    *[(name, value, "0 to 20") for name in ("logprobs", "prompt_logprobs") for value in (-1, 21, 1.0, "1", True)],
    *[("logit_bias", value, "dict|at least 0|-100.0 to 100.0") for value in ([1], {-1: 0}, {"a": 1}, {1: 101})],
    *[("allowed_token_ids", value, "at least 0|empty|list") for value in ([], [-1], ["a"], 5)],
    *[("bad_words", value, "non-empty strings|list") for value in ([""], [1], "word", 5)],
    *[("logits_processors", value, "callables|list") for value in ([1], len, "f")],
    *[("structured_outputs", value, "StructuredOutputsParams") for value in ({"json": {}}, "{}", 3)],
    *[
        (name, value, "True or False")
        for name in ("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output")
        for value in (0, 1, "yes", None)
    ],
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "span"), BAD_FIELDS, ids=lambda value: str(value)[:24])
def test_a_field_out_of_range_or_of_a_wrong_type(field, value, span):
    """The message names the field, the value and what would be right; a wrong type is Python's TypeError as well."""
    with pytest.raises(ValueError, match=span) as caught:
        SamplingParams(**{field: value})
    assert isinstance(caught.value, TypeError) == isinstance(caught.value, WrongTypeError)
    message = str(caught.value)
    assert field in message
    if not isinstance(value, (list, dict)) and value != "":
        assert str(value) in message or repr(value) in message


def test_every_field_is_tested_for_wrong_values():
    fields = {field.name for field in dataclasses.fields(SamplingParams) if field.init}
    assert fields == {name for name, _, _ in BAD_FIELDS}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 .*max_tokens=8"),
        ({"min_tokens": 65}, "min_tokens=65 .*max_tokens=64"),
        ({"n": 3, "temperature": 0}, "n=3 .*temperature=0 "),
        ({"n": 2, "temperature": 1e-6}, "n=2 .*temperature=1e-06 "),
        ({"stop": "a", "detokenize": False}, "stop='a' .*detokenize=False"),
    ],
)
def test_contradictions(fields, match):
    with pytest.raises(ValueError, match=match):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "exactly one.*json.*regex"),
        ({"json": "{"}, "json is not valid"),
        ({"json": 5}, "json must be"),
        ({"json": []}, "json must be"),
        ({"json": "[1]"}, r"json must be a schema.*'\[1\]'"),
        pytest.param({"json": {"const": object()}}, "json is not valid.*object", id="{'json': {'const': object()}}"),
        ({"regex": 5}, "regex must be"),
        ({"choice": []}, "choice must be"),
        ({"choice": "abc"}, "choice must be"),
        ({"choice": ["a", ""]}, "choice must be"),
        ({"choice": ["a", 1]}, "choice must be"),
        ({"grammar": 5}, "grammar must be"),
    ],
    ids=str,
)
def test_bad_structured_outputs(fields, match):
    with pytest.raises(ValueError, match=match):
        StructuredOutputsParams(**fields)
    with pytest.raises(TypeError, match=r"'jsn'.*'json'"):
        StructuredOutputsParams(jsn="{}")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"n": 65}, "n=65 .*max_num_seqs=64"),
        ({"stop_token_ids": [VOCAB_SIZE]}, f"stop_token_ids contains {VOCAB_SIZE}.*0 to {VOCAB_SIZE - 1}"),
        ({"allowed_token_ids": [3, 10**6]}, "allowed_token_ids contains 1000000"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, f"logit_bias contains {VOCAB_SIZE}"),
        ({"structured_outputs": StructuredOutputsParams(json={"type": "nonsense"})}, r"structured_outputs\.json"),
        ({"structured_outputs": StructuredOutputsParams(grammar="start: (")}, r"structured_outputs\.grammar"),
        ({"structured_outputs": StructuredOutputsParams(json={"const": math.nan})}, r"structured_outputs\.json"),
        ({"structured_outputs": StructuredOutputsParams(json={"$ref": "#/no"})}, r"structured_outputs\.json.*/no"),
        ({"structured_outputs": StructuredOutputsParams(regex=r"(?<=a)b")}, r"structured_outputs\.regex"),
        ({"structured_outputs": StructuredOutputsParams(regex="(x")}, r'structured_outputs\.regex.*"\(x"'),
        ({"structured_outputs": StructuredOutputsParams(choice=["\ud800"])}, r"structured_outputs\.choice"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_only_the_engine_can_know_is_refused_before_anything_is_queued(llm, qwen3, fields, match):
    added = []
    with replaced(llm.scheduler, "add", lambda add: lambda seq: added.append(seq) or add(seq)):
        for call in (llm.generate, llm.stream):
            with pytest.raises(ValueError, match=match):
                call([[1], [2]], [greedy(3), SamplingParams(**fields)])
        with pytest.raises(ValueError, match=match):
            llm.add_request([1], SamplingParams(**fields))
    assert not added
    assert_idle(llm)
    assert_matches(qwen3, [[1, 2]], llm.generate([1, 2], greedy(6), use_tqdm=False), 6)


def test_what_leaves_no_token_to_draw_ends_with_an_error(qwen3, llm):
    """Allowed tokens that are all bad words: an error of this request, and of no other."""
    bad = SamplingParams(allowed_token_ids=[65, 66], bad_words=["b", "c"], max_tokens=5)
    letters = make_tokenizer().decode([65, 66])
    bad = dataclasses.replace(bad, bad_words=list(letters), logprobs=1)
    outputs = llm.generate([[1, 2], [3]], [greedy(5), bad], use_tqdm=False)
    assert_matches(qwen3, [[1, 2]], outputs[:1], 5)
    assert outputs[1].outputs[0].finish_reason == "error"
    assert outputs[1]["token_ids"] == []
    assert outputs[1].outputs[0].cumulative_logprob == 0
    assert outputs[1].outputs[0].logprobs == []
    assert_idle(llm)


def test_bad_words_never_appear(llm):
    rng = random.Random(0)
    words = ["a", "xy", "é", "  b"]
    params = SamplingParams(
        temperature=1.5, bad_words=words, max_tokens=80, ignore_eos=True, n=8, seed=rng.randrange(99),
        allowed_token_ids=[x for text in ("abxyz é",) for x in make_tokenizer().encode(text)],
    )  # fmt: skip
    (output,) = llm.generate("abc", params, use_tqdm=False)
    for completion in output.outputs:
        assert len(completion.token_ids) == 80
        assert not any(word in completion.text for word in ("a", "xy", "é"))
        assert EOS not in completion.token_ids


def test_a_callable_that_fails_takes_its_call_out(qwen3, llm):
    def broken(output_ids, logits):
        if len(output_ids) == 3:
            raise OSError("no disk")
        return logits

    with pytest.raises(OSError, match="no disk"):
        llm.generate([[1], [2]], SamplingParams(logits_processors=[broken], ignore_eos=True), use_tqdm=False)
    assert_idle(llm)
    for wrong in (lambda ids, logits: None, lambda ids, logits: logits[:3], lambda ids, logits: "x"):
        with pytest.raises((TypeError, ValueError), match="logits_processors"):
            llm.generate([1], SamplingParams(logits_processors=[wrong]), use_tqdm=False)
        assert_idle(llm)
    assert_matches(qwen3, [[1, 2]], llm.generate([1, 2], greedy(6), use_tqdm=False), 6)


def break_at(num_tokens: int, error: BaseException):
    def broken(output_ids, logits):
        if len(output_ids) == num_tokens:
            raise error
        return logits

    return broken


def test_a_callable_that_fails_takes_no_other_call_out(qwen3):
    """Whoever steps the engine when it fails: the one who owns it is told, once, and the rows beside it go on."""
    llm = qwen3.llm()
    broken = SamplingParams(n=2, logits_processors=[break_at(3, OSError("no disk")), lambda ids, x: x], ignore_eos=True)
    first, second = llm.stream([1, 2], greedy(20)), llm.stream([[3], [4]], [broken, greedy(20)])
    tokens = [token for _ in range(2) for token in next(first).token_ids]
    assert next(second).token_ids
    tokens += [token for delta in first for token in delta.token_ids]  # it failed in these steps
    assert_matches(qwen3, [[1, 2]], [tokens], 20)
    with pytest.raises(OSError, match="no disk"):
        list(second)
    assert_idle(llm)
    # Beside `generate`, and of a request that was queued with `add_request`: `step` raises, and goes on.
    broken = dataclasses.replace(broken, n=1)
    ids = [llm.add_request([i + 1], broken if i == 1 else greedy(5 + i)) for i in range(3)]
    assert_matches(qwen3, [[7, 8]], llm.generate([7, 8], greedy(10), use_tqdm=False), 10)
    with pytest.raises(OSError, match="no disk"):
        llm.step()
    done = drain(llm)
    assert_matches(qwen3, [[1], [3]], [done[i][0] for i in ids[::2]], [5, 7])
    assert ids[1] not in done


def test_a_callable_interrupted_by_ctrl_c(qwen3, llm):
    params = SamplingParams(logits_processors=[break_at(3, KeyboardInterrupt())], ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], params, use_tqdm=False)
    assert_idle(llm)
    assert_matches(qwen3, [[1, 2]], llm.generate([1, 2], greedy(6), use_tqdm=False), 6)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_callable_that_calls_the_engine_is_refused(qwen3, depth):
    """In the middle of a step, with and without catching the error; everybody else's requests go on."""
    llm = qwen3.llm()
    llm.depth = depth
    half_read = []
    uses = {
        "generate": lambda: llm.generate([1], greedy(2), use_tqdm=False),
        "stream": lambda: next(llm.stream([1], greedy(2))),
        "a stream that is half read": lambda: next(half_read[0]),
        "add_request": lambda: llm.add_request([1], greedy(2)),
        "step": llm.step,
        "reset_prefix_cache": llm.reset_prefix_cache,
        "close": llm.close,
    }
    for name, use in uses.items():
        for catches in (False, True):
            half_read[:] = [llm.stream([5, 6], greedy(30))]
            next(half_read[0])
            refused = []

            def meddling(output_ids, logits, use=use, catches=catches, refused=refused):
                if len(output_ids) == 2:
                    try:
                        use()
                    except RuntimeError as error:
                        refused.append(str(error))
                        if not catches:
                            raise
                    llm.abort(10**9)
                    assert llm.stats()["num_running"] >= 2
                return logits

            params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logits_processors=[meddling])
            if catches:
                outputs = llm.generate([[1, 2], [3]], [params, greedy(6)], use_tqdm=False)
                assert_matches(qwen3, [[1, 2], [3]], outputs, 6)
            else:
                with pytest.raises(RuntimeError, match="in the middle of a step"):
                    llm.generate([[1, 2], [3]], [params, greedy(6)], use_tqdm=False)
            assert len(refused) == 1, name
            assert "in the middle of a step" in refused[0]
            if "half read" not in name:  # which ends the stream, as any exception in a generator does
                tokens = [token for delta in half_read[0] for token in delta.token_ids]
                assert_matches(qwen3, [[5, 6]], [qwen3.answers([[5, 6]], 64)[0][0][:1] + tokens], 30)
            assert_idle(llm)


def test_no_interruption_leaves_an_engine_that_refuses(qwen3, llm):
    """What Ctrl-C can leave behind does not pass for the middle of a step: only the call stack does."""
    llm._lock._lock.acquire()
    assert_matches(qwen3, [[1, 2]], llm.generate([1, 2], greedy(6), use_tqdm=False), 6)


def test_whatever_thread_steps_it_does_so_on_the_engines_gpu(qwen3, monkeypatch):
    """The current GPU is a setting of each thread; -1 stands for none. (On two GPUs: test_gpu.py.)"""
    current = threading.local()

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current.index = getattr(current, "index", 0), self.index

        def __exit__(self, *exc_info):
            current.index = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    llm = qwen3.llm()
    assert llm._cuda_index == -1
    llm._cuda_index, seen = 1, []

    def watched(function):
        def wrapped(*args):
            seen.append((threading.get_ident(), current.index))
            return function(*args)

        return wrapped

    def use():
        llm.generate([1], greedy(3), use_tqdm=False)
        list(llm.stream([1], greedy(3)))
        llm.add_request([1], greedy(3))
        drain(llm)
        for _ in llm.stream([1], greedy(30)):
            break
        params = SamplingParams(logits_processors=[break_at(1, KeyboardInterrupt())])
        with pytest.raises(KeyboardInterrupt):
            llm.generate([1], params, use_tqdm=False)
        assert getattr(current, "index", 0) == 0, "the thread's own is restored"

    with (
        replaced(llm.model_runner, "call", watched),
        replaced(llm.scheduler, "reset", watched),
        replaced(llm.scheduler, "finish", watched),
    ):
        use()
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert len({ident for ident, _ in seen}) == 2
    assert {index for _, index in seen} == {1}


def test_a_vllm_logits_processor_that_counts(llm):
    """It is asked once a token, also where the prompt comes in chunks or the request is preempted and starts over."""
    asked = []

    def processor(output_ids, logits):
        asked.append(list(output_ids))
        return logits

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logits_processors=[processor])
    (output,) = llm.generate([many_prompts(1)[0]], params, use_tqdm=False)
    assert asked == [output["token_ids"][:i] for i in range(8)]


def test_greedy_is_temperature_zero(qwen3, llm):
    prompts = many_prompts(4, seed=8)
    params = SamplingParams(temperature=0, seed=3, max_tokens=16, ignore_eos=True)
    assert_matches(qwen3, prompts, llm.generate(prompts, params, use_tqdm=False), 16)
    assert torch.get_num_threads() == 1
    assert Path(llm.config.model) == qwen3.path
