"""What users get wrong, what breaks half-way, and Ctrl-C: told plainly, and the engine is as it was before."""

import contextlib
import dataclasses
import linecache
import math
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    EOS,
    HANGING_S,
    VOCAB_SIZE,
    Checkpoint,
    assert_idle,
    assert_matches,
    check_blocks,
    copy_checkpoint,
    greedy,
    make_tokenizer,
    many_prompts,
    replaced,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.engine import model_runner
from nanovllm.sampling_params import StructuredOutputsParams

ENGINE = str(Path(nanovllm.__file__).parent / "engine")


@pytest.fixture(scope="module")
def llm(qwen3: Checkpoint) -> LLM:
    """An engine whose pool (160 tokens) is smaller than max_model_len (200)."""
    return qwen3.llm(max_model_len=200, num_kvcache_blocks=10)


@pytest.fixture
def unharmed(llm: LLM, qwen3: Checkpoint) -> Iterator[None]:
    """Whatever the test does, nothing was ever queued, and the next valid call works."""
    assert_idle(llm)
    added: list[Any] = []
    with replaced(llm.scheduler, "add", lambda add: lambda seq: added.append(seq) or add(seq)):
        yield
    assert not added, "something was queued before the whole call was checked"
    assert_idle(llm)
    assert_works(llm, qwen3)


def assert_works(llm: LLM, checkpoint: Checkpoint) -> None:
    prompts = [[1, 2, 3], [4]]
    assert_matches(checkpoint, prompts, llm.generate(prompts, greedy(6), use_tqdm=False), 6)
    assert_idle(llm)


# ---- prompts ----

BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ("", ValueError, "empty"),
    ([], ValueError, "empty"),
    ((), ValueError, "empty"),
    ([-1], ValueError, "-1"),
    ([1, 2, VOCAB_SIZE], ValueError, str(VOCAB_SIZE)),
    ([1, 2**40], ValueError, str(2**40)),
    ([1, 2**80], ValueError, str(2**80)),
    ([-(2**80)], ValueError, str(2**80)),
    ([1.0], TypeError, r"1\.0"),
    ([1, 2.5], TypeError, r"2\.5"),
    ([math.nan], TypeError, "nan"),
    (["a"], TypeError, "'a'"),
    ([None], TypeError, "None"),
    ([True], TypeError, "True"),
    ([1, False], TypeError, "False"),
    ([[1]], TypeError, r"\[1\]"),
    ([b"a"], TypeError, "a"),
    ([np.float32(1)], TypeError, "1"),
    ([np.bool_(True)], TypeError, "True"),
    ([torch.tensor(1.5)], TypeError, r"1\.5"),
    (None, TypeError, "NoneType"),
    (3, TypeError, "int"),
    (1.5, TypeError, "float"),
    (b"abc", TypeError, "bytes"),
    ({"prompt": 3}, TypeError, "int"),
    ({"prompt": 3, "prompt_token_ids": [1]}, TypeError, "'prompt' .*no string: 3"),
    ({"prompt": "x", 3: "y"}, ValueError, r"'prompt_token_ids', got \['prompt', 3\]"),
    ({"prompt_token_ids": [1, None]}, TypeError, "None"),
    ({"text": "x"}, ValueError, "'prompt_token_ids', got.*'text'"),
    ({"prompt": "x", "images": []}, ValueError, "images"),
    ({}, ValueError, "prompt_token_ids"),
    ({1, 2}, TypeError, "set"),
    ([1] * 200, ValueError, "200.*max_model_len"),
    ([1] * 5000, ValueError, "5000.*max_model_len"),
    ("x" * 200, ValueError, "200.*max_model_len"),
    ([1] * 170, ValueError, "170.*blocks"),
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("prompt", "error", "match"), BAD_PROMPTS, ids=lambda value: str(value)[:20])
def test_a_bad_prompt_among_good_ones(llm, prompt, error, match):
    with pytest.raises(error, match=match) as caught:
        llm.generate([[1, 2], "fine", prompt, [3]], greedy(4), use_tqdm=False)
    assert "prompts[2]" in str(caught.value)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("prompt", "error", "match"), BAD_PROMPTS, ids=lambda value: str(value)[:20])
def test_a_bad_request(llm, prompt, error, match):
    with pytest.raises(error, match=match) as caught:
        llm.add_request(prompt, greedy(4))
    assert "prompt" in str(caught.value)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "prompts",
    [None, 3, 2.5, b"abc", {1, 2}, pytest.param(object(), id="object"), pytest.param(iter(["a"]), id="iterator")],
    ids=repr,  # not of what shows its address: processes that share the tests must call them the same
)
def test_prompts_are_no_list(llm, prompts):
    with pytest.raises(TypeError, match="prompts must be"):
        llm.generate(prompts, use_tqdm=False)


@pytest.mark.parametrize("prompts", [[1, 2, 3], [5], (1, 2), [np.int64(3)], {"prompt_token_ids": [7, 8]}], ids=repr)
def test_a_list_of_ids_is_one_prompt(llm, qwen3, prompts):
    ids = [int(x) for x in (prompts["prompt_token_ids"] if isinstance(prompts, dict) else prompts)]
    assert_matches(qwen3, [ids], llm.generate(prompts, greedy(6), use_tqdm=False), 6)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("prompts", [[1, True], [1, "a"], [1, 2.0], [1, [2]], [1, None]], ids=repr)
def test_a_list_of_ids_and_other_things_is_neither(llm, prompts):
    with pytest.raises(TypeError, match=r"prompts\[\d\] must be a string"):
        llm.generate(prompts, use_tqdm=False)


@pytest.mark.usefixtures("unharmed")
def test_text_that_is_no_text(llm):
    text = "a\ud800b"  # half of a surrogate pair
    with pytest.raises(ValueError, match=r"prompts\[0\] is no valid text: .*position 1"):
        llm.generate(text, use_tqdm=False)
    with pytest.raises(ValueError, match="chat template wrote is no valid text"):
        llm.chat([{"role": "user", "content": text}], chat_template="{{ messages[0].content }}", use_tqdm=False)
    with pytest.raises(ValueError, match="bad_words is no valid text"):
        llm.generate("a", SamplingParams(bad_words=[text]), use_tqdm=False)


