"""deterministic=True on CPU: a request's tokens and log probabilities are bitwise the same in any company.

On a GPU the same list runs in test_gpu_deterministic.py; its kernels against their twins are in test_kernels.py.
"""

import random
from typing import Any

import pytest
import torch
from helpers import FAMILIES, VOCAB_SIZE, Watch, random_prompt
from invariance import (
    PARAMS,
    Company,
    assert_same,
    check_everything_at_once,
    check_other_settings,
    check_preemption,
    check_prefix_hits,
    check_processes,
    decoded,
    result,
    rows_differ,
    scored,
)

from nanovllm import LLM, SamplingParams
from nanovllm.attention.invariant import InvariantBackend
from nanovllm.kernels import activation, linear_invariant, norm, sampling
from nanovllm.kernels.filtering import Filters, apply_filters
from nanovllm.layers.sampler import compute_logprobs

PROMPT = random_prompt(random.Random(1), 70)


every_family = pytest.mark.parametrize("company", FAMILIES, indirect=True)


@pytest.fixture
def company(request, checkpoints) -> Company:
    checkpoint = checkpoints(getattr(request, "param", "qwen3"))

    def make(**options: Any) -> LLM:
        llm = checkpoint.llm(**{"deterministic": True, "max_num_seqs": 160, **options})
        assert isinstance(llm.model_runner.backend, InvariantBackend)
        return llm

    return Company(make, VOCAB_SIZE, PROMPT, max_neighbour_len=100)


def test_any_number_of_neighbours(company):
    rng = random.Random(2)
    expected = {name: company.alone(params) for name, params in PARAMS.items()}
    assert len({tuple(answer["token_ids"]) for answer in expected.values()}) == len(PARAMS)
    with company.make() as llm:
        for count in (1, 15, 128):
            name = rng.choice(list(PARAMS)) if count != 128 else "sampled"
            output, watch = company.among(llm, PARAMS[name], rng, count)
            assert max(len(step.seq_ids) for step in watch.steps) == count + 1
            assert_same(output, expected[name], f"{name} among {count}")
            llm.block_manager.reset()  # cached blocks are another test's


@pytest.mark.parametrize("name", ["greedy", "filtered"])
def test_chunks(company, name):
    rng = random.Random(3)
    expected = company.alone(PARAMS[name])
    for budget in (1, 16, 33):
        with company.make(max_num_batched_tokens=budget) as llm:
            output, watch = company.among(llm, PARAMS[name], rng, 2, place=1)
            assert watch.num_chunks > 0
            assert_same(output, expected, f"chunks of {budget}")


@pytest.mark.parametrize(("name", "depth"), [("greedy", 0), ("sampled", 1), ("filtered", 1), ("plain", 1)])
def test_preemption(company, name, depth):
    check_preemption(company, PARAMS[name], company.alone(PARAMS[name]), depth, num_kvcache_blocks=29)


@every_family
def test_prefix_hits(company):
    check_prefix_hits(company, company.alone(PARAMS["greedy"]), of_prompt=64, of_text=112)


@every_family
def test_decode_equals_prefill(company):
    expected = company.alone(PARAMS["sampled"])
    for budget in (16384, 9):
        with company.make(max_num_batched_tokens=budget) as llm:
            watch = Watch(llm)
            assert scored(llm, PROMPT, expected["token_ids"]) == decoded(expected)
            assert (watch.num_chunks > 0) == (budget == 9)


def test_prompt_logprobs(company):
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, prompt_logprobs=3, logprobs=1)
    expected = company.alone(params)
    assert len(expected["prompt_logprobs"]) == len(PROMPT)
    for budget in (16384, 50):
        with company.make(max_num_batched_tokens=budget) as llm:
            output, _ = company.among(llm, params, random.Random(6), 12)
            assert_same(output, expected, f"budget {budget}")


