"""Sampling as a distribution: the draws against the softmax, the noise against its law, seeds against the batch."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from helpers import MIN_MARGIN, Watch, greedy, many_prompts
from scipy import stats

from nanovllm import SamplingParams
from nanovllm.engine.input_processor import fold_seed
from nanovllm.kernels import sampling
from nanovllm.kernels.sampling import gumbel_argmax, gumbel_noise_torch, mix32
from nanovllm.layers.sampler import Sampler
from nanovllm.sampling_params import GREEDY_BELOW

NUM_DRAWS = 50_000
NUM_TOKENS = 32
SURE = 1e-3  # smallest p value of a χ² test that passes; the seeds are fixed, so that a test passes always or never


def random_logits(num_tokens: int = NUM_TOKENS, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits, temperature, seeds, positions) -> torch.Tensor:
    """One token for each of `seeds` and `positions`."""
    seeds, positions = torch.broadcast_tensors(torch.as_tensor(seeds), torch.as_tensor(positions))
    rows = logits.expand(len(seeds), -1)
    return gumbel_argmax(rows, torch.full((len(seeds),), float(temperature)), seeds, positions)


def chi_square_p(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p value of counts against probabilities; cells that expect fewer than ten are taken together."""
    expected = probabilities.double() / probabilities.double().sum() * observed.sum()
    rare = expected < 10
    counts, means = observed[~rare].double(), expected[~rare]
    if rare.any():
        counts = torch.cat((counts, observed[rare].double().sum()[None]))
        means = torch.cat((means, expected[rare].sum()[None]))
    assert len(counts) > 2
    return stats.chisquare(counts.numpy(), means.numpy()).pvalue


# ---- the distribution ----


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 1.6, 10.0])
@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_follow_the_softmax(temperature, vary):
    logits, numbers = random_logits(), torch.arange(NUM_DRAWS)
    tokens = draw(logits, temperature, *((numbers, 17) if vary == "seeds" else (12345, numbers)))
    observed = torch.bincount(tokens, minlength=NUM_TOKENS)
    assert observed.sum() == NUM_DRAWS
    assert chi_square_p(observed, (logits / temperature).softmax(-1)) > SURE
    # The test would notice a temperature that is off by a twentieth.
    assert chi_square_p(observed, (logits / (temperature * 1.05)).softmax(-1)) < SURE or temperature > 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_draws_from_other_dtypes(dtype):
    logits = random_logits(seed=1).to(dtype)
    tokens = draw(logits, 0.8, torch.arange(NUM_DRAWS), 3)
    observed = torch.bincount(tokens, minlength=NUM_TOKENS)
    assert chi_square_p(observed, (logits.float() / 0.8).softmax(-1)) > SURE


@pytest.mark.parametrize("temperature", [0.5, 1.0, 50.0])
def test_nothing_outside_the_support_is_drawn(temperature):
    logits = random_logits(seed=2)
    excluded = torch.arange(NUM_TOKENS) % 3 == 0
    logits[excluded] = -math.inf
    tokens = draw(logits, temperature, torch.arange(NUM_DRAWS), 3)
    observed = torch.bincount(tokens, minlength=NUM_TOKENS)
    assert observed[excluded].sum() == 0
    assert chi_square_p(observed[~excluded], (logits / temperature).softmax(-1)[~excluded]) > SURE


def test_large_vocabulary():
    """Tokens at the far end are as likely as those at the beginning."""
    num_tokens = 40_000
    tokens = draw(torch.zeros(num_tokens), 1.0, torch.arange(400), 3)
    observed = torch.bincount(tokens // (num_tokens // 20), minlength=20)
    assert chi_square_p(observed, torch.ones(20)) > SURE


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (2**32, 0), (0, 4096), (-(2**62), 0)])
def test_draws_of_neighbours_are_independent(shift):
    """(seed, position) against (seed + a, position + b): 8 by 8 outcomes, all as likely."""
    seeds, positions = torch.arange(NUM_DRAWS) // 200, torch.arange(NUM_DRAWS) % 200
    first = draw(torch.zeros(8), 1.0, seeds, positions)
    second = draw(torch.zeros(8), 1.0, seeds + shift[0], positions + shift[1])
    assert chi_square_p(torch.bincount(first * 8 + second, minlength=64), torch.ones(64)) > SURE


def test_two_tokens_of_one_row_get_independent_noise():
    noise = gumbel_noise_torch(torch.arange(NUM_DRAWS), torch.zeros(NUM_DRAWS, dtype=torch.int64), torch.arange(6))
    correlation = torch.corrcoef(noise.T)
    assert (correlation - torch.eye(6)).abs().max() < 4.5 / math.sqrt(NUM_DRAWS)


