"""On one CUDA device, in bfloat16: teacher-forced log-probabilities, since free-running text proves little there.

Random weights have a top-two gap of some hundredths, and losing a page of KV can leave the most likely token as it was.
So every test forces the tokens and compares the log-probability at every position, with contexts that cross pages.
The checkpoint is $MODELS/qwen3-0.6B if there is one, else four layers of that shape.
"""

import gc
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    FAMILIES,
    Watch,
    assert_idle,
    assert_matches,
    assert_same_outputs,
    assert_top_5,
    everything_at_once,
    greedy,
    make_tokenizer,
    many_prompts,
    max_difference,
    random_prompt,
    recording,
    reference_logprobs,
    replaced,
    teacher_forced,
)
from scipy import stats
from test_sampler_pipeline import make_seq, what_is_left

from nanovllm import LLM, SamplingParams
from nanovllm.attention import BACKENDS, why_not
from nanovllm.engine.adjustments import prepare_sample
from nanovllm.engine.cuda_graph import batch_buckets
from nanovllm.engine.step_output import TokenBuffers
from nanovllm.engine.token_counts import TokenCounts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")
PAGE = 256
TOLERANCE = 0.06  # of a log-probability, between two ways to compute in bfloat16
PROMPT_LENGTHS = [1, 2, 17, 255, 256, 257, 230, 300, 511, 512, 513, 700, 1023, 1024, 1025]


def usable(page: int) -> list[str]:
    return [
        name for name in BACKENDS if torch.cuda.is_available() and not why_not(name, DEVICE, torch.bfloat16, page, 128)
    ]


BACKENDS_HERE = usable(PAGE)
CAPTURED = [name for name in BACKENDS_HERE if name != "sdpa"]