def test_good_prompts_of_other_types(llm, qwen3):
    """Tuples and numpy integers are as good."""
    for prompt in ((1, 2, 3), [np.int64(1), np.int32(2), np.uint8(3)], list(np.array([1, 2, 3]))):
        outputs = llm.generate([prompt], greedy(6), use_tqdm=False)
        assert_matches(qwen3, [[1, 2, 3]], outputs, 6)
        assert all(type(token) is int for token in outputs[0].prompt_token_ids + outputs[0]["token_ids"])
    assert_matches(qwen3, [[1], [2]], llm.generate(([1], [2]), greedy(6), use_tqdm=False), 6)
    prompts = [VOCAB_SIZE - 1, 0, EOS]
    assert_matches(qwen3, [prompts], llm.generate([prompts], greedy(6), use_tqdm=False), 6)


def test_no_prompts(llm):
    assert llm.generate([], use_tqdm=False) == []
    assert llm.generate([], greedy(4), use_tqdm=False) == []
    assert llm.generate([], [], use_tqdm=False) == []
    assert llm.generate((), use_tqdm=True) == []
    assert_idle(llm)


def test_a_bare_string_is_one_prompt(llm, qwen3):
    (output,) = llm.generate("abc", greedy(6), use_tqdm=False)
    assert output.prompt == "abc"
    assert_matches(qwen3, [make_tokenizer().encode("abc")], [output], 6)


def test_an_empty_text_stays_empty_where_the_tokenizer_begins_texts_itself(qwen3, tmp_path):
    """Llama's puts a token in front, so that "" has one token; it is an empty prompt all the same."""
    path = copy_checkpoint(qwen3.path, tmp_path / "bos")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", EOS)]
    )
    for file in path.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(path)
    llm = LLM(str(path), device="cpu", num_kvcache_blocks=10)
    assert llm.tokenizer.encode("a")[0] == EOS
    assert llm.generate(["a"], greedy(2), use_tqdm=False)[0].prompt_token_ids[0] == EOS
    with pytest.raises(ValueError, match="empty"):
        llm.generate([""], greedy(2), use_tqdm=False)


# ---- requests that cannot fit ----


def test_what_fits_and_what_does_not(llm, qwen3):
    """160 slots hold a request of 161 tokens, since the last one is never computed."""
    prompt = [1] * 100
    for max_tokens, fits in ((60, True), (61, True), (62, False), (99, False), (1000, False), (10**30, False)):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        if fits:
            assert len(llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"]) == max_tokens
            continue
        with pytest.raises(ValueError, match=rf"100 tokens and max_tokens={max_tokens}.*blocks.*num_kvcache_blocks"):
            llm.generate([prompt], params, use_tqdm=False)
    assert_idle(llm)
    # Without an explicit number it means what the pool allows.
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert len(output["token_ids"]) == 61
    assert output.outputs[0].finish_reason == "length"


def test_max_tokens_beyond_max_model_len_is_cut_not_refused(qwen3):
    llm = qwen3.llm(max_model_len=50)
    (output,) = llm.generate([[1] * 49], greedy(10**9), use_tqdm=False)
    assert len(output["token_ids"]) == 1
    with pytest.raises(ValueError, match="max_model_len=50"):
        llm.generate([[1] * 50], greedy(1), use_tqdm=False)
    assert_works(llm, qwen3)


# ---- sampling params ----


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        *[("temperature", value, ValueError) for value in (math.nan, math.inf, -math.inf, -0.1, -1, 10**400)],
        *[("temperature", value, TypeError) for value in ("0.5", None, True, [1.0], 1j)],
        ("temperature", np.float32("nan"), ValueError),
        *[("max_tokens", value, ValueError) for value in (0, -1, -(10**30))],
        *[("max_tokens", value, TypeError) for value in (1.0, 1.5, "3", True, [1], math.nan)],
        *[("ignore_eos", value, TypeError) for value in (0, 1, "yes", None)],
    ],
    ids=lambda value: str(value)[:12],
)
def test_bad_sampling_params(field, value, error):
    with pytest.raises(error, match=f"{field} must be") as caught:
        SamplingParams(**{field: value})
    if abs(value) < 10**9 if isinstance(value, (int, float)) else True:
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("temprature", "temperature"),
        ("temp", "temperature"),
        ("max_token", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("ignoreeos", "ignore_eos"),
    ],
)
def test_an_unknown_sampling_param_suggests_the_nearest(name, nearest):
    with pytest.raises(TypeError, match=rf"SamplingParams has no argument '{name}'.*'{nearest}'"):
        SamplingParams(**{name: 1})


@pytest.mark.parametrize("name", ["zzz", "best_of", "length_penalty", "output_kind", "truncate_prompt_tokens"])
def test_an_unknown_sampling_param_like_no_other_lists_the_names(name):
    with pytest.raises(TypeError, match=rf"'{name}': known names: .*temperature.*ignore_eos.*max_tokens"):
        SamplingParams(**{name: 1})


def test_stop_may_be_a_string_or_a_list():
    with pytest.raises(TypeError, match="stop must be a string or a list, got 5 of type int"):
        SamplingParams(stop=5)


def test_good_sampling_params():
    params = SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(3))
    assert (params.temperature, params.max_tokens) == (0.5, 3)
    assert SamplingParams(max_tokens=None).max_tokens is None
    assert SamplingParams(temperature=0).temperature == 0
    assert dataclasses.replace(params, max_tokens=7).max_tokens == 7
    with pytest.raises(ValueError, match="max_tokens"):
        dataclasses.replace(params, max_tokens=0)


