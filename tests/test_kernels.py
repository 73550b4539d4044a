"""Every Triton kernel against its plain-torch twin.

On a CPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported: where it was not, one
test runs this file again in a process of its own. The interpreter computes bfloat16 wrongly, so it is fed float32.
"""

import os
import subprocess
import sys

import pytest
import torch
from helpers import HANGING_S

triton = pytest.importorskip("triton")

from nanovllm.engine.input_processor import fold_seed  # noqa: E402
from nanovllm.kernels import (  # noqa: E402
    activation,
    attention_common,
    attention_decode,
    attention_invariant,
    attention_prefill,
    filtering,
    linear,
    linear_invariant,
    matmul,
    norm,
    request_state,
    rope,
    sampling,
)
from nanovllm.kernels.triton_utils import num_multiprocessors  # noqa: E402
from nanovllm.sampling_params import GREEDY_BELOW  # noqa: E402

INTERPRETED = not isinstance(norm._norm_kernel, triton.JITFunction)
NAN = float("nan")

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in test_under_the_interpreter")
TARGETS = [
    pytest.param("cpu", torch.float32, marks=needs_interpreter, id="interpreter"),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{str(dtype)[6:]}")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]
on_targets = pytest.mark.parametrize(("device", "dtype"), TARGETS)
on_fp32 = pytest.mark.parametrize(("device", "dtype"), [TARGETS[0], TARGETS[3]])
on_gpu = pytest.mark.parametrize(("device", "dtype"), TARGETS[1:2])


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGING_S)
    assert run.returncode == 0, run.stdout + run.stderr


def test_import_without_triton():
    """The package imports, and its public functions work on CPU, where Triton cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, nanovllm\n"
        "from nanovllm.kernels import activation, attention_decode, attention_prefill, norm, rope, sampling\n"
        "from nanovllm.kernels import attention_invariant, linear_invariant\n"
        "assert norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6).shape == (2, 4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGING_S)


@pytest.fixture(autouse=True)
def _fresh_inputs():
    print(f"torch.manual_seed({torch.seed()})")  # pytest shows it where a test fails


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def assert_attends(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """[T, heads, head_dim], as a part of each head's largest output: over a long context all of them are small.

    In 16 bits weights are rounded before their sum, and both outputs: 2^-7 in bfloat16, 2^-10 in float16, at worst. In
    float32 sums of 32,000 keys in two orders differ by 2^-16.
    """
    tolerance = {torch.float32: 2**-14, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    difference = (actual.float() - expected.float()).abs().amax(-1)
    share = (difference / expected.float().abs().amax(-1).clamp(min=1e-30)).max().item() if actual.numel() else 0.0
    assert share <= tolerance, f"off by {share / tolerance:.2f} of what is allowed"


# ---- elementwise ----


@on_targets
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 64), (3, 100), (2, 1024), (0, 64)])
def test_norms(device, dtype, num_tokens, hidden_size):
    x, residual = torch.randn(2, num_tokens, hidden_size + 16, device=device).to(dtype)[..., :hidden_size]  # strided
    weight = torch.randn(hidden_size, device=device).to(dtype)
    assert_close(norm.rms_norm_triton(x, weight, 1e-6), norm.rms_norm_torch(x, weight, 1e-6), dtype)
    out, total = norm.add_rms_norm_triton(x, residual, weight, 1e-6)
    expected_out, expected_total = norm.add_rms_norm_torch(x, residual, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert_close(out, expected_out, dtype)


@on_targets
def test_norm_of_partial_sums(device, dtype):
    parts = torch.randn(4, 3, 96, device=device)
    residual, weight = torch.randn(3, 96, device=device).to(dtype), torch.randn(96, device=device).to(dtype)
    out, total = norm.add_rms_norm_triton(parts, residual, weight, 1e-6)
    expected_out, expected_total = norm.add_rms_norm_torch(parts, residual, weight, 1e-6)
    assert total.dtype == dtype
    assert_close(total, expected_total, dtype)
    assert_close(out, expected_out, dtype)


@on_targets
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 16), (3, 100), (2, 1500), (0, 16)])
def test_silu_and_mul(device, dtype, num_tokens, size):
    x = (4 * torch.randn(num_tokens, 2 * size + 16, device=device)).to(dtype)[:, : 2 * size]  # strided
    assert_close(activation.silu_and_mul_triton(x), activation.silu_and_mul_torch(x), dtype)


@on_targets
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"), [(4, 2, 128, 16), (14, 2, 64, 48), (5, 1, 80, 256)]
)
def test_qk_norm_rope_store(device, dtype, with_norm, num_heads, num_kv_heads, head_dim, block_size):
    num_tokens, num_blocks, sentinel = 5, 3, 7.0
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    positions = torch.randint(0, 50, (num_tokens,), device=device)
    cos_sin = torch.randn(50, head_dim, device=device)
    weights = torch.randn(2, head_dim, device=device).to(dtype) if with_norm else (None, None)
    # Both ends of a block, both ends of the cache, and in between.
    slots = [block_size - 1, block_size, 0, num_blocks * block_size - 1, block_size + 7]
    slot_mapping = torch.tensor(slots, device=device)
    results = []
    for run in (rope.qk_norm_rope_store_triton, rope.qk_norm_rope_store_torch):
        x = qkv.clone()
        k_cache, v_cache = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), sentinel, device=device).to(
            dtype
        )
        q = run(x, positions, cos_sin, *weights, 1e-6, k_cache, v_cache, slot_mapping)
        results.append((x, q, k_cache, v_cache))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)
    x, q, k_cache, v_cache = results[0]
    assert q.data_ptr() == x.data_ptr()
    assert torch.equal(x[:, num_heads * head_dim :], qkv[:, num_heads * head_dim :])
    for cache in (k_cache, v_cache):
        flat = cache.view(-1, num_kv_heads, head_dim)
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[slots] = False
        assert (flat[untouched.to(device)] == sentinel).all()


# ---- sampling ----


def random_rows(batch_size, device):
    """Seeds of either sign and beyond 32 bits, and positions."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch_size,), device=device)
    return seeds, torch.randint(0, 40960, (batch_size,), device=device)