# ---- greedy, and rows that cannot be drawn from ----


@pytest.mark.parametrize("temperature", [0.0, GREEDY_BELOW / 2, 1e-30])
@pytest.mark.parametrize("num_tokens", [3, 32, 1000, 4097])
def test_greedy_takes_the_lowest_id_of_equals(temperature, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randint(0, 3, (200, num_tokens), generator=generator).float()  # full of ties
    temperatures = torch.full((200,), temperature)
    tokens = gumbel_argmax(logits, temperatures, torch.arange(200), torch.arange(200))
    for row, token in zip(logits, tokens.tolist(), strict=True):
        assert token == next(i for i, value in enumerate(row.tolist()) if value == row.max())


def test_greedy_and_drawn_rows_in_one_batch():
    logits = random_logits(seed=3).expand(100, -1)
    temperatures = torch.tensor([0.0, 1.0] * 50)
    tokens = gumbel_argmax(logits, temperatures, torch.arange(100), torch.zeros(100, dtype=torch.int64))
    assert set(tokens[::2].tolist()) == {int(logits[0].argmax())}
    assert len(set(tokens[1::2].tolist())) > 3
    alone = gumbel_argmax(logits[1::2], temperatures[1::2], torch.arange(1, 100, 2), torch.zeros(50, dtype=torch.int64))
    assert tokens[1::2].tolist() == alone.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_maximum_yields_minus_one(temperature):
    logits = random_logits(seed=4).repeat(6, 1)
    logits[0, 5] = math.nan
    logits[1, :] = math.nan
    logits[2, 7] = math.inf
    logits[3, :] = -math.inf
    logits[4, 3] = -math.inf  # this one is fine
    tokens = gumbel_argmax(logits, torch.full((6,), temperature), torch.arange(6), torch.arange(6)).tolist()
    assert tokens[:4] == [-1] * 4
    assert tokens[4] >= 0
    assert tokens[5] >= 0


def test_huge_and_tiny_temperatures_and_logits():
    logits = random_logits(seed=5)
    for temperature in (2e-5, 1e-3, 1e4, 1e30):
        tokens = draw(logits, temperature, torch.arange(1000), 1)
        assert tokens.min() >= 0
    assert set(draw(logits, 2e-5, torch.arange(1000), 1).tolist()) == {int(logits.argmax())}
    observed = torch.bincount(draw(logits, 1e30, torch.arange(NUM_DRAWS), 1), minlength=NUM_TOKENS)
    assert chi_square_p(observed, torch.ones(NUM_TOKENS)) > SURE
    assert draw(logits * 1e30, 1.0, torch.arange(10), 1).tolist() == [int(logits.argmax())] * 10


def test_empty_batch():
    nothing = torch.empty(0, dtype=torch.int64)
    assert gumbel_argmax(torch.empty(0, 5), torch.empty(0), nothing, nothing).tolist() == []


def test_the_layer_is_the_function():
    logits, numbers = random_logits(seed=6).expand(50, -1), torch.arange(50)
    temperatures = torch.linspace(0, 2, 50)
    tokens = Sampler()(logits, temperatures, numbers, numbers)
    assert tokens.tolist() == gumbel_argmax(logits, temperatures, numbers, numbers).tolist()
    assert tokens.dtype == torch.int64


# ---- the noise ----


def test_noise_has_the_moments_of_the_gumbel_distribution():
    noise = gumbel_noise_torch(torch.arange(500), torch.arange(500), torch.arange(2000)).double().flatten()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772156649) < 4 * 1.2825 / math.sqrt(len(noise))
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    assert abs(((noise - noise.mean()) ** 3).mean() / noise.std() ** 3 - 1.1395) < 0.05
    assert stats.kstest(noise[:: len(noise) // 100_000].numpy(), "gumbel_r").pvalue > SURE


def noise_of_hash(monkeypatch: pytest.MonkeyPatch, hashes: torch.Tensor) -> torch.Tensor:
    """The noise that follows from given 32-bit hashes."""
    monkeypatch.setattr(sampling, "mix32", lambda x: hashes.expand(x.shape) if x.dim() == 2 else x)
    one = torch.zeros(1, dtype=torch.int64)
    return gumbel_noise_torch(one, one, torch.arange(len(hashes)))[0]


def test_noise_is_accurate_wherever_it_can_win(monkeypatch):
    """Against float64, for small uniforms above all: there the noise is large."""
    hashes = torch.unique((2 ** torch.linspace(0, 31.99, 20_000, dtype=torch.float64)).long() - 1)
    u = (hashes.double() + 0.5) * 2.0**-32
    expected = -torch.log(-torch.log1p(-u))
    noise = noise_of_hash(monkeypatch, hashes).double()
    likely = u < 0.9
    assert (noise - expected).abs()[likely].max() < 3e-6
    assert noise.max() == noise[0]
    assert abs(noise[0] - 33 * math.log(2)) < 1e-5  # the largest there is
    assert (noise[1:] <= noise[:-1] + 1e-6).all()


def test_the_far_end_of_the_noise_can_win_alone(monkeypatch):
    """Where the uniform would round to one the noise is the least there is, and neither -inf, +inf nor NaN."""
    hashes = torch.tensor([2**32 - 129, 2**32 - 128, 2**32 - 1, 2**31])
    noise = noise_of_hash(monkeypatch, hashes)
    assert noise.tolist()[1:3] == [noise.min().item()] * 2
    assert -3 < noise.min() < -2.8
    assert -4 < noise[0] < -2
    one = torch.zeros(1, dtype=torch.int64)
    only = torch.full((1, 4), -math.inf)
    only[0, 2] = 5.0
    assert gumbel_argmax(only, torch.ones(1), one, one).item() == 2


def test_the_hash_is_a_bijection_and_stays_in_32_bits():
    x = torch.arange(0, 2**32, 4099)
    hashed = mix32(x)
    assert hashed.min() >= 0
    assert hashed.max() < 2**32
    assert len(torch.unique(hashed)) == len(x)
    bits = (hashed[:, None] >> torch.arange(32)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.005


def test_seeds_and_noise_are_what_they_were():
    """A seed means the same draws in the next release, so the numbers themselves are pinned."""
    folded = [fold_seed(*pair) for pair in ((0, 0), (0, 1), (11, 0), (11, 2), (-1, 0), (2**63 - 1, 1))]
    assert folded == [
        0, -2152535657050944081, 3774817245553408877, 4839782808629744545, -5417735806833148549, 3055647633038352039
    ]  # fmt: skip
    hashed = mix32(torch.tensor([0, 1, 2, 0x9E3779B9, 2**32 - 1]))
    assert hashed.tolist() == [0, 1753845952, 3507691905, 33350994, 1734902346]
    token_ids = torch.tensor([0, 1, 2, 31_999, 151_935])
    noise = gumbel_noise_torch(torch.tensor([11, -5]), torch.tensor([7, 4095]), token_ids)
    expected = [
        [-0.164421216, -1.046372056, -1.677154660, 0.096759140, 0.688338280],
        [0.193172961, 0.873836279, 0.589925230, -1.527564526, 1.791018724],
    ]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_noise_depends_on_seed_position_and_token_alone():
    seeds, positions = torch.tensor([5, -7, 2**62, 5]), torch.tensor([0, 1, 4095, 0])
    noise = gumbel_noise_torch(seeds, positions, torch.arange(100))
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[0], noise[1])
    for i in range(4):
        alone = gumbel_noise_torch(seeds[i : i + 1], positions[i : i + 1], torch.arange(40, 60))
        assert torch.equal(alone[0], noise[i, 40:60])


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 62])
def test_every_bit_of_the_seed_counts(bit):
    zero = torch.zeros(1, dtype=torch.int64)
    a = gumbel_noise_torch(zero, zero, torch.arange(50))
    b = gumbel_noise_torch(zero + 2**bit, zero, torch.arange(50))
    assert not (a == b).any()


