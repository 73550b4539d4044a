"""What the attention kernels share: how they find keys and values in the cache, and how contexts are cut into items.

The arguments of all of them, for B sequences with T queries (of decodes, T = B):

    q: [T, num_heads, head_dim], rows may be strided.
    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
    block_tables: [B, max_blocks] int32; entries beyond a context are not read.
    cu_seqlens_q: [B + 1] int32: sequence b's queries are q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]], the last tokens of its
        context.
    context_lens: [B] int32, in tokens, the queries included.
    scale: of the products of queries and keys.
    out: [T, num_heads, head_dim], contiguous; None for a new one.
"""

import math

import torch

from nanovllm.kernels.triton_utils import jit, launch_options, next_power_of_2, num_multiprocessors, pdl_wait, tl

LOG2_E = 1.4426950408889634
BLOCK = 64  # tokens a program reads at a time; items are whole blocks
PROGRAMS_PER_MULTIPROCESSOR = 2  # to divide what is left to read among; three run at once, and some end early
PARTS = 32  # into which a context of mean length is cut at the most
MAX_SORTED = 1024  # sequences
# Sequence or -1, first token, end, the sequence's first item, number of its items, first query (for
# kernels/attention_invariant.py), two that the planner writes notes to; 32 bytes.
ITEM_FIELDS = 8


