"""Draws from what min-p, top-k and top-p leave, without sorting. Called by the sampler.

What they leave of a row is everything above an edge, and of the logits equal to it, to top-p, those of the highest ids.
So it is enough to look at few tokens: where the maxima of k groups of tokens are t or more, so are k tokens, and the
rest cannot be among the k largest. The same few often weigh enough for top-p; where they do not, drawing goes on above
each drawn token that turns out to be left out (rejection, as in FlashInfer, here by Gumbel-max and so with its result).
"""

from typing import NamedTuple

import torch

from nanovllm.kernels.sampling import gumbel, gumbel_max_torch, has_approximate_log, row_noise_keys
from nanovllm.kernels.triton_utils import jit, launch_options, next_power_of_2, pdl_wait, tl, use_triton

NEG_INF = float("-inf")
MAX_GROUPS = 512  # of neighbouring tokens, as many in each
FEW_GROUPS = 64  # with the largest maxima are looked at for top-p and min-p
MAX_TOP_K = 128  # up to here for top-k as many as that
MAX_CANDIDATES = 256
BLOCK = 4096  # tokens at a time
NUM_WARPS = 8
MAX_SORTED = 2**24  # logits at a time: the twin takes some 50 bytes for each


class Filters(NamedTuple):
    """Of n rows."""

    top_k: torch.Tensor  # [n] int64, the vocabulary's size for none
    top_p: torch.Tensor  # [n] float64, 1 for none
    min_p: torch.Tensor  # [n] float32, 0 for none


def filtered_argmax(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filters: Filters,
) -> torch.Tensor:
    """`gumbel_argmax` of n rows, over the tokens that the filters leave.

    Args:
        logits: [B, V], any float dtype, their last dimension contiguous.
        rows: [n] int64, which of these.
        temperatures, seeds, positions: [B] each, as of `gumbel_argmax`; none of the n rows is greedy.
        filters: of the n rows.

    Returns:
        [n] int64; -1 for a row whose largest score is not finite.
    """
    run = filtered_argmax_triton if use_triton(logits) else filtered_argmax_torch
    return run(logits, rows, temperatures, seeds, positions, filters)