@dataclass
class Model:
    """A checkpoint in bfloat16 and requests with given completions, and what transformers makes of them."""

    path: str
    reference: Any
    vocab_size: int

    def requests(self, lengths: list[int], num_tokens: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        rng = random.Random(seed)
        prompts = [random_prompt(rng, n, self.vocab_size) for n in lengths]
        return prompts, [random_prompt(rng, num_tokens, self.vocab_size) for _ in lengths]

    def expected(self, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
        return reference_logprobs(self.reference, prompts, completions)

    def llm(self, **kwargs: Any) -> LLM:
        """Use as a context manager: GPU memory is returned at the end."""
        defaults = {"max_model_len": 2048, "kvcache_block_size": PAGE, "max_num_seqs": 32, "num_kvcache_blocks": 100}
        return LLM(self.path, **{**defaults, **kwargs})


def qwen3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(os.environ.get("MODELS", "/nowhere")) / "qwen3-0.6B"
    if not path.is_dir():
        path = tmp_path_factory.mktemp("qwen3-0.6B-shape")
        config = transformers.Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True, rope_theta=1e6,
            max_position_embeddings=40960, rms_norm_eps=1e-6, eos_token_id=151645, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = qwen3_checkpoint(tmp_path_factory)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(DEVICE).eval()
    yield Model(str(path), reference, reference.config.vocab_size)
    del reference
    gc.collect()
    torch.cuda.empty_cache()


class Replays:
    """Counts the graph replays of an engine by batch size; none if it has no graphs."""

    def __init__(self, llm: LLM):
        self.sizes: list[int] = []
        graphs = llm.model_runner.graphs
        if graphs is not None:
            replay = graphs.replay
            graphs.replay = lambda rows, sample=True: self.sizes.append(rows.shape[0]) or replay(rows, sample)


# ---- against transformers ----


@pytest.mark.parametrize("budget", [16384, 200])
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_logprobs_equal_transformers(model, backend, enforce_eager, budget):
    prompts, completions = model.requests(PROMPT_LENGTHS, 60, seed=1)
    with model.llm(attention_backend=backend, enforce_eager=enforce_eager, max_num_batched_tokens=budget) as llm:
        assert llm.config.dtype == torch.bfloat16
        assert llm.depth == 1
        watch, replays = Watch(llm), Replays(llm)
        actual = teacher_forced(llm, prompts, completions)
    assert max_difference(actual, model.expected(prompts, completions)) < TOLERANCE
    assert (watch.num_chunks > 0) == (budget == 200)
    assert bool(replays.sizes) == (not enforce_eager and backend != "sdpa")


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in usable(16)])
def test_small_pages(model, backend, page):
    prompts, completions = model.requests([1, 15, 16, 17, 63, 64, 65, 250, 333], 40, seed=2)
    with model.llm(attention_backend=backend, kvcache_block_size=page, num_kvcache_blocks=3000 // page) as llm:
        actual = teacher_forced(llm, prompts, completions)
    assert max_difference(actual, model.expected(prompts, completions)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_long_contexts(model, backend):
    """Decode over many pages, where split-KV and its combination are at work."""
    prompts, completions = model.requests([4000, 9, 8190], 30, seed=3)
    with model.llm(attention_backend=backend, max_model_len=8300, max_num_batched_tokens=3000) as llm:
        actual = teacher_forced(llm, prompts, completions)
    assert max_difference(actual, model.expected(prompts, completions)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_shared_prefixes(model, backend):
    rng = random.Random(4)
    text = random_prompt(rng, 3 * PAGE, model.vocab_size)
    lengths = [255, 256, 257, 511, 512, 513, 600, 768]
    prompts = [text[:n] for n in lengths] + [text[:n] + random_prompt(rng, 5, model.vocab_size) for n in lengths]
    completions = [random_prompt(rng, 30, model.vocab_size) for _ in prompts]
    expected = model.expected(prompts, completions)
    with model.llm(attention_backend=backend) as llm:
        for _ in range(2):
            watch = Watch(llm)
            assert max_difference(teacher_forced(llm, prompts, completions), expected) < TOLERANCE
            assert watch.num_prefix_cached_tokens >= 5 * PAGE


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_arrivals_preemptions_and_chunks_at_once(model, backend, depth):
    """Requests come while others run, in a pool that is too small, a few rows at a time."""
    rng = random.Random(5)
    lengths = [rng.choice([3, 100, 250, 256, 300, 511, 600]) for _ in range(30)]
    prompts, completions = model.requests(lengths, 40, seed=5)
    eos = max({0}.union(*map(set, completions))) + 1  # no forced token ends a request
    assert eos <= model.vocab_size
    full = [prompt + completion for prompt, completion in zip(prompts, completions)]
    options = {"num_kvcache_blocks": 9, "max_num_seqs": 7, "max_num_batched_tokens": 300}
    with model.llm(attention_backend=backend, **options) as llm:
        llm.depth = depth
        llm.scheduler.eos = frozenset([eos])
        llm.scheduler.completion_ratio = 0.0  # expect early ends that never come
        watch, done, todo = Watch(llm), {}, list(prompts)
        with recording(llm, len(prompts), full) as recorder:
            ids = []
            while todo or not llm.is_finished():
                while todo and (llm.is_finished() or rng.random() < 0.5):
                    params = SamplingParams(temperature=0, max_tokens=40)
                    ids.append(llm.add_request(todo.pop(0), params))
                done.update(llm.step()[0])
        assert [done[i] for i in ids] == completions
        logprobs = recorder.logprobs.cpu()
        assert watch.num_preemptions > 0
        assert watch.num_chunks > 0
        assert_idle(llm)
    actual = [logprobs[i, len(p) : len(f)] for i, (p, f) in enumerate(zip(prompts, full), 1)]
    assert max_difference(actual, model.expected(prompts, completions)) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_greedy_tokens_equal_transformers(checkpoints, name):
    """The CPU's rung of the ladder, on the GPU: exact in float32."""
    checkpoint, prompts = checkpoints(name), many_prompts()
    with checkpoint.llm(device="cuda", dtype="float32", attention_backend="sdpa", max_num_batched_tokens=100) as llm:
        assert llm.model_runner.kv_cache.dtype == torch.float32
        watch = Watch(llm)
        assert_matches(checkpoint, prompts, llm.generate(prompts, greedy(), use_tqdm=False))
        assert watch.num_chunks > 0


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("backend", CAPTURED)
def test_log_probabilities_of_a_step_equal_transformers(model, backend, depth, enforce_eager):
    """Of the forward-to-logits graph; those who ask end first, and the plain graph goes on with the others' rows."""
    prompts, _ = model.requests(PROMPT_LENGTHS, 0, seed=13)
    asking = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, logprobs=0)
    plain = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    with model.llm(attention_backend=backend, enforce_eager=enforce_eager) as llm:
        llm.depth = depth
        outputs = llm.generate(prompts, [asking, plain] * 7 + [asking], use_tqdm=False)
        kinds = {samples for _, samples in llm.model_runner.graphs.graphs} if llm.model_runner.graphs else set()
        assert kinds == (set() if enforce_eager else {False, True})
        texts = [output["token_ids"] for output in outputs]
        # The plain rows' tokens are judged by what they get as prompts.
        scored = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=1)
        whole = [prompt + text for prompt, text in zip(prompts, texts)]
        scores = [output.prompt_logprobs[-len(text) :] for output, text in zip(llm.generate(whole, scored), texts)]
    expected = model.expected(prompts, texts)
    for output, wanted in zip(outputs[::2], expected[::2]):
        entries = zip(output.outputs[0].logprobs, output["token_ids"], strict=True)
        actual = torch.tensor([entry[token_id].logprob for entry, token_id in entries])
        assert (actual - wanted).abs().max() < TOLERANCE
    for entries, text, wanted in zip(scores, texts, expected):
        actual = torch.tensor([entry[token_id].logprob for entry, token_id in zip(entries, text, strict=True)])
        assert (actual - wanted).abs().max() < TOLERANCE
        best = torch.tensor([max(logprob.logprob for logprob in entry.values()) for entry in entries])
        assert (best - actual).max() < 2 * TOLERANCE


@pytest.mark.parametrize("depth", [0, 1])
def test_every_parameter_in_one_batch_equals_the_cpu(checkpoints, depth):
    """In float32 the same tokens and texts, whatever a row asks for."""
    checkpoint, (prompts, params) = checkpoints("qwen3"), everything_at_once()
    expected = checkpoint.llm().generate(prompts, params, use_tqdm=False)
    with checkpoint.llm(device="cuda", dtype="float32", attention_backend="sdpa") as llm:
        llm.depth = depth
        watch = Watch(llm)
        actual = llm.generate(prompts, params, use_tqdm=False)
        assert (watch.num_wasted_rows > 0) == (depth == 1)
        assert_idle(llm)
    assert_same_outputs(actual, expected, 1e-3)


def test_adjusted_logits_equal_the_cpus_over_a_large_vocabulary():
    """Where top-p cuts, the last bits of a sum decide: a token there may differ."""
    vocab_size, rng, seqs = 151_936, random.Random(14), []
    fields: list[dict[str, Any]] = [
        {"presence_penalty": 0.7, "frequency_penalty": -0.4, "repetition_penalty": 1.3, "temperature": 0.7},
        {"repetition_penalty": 0.8, "top_k": 1000},
        {"top_p": 0.9, "temperature": 1.3},
        {"min_p": 0.01},
        {"frequency_penalty": 1.1, "top_k": 5000, "top_p": 0.8, "min_p": 1e-4, "logit_bias": {7: 3.0}},
    ]
    for row, own in enumerate(fields):
        prompt, output = (random_prompt(rng, length, vocab_size) for length in (300, 200))
        seqs.append(make_seq(SamplingParams(**own), prompt, output + output[:50]))
        seqs[-1].row = 2 * row + 1
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(14)) * 2.5
    adjusted = []
    for device in (torch.device("cpu"), DEVICE):
        counts = TokenCounts(16, vocab_size, device)
        for _ in range(2):  # from scratch, and with what is there already
            left = logits.to(device, copy=True)
            temperatures = torch.tensor([seq.sampling_params.temperature for seq in seqs], device=device)
            for part in prepare_sample(seqs, counts):
                left[part.rows] = what_is_left(left[part.rows], part, temperatures[part.rows])
            adjusted.append(left.cpu())
    assert torch.equal(adjusted[0], adjusted[1])
    assert torch.equal(adjusted[2], adjusted[3])
    kept = [rows > float("-inf") for rows in (adjusted[0], adjusted[2])]
    assert (kept[0] != kept[1]).sum(-1).max() <= 2
    assert kept[0].sum(-1).tolist()[0] == vocab_size
    assert kept[0].sum(-1)[1:].max() < vocab_size // 2
    both = kept[0] & kept[1]
    torch.testing.assert_close(adjusted[2][both], adjusted[0][both], rtol=0, atol=1e-5)


