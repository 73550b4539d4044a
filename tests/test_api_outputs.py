"""Outputs: log probabilities against transformers, texts against one-shot decoding, ends of every kind."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    EOS,
    VOCAB_SIZE,
    Watch,
    assert_idle,
    assert_matches,
    assert_same_outputs,
    copy_checkpoint,
    copy_with_eos,
    everything_at_once,
    greedy,
    make_tokenizer,
    many_prompts,
    random_prompt,
    replaced,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from nanovllm import LLM, CompletionOutput, Logprob, RequestOutput, SamplingParams
from nanovllm.engine.detokenizer import Detokenizer, decode, full_text
from nanovllm.inputs import TextPrompt, TokensPrompt
from nanovllm.utils.demo import demo_model_path

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[0, 1], ids=["depth 0", "depth 1"])
def llm(qwen3, request) -> LLM:
    llm = qwen3.llm()
    llm.depth = request.param
    return llm


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


# ---- log probabilities ----


def assert_logprobs(model, output: RequestOutput, k: int | None, prompt_k: int | None) -> None:
    """Every number of an output against one transformers forward a completion."""
    prompt = output.prompt_token_ids
    for completion in output.outputs:
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.inference_mode():
            expected = model(ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        if k is None:
            assert completion.logprobs is None
            assert completion.cumulative_logprob is None
        else:
            assert len(completion.logprobs) == len(completion.token_ids)
            for i, (token_id, found) in enumerate(zip(completion.token_ids, completion.logprobs)):
                assert_entry(expected[len(prompt) - 1 + i], token_id, found, k)
            total = sum(found[token_id].logprob for token_id, found in zip(completion.token_ids, completion.logprobs))
            assert completion.cumulative_logprob == pytest.approx(total)
    if prompt_k is None:
        assert output.prompt_logprobs is None
    else:
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for i in range(1, len(prompt)):
            assert_entry(expected[i - 1], prompt[i], output.prompt_logprobs[i], prompt_k)


def assert_entry(expected: torch.Tensor, token_id: int, found: dict[int, Logprob], k: int) -> None:
    assert next(iter(found)) == token_id, "the sampled token comes first"
    top = expected.topk(max(k, 1))
    assert k <= len(found) <= k + 1
    for other, entry in found.items():
        assert abs(entry.logprob - expected[other].item()) < TOLERANCE
    rank = int((expected > expected[token_id]).sum()) + 1
    near = int(((expected - expected[token_id]).abs() < TOLERANCE).sum())
    assert abs(found[token_id].rank - rank) < near
    others = [entry for other, entry in found.items() if other != token_id]
    assert [entry.rank for entry in others] == [r for r in range(1, k + 1) if r != found[token_id].rank][: len(others)]
    if k:
        worst = min(entry.logprob for other, entry in found.items() if entry.rank <= k)
        assert abs(worst - top.values[k - 1].item()) < TOLERANCE


@pytest.mark.parametrize("budget", [16384, 13])
@pytest.mark.parametrize("num_blocks", [800, 24])
def test_logprobs_equal_transformers(qwen3, budget, num_blocks):
    """In one batch, chunked, preempted; drawn with filters, which log probabilities know nothing of."""
    llm = qwen3.llm(max_num_batched_tokens=budget, num_kvcache_blocks=num_blocks)
    llm.scheduler.completion_ratio = 0.0  # it admits more than will fit
    watch = Watch(llm)
    wishes = [(0, None), (3, 2), (None, 0), (20, 20), (1, None), (None, 5), (2, 2), (5, None)]
    params = [
        SamplingParams(
            temperature=0.9, top_k=20, frequency_penalty=0.5, seed=i, max_tokens=24,
            logit_bias={EOS: -100}, logprobs=k, prompt_logprobs=prompt_k,
        )
        for i, (k, prompt_k) in enumerate(wishes)
    ]  # fmt: skip
    outputs = llm.generate(many_prompts(8, seed=4), params, use_tqdm=False)
    for output, (k, prompt_k) in zip(outputs, wishes):
        assert_logprobs(qwen3.model, output, k, prompt_k)
    assert (watch.num_chunks > 0) == (budget == 13)
    assert (watch.num_preemptions > 0) == (num_blocks == 24)
    assert sum(output.metrics.num_preemptions for output in outputs) == watch.num_preemptions
    assert_idle(llm)


def test_logprobs_of_a_prefix_cached_prompt(qwen3):
    """`logprobs` may read the cache; `prompt_logprobs` may not, and says so."""
    llm, prompt = qwen3.llm(), many_prompts(1)[0]
    llm.generate(prompt, greedy(4), use_tqdm=False)
    params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    (cached,) = llm.generate(prompt, SamplingParams(logprobs=3, **params), use_tqdm=False)
    assert cached.metrics.num_cached_prompt_tokens >= 64
    assert_logprobs(qwen3.model, cached, 3, None)
    (whole,) = llm.generate(prompt, SamplingParams(logprobs=3, prompt_logprobs=2, **params), use_tqdm=False)
    assert whole.metrics.num_cached_prompt_tokens == 0
    assert_logprobs(qwen3.model, whole, 3, 2)
    # What it computed serves others all the same.
    llm.reset_prefix_cache()
    llm.generate(prompt, SamplingParams(prompt_logprobs=0, **params), use_tqdm=False)
    (cached,) = llm.generate(prompt, SamplingParams(logprobs=0, **params), use_tqdm=False)
    assert cached.metrics.num_cached_prompt_tokens >= 64
    assert_logprobs(qwen3.model, cached, 0, None)


@pytest.mark.parametrize("budget", [16384, 300])
def test_logprobs_of_a_long_prompt(qwen3, budget):
    """More than have their logits at once, in one step and in chunks that are none of these."""
    llm, runs = qwen3.llm(max_model_len=512, max_num_batched_tokens=budget), []

    def counted(execute):
        def wrapped(step, seqs=None):
            runs.extend(end - begin for _, _, begin, end in step.logprob_runs)
            return execute(step, seqs)

        return wrapped

    prompt = random_prompt(random.Random(0), 400)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=3, prompt_logprobs=3)
    with replaced(llm.model_runner, "execute", counted):
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert runs == ([256, 143] if budget == 16384 else [256, 44, 99])
    assert_logprobs(qwen3.model, output, 3, 3)


def test_logprobs_with_several_samples(qwen3, llm):
    params = SamplingParams(n=3, seed=2, max_tokens=12, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    llm.reset_prefix_cache()
    watch, (prompt,) = Watch(llm), many_prompts(1)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert_logprobs(qwen3.model, output, 2, 1)
    assert len(prompt) == 80
    assert watch.steps[0].total == 80 + 2 * 16, "the first computes it, the others their last block"
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3


def test_logprobs_of_the_demo_model():
    """A real vocabulary, decoded tokens among the numbers."""
    path = demo_model_path()
    llm = LLM(path, device="cpu", max_model_len=256, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=4, prompt_logprobs=3)
    (output,) = llm.generate("The capital of France is", params, use_tqdm=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert_logprobs(model, output, 4, 3)
    tokens = [entry[token_id].decoded_token for token_id, entry in zip(output["token_ids"], output.outputs[0].logprobs)]
    assert "".join(tokens) == output["text"]


# ---- text ----


def texts_of(llm: LLM, prompts, params: SamplingParams) -> tuple[list[str], list[str]]:
    """The texts of `generate`, and the concatenated deltas of `stream`; ids, ends and numbers must be the same too."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    expected = [completion for output in outputs for completion in output.outputs]
    prompt_logprobs = []
    found: dict[tuple[int, int], CompletionOutput] = {}
    for delta in llm.stream(prompts, params):
        key = delta.request_id, delta.index
        is_first = key not in found
        into = found.setdefault(key, CompletionOutput(delta.index, "", [], None, params.logprobs and [], None))
        assert into.finish_reason is None, "nothing comes after the end"
        assert (delta.prompt_logprobs is not None) == (params.prompt_logprobs is not None and is_first and not key[1])
        if delta.prompt_logprobs is not None:
            prompt_logprobs.append(delta.prompt_logprobs)
        if params.logprobs is not None:
            into.logprobs += delta.logprobs
        assert (delta.logprobs is None) == (params.logprobs is None)
        into.text += delta.text
        into.token_ids += delta.token_ids
        into.finish_reason = delta.finish_reason
    completions = [found[key] for key in sorted(found)]
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert [c.finish_reason for c in completions] == [c.finish_reason for c in expected]
    assert [c.logprobs for c in completions] == [c.logprobs for c in expected]
    if params.prompt_logprobs is not None:
        assert prompt_logprobs == [output.prompt_logprobs for output in outputs]
    return [c.text for c in expected], [c.text for c in completions]


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"n": 3}, {"stop": ["zz", "abc", "é"]}, {"skip_special_tokens": False},
        {"n": 2, "logprobs": 2, "prompt_logprobs": 1, "stop": ["z"]},
    ],
    ids=str,
)  # fmt: skip
def test_deltas_add_up_to_the_text_of_generate(llm, fields):
    """Random bytes, most of them no valid UTF-8, and ids beyond the tokenizer's vocabulary among them."""
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=60, ignore_eos=True, **fields)
    expected, found = texts_of(llm, many_prompts(8), params)
    assert found == expected
    assert any("\ufffd" in text for text in expected)
    assert_idle(llm)