def test_sampling_params_that_were_assigned_to(llm, qwen3):
    """As vLLM's scripts do with `get_default_sampling_params`: what counts is what they are when they are used."""
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens, params.stop = 0, 6, "\n\n\n"
    stream = llm.stream([[1, 2]], params)
    outputs = llm.generate([[1, 2]], params, use_tqdm=False)
    assert_matches(qwen3, [[1, 2]], outputs, 6)
    params.max_tokens = 0
    with pytest.raises(ValueError, match="max_tokens must be an integer of at least 1, got 0"):
        llm.generate([[1, 2]], params, use_tqdm=False)
    assert "".join(delta.text for delta in stream) == outputs[0]["text"], "those of a request are its own"
    with pytest.raises(AttributeError, match="max_token"):
        params.max_token = 5
    assert llm.get_default_sampling_params() == SamplingParams(), "the engine's are not the user's"
    assert_idle(llm)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([], ValueError, "2 and 0"),
        ([SamplingParams()], ValueError, "2 and 1"),
        ([SamplingParams()] * 3, ValueError, "2 and 3"),
        ({"temperature": 0}, TypeError, "temperature"),
        (0.5, TypeError, r"0\.5"),
        ("greedy", TypeError, "greedy"),
        (SamplingParams, TypeError, "SamplingParams"),
        ([SamplingParams(), None], TypeError, "None"),
        ([SamplingParams(), {"temperature": 0}], TypeError, "temperature"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_lists_of_sampling_params(llm, params, error, match):
    with pytest.raises(error, match=match) as caught:
        llm.generate([[1], [2]], params, use_tqdm=False)
    assert "sampling_params" in str(caught.value)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("prompts", [[np.array([1, 2])], [[1], torch.tensor([1, 2])], list(torch.tensor([1, 2]))])
def test_arrays_are_no_lists(llm, prompts):
    with pytest.raises(TypeError, match=r"call its tolist\(\)"):
        llm.generate(prompts, use_tqdm=False)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("value", ["no", 1, None])
def test_use_tqdm_is_a_bool(llm, value):
    with pytest.raises(TypeError, match="use_tqdm must be True or False"):
        llm.generate([[1]], greedy(4), use_tqdm=value)


@pytest.mark.usefixtures("unharmed")
def test_params_without_prompts(llm):
    with pytest.raises(ValueError, match="0 and 1"):
        llm.generate([], [SamplingParams()], use_tqdm=False)


# ---- the engine's own arguments ----


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_num_seq", "max_num_seqs"),
        ("max_batched_tokens", "max_num_batched_tokens"),
        ("block_size", "kvcache_block_size"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("eager", "enforce_eager"),
        ("max_len", "max_model_len"),
        ("Seed", "seed"),
    ],
)
def test_an_unknown_engine_argument_suggests_the_nearest(qwen3, name, nearest):
    with pytest.raises(TypeError, match=rf"LLM has no argument '{name}'.*'{nearest}'"):
        LLM(str(qwen3.path), **{name: 1})


@pytest.mark.parametrize("name", ["quantization", "pipeline_parallel_size", "kv_cache_dtype"])
def test_an_unknown_engine_argument_like_no_other_lists_the_names(qwen3, name):
    with pytest.raises(TypeError, match=rf"LLM has no argument '{name}': known names: model, .*seed"):
        LLM(str(qwen3.path), **{name: 1})


def test_an_engine_without_a_model():
    with pytest.raises(TypeError, match=r"^LLM.__init__\(\) missing .* 'model'"):
        LLM()


@pytest.mark.parametrize("name", ["enable_prefix_caching", "enable_chunked_prefill", "trust_remote_code"])
def test_switches_of_vllms_that_can_only_be_one_way(qwen3, name):
    is_so = name != "trust_remote_code"
    qwen3.llm(**{name: is_so}, disable_log_stats=is_so).close()
    for value in (not is_so, None, int(is_so), "auto"):
        with pytest.raises(ValueError, match=f"^{name} can only be {is_so} here, got {value!r}: leave it out"):
            qwen3.llm(**{name: value})
    with pytest.raises(ValueError, match="disable_log_stats can only be True or False"):
        qwen3.llm(disable_log_stats="no")


@pytest.mark.parametrize("name", ["hf_config", "eos_token_ids", "zzz"])
def test_what_is_no_argument(qwen3, name):
    with pytest.raises(TypeError, match=rf"has no argument '{name}'"):
        LLM(str(qwen3.path), **{name: None})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *[
            (name, value, error)
            for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "kvcache_block_size")
            for value, error in (
                (0, ValueError),
                (-1, ValueError),
                (2**31, ValueError),
                (1.5, TypeError),
                ("8", TypeError),
                (None, TypeError),
            )
        ],
        ("max_num_seqs", True, TypeError),
        ("max_model_len", 1, ValueError),
        ("num_kvcache_blocks", 0, ValueError),
        ("num_kvcache_blocks", -2, ValueError),
        ("num_kvcache_blocks", 2**31, ValueError),
        ("num_kvcache_blocks", 10**9, ValueError),  # more than there is memory for
        ("num_kvcache_blocks", 2.0, TypeError),
        *[("gpu_memory_utilization", value, ValueError) for value in (0, -0.5, 1.01, math.nan, math.inf)],
        ("gpu_memory_utilization", "0.9", TypeError),
        ("tensor_parallel_size", 0, ValueError),
        ("tensor_parallel_size", 2.0, TypeError),
        ("enforce_eager", 1, TypeError),
        ("enforce_eager", "no", TypeError),
        ("deterministic", None, TypeError),
        ("seed", 2**63, ValueError),
        ("seed", -(2**63) - 1, ValueError),
        ("seed", 0.5, TypeError),
        ("seed", None, TypeError),
        ("dtype", "float8", ValueError),
        ("dtype", "Float32", ValueError),
        ("dtype", torch.int8, ValueError),
        ("dtype", None, ValueError),
        ("device", "tpu", ValueError),
        ("device", "meta", ValueError),
        ("device", "", ValueError),
        ("device", None, ValueError),
        ("device", [1], ValueError),
        ("attention_backend", "flash", ValueError),
        ("attention_backend", "flash_attn", ValueError),
        ("attention_backend", "triton", ValueError),
        ("attention_backend", 3, ValueError),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_engine_arguments(qwen3, name, value, error):
    with pytest.raises(error, match=name) as caught:
        LLM(str(qwen3.path), **{"device": "cpu", name: value})
    assert str(value) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1)])
def test_a_gpu_that_is_not_there(qwen3, device):
    with pytest.raises(ValueError, match=r"device='cuda.*pass 'cpu'"):
        LLM(str(qwen3.path), device=device)