# ---- the engine against itself ----


@pytest.mark.parametrize("backend", CAPTURED)
def test_graph_equals_eager(model, backend):
    prompts, completions = model.requests(PROMPT_LENGTHS, 40, seed=6)
    results = []
    for enforce_eager in (False, True):
        with model.llm(attention_backend=backend, enforce_eager=enforce_eager) as llm:
            replays = Replays(llm)
            results.append(teacher_forced(llm, prompts, completions))
            assert len(replays.sizes) == (0 if enforce_eager else 39)
    assert max_difference(*results) < TOLERANCE


@pytest.mark.parametrize("backend", CAPTURED)
def test_inside_autocast(model, backend):
    """Which is for the user's models: prompts, the capture of graphs and their replay compute as they do without."""
    prompts, completions = model.requests([1, 17, 300], 20, seed=12)
    with torch.autocast("cuda", dtype=torch.float16), model.llm(attention_backend=backend) as llm:
        replays = Replays(llm)
        actual = teacher_forced(llm, prompts, completions)
    assert replays.sizes
    assert max_difference(actual, model.expected(prompts, completions)) < TOLERANCE


@pytest.mark.parametrize("backend", CAPTURED)
def test_backends_agree_with_sdpa(model, backend):
    prompts, completions = model.requests(PROMPT_LENGTHS, 40, seed=7)
    results = []
    for name in (backend, "sdpa"):
        with model.llm(attention_backend=name) as llm:
            results.append(teacher_forced(llm, prompts, completions))
    assert max_difference(*results) < TOLERANCE