def test_a_text_in_one_go_is_what_a_stream_adds_up_to():
    """Pieces of characters in any order, and an id beyond the tokenizer's vocabulary."""
    tokenizer, params, rng, num_broken = make_tokenizer(), SamplingParams(), random.Random(5), 0
    pieces = [*tokenizer.encode("aé漢🙂\ufffd"), 0, 127, 128, 200, 255, EOS, EOS + 1]
    for _ in range(1000):
        ids = rng.choices(pieces, k=rng.randrange(1, 30))
        detokenizer = Detokenizer(tokenizer, params)
        text = ""
        for end in range(len(ids)):
            detokenizer.follow(ids[: end + 1], 0)
            text += detokenizer.take()
        detokenizer.finish(ids)
        text += detokenizer.take()
        assert full_text(tokenizer, ids, params) == text
        num_broken += "\ufffd" in text
    assert num_broken > 500


def force(tokens: list[int]):
    """A logits processor under which a completion is `tokens`."""

    def processor(output_ids, logits):
        logits = torch.full_like(logits, float("-inf"))
        logits[tokens[len(output_ids)]] = 0.0
        return logits

    return processor


def forced(llm: LLM, tokens: list[int], **fields):
    """The deltas and the output of a completion that is `tokens`, or its beginning."""
    params = SamplingParams(max_tokens=len(tokens), logits_processors=[force(tokens)], **fields)
    deltas = list(llm.stream([1], params))
    (output,) = llm.generate([1], params, use_tqdm=False)
    assert "".join(delta.text for delta in deltas) == output["text"]
    assert [token_id for delta in deltas for token_id in delta.token_ids] == output["token_ids"]
    return deltas, output


