"""deterministic=True on one CUDA device: first every kernel, so that a failure names one, then the engine.

All comparisons are to the last bit. The checkpoint is test_gpu.py's: $MODELS/qwen3-0.6B, or four layers of that shape.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Watch, many_prompts, random_prompt
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
from test_gpu import Replays, qwen3_checkpoint

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import activation, linear_invariant, norm, rope, sampling
from nanovllm.kernels.filtering import Filters, filtered_argmax
from nanovllm.layers.sampler import compute_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB_SIZE = 151936
PAGE = 64
OPTIONS = {"max_model_len": 2048, "kvcache_block_size": PAGE, "max_num_seqs": 160, "num_kvcache_blocks": 2000}
SIZES = [1, 2, 3, 7, 8, 9, 16, 17, 64, 65, 127, 128, 129, 256, 257, 500, 512, 1000]
PROMPT = random_prompt(random.Random(1), 300, VOCAB_SIZE)


def gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


# ---- kernels ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("outputs", "depth"),
    [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024), (1152, 896), (293, 48)],
)
def test_products(outputs, depth, dtype):
    rows = 300 if outputs == 151936 else 2500
    x, weight, bias = gpu(rows, depth, dtype=dtype), gpu(outputs, depth, dtype=dtype), gpu(outputs, dtype=dtype)
    sizes = [size for size in SIZES if size < rows]
    for b in (None, bias):
        product = lambda part, b=b: linear_invariant.linear_invariant(part, weight, b)  # noqa: E731
        assert rows_differ(product, x, sizes) == []


@pytest.mark.parametrize("num_kv_heads", [8, 2])
@pytest.mark.parametrize("page", [16, 256])
def test_attention(page, num_kv_heads):
    """A decode alone, which is cut into items, and among 256, which is not; and prompts in chunks of any raggedness."""
    from test_kernels import invariant_attention, make_cache

    num_heads, head_dim, length, scale = 16, 128, 3000, 128**-0.5
    k_cache, v_cache, table, _ = make_cache([length], num_kv_heads, head_dim, page, "cuda", torch.bfloat16)
    q = gpu(length, num_heads, head_dim)

    def attend(queries: torch.Tensor, ends: list[int], q_lens: list[int], num_decodes: int) -> tuple[Any, Any]:
        context_lens = torch.tensor(ends, dtype=torch.int32, device="cuda")
        cache = k_cache, v_cache, table.expand(len(ends), -1).contiguous(), context_lens
        return invariant_attention(queries, cache, q_lens, num_decodes, scale)

    whole, _ = attend(q, [length], [length], 0)
    rng, start = random.Random(0), 0
    while start < length:
        end = min(start + rng.choice([1, 3, 8, 17, 250, 700]), length)
        chunk, _ = attend(q[start:end], [end], [end - start], 0)
        assert torch.equal(chunk, whole[start:end]), f"chunk {start}:{end} against the whole prompt"
        start = end
    edges = [0, 1, 15, 63, 64, 255, 256, 257, 511, 512, 1023, 1024, 2047, 2048, 2999]
    num_cut = 0
    for position in edges:
        alone, plan = attend(q[position : position + 1], [position + 1], [1], 1)
        num_cut += int(plan.items[0, 4] > 1)
        assert torch.equal(alone, whole[position : position + 1]), f"decode at {position}, alone, against the prompt"
    assert num_cut >= 8
    positions = [rng.randrange(length) for _ in range(256)]
    together, plan = attend(q[positions], [p + 1 for p in positions], [1] * 256, 256)
    assert (plan.items[:, 4] == 1).any()
    assert torch.equal(together, whole[positions]), "decodes together against the prompt"
    # Decodes and a chunk in one step.
    mixed = torch.cat((q[positions[:40]], q[1000:1333]))
    together, _ = attend(mixed, [*(p + 1 for p in positions[:40]), 1333], [1] * 40 + [333], 40)
    assert torch.equal(together[:40], whole[positions[:40]]), "decodes beside a chunk"
    assert torch.equal(together[40:], whole[1000:1333]), "a chunk beside decodes"


def test_attention_repeats():
    """Whichever program merges, and whenever: no partial result is read before it is written."""
    from test_kernels import invariant_attention, make_cache

    lens = torch.randint(1, 3000, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = make_cache(lens, 8, 128, 16, "cuda", torch.bfloat16)
    q = gpu(48, 16, 128)
    first, _ = invariant_attention(q, cache, [1] * 48, 48, 128**-0.5)
    for _ in range(100):
        assert torch.equal(invariant_attention(q, cache, [1] * 48, 48, 128**-0.5)[0], first)


def test_norms_activations_and_rotation():
    x, residual, weight = gpu(2000, 1024), gpu(2000, 1024), gpu(1024)
    assert rows_differ(lambda rows: norm.rms_norm(rows, weight, 1e-6), x, SIZES) == []
    both = torch.cat((x, residual), 1)
    add = lambda rows: torch.cat(norm.add_rms_norm(*(p.contiguous() for p in rows.chunk(2, 1)), weight, 1e-6), 1)  # noqa: E731
    assert rows_differ(add, both, SIZES) == []
    assert rows_differ(activation.silu_and_mul, gpu(2000, 6144), SIZES) == []
    cos_sin, cache = gpu(100, 128, dtype=torch.float32), gpu(2, 10, 16, 8, 128)

    def rotate(rows: torch.Tensor) -> torch.Tensor:
        positions = torch.full((len(rows),), 77, device="cuda")
        slots = torch.full((len(rows),), -1, device="cuda")
        return rope.qk_norm_rope_store(rows, positions, cos_sin, weight[:128], weight[128:256], 1e-6, *cache, slots)

    assert rows_differ(rotate, gpu(2000, 4096), SIZES) == []


@pytest.mark.parametrize("vocab_size", [151936, 50257, 1001])
def test_sampling(vocab_size):
    """Vocabularies of any remainder, since the alignment of a row follows from it; logits with many ties."""
    count, sizes = 260, [1, 2, 3, 16, 65, 255]
    logits = 4 * gpu(count, vocab_size)

    def logprobs(rows: torch.Tensor) -> torch.Tensor:
        found = compute_logprobs(rows, torch.full((len(rows),), 5, device="cuda"), 20)
        return torch.cat((found.chosen[:, None], found.ranks[:, None], found.top, found.top_ids), 1)

    def filtered(rows: torch.Tensor) -> torch.Tensor:
        """Draws after filters, of which one looks at few tokens and one at all."""
        n, drawn = len(rows), []
        full = lambda value: torch.full((n,), value, device="cuda")  # noqa: E731
        for top_k, top_p, min_p in ((50, 0.9, 0.001), (5000 % vocab_size, 0.7, 0.0), (vocab_size, 0.99, 0.0)):
            filters = Filters(full(top_k), full(top_p).double(), full(min_p))
            for seed in range(8):
                which = torch.arange(n, device="cuda")
                drawn.append(filtered_argmax(rows, which, full(1.5), full(seed), full(4), filters))
        return torch.stack(drawn, 1)

    def scores(rows: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(len(rows), dtype=torch.int64, device="cuda")
        return torch.stack([part.double() for part in sampling.gumbel_max(rows, ones.float(), 3 * ones, 4 * ones)], 1)

    assert rows_differ(logprobs, logits, sizes) == [], "log probabilities"
    assert rows_differ(filtered, logits, sizes) == [], "filters"
    assert rows_differ(scores, logits, sizes) == [], "draws"
    # Beside a row that asks for more, logits are float32.
    assert torch.equal(scores(logits), scores(logits.float())), "draws from float32"


# ---- the engine ----


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(qwen3_checkpoint(tmp_path_factory))


def maker(path: str, deterministic: bool = True) -> Callable[..., LLM]:
    def make(**options: Any) -> LLM:
        return LLM(path, **{"deterministic": deterministic, **OPTIONS, **options})

    return make


@pytest.fixture(scope="module")
def company(path) -> Company:
    return Company(maker(path), VOCAB_SIZE, PROMPT, max_neighbour_len=600)


@pytest.fixture(scope="module")
def expected(company) -> dict[str, dict[str, Any]]:
    answers = {name: company.alone(params) for name, params in PARAMS.items()}
    assert len({tuple(answer["token_ids"]) for answer in answers.values()}) == len(PARAMS)
    return answers


def test_it_is_what_it_says(company):
    with company.make() as llm:
        assert llm.config.dtype == torch.bfloat16
        assert type(llm.model_runner.backend).__name__ == "InvariantBackend"
        replays = Replays(llm)
        llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
        assert len(replays.sizes) == 4


@pytest.mark.parametrize("name", PARAMS)
def test_graph_equals_eager(company, expected, name):
    assert company.alone(PARAMS[name], enforce_eager=True) == expected[name]


@pytest.mark.parametrize("name", PARAMS)
def test_any_number_of_neighbours(company, expected, name):
    rng = random.Random(2)
    with company.make() as llm:
        for count in (1, 3, 16, 40, 128):
            # All prompts have had their turn after six steps of the budget, and nobody has ended.
            output, watch = company.among(llm, PARAMS[name], rng, count, min_tokens=10)
            assert max(len(step.seq_ids) for step in watch.steps) == count + 1
            assert_same(output, expected[name], f"{name} among {count}")
            llm.block_manager.reset()


@pytest.mark.parametrize("budget", [7, 77, 200])
def test_chunks(company, expected, budget):
    rng = random.Random(3)
    with company.make(max_num_batched_tokens=budget) as llm:
        for name in ("greedy", "filtered"):
            output, watch = company.among(llm, PARAMS[name], rng, 6, place=2)
            assert watch.num_chunks > 0
            assert_same(output, expected[name], f"{name} in chunks of {budget}")


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", PARAMS)
def test_preemption(company, expected, name, depth):
    check_preemption(company, PARAMS[name], expected[name], depth, num_kvcache_blocks=37)


def test_prefix_hits(company, expected):
    check_prefix_hits(company, expected["greedy"], of_prompt=256, of_text=320)


@pytest.mark.parametrize("budget", [16384, 90])
def test_decode_equals_prefill(company, expected, budget):
    with company.make(max_num_batched_tokens=budget) as llm:
        watch = Watch(llm)
        assert scored(llm, PROMPT, expected["sampled"]["token_ids"]) == decoded(expected["sampled"])
        assert (watch.num_chunks > 0) == (budget == 90)


@pytest.mark.parametrize("options", [{"kvcache_block_size": 16}, {"kvcache_block_size": 256}, {"max_num_seqs": 3}])
def test_other_settings_change_nothing(company, expected, options):
    options = {**options, "num_kvcache_blocks": 128000 // options.get("kvcache_block_size", PAGE)}
    check_other_settings(company, expected["greedy"], **options)


@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once(company, expected, seed):
    rng = random.Random(100 + seed)
    name = rng.choice(list(PARAMS))
    # Fewer tokens than prompts bring, and fewer blocks than so many sequences grow to.
    budget, max_num_seqs, num_blocks = rng.choice([(60, 20, 20), (500, 3, 16), (500, 20, 50), (4000, 100, 120)])
    options = {
        "max_num_batched_tokens": budget,
        "max_num_seqs": max_num_seqs,
        "num_kvcache_blocks": num_blocks,
        "enforce_eager": rng.random() < 0.3,
    }
    check_everything_at_once(company, PARAMS[name], expected[name], rng, 60, **options)


def test_other_processes(company, expected, path):
    """Today and tomorrow: nothing of a process's own goes into the bits."""
    asked = {name: expected[name] for name in ("greedy", "sampled")}
    check_processes(company, asked, model=path, **{**OPTIONS, "num_kvcache_blocks": 500})