@pytest.mark.xdist_group("half of the GPU's memory")
@pytest.mark.parametrize("backend", CAPTURED)
def test_every_batch_size_around_a_bucket(model, backend):
    """Padding rows change nothing, whichever graph a batch lands in; and both ends of every graph."""
    edges = [size for bucket in batch_buckets(512) for size in (bucket, bucket + 1) if size <= 512]
    sizes = sorted({*range(1, 65), *edges})
    rng = random.Random(8)
    lengths = [rng.choice([1, 2, 5, 30, 70, 254, 255, 256]) for _ in range(max(sizes))]
    prompts, completions = model.requests(lengths, 4, seed=8)
    expected = torch.stack(model.expected(prompts, completions))
    full = [prompt + completion for prompt, completion in zip(prompts, completions)]
    starts = torch.tensor(lengths)
    options = {"max_num_seqs": 512, "num_kvcache_blocks": 950, "max_model_len": 512, "max_num_batched_tokens": 65536}
    with model.llm(attention_backend=backend, **options) as llm:
        replays = Replays(llm)
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        forced = [tokens for size in sizes for tokens in full[:size]]
        with recording(llm, len(forced), forced) as recorder:
            for size in sizes:
                # The cache would turn prompts into rests of a prompt; a fresh pool keeps the batch together.
                llm.block_manager.reset()
                outputs = llm.generate(prompts[:size], params, use_tqdm=False)
                assert [output["token_ids"] for output in outputs] == completions[:size]
            captured = {bucket for bucket, _ in llm.model_runner.graphs.graphs}
        assert set(replays.sizes) == set(sizes)
        assert captured == set(llm.model_runner.graphs.buckets)
        first = 1
        for size in sizes:
            rows = torch.arange(first, first + size)
            positions = starts[:size, None] + torch.arange(4)
            actual = recorder.logprobs.cpu()[rows[:, None], positions]
            difference = (actual - expected[:size]).abs().max().item()
            assert difference < TOLERANCE, f"batch of {size}: {difference}"
            first += size


def free_run(llm: LLM, prompts: list[list[int]], params: Any) -> tuple[list[list[int]], Any]:
    with recording(llm, len(prompts)) as recorder:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output["token_ids"] for output in outputs], recorder


