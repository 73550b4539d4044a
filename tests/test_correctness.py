"""The ladder: greedy tokens equal transformers' token for token however the engine cuts the work up.

Every test that is about an event (a chunk, a preemption, a prefix hit, a wasted row) asserts that it happened.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    EOS,
    FAMILIES,
    MIN_MARGIN,
    SHAPES,
    VOCAB_SIZE,
    Watch,
    assert_idle,
    assert_matches,
    copy_checkpoint,
    copy_with_eos,
    greedy,
    greedy_reference,
    make_model,
    make_tokenizer,
    many_prompts,
    max_difference,
    random_prompt,
    reference_logprobs,
    replaced,
    resident_share,
    save_checkpoint,
    teacher_forced,
)

from nanovllm import LLM, SamplingParams
from nanovllm.engine import kv_cache
from nanovllm.engine.cuda_graph import batch_buckets
from nanovllm.utils import memory

FREQUENT_EOS = [*range(0, VOCAB_SIZE, 29), EOS]  # one token in 29 ends a completion, and the tokenizer's own does


def run(llm: LLM, prompts: list[list[int]], params: Any = None) -> list[Any]:
    return llm.generate(prompts, params or greedy(), use_tqdm=False)


# ---- models ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_sound(checkpoints, family):
    """Padding a batch for transformers changes nothing where the margin is kept, against one prompt at a time."""
    model = checkpoints(family).model
    prompts = many_prompts(6)
    for prompt, (tokens, margin) in zip(prompts, greedy_reference(model, prompts, 24), strict=True):
        ((alone, margin_alone),) = greedy_reference(model, [prompt], 24)
        assert abs(margin - margin_alone) < MIN_MARGIN / 2 or min(margin, margin_alone) < MIN_MARGIN
        assert tokens == alone or margin < MIN_MARGIN


@pytest.mark.parametrize("family", FAMILIES)
def test_64_prompts_of_64_tokens_in_one_batch(checkpoints, family):
    checkpoint, prompts = checkpoints(family), many_prompts()
    llm = checkpoint.llm()
    watch = Watch(llm)
    outputs = run(llm, prompts)
    assert_matches(checkpoint, prompts, outputs)
    assert len(watch.steps) == 64
    assert all(len(step.seq_ids) == 64 for step in watch.steps)
    assert [step.is_prefill for step in watch.steps] == [True] + [False] * 63
    assert len({tuple(output["token_ids"]) for output in outputs}) > 60  # not one text for all
    assert_idle(llm)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in FAMILIES])
def test_odd_shapes(checkpoints, name):
    """All 64 in one batch, in chunks, and in a pool that is too small for them."""
    checkpoint, prompts = checkpoints(name), many_prompts(seed=1)
    for budget, num_blocks in ((16384, 600), (48, 600), (100, 40)):
        llm = checkpoint.llm(max_num_batched_tokens=budget, num_kvcache_blocks=num_blocks)
        llm.scheduler.completion_ratio = 0.1
        watch = Watch(llm)
        outputs = run(llm, prompts, greedy(ignore_eos=False))
        assert_matches(checkpoint, prompts, outputs, eos=[EOS])
        assert (watch.num_chunks > 0) == (budget < 16384)
        assert (watch.num_preemptions > 0) == (num_blocks == 40)


@pytest.mark.parametrize("name", [name for name, (_, shape) in SHAPES.items() if "rope_scaling" in shape])
def test_rope_scaling_matters(checkpoints, name):
    """Otherwise the comparison above would prove nothing about it."""
    family, shape = SHAPES[name]
    plain = make_model(family, **{**shape, "rope_scaling": None})
    plain.load_state_dict(checkpoints(name).model.state_dict())
    prompt = torch.tensor([random_prompt(random.Random(2), 100)])
    scaled = checkpoints(name).model(prompt).logits
    assert (plain(prompt).logits - scaled).abs().max() > 0.05


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-llama3", "llama-yarn"])
def test_config_as_transformers_4_wrote_it(checkpoints, name, tmp_path):
    """`rope_theta` and `rope_scaling` at the top level, the dtype under its old name."""
    checkpoint, prompts = checkpoints(name), many_prompts(8)
    new = json.loads((checkpoint.path / "config.json").read_text())
    rope = dict(new.get("rope_parameters") or {"rope_theta": new["rope_theta"], **(new.get("rope_scaling") or {})})
    theta = rope.pop("rope_theta")
    if rope.get("rope_type") == "default":
        rope = {}
    old = copy_checkpoint(
        checkpoint.path, tmp_path / "old", rope_parameters=None, dtype=None, torch_dtype="float32", rope_theta=theta,
        rope_scaling=rope or None,
    )  # fmt: skip
    assert "rope_parameters" not in (old / "config.json").read_text()
    llm = LLM(str(old), device="cpu", num_kvcache_blocks=100, kvcache_block_size=16)
    assert_matches(checkpoint, prompts, run(llm, prompts))


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "llama-biases"])
def test_teacher_forced_logprobs(checkpoints, name):
    """The tool of the GPU tests, where it can be exact: log-probabilities of forced tokens, decoded one by one."""
    checkpoint, rng = checkpoints(name), random.Random(3)
    prompts = [random_prompt(rng, n) for n in (1, 15, 16, 17, 40)]
    completions = [random_prompt(rng, n) for n in (40, 3, 33, 16, 1)]
    expected = reference_logprobs(checkpoint.model, prompts, completions)
    for options in ({}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 1}):
        actual = teacher_forced(checkpoint.llm(**options), prompts, completions)
        assert max_difference(actual, expected) < 1e-3
    assert [len(x) for x in actual] == [40, 3, 33, 16, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_half_precision_is_close(checkpoints, dtype):
    checkpoint, rng = checkpoints("qwen3"), random.Random(4)
    prompts = [random_prompt(rng, n) for n in (5, 40)]
    completions = [random_prompt(rng, n) for n in (30, 20)]
    expected = reference_logprobs(checkpoint.model, prompts, completions)
    llm = checkpoint.llm(dtype=dtype)
    assert llm.model_runner.kv_cache.dtype == (dtype if isinstance(dtype, torch.dtype) else torch.float16)
    actual = teacher_forced(llm, prompts, completions)
    difference = (torch.cat(actual) - torch.cat(expected)).abs()
    assert difference.mean() < 0.1
    assert difference.max() > 1e-5  # it did compute in that precision


# ---- one step, many shapes of it ----


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill(checkpoints, family):
    checkpoint, prompts = checkpoints(family), many_prompts()
    llm = checkpoint.llm(max_num_batched_tokens=48)
    watch = Watch(llm)
    assert_matches(checkpoint, prompts, run(llm, prompts))
    assert watch.num_chunks > 0
    assert max(step.total for step in watch.steps) == 48


@pytest.mark.parametrize(("budget", "max_num_seqs"), [(1, 4), (2, 64), (5, 1), (17, 64), (63, 64)])
def test_any_token_budget(checkpoints, budget, max_num_seqs):
    checkpoint, prompts = checkpoints("llama"), many_prompts()[:16]
    llm = checkpoint.llm(max_num_batched_tokens=budget, max_num_seqs=max_num_seqs)
    watch = Watch(llm)
    assert_matches(checkpoint, prompts, run(llm, prompts, greedy(24)), 24)
    assert watch.num_chunks > 0
    assert max(step.total for step in watch.steps) == budget


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("depth", "budget"), [(0, 16384), (1, 48)])
def test_preempted(checkpoints, family, depth, budget):
    checkpoint, prompts = checkpoints(family), many_prompts()
    llm = checkpoint.llm(num_kvcache_blocks=60, max_num_batched_tokens=budget)
    llm.depth = depth
    watch = Watch(llm)
    # Requests that may end by EOS are expected to end early, so that the pool is overbooked.
    assert_matches(checkpoint, prompts, run(llm, prompts, greedy(ignore_eos=False)), eos=[EOS])
    assert watch.num_preemptions > 0
    assert_idle(llm)


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted_until_one_sequence_fills_the_pool(checkpoints, depth):
    """The pool holds exactly one request at its longest; overbooked as far as it goes."""
    checkpoint, prompts = checkpoints("qwen2"), many_prompts()[:12]
    num_tokens = max(map(len, prompts)) + 64 - 1
    llm = checkpoint.llm(kvcache_block_size=3, num_kvcache_blocks=-(-num_tokens // 3))
    llm.depth = depth
    llm.scheduler.completion_ratio = 0.0
    watch = Watch(llm)
    assert_matches(checkpoint, prompts, run(llm, prompts, greedy(ignore_eos=False)), eos=[EOS])
    assert watch.num_preemptions > 10
    assert_idle(llm)


@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_block_sizes(checkpoints, block_size):
    checkpoint, prompts = checkpoints("qwen3"), many_prompts()[:24]
    llm = checkpoint.llm(
        kvcache_block_size=block_size, num_kvcache_blocks=4000 // block_size, max_num_batched_tokens=200
    )
    assert_matches(checkpoint, prompts, run(llm, prompts))


def test_one_resident_sequence(checkpoints):
    checkpoint, prompts = checkpoints("qwen3"), many_prompts()[:12]
    llm = checkpoint.llm(max_num_seqs=1)
    watch = Watch(llm)
    assert_matches(checkpoint, prompts, run(llm, prompts, greedy(32)), 32)
    assert max(len(step.seq_ids) for step in watch.steps) == 1


def test_a_step_is_one_forward(checkpoints):
    """Also on CPU: sixteen sequences are not sixteen forwards."""
    checkpoint, calls = checkpoints("qwen3"), []
    llm = checkpoint.llm()
    watch = Watch(llm)
    prompts = many_prompts(16)

    def counting(run_model: Any) -> Any:
        return lambda input_ids, *args: calls.append(len(input_ids)) or run_model(input_ids, *args)

    with replaced(llm.model_runner, "run_model", counting):
        run(llm, prompts, greedy(8))
    assert len(calls) == len(watch.steps) == 8
    assert calls == [sum(map(len, prompts))] + [16] * 7


def test_leftovers_in_the_cache_are_never_read(checkpoints):
    """Blocks hold what earlier requests left behind; here, values that no average could hide."""
    checkpoint, prompts = checkpoints("llama"), many_prompts()[:32]
    llm = checkpoint.llm(num_kvcache_blocks=100, max_num_batched_tokens=64)
    with torch.inference_mode():
        llm.model_runner.kv_cache.fill_(1e4)
    assert_matches(checkpoint, prompts, run(llm, prompts))


def test_nan_left_in_the_cache_does_not_spread(checkpoints):
    """A request that overflowed leaves NaN behind; weight zero times NaN is NaN, so masking alone does not do."""
    checkpoint, prompts = checkpoints("llama"), many_prompts()[:16]
    llm = checkpoint.llm(num_kvcache_blocks=100, max_num_batched_tokens=64)
    with torch.inference_mode():
        llm.model_runner.kv_cache[:, :, :100] = math.nan
    assert_matches(checkpoint, prompts, run(llm, prompts, greedy(20)), 20)


# ---- padded batches ----


class PaddedDecode:
    """What captured graphs do to a batch: rows padded to a bucket, contexts as long as they may get."""

    def __init__(self, llm: LLM):
        self.runner = llm.model_runner
        self.buckets = batch_buckets(llm.config.max_num_seqs)
        self.sizes: list[tuple[int, int]] = []

    @torch.inference_mode()  # as a graph is captured
    def replay(self, rows: torch.Tensor, sample: bool = True) -> tuple[torch.Tensor]:
        assert sample
        bucket = min(size for size in self.buckets if size >= len(rows))
        self.sizes.append((len(rows), bucket))
        padded = torch.full((bucket,), self.runner.state.padding_row)
        padded[: len(rows)] = rows
        return (self.runner.run_decode(padded, self.runner.config.max_model_len)[: len(rows)],)

    def clear(self) -> None:
        pass


@pytest.mark.parametrize("depth", [0, 1])
def test_padding_rows_change_nothing(checkpoints, depth):
    """Requests of all lengths, so that the batch shrinks through every size, some padded."""
    checkpoint, prompts = checkpoints("llama"), many_prompts(40, seed=15)
    lengths = list(range(1, 41))
    llm = checkpoint.llm(max_num_seqs=40, num_kvcache_blocks=500)
    llm.depth = depth
    padded = llm.model_runner.graphs = PaddedDecode(llm)
    for _ in range(2):
        assert_matches(checkpoint, prompts, run(llm, prompts, [greedy(n) for n in lengths]), lengths)
    assert {size for size, _ in padded.sizes} == set(range(1, 40))
    assert sum(bucket > size for size, bucket in padded.sizes) > 40
    # They keep to a block of their own, one past the pool.
    row = llm.model_runner.state.padding_row
    assert (llm.model_runner.state.block_tables[row] == 500).all()
    assert llm.model_runner.state.num_cached_tokens[row] == 0


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 4, 7, 8, 9, 40, 255, 256, 257, 300, 512, 1000])
def test_every_batch_size_has_a_bucket(max_num_seqs):
    buckets = batch_buckets(max_num_seqs)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == max_num_seqs
    for size in range(1, max_num_seqs + 1):
        bucket = min(b for b in buckets if b >= size)
        assert bucket - size < (8 if size <= 256 else 32)
    assert {1, 2, 4} & set(range(1, max_num_seqs)) <= set(buckets)


# ---- shared prefixes ----


def prefix_prompts(block_size: int, seed: int) -> list[list[int]]:
    """Prompts that share the beginning of one text, for lengths around multiples of the block size."""
    rng = random.Random(seed)
    text = random_prompt(rng, 5 * block_size)
    lengths = [k * block_size + d for k in range(1, 5) for d in (-1, 0, 1) if k * block_size + d > 0]
    whole = [text[:n] for n in lengths]  # each wholly a prefix of the longest
    branched = [text[:n] + random_prompt(rng, 9) for n in lengths]
    return whole + branched


@pytest.mark.parametrize(("family", "block_size"), [("qwen3", 1), ("qwen2", 4), ("qwen3", 16), ("llama", 16)])
def test_prefix_hits_across_calls(checkpoints, family, block_size):
    checkpoint = checkpoints(family)
    prompts = prefix_prompts(block_size, seed=5)
    llm = checkpoint.llm(kvcache_block_size=block_size, num_kvcache_blocks=12000 // block_size)
    longest = max(prompts[: len(prompts) // 2], key=len)
    assert_matches(checkpoint, [longest], run(llm, [longest]))
    watch = Watch(llm)
    assert_matches(checkpoint, prompts, run(llm, prompts))
    for seq in watch.seqs.values():
        shared = next((i for i, (a, b) in enumerate(zip(seq.prompt_token_ids, longest)) if a != b), len(longest))
        shared = min(shared, seq.num_prompt_tokens - 1)  # the last prompt token is always computed
        assert seq.num_prefix_cached_tokens >= shared // block_size * block_size
    # The same once more: what a prompt left behind is found too, and the last token is still computed.
    again = Watch(llm)
    assert_matches(checkpoint, prompts, run(llm, prompts))
    for seq in again.seqs.values():
        assert seq.num_prefix_cached_tokens == (seq.num_prompt_tokens - 1) // block_size * block_size
    assert again.steps[0].is_prefill
    wholly_cached = [n for n in again.steps[0].num_scheduled if n == 1]
    assert wholly_cached


@pytest.mark.parametrize("depth", [0, 1])
def test_prefix_hits_between_prompts_of_one_step(checkpoints, depth):
    checkpoint = checkpoints("qwen3")
    prompts = [prompt for seed in (6, 7) for prompt in prefix_prompts(16, seed)]
    random.Random(8).shuffle(prompts)
    llm = checkpoint.llm()
    llm.depth = depth
    watch = Watch(llm)
    assert_matches(checkpoint, prompts, run(llm, prompts))
    assert sum(watch.steps[0].prefix_cached.values()) > 0
    assert len(watch.steps[0].seq_ids) == len(prompts)
    assert watch.steps[0].total < sum(map(len, prompts))


def test_identical_prompts_of_one_step_share_all_but_the_last_token(checkpoints):
    checkpoint, prompt = checkpoints("llama"), random_prompt(random.Random(9), 33)
    llm = checkpoint.llm()
    watch = Watch(llm)
    outputs = run(llm, [prompt] * 5)
    assert_matches(checkpoint, [prompt] * 5, outputs)
    assert watch.steps[0].num_scheduled == [33, 1, 1, 1, 1]
    assert list(watch.steps[0].prefix_cached.values()) == [0, 32, 32, 32, 32]


def test_prefix_in_a_prompt_that_is_still_being_computed(checkpoints):
    """The first prompt takes several steps; the others share the chunks that are done."""
    checkpoint, prompts = checkpoints("llama"), prefix_prompts(16, seed=10)
    prompts.sort(key=len, reverse=True)
    llm = checkpoint.llm(max_num_batched_tokens=24)
    watch = Watch(llm)
    assert_matches(checkpoint, prompts, run(llm, prompts))
    assert watch.num_chunks > 0
    assert watch.num_prefix_cached_tokens > 0


def test_answers_are_a_prefix_too(checkpoints):
    """A conversation: the next prompt begins with the last prompt and its answer."""
    checkpoint = checkpoints("qwen2")
    llm = checkpoint.llm()
    prompt = random_prompt(random.Random(11), 10)
    for _ in range(3):
        watch = Watch(llm)
        (output,) = run(llm, [prompt], greedy(40))
        assert_matches(checkpoint, [prompt], [output], 40)
        found = watch.num_prefix_cached_tokens
        prompt = prompt + output["token_ids"] + [1, 2, 3]
    assert found == (10 + 2 * 43 - 4) // 16 * 16  # the last token of an answer was never computed


@pytest.mark.parametrize("name", SHAPES)
def test_prefix_cache_survives_preemption_and_eviction(checkpoints, name):
    """Few blocks, many requests with shared beginnings: hits, evictions and preemptions at once."""
    checkpoint = checkpoints(name)
    prompts = [prompt for seed in (12, 13) for prompt in prefix_prompts(16, seed)]
    random.Random(14).shuffle(prompts)
    llm = checkpoint.llm(num_kvcache_blocks=24, max_num_batched_tokens=60)
    llm.scheduler.completion_ratio = 0.1
    watch = Watch(llm)
    for _ in range(2):
        assert_matches(checkpoint, prompts, run(llm, prompts, greedy(40, ignore_eos=False)), 40, eos=[EOS])
    assert watch.num_preemptions > 0
    assert watch.num_prefix_cached_tokens > 0


# ---- ends ----


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("options", [{}, {"num_kvcache_blocks": 40, "max_num_batched_tokens": 40}, {"max_num_seqs": 5}])
def test_ends_by_eos(checkpoints, tmp_path, depth, options):
    checkpoint = copy_with_eos(checkpoints("qwen2"), tmp_path / "eos", FREQUENT_EOS)
    prompts = many_prompts()
    llm = checkpoint.llm(**options)
    llm.depth = depth
    watch = Watch(llm)
    outputs = run(llm, prompts, greedy(ignore_eos=False))
    assert_matches(checkpoint, prompts, outputs, eos=FREQUENT_EOS)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons.count("stop") > 10
    assert (watch.num_wasted_rows > 10) if depth else (watch.num_wasted_rows == 0)
    assert_idle(llm)
    # The next call finds nothing left in flight.
    assert_matches(checkpoint, prompts[:8], run(llm, prompts[:8], greedy(ignore_eos=False)), eos=FREQUENT_EOS)
    assert_idle(llm)


@pytest.mark.parametrize("depth", [0, 1])
def test_every_max_tokens(checkpoints, depth):
    """Requests of 1, 2, 3 ... tokens in one call; the last token of a request is sampled but never computed."""
    checkpoint, prompts = checkpoints("llama"), many_prompts(40, seed=15)
    lengths = list(range(1, 41))
    llm = checkpoint.llm()
    llm.depth = depth
    watch = Watch(llm)
    outputs = run(llm, prompts, [greedy(n) for n in lengths])
    assert_matches(checkpoint, prompts, outputs, lengths)
    assert sum(step.total for step in watch.steps) == sum(map(len, prompts)) + sum(lengths) - 40
    assert watch.num_wasted_rows == 0


@pytest.mark.parametrize("max_tokens", [None, 64, 1000])
def test_generation_stops_at_max_model_len(checkpoints, max_tokens):
    checkpoint, prompts = checkpoints("qwen3"), many_prompts(8)
    llm = checkpoint.llm(max_model_len=81)
    outputs = run(llm, prompts, greedy(max_tokens))
    assert_matches(checkpoint, prompts, outputs, [min(max_tokens or 81, 81 - len(prompt)) for prompt in prompts])
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert max(len(prompt) for prompt in prompts) == 80


def test_max_tokens_none_fills_the_pool(checkpoints):
    """The pool holds 48 tokens; the one after those needs no room."""
    checkpoint, prompts = checkpoints("qwen3"), [[1, 2, 3], [4] * 48]
    llm = checkpoint.llm(num_kvcache_blocks=3)
    outputs = run(llm, prompts, greedy(None))
    assert_matches(checkpoint, prompts, outputs, [46, 1])


def test_max_model_len_is_lowered_to_the_models(checkpoints):
    llm = checkpoints("qwen3").llm(max_model_len=4096)
    assert llm.config.max_model_len == 512


# ---- the engine's interface ----


def test_requests_that_come_and_go(checkpoints, tmp_path):
    """`add_request` between steps: every request is reported once, with its own tokens."""
    checkpoint = copy_with_eos(checkpoints("qwen3"), tmp_path / "eos", FREQUENT_EOS)
    prompts, rng = many_prompts(seed=16), random.Random(17)
    for depth in (0, 1):
        llm = checkpoint.llm(max_num_seqs=9, num_kvcache_blocks=50, max_num_batched_tokens=70)
        llm.depth = depth
        watch = Watch(llm)
        ids, done, todo, num_computed = {}, {}, list(enumerate(prompts)), 0
        while todo or not llm.is_finished():
            while todo and (llm.is_finished() or rng.random() < 0.4):
                i, prompt = todo.pop()
                ids[llm.add_request(prompt, greedy(ignore_eos=False))] = i
            outputs, num_tokens = llm.step()
            assert num_tokens >= 0
            num_computed += num_tokens
            for request_id, token_ids in outputs:
                assert request_id not in done
                done[request_id] = token_ids
        assert sorted(ids) == sorted(done)
        assert num_computed == sum(step.total for step in watch.steps)
        by_prompt = {ids[request_id]: token_ids for request_id, token_ids in done.items()}
        assert_matches(checkpoint, prompts, [by_prompt[i] for i in range(64)], eos=FREQUENT_EOS)
        assert_idle(llm)


def test_generate_beside_requests_of_others(checkpoints):
    """`generate` runs them along; `step` reports them, each once."""
    checkpoint, prompts = checkpoints("llama"), many_prompts(24, seed=18)
    llm = checkpoint.llm(max_num_seqs=6)
    short = [llm.add_request(prompt, greedy(5)) for prompt in prompts[:4]]
    long = [llm.add_request(prompt, greedy(64)) for prompt in prompts[4:8]]
    outputs = run(llm, prompts[8:], greedy(10))
    assert_matches(checkpoint, prompts[8:], outputs, 10)
    assert not llm.is_finished()
    done: dict[int, list[int]] = {}
    while not llm.is_finished():
        for request_id, token_ids in llm.step()[0]:
            assert request_id not in done
            done[request_id] = token_ids
    assert_matches(checkpoint, prompts[:8], [done[i] for i in short + long], [5] * 4 + [64] * 4)
    assert llm.step() == ([], 0)
    assert_idle(llm)


def test_text_in_and_out(checkpoints):
    checkpoint, tokenizer = checkpoints("qwen3"), make_tokenizer()
    texts = ["Hello there", "äöü 漢字 🙂", " ", "a"]
    llm = checkpoint.llm()
    outputs = llm.generate(texts, greedy(20), use_tqdm=False)
    prompts = [tokenizer.encode(text) for text in texts]
    assert_matches(checkpoint, prompts, outputs, 20)
    for text, prompt, output in zip(texts, prompts, outputs, strict=True):
        assert output.prompt == text
        assert output.prompt_token_ids == prompt
        text = tokenizer.decode(output["token_ids"], skip_special_tokens=True)
        assert output["text"] == output.outputs[0].text == text
    (single,) = llm.generate("Hello there", greedy(20), use_tqdm=False)
    assert single["token_ids"] == outputs[0]["token_ids"]
    mixed = llm.generate(["a", prompts[0]], greedy(20), use_tqdm=False)
    assert [output["token_ids"] for output in mixed] == [outputs[3]["token_ids"], outputs[0]["token_ids"]]
    assert [output.prompt for output in mixed] == ["a", None]
    with pytest.raises(KeyError, match="text"):
        single["logprobs"]


def test_outputs_come_in_the_order_of_the_prompts(checkpoints):
    checkpoint, prompts = checkpoints("qwen3"), many_prompts(30)
    lengths = [30 - i for i in range(30)]  # later prompts finish first
    llm = checkpoint.llm(max_num_seqs=10)
    outputs = run(llm, prompts, [greedy(n) for n in lengths])
    assert_matches(checkpoint, prompts, outputs, lengths)
    assert sorted(output.request_id for output in outputs) == [output.request_id for output in outputs]


def test_two_engines_in_one_process(checkpoints):
    """Nothing global is left between steps: two models take turns."""
    engines = [checkpoints("qwen3").llm(), checkpoints("llama").llm(kvcache_block_size=5)]
    prompts, done = many_prompts(6, seed=19), [{}, {}]
    ids = [[llm.add_request(prompt, greedy(20)) for prompt in prompts] for llm in engines]
    while not all(llm.is_finished() for llm in engines):
        for llm, results in zip(engines, done, strict=True):
            results.update(llm.step()[0])
    for name, own, results in zip(("qwen3", "llama"), ids, done, strict=True):
        assert_matches(checkpoints(name), prompts, [results[i] for i in own], 20)


def test_context_manager_and_repeated_exit(checkpoints):
    checkpoint = checkpoints("qwen3")
    with checkpoint.llm() as llm:
        assert_matches(checkpoint, [[1, 2]], run(llm, [[1, 2]], greedy(4)), 4)
    llm.exit()
    llm.close()
    assert not hasattr(llm.model_runner, "kv_cache")


def test_start_up_does_no_more_than_it_must(checkpoints, monkeypatch):
    """On a CPU nothing is computed, and memory for the cache is taken when it is written."""
    checkpoint = checkpoints("qwen3")
    # A hole in malloc's heap, large enough for the cache: what malloc takes from there it has to clear. A large array
    # that is freed comes first, after which glibc keeps smaller ones in its heap.
    np.ones(31 * 2**20, np.uint8)
    buffers = [np.ones(2**20, np.uint8) for _ in range(500)]
    above = buffers.pop()
    del buffers
    monkeypatch.setattr("nanovllm.engine.model_runner.ModelRunner.run_model", None)
    llm = LLM(str(checkpoint.path), device="cpu")
    cache = llm.model_runner.kv_cache
    assert cache.nbytes > 2**26
    assert resident_share(cache) < 0.1
    with torch.inference_mode():
        cache[:, :, : cache.shape[2] // 2] = 1  # so that the share is a measure
    assert 0.4 < resident_share(cache) < 0.6
    del above


def test_start_up_is_logged_in_one_line(checkpoints, caplog):
    with caplog.at_level("INFO", logger="nanovllm"):
        llm = LLM(str(checkpoints("qwen3").path), device="cpu")
    (line,) = [r.getMessage() for r in caplog.records if "cache of" in r.getMessage()]
    for word in ("Qwen3ForCausalLM", "cpu", "float32", "sdpa", f"{llm.block_manager.num_blocks} blocks"):
        assert word in line


def test_files_that_are_cached_count_as_free_ram(monkeypatch, tmp_path):
    """Of a container's limit: the kernel drops them when memory is asked for."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.cgroup_free_bytes() == float("inf")
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nactive_file 2000\ninactive_file 3500\nslab 500\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.cgroup_free_bytes() == float("inf")
    (tmp_path / "memory.max").write_text("8000\n")
    assert memory.cgroup_free_bytes() == 6500