def test_a_row_draws_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(64, 500, generator=generator)
    seeds, positions = torch.arange(64) * 7, torch.arange(64) % 5
    temperatures = torch.rand(64, generator=generator) * 2
    together = gumbel_argmax(logits, temperatures, seeds, positions)
    order = torch.randperm(64, generator=generator)
    assert torch.equal(
        gumbel_argmax(logits[order], temperatures[order], seeds[order], positions[order]), together[order]
    )
    for i in range(0, 64, 9):
        alone = gumbel_argmax(logits[i, None], temperatures[i, None], seeds[i, None], positions[i, None])
        assert alone.item() == together[i].item()


# ---- through the engine ----


def sampled(llm, prompts, temperature=0.8, max_tokens=40) -> list[list[int]]:
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def test_the_same_seed_gives_the_same_text_however_it_is_batched(checkpoints):
    checkpoint, prompts = checkpoints("qwen3"), many_prompts(16)
    expected = sampled(checkpoint.llm(seed=11), prompts)
    assert len({tuple(tokens) for tokens in expected}) == 16
    variants = [
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 13, "kvcache_block_size": 5},
        {"num_kvcache_blocks": 14},
    ]
    for variant in variants:
        for depth in (0, 1):
            llm = checkpoint.llm(seed=11, **variant)
            llm.depth = depth
            llm.scheduler.completion_ratio = 0.0
            watch = Watch(llm)
            params = SamplingParams(temperature=0.8, max_tokens=40, ignore_eos="num_kvcache_blocks" not in variant)
            outputs = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
            same = sum(a == b[: len(a)] for a, b in zip(outputs, expected, strict=True))
            assert same == 16
            assert watch.num_preemptions > 0 or "num_kvcache_blocks" not in variant


