"""One-pass sampling by the Gumbel-max trick with stateless noise. Called by the sampler, and by the model runner.

argmax(logits / temperature + gumbel) is a draw from softmax(logits / temperature) (Gumbel 1954; Maddison et al. 2014).
The noise of a token is a hash of (seed, position, token id): the same in any batch, in torch and in Triton.
"""

import torch

from nanovllm.kernels.triton_utils import (
    jit,
    launch_options,
    next_power_of_2,
    num_multiprocessors,
    pdl_wait,
    tl,
    use_triton,
)
from nanovllm.sampling_params import GREEDY_BELOW

U32 = 0xFFFFFFFF


def gumbel_argmax(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Draw one token a row.

    Args:
        logits: [B, V], any float dtype.
        temperatures: [B] float32; 0 takes the largest logit, the lowest id of equals.
        seeds: [B] int64, of the request (and its sample index).
        positions: [B] int64, of the token to draw.

    Returns:
        [B] int64; -1 for a row whose largest score is not finite.
    """
    return gumbel_max(logits, temperatures, seeds, positions)[1]


def gumbel_max(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_token_id: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The winning score as well, [B] float32, and its token id, [B] int64.

    `logits` may be a shard of the vocabulary, beginning at `first_token_id`: the best of the shards' scores, the first
    of equals, is the draw over the whole of it. A score of +inf (also in place of a NaN) comes with id -1.
    """
    run = gumbel_max_triton if use_triton(logits) else gumbel_max_torch
    return run(logits, temperatures, seeds, positions, first_token_id)


def mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of 32-bit integers held in int64 (`lowbias32`, Chris Wellons, hash-prospector)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & U32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & U32
    return x ^ (x >> 16)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit keys a row, int64 [B] each."""
    key = mix32((seeds & U32) ^ 0x9E3779B9)
    key = mix32(key ^ ((seeds >> 32) & U32))
    key = mix32(key ^ (positions & U32))
    return key, mix32(key ^ 0x85EBCA6B)


def gumbel_noise_torch(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [B, V] float32 for `token_ids` [V] or [B, V].

    -log(-log1p(-u)) with u = (hash + ½)·2⁻³²: the float32 grid is fine where the noise is large and can win; at the
    other end u would round to 1 and the noise be -inf, where a token may be the only one left to draw. Triton has no
    log1p: for small u, -log1p(-u) is its series, whose error u⁵/6 is below float32's.
    """
    key0, key1 = row_keys(seeds, positions)
    hashed = mix32(mix32((token_ids + key0[:, None]) & U32) ^ key1[:, None])
    u = ((hashed.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    exponential = torch.where(u < 2.0**-4, series, -torch.log(1 - u))
    return -torch.log(exponential)


def gumbel_max_torch(logits, temperatures, seeds, positions, first_token_id=0):
    scores = logits.float()
    drawn = temperatures >= GREEDY_BELOW
    if bool(drawn.any()):
        token_ids = torch.arange(first_token_id, first_token_id + logits.shape[1], device=logits.device)
        inverse = temperatures.clamp(min=GREEDY_BELOW).reciprocal()
        noisy = scores * inverse[:, None] + gumbel_noise_torch(seeds, positions, token_ids)
        scores = torch.where(drawn[:, None], noisy, scores)
    best = scores.max(-1).values  # a NaN anywhere makes it NaN
    token_ids = (scores == best[:, None]).int().argmax(-1)  # the first of equals, which max() does not promise
    best = best.masked_fill(best.isnan(), float("inf"))
    return best, torch.where(torch.isfinite(best), token_ids + first_token_id, -1)


BLOCK = 1024  # tokens at a time: with 4 warps, 8 a thread, one 16-byte load


def gumbel_max_triton(logits, temperatures, seeds, positions, first_token_id=0):
    assert logits.stride(1) == 1
    batch_size, vocab_size = logits.shape
    scores = torch.empty(batch_size, dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(batch_size, dtype=torch.int64, device=logits.device)
    if not batch_size:
        return scores, token_ids
    # 16 programs a multiprocessor fill it; beyond that a program takes several blocks, to leave fewer partial results.
    num_blocks = -(-vocab_size // BLOCK)
    tile_blocks = -(-batch_size * num_blocks // (16 * num_multiprocessors(logits.device)))
    num_tiles = -(-num_blocks // tile_blocks)
    tile_scores = torch.empty(batch_size, num_tiles, dtype=torch.float32, device=logits.device)
    tile_ids = torch.empty(batch_size, num_tiles, dtype=torch.int32, device=logits.device)
    _gumbel_tile_kernel[(batch_size, num_tiles)](
        logits, temperatures, seeds, positions, tile_scores, tile_ids,
        logits.stride(0), vocab_size, tile_blocks, num_tiles, first_token_id,
        GREEDY_BELOW=GREEDY_BELOW, BLOCK=BLOCK, APPROX_LOG=has_approximate_log(logits),
        num_warps=4, **launch_options(),
    )  # fmt: skip
    _gumbel_combine_kernel[(batch_size,)](
        tile_scores, tile_ids, scores, token_ids, num_tiles,
        BLOCK=next_power_of_2(num_blocks), num_warps=1, **launch_options(),
    )  # fmt: skip
    return scores, token_ids


def has_approximate_log(x: torch.Tensor) -> bool:
    """Where the tensor is: `_log` is an instruction of NVIDIA's GPUs."""
    return x.is_cuda and torch.version.hip is None


@jit
def _mix32(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _log(x, APPROX: tl.constexpr):
    """Triton's own is a polynomial of some twenty instructions; two of them a logit cost more than reading it."""
    if APPROX:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        log2 = tl.log2(x)
    return log2 * 0.6931471805599453


@jit
def row_noise_keys(seed, position):
    """What row_keys says."""
    key = _mix32(seed.to(tl.uint32) ^ 0x9E3779B9)
    key = _mix32(key ^ (seed >> 32).to(tl.uint32))
    key0 = _mix32(key ^ position.to(tl.uint32))
    return key0, _mix32(key0 ^ 0x85EBCA6B)


@jit
def gumbel(token_ids, key0, key1, APPROX_LOG: tl.constexpr):
    """What gumbel_noise_torch says."""
    hashed = _mix32(_mix32(token_ids.to(tl.uint32) + key0) ^ key1)
    u = tl.minimum((hashed.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # at most 1 - 2⁻²⁴
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    exponential = tl.where(u < 0.0625, series, -_log(1 - u, APPROX_LOG))
    return -_log(exponential, APPROX_LOG)


@jit(do_not_specialize=("temperatures_ptr", "seeds_ptr", "positions_ptr", "tile_blocks", "num_tiles", "first_token_id"))
def _gumbel_tile_kernel(
    logits_ptr, temperatures_ptr, seeds_ptr, positions_ptr, tile_scores_ptr, tile_ids_ptr,
    logits_stride, vocab_size, tile_blocks, num_tiles, first_token_id,
    GREEDY_BELOW: tl.constexpr, BLOCK: tl.constexpr, APPROX_LOG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row and tile: each thread keeps the best of its tokens, the program the best of its threads."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    pdl_wait(PDL)
    temperature = tl.load(temperatures_ptr + row)
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    inverse = 1.0 / tl.maximum(temperature, GREEDY_BELOW)
    key0, key1 = row_noise_keys(seed, position)

    offsets = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_ids = tl.zeros([BLOCK], tl.int32)
    for block in range(tile * tile_blocks, tl.minimum((tile + 1) * tile_blocks, tl.cdiv(vocab_size, BLOCK))):
        ids = block * BLOCK + offsets
        score = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab_size, other=float("-inf"))
        score = score.to(tl.float32)
        if temperature >= GREEDY_BELOW:  # the noise costs more than the read: greedy rows do without
            # An fma by name: left to the compiler, either product could be the one that is not rounded.
            score = tl.fma(score, inverse, gumbel(first_token_id + ids, key0, key1, APPROX_LOG))
        score = tl.where(score != score, float("inf"), score)  # a NaN fails its row as +inf does
        better = score > best  # equals keep the lower id
        best = tl.where(better, score, best)
        best_ids = tl.where(better, ids, best_ids)
    tile_best = tl.max(best, axis=0)
    tile_id = tl.min(tl.where(best == tile_best, best_ids, 0x7FFFFFFF), axis=0)
    tl.store(tile_scores_ptr + row * num_tiles + tile, tile_best)
    tl.store(tile_ids_ptr + row * num_tiles + tile, first_token_id + tile_id)


@jit(do_not_specialize=("num_tiles",))
def _gumbel_combine_kernel(
    tile_scores_ptr, tile_ids_ptr, scores_ptr, token_ids_ptr, num_tiles, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK)
    pdl_wait(PDL)
    scores = tl.load(tile_scores_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    ids = tl.load(tile_ids_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0x7FFFFFFF)
    best = tl.max(scores, axis=0)
    token_id = tl.min(tl.where(scores == best, ids, 0x7FFFFFFF), axis=0).to(tl.int64)
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(scores_ptr + row, best)
    tl.store(token_ids_ptr + row, tl.where(finite, token_id, -1))