def test_numbers_of_any_library_are_kept_as_pythons(qwen3):
    """numpy's small integers overflow, and torch's tensors are equal to no integer in a set."""
    numbers = {"max_model_len": np.uint8(250), "num_kvcache_blocks": np.int16(800), "max_num_seqs": np.int8(9)}
    llm = qwen3.llm(**numbers, seed=torch.tensor(3), kvcache_block_size=np.uint8(16))
    assert {type(getattr(llm.config, name)) for name in [*numbers, "seed", "kvcache_block_size"]} == {int}
    ignoring = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    outputs = [engine.generate([5, 6], ignoring, use_tqdm=False)[0] for engine in (llm, qwen3.llm(seed=3))]
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"]
    prompt = list(range(90))  # and 100 more are beyond an int8
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=np.int8(100), ignore_eos=True), use_tqdm=False)
    assert len(output["token_ids"]) == 100
    for ids in (list(torch.tensor([5, 7])), [np.array(5), np.array(7)], (np.int8(5), 7), {5, 7}):
        params = SamplingParams(max_tokens=50, logit_bias={np.int16(5): 100}, stop_token_ids=ids, seed=np.uint64(1))
        (output,) = llm.generate([[1, 2]], params, use_tqdm=False)
        assert (output["token_ids"], output.outputs[0].stop_reason) == ([5], 5)


def test_whoever_changes_his_parameters_later_changes_no_request(qwen3):
    """Neither by assignment nor in their lists and dicts, which are read in every step."""
    llm = qwen3.llm()
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, allowed_token_ids=[0], logit_bias={1: 1.0})
    ids = []
    for token_id in (5, 6, 7):
        params.allowed_token_ids[0] = token_id
        ids.append(llm.add_request([1, 2, 3], params))
    params.logit_bias[10**6] = 1.0
    params.stop_token_ids = [5]
    done = {}
    while not llm.is_finished():
        done.update(llm.step()[0])
    assert [done[request_id] for request_id in ids] == [[5] * 3, [6] * 3, [7] * 3]
    with pytest.raises(ValueError, match="logit_bias contains 1000000"):
        llm.add_request([1, 2, 3], params)


def test_parameters_that_prompts_share_are_looked_at_once(qwen3):
    llm, encoded = qwen3.llm(), []
    params = SamplingParams(temperature=0, max_tokens=2, bad_words=["ab", "cd"])
    with replaced(
        llm.input_processor, "_encode", lambda f: lambda text, *a, **k: encoded.append(text) or f(text, *a, **k)
    ):
        llm.generate([[i] for i in range(20)], params, use_tqdm=False)
    assert len(encoded) == 4  # each word, at the start of a text and after a space


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_log_probabilities_than_tokens(qwen3, checkpoints, name):
    llm = checkpoints("qwen3").llm()
    with (
        replaced(llm.config.hf_config, "vocab_size", lambda _: 12),
        pytest.raises(ValueError, match=f"{name}=13 is above"),
    ):
        llm.generate([[1, 2]], SamplingParams(**{name: 13}), use_tqdm=False)
    assert_idle(llm)


@pytest.mark.parametrize("wrong", [3.0, None, "3", True])
def test_one_wrong_item_among_token_ids_is_the_one_named(llm, wrong, unharmed):
    for function in (llm.generate, llm.add_request):
        with pytest.raises(TypeError, match=f"contains {wrong!r}"):
            function([1, 2, wrong])


def test_config_is_not_changed_after_construction(llm):
    with pytest.raises(dataclasses.FrozenInstanceError):
        llm.config.max_num_seqs = 3


# ---- anything at all ----

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, VOCAB_SIZE + 3)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.just(SamplingParams(max_tokens=1)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.integers(), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
@given(prompts=junk, params=st.just(greedy(1)) | st.none() | junk)
def test_junk_is_refused_or_served(llm, prompts, params):
    with contextlib.suppress(TypeError, ValueError):
        outputs = llm.generate(prompts, params if params is not None else greedy(1), use_tqdm=False)
        assert len(outputs) == (1 if isinstance(prompts, (str, dict)) or is_ids(prompts) else len(prompts))
    assert_idle(llm)


def is_ids(prompts: Any) -> bool:
    return bool(prompts) and all(type(x) is int for x in prompts)


# ---- what breaks half-way ----


class Boom(Exception):
    pass


def failing(after: int, error: BaseException) -> Callable[[Any], Any]:
    """Makes of a function one that raises at its `after`-th call, before or after doing its work by turns."""
    count = 0

    def make(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == after and after % 2:
                raise error
            result = function(*args, **kwargs)
            if count == after:
                raise error
            return result

        return wrapped

    return make


PLACES = [
    (lambda llm: llm.model_runner, "call"),
    (lambda llm: llm.model_runner, "run_model"),
    (lambda llm: llm.scheduler, "schedule"),
    (lambda llm: llm.scheduler, "advance"),
    (lambda llm: llm.scheduler, "postprocess"),
    (lambda llm: llm.scheduler, "finish"),
    (lambda llm: llm.scheduler, "add"),
    (lambda llm: llm.block_manager, "allocate"),
    (lambda llm: llm.block_manager, "deallocate"),
    (lambda llm: llm.block_manager, "register"),
    (lambda llm: model_runner.PendingTokens, "wait"),
    (lambda llm: llm.tokenizer, "decode"),
]


@pytest.mark.parametrize(("error", "depth"), [(KeyboardInterrupt, 0), (KeyboardInterrupt, 1), (Boom, 1)])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[name for _, name in PLACES])
def test_an_exception_anywhere_leaves_nothing_behind(qwen3, owner, name, error, depth):
    llm = qwen3.llm(num_kvcache_blocks=24, max_num_batched_tokens=40, max_num_seqs=6)
    llm.depth = depth
    prompts = many_prompts(8)
    free = llm.block_manager.num_free_blocks
    for after in (1, 2, 5):
        with replaced(owner(llm), name, failing(after, error())), pytest.raises(error):
            llm.generate(prompts, [greedy(4 + i) for i in range(8)], use_tqdm=False)
        assert llm.block_manager.num_free_blocks == free
        assert_idle(llm)
        # The results of the next call are its own.
        assert_matches(qwen3, prompts[3:6], llm.generate(prompts[3:6], greedy(7), use_tqdm=False), 7)
        assert_idle(llm)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["call", "run_model"])