@pytest.mark.parametrize("options", [{"kvcache_block_size": 1}, {"kvcache_block_size": 256}, {"max_num_seqs": 3}])
def test_other_settings_change_nothing(company, options):
    options = {"num_kvcache_blocks": 16 * 800 // options.get("kvcache_block_size", 16), **options}
    check_other_settings(company, company.alone(PARAMS["greedy"]), **options)


@every_family
@pytest.mark.parametrize("seed", range(2))
def test_everything_at_once(company, seed):
    rng = random.Random(100 + seed)
    name = rng.choice(list(PARAMS))
    options = {
        "max_num_batched_tokens": rng.choice([5, 40, 300]),
        "max_num_seqs": rng.choice([3, 9, 40]),
        "num_kvcache_blocks": rng.choice([14, 30]),
    }
    check_everything_at_once(company, PARAMS[name], company.alone(PARAMS[name]), rng, 15, **options)


def test_other_processes(company):
    """Today and tomorrow: nothing of a process's own goes into the bits."""
    expected = {name: company.alone(PARAMS[name]) for name in ("greedy", "sampled")}
    with company.make() as llm:
        config = llm.config
    options = {name: getattr(config, name) for name in ("model", "max_model_len", "kvcache_block_size", "max_num_seqs")}
    check_processes(company, expected, device="cpu", num_kvcache_blocks=800, **options)


def test_two_threads_of_arithmetic(company):
    """Threads share the work of a tile otherwise than one does alone, but the same way in any batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = company.alone(PARAMS["sampled"])
        with company.make() as llm:
            assert_same(company.among(llm, PARAMS["sampled"], random.Random(8), 8)[0], expected, "two threads")
    finally:
        torch.set_num_threads(threads)


@every_family
def test_agrees_with_the_normal_mode(company):
    """The mode changes rounding only."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0)
    expected = company.alone(params)
    with company.make() as llm:
        assert llm.config.deterministic
    checkpoint_path = llm.config.model
    options = {"device": "cpu", "max_model_len": 256, "kvcache_block_size": 16, "num_kvcache_blocks": 100}
    with LLM(checkpoint_path, **options) as llm:
        assert not isinstance(llm.model_runner.backend, InvariantBackend)
        normal = result(llm.generate([PROMPT], params, use_tqdm=False)[0])
    assert decoded(expected) == pytest.approx(decoded(normal), abs=1e-3)


# ---- the parts ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "depth"), [(48, 48), (293, 48), (7, 33), (576, 576), (1, 5), (1537, 100)])
def test_products(outputs, depth, dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((70, depth), (outputs, depth), (outputs,)))
    for b in (bias, None):
        product = lambda rows, b=b: linear_invariant.linear_invariant_torch(rows, weight, b)  # noqa: E731
        assert rows_differ(product, x, [1, 2, 15, 16, 17, 33, 69]) == []
        expected = torch.nn.functional.linear(x.float(), weight.float(), None if b is None else b.float())
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(product(x).float(), expected, rtol=tolerance, atol=tolerance * depth**0.5)


def test_a_product_whose_tile_is_not_uniform_takes_a_row_at_a_time(monkeypatch):
    """Where a BLAS ends a tile in another kernel, as some do for odd shapes."""
    linear = torch.nn.functional.linear

    def uneven(x, weight, bias=None):
        out = linear(x, weight, bias)
        out[8:] += 1e-3
        return out

    monkeypatch.setattr(linear_invariant.F, "linear", uneven)
    linear_invariant.rows_at_once.cache_clear()
    try:
        x, weight = torch.randn(40, 24), torch.randn(10, 24)
        assert linear_invariant.rows_at_once((10, 24), torch.float32, False, torch.get_num_threads()) == 1
        product = lambda rows: linear_invariant.linear_invariant(rows, weight)  # noqa: E731
        assert rows_differ(product, x, [1, 7, 20]) == []
    finally:
        linear_invariant.rows_at_once.cache_clear()


@pytest.mark.parametrize("size", [5, 80, 1000])
def test_norms_and_activations(size):
    x, weight = 4 * torch.randn(70, 2 * size), torch.randn(2 * size)
    sizes = [1, 2, 15, 16, 17, 33, 69]
    assert rows_differ(lambda rows: norm.rms_norm_torch(rows, weight, 1e-6), x, sizes) == []
    assert rows_differ(lambda part: activation.silu_and_mul_torch(part, invariant=True), x, sizes) == []


@pytest.mark.parametrize("vocab_size", [257, 1000, 5003])
def test_sampling(vocab_size):
    """Log probabilities with their ties, filters, and the scores of draws."""
    count, sizes = 24, [1, 2, 7, 23]
    logits = (4 * torch.randn(count, vocab_size)).bfloat16().float()  # many equal ones
    token_ids = torch.randint(vocab_size, (count,))

    def logprobs(rows):
        found = compute_logprobs(rows, token_ids[: len(rows)] * 0 + 5, 12)
        return torch.cat((found.chosen[:, None], found.ranks[:, None], found.top, found.top_ids), 1).double()

    def filtered(rows):
        n = len(rows)
        filters = Filters(torch.full((n,), 50), torch.full((n,), 0.7).double(), torch.full((n,), 0.001))
        return apply_filters(rows, torch.full((n,), 0.8), filters)

    def scores(rows):
        ones = torch.ones(len(rows), dtype=torch.int64)
        return sampling.gumbel_max_torch(rows, ones.float(), 3 * ones, 4 * ones)[0]

    assert rows_differ(logprobs, logits, sizes) == []
    assert rows_differ(filtered, logits, sizes) == []
    assert rows_differ(scores, logits, sizes) == []


def test_equal_log_probabilities_are_listed_by_token_id():
    logits = torch.zeros(2, 50)
    logits[0, [40, 7, 21]] = 3.0
    logits[1, 49] = float("-inf")
    found = compute_logprobs(logits, torch.tensor([7, -1]), 5)
    assert found.top_ids.tolist() == [[7, 21, 40, 0, 1], [0, 1, 2, 3, 4]]
    assert torch.equal(found.top, logits.log_softmax(-1).gather(1, found.top_ids))
    assert found.ranks[0] == 1
    full = compute_logprobs(logits, torch.tensor([7, -1]), 50)
    assert full.top_ids[1, -1] == 49
    assert full.top[1, -1] == float("-inf")


# ---- refused ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_backend": "flash_attn"}, ["flash_attn", "deterministic=True", "None"]),
        ({"attention_backend": "triton"}, ["triton", "deterministic=True", "None"]),
        ({"tensor_parallel_size": 2}, ["deterministic=True", "tensor_parallel_size=2", "pass 1"]),
    ],
)
def test_what_cannot_be_deterministic_is_refused(qwen3, options, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        qwen3.llm(deterministic=True, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_the_backend_may_be_named(qwen3):
    with qwen3.llm(deterministic=True, attention_backend="sdpa") as llm:
        assert isinstance(llm.model_runner.backend, InvariantBackend)