def test_a_character_never_appears_half(llm):
    text = "aé漢🙂🇩🇪!"
    tokens = make_tokenizer().encode(text)
    assert len(tokens) > 2 * len(text)
    deltas, output = forced(llm, tokens)
    assert output["text"] == text
    assert "\ufffd" not in "".join(delta.text for delta in deltas)
    assert [delta.text for delta in deltas if delta.text] == list(text)
    # Cut in the middle of a character it is what one-shot decoding makes of it.
    _, output = forced(llm, tokens[:-3])
    assert output["text"] == make_tokenizer().decode(tokens[:-3])
    assert output["text"].endswith("\ufffd")


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["STOP", "é!", ["no", "OP", "STOP"], ["P", "STOP"]], ids=str)
def test_a_stop_string_split_over_tokens(llm, stop, include):
    """One byte a token: every stop string is split, one of them in the middle of a character."""
    text = "Go on. STO STOP é! more"
    tokens = make_tokenizer().encode(text)
    _, output = forced(llm, tokens, stop=stop, include_stop_str_in_output=include)
    stops = [stop] if isinstance(stop, str) else stop
    ends = {s: text.index(s) + len(s) for s in stops if s in text}
    end = min(ends.values())
    first = next(s for s in stops if ends.get(s) == end)
    assert output["text"] == text[: end if include else end - len(first)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", first)
    assert output["token_ids"] == tokens[: len(make_tokenizer().encode(text[:end]))], "no token after the stop"
    assert_idle(llm)


def test_stop_strings_inside_one_token(demo_tokenizer):
    """Where a token brings more than the stop string, what comes after it is left out."""
    params = SamplingParams(stop=["or"])
    detokenizer = Detokenizer(demo_tokenizer, params)
    ids = demo_tokenizer.encode("Hello world")
    assert demo_tokenizer.decode([ids[-1]]) == " world"
    assert detokenizer.follow(ids, 0)
    assert detokenizer.text == "Hello w"


def test_min_tokens_comes_before_any_end(llm):
    tokens = make_tokenizer().encode("xSTOPySTOPz")
    _, output = forced(llm, tokens, stop="STOP", min_tokens=7)
    assert output["text"] == "xSTOPy"
    params = SamplingParams(temperature=0, min_tokens=5, max_tokens=9, stop_token_ids=list(range(0, VOCAB_SIZE, 2)))
    (output,) = llm.generate([3], params, use_tqdm=False)
    assert all(token_id % 2 for token_id in output["token_ids"][:5])
    assert len(output["token_ids"]) >= 5


def test_ids_past_the_tokenizers_vocabulary(llm):
    tokens = [VOCAB_SIZE - 1, *b"ab", EOS + 1, VOCAB_SIZE - 2]
    alphabet = make_tokenizer()
    tokens[1:3] = alphabet.encode("ab")
    _, output = forced(llm, tokens, logprobs=2)
    assert output["token_ids"] == tokens
    assert output["text"] == "ab"
    assert output.outputs[0].logprobs[0][VOCAB_SIZE - 1].decoded_token == ""
    (output,) = llm.generate([VOCAB_SIZE - 1], SamplingParams(max_tokens=2, prompt_logprobs=1), use_tqdm=False)
    assert len(output.prompt_logprobs) == 1


def test_ids_above_a_hole_in_the_vocabulary(qwen3, tmp_path):
    """Fewer ids than the highest one says: what is above their number is text all the same."""
    path = copy_checkpoint(qwen3.path, tmp_path / "holes")
    for file in path.glob("*token*"):
        file.unlink()
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "hello": 280}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    assert len(tokenizer) < 280
    tokenizer.save_pretrained(path)
    llm = LLM(str(path), device="cpu", max_model_len=128, max_num_seqs=16)
    b, exclamation = vocab["b"], vocab["!"]
    for stop in ([], ["o!"]):
        _, output = forced(llm, [b, 280, 270, 290, 280, exclamation], logprobs=0, stop=stop)
        assert output["text"] == ("bhellohell" if stop else "bhellohello!")
        decoded = [next(iter(entry.values())).decoded_token for entry in output.outputs[0].logprobs]
        assert decoded == ["b", "hello", "", "", "hello", "!"]


