"""Top-k and top-p without sorting: a radix search for the least logit that stays. Called by the sampler.

What stays of a row is everything above an edge, and of the logits equal to the edge those of the highest ids. Both
filters look for the edge in the same way: the largest value below which there is no more weight than a limit. To top-k
every token weighs 1, and all but k may go; to top-p tokens weigh what their probabilities are, in integers, whose sums
are exact in any order, so that a row's edge does not depend on the rest of the batch.

The search is among few candidates: where k groups of tokens have a maximum of t or more, so have k tokens; and where
such maxima weigh enough, so do the tokens from t on.
"""

import torch

from nanovllm.kernels.triton_utils import jit, launch_options, pdl_wait, tl, use_triton

NEG_INF = float("-inf")
ONE = 2.0**40  # the weight of the likeliest token


def filter_top_k_top_p(logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """Keep the top_k largest logits (and what equals the last of them), then of these the fewest whose probabilities
    reach top_p; at least one token stays.

    Args:
        logits: [n, vocab] float32, contiguous.
        top_k: [n] int64, the vocabulary's size for none; None if no row has it.
        top_p: [n] float32, 1 for none; None if no row has it.

    Returns:
        [n, vocab] float32, -inf where a token may not be drawn.
    """
    return (filter_top_k_top_p_triton if use_triton(logits) else filter_top_k_top_p_torch)(logits, top_k, top_p)


def filter_top_k_top_p_torch(logits, top_k, top_p):
    ascending, order = logits.sort(dim=-1, stable=True)  # so that of equals at the edge of top-p the last ids stay
    if top_k is not None:
        smallest_kept = ascending.gather(1, (logits.shape[1] - top_k)[:, None])
        ascending = ascending.masked_fill(ascending < smallest_kept, NEG_INF)
    if top_p is not None:
        weights = ((ascending - ascending[:, -1:]).exp() * ONE).long()
        limits = ((1 - top_p).double()[:, None] * weights.sum(-1, keepdim=True).double()).long()
        below = weights.cumsum(-1) <= limits
        below[:, -1] = False
        ascending = ascending.masked_fill(below & (top_p < 1.0)[:, None], NEG_INF)
    return torch.empty_like(logits).scatter_(1, order, ascending)


def filter_top_k_top_p_triton(logits, top_k, top_p):
    num_rows, vocab_size = logits.shape
    assert logits.is_contiguous()
    out = torch.empty_like(logits)
    if not num_rows:
        return out
    if top_k is None:
        top_k = torch.full((num_rows,), vocab_size, device=logits.device)
    if top_p is None:
        top_p = torch.ones(num_rows, device=logits.device)
    # Few rows leave most of the chip idle: then programs are large.
    num_warps = 16 if num_rows <= 128 else 8
    block = 256 * num_warps
    _filter_kernel[(num_rows,)](
        logits, out, logits.new_empty(num_rows, max(vocab_size, block)), top_k, top_p, vocab_size,
        ONE=ONE, BLOCK=block, num_warps=num_warps, **launch_options(),
    )  # fmt: skip
    return out


@jit(do_not_specialize=("top_k_ptr", "top_p_ptr"))
def _filter_kernel(
    logits_ptr, out_ptr, candidates_ptr, top_k_ptr, top_p_ptr, vocab_size,
    ONE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab_size
    out_ptr += row * vocab_size
    candidates_ptr += row * tl.maximum(vocab_size, BLOCK)
    lanes = tl.arange(0, BLOCK)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)

    maxima = tl.full([BLOCK], float("-inf"), tl.float32)  # of the tokens that a lane comes by
    for start in range(0, vocab_size, BLOCK):
        ids = start + lanes
        maxima = tl.maximum(maxima, tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")))
    largest = tl.max(maxima, axis=0)
    tl.store(candidates_ptr + lanes, maxima)
    tl.debug_barrier()  # here and below: other threads read what these have written, or write what they have read
    edge = row * 0  # the key of the least logit that stays, as far as is known
    total = row * 0  # weight of all tokens that top-k leaves
    if top_k < vocab_size:
        if top_k <= BLOCK:
            edge, _ = _find_edge(candidates_ptr, BLOCK, edge, BLOCK - top_k, edge, largest, False, ONE, BLOCK)
    elif top_p < 1:
        weights = tl.zeros([BLOCK], tl.int64)
        for start in range(0, vocab_size, BLOCK):
            ids = start + lanes
            logits = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
            weights += _weight(logits, largest, ONE)
        total = tl.sum(weights, axis=0)
        # What the maxima weigh less than all tokens must be below the edge for it to be one of the maxima's.
        others = total - tl.sum(_weight(maxima, largest, ONE), axis=0)
        limit = _limit(top_p, total)
        if others <= limit:
            edge, _ = _find_edge(candidates_ptr, BLOCK, edge, limit, others, largest, True, ONE, BLOCK)
    tl.debug_barrier()

    num_candidates = row * 0
    weights = tl.zeros([BLOCK], tl.int64)
    length = tl.where((top_k < vocab_size) | (top_p < 1), vocab_size, 0)  # who has no filter needs no search
    for start in range(0, length, BLOCK):
        ids = start + lanes
        logits = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        is_candidate = (ids < vocab_size) & (_key(logits) >= edge)
        num_here = tl.sum(is_candidate.to(tl.int32), axis=0)
        if num_here > 0:
            places = num_candidates + tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
            tl.store(candidates_ptr + places, logits, mask=is_candidate)
            weights += tl.where(is_candidate, _weight(logits, largest, ONE), 0)
            num_candidates += num_here
    tl.debug_barrier()
    below = total - tl.sum(weights, axis=0)  # what the others weigh, to top-p alone
    if top_k < vocab_size:
        edge, _ = _find_edge(
            candidates_ptr, num_candidates, edge * 0, num_candidates - top_k, edge * 0, largest, False, ONE, BLOCK
        )  # fmt: skip
        if top_p < 1:
            weights = tl.zeros([BLOCK], tl.int64)
            for first_place in range(0, num_candidates, BLOCK):
                places = first_place + lanes
                logits = tl.load(candidates_ptr + places, mask=places < num_candidates, other=float("-inf"))
                weights += tl.where(_key(logits) >= edge, _weight(logits, largest, ONE), 0)
            total = tl.sum(weights, axis=0)
            below = edge * 0
    num_gone = row * 0  # of those equal to the edge
    if top_p < 1:
        limit = _limit(top_p, total)
        edge, below = _find_edge(candidates_ptr, num_candidates, edge, limit, below, largest, True, ONE, BLOCK)
        num_gone = (limit - below) // tl.maximum(_weight(_logit(edge), largest, ONE), 1)

    num_equal = row * 0
    for start in range(0, vocab_size, BLOCK):
        ids = start + lanes
        logits = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        keys = _key(logits)
        is_gone = keys < edge
        if num_equal < num_gone:
            equal = (keys == edge).to(tl.int32)
            is_gone = is_gone | ((equal > 0) & (num_equal + tl.cumsum(equal, axis=0) <= num_gone))
            num_equal += tl.sum(equal, axis=0)
        tl.store(out_ptr + ids, tl.where(is_gone, float("-inf"), logits), mask=ids < vocab_size)


@jit
def _limit(top_p, total):
    """What may weigh less than what stays; one token does."""
    return tl.minimum(((1 - top_p).to(tl.float64) * total.to(tl.float64)).to(tl.int64), total - 1)


@jit
def _find_edge(
    logits_ptr, length, lowest, limit, below, largest,
    BY_WEIGHT: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key below which there is no more than `limit`, and what there is below it; two bits a pass.

    lowest: keys below it weigh nothing. below: the weight of tokens that are not among these, which are below all.
    """
    lanes = tl.arange(0, BLOCK)
    edge = lowest * 0
    for i in range(16):
        step = (lowest * 0 + 1) << (30 - 2 * i)
        first = tl.zeros([BLOCK], tl.int64)  # what there is from the edge on, in steps
        second = tl.zeros([BLOCK], tl.int64)
        third = tl.zeros([BLOCK], tl.int64)
        for start in range(0, length, BLOCK):
            places = start + lanes
            logits = tl.load(logits_ptr + places, mask=places < length, other=0.0)
            key = _key(logits)
            above = key - edge
            if BY_WEIGHT:
                weight = _weight(logits, largest, ONE)
            else:
                weight = tl.full([BLOCK], 1, tl.int64)
            weight = tl.where((places < length) & (above >= 0) & (key >= lowest), weight, 0)
            first += tl.where(above < step, weight, 0)
            second += tl.where(above < 2 * step, weight, 0)
            third += tl.where(above < 3 * step, weight, 0)
        one = below + tl.sum(first, axis=0)
        two = below + tl.sum(second, axis=0)
        three = below + tl.sum(third, axis=0)
        edge += step * ((one <= limit).to(tl.int64) + (two <= limit).to(tl.int64) + (three <= limit).to(tl.int64))
        below = tl.where(three <= limit, three, tl.where(two <= limit, two, tl.where(one <= limit, one, below)))
    return edge, below


@jit
def _key(logits):
    """Integers from 0 to 2³² - 1 in the order of the logits."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True).to(tl.int64)  # -0 equals 0
    return tl.where(bits < 0, -1 - bits, bits + 0x80000000)


@jit
def _logit(key):
    bits = tl.where(key < 0x80000000, -1 - key, key - 0x80000000)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _weight(logits, largest, ONE: tl.constexpr):
    return (tl.exp(logits - largest) * ONE).to(tl.int64)