def test_requests_of_others_survive_an_exception(qwen3, name, depth):
    llm = qwen3.llm(num_kvcache_blocks=40, max_num_batched_tokens=60)
    llm.depth = depth
    prompts = many_prompts(8)
    for after in (1, 2, 4, 7, 10):
        ids = [llm.add_request(prompt, greedy(20)) for prompt in prompts[:4]]
        for _ in range(3):
            llm.step()
        with replaced(llm.model_runner, name, failing(after, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
            llm.generate(prompts[4:], greedy(20), use_tqdm=False)
        done = drain(llm)
        assert sorted(done) == ids
        assert_matches(qwen3, prompts[:4], [done[i] for i in ids], 20)


def drain(llm: LLM, max_steps: int = 1000) -> dict[int, list[int]]:
    """Steps until everything is reported; each request once."""
    done: dict[int, list[int]] = {}
    for _ in range(max_steps):
        if llm.is_finished():
            break
        for request_id, token_ids in llm.step()[0]:
            assert request_id not in done
            done[request_id] = token_ids
    else:
        raise AssertionError(f"still not finished after {max_steps} steps")
    assert_idle(llm)
    return done


@pytest.mark.parametrize("depth", [0, 1])
def test_step_can_be_interrupted_too(qwen3, depth):
    """A loop over `step` goes on after an exception; what had finished before is still reported."""
    llm = qwen3.llm(num_kvcache_blocks=40)
    llm.depth = depth
    prompts = many_prompts(6)
    ids = [llm.add_request(prompt, greedy(6 + i)) for i, prompt in enumerate(prompts)]
    done: dict[int, list[int]] = {}
    with replaced(llm.model_runner, "call", failing(4, Boom())):
        for _ in range(3):
            done.update(llm.step()[0])
        with pytest.raises(Boom):
            llm.step()
        done.update(drain(llm))
    assert_matches(qwen3, prompts, [done[i] for i in ids], [6 + i for i in range(6)])


def test_step_that_fails_does_not_lose_what_finished_during_generate(qwen3):
    llm = qwen3.llm()
    other = llm.add_request([5, 6], greedy(2))
    llm.generate([[1, 2]], greedy(6), use_tqdm=False)
    llm.add_request([7, 8], greedy(3))
    with replaced(llm.model_runner, "call", failing(1, Boom())), pytest.raises(Boom):
        llm.step()
    done = drain(llm)
    assert other in done, "its tokens were handed to a step that raised"


def test_a_request_is_not_lost_when_its_text_cannot_be_made(qwen3):
    llm = qwen3.llm()
    with replaced(llm.tokenizer, "decode", failing(1, Boom())), pytest.raises(Boom):
        llm.generate([[1, 2], [3, 4]], greedy(3), use_tqdm=False)
    assert_idle(llm)
    assert_works(llm, qwen3)


# ---- Ctrl-C at any line ----


class InterruptAtLine:
    """Raises KeyboardInterrupt at the n-th line that runs in nanovllm/engine; with n = 0 it only counts."""

    def __init__(self, n: int = 0):
        self.n, self.count = n, 0
        self.where, self.source = "nowhere", ""

    def __enter__(self) -> "InterruptAtLine":
        self.old = sys.gettrace()
        sys.settrace(self.on_call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self.old)

    def on_call(self, frame: Any, event: str, arg: Any) -> Any:
        return self.on_line if frame.f_code.co_filename.startswith(ENGINE) else None

    def on_line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.n:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
                self.source = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip()
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.on_line


class Scenario:
    """Two requests of others, the second of which ends while `generate` serves three of its own.

    Others end by a stop string and a stop token, and would go on if that were missed; its own end by their length.
    """

    prompts = ([7] * 20, [6], [1, 2, 3], [4] * 17, [8])
    lengths = (2, 5, 4)

    def __init__(self, checkpoint: Checkpoint, depth: int):
        self.checkpoint = checkpoint
        self.llm = checkpoint.llm(num_kvcache_blocks=12, max_num_batched_tokens=24, max_num_seqs=4)
        self.llm.depth = depth
        first, second, *own = [tokens for tokens, _ in checkpoint.answers(list(self.prompts), 64)]
        texts = [self.llm.tokenizer.decode(token, skip_special_tokens=True) for token in first]
        at = next(i for i in range(8, 40) if texts[i].strip("\ufffd") and texts[i] not in texts[:i])
        end = next(i for i in range(2, 6) if second[i] not in second[:i])
        self.params = [
            dataclasses.replace(greedy(at + 9), stop=[texts[at]]),
            dataclasses.replace(greedy(end + 9), stop_token_ids=[second[end]]),
        ]
        self.expected = [first[: at + 1], second[: end + 1], *[tokens[:n] for tokens, n in zip(own, self.lengths)]]
        outputs = self.llm.generate(list(self.prompts[:2]), self.params, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == self.expected[:2]
        self.completions = [output.outputs for output in outputs]
        assert [completion.stop_reason for (completion,) in self.completions] == [texts[at], second[end]]

    def start(self) -> list[int]:
        others = [self.llm.add_request(self.prompts[i], self.params[i]) for i in range(2)]
        self.requests = [self.llm._requests[i] for i in others]
        self.llm.step()
        return others

    def generate(self) -> list[list[int]]:
        outputs = self.llm.generate(list(self.prompts[2:]), [greedy(n) for n in self.lengths], use_tqdm=False)
        return [output["token_ids"] for output in outputs]

    def problem(self, others: list[int], at_once: bool = True) -> str | None:
        """What is wrong after an interrupted `generate`; `at_once`: all is in order before anybody has the engine."""
        llm = self.llm
        try:
            if torch.is_inference_mode_enabled():
                return "what the user computes next would have no gradients"
            if not at_once:
                llm._exclusive(lambda: None)
            if set(llm._requests) - set(others):
                return "a request of the interrupted call is still there"
            if at_once:
                check_blocks(llm.block_manager, [*llm.scheduler.running, *llm.scheduler.waiting])
            done = drain(llm, 60)
            if sorted(done) != others:
                return f"{2 - len(done)} of the other requests were never reported"
            if [done[i] for i in others] != self.expected[:2]:
                return "other requests got wrong tokens"
            if [request.output().outputs for request in self.requests] != self.completions:
                return "other requests got another text or end"
            if self.generate() != self.expected[2:]:
                return "the next call got wrong tokens"
            assert_idle(llm)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:80]}"
        return None


class StreamScenario(Scenario):
    """The three as a stream, one of them with a callable."""

    def generate(self) -> list[list[int]]:
        params = [greedy(n) for n in self.lengths]
        params[0] = dataclasses.replace(params[0], logits_processors=[lambda output_ids, logits: logits])
        found: dict[int, list[int]] = {}
        for delta in self.llm.stream(list(self.prompts[2:]), params):
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
        return [found[request_id] for request_id in sorted(found)]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("kind", [Scenario, StreamScenario])
def test_ctrl_c_at_any_line(qwen3, kind, depth):
    """Own requests are gone, blocks are free, other requests end as they should, and the next call is right."""
    scenario = kind(qwen3, depth)
    others = scenario.start()
    with InterruptAtLine() as counter:
        assert scenario.generate() == scenario.expected[2:]
    assert scenario.problem(others) is None
    assert counter.count > 500
    rng = random.Random(depth)
    lines = sorted(rng.sample(range(1, counter.count + 1), 60))
    problems, num_interrupted = {}, 0
    for n in lines:
        others = scenario.start()
        with InterruptAtLine(n) as interrupt:
            try:
                scenario.generate()
            except KeyboardInterrupt:
                num_interrupted += 1
        if found := scenario.problem(others):
            problems[interrupt.where] = found
            scenario = kind(qwen3, depth)
    assert num_interrupted > 50
    assert not problems, "\n".join(f"{where}: {what}" for where, what in sorted(problems.items()))


def test_ctrl_c_at_each_line_that_takes_in_tokens(qwen3):
    """The lines where tokens, ends and results change hands, one by one: the hardest place to be interrupted."""
    scenario = Scenario(qwen3, depth=1)
    places = {"postprocess", "finish", "_step", "step", "generate", "_release", "deallocate"}
    places |= {"_run", "_postprocess", "_finish", "_enqueue", "output", "emit"}
    others = scenario.start()
    seen: dict[tuple[str, int], list[int]] = {}
    with InterruptAtLine() as counter:
        on_line = counter.on_line

        def noting(frame: Any, event: str, arg: Any) -> Any:
            on_line(frame, event, arg)
            if event == "line" and frame.f_code.co_name in places:
                seen.setdefault((frame.f_code.co_filename, frame.f_lineno), []).append(counter.count)
            return noting

        counter.on_line = noting  # type: ignore[method-assign]
        scenario.generate()
    assert scenario.problem(others) is None
    assert len(seen) > 20
    problems = {}
    for counts in seen.values():
        for n in {counts[0], counts[-1]}:
            others = scenario.start()
            with InterruptAtLine(n) as interrupt, contextlib.suppress(KeyboardInterrupt):
                scenario.generate()
            if found := scenario.problem(others):
                problems[interrupt.where] = found
                scenario = Scenario(qwen3, depth=1)
    assert not problems, "\n".join(f"{where}: {what}" for where, what in sorted(problems.items()))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("how", ["stop", "choice", "stop at the length"])
def test_ctrl_c_when_a_text_of_others_has_just_ended(qwen3, how, depth):
    """After its last token was taken in and before anybody looked at its text: it gets no token more."""
    llm = qwen3.llm()
    llm.depth = depth
    if how == "choice":
        structured = StructuredOutputsParams(choice=["abcd"])
        params = SamplingParams(temperature=0, structured_outputs=structured, ignore_eos=True)
    else:
        (free,) = llm.generate([[5, 6, 7]], greedy(20), use_tqdm=False)
        end = next(n for n in range(5, 20) if llm.tokenizer.decode(free["token_ids"][n : n + 1]).isascii())
        text = llm.tokenizer.decode(free["token_ids"][end : end + 1])
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[text])
    (expected,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    if how == "stop at the length":
        params = dataclasses.replace(params, max_tokens=len(expected["token_ids"]))
    request = llm._requests[llm.add_request([5, 6, 7], params)]
    (seq,) = request.seqs
    interrupted = False

    def interrupting(postprocess: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            nonlocal interrupted
            finished = postprocess(*args)
            if not interrupted and seq.completion_token_ids == expected["token_ids"]:
                interrupted = True
                raise KeyboardInterrupt
            return finished

        return wrapped

    with replaced(llm.scheduler, "postprocess", interrupting), pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3]], greedy(40), use_tqdm=False)
    drain(llm, 60)
    (output,) = request.output().outputs
    assert output.token_ids == expected["token_ids"]
    assert output.text == expected["text"]
    assert output.finish_reason == expected.outputs[0].finish_reason == "stop"
    assert output.stop_reason == expected.outputs[0].stop_reason
    assert_idle(llm)


