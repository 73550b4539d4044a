"""One-pass sampling by the Gumbel-max trick with stateless noise. Called by layers/sampler.py.

argmax(logits / temperature + gumbel) is a draw from softmax(logits / temperature) (Gumbel 1954; Maddison et al. 2014).
The noise of a token is a hash of (seed, position, token id): the same in any batch, in torch and in Triton.
"""

import torch

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would overflow float32
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
    return gumbel_argmax_torch(logits, temperatures, seeds, positions)


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
    other end u rounds to 1 and the noise is -inf. -log1p(-u) is a series for small u, which Triton has no log1p for.
    """
    key0, key1 = row_keys(seeds, positions)
    hashed = mix32(mix32((token_ids + key0[:, None]) & U32) ^ key1[:, None])
    u = (hashed.float() + 0.5) * 2.0**-32
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    exponential = torch.where(u < 2.0**-6, series, -torch.log(1 - u))
    return -torch.log(exponential)


def gumbel_argmax_torch(logits, temperatures, seeds, positions):
    scores = logits.float()
    drawn = temperatures >= GREEDY_BELOW
    if bool(drawn.any()):
        token_ids = torch.arange(logits.shape[1], device=logits.device)
        noisy = scores / temperatures.clamp(min=GREEDY_BELOW)[:, None] + gumbel_noise_torch(seeds, positions, token_ids)
        scores = torch.where(drawn[:, None], noisy, scores)
    best = scores.max(-1).values  # a NaN anywhere makes it NaN
    token_ids = (scores == best[:, None]).int().argmax(-1)  # the first of equals, which max() does not promise
    return torch.where(torch.isfinite(best), token_ids, -1)