def test_special_tokens_and_detokenize(llm):
    a, b = make_tokenizer().encode("ab")
    _, output = forced(llm, [a, EOS, b], ignore_eos=True)
    assert output["text"] == "ab"
    _, output = forced(llm, [a, EOS, b], ignore_eos=True, skip_special_tokens=False)
    assert output["text"] == "a<|end|>b"
    _, output = forced(llm, [a, EOS, b], ignore_eos=True, detokenize=False)
    assert output["text"] == ""
    assert output["token_ids"] == [a, EOS, b]


@pytest.mark.parametrize("spaces", [True, False])
def test_spaces_between_special_tokens_are_the_tokenizers_own(spaces):
    """transformers leaves them to the tokenizers library, whatever it is told; so does the text here."""
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ids = tokenizer.convert_tokens_to_ids(["a", "<s>", "</s>", "<s>", "b"])
    theirs = tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)
    params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=spaces)
    assert full_text(tokenizer, ids, params) == theirs == "a <s> </s> <s> b"


@pytest.mark.parametrize("skip", [True, False])
def test_incremental_text_equals_one_shot_decoding(demo_tokenizer, skip):
    """Random ids of a real vocabulary: broken characters, special tokens, spaces."""
    params = SamplingParams(skip_special_tokens=skip)
    rng = random.Random(0)
    for _ in range(150):
        ids = [rng.randrange(len(demo_tokenizer) + 50) for _ in range(rng.randrange(1, 40))]
        detokenizer, text = Detokenizer(demo_tokenizer, params), ""
        for i in range(len(ids)):
            detokenizer.follow(ids[: i + 1], 0)
            text += detokenizer.take()
        detokenizer.finish(ids)
        text += detokenizer.take()
        assert text == decode(demo_tokenizer, ids, params)