def check_layout(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    head_dim = q.shape[2]
    assert head_dim == next_power_of_2(head_dim) >= 16, "tl.dot takes powers of 2"
    assert q.stride()[1:] == (head_dim, 1)
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()


@jit
def load_pages(table_ptr, token, end, offsets, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of each of BLOCK tokens from `token` on, 0 from `end` on; a scalar if blocks lie within pages."""
    if PAGE % BLOCK == 0:
        return tl.load(table_ptr + token // PAGE, mask=token < end, other=0)
    else:
        return tl.load(table_ptr + (token + offsets) // PAGE, mask=token + offsets < end, other=0)


@jit
def page_offsets(pages, token, offsets, ROW: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] int64: where the tokens' rows of ROW elements begin in the cache."""
    if PAGE % BLOCK == 0:
        return (pages.to(tl.int64) * PAGE + token % PAGE) * ROW + offsets * ROW
    else:
        return (pages.to(tl.int64) * PAGE + (token + offsets) % PAGE) * ROW


def count_items(
    batch_size: int, num_kv_heads: int, max_context_len: int, min_item_len: int, device: torch.device
) -> tuple[int, int]:
    """Among how many programs of a kv head what is left to read is divided, and how many items there can be of
    batch_size contexts, none beyond max_context_len."""
    num_shares = -(-PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device) // num_kv_heads)
    # One a sequence, since lengths do not divide evenly, and whole ones: with w tokens left those have w / num_shares,
    # so that num_shares * log(ratio) of them bring what is left down to where all are the shortest, num_shares at most.
    ratio = max(PARTS * batch_size / num_shares, 1)
    max_items = batch_size + math.ceil(num_shares * (1 + math.log(ratio)))
    return num_shares, min(max_items, batch_size * max(-(-max_context_len // min_item_len), 1))


def write_plan(
    context_lens: torch.Tensor, items: torch.Tensor, arrivals: torch.Tensor, num_shares: int, min_item_len: int,
    block: int,
) -> None:  # fmt: skip
    """Fill items [max_items, ITEM_FIELDS] for context_lens [B], in blocks of `block` tokens, and arrivals [B,
    num_kv_heads] with zeros."""
    _plan_kernel[(1,)](
        context_lens, items, arrivals, len(context_lens), len(items), num_shares,
        NUM_KV_HEADS=arrivals.shape[1], BLOCK=block, MIN_ITEM_LEN=min_item_len, PARTS=PARTS, ITEM_FIELDS=ITEM_FIELDS,
        TILE=256, CHUNK=32, MAX_SORTED=MAX_SORTED, num_warps=8, **launch_options(),
    )  # fmt: skip


@jit(do_not_specialize=("context_lens_ptr", "batch_size", "max_items", "num_shares"))
def _plan_kernel(
    context_lens_ptr, items_ptr, arrivals_ptr, batch_size, max_items, num_shares,
    NUM_KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, MIN_ITEM_LEN: tl.constexpr, PARTS: tl.constexpr,
    ITEM_FIELDS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, MAX_SORTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes the items of all contexts, and counts of 0; one program for all, TILE sequences at a time.

    Guided self-scheduling (Polychronopoulos and Kuck, 1987): the longest context comes first, and no item is longer
    than what is then left to read, divided by num_shares. Most contexts stay whole, and the last items are short, so
    that all multiprocessors end together.
    """
    pdl_wait(PDL)
    lanes = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.int32)
    # Everybody is compared with everybody; very many, of which that would take long, stay in their order.
    num_compared = tl.where(batch_size > MAX_SORTED, 0, batch_size)
    for first_seq in range(0, batch_size, TILE):
        seqs = first_seq + lanes
        live = seqs < batch_size
        lens = tl.load(context_lens_ptr + seqs, mask=live, other=0)
        total += lens
        place = tl.where(num_compared > 0, 0, seqs)
        for first_other in range(0, num_compared, CHUNK):
            others = first_other + tl.arange(0, CHUNK)
            other_lens = tl.load(context_lens_ptr + others, mask=others < batch_size, other=-1)
            is_before = (other_lens[None, :] > lens[:, None]) | (
                (other_lens[None, :] == lens[:, None]) & (others[None, :] < seqs[:, None])
            )
            place += tl.sum(is_before.to(tl.int32), axis=1)
        # In fields that items do not use.
        tl.store(items_ptr + place * ITEM_FIELDS + 6, seqs, mask=live)
        tl.store(items_ptr + place * ITEM_FIELDS + 7, lens, mask=live)
        for head in tl.static_range(NUM_KV_HEADS):
            tl.store(arrivals_ptr + seqs * NUM_KV_HEADS + head, tl.zeros([TILE], tl.int32), mask=live)
    tl.debug_barrier()
    left = tl.sum(total, axis=0)
    shortest = tl.maximum(tl.cdiv(left, tl.maximum(PARTS * batch_size, num_shares)), MIN_ITEM_LEN)
    end_item = 0
    for first_place in range(0, batch_size, TILE):
        places = first_place + lanes
        live = places < batch_size
        seqs = tl.load(items_ptr + places * ITEM_FIELDS + 6, mask=live, other=0)
        lens = tl.load(items_ptr + places * ITEM_FIELDS + 7, mask=live, other=0)
        left_here = left - tl.cumsum(lens, axis=0) + lens
        num_items, item_len = cut(lens, tl.maximum(tl.cdiv(left_here, num_shares), shortest), BLOCK)
        num_items = tl.where(live, num_items, 0)
        first_item = end_item + tl.cumsum(num_items, axis=0) - num_items
        for i in range(tl.max(num_items, axis=0)):
            mask = (i < num_items) & (first_item + i < max_items)  # should a context be longer than was said
            item_ptrs = items_ptr + (first_item + i) * ITEM_FIELDS
            tl.store(item_ptrs, seqs, mask=mask)
            tl.store(item_ptrs + 1, i * item_len, mask=mask)
            tl.store(item_ptrs + 2, tl.minimum((i + 1) * item_len, lens), mask=mask)
            tl.store(item_ptrs + 3, first_item, mask=mask)
            tl.store(item_ptrs + 4, num_items, mask=mask)
        left -= tl.sum(lens, axis=0)
        end_item += tl.sum(num_items, axis=0)
    for item in range(end_item, max_items, TILE):
        tl.store(
            items_ptr + (item + lanes) * ITEM_FIELDS, -1 + tl.zeros([TILE], tl.int32), mask=item + lanes < max_items
        )


@jit
def cut(lens, longest, BLOCK: tl.constexpr):
    """Into how many items contexts of `lens` are cut, none above about `longest`, and their length, in whole blocks."""
    num_items = tl.maximum(tl.cdiv(lens, longest), 1)
    item_len = tl.maximum(tl.cdiv(tl.cdiv(lens, num_items), BLOCK), 1) * BLOCK  # equal but for whole blocks
    return tl.maximum(tl.cdiv(lens, item_len), 1), item_len
