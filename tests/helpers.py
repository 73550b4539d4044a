"""What the tests share: tiny random checkpoints, transformers as the reference, and tools to watch an engine."""

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import random
import resource
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from simulator import check_blocks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.engine import input_processor
from nanovllm.engine.sequence import Sequence

VOCAB_SIZE = 293  # a prime; more than the tokenizer's 257
EOS = 256
HANGING_S = 600.0  # what takes as long will never end: no bound on speed. pytest's own, in pyproject.toml, is above it
MIN_MARGIN = 2e-4  # between the two largest logits; below it float32 rounding may decide

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

# name: (family, what differs from COMMON). The first three are the main ones; the others are odd in some way.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "qwen3-1kv-untied": ("Qwen3", {"head_dim": 20, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen3-attention-bias": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 32, "rope_scaling": YARN_ROPE, "tie_word_embeddings": True}),
    "qwen2-1kv-tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-mha": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-biases": (
        "Llama",
        {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama-6q3kv": (
        "Llama",
        {"head_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "llama-llama3": ("Llama", {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-yarn": (
        "Llama",
        {
            "head_dim": 32,
            "rope_scaling": {**YARN_ROPE, "beta_fast": 8.0, "beta_slow": 2.0},
            "tie_word_embeddings": False,
        },
    ),
    "llama-yarn-mscale": (
        "Llama",
        {
            "rope_scaling": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
            "tie_word_embeddings": False,
        },
    ),
    "llama-yarn-attention-factor": (
        "Llama",
        {"rope_scaling": {**YARN_ROPE, "attention_factor": 1.3}, "tie_word_embeddings": False},
    ),
}
FAMILIES = ("qwen3", "qwen2", "llama")


# ---- checkpoints ----


def randomize(model: nn.Module, seed: int) -> None:
    """Weights whose logits have a spread of a few units, so that greedy text varies and its margins are healthy.

    Norms and biases get random values too, otherwise forgetting one would go unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.dim() == 1:
            noise = 0.4 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif "embed_tokens" in name or "lm_head" in name:
            noise = noise * 0.5
        else:
            noise = noise * 2.0 * parameter.shape[1] ** -0.5
        parameter.data.copy_(noise)


def make_config(family: str, **overrides: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **overrides})
    config.architectures = [f"{family}ForCausalLM"]
    return config


def make_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A randomly initialised transformers model in float32."""
    model = getattr(transformers, f"{family}ForCausalLM")(make_config(family, **overrides)).eval()
    randomize(model, seed)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig()  # no EOS here: the reference never stops early
    return model


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and one to end with (256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    assert len(fast) == EOS + 1
    assert fast.eos_token_id == EOS
    return fast


def save_checkpoint(path: Path, model: Any, **save_kwargs: Any) -> Path:
    model.save_pretrained(path, **save_kwargs)
    make_tokenizer().save_pretrained(path)
    return path


def copy_checkpoint(source: Path, target: Path, **config_changes: Any) -> Path:
    """A checkpoint like `source`, sharing its files, with keys of config.json changed (None removes one)."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    edit_json(source / "config.json", target / "config.json", **config_changes)
    return target


def copy_with_eos(checkpoint: "Checkpoint", target: Path, eos: list[int]) -> "Checkpoint":
    """The same model, whose generation_config.json names the tokens in `eos` as those that end a completion."""
    copy_checkpoint(checkpoint.path, target)
    (target / "generation_config.json").unlink()
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    copy = Checkpoint(target, checkpoint.model)
    copy._answers = checkpoint._answers
    return copy


def edit_json(source: Path, target: Path, **changes: Any) -> None:
    content = {**json.loads(source.read_text()), **changes}
    target.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


class Checkpoint:
    """A tiny checkpoint on disk, its transformers model, and what that model answers."""

    def __init__(self, path: Path, model: Any):
        self.path = path
        self.model = model
        self._answers: dict[tuple[tuple[int, ...], int], tuple[list[int], float]] = {}

    def llm(self, **kwargs: Any) -> LLM:
        """An engine on CPU with small blocks and a pool that is enough for 64 sequences of 192 tokens."""
        defaults = {
            "device": "cpu",
            "max_model_len": 256,
            "kvcache_block_size": 16,
            "num_kvcache_blocks": 800,
            "max_num_seqs": 64,
        }
        return LLM(str(self.path), **{**defaults, **kwargs})

    def answers(self, prompts: list[list[int]], num_tokens: int) -> list[tuple[list[int], float]]:
        """For each prompt transformers' next `num_tokens` greedy tokens (EOS is no end) and their smallest margin."""
        missing = [p for p in prompts if (tuple(p), num_tokens) not in self._answers]
        if missing:
            for prompt, answer in zip(missing, greedy_reference(self.model, missing, num_tokens), strict=True):
                self._answers[tuple(prompt), num_tokens] = answer
        return [self._answers[tuple(p), num_tokens] for p in prompts]


@torch.inference_mode()
def greedy_reference(model: Any, prompts: Iterable[list[int]], num_tokens: int) -> list[tuple[list[int], float]]:
    """transformers' `generate` for a batch of prompts, padded on the left where their lengths differ.

    The mask is always given: without one `generate` hides every prompt token that equals the padding id.
    """
    prompts = list(prompts)
    longest = max(map(len, prompts), default=0)
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    config = transformers.GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    out = model.generate(input_ids, attention_mask=mask, generation_config=config)
    assert out.shape == (len(prompts), longest + num_tokens)
    mask = torch.cat((mask, torch.ones(len(prompts), num_tokens, dtype=torch.int64)), 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(out, attention_mask=mask, position_ids=positions).logits[:, longest - 1 : -1]
    top = logits.topk(2, -1).values
    margins = (top[..., 0] - top[..., 1]).amin(-1)
    return list(zip(out[:, longest:].tolist(), margins.tolist()))


# ---- prompts ----


def random_prompt(rng: random.Random, length: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(length)]


def many_prompts(count: int = 64, seed: int = 0) -> list[list[int]]:
    """`count` random prompts of 1 to 80 tokens; every token of the vocabulary may occur."""
    rng = random.Random(seed)
    lengths = [80, 1, 17, 2, 32, 15, 33, 16] + [rng.randrange(1, 81) for _ in range(count)]
    return [random_prompt(rng, length) for length in lengths[:count]]


def greedy(max_tokens: int = 64, ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)


def everything_at_once() -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests that use every sampling parameter between them, each its own seed.

    Those whose draws read the tokens before them end first: as long as one is there no step runs ahead.
    """
    letters = make_tokenizer().encode("ab cdé")
    text: dict[str, Any] = {"allowed_token_ids": letters}
    penalties = {"presence_penalty": 0.6, "frequency_penalty": -0.3, "repetition_penalty": 1.3}

    def last_is_unlikely(output_ids, logits):
        return logits.index_fill(0, torch.tensor(output_ids[-1:], dtype=torch.int64, device=logits.device), -5.0)

    fields: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 5, "prompt_logprobs": 3},
        {"temperature": 0, "min_tokens": 5, "stop_token_ids": list(range(0, VOCAB_SIZE, 4))},
        {"top_k": 5},
        {"top_p": 0.8, "temperature": 1.4},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7, "logprobs": 2},
        {"logit_bias": {65: 5.0, 70: -100.0}},
        {"n": 2, "temperature": 0.9},
        {"n": 2, "logprobs": 0, "prompt_logprobs": 1, "top_k": 30},
        {"detokenize": False},
        {"logit_bias": {EOS: 4.0}},
        {"logit_bias": {EOS: 4.0}, "ignore_eos": True, "skip_special_tokens": False},
        {"stop": ["ab", "zz"], **text},
        {"stop": ["é", "cd"], "include_stop_str_in_output": True, "min_tokens": 12, **text},
        {"stop": "a", "min_tokens": 16, **text},
        {"stop_token_ids": letters[:1], "min_tokens": 14, **text},
        {"stop": "c", "n": 2, "min_tokens": 10, **text},
        {"max_tokens": 6, **penalties},
        {"max_tokens": 6, "temperature": 0, "repetition_penalty": 1.5, "logprobs": 1},
        {"max_tokens": 6, "bad_words": ["a", "b c"], **text},
        {"max_tokens": 6, "logits_processors": [last_is_unlikely], "top_p": 0.9},
        {"max_tokens": 6, "top_k": 40, "top_p": 0.95, "min_p": 0.01, **penalties},
    ]
    if importlib.util.find_spec("llguidance") is not None:
        fields.append({"max_tokens": 6, "structured_outputs": StructuredOutputsParams(regex="[a-z]{2,5}!")})
    params = [SamplingParams(**{"seed": i, "max_tokens": 30, **own}) for i, own in enumerate(fields)]
    return many_prompts(len(params), seed=9), params


def assert_same_outputs(actual: list[Any], expected: list[Any], tolerance: float) -> None:
    """Tokens, texts and ends are equal, log probabilities within `tolerance`."""

    def numbers(entries: list[Any] | None) -> list[list[float]]:  # the token's own first; equals may change places
        lists = [[entry.logprob for entry in found.values()] for found in entries or [] if found is not None]
        return [[values[0], *sorted(values[1:])] for values in lists]

    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        pairs = [(one.prompt_logprobs, other.prompt_logprobs)]
        for a, b in zip(one.outputs, other.outputs, strict=True):
            found, wanted = ((c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in (a, b))
            assert found == wanted, f"request {i}"
            pairs.append((a.logprobs, b.logprobs))
        for found, wanted in pairs:
            assert (found is None) == (wanted is None), f"request {i}"
            for x, y in zip(numbers(found), numbers(wanted), strict=True):
                torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=0, atol=tolerance)


def assert_matches(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    outputs: list[Any],
    num_tokens: int | list[int] = 64,
    eos: Iterable[int] = (),
) -> None:
    """Every output equals transformers' greedy tokens, cut at the first of `eos` and at `num_tokens`.

    Outputs may be token lists or engine outputs. Prompts where transformers was undecided are skipped; most stay.
    """
    eos = frozenset(eos)
    lengths = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else num_tokens
    assert len(outputs) == len(prompts) == len(lengths)
    kept = 0
    answers = checkpoint.answers(prompts, max(64, *lengths))
    for i, (prompt, output, length, (expected, margin)) in enumerate(zip(prompts, outputs, lengths, answers)):
        tokens = output if isinstance(output, list) else output["token_ids"]
        if margin < MIN_MARGIN:
            continue
        kept += 1
        expected = expected[:length]
        end = next((n for n, token in enumerate(expected) if token in eos), len(expected) - 1)
        assert tokens == expected[: end + 1], f"prompt {i} of {len(prompt)} tokens"
        if not isinstance(output, list):
            assert output.outputs[0].finish_reason == ("stop" if expected[end] in eos else "length")
            assert output.prompt_token_ids == prompt
    assert kept >= 0.9 * len(prompts) - 1, (
        f"transformers was undecided for {len(prompts) - kept} of {len(prompts)} prompts"
    )


# ---- watching an engine ----


@dataclasses.dataclass
class Step:
    """What `schedule` returned, copied before the step runs."""

    is_prefill: bool
    seq_ids: list[int]
    num_scheduled: list[int]
    num_cached: list[int]
    num_tokens: list[int]
    prefix_cached: dict[int, int]  # of sequences admitted in this step: tokens found in the cache

    @property
    def total(self) -> int:
        return sum(self.num_scheduled)


class Watch:
    """Records every step of an engine from now on; optionally checks the invariants of blocks after each."""

    def __init__(self, llm: LLM, check: bool = True):
        self.llm = llm
        self.steps: list[Step] = []
        self.seqs: dict[int, Sequence] = {}
        self.preemptions_before = llm.scheduler.num_preemptions
        self.num_wasted_rows = 0  # launched before their sequence was known to have ended
        scheduler, schedule = llm.scheduler, llm.scheduler.schedule

        def watched() -> tuple[list[Sequence], bool]:
            waiting = {seq.seq_id for seq in scheduler.waiting}
            seqs, is_prefill = schedule()
            self.seqs.update((seq.seq_id, seq) for seq in seqs)
            admitted = [seq for seq in seqs if seq.seq_id in waiting]
            self.steps.append(
                Step(
                    is_prefill,
                    [seq.seq_id for seq in seqs],
                    [seq.num_scheduled_tokens for seq in seqs],
                    [seq.num_cached_tokens for seq in seqs],
                    [seq.num_tokens for seq in seqs],
                    {seq.seq_id: seq.num_prefix_cached_tokens for seq in admitted},
                )
            )
            if check:
                check_blocks(scheduler.block_manager, [*scheduler.running, *scheduler.waiting])
                assert len(scheduler.running) <= scheduler.max_num_seqs
                assert self.steps[-1].total <= scheduler.max_num_batched_tokens
            return seqs, is_prefill

        postprocess = scheduler.postprocess

        def watched_postprocess(seqs: list[Sequence | None], token_ids: list[int]) -> list[Sequence]:
            self.num_wasted_rows += sum(seq is not None and seq.is_finished for seq in seqs)
            return postprocess(seqs, token_ids)

        scheduler.schedule, scheduler.postprocess = watched, watched_postprocess

    @property
    def num_preemptions(self) -> int:
        return self.llm.scheduler.num_preemptions - self.preemptions_before

    @property
    def num_chunks(self) -> int:
        """Rows that computed a part of their prompt and left a rest."""
        return sum(
            scheduled < total - cached
            for step in self.steps
            for scheduled, total, cached in zip(step.num_scheduled, step.num_tokens, step.num_cached)
        )

    @property
    def num_prefix_cached_tokens(self) -> int:
        return sum(sum(step.prefix_cached.values()) for step in self.steps)


def assert_idle(llm: LLM) -> None:
    """Nothing is queued or running, and every block is free."""
    assert llm.is_finished()
    assert llm.scheduler.is_finished()
    assert llm.scheduler.block_manager.num_free_blocks == llm.scheduler.block_manager.num_blocks
    check_blocks(llm.scheduler.block_manager, [])


@contextmanager
def replaced(obj: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """Within the block `obj.name` is `make(what it was)`."""
    had, old = name in vars(obj), getattr(obj, name)
    setattr(obj, name, make(old))
    try:
        yield
    finally:
        if had:
            setattr(obj, name, old)
        else:
            delattr(obj, name)


def child_pids() -> set[int]:
    """The children of this process, whoever started them."""
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(map(int, file.read_text().split()))
    return found


def resident_bytes() -> int:
    """Of this process. What malloc keeps for later is left out: after many tests that is any amount."""
    with contextlib.suppress(AttributeError, OSError):  # another libc than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def resident_share(tensor: torch.Tensor) -> float:
    """Of the pages of a tensor in RAM those that are there, since somebody has touched them."""
    page = resource.getpagesize()
    begin = tensor.data_ptr() // page * page
    num_pages = -(-(tensor.data_ptr() + tensor.nbytes - begin) // page)
    pages = (ctypes.c_ubyte * num_pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(num_pages * page), pages) == 0
    return sum(here & 1 for here in pages) / num_pages


def wait_until(condition: Callable[[], Any]) -> None:
    """For what another thread or process is about to do, and cannot tell."""
    deadline = time.monotonic() + HANGING_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


# ---- teacher forcing ----


class Recorder(nn.Module):
    """Stands in for the sampler: records log-probabilities at every position and, if told to, forces the tokens.

    It finds a row's request by its seed, which `install` makes 1, 2, 3, ... in the order of the requests; padding rows
    have seed 0. All state is in preallocated tensors on the device, so that it works inside CUDA graphs.
    """

    def __init__(self, llm: LLM, num_requests: int, forced: list[list[int]] | None = None):
        super().__init__()
        runner = llm.model_runner
        device, max_len = runner.device, llm.config.max_model_len + 2
        self.inner = runner.sampler
        self.forced = torch.zeros(num_requests + 1, max_len, dtype=torch.int64, device=device)
        for i, tokens in enumerate(forced or [], 1):
            self.forced[i, : len(tokens)] = torch.tensor(tokens, device=device)
        self.forcing = forced is not None
        self.logprobs = torch.full((num_requests + 1, max_len), float("nan"), device=device)
        self.top_ids = torch.full((num_requests + 1, max_len, 5), -1, dtype=torch.int64, device=device)
        self.num_records = torch.zeros(num_requests + 1, max_len, dtype=torch.int64, device=device)

    def forward(self, logits, temperatures, seeds, positions, adjustments=()):
        assert not adjustments
        logprobs = logits.float().log_softmax(-1)
        if self.forcing:
            tokens = self.forced[seeds, positions]
        else:
            tokens = self.inner(logits, temperatures, seeds, positions)
        self.logprobs[seeds, positions] = logprobs.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
        self.top_ids[seeds, positions] = logprobs.topk(5, -1).indices
        self.num_records[seeds, positions] += 1
        return tokens


class _Counter:
    """Gives the seeds 1, 2, 3, ..."""

    def __init__(self):
        self.count = 0

    def getrandbits(self, _: int) -> int:
        self.count += 1
        return self.count


@contextmanager
def recording(llm: LLM, num_requests: int, forced: list[list[int]] | None = None) -> Any:
    """Within the block the next `num_requests` requests are recorded (see Recorder). Graphs are captured anew."""
    runner = llm.model_runner
    recorder = Recorder(llm, num_requests, forced)
    runner.sampler = recorder
    if runner.graphs is not None:
        runner.graphs.clear()
    try:
        with (
            replaced(llm.input_processor, "_random", lambda _: _Counter()),
            replaced(input_processor, "fold_seed", lambda _: lambda seed, index: seed),
        ):
            yield recorder
    finally:
        runner.sampler = recorder.inner
        if runner.graphs is not None:
            runner.graphs.clear()


def teacher_forced(llm: LLM, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
    """Log-probability of every token of `completions` as the engine computes it, decoding step by step in one call."""
    full = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    params = [SamplingParams(temperature=0.0, max_tokens=len(c), ignore_eos=True) for c in completions]
    with recording(llm, len(prompts), full) as recorder:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == completions
    logprobs = recorder.logprobs.cpu()
    return [logprobs[i, len(p) : len(f)] for i, (p, f) in enumerate(zip(prompts, full), 1)]


@torch.inference_mode()
def reference_logprobs(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
    """The same from one transformers forward a request."""
    result = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1].float()
        result.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu())
    return result


def assert_top_5(runs: list[tuple[list[list[int]], Recorder]], prompts: list[list[int]]) -> int:
    """The top-5 rule for two free runs: where answers first differ, each one's token is in the other's top five.

    Returns how many answers differ.
    """
    (first, first_recorder), (second, second_recorder) = runs
    top_ids = [first_recorder.top_ids.cpu(), second_recorder.top_ids.cpu()]
    num_different = 0
    for i, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True), 1):
        n = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if n is None:
            assert len(a) == len(b)
            continue
        num_different += 1
        position = len(prompt) + n
        assert a[n] in top_ids[1][i, position], f"request {i}, token {n}"
        assert b[n] in top_ids[0][i, position], f"request {i}, token {n}"
    return num_different


def max_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert all(torch.isfinite(x).all() and torch.isfinite(y).all() for x, y in zip(a, b, strict=True))
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