def test_incremental_text_of_a_sentencepiece_like_tokenizer(demo_tokenizer):
    """Llama 2's way: words begin with ▁, unknown characters are bytes, the first space is stripped."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("Ġ", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rng, params = random.Random(1), SamplingParams()
    for _ in range(50):
        ids = [rng.randrange(EOS) for _ in range(rng.randrange(1, 30))]
        detokenizer = Detokenizer(tokenizer, params)
        for i in range(len(ids)):
            detokenizer.follow(ids[: i + 1], 0)
        detokenizer.finish(ids)
        assert detokenizer.text == decode(tokenizer, ids, params)


def byte_fallback_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Llama 2's: what is no word is a run of byte tokens, which decodes to U+FFFD as a whole if it is invalid."""
    words = ["▁", "▁the", "▁a", "b", "é", "'s", "!", "n't"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_broken_bytes_after_a_byte_that_was_given_out(qwen3, tmp_path):
    """tokenizers' DecodeStream raises there ("Invalid prefix"): the text goes on, and nobody's step fails."""
    path = copy_checkpoint(qwen3.path, tmp_path / "model")
    for file in path.glob("*token*"):
        file.unlink()
    tokenizer = byte_fallback_tokenizer()
    tokenizer.save_pretrained(path)
    newline, broken, the, b = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xF0>", "▁the", "b"])
    stream = DecodeStream(skip_special_tokens=True)
    pieces = [stream.step(tokenizer._tokenizer, token_id) for token_id in (b, newline, broken)]
    assert pieces == ["b", "\n", None]
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(tokenizer._tokenizer, the)
    llm = LLM(str(path), device="cpu", max_model_len=128, max_num_seqs=16)
    for ids, text in (([b, newline, broken, the, the], "b\n\ufffd the the"), ([b, newline, broken], "b\n\ufffd")):
        _, output = forced(llm, ids)
        assert output["text"] == text
        _, output = forced(llm, ids, stop="zz")
        assert output["text"] == text
    for skip in (True, False):
        params = SamplingParams(temperature=2.0, seed=1, n=2, max_tokens=60, ignore_eos=True, skip_special_tokens=skip)
        expected, found = texts_of(llm, many_prompts(6), params)
        assert found == expected
    # So does the token that ends it, where that is to be shown.
    _, output = forced(llm, [b, newline, broken, the, b], stop_token_ids=[the], include_stop_str_in_output=True)
    assert output["text"] == "b\n\ufffd the"
    assert_idle(llm)


def test_a_finished_text_is_that_of_its_tokens():
    """Though broken bytes make it another than one-shot decoding's: finished twice, with a last token not followed."""
    tokenizer, rng, num_odd = byte_fallback_tokenizer(), random.Random(3), 0
    odd = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xF0>", "<0xE2>", "<0x82>", "<0xAC>"])
    for _ in range(2000):
        ids = rng.choices([*odd, *odd, *range(len(tokenizer) + 1)], k=rng.randrange(1, 14))
        params = SamplingParams(skip_special_tokens=rng.random() < 0.5)
        whole = full_text(tokenizer, ids, params)
        num_odd += whole != decode(tokenizer, ids, params)
        for num_followed in (len(ids), len(ids) - 1):
            detokenizer, text = Detokenizer(tokenizer, params), ""
            for i in range(num_followed):
                detokenizer.follow(ids[: i + 1], 0)
                text += detokenizer.take()
            for _ in range(2):
                detokenizer.finish(ids)
                text += detokenizer.take()
                assert detokenizer.text == text == whole
    assert num_odd > 300


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["byte-level", "Llama 2"])
def test_hidden_tokens_do_not_pile_up(monkeypatch, kind, skip):
    """DecodeStream decodes all ids since its last piece again: few of what one-shot decoding passes over reach it."""
    tokenizer = make_tokenizer() if kind == "byte-level" else byte_fallback_tokenizer()
    specials, rng, seen = tokenizer.all_special_ids, random.Random(2), []

    class Watched:
        def __init__(self, **kwargs):
            self.stream = DecodeStream(**kwargs)

        def step(self, backend, token_id):
            seen.append(token_id)
            return self.stream.step(backend, token_id)

    monkeypatch.setattr("nanovllm.engine.detokenizer.DecodeStream", Watched)
    hidden = [len(tokenizer) + 7, *(specials if skip else [])]
    visible = tokenizer.encode("a b") + ([] if skip else specials)
    params = SamplingParams(skip_special_tokens=skip)
    for _ in range(100):
        runs = [rng.choices(group, k=rng.choice([1, 3, 30])) for group in [hidden, visible] * 3]
        ids = [token_id for run in runs for token_id in run]
        seen.clear()
        detokenizer, text = Detokenizer(tokenizer, params), ""
        for i in range(len(ids)):
            detokenizer.follow(ids[: i + 1], 0)
            text += detokenizer.take()
        detokenizer.finish(ids)
        assert text + detokenizer.take() == decode(tokenizer, ids, params)
        assert [token_id for token_id in seen if token_id not in hidden] == [
            token_id for token_id in ids if token_id not in hidden
        ]
        assert sum(token_id in hidden for token_id in seen) <= 3  # one a run