@pytest.fixture(params=[True, False], ids=["blocks-share-programs", "block-a-program"])
def _programs(request, monkeypatch):
    """A small chip gives a program several blocks of a row, a large one a block."""
    monkeypatch.setattr(sampling, "num_multiprocessors", lambda device: 1 if request.param else 10**6)


@on_targets
@pytest.mark.usefixtures("_programs")
@pytest.mark.parametrize("vocab_size", [1, 1023, 1024, 1025, 5000])
def test_gumbel_max(device, dtype, vocab_size):
    batch_size = 5
    logits = (3 * torch.randn(batch_size, vocab_size + 8, device=device)).to(dtype)[:, :vocab_size]  # strided
    temperatures = torch.tensor([0.0, 1.0, 0.6, 1e-6, 2.0], device=device)
    rows = random_rows(batch_size, device)
    scores, token_ids = sampling.gumbel_max_triton(logits, temperatures, *rows)
    expected_scores, expected_ids = sampling.gumbel_max_torch(logits, temperatures, *rows)
    assert torch.equal(token_ids, expected_ids)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)


@on_targets
def test_the_only_token_left_is_drawn(device, dtype):
    """Also by the 128 highest hashes of 2³², whose uniform number would round to 1, and the noise be -inf."""
    logits = torch.full((1, 10), float("-inf"), device=device, dtype=dtype)
    logits[0, 7] = 1.0
    seed, position = torch.tensor([fold_seed(9674830, 0)], device=device), torch.tensor([2], device=device)
    key0, key1 = sampling.row_keys(seed, position)
    assert int(sampling.mix32(sampling.mix32((7 + key0) & sampling.U32) ^ key1)) >= 2**32 - 128
    for run in (sampling.gumbel_max_torch, sampling.gumbel_max_triton):
        score, token_id = run(logits, torch.ones(1, device=device), seed, position)
        assert token_id.item() == 7
        assert score.isfinite()


ALL = 10**9
FILTERS = {
    "top_k": ([1, 3, 40, ALL, 700, 2], [1.0] * 6, [0.0] * 6),
    "top_p": ([ALL] * 6, [0.9, 0.3, 1.0, 1e-7, 0.999, 0.5], [0.0] * 6),
    "min_p": ([ALL] * 6, [1.0] * 6, [0.1, 1.0, 1e-4, 0.0, 0.5, 0.02]),
    "top_k and top_p": ([ALL, 5, 1, 60, 200, 33], [0.5, 1.0, 0.7, 0.95, 1e-4, 0.9], [0.0] * 6),
    "all": ([ALL, 5, 1, 600, 20, 130], [0.5, 1.0, 0.7, 0.95, 1.0, 0.9], [0.1, 0.0, 0.5, 1e-3, 0.9, 0.3]),
}


def make_filters(vocab_size, top_k, top_p, min_p, device):
    top_k = torch.as_tensor(top_k, device=device).clamp(max=vocab_size)
    top_p = torch.as_tensor(top_p, dtype=torch.float64, device=device)
    return filtering.Filters(top_k, top_p, torch.as_tensor(min_p, dtype=torch.float32, device=device))


@on_fp32
@pytest.mark.parametrize("vocab_size", [2, 63, 1000, 4097])
@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_filtered_argmax(device, dtype, vocab_size, kind, spread):
    """Of rows with many equal logits, some of them zeros of either sign, and with tokens that are out already.

    Where logits are flat the tokens that top-p leaves are too many to be looked at alone.
    """
    logits = (spread * torch.randn(6, vocab_size, device=device)).bfloat16().to(dtype)
    logits[1] = logits[1].round().copysign(torch.randn(vocab_size, device=device))
    logits[2, 1::3] = float("-inf")
    filters = make_filters(vocab_size, *FILTERS[kind], device)
    temperatures = torch.tensor([1.0, 0.7, 1.3, GREEDY_BELOW, 0.6, 2.0], device=device)
    rows = torch.tensor([4, 0, 2, 1, 5, 3], device=device)
    num_kept = (filtering.apply_filters(logits[rows], temperatures[rows], filters) > float("-inf")).sum(-1)
    assert num_kept.min() >= 1
    assert kind != "top_p" or spread > 1 or vocab_size < 4000 or num_kept.max() > filtering.MAX_CANDIDATES
    for _ in range(3):
        draws = temperatures, *random_rows(6, device), filters
        expected = filtering.filtered_argmax_torch(logits, rows, *draws)
        assert torch.equal(filtering.filtered_argmax_triton(logits, rows, *draws), expected)