def test_the_cache_on_cpu_is_a_share_of_free_ram(checkpoints, monkeypatch):
    checkpoint = checkpoints("qwen3")

    def num_blocks(free_bytes: int) -> int:
        monkeypatch.setattr(kv_cache, "free_ram_bytes", lambda: free_bytes)
        return checkpoint.llm(num_kvcache_blocks=-1).model_runner.num_kvcache_blocks

    block_bytes = checkpoint.llm().model_runner.block_bytes
    assert block_bytes == 2 * 2 * 16 * 2 * 16 * 4  # keys and values, layers, tokens, kv heads, head_dim, float32
    share = kv_cache.CPU_CACHE_SHARE
    assert num_blocks(int(100.5 * block_bytes / share)) == 100
    assert num_blocks(2**40) == 64 * 16  # every sequence at its longest: more would never be used
    with pytest.raises(ValueError, match="no memory for a KV cache"):
        num_blocks(int(0.5 * block_bytes / share))


# ---- everything at once ----


@pytest.mark.parametrize("seed", range(12))
def test_random_configurations(checkpoints, tmp_path: Path, seed):
    """Whatever the settings and the mix of requests, the same tokens."""
    rng = random.Random(1000 + seed)
    eos = FREQUENT_EOS if rng.random() < 0.6 else [EOS]
    checkpoint = copy_with_eos(checkpoints(FAMILIES[seed % 3]), tmp_path / "eos", eos)
    block_size = rng.choice([1, 2, 5, 8, 16, 33])
    longest = rng.choice([30, 80])
    texts = [random_prompt(rng, longest) for _ in range(3)]
    prompts = []
    for _ in range(24):
        shared = rng.choice(texts)[: rng.randrange(longest)] if rng.random() < 0.7 else []
        prompts.append(shared + random_prompt(rng, rng.randrange(1, 12)))
    lengths = [rng.choice([1, 2, 10, 40]) for _ in prompts]
    needed = max(-(-(len(prompt) + n - 1) // block_size) for prompt, n in zip(prompts, lengths))
    llm = checkpoint.llm(
        kvcache_block_size=block_size,
        num_kvcache_blocks=needed + rng.choice([0, 1, 5, 30, 1000]),
        max_num_seqs=rng.choice([1, 2, 7, 64]),
        max_num_batched_tokens=rng.choice([1, 3, 20, 64, 1000]),
    )
    llm.scheduler.completion_ratio = rng.choice([0.0, 0.5])
    Watch(llm)
    for _ in range(2):
        llm.depth = rng.randrange(2)
        ignore = rng.random() < 0.3
        outputs = run(llm, prompts, [greedy(n, ignore_eos=ignore) for n in lengths])
        assert_matches(checkpoint, prompts, outputs, lengths, eos=[] if ignore else eos)
    assert_idle(llm)


def test_sharded_and_converted_checkpoint_gives_the_same_tokens(checkpoints, tmp_path):
    checkpoint, prompts = checkpoints("qwen2"), many_prompts(8)
    sharded = save_checkpoint(tmp_path / "sharded", checkpoint.model, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert (sharded / "model.safetensors.index.json").is_file()
    llm = LLM(str(sharded), device="cpu", num_kvcache_blocks=100, kvcache_block_size=16)
    assert_matches(
        checkpoint, prompts, run(llm, prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    )
