"""What test_deterministic.py and test_gpu_deterministic.py share: one request, run in every company it may find."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import Watch, assert_idle, random_prompt

from nanovllm import LLM, SamplingParams

PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=4),
    "sampled": SamplingParams(temperature=0.9, seed=11, max_tokens=60, ignore_eos=True, logprobs=4),
    "filtered": SamplingParams(
        temperature=1.1, seed=12, top_p=0.8, top_k=40, min_p=0.01, frequency_penalty=0.3, repetition_penalty=1.1,
        max_tokens=60, ignore_eos=True, logprobs=0,
    ),
    "plain": SamplingParams(temperature=1.0, seed=13, max_tokens=60, ignore_eos=True),
}  # fmt: skip


def result(output: Any) -> dict[str, Any]:
    """All that must be the same, to the last bit: the tokens and every number."""
    completion = output.outputs[0]
    return {
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "prompt_logprobs": output.prompt_logprobs,
        "cumulative_logprob": completion.cumulative_logprob,
    }


def assert_same(actual: Any, expected: dict[str, Any], where: str = "") -> None:
    """Says what differs first: a log probability with the token still the same points at arithmetic."""
    actual = result(actual)
    for i, (a, b) in enumerate(zip(actual["logprobs"] or [], expected["logprobs"] or [])):
        assert a == b, f"{where}: log probabilities of completion token {i}"
    for i, (a, b) in enumerate(zip(actual["token_ids"], expected["token_ids"], strict=True)):
        assert a == b, f"{where}: completion token {i}"
    assert actual == expected, where


@dataclass
class Company:
    """A maker of engines, a prompt, and random requests to run beside it."""

    make: Callable[..., LLM]
    vocab_size: int
    prompt: list[int]
    max_neighbour_len: int

    def alone(self, params: SamplingParams, **options: Any) -> dict[str, Any]:
        """In an engine of its own, with nothing cached."""
        with self.make(**options) as llm:
            watch = Watch(llm)
            (output,) = llm.generate([self.prompt], params, use_tqdm=False)
        assert all(len(step.seq_ids) == 1 for step in watch.steps if step.seq_ids)
        assert output.metrics.num_cached_prompt_tokens == output.metrics.num_preemptions == 0
        return result(output)

    def neighbours(self, rng: random.Random, count: int, max_tokens: int = 70) -> list[tuple[list[int], Any]]:
        """Prompts of any length that are greedy, sampled, filtered or ask for log probabilities, as it comes."""
        found = []
        for _ in range(count):
            prompt = random_prompt(rng, rng.randint(1, self.max_neighbour_len), self.vocab_size)
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.5]),
                top_p=rng.choice([1.0, 1.0, 0.9]),
                top_k=rng.choice([0, 0, 20]),
                logprobs=rng.choice([None, None, 0, 6]),
                prompt_logprobs=rng.choice([None, None, None, 2]),
                max_tokens=rng.randint(1, max_tokens),
                ignore_eos=True,
                seed=rng.randrange(2**31),
            )
            found.append((prompt, params))
        return found

    def among(
        self, llm: LLM, params: SamplingParams, rng: random.Random, count: int, place: int | None = None
    ) -> tuple[Any, Watch]:
        """The output of the prompt with `count` neighbours in one call; by default at a random place."""
        requests = self.neighbours(rng, count)
        place = rng.randint(0, count) if place is None else place
        requests.insert(place, (self.prompt, params))
        watch = Watch(llm)
        prompts, all_params = zip(*requests)
        outputs = llm.generate(list(prompts), list(all_params), use_tqdm=False)
        assert_idle(llm)
        return outputs[place], watch

    def preempted(self, llm: LLM, params: SamplingParams, rng: random.Random, count: int) -> tuple[Any, Watch]:
        """As `among` in an engine whose pool is too small; the prompt comes last, so it is preempted first."""
        llm.scheduler.eos = frozenset()
        llm.scheduler.completion_ratio = 0.0  # expect early ends that never come
        neighbours = [
            (random_prompt(rng, self.max_neighbour_len, self.vocab_size), SamplingParams(temperature=0, max_tokens=90))
            for _ in range(count)
        ]
        fields = {name: getattr(params, name) for name in ("temperature", "seed", "max_tokens", "logprobs")}
        requests = [*neighbours, (self.prompt, SamplingParams(**fields))]
        watch = Watch(llm)
        prompts, all_params = zip(*requests)
        output = llm.generate(list(prompts), list(all_params), use_tqdm=False)[-1]
        assert_idle(llm)
        return output, watch


def scored(llm: LLM, prompt: list[int], completion: list[int]) -> list[float]:
    """Log probabilities of `completion` after `prompt`, from one prompt of both: no step decodes."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    (output,) = llm.generate([prompt + completion], params, use_tqdm=False)
    found = output.prompt_logprobs[len(prompt) :]
    return [entry[token].logprob for entry, token in zip(found, completion, strict=True)]


def decoded(expected: dict[str, Any]) -> list[float]:
    return [entry[token].logprob for entry, token in zip(expected["logprobs"], expected["token_ids"], strict=True)]


def rows_differ(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, sizes: list[int]) -> list[int]:
    """The batch sizes of `sizes` in which some row of x comes out otherwise than in the whole of x."""
    whole = function(x.clone())
    return [
        size
        for size in sizes
        for start in (0, (len(x) - size) // 2, len(x) - size)
        if not torch.equal(function(x[start : start + size].clone()), whole[start : start + size])
    ]