def test_ctrl_c_where_a_stream_of_others_is_told(qwen3):
    """At each line from a token to its delta: a half-read stream misses nothing of its text and gets nothing twice."""
    llm = qwen3.llm()
    params = dataclasses.replace(greedy(6), stop=["zz"])
    (expected,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    places = {"_postprocess", "_finish", "_report", "emit", "take", "take_deltas", "finish", "is_whole", "follow"}

    def run(n: int) -> tuple[InterruptAtLine, list[int], str]:
        """Another call is interrupted at line `n` while the stream's last three tokens come."""
        stream = llm.stream([[5, 6, 7]], params)
        deltas = [next(stream) for _ in range(3)]
        with InterruptAtLine(n) as interrupt, contextlib.suppress(KeyboardInterrupt):
            llm.generate([[1, 2]], greedy(8), use_tqdm=False)
        deltas += list(stream)
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"], interrupt.where
        tokens = [token_id for delta in deltas for token_id in delta.token_ids]
        return interrupt, tokens, "".join(delta.text for delta in deltas)

    counter, lines = InterruptAtLine(), []
    on_line = counter.on_line

    def noting(frame: Any, event: str, arg: Any) -> Any:
        on_line(frame, event, arg)
        if event == "line" and frame.f_code.co_name in places:
            lines.append(counter.count)
        return noting

    counter.on_line = noting  # type: ignore[method-assign]
    stream = llm.stream([[5, 6, 7]], params)
    for _ in range(3):
        next(stream)
    with counter:
        llm.generate([[1, 2]], greedy(8), use_tqdm=False)
    stream.close()
    assert len(lines) > 100
    for n in lines:
        interrupt, tokens, text = run(n)
        assert tokens == expected["token_ids"], interrupt.where
        assert text == expected["text"], interrupt.where
    assert_idle(llm)


class InterruptIn(InterruptAtLine):
    """Only in the engine's functions of these names, and in contextlib on their way; at other `events`, if asked to."""

    def __init__(self, n: int, places: str, events: str = "line"):
        super().__init__(n)
        self.places, self.events = places.split(), events.split()

    def on_call(self, frame: Any, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes = "opcode" in self.events
        place = frame.f_back if Path(frame.f_code.co_filename).name == "contextlib.py" else frame
        return super().on_call(place, event, arg) if place.f_code.co_name in self.places else None

    def on_line(self, frame: Any, event: str, arg: Any) -> Any:
        return super().on_line(frame, "line" if event in self.events else "", arg)


LOCK = "hold release _let_go _exclusive _in_order _enqueue _drop step abort _run _stream reset_prefix_cache"


def at_lines(run: Callable[[InterruptAtLine], None], interrupts: Iterator[InterruptAtLine]) -> int:
    """`run` with one interrupt after the other, until one finds no line to come at; how many came."""
    for count, interrupt in enumerate(interrupts):
        run(interrupt)
        if interrupt.where == "nowhere":
            return count
    raise AssertionError("there is no end of it")


@pytest.mark.parametrize("depth", [0, 1])
def test_ctrl_c_while_a_stream_is_closed(qwen3, depth):
    """None of its three requests goes on, and another one does."""
    llm = qwen3.llm()
    llm.depth = depth
    (expected,) = llm.generate([[7]], greedy(4), use_tqdm=False)

    def close(interrupt: InterruptAtLine) -> None:
        stream = llm.stream([[1, 2], [3, 4], [5]], greedy(50))
        next(stream)
        other = llm.add_request([7], greedy(4))
        with interrupt, contextlib.suppress(KeyboardInterrupt):
            stream.close()  # type: ignore[attr-defined]
        assert drain(llm, 8) == {other: expected["token_ids"]}, interrupt.where

    assert at_lines(close, map(InterruptAtLine, range(1 + depth, 2000, 2))) > 50


@pytest.mark.parametrize("depth", [0, 1])
def test_ctrl_c_in_a_step_loses_no_result(qwen3, depth):
    """What its caller did not get the next step reports, be it tokens or the exception of a callable."""
    llm = qwen3.llm()
    llm.depth = depth

    def boom(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise Boom

    def loop(interrupt: InterruptAtLine) -> None:
        params = [greedy(1), SamplingParams(logits_processors=[boom]), greedy(2), greedy(1)]
        ids = [llm.add_request([i + 1, 2], params[i]) for i in range(4)]
        done, num_failed, tracer = {}, 0, interrupt
        while not llm.is_finished():
            try:
                with tracer:
                    finished, _ = llm.step()
                done.update(finished)
            except Boom:
                num_failed += 1
            except KeyboardInterrupt:
                tracer = InterruptAtLine()  # which comes no more
        assert sorted(done) == [ids[0], ids[2], ids[3]], interrupt.where
        assert num_failed == 1 or interrupt.source == "raise error", interrupt.where

    places = f"{LOCK} advance _step _finish _report _abort_all take_finished"
    assert at_lines(loop, (InterruptIn(n, places) for n in range(1, 2000))) > 100


@pytest.mark.parametrize("depth", [0, 1])
def test_ctrl_c_where_a_request_ends(qwen3, depth):
    """By a stop token, a stop string, its length, or two of them: it gets no token more, and ends no other way.

    At each instruction, since a line may call what a signal comes in: a property is enough.
    """
    llm = qwen3.llm()
    llm.depth = depth
    prompts = [[token] for token in range(1, 200)]
    tokens = [output["token_ids"][0] for output in llm.generate(prompts, greedy(1), use_tqdm=False)]
    texts = [llm.tokenizer.decode(token, skip_special_tokens=True) for token in tokens]
    prompt, token, text = next(found for found in zip(prompts, tokens, texts) if found[2].strip("\ufffd"))
    params = [
        dataclasses.replace(greedy(3), stop_token_ids=[token]),
        dataclasses.replace(greedy(3), stop=[text], include_stop_str_in_output=True),
        dataclasses.replace(greedy(1), stop=[text]),
        greedy(1),
    ]
    expected = [output.outputs for output in llm.generate([prompt] * 4, params, use_tqdm=False)]
    assert [completion.stop_reason for (completion,) in expected] == [token, text, text, None]
    assert [completion.token_ids for (completion,) in expected] == [[token]] * 4

    def loop(interrupt: InterruptAtLine) -> None:
        requests = [llm._requests[llm.add_request(prompt, param)] for param in params]
        with interrupt, contextlib.suppress(KeyboardInterrupt):
            while not llm.is_finished():
                llm.step()
        drain(llm, 20)
        assert [request.output().outputs for request in requests] == expected, interrupt.where

    places = "finish last_token _stop is_whole"
    assert at_lines(loop, (InterruptIn(n, places, "opcode") for n in range(1, 5000))) > 300


@pytest.mark.parametrize("use", ["generate", "stream", "close", "add_request", "step", "abort", "reset_prefix_cache"])
def test_ctrl_c_leaves_the_lock_to_others(qwen3, use):
    """Though somebody keeps the exception, as notebooks do, and with it all that its frames hold."""
    llm = qwen3.llm(num_kvcache_blocks=10)

    def interrupted(interrupt: InterruptAtLine) -> None:
        request, stream = llm.add_request([7], greedy(3)), llm.stream([[1, 2], [3]], greedy(3))
        next(stream)
        uses: dict[str, Callable[[], Any]] = {
            "generate": lambda: llm.generate([[1]], greedy(2), use_tqdm=False),
            "stream": lambda: list(stream),
            "close": stream.close,  # type: ignore[attr-defined]
            "add_request": lambda: llm.add_request([5], greedy(1)),
            "step": llm.step,
            "abort": lambda: llm.abort(request),
            "reset_prefix_cache": llm.reset_prefix_cache,
        }
        kept = None
        with interrupt:
            try:
                uses[use]()
            except KeyboardInterrupt as error:
                kept = error
        assert (kept is None) == (interrupt.where == "nowhere")
        assert not llm._lock.is_mine, interrupt.where
        other = threading.Thread(target=llm.abort, args=(request,), daemon=True)
        other.start()
        other.join(HANGING_S)
        assert not other.is_alive(), interrupt.where
        stream.close()  # type: ignore[attr-defined]
        drain(llm)

    assert at_lines(interrupted, (InterruptIn(n, LOCK, "line return") for n in range(1, 1000))) > 15


def test_ctrl_c_leaves_no_forward_behind(qwen3):
    """The next one of this thread is not refused as a second one at once, though somebody keeps the exception."""
    llm, kept = qwen3.llm(), []
    (expected,) = llm.generate([[7]], greedy(4), use_tqdm=False)

    def interrupted(interrupt: InterruptAtLine) -> None:
        with interrupt:
            try:
                llm.generate([[7]], greedy(1), use_tqdm=False)
            except KeyboardInterrupt as error:
                kept.append(error)
        (output,) = llm.generate([[7]], greedy(4), use_tqdm=False)
        assert output["token_ids"] == expected["token_ids"], interrupt.where

    interrupts = (InterruptIn(n, "run_model", "line return") for n in range(1, 1000))
    # By a thread that ends: where a tracer raises in contextlib's `except StopIteration: return False`, Python 3.11
    # goes on as if that exception were being handled, and makes it the context of whatever a later test raises.
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(at_lines, interrupted, interrupts).result() == len(kept) > 10
    assert sys.exc_info() == (None, None, None)


@pytest.mark.parametrize("cleanup", ["_recover", "_drop"])
@pytest.mark.parametrize("depth", [0, 1])
def test_ctrl_c_once_more_during_the_recovery(qwen3, depth, cleanup):
    """An impatient user: the second one comes at each line of the clean-up of the first."""
    scenario = Scenario(qwen3, depth)
    problems: dict[str, str] = {}
    first, interrupt = True, InterruptAtLine()

    def traced(clean_up: Any) -> Any:
        def wrapped(*args: Any) -> None:
            nonlocal first
            first, was_first = False, first
            if not was_first:
                clean_up(*args)
                return
            with interrupt:
                clean_up(*args)

        return wrapped

    begin = 1 if cleanup == "_recover" else 2  # before `_drop` has marked the requests nothing can protect them
    for n in range(begin + depth, 1000, 2):
        others = scenario.start()
        first, interrupt = True, InterruptAtLine(n)
        with (
            replaced(scenario.llm.model_runner, "call", failing(3, KeyboardInterrupt())),
            replaced(scenario.llm, cleanup, traced),
            pytest.raises(KeyboardInterrupt),
        ):
            scenario.generate()
        found = scenario.problem(others, at_once=False)
        if interrupt.where == "nowhere":  # past the end of the recovery
            break
        if found:
            problems[interrupt.where] = found
            scenario = Scenario(qwen3, depth)
    assert n > 15  # it had that many lines
    assert not problems, "\n".join(f"{where}: {what}" for where, what in sorted(problems.items()))


def test_a_real_sigint(qwen3):
    """In a process of its own, at random moments of a long call, as the terminal sends it."""
    code = f"""
        import os, random, signal, sys, threading, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        torch.set_num_threads(1)
        from nanovllm import LLM, SamplingParams

        llm = LLM({str(qwen3.path)!r}, device="cpu", num_kvcache_blocks=40, kvcache_block_size=16)
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        short = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        prompts = [[i + 1] * (3 * i + 1) for i in range(12)]
        expected = [output["token_ids"] for output in llm.generate(prompts[:3], short, use_tqdm=False)]
        free = llm.block_manager.num_free_blocks
        rng, interrupted = random.Random(0), 0
        for i in range(12):
            llm.depth = i % 2
            timer = threading.Timer(rng.uniform(0.0, 0.3), os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                llm.generate(prompts, params, use_tqdm=bool(i % 3))
                time.sleep(5)
            except KeyboardInterrupt:
                interrupted += 1
            timer.join()
            assert llm.is_finished() and llm.scheduler.is_finished()
            assert llm.block_manager.num_free_blocks == free == 40
            outputs = llm.generate(prompts[:3], short, use_tqdm=False)
            assert [output["token_ids"] for output in outputs] == expected
        print("interrupted", interrupted)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANGING_S)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["interrupted", "12"]


# ---- a model that computes nonsense ----


def test_a_request_whose_logits_are_nan_ends_alone(qwen3):
    """One token has a broken embedding: only the request that contains it fails, and says so."""
    llm = qwen3.llm(max_num_batched_tokens=40, num_kvcache_blocks=14)
    bad, prompts = 200, many_prompts(6)
    prompts = [[token if token != bad else 1 for token in prompt] for prompt in prompts]
    answers = qwen3.answers(prompts, 64)
    assert all(bad not in tokens[:20] for tokens, _ in answers)
    with torch.inference_mode():
        llm.model_runner.model.lm_head.weight = torch.nn.Parameter(llm.model_runner.model.lm_head.weight.clone(), False)
        llm.model_runner.model.model.embed_tokens.weight[bad] = math.nan
    for _ in range(3):  # also later, in blocks that the broken request has left
        outputs = llm.generate([*prompts[:3], [1, 2, bad, 3], *prompts[3:]], greedy(20), use_tqdm=False)
        broken = outputs.pop(3)
        assert_matches(qwen3, prompts, outputs, 20)
        assert all(0 <= token < VOCAB_SIZE for token in broken["token_ids"])
        assert broken.outputs[0].finish_reason == "error"
        assert_idle(llm)