@on_fp32
@pytest.mark.parametrize("vocab_size", [40, 700])  # few enough to be looked at alone, and not
def test_of_equals_at_the_edge_of_top_p_the_highest_ids_stay(device, dtype, vocab_size):
    num_rows = 16
    logits = torch.full((num_rows, vocab_size), 2.5, device=device, dtype=dtype)
    filters = make_filters(vocab_size, [ALL] * num_rows, [0.6] * num_rows, [0.0] * num_rows, device)
    draws = torch.ones(num_rows, device=device), *random_rows(num_rows, device), filters
    rows = torch.arange(num_rows, device=device)
    drawn = filtering.filtered_argmax_triton(logits, rows, *draws)
    assert torch.equal(drawn, filtering.filtered_argmax_torch(logits, rows, *draws))
    assert drawn.min() >= vocab_size * 4 // 10
    kept = filtering.apply_filters(logits, draws[0], filters) > float("-inf")
    assert (kept.sum(-1) == vocab_size * 6 // 10).all()
    assert len(drawn.unique()) > 5


@on_targets
def test_filtered_argmax_of_unsound_rows(device, dtype):
    logits = torch.randn(7, 700, device=device, dtype=dtype)
    logits[1, 300] = float("nan")
    logits[2, 3] = float("inf")
    logits[3] = float("-inf")
    logits[4] = float("-inf")
    logits[4, 699] = -1e4  # the one token that is left
    logits[6] = torch.finfo(dtype).min  # finite, but no longer when the temperature has divided it
    filters = make_filters(700, [20] * 5 + [700] * 2, [0.9] * 7, [0.01] * 7, device)
    rows, temperatures = torch.arange(7, device=device), torch.full((7,), 0.7, device=device)
    for run in (filtering.filtered_argmax_triton, filtering.filtered_argmax_torch):
        drawn = run(logits, rows, temperatures, rows, rows, filters)
        assert drawn[1:5].tolist() == [-1, -1, -1, 699]
        assert min(drawn[0], drawn[5]) >= 0
        assert (drawn[6] == -1) == (dtype != torch.float16)


@on_gpu
def test_filtered_argmax_of_a_full_vocabulary(device, dtype):
    """A row's draw does not depend on the others."""
    vocab_size, num_rows = 151_936, 130
    logits = 3 * torch.randn(num_rows, vocab_size, device=device, dtype=dtype)
    values = [(20, 0.95, 0.0), (1000, 1.0, 0.0), (ALL, 0.9, 0.0), (ALL, 1.0, 0.02), (50, 0.2, 0.1), (5000, 0.99, 0.0)]
    filters = make_filters(vocab_size, *zip(*(values * 22)[:num_rows]), device)
    rows, temperatures = torch.arange(num_rows, device=device), torch.full((num_rows,), 1.3, device=device)
    kept = filtering.apply_filters(logits.float(), temperatures, filters)
    for _ in range(10):
        seeds, positions = random_rows(num_rows, device)
        drawn = filtering.filtered_argmax(logits, rows, temperatures, seeds, positions, filters)
        assert torch.equal(drawn, sampling.gumbel_argmax(kept, temperatures, seeds, positions))
        for part in (slice(0, 1), slice(3, 40), slice(66, 130)):
            own = filtering.Filters(*(values[part] for values in filters))
            of_part = filtering.filtered_argmax(logits, rows[part], temperatures, seeds, positions, own)
            assert torch.equal(of_part, drawn[part])


@on_targets
def test_gumbel_noise_is_the_twins(device, dtype):
    """Logits that leave out all but one token: its score is its noise."""
    batch_size, vocab_size = 24, 1200
    logits = torch.full((batch_size, vocab_size), float("-inf"), device=device, dtype=dtype)
    tokens = torch.randint(0, vocab_size, (batch_size,), device=device)
    logits[torch.arange(batch_size, device=device), tokens] = 0
    seeds, positions = random_rows(batch_size, device)
    scores, token_ids = sampling.gumbel_max_triton(logits, torch.ones(batch_size, device=device), seeds, positions)
    noise = sampling.gumbel_noise_torch(seeds, positions, tokens[:, None])[:, 0]
    assert torch.equal(token_ids, tokens)
    torch.testing.assert_close(scores, noise, rtol=1e-5, atol=1e-5)


@on_targets
def test_gumbel_max_of_shards(device, dtype):
    batch_size, vocab_size, cut = 4, 2100, 1050
    logits = torch.randn(batch_size, vocab_size, device=device).to(dtype)
    rows = torch.tensor([0.0, 1.0, 0.5, 3.0], device=device), *random_rows(batch_size, device)
    scores, token_ids = sampling.gumbel_max_triton(logits, *rows)
    (scores0, ids0), (scores1, ids1) = (
        sampling.gumbel_max_triton(logits[:, :cut], *rows),
        sampling.gumbel_max_triton(logits[:, cut:], *rows, first_token_id=cut),
    )
    assert torch.equal(torch.where(scores1 > scores0, ids1, ids0), token_ids)
    assert torch.equal(torch.maximum(scores0, scores1), scores)


@on_targets
@pytest.mark.usefixtures("_programs")
def test_gumbel_argmax_ends(device, dtype):
    """Ties, and rows without a finite maximum."""
    inf, vocab_size = float("inf"), 3000
    cases = [  # what replaces zeros of an otherwise equal row, temperature, expected
        ({2999: 1.0, 1024: 1.0, 1500: 1.0}, 0.0, 1024),  # across blocks
        ({17: 1.0, 16: 1.0}, 0.0, 16),  # neighbours
        ({}, 0.0, 0),
        ({5: inf}, 0.0, -1),
        ({5: inf}, 1.0, -1),
        ({2999: NAN}, 0.0, -1),
        ({0: NAN}, 1.0, -1),
        ({5: -inf, 7: 2.0}, 0.0, 7),
        (dict.fromkeys(range(vocab_size), -inf), 0.0, -1),
        (dict.fromkeys(range(vocab_size), -inf), 1.0, -1),
        ({i: -inf for i in range(vocab_size) if i != 2222}, 1.0, 2222),
    ]
    logits = torch.zeros(len(cases), vocab_size)
    for row, (values, _, _) in zip(logits, cases, strict=True):
        row[list(values)] = torch.tensor(list(values.values()))
    temperatures = torch.tensor([temperature for _, temperature, _ in cases], device=device)
    rows = random_rows(len(cases), device)
    logits = logits.to(device, dtype)
    expected = [token_id for _, _, token_id in cases]
    assert sampling.gumbel_max_triton(logits, temperatures, *rows)[1].tolist() == expected
    assert sampling.gumbel_max_torch(logits, temperatures, *rows)[1].tolist() == expected


@on_gpu
def test_gumbel_max_of_a_full_vocabulary(device, dtype):
    for batch_size in (1, 64, 256):
        logits = torch.randn(batch_size, 151936, device=device).to(dtype)
        temperatures = torch.rand(batch_size, device=device)
        rows = random_rows(batch_size, device)
        _, token_ids = sampling.gumbel_max_triton(logits, temperatures, *rows)
        assert torch.equal(token_ids, sampling.gumbel_max_torch(logits, temperatures, *rows)[1])


# ---- attention ----


def make_cache(context_lens, num_kv_heads, head_dim, block_size, device, dtype):
    """Random keys and values in shuffled pages, NaN in every slot and impossible pages in every entry beyond."""
    counts = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(counts) + 2
    pages = torch.randperm(num_blocks).tolist()
    block_tables = torch.full((len(context_lens), max(counts, default=0) + 1), -(2**30), dtype=torch.int32)
    caches = torch.full((2, num_blocks * block_size, num_kv_heads, head_dim), NAN)
    for row, (length, count) in enumerate(zip(context_lens, counts, strict=True)):
        table = torch.tensor([pages.pop() for _ in range(count)], dtype=torch.long)
        block_tables[row, :count] = table
        slots = (table[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
        caches[:, slots] = torch.randn(2, length, num_kv_heads, head_dim)
    k_cache, v_cache = caches.view(2, num_blocks, block_size, num_kv_heads, head_dim).to(device, dtype)
    return k_cache, v_cache, block_tables.to(device), torch.tensor(context_lens, dtype=torch.int32, device=device)


def make_queries(num_tokens, num_heads, head_dim, device, dtype):
    """Rows strided as views of a qkv product are."""
    return torch.randn(num_tokens, num_heads + 2, head_dim, device=device).to(dtype)[:, :num_heads]


DECODE_CASES = [  # context_lens, num_heads, num_kv_heads, head_dim, block_size
    ([1, 15, 16, 17, 0, 63, 64, 65, 200], 2, 2, 64, 16),  # around pages and blocks
    ([1, 255, 256, 257], 4, 2, 128, 256),  # pages of several blocks
    ([300, 1], 4, 1, 64, 32),
    ([129, 47, 48, 49], 5, 1, 64, 48),  # pages that blocks straddle
    ([1200], 16, 2, 64, 64),  # one sequence in more items than are merged at a time
    ([2200, *[1] * 8], 16, 1, 64, 64),  # the same in a batch of more rows
    ([1, 500, 1], 20, 1, 32, 16),  # more heads a group than tl.dot's least rows
]


@on_targets
@pytest.mark.parametrize(("context_lens", "num_heads", "num_kv_heads", "head_dim", "block_size"), DECODE_CASES)
def test_decode(device, dtype, context_lens, num_heads, num_kv_heads, head_dim, block_size):
    cache = make_cache(context_lens, num_kv_heads, head_dim, block_size, device, dtype)
    q = make_queries(len(context_lens), num_heads, head_dim, device, dtype)
    out = torch.full_like(q, NAN, memory_format=torch.contiguous_format)
    max_context_len = max(context_lens)
    actual = attention_decode.paged_attention_decode_triton(q, *cache, head_dim**-0.5, max_context_len, out=out)
    expected = attention_decode.paged_attention_decode_torch(q, *cache, head_dim**-0.5, max_context_len)
    assert actual is out
    assert_attends(actual, expected, dtype)
    assert (actual[torch.tensor(context_lens) == 0] == 0).all()


@on_targets
def test_decode_shares_a_plan(device, dtype):
    """Layer after layer with one plan, whose counts of arrivals must be 0 again after each."""
    context_lens, head_dim = [400, 3, 130], 64
    plan = None
    for _ in range(3):
        cache = make_cache(context_lens, 2, head_dim, 16, device, dtype)
        q = make_queries(len(context_lens), 4, head_dim, device, dtype)
        plan = plan or attention_decode.plan_decode(cache[3], 4, 2, head_dim, 400)
        plan.partial_out.fill_(NAN)
        actual = attention_decode.paged_attention_decode_triton(q, *cache, head_dim**-0.5, 400, plan=plan)
        assert_attends(actual, attention_decode.paged_attention_decode_torch(q, *cache, head_dim**-0.5, 400), dtype)
        assert not plan.arrivals.any()


@on_targets
@pytest.mark.parametrize(
    ("context_lens", "num_kv_heads", "max_context_len"),
    [
        ([1], 8, 40960),
        ([40960], 8, 40960),
        ([40960, *[1] * 63], 8, 40960),
        ([0, 0, 0], 8, 4096),
        ([1024] * 300, 8, 4096),  # more sequences than the planner's tile
        ([5, 300] * 520, 2, 300),  # more than are put in order
        (list(range(0, 4096, 13)), 1, 4096),
        ([127, 128, 129, 257], 2, 257),
        # As many items as there can be: each context is longer than all that are shorter together.
        ([4**i for i in range(12)], 8, 4**11),
        ([int(1.2**i) for i in range(64)], 8, 10**6),
    ],
)
def test_plan(device, dtype, context_lens, num_kv_heads, max_context_len):
    """Items cover every context once, the longest first, in whole blocks; none is longer than a share of the rest."""
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    plan = attention_decode.plan_decode(lens, num_kv_heads, num_kv_heads, 16, max_context_len)
    items = plan.items[:, :5].tolist()
    used = next((i for i, item in enumerate(items) if item[0] < 0), len(items))
    assert all(item[0] == -1 for item in items[used:])
    num_shares = attention_common.PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(lens.device) / num_kv_heads
    shortest = max(sum(context_lens) / (attention_common.PARTS * len(lens)), attention_decode.MIN_ITEM_LEN)
    block, expected, left, order = attention_decode.block_len(16), 0, sum(context_lens), []
    while expected < used:
        seq, num_items = items[expected][0], items[expected][4]
        longest = max(left / num_shares, shortest)
        position = 0
        for item, (row, begin, end, first_item, count) in enumerate(items[expected : expected + num_items], expected):
            assert (row, begin, first_item, count) == (seq, position, expected, num_items)
            assert begin % block == 0
            assert end - begin <= longest + block
            assert end > begin or context_lens[seq] == 0
            assert item < used
            position = end
        assert position == context_lens[seq]
        order.append(seq)
        left -= context_lens[seq]
        expected += num_items
    assert sorted(order) == list(range(len(context_lens)))
    if len(context_lens) <= attention_common.MAX_SORTED:
        assert order == sorted(order, key=lambda seq: -context_lens[seq])  # a stable sort
    else:
        assert order == sorted(order)
    assert expected == used
    assert not plan.arrivals.any()


PREFILL_CASES = [  # query lengths, context_lens, num_heads, num_kv_heads, head_dim, block_size
    ([1, 17, 3, 63, 0, 65], [1, 17, 90, 64, 7, 150], 2, 2, 64, 16),  # whole prompts, chunks, prefixes, nothing
    ([2, 70], [257, 256], 4, 2, 128, 256),
    ([33, 1], [33, 300], 4, 1, 64, 32),
    ([30, 5, 48], [49, 48, 48], 5, 1, 64, 48),  # a token's heads lie in two tiles; pages that blocks straddle
    ([20], [200], 16, 2, 64, 64),
]


@on_targets
@pytest.mark.parametrize("config", [None, (128, 64, 8, 3)])
@pytest.mark.parametrize(
    ("q_lens", "context_lens", "num_heads", "num_kv_heads", "head_dim", "block_size"), PREFILL_CASES
)
def test_prefill(device, dtype, config, q_lens, context_lens, num_heads, num_kv_heads, head_dim, block_size):
    if config and device == "cuda" and dtype == torch.float32:
        pytest.skip("a tile for 16 bits")
    cache = make_cache(context_lens, num_kv_heads, head_dim, block_size, device, dtype)
    skipped = 3  # rows of a mixed batch that are another kernel's
    cu_seqlens_q = torch.tensor([skipped, *q_lens], device=device).cumsum(0, dtype=torch.int32)
    q = make_queries(skipped + sum(q_lens), num_heads, head_dim, device, dtype)
    out = torch.full_like(q, NAN, memory_format=torch.contiguous_format)
    args = q, *cache[:3], cu_seqlens_q, cache[3], head_dim**-0.5, max(q_lens)
    actual = attention_prefill.paged_attention_prefill_triton(*args, out=out, config=config)
    assert actual is out
    assert out[:skipped].isnan().all()
    assert_attends(out[skipped:], attention_prefill.paged_attention_prefill_torch(*args)[skipped:], dtype)


@pytest.mark.parametrize("shared_bytes", [227 * 1024, 163 * 1024, 99 * 1024])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_every_tile_of_queries_that_is_chosen_can_be_launched(head_dim, shared_bytes, monkeypatch):
    """On an H100, an A100, and on what most other cards have."""
    monkeypatch.setattr(attention_prefill, "shared_memory_bytes", lambda device: shared_bytes)
    chosen = set()
    for num_tokens in (1, 64, 512, 16384):
        for group in (1, 2, 8):
            q = torch.empty(num_tokens, 8 * group, head_dim, dtype=torch.bfloat16, device="meta")
            chosen.add(attention_prefill.choose_config(q, num_tokens, 8))
    assert max(attention_prefill.tile_bytes(tile, head_dim) for tile in chosen) <= shared_bytes
    if shared_bytes == 227 * 1024 and head_dim <= 128:
        assert chosen == {(64, 128, 4, 3), (128, 64, 8, 3)}


@on_targets
def test_prefill_of_single_queries_is_decode(device, dtype):
    context_lens, head_dim = [1, 64, 130], 64
    cache = make_cache(context_lens, 2, head_dim, 16, device, dtype)
    q = make_queries(3, 4, head_dim, device, dtype)
    cu_seqlens_q = torch.arange(4, dtype=torch.int32, device=device)
    prefilled = attention_prefill.paged_attention_prefill_triton(
        q, *cache[:3], cu_seqlens_q, cache[3], head_dim**-0.5, 1
    )
    decoded = attention_decode.paged_attention_decode_triton(q, *cache, head_dim**-0.5, max(context_lens))
    assert_attends(prefilled, decoded, dtype)


LONG_CASES = [  # query lengths, context_lens, num_heads, num_kv_heads, head_dim, block_size
    ([1, 1, 1, 1, 1, 1], [4095, 4096, 4097, 12_345, 32_000, 3], 16, 8, 128, 256),
    ([1], [40_000], 32, 8, 128, 16),
    ([1] * 24, [3000 + 17 * i for i in range(24)], 14, 2, 64, 64),
    ([300, 1000, 33], [4097, 9000, 32_000], 32, 8, 128, 256),
    ([257, 64], [8192, 8191], 14, 2, 64, 16),
]


@pytest.mark.parametrize(("device", "dtype"), TARGETS[1:])
@pytest.mark.parametrize(("q_lens", "context_lens", "num_heads", "num_kv_heads", "head_dim", "block_size"), LONG_CASES)
def test_long_contexts(device, dtype, q_lens, context_lens, num_heads, num_kv_heads, head_dim, block_size):
    cache = make_cache(context_lens, num_kv_heads, head_dim, block_size, device, dtype)
    q = make_queries(sum(q_lens), num_heads, head_dim, device, dtype)
    out = torch.full_like(q, NAN, memory_format=torch.contiguous_format)
    if max(q_lens) == 1:
        args = q, *cache, head_dim**-0.5, max(context_lens)
        attention_decode.paged_attention_decode_triton(*args, out=out)
        expected = attention_decode.paged_attention_decode_torch(*args)
    else:
        cu_seqlens_q = torch.tensor([0, *q_lens], device=device).cumsum(0, dtype=torch.int32)
        args = q, *cache[:3], cu_seqlens_q, cache[3], head_dim**-0.5, max(q_lens)
        attention_prefill.paged_attention_prefill_triton(*args, out=out)
        expected = attention_prefill.paged_attention_prefill_torch(*args)
    assert_attends(out, expected, dtype)


@on_gpu
def test_decode_repeats_exactly(device, dtype):
    """Whichever program merges, partial results are added in one order; and none is read before it is written."""
    context_lens = torch.randint(1, 3000, (48,)).tolist()
    cache = make_cache(context_lens, 8, 128, 16, device, dtype)
    q = make_queries(48, 16, 128, device, dtype)
    first = attention_decode.paged_attention_decode_triton(q, *cache, 128**-0.5, 3000)
    plan = attention_decode.plan_decode(cache[3], 16, 8, 128, 3000)
    for _ in range(200):
        plan.partial_out.fill_(NAN)
        plan.partial_lse.fill_(NAN)
        again = attention_decode.paged_attention_decode_triton(q, *cache, 128**-0.5, 3000, plan=plan)
        assert torch.equal(first, again)


@on_gpu
def test_decode_in_a_cuda_graph(device, dtype):
    """One graph for all lengths up to the maximum it was captured with."""
    batch_size, block_size, max_context_len = 4, 16, 4096
    k_cache, v_cache, block_tables, context_lens = make_cache(
        [max_context_len] * batch_size, 2, 64, block_size, device, dtype
    )
    q = make_queries(batch_size, 4, 64, device, dtype)
    args = q, k_cache, v_cache, block_tables, context_lens, 0.125, max_context_len
    attention_decode.paged_attention_decode_triton(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_decode.paged_attention_decode_triton(*args)
    for lens in ([1, 1, 1, 1], [4096, 1, 0, 17], [4096] * 4, [100, 2000, 300, 4000]):
        context_lens.copy_(torch.tensor(lens))
        out.fill_(NAN)
        graph.replay()
        assert_attends(out, attention_decode.paged_attention_decode_torch(*args), dtype)


# ---- products of few rows ----


@on_targets
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("outputs", "depth"), [(64, 96), (16, 128), (48, 1000)])
def test_norm_gemv(device, dtype, outputs, depth, has_residual, gated):
    x, residual = torch.randn(2, 1, depth, device=device).to(dtype)
    norm_weight = torch.rand(depth, device=device).to(dtype)
    weight = (torch.randn(outputs, depth, device=device) * depth**-0.5).to(dtype)
    inputs = (x, residual if has_residual else None, norm_weight, 1e-6, weight, gated)
    out, total = linear.norm_gemv_triton(*inputs)
    expected_out, expected_total = linear.norm_linear_torch(*inputs)
    assert_close(out, expected_out, dtype)
    assert torch.equal(total, expected_total)
    assert_close(linear.gemv_triton(x, weight), x @ weight.T, dtype)


# float32 products of several rows stay with cuBLAS on a GPU, since tl.dot rounds to tf32.
@pytest.mark.parametrize(("device", "dtype"), TARGETS[:3])
@pytest.mark.parametrize(
    ("num_tokens", "block_m", "num_splits", "gated", "by_tma"),
    [
        (2, 16, 1, False, False), (5, 16, 2, False, False), (16, 16, 1, True, False), (17, 32, 4, False, False),
        (32, 32, 1, True, False), (64, 64, 1, True, False), (63, 64, 2, False, False), (33, 64, 1, False, True),
        (64, 64, 1, True, True), (65, 64, 2, False, True), (128, 64, 4, False, True), (129, 128, 2, False, True),
        (130, 64, 1, False, True), (190, 64, 2, False, True), (129, 64, 1, True, True),
    ],
)  # fmt: skip
def test_matmul(device, dtype, num_tokens, block_m, num_splits, gated, by_tma):
    if by_tma and matmul.TensorDescriptor is None:
        pytest.skip("this Triton has no tensor descriptors: they came with 3.4")
    x = torch.randn(num_tokens, 528, device=device).to(dtype)[:, :512]  # strided rows
    weight = (torch.randn(128, 512, device=device) * 512**-0.5).to(dtype)
    tiling = matmul.Tiling(block_m, num_splits, 2, by_tma)
    out = matmul.matmul(x, weight, tiling, gated)
    assert_close(out, matmul.matmul_torch(x, weight, tiling, gated), torch.float16 if num_splits > 1 else dtype)
    if num_splits == 1:
        target = torch.full_like(out, NAN)
        assert matmul.matmul(x, weight, tiling, gated, out=target) is target
        assert torch.equal(target, out)
        assert matmul.matmul_torch(x, weight, tiling, gated, target.fill_(NAN)) is target
        assert_close(target, out, dtype)
        return
    # The norm that follows adds them up.
    residual, norm_weight = (
        torch.randn(num_tokens, 128, device=device).to(dtype),
        torch.rand(128, device=device).to(dtype),
    )
    normed, total = norm.add_rms_norm_triton(out, residual, norm_weight, 1e-6)
    expected_out, expected_total = norm.add_rms_norm_torch(out, residual, norm_weight, 1e-6)
    assert_close(normed, expected_out, dtype)
    assert_close(total, expected_total, dtype)


@on_gpu
@pytest.mark.parametrize(("num_tokens", "by_lt"), [(64, False), (65, True), (191, True), (192, False), (257, False)])
def test_deep_products_by_cublaslt(device, dtype, num_tokens, by_lt):
    x = torch.randn(num_tokens, 1024, device=device).to(dtype)
    weight = (torch.randn(72, 1024, device=device) / 32).to(dtype)  # 72: no kernel of ours takes it
    before = linear.no_bias.cache_info()
    out = linear.linear(x, weight)
    assert_close(out, x @ weight.T, dtype)
    after = linear.no_bias.cache_info()
    assert (after.hits + after.misses > before.hits + before.misses) == by_lt
    target = torch.full_like(out, NAN)
    assert linear.linear(x, weight, out=target) is target
    assert_close(target, out, dtype)


@on_gpu
@pytest.mark.parametrize(
    ("kind", "outputs", "depth"),
    [
        ("wide", 4096, 1024), ("wide", 6144, 4096), ("gated", 6144, 1024), ("gated", 24576, 4096),
        ("narrow", 1024, 2048), ("narrow", 1024, 3072), ("narrow", 4096, 4096), ("narrow", 4096, 12288),
        ("whole", 4096, 2048), ("whole", 4096, 6144), ("wide", 3072, 4096), ("gated", 12288, 4096),
    ],
)  # fmt: skip
def test_products_as_they_are_chosen(device, dtype, kind, outputs, depth, monkeypatch):
    """Of Qwen3-0.6B and 8B, of 8B on two GPUs, against float32: at both ends of whatever is cut by rows."""
    tilings: list[matmul.Tiling] = []

    def noting(x: torch.Tensor, weight: torch.Tensor, tiling: matmul.Tiling, *args, **kwargs):
        tilings.append(tiling)
        return matmul.matmul(x, weight, tiling, *args, **kwargs)

    monkeypatch.setattr(linear, "matmul", noting)
    weight = (torch.randn(outputs, depth, device=device) * depth**-0.5).to(dtype)
    wide_weight, norm_weight = weight.float(), torch.rand(depth, device=device).to(dtype)
    rows = [1, 2, 15, 16, 17, 32, 33, 40, 63, 64, 65, 72, 127, 128, 129, 136, 191, 192, 193, 224, 255, 256, 257]
    for num_tokens in rows:
        x = torch.randn(num_tokens, depth, device=device).to(dtype)
        if kind in ("wide", "gated"):
            actual, _ = linear.norm_linear(x, None, norm_weight, 1e-6, weight, gated=kind == "gated")
            expected = norm.rms_norm_torch(x, norm_weight, 1e-6).float() @ wide_weight.T
            if kind == "gated":
                gate, up = expected.chunk(2, -1)
                expected = torch.nn.functional.silu(gate) * up
        else:
            actual = linear.linear_partial(x, weight) if kind == "narrow" else linear.linear(x, weight)
            actual = actual.float().sum(0) if actual.dim() == 3 else actual
            expected = x.float() @ wide_weight.T
        bound = 2**-6 * (expected.abs() + expected.square().mean().sqrt())
        assert ((actual.float() - expected).abs() <= bound).all(), num_tokens
    assert len(tilings) > 5
    assert (max(tiling.num_splits for tiling in tilings) > 1) == (kind == "narrow")


@pytest.mark.parametrize(("outputs", "depth"), [(4096, 1024), (1024, 3072), (24576, 4096), (4096, 12288), (1152, 896)])
@pytest.mark.parametrize(("gated", "can_split"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shared_bytes", [227 * 1024, 99 * 1024, 64 * 1024])
def test_every_tiling_that_is_chosen_can_be_launched(outputs, depth, gated, can_split, shared_bytes, monkeypatch):
    monkeypatch.setattr(matmul, "shared_memory_bytes", lambda device: shared_bytes)
    monkeypatch.setattr(matmul, "use_triton", lambda x: True)
    monkeypatch.setattr(matmul, "has_pdl", lambda: True)
    monkeypatch.setattr(matmul, "has_tma", lambda: True)
    weight, num_chosen = torch.empty(outputs, depth, dtype=torch.bfloat16), 0
    for num_tokens in range(1, 300):
        tiling = matmul.choose_tiling(torch.empty(num_tokens, depth, dtype=torch.bfloat16), weight, gated, can_split)
        if tiling is None:
            continue
        num_chosen += 1
        assert 2 <= num_tokens <= 256
        assert outputs % matmul.BLOCK_N == 0 == depth % (matmul.BLOCK_K * tiling.num_splits)
        assert tiling.num_splits == 1 or (can_split and not gated)
        assert (matmul.BLOCK_N + tiling.block_m) * matmul.BLOCK_K * 2 * tiling.num_stages <= shared_bytes - 1024
        assert 2 <= tiling.num_stages <= depth // tiling.num_splits // matmul.BLOCK_K
    assert num_chosen > 20 or shared_bytes < 227 * 1024


# ---- batch-invariant attention and products ----


@pytest.fixture
def _even_products(monkeypatch):
    """The interpreter's tl.dot is numpy's product, whose BLAS rounds a row by its place. A matrix unit does not."""
    if INTERPRETED:
        multiply = lambda a, b, dtype: (a[:, :, None] * b[None]).sum(1, dtype=dtype)  # noqa: E731
        monkeypatch.setattr("numpy.matmul", multiply)


def invariant_attention(q, cache, q_lens, num_decodes, scale):
    """The kernel on a batch whose first num_decodes sequences have one query each; rows of an idle split are NaN."""
    num_tokens, num_heads, head_dim = q.shape
    cu_seqlens_q = torch.tensor([0, *q_lens], device=q.device).cumsum(0, dtype=torch.int32)
    plan = attention_invariant.plan_invariant(
        cu_seqlens_q if num_decodes < len(q_lens) else None,
        cache[3], num_decodes, num_tokens, num_heads, cache[0].shape[2], head_dim, max(cache[3].tolist()),
    )  # fmt: skip
    for partial in (plan.partial_m, plan.partial_l, plan.partial_out):
        partial.fill_(NAN)
    out = attention_invariant.paged_attention_invariant_triton(q, *cache, scale, plan)
    assert not plan.arrivals.any()  # the next layer's counts begin at 0
    return out, plan


INVARIANT_CASES = [  # decodes, query lengths, context_lens, num_heads, num_kv_heads, head_dim, block_size
    (4, [1, 1, 1, 1, 17, 3, 63, 65], [600, 1, 257, 256, 17, 300, 64, 520], 4, 2, 64, 16),
    (2, [1, 1, 30, 5], [1300, 255, 49, 48], 5, 1, 64, 48),  # rows of a tile to spare; pages that blocks straddle
    (0, [70, 3], [256, 3], 4, 2, 32, 256),
    (3, [1, 1, 1], [1, 513, 512], 20, 1, 32, 32),  # more heads a group than tl.dot's least rows
]


@on_targets
@pytest.mark.parametrize(
    ("num_decodes", "q_lens", "context_lens", "num_heads", "num_kv_heads", "head_dim", "block_size"), INVARIANT_CASES
)
def test_invariant_attention(
    device, dtype, num_decodes, q_lens, context_lens, num_heads, num_kv_heads, head_dim, block_size
):
    cache = make_cache(context_lens, num_kv_heads, head_dim, block_size, device, dtype)
    q = make_queries(sum(q_lens), num_heads, head_dim, device, dtype)
    out, plan = invariant_attention(q, cache, q_lens, num_decodes, head_dim**-0.5)
    assert (plan.items[:, 4] > 1).any().item() == any(n > attention_invariant.SPLIT for n in context_lens[:num_decodes])
    cu_seqlens_q = torch.tensor([0, *q_lens], device=device).cumsum(0, dtype=torch.int32)
    args = q, *cache[:3], cu_seqlens_q, cache[3], head_dim**-0.5
    expected = attention_prefill.paged_attention_prefill_torch(*args, max(q_lens))
    assert_attends(out, expected, dtype)
    assert_attends(attention_invariant.paged_attention_invariant_torch(*args), expected, dtype)


@on_targets
@pytest.mark.usefixtures("_even_products")
def test_decoding_is_a_prompt_to_the_bit(device, dtype, monkeypatch):
    """A token's attention as a decode, cut into items or not, and at any place of a prompt's tile."""
    length, head_dim, scale = 600, 32, 32**-0.5
    k_cache, v_cache, table, _ = make_cache([length], 1, head_dim, 16, device, dtype)
    q = make_queries(length, 2, head_dim, device, dtype)

    def attend(queries, ends, q_lens, num_decodes):
        context_lens = torch.tensor(ends, dtype=torch.int32, device=device)
        cache = k_cache, v_cache, table.expand(len(ends), -1).contiguous(), context_lens
        return invariant_attention(queries, cache, q_lens, num_decodes, scale)

    whole, _ = attend(q, [length], [length], 0)
    for start, end in [(0, 300), (300, 301), (301, 307), (511, 514), (593, 600)]:  # chunks
        chunk, _ = attend(q[start:end], [end], [end - start], 0)
        assert torch.equal(chunk, whole[start:end]), (start, end)
    # As decodes: cut into as many items as there are splits, or hardly, since the chip is full.
    for multiprocessors, num_items, positions in [
        (132, 3, [0, 1, 63, 64, 255, 256, 300, 511, 512, 599]),
        (1, 2, [560, 570, 580, 599]),
    ]:
        monkeypatch.setattr(attention_common, "num_multiprocessors", lambda _, count=multiprocessors: count)
        count = len(positions)
        decoded, plan = attend(q[positions], [position + 1 for position in positions], [1] * count, count)
        assert plan.items[:, 4].max() == num_items
        assert torch.equal(decoded, whole[positions]), positions


@on_targets
@pytest.mark.usefixtures("_even_products")
@pytest.mark.parametrize(("num_tokens", "outputs", "depth"), [(1, 100, 80), (17, 293, 48), (130, 64, 128)])
def test_invariant_product(device, dtype, num_tokens, outputs, depth):
    x, bias = torch.randn(num_tokens, depth, device=device).to(dtype), torch.randn(outputs, device=device).to(dtype)
    weight = (torch.randn(outputs, depth, device=device) * depth**-0.5).to(dtype)
    for b in (bias, None):
        out = linear_invariant.linear_invariant_triton(x, weight, b)
        expected = torch.nn.functional.linear(x.float(), weight.float(), None if b is None else b.float())
        assert_close(out, expected, dtype)
        for row in {0, num_tokens // 2, num_tokens - 1}:
            alone = linear_invariant.linear_invariant_triton(x[row : row + 1], weight, b)
            assert torch.equal(alone, out[row : row + 1])


# ---- permanent rows ----


@on_targets
@pytest.mark.parametrize(("max_blocks", "block_size", "num_rows"), [(5, 16, 8), (1, 256, 150), (1030, 1, 8)])
def test_rows(device, dtype, max_blocks, block_size, num_rows, monkeypatch):
    last_token = torch.randint(-1, 50, (num_rows + 1,), device=device)
    num_cached = torch.randint(0, max_blocks * block_size, (num_rows + 1,), device=device)
    num_cached[-1] = 0
    tables = torch.randint(0, 10**6, (num_rows + 1, max_blocks), dtype=torch.int32, device=device)
    rows = torch.cat([torch.randperm(num_rows)[3:], torch.tensor([num_rows, num_rows])]).to(device)  # the last row pads
    temperatures, seeds = torch.rand(num_rows + 1, device=device), random_rows(num_rows + 1, device)[0]
    tokens = torch.arange(len(rows), device=device)
    results = []
    for use_triton in (False, True):
        monkeypatch.setattr(request_state, "use_triton", lambda _, use_triton=use_triton: use_triton)
        gathered = request_state.gather_rows(rows, last_token, num_cached, tables, temperatures, seeds, block_size)
        after = last_token.clone(), num_cached.clone()
        request_state.advance_rows(rows, gathered.draw_positions, tokens, *after)
        assert after[1][-1] == 0
        results.append([*gathered, after[0][:-1], after[1]])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