@pytest.mark.parametrize("backend", CAPTURED)
def test_one_step_ahead_or_not(model, backend):
    prompts, _ = model.requests(PROMPT_LENGTHS, 0, seed=9)
    lengths = [5 + 7 * i for i in range(len(prompts))]
    by_length = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    may_end = [SamplingParams(temperature=0, max_tokens=n) for n in lengths]
    runs: dict[bool, list[Any]] = {True: [], False: []}
    wasted: dict[bool, list[int]] = {True: [], False: []}
    eos: set[int] = set()
    for depth in (0, 1):
        with model.llm(attention_backend=backend) as llm:
            llm.depth = depth
            for ends_early, params in ((False, by_length), (True, may_end)):
                # Tokens that do come up end a completion: half of the requests end after four tokens or earlier.
                eos = eos or {tokens[3] for tokens in (runs[False][0][0][::2] if ends_early else [])}
                llm.scheduler.eos = frozenset(eos)
                watch = Watch(llm)
                runs[ends_early].append(free_run(llm, prompts, params))
                wasted[ends_early].append(watch.num_wasted_rows)
                assert_idle(llm)
    assert_top_5(runs[False], prompts)
    assert_top_5(runs[True], prompts)
    assert wasted[False] == [0, 0]
    assert wasted[True][0] == 0
    assert wasted[True][1] > 0
    assert min(map(len, runs[True][0][0])) <= 4


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_however_it_is_batched(model, backend):
    """Free-running: all in one batch against one by one, in chunks, preempted, and found in the cache."""
    prompts, _ = model.requests(PROMPT_LENGTHS, 0, seed=10)
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    with model.llm(attention_backend=backend) as llm:
        base = free_run(llm, prompts, params)
        watch = Watch(llm)
        assert_top_5([base, free_run(llm, prompts, params)], prompts)
        assert watch.num_prefix_cached_tokens > 0
    with model.llm(attention_backend=backend, max_num_seqs=1) as llm:
        assert_top_5([base, free_run(llm, prompts, params)], prompts)
    with model.llm(attention_backend=backend, max_num_batched_tokens=77) as llm:
        watch = Watch(llm)
        assert_top_5([base, free_run(llm, prompts, params)], prompts)
        assert watch.num_chunks > 0
    with model.llm(attention_backend=backend, num_kvcache_blocks=6) as llm:
        watch = Watch(llm)
        llm.scheduler.completion_ratio, llm.scheduler.eos = 0.0, frozenset()
        may_end = SamplingParams(temperature=0, max_tokens=48)
        assert_top_5([base, free_run(llm, prompts, may_end)], prompts)
        assert watch.num_preemptions > 0


def test_the_next_call_is_right_after_an_exception(model):
    """Whatever was in flight has been waited for, and its rows and blocks are used again."""
    prompts, completions = model.requests(PROMPT_LENGTHS, 20, seed=11)
    expected = model.expected(prompts, completions)
    with model.llm() as llm:
        for after in (1, 2, 9):
            count = 0

            def failing(call: Any, after: int = after) -> Any:
                def wrapped(*args: Any) -> Any:
                    nonlocal count
                    count += 1
                    result = call(*args)
                    if count == after:
                        raise KeyboardInterrupt
                    return result

                return wrapped

            with replaced(llm.model_runner, "call", failing), pytest.raises(KeyboardInterrupt):
                llm.generate(prompts[::-1], greedy(30), use_tqdm=False)
            assert_idle(llm)
            assert max_difference(teacher_forced(llm, prompts, completions), expected) < TOLERANCE


# ---- sampling, memory, defaults ----


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("max_tokens", [1, 2])
def test_draws_follow_transformers_logits(checkpoints, temperature, max_tokens):
    """The first token is drawn by the prefill step, the second by the captured decode step."""
    checkpoint, prompt = checkpoints("qwen3"), [5, 6, 7, 8, 9]
    with checkpoint.llm(device="cuda", dtype="float32", max_num_seqs=256, num_kvcache_blocks=2000) as llm:
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
        texts = [output["token_ids"] for output in llm.generate([prompt] * 6000, params, use_tqdm=False)]
        # Log-probabilities as this engine computes them, so that only the draw is tested.
        vocab = list(range(checkpoint.model.config.vocab_size))
        begin = [text[0] for text in texts]
        start = prompt if max_tokens == 1 else [*prompt, max(begin, key=begin.count)]
        logprobs = torch.cat(teacher_forced(llm, [start] * len(vocab), [[token] for token in vocab]))
    drawn = [text[-1] for text in texts if max_tokens == 1 or text[0] == start[-1]]
    assert len(drawn) > 300
    observed = torch.bincount(torch.tensor(drawn), minlength=len(vocab)).double()
    expected = (logprobs / temperature).double().softmax(-1) * len(drawn)
    rare = expected < 10
    counts = torch.cat((observed[~rare], observed[rare].sum()[None]))
    means = torch.cat((expected[~rare], expected[rare].sum()[None]))
    assert stats.chisquare(counts.numpy(), means.numpy()).pvalue > 1e-3


