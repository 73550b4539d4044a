"""Two ranks: what goes wrong in one request concerns no other, and threads share them.

On CPUs, and with `-m gpu` on two CUDA devices.
"""

import copy
import math
import random
import threading
from typing import Any

import broken_rank
import pytest
import torch
from broken_rank import BREAKS, PROMPT_LEN
from helpers import (
    HANGING_S,
    Checkpoint,
    Watch,
    assert_idle,
    assert_matches,
    greedy,
    many_prompts,
    random_prompt,
    save_checkpoint,
)
from test_tensor_parallel import is_running, worker_pids
from test_tensor_parallel import nothing_is_left_behind as nothing_is_left_behind  # the fixture

from nanovllm import LLM, SamplingParams

CUDA = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
pytestmark = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])

BAD = (100, 200)  # tokens whose embeddings are of rank 0 and of rank 1


def make(checkpoint: Checkpoint, device: str, **options: Any) -> LLM:
    return checkpoint.llm(**{"tensor_parallel_size": 2, "device": device, "dtype": "float32", **options})


def without_bad(prompt: list[int]) -> list[int]:
    return [token if token not in BAD else 1 for token in prompt]


def test_nan_logits_on_every_rank(checkpoints, tmp_path, device):
    """As a broken embedding makes them, which reaches both ranks' caches. Requests that share its blocks start over."""
    checkpoint = checkpoints("llama")
    model = copy.deepcopy(checkpoint.model)
    with torch.no_grad():
        model.model.embed_tokens.weight[list(BAD)] = math.nan
    broken = Checkpoint(save_checkpoint(tmp_path / "broken", model), checkpoint.model)
    rng = random.Random(4)
    prefix = without_bad(random_prompt(rng, 40))
    healthy = [[*prefix, i, i + 1] for i in range(3)] + [without_bad(prompt) for prompt in many_prompts(5, seed=3)]
    answers = checkpoint.answers(healthy, 64)
    healthy = [prompt for prompt, (tokens, _) in zip(healthy, answers) if not {*BAD} & {*tokens[:20]}]
    assert sum(prompt[:40] == prefix for prompt in healthy) > 1
    assert len(healthy) > 3
    with make(broken, device, max_num_batched_tokens=60) as llm:
        pids = worker_pids(llm)
        for depth, plain, bad in ((0, True, BAD[0]), (1, True, BAD[1]), (0, False, BAD[1]), (1, False, BAD[0])):
            llm.depth = depth
            llm.reset_prefix_cache()
            watch = Watch(llm)
            params = greedy(20) if plain else SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2)
            # In two chunks: the prefix is there for others a step before the token that breaks the request.
            prompts = [[*prefix, *[7] * 30, bad, 3], *healthy, [bad]]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for output in (outputs.pop(0), outputs.pop()):
                assert (output.outputs[0].finish_reason, output["token_ids"]) == ("error", [])
            assert_matches(checkpoint, healthy, outputs, 20)
            assert watch.num_prefix_cached_tokens > 0
            assert watch.num_preemptions > 0
            assert_idle(llm)
        assert worker_pids(llm) == pids
        assert all(map(is_running, pids))


def test_logits_that_break_on_one_rank_or_on_both(checkpoints, monkeypatch, device):
    """NaN or infinity in a rank's share of the vocabulary, or no finite maximum in either."""
    checkpoint = checkpoints("qwen3")
    broken_rank.install(monkeypatch.setattr)
    workers = broken_rank.start_workers_with_it(monkeypatch.setattr)
    prompts = [random_prompt(random.Random(seed), PROMPT_LEN) for seed in BREAKS]
    healthy = many_prompts(12, seed=2)
    sampled = healthy[6:]
    others = [greedy(25)] * 6 + [
        SamplingParams(temperature=0.8, seed=seed, max_tokens=25, ignore_eos=True) for seed in range(6)
    ]
    with checkpoint.llm() as llm:
        expected = [output["token_ids"] for output in llm.generate(sampled, others[6:], use_tqdm=False)]
    with make(checkpoint, device) as llm:
        pids = worker_pids(llm)
        assert [worker.pid for worker in workers] == pids
        half = list(range(llm.model_runner.model.lm_head.shard_size))
        limited = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, allowed_token_ids=half)
        (of_one_rank,) = llm.generate(prompts[-1:], limited, use_tqdm=False)
        for depth, logprobs, temperature in ((0, None, 0.0), (1, None, 1.0), (1, 1, 0.0)):
            llm.depth = depth
            llm.reset_prefix_cache()
            broken = [
                SamplingParams(temperature=temperature, seed=seed, max_tokens=25, ignore_eos=True, logprobs=logprobs)
                for seed in BREAKS
            ]
            outputs = llm.generate([*healthy, *prompts], [*others, *broken], use_tqdm=False)
            *ended, other_rank = outputs[len(healthy) :]
            for output, wrong in zip(ended, BREAKS.values()):
                assert output.outputs[0].finish_reason == "error", wrong
                assert len(output["token_ids"]) == wrong.position - PROMPT_LEN, wrong
            assert other_rank.outputs[0].finish_reason == "length"
            assert max(other_rank["token_ids"]) in half
            if temperature == 0:
                assert other_rank["token_ids"] == of_one_rank["token_ids"]
            assert_matches(checkpoint, healthy[:6], outputs[:6], 25)
            assert [output["token_ids"] for output in outputs[6 : len(healthy)]] == expected
            assert_idle(llm)
        # The prompts themselves are all right.
        assert_matches(checkpoint, prompts, llm.generate(prompts, greedy(25), use_tqdm=False), 25)
        assert worker_pids(llm) == pids
        assert all(map(is_running, pids))


def test_threads_get_their_own_results(checkpoints, device):
    """Two of them, until some steps have served both."""
    checkpoint = checkpoints("qwen3")
    lengths = [30, 12]
    prompts = [[many_prompts(4, seed=10 * i + k) for k in range(3)] for i in range(2)]
    served: list[list[Any]] = [[], []]
    errors: list[BaseException] = []
    with make(checkpoint, device) as llm:
        watch = Watch(llm)

        def have_met() -> bool:
            asked = ({watch.seqs[i].sampling_params.max_tokens for i in step.seq_ids} for step in watch.steps)
            return any(lengths_together == set(lengths) for lengths_together in asked)

        def work(i: int) -> None:
            try:
                while len(served[i]) < 3 or not have_met():
                    assert len(served[i]) < 300, "they never met"
                    k = len(served[i]) % 3
                    served[i].append((k, llm.generate(prompts[i][k], greedy(lengths[i]), use_tqdm=False)))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGING_S)
        assert not errors
        for i in range(2):
            assert len(served[i]) >= 3
            for k, outputs in served[i]:
                assert_matches(checkpoint, prompts[i][k], outputs, lengths[i])
        assert_idle(llm)
