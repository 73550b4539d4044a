"""What test_deterministic.py and test_gpu_deterministic.py share: one request, run in every company it may find.

As a program it does so in a process of its own, and prints the bits of what came out.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import HANGING_S, Watch, assert_idle, random_prompt

from nanovllm import LLM, Logprob, SamplingParams

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

    def neighbours(
        self, rng: random.Random, count: int, min_tokens: int = 1, ignore_eos: bool = True
    ) -> list[tuple[list[int], SamplingParams]]:
        """Prompts of any length that are greedy, sampled, filtered or ask for log probabilities, as it comes.

        Half of the times some also ask for what depends on the tokens before, which leaves nothing in flight.
        """
        found = []
        reads = rng.random() < 0.5
        for _ in range(count):
            prompt = random_prompt(rng, rng.randint(1, self.max_neighbour_len), self.vocab_size)
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.5]),
                top_p=rng.choice([1.0, 1.0, 0.9]),
                top_k=rng.choice([0, 0, 20]),
                logprobs=rng.choice([None, None, 0, 6]),
                prompt_logprobs=rng.choice([None, None, None, 2]),
                max_tokens=rng.randint(min_tokens, 70),
                ignore_eos=ignore_eos,
                seed=rng.randrange(2**31),
                min_p=rng.choice([0.0, 0.0, 0.05]),
                logit_bias=rng.choice([None, None, {3: 2.0}]),
            )
            if reads and rng.random() < 0.3:
                params.frequency_penalty, params.repetition_penalty = 0.5, 1.2
                params.bad_words = ["ab"]
                params.logits_processors = rng.choice([None, [lambda ids, logits: logits * 0.9]])
            found.append((prompt, params))
        return found

    def among(
        self,
        llm: LLM,
        params: SamplingParams,
        rng: random.Random,
        count: int,
        place: int | None = None,
        min_tokens: int = 1,
    ) -> tuple[Any, Watch]:
        """The output of the prompt with `count` neighbours in one call; by default at a random place."""
        requests = self.neighbours(rng, count, min_tokens, params.ignore_eos)
        place = rng.randint(0, count) if place is None else place
        requests.insert(place, (self.prompt, params))
        watch = Watch(llm)
        prompts, all_params = zip(*requests)
        outputs = llm.generate(list(prompts), list(all_params), use_tqdm=False)
        assert_idle(llm)
        return outputs[place], watch

    def preempted(self, llm: LLM, params: SamplingParams, rng: random.Random, count: int) -> tuple[Any, Watch]:
        """As `among` in an engine whose pool is too small; the prompt comes last, so it is preempted first."""
        params = expecting_early_ends(llm, params)
        neighbours = [
            (random_prompt(rng, self.max_neighbour_len, self.vocab_size), SamplingParams(temperature=0, max_tokens=90))
            for _ in range(count)
        ]
        requests = [*neighbours, (self.prompt, params)]
        watch = Watch(llm)
        prompts, all_params = zip(*requests)
        output = llm.generate(list(prompts), list(all_params), use_tqdm=False)[-1]
        assert_idle(llm)
        return output, watch


def expecting_early_ends(llm: LLM, params: SamplingParams) -> SamplingParams:
    """`params` with which requests in `llm` may end early as far as it knows, and never do: so its pool runs out."""
    llm.scheduler.eos, llm.scheduler.completion_ratio = frozenset(), 0.0
    return replace(params, ignore_eos=False)


# ---- what both test, in engines and with numbers of their own ----


def check_preemption(
    company: Company, params: SamplingParams, expected: dict[str, Any], depth: int, **options: Any
) -> None:
    """`options` make a pool that is too small."""
    with company.make(max_num_seqs=8, **options) as llm:
        llm.depth = depth
        output, watch = company.preempted(llm, params, random.Random(4), 3)
        assert output.metrics.num_preemptions > 0
        # It had decoded before: what decoding stored is now computed as a prompt.
        needle = max(watch.seqs)
        assert any(
            total > len(company.prompt) + 1 and scheduled > 1
            for step in watch.steps
            for seq_id, scheduled, total in zip(step.seq_ids, step.num_scheduled, step.num_tokens)
            if seq_id == needle
        ), "nothing that decoding stored was computed as a prompt"
        assert_same(output, expected, "preempted")


def check_prefix_hits(company: Company, expected: dict[str, Any], of_prompt: int, of_text: int) -> None:
    """On blocks that a prompt filled, and on blocks that decoding filled; so many tokens are found in them.

    expected: of PARAMS["greedy"].
    """
    rng = random.Random(5)
    text = company.prompt + expected["token_ids"][:50]
    assert len(company.prompt) <= of_text < len(text)
    longer = Company(company.make, company.vocab_size, text, company.max_neighbour_len)
    expected_longer = longer.alone(PARAMS["sampled"])
    with company.make() as llm:
        for cached in (0, of_prompt):
            output, _ = company.among(llm, PARAMS["greedy"], rng, 5)
            assert output.metrics.num_cached_prompt_tokens == cached
            assert_same(output, expected, f"{cached} tokens cached")
        output, _ = longer.among(llm, PARAMS["sampled"], rng, 5)
        assert output.metrics.num_cached_prompt_tokens == of_text
        assert_same(output, expected_longer, "its text cached")


def check_other_settings(company: Company, expected: dict[str, Any], **options: Any) -> None:
    """expected: of PARAMS["greedy"]."""
    for depth in (0, 1):
        with company.make(**options) as llm:
            llm.depth = depth
            output, _ = company.among(llm, PARAMS["greedy"], random.Random(7), 6)
            assert_same(output, expected, f"{options}, depth {depth}")


def check_everything_at_once(
    company: Company, params: SamplingParams, expected: dict[str, Any], rng: random.Random, count: int, **options: Any
) -> None:
    """Random traffic over several calls, of up to `count` neighbours: chunks, hits and preemptions.

    The seeds and options of the callers are chosen such that each of these happens, on any machine: whom the scheduler
    takes depends on the numbers of tokens alone, since nothing ends before its length.
    """
    with company.make(**options) as llm:
        llm.depth = rng.randint(0, 1)
        params, watch = expecting_early_ends(llm, params), Watch(llm)
        for call in range(3):
            output, _ = company.among(llm, params, rng, rng.randint(count // 2, count))
            assert_same(output, expected, f"{options}, call {call}")
        assert watch.num_chunks > 0
        assert watch.num_prefix_cached_tokens > 0
        assert watch.num_preemptions > 0


# ---- processes ----


def bits(answer: Any) -> Any:
    """Every number of a `result` to its last bit, and nothing that JSON cannot hold."""
    if isinstance(answer, float):
        return answer.hex()
    if isinstance(answer, Logprob):
        return [answer.logprob.hex(), answer.rank]
    if isinstance(answer, dict):
        return {str(key): bits(value) for key, value in answer.items()}
    return [bits(value) for value in answer] if isinstance(answer, list) else answer


def check_processes(company: Company, expected: dict[str, dict[str, Any]], **options: Any) -> None:
    """Two fresh processes, in which the prompt is alone and among others, find the bits that this one did.

    expected: answers by their names in PARAMS; options: of the engines there.
    """
    programs = []
    for count in (0, 12):
        asked = company.vocab_size, company.prompt, company.max_neighbour_len, count, list(expected), options
        command = [sys.executable, __file__, json.dumps(asked)]
        # Strings hash otherwise in each, and so do blocks; modules come from where this process has them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(count + 1)}
        programs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        printed = [program.communicate(timeout=HANGING_S)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert [program.returncode for program in programs] == [0, 0]
    pids, widest, found = zip(*(json.loads(lines.splitlines()[-1]) for lines in printed))
    assert len({os.getpid(), *pids}) == 3
    assert widest[0] == 1
    assert widest[1] > 1
    for name, answer in expected.items():
        assert answer["logprobs"], "there is nothing but tokens to compare"
        for where, there in zip(("alone", "among others"), found):
            assert there[name] == bits(answer), f"{name}, {where} in another process"


def main() -> None:
    """One of `check_processes`' programs."""
    torch.set_num_threads(1)  # as in conftest.py
    vocab_size, prompt, max_neighbour_len, count, names, options = json.loads(sys.argv[1])
    company = Company(lambda: LLM(deterministic=True, **options), vocab_size, prompt, max_neighbour_len)
    found, rng, widest = {}, random.Random(10), 0
    with company.make() as llm:
        for name in names:
            output, watch = company.among(llm, PARAMS[name], rng, count)
            widest = max(widest, *(len(step.seq_ids) for step in watch.steps))
            found[name] = bits(result(output))
            llm.block_manager.reset()
    print(json.dumps([os.getpid(), widest, found]))


# ---- parts ----


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


if __name__ == "__main__":
    main()