def used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_the_cache_is_sized_from_free_memory_and_given_back(model, backend, record_property):
    """Filled to the share asked for, never beyond, with the largest batch and every graph; nothing left at the end.

    What a process keeps for good, kernels above all, is there before: another engine has loaded it.
    """
    options = {"max_num_seqs": 256, "max_model_len": 4096, "attention_backend": backend}
    rng = random.Random(12)
    prompts = [random_prompt(rng, 500, model.vocab_size) for _ in range(300)]
    lengths = [1 + i for i in range(300)]  # every batch size on the way down
    if backend == "sdpa":  # slow, and without graphs
        lengths = [1 + i // 20 for i in range(300)]
    with model.llm(num_kvcache_blocks=800, **options) as llm:
        llm.generate(prompts, [greedy(n) for n in lengths], use_tqdm=False)
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    before, total = used_bytes(), torch.cuda.mem_get_info()[1]
    share = before / total + 0.25
    with LLM(model.path, gpu_memory_utilization=share, **options) as llm:
        assert llm.config.kvcache_block_size == 256
        assert llm.model_runner.num_kvcache_blocks * llm.model_runner.block_bytes > 0.5 * 0.25 * total
        beyond = [used_bytes() - share * total]
        llm.generate(prompts, [greedy(n) for n in lengths], use_tqdm=False)
        beyond.append(used_bytes() - share * total)
        record_property("bytes beyond the share", beyond)
        assert max(beyond) < 2**27
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    assert used_bytes() < before + 2**26


def test_default_choices(model):
    with LLM(model.path, max_model_len=1024, gpu_memory_utilization=0.5) as llm:
        assert llm.config.device.type == "cuda"
        assert llm.config.dtype == torch.bfloat16
        assert llm.config.attention_backend == BACKENDS_HERE[0]
        assert llm.config.attention_backend != "sdpa"
        assert llm.model_runner.graphs is not None
        assert llm.model_runner.model.lm_head.weight.device.type == "cuda"
        (output,) = llm.generate("Hello", greedy(4), use_tqdm=False)
        assert len(output["token_ids"]) == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", CAPTURED)
def test_any_thread_may_use_an_engine_on_any_gpu(model, backend):
    """Two engines on two GPUs, by turns from one thread and from a new one, whose current GPU is the first."""
    prompts, completions = model.requests(PROMPT_LENGTHS[:8], 24, seed=3)
    expected = model.expected(prompts, completions)
    kwargs = {"attention_backend": backend, "dtype": "bfloat16"}
    with model.llm(device="cuda:1", **kwargs) as second, model.llm(device="cuda:0", **kwargs) as first:
        assert torch.cuda.current_device() == 0
        found: list[list[torch.Tensor]] = []
        replays = Replays(first), Replays(second)

        def use() -> None:
            found.extend(teacher_forced(llm, prompts, completions) for llm in (second, first, second))
            assert torch.cuda.current_device() == 0

        use()
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert len(found) == 6
        for logprobs in found:
            assert max_difference(logprobs, expected) < TOLERANCE
        assert second.model_runner.state.last_token.device.index == 1
        assert all(of_one.sizes for of_one in replays)


def test_a_buffer_made_in_inference_mode_serves_outside_of_it():
    with torch.inference_mode():
        buffer, event = TokenBuffers(4).make()
    tokens = torch.arange(3, device=DEVICE)
    copied = buffer[:3].copy_(tokens, non_blocking=True)
    event.record()
    event.synchronize()
    assert copied.is_pinned()
    assert copied.tolist() == [0, 1, 2]