# ---- ends ----


def test_several_eos_ids(qwen3, tmp_path):
    prompts = many_prompts(16, seed=2)
    answers = [tokens for tokens, _ in qwen3.answers(prompts, 64)]
    eos = [answers[0][5], answers[1][9], answers[2][3]]
    checkpoint = copy_with_eos(qwen3, tmp_path / "eos", eos)
    llm = checkpoint.llm()
    outputs = llm.generate(prompts, greedy(64, ignore_eos=False), use_tqdm=False)
    assert_matches(qwen3, prompts, outputs, 64, [*eos, EOS])  # the tokenizer's own counts too
    ended = {output["token_ids"][-1] for output in outputs if output.outputs[0].finish_reason == "stop"}
    assert ended - {EOS} == set(eos)
    assert all(output.outputs[0].stop_reason is None for output in outputs)
    # The token that ends is among the ids, and its text is not in the text; here it would be, being no special token.
    tokenizer, ids = make_tokenizer(), outputs[0]["token_ids"]
    assert outputs[0]["text"] == tokenizer.decode(ids[:-1])
    params = SamplingParams(temperature=0, include_stop_str_in_output=True)
    for shown, wish in ((ids, params), (ids[:-1], dataclasses.replace(params, include_stop_str_in_output=False))):
        assert texts_of(llm, prompts[:1], wish) == ([tokenizer.decode(shown)],) * 2
    # `stop_token_ids` ends too, and says by which id; `ignore_eos` leaves it in force.
    stop = answers[0][2]
    params = SamplingParams(temperature=0, max_tokens=64, stop_token_ids=[stop], ignore_eos=True)
    (output,) = llm.generate(prompts[:1], params, use_tqdm=False)
    assert output["token_ids"] == answers[0][: answers[0].index(stop) + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_the_checkpoints_defaults_apply_only_without_sampling_params(qwen3, tmp_path):
    path = copy_checkpoint(qwen3.path, tmp_path / "defaults")
    (path / "generation_config.json").unlink()
    recommended = {"do_sample": True, "temperature": 0.9, "top_k": 1, "top_p": 0.8, "repetition_penalty": 1.0}
    recommended["max_new_tokens"] = 40
    (path / "generation_config.json").write_text(json.dumps(recommended))
    llm = LLM(str(path), device="cpu", max_model_len=128, max_num_seqs=8)
    prompt = [1, 2, 3]
    best = qwen3.answers([prompt], 64)[0][0][:40]
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.9, top_k=1, top_p=0.8, max_tokens=40)
    (output,) = llm.generate(prompt, use_tqdm=False)
    assert output["token_ids"] == best, "top_k=1 is greedy"
    assert "".join(delta.text for delta in llm.stream(prompt)) == output["text"]
    request_id = llm.add_request(prompt)
    done = {}
    while not llm.is_finished():
        done.update(llm.step()[0])
    assert done == {request_id: best}
    (output,) = llm.generate(prompt, SamplingParams(seed=1), use_tqdm=False)
    assert output["token_ids"][:40] != best
    assert len(output["token_ids"]) == 64
    for changes, match in (({"top_p": 1.5}, "top_p must be"), ({"temperature": "0.6"}, "temperature must be")):
        (path / "generation_config.json").write_text(json.dumps(changes))
        with pytest.raises(ValueError, match=f"generation_config.json recommends what cannot be: {match}"):
            LLM(str(path), device="cpu", max_model_len=128, max_num_seqs=8)


# ---- what an output is ----