def test_other_seeds_requests_and_calls_give_other_texts(checkpoints):
    checkpoint, prompt = checkpoints("qwen3"), [1, 2, 3, 4]
    llm = checkpoint.llm(seed=1)
    texts = sampled(llm, [prompt] * 10) + sampled(llm, [prompt] * 10) + sampled(checkpoint.llm(seed=2), [prompt] * 10)
    assert len({tuple(text) for text in texts}) == 30
    assert sampled(checkpoint.llm(seed=2), [prompt] * 10) == texts[20:]


@pytest.mark.parametrize("seed", [-2, 2**63 - 1, -(2**63), 0])
def test_every_seed_is_another(checkpoints, seed):
    checkpoint, prompt = checkpoints("qwen3"), [1, 2, 3, 4]
    first, second = (sampled(checkpoint.llm(seed=s), [prompt] * 3, max_tokens=20) for s in (seed, 2))
    assert not {tuple(text) for text in first} & {tuple(text) for text in second}


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_first_tokens_follow_transformers_logits(checkpoints, temperature):
    checkpoint, prompt = checkpoints("llama"), [5, 6, 7, 8, 9]
    llm = checkpoint.llm(max_num_seqs=512)
    tokens = Counter(text[0] for text in sampled(llm, [prompt] * 4000, temperature, max_tokens=1))
    with torch.inference_mode():
        logits = checkpoint.model(torch.tensor([prompt])).logits[0, -1]
    observed = torch.tensor([tokens[i] for i in range(len(logits))])
    assert chi_square_p(observed, (logits / temperature).softmax(-1)) > SURE


def test_second_tokens_follow_transformers_logits(checkpoints):
    """They are drawn by the decode step, where the state is the device's."""
    checkpoint, prompt = checkpoints("llama"), [5, 6, 7, 8, 9]
    llm = checkpoint.llm(max_num_seqs=512)
    pairs = Counter(tuple(text) for text in sampled(llm, [prompt] * 6000, 0.7, max_tokens=2))
    first = Counter(a for a, _ in pairs.elements()).most_common(1)[0][0]
    with torch.inference_mode():
        logits = checkpoint.model(torch.tensor([[*prompt, first]])).logits[0, -1]
    observed = torch.tensor([pairs[first, i] for i in range(len(logits))])
    assert observed.sum() > 300
    assert chi_square_p(observed, (logits / 0.7).softmax(-1)) > SURE


def test_temperatures_of_one_batch_do_not_mix(checkpoints):
    checkpoint, prompts = checkpoints("qwen3"), many_prompts(16)
    params = [
        greedy(30) if i % 2 else SamplingParams(temperature=1.5, max_tokens=30, ignore_eos=True) for i in range(16)
    ]
    outputs = checkpoint.llm().generate(prompts, params, use_tqdm=False)
    num_equal = 0
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        ((expected, margin),) = checkpoint.answers([prompt], 64)
        if i % 2:
            assert output["token_ids"] == expected[:30] or margin < MIN_MARGIN
        num_equal += output["token_ids"] == expected[:30]
    assert num_equal <= 8


def test_a_tiny_temperature_is_greedy(checkpoints):
    checkpoint, prompts = checkpoints("qwen3"), many_prompts(8)
    llm = checkpoint.llm()
    assert sampled(llm, prompts, temperature=1e-9) == [
        output["token_ids"] for output in llm.generate(prompts, greedy(40), use_tqdm=False)
    ]


def test_default_sampling_params():
    """vLLM's, but for `max_tokens`, whose default there is 16."""
    vllm = {
        "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": None, "stop": None, "stop_token_ids": None,
        "ignore_eos": False, "max_tokens": 64, "min_tokens": 0, "logprobs": None, "prompt_logprobs": None,
        "logit_bias": None, "allowed_token_ids": None, "bad_words": None, "include_stop_str_in_output": False,
        "detokenize": True, "skip_special_tokens": True, "spaces_between_special_tokens": True,
        "logits_processors": None, "structured_outputs": None,
    }  # fmt: skip
    fields = dataclasses.fields(SamplingParams)
    assert {field.name: field.default for field in fields if field.init} == vllm