def filtered_argmax_torch(logits, rows, temperatures, seeds, positions, filters):
    size = max(1, MAX_SORTED // logits.shape[1])
    token_ids = []
    for own, *own_filters in zip(*(tensor.split(size) for tensor in (rows, *filters))):
        kept = apply_filters(logits[own].float(), temperatures[own], Filters(*own_filters))
        token_ids.append(gumbel_max_torch(kept, temperatures[own], seeds[own], positions[own])[1])
    return torch.cat(token_ids)


def apply_filters(logits: torch.Tensor, temperatures: torch.Tensor, filters: Filters) -> torch.Tensor:
    """logits [n, V] float32 -> the same, -inf where a token may not be drawn.

    min_p drops tokens less likely than this share of the likeliest; top_k keeps the k largest of the rest, and what
    equals the last of them; top_p of these the fewest whose probabilities reach it. At least one token stays.
    """
    top_k, top_p, min_p = filters
    temperatures = temperatures[:, None]
    largest = logits.amax(-1, keepdim=True)
    kept = logits >= largest + temperatures * min_p.log()[:, None]
    has_top_k = top_k < logits.shape[1]
    k = torch.where(has_top_k, top_k, 1)
    kept &= (logits >= logits.topk(int(k.max()), -1).values.gather(1, (k - 1)[:, None])) | ~has_top_k[:, None]
    if bool((top_p < 1.0).any()):
        ascending, order = logits.masked_fill(~kept, NEG_INF).sort(dim=-1, stable=True)
        descending, order = ascending.flip(-1), order.flip(-1)  # of equals the highest id comes first
        weights = ((descending - largest) / temperatures).double().exp()
        reached = weights.cumsum(-1)
        before = reached - weights  # what comes before a token
        is_within = (before < top_p[:, None] * reached[:, -1:]) | (before == 0)
        kept &= (top_p >= 1.0)[:, None] | torch.empty_like(kept).scatter_(1, order, is_within)
    return logits.masked_fill(~kept, NEG_INF)


def filtered_argmax_triton(logits, rows, temperatures, seeds, positions, filters):
    num_rows, vocab_size = len(rows), logits.shape[1]
    assert logits.stride(1) == 1 and vocab_size <= 2**20 - BLOCK
    token_ids = torch.empty_like(rows)
    if not num_rows:
        return token_ids
    group_size = max(16, next_power_of_2(-(-vocab_size // MAX_GROUPS)))
    num_groups = -(-vocab_size // group_size)
    maxima, sums = torch.empty(2, num_rows, MAX_GROUPS, device=logits.device)
    chosen = torch.empty(num_rows, MAX_GROUPS, dtype=torch.int32, device=logits.device)
    candidates = torch.empty(num_rows, MAX_CANDIDATES, device=logits.device)
    candidate_ids = torch.empty(num_rows, MAX_CANDIDATES, dtype=torch.int32, device=logits.device)
    groups_at_once = max(1, 2048 // group_size)
    _group_kernel[(num_rows, -(-num_groups // groups_at_once))](
        logits, rows, temperatures, maxima, sums, logits.stride(0), vocab_size, num_groups,
        GROUP=group_size, GROUPS=groups_at_once, MAX_GROUPS=MAX_GROUPS, num_warps=4, **launch_options(),
    )  # fmt: skip
    _filtered_kernel[(num_rows,)](
        logits, rows, temperatures, seeds, positions, *filters, maxima, sums, chosen, candidates, candidate_ids,
        token_ids, logits.stride(0), vocab_size, num_groups,
        GROUP=group_size, MAX_GROUPS=MAX_GROUPS, FEW_GROUPS=FEW_GROUPS, MAX_TOP_K=MAX_TOP_K,
        MAX_CANDIDATES=MAX_CANDIDATES, BLOCK=BLOCK, APPROX_LOG=has_approximate_log(logits),
        num_warps=NUM_WARPS, **launch_options(),
    )  # fmt: skip
    return token_ids


@jit(do_not_specialize=("rows_ptr", "temperatures_ptr", "num_groups"))
def _group_kernel(
    logits_ptr, rows_ptr, temperatures_ptr, maxima_ptr, sums_ptr, logits_stride, vocab_size, num_groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, MAX_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The maximum of each group, and its weight in terms of that. One program a row and GROUPS groups."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pdl_wait(PDL)
    source = tl.load(rows_ptr + row)
    inverse = 1.0 / tl.load(temperatures_ptr + source)
    logits = _load_logits(logits_ptr + source * logits_stride, ids, vocab_size)
    maxima = tl.max(logits, axis=1)
    shift = tl.where(maxima == float("-inf"), 0.0, maxima)
    sums = tl.sum(tl.exp((logits - shift[:, None]) * inverse), axis=1)
    tl.store(maxima_ptr + row * MAX_GROUPS + groups, maxima, mask=groups < num_groups)
    tl.store(sums_ptr + row * MAX_GROUPS + groups, sums, mask=groups < num_groups)


@jit(do_not_specialize=("rows_ptr", "temperatures_ptr", "seeds_ptr", "positions_ptr", "top_k_ptr", "top_p_ptr",
                        "min_p_ptr", "num_groups"))  # fmt: skip
def _filtered_kernel(
    logits_ptr, rows_ptr, temperatures_ptr, seeds_ptr, positions_ptr, top_k_ptr, top_p_ptr, min_p_ptr, maxima_ptr,
    sums_ptr, chosen_ptr, candidates_ptr, candidate_ids_ptr, token_ids_ptr, logits_stride, vocab_size, num_groups,
    GROUP: tl.constexpr, MAX_GROUPS: tl.constexpr, FEW_GROUPS: tl.constexpr, MAX_TOP_K: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, APPROX_LOG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows_ptr + row)
    logits_ptr += source * logits_stride
    maxima_ptr += row * MAX_GROUPS
    chosen_ptr += row * MAX_GROUPS
    candidates_ptr += row * MAX_CANDIDATES
    candidate_ids_ptr += row * MAX_CANDIDATES
    temperature = tl.load(temperatures_ptr + source)
    inverse = 1.0 / temperature
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    key0, key1 = row_noise_keys(tl.load(seeds_ptr + source), tl.load(positions_ptr + source))

    groups = tl.arange(0, MAX_GROUPS)
    maxima = tl.load(maxima_ptr + groups, mask=groups < num_groups, other=float("-inf"))
    sums = tl.load(sums_ptr + row * MAX_GROUPS + groups, mask=groups < num_groups, other=0.0)
    largest = tl.max(maxima, axis=0)
    token_id = row * 0 - 1
    scaled = largest * inverse  # beyond all numbers where the logits or the temperature are
    if (scaled > float("-inf")) & (scaled < float("inf")):
        total = tl.sum(sums * tl.exp((maxima - largest) * inverse), axis=0)
        floor = largest + temperature * tl.log(tl.maximum(min_p, 1e-30))  # of what min-p leaves
        floor = tl.where(min_p > 0, floor, float("-inf"))
        # The bound: below it is nothing of the top k, if that is few; else whatever FEW_GROUPS have above it is tried.
        num_needed = tl.where(top_k <= MAX_TOP_K, top_k, FEW_GROUPS)
        bound = tl.maximum(_kth_of_few(maxima_ptr, num_groups, maxima, num_needed, MAX_GROUPS), floor)
        is_chosen = (maxima > float("-inf")) & (maxima >= bound)
        tl.store(chosen_ptr + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1, groups, mask=is_chosen)
        num_chosen = tl.sum(is_chosen.to(tl.int32), axis=0)
        tl.debug_barrier()  # here and below: other threads read what these have written

        lanes = tl.arange(0, BLOCK)
        num_candidates = num_chosen * 0
        for first in range(0, num_chosen, BLOCK // GROUP):
            places = first + lanes // GROUP
            group = tl.load(chosen_ptr + places, mask=places < num_chosen, other=MAX_GROUPS)
            ids = tl.where(places < num_chosen, group * GROUP + lanes % GROUP, vocab_size)
            logits = _load_logits(logits_ptr, ids, vocab_size)
            is_candidate = (logits > float("-inf")) & (logits >= bound)
            places = num_candidates + tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
            tl.store(candidates_ptr + places, logits, mask=is_candidate & (places < MAX_CANDIDATES))
            tl.store(candidate_ids_ptr + places, ids, mask=is_candidate & (places < MAX_CANDIDATES))
            num_candidates += tl.sum(is_candidate.to(tl.int32), axis=0)
        tl.debug_barrier()

        if num_candidates <= MAX_CANDIDATES:
            places = tl.arange(0, MAX_CANDIDATES)
            is_there = places < num_candidates
            logits = tl.load(candidates_ptr + places, mask=is_there, other=float("-inf"))
            ids = tl.load(candidate_ids_ptr + places, mask=is_there, other=vocab_size)
            has_few = (top_k <= MAX_TOP_K) | (bound <= floor)  # all that min-p and top-k leave are here
            kept = is_there & (logits >= _kth_of_few(candidates_ptr, num_candidates, logits, top_k, MAX_CANDIDATES))
            weights = tl.where(kept, tl.exp((logits - largest) * inverse), 0.0)
            weight = tl.sum(weights, axis=0)
            total = tl.where(has_few, weight, total)
            if has_few | ((top_k >= vocab_size) & (top_p < 1) & (min_p <= 0) & (weight >= top_p * total)):
                before = _weight_before_few(
                    candidates_ptr, candidate_ids_ptr, num_candidates, logits, ids, largest, inverse, MAX_CANDIDATES
                )
                limit = tl.where(top_p < 1, top_p * total, float("inf"))
                kept = kept & ((before < limit) | (before == 0))
                scores = tl.fma(logits, inverse, gumbel(ids, key0, key1, APPROX_LOG))  # as in kernels/sampling.py
                best = tl.max(tl.where(kept, scores, float("-inf")), axis=0)
                token_id = tl.min(tl.where(kept & (scores == best), ids, 0x7FFFFFFF), axis=0).to(tl.int64)
        if token_id < 0:
            token_id = _draw_from_all(
                logits_ptr, vocab_size, largest, total, floor, top_k, top_p, inverse, key0, key1, BLOCK, APPROX_LOG
            )
    tl.store(token_ids_ptr + row, token_id)


@jit
def _draw_from_all(
    logits_ptr, vocab_size, largest, total, floor, top_k, top_p, inverse, key0, key1,
    BLOCK: tl.constexpr, APPROX_LOG: tl.constexpr,
):  # fmt: skip
    """Draw from the whole row; while top-p leaves the drawn token out, draw again from what is above it."""
    lanes = tl.arange(0, BLOCK)
    if top_k < vocab_size:
        floor = tl.maximum(floor, _kth_largest(logits_ptr, vocab_size, top_k, BLOCK))
    if (top_p < 1) & (floor > float("-inf")):
        total = _weight_before(logits_ptr, vocab_size, floor, -1, largest, inverse, BLOCK)
    pivot = floor
    token_id = top_k * 0 - 1
    is_out = top_k > 0  # which is always so
    while is_out:
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_ids = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + lanes
            logits = _load_logits(logits_ptr, ids, vocab_size)
            is_left = (logits > pivot) | ((logits == pivot) & (ids > token_id))
            scores = tl.fma(logits, inverse, gumbel(ids, key0, key1, APPROX_LOG))
            is_better = is_left & (scores > best)
            best = tl.where(is_better, scores, best)
            best_ids = tl.where(is_better, ids, best_ids)
        token_id = tl.min(tl.where(best == tl.max(best, axis=0), best_ids, 0x7FFFFFFF), axis=0).to(tl.int64)
        pivot = tl.load(logits_ptr + token_id).to(tl.float32)
        is_out = top_p < 1
        if is_out:
            before = _weight_before(logits_ptr, vocab_size, pivot, token_id, largest, inverse, BLOCK)
            is_out = (before > 0) & (before >= top_p * total)
    return token_id


@jit
def _kth_of_few(values_ptr, length, values, k, SIZE: tl.constexpr):
    """The k-th largest of the `length` values there, which `values` [SIZE] are too, in comparing them all; or -inf."""
    count = tl.zeros([SIZE], tl.int32)
    for start in range(0, length, 32):
        places = start + tl.arange(0, 32)
        others = tl.load(values_ptr + places, mask=places < length, other=float("-inf"))
        count += tl.sum((others[:, None] >= values[None, :]).to(tl.int32), axis=0)
    return tl.max(tl.where(count >= k, values, float("-inf")), axis=0)


@jit
def _weight_before_few(logits_ptr, ids_ptr, length, logits, ids, largest, inverse, SIZE: tl.constexpr):
    """What those of the `length` tokens weigh that come before each of `logits` [SIZE]."""
    weight = tl.zeros([SIZE], tl.float32)
    for start in range(0, length, 32):
        places = start + tl.arange(0, 32)
        others = tl.load(logits_ptr + places, mask=places < length, other=float("-inf"))
        other_ids = tl.load(ids_ptr + places, mask=places < length, other=-1)
        weights = tl.exp((others - largest) * inverse)
        is_equal = others[:, None] == logits[None, :]
        is_before = (others[:, None] > logits[None, :]) | (is_equal & (other_ids[:, None] > ids[None, :]))
        weight += tl.sum(tl.where(is_before, weights[:, None], 0.0), axis=0)
    return weight


@jit
def _weight_before(logits_ptr, vocab_size, value, token_id, largest, inverse, BLOCK: tl.constexpr):
    """What the tokens weigh that come before the token of that id and logit, in the whole row."""
    weights = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = _load_logits(logits_ptr, ids, vocab_size)
        is_before = (logits > value) | ((logits == value) & (ids > token_id))
        weights += tl.where(is_before, tl.exp((logits - largest) * inverse), 0.0)
    return tl.sum(weights, axis=0)


@jit
def _kth_largest(logits_ptr, vocab_size, k, BLOCK: tl.constexpr):
    """A radix search of a whole row, two bits a pass: the largest value that k logits reach."""
    edge = k * 0
    for i in range(16):
        step = (k * 0 + 1) << (30 - 2 * i)
        counts = tl.zeros([BLOCK], tl.int64)  # three of 20 bits
        for start in range(0, vocab_size, BLOCK):
            above = _key(_load_logits(logits_ptr, start + tl.arange(0, BLOCK), vocab_size)) - edge
            counts += (above >= step).to(tl.int64)
            counts += (above >= 2 * step).to(tl.int64) << 20
            counts += (above >= 3 * step).to(tl.int64) << 40
        count = tl.sum(counts, axis=0)
        first, second, third = count & 0xFFFFF, (count >> 20) & 0xFFFFF, count >> 40
        edge += step * ((first >= k).to(tl.int64) + (second >= k).to(tl.int64) + (third >= k).to(tl.int64))
    bits = tl.where(edge < 0x80000000, -1 - edge, edge - 0x80000000)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _key(logits):
    """Integers from 0 to 2³² - 1 in the order of the logits."""
    bits = logits.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 0x80000000)


@jit
def _load_logits(logits_ptr, ids, vocab_size):
    """float32; outside of the vocabulary -inf, and for a NaN +inf, which fails its row."""
    logits = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(logits != logits, float("inf"), logits)