def test_without_the_mode_something_differs(path):
    """Otherwise the tests above would show nothing."""
    company = Company(maker(path, deterministic=False), VOCAB_SIZE, PROMPT, max_neighbour_len=600)
    alone = company.alone(PARAMS["greedy"])
    with company.make() as llm:
        among = result(company.among(llm, PARAMS["greedy"], random.Random(2), 40)[0])
        llm.block_manager.reset()
        prefilled = scored(llm, PROMPT, alone["token_ids"])
    assert among != alone
    assert prefilled != decoded(alone)


def test_float32(checkpoints):
    """On tiny matrices: without tensor cores the tiles are others."""
    checkpoint = checkpoints("qwen3")

    def make(**options: Any) -> LLM:
        return checkpoint.llm(**{"device": "cuda", "dtype": "float32", "deterministic": True, **options})

    prompt = many_prompts(1)[0]
    company = Company(make, checkpoint.model.config.vocab_size, prompt, 100)
    for name in PARAMS:
        expected = company.alone(PARAMS[name])
        for budget in (16384, 33):
            with company.make(max_num_batched_tokens=budget, max_num_seqs=40) as llm:
                output, _ = company.among(llm, PARAMS[name], random.Random(9), 30)
                assert_same(output, expected, f"{name}, budget {budget}")