def test_an_output_has_vllms_shape(llm):
    (output,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert isinstance(output, RequestOutput)
    assert output.prompt == "abc"
    assert output.prompt_token_ids == make_tokenizer().encode("abc")
    assert output.finished
    completion = output.outputs[0]
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert output["text"] == completion.text
    assert output["token_ids"] == completion.token_ids
    assert dict(output) == {"text": completion.text, "token_ids": completion.token_ids}
    assert list(output) == ["text", "token_ids"]
    assert "text" in output
    assert "tokens" not in output
    with pytest.raises(KeyError, match="token_ids"):
        output["tokens"]
    metrics = output.metrics
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert (metrics.num_cached_prompt_tokens, metrics.num_preemptions) == (0, 0)
    ids = [llm.generate([1], greedy(1), use_tqdm=False)[0].request_id for _ in range(3)]
    assert len(set(ids)) == 3


def test_prompts_of_every_shape(llm):
    text, ids = "abc", make_tokenizer().encode("abc")
    shapes = [text, [text], ids, [ids], {"prompt": text}, {"prompt_token_ids": ids}, [{"prompt": text}], tuple(ids)]
    shapes += [{"prompt": text, "prompt_token_ids": ids}, TextPrompt(prompt=text)]
    shapes += [TokensPrompt(prompt_token_ids=ids), TokensPrompt(prompt_token_ids=ids, cache_salt="a")]
    for prompts in shapes:
        (output,) = llm.generate(prompts, greedy(5), use_tqdm=False)
        assert output.prompt_token_ids == ids
        assert (output.prompt is None) == ("abc" not in str(prompts))
    outputs = llm.generate([text, ids, {"prompt": text}, {"prompt_token_ids": ids}], greedy(5), use_tqdm=False)
    assert len({tuple(output["token_ids"]) for output in outputs}) == 1


def test_docs_name_what_there_is():
    """Every field of SamplingParams is explained in its docstring."""
    for field in dataclasses.fields(SamplingParams):
        assert not field.init or f"        {field.name}: " in SamplingParams.__doc__
    assert (Path(__file__).parent.parent / "docs" / "api.md").is_file()


# ---- everything ----


@pytest.mark.parametrize("depth", [0, 1])
def test_every_parameter_in_one_batch(qwen3, depth):
    """As each request by itself, in chunks and with preemptions, one step ahead and not; streams say the same."""
    prompts, params = everything_at_once()
    used = {f.name for p in params for f in dataclasses.fields(p) if f.init and getattr(p, f.name) != f.default}
    assert used == {f.name for f in dataclasses.fields(SamplingParams) if f.init} - {"spaces_between_special_tokens"}
    alone = qwen3.llm()
    expected = [alone.generate(*request, use_tqdm=False)[0] for request in zip(prompts, params)]
    ends = {(type(c.stop_reason), c.finish_reason) for output in expected for c in output.outputs}
    assert ends == {(str, "stop"), (int, "stop"), (type(None), "stop"), (type(None), "length")}
    llm = qwen3.llm(num_kvcache_blocks=60, max_num_batched_tokens=150)
    llm.depth, llm.scheduler.completion_ratio = depth, 0.0  # it admits more than will fit
    watch = Watch(llm)
    assert_same_outputs(llm.generate(prompts, params, use_tqdm=False), expected, TOLERANCE)
    assert watch.num_preemptions > 0
    assert watch.num_chunks > 0
    assert (watch.num_wasted_rows > 0) == (depth == 1)
    texts: dict[tuple[int, int], str] = {}
    for delta in llm.stream(prompts, params):
        key = delta.request_id, delta.index
        texts[key] = texts.get(key, "") + delta.text
    assert [texts[key] for key in sorted(texts)] == [c.text for output in expected for c in output.outputs]
    assert_idle(llm)


# ---- draws that depend on the tokens before them ----


def test_draws_that_read_their_tokens_wait_for_them(qwen3):
    """Penalties and bad words beside plain rows, one step ahead as without: each draw has seen the token before it."""
    prompts = many_prompts(12)
    repetition = dataclasses.replace(greedy(20), repetition_penalty=1.3)
    others = SamplingParams(
        temperature=0.9, seed=5, max_tokens=20, ignore_eos=True, frequency_penalty=0.4, bad_words=["ab", "c"]
    )
    params = [(repetition, others, greedy(20))[i % 3] for i in range(12)]
    found = []
    for depth in (0, 1):
        llm = qwen3.llm()
        llm.depth = depth
        found.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
    assert found[0] == found[1]
    for prompt, tokens in list(zip(prompts, found[1]))[::3]:
        expected = qwen3.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=20, min_new_tokens=20, repetition_penalty=1.3, pad_token_id=0,
        )  # fmt: skip
        assert tokens == expected[0, len(prompt) :].tolist()
