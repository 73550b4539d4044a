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

import torch

from nanovllm.kernels.triton_utils import jit, next_power_of_2, num_multiprocessors, pdl_wait, tl

LOG2_E = 1.4426950408889634
BLOCK = 64  # tokens a program reads at a time; items are whole blocks
# Four programs a multiprocessor keep memory busy while some begin and some end.
PROGRAMS_PER_MULTIPROCESSOR = 4
MAX_SORTED = 1024  # sequences
ITEM_FIELDS = 8  # sequence or -1, first token, end, the sequence's first item, number of its items; 32 bytes


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
    """How many items to cut batch_size contexts into, none beyond max_context_len; and how many there are at most."""
    # A large batch fills the chip without cutting; there, cutting what is longer than the mean keeps one long context
    # from outlasting the rest.
    num_programs = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device)
    target_items = max(-(-num_programs // num_kv_heads), batch_size)
    # Up to one a sequence beyond the target, since lengths do not divide evenly.
    max_items = min(target_items + batch_size, batch_size * max(-(-max_context_len // min_item_len), 1))
    return target_items, max_items


@jit(do_not_specialize=("context_lens_ptr", "batch_size", "max_items", "target_items"))
def plan_kernel(
    context_lens_ptr, items_ptr, arrivals_ptr, batch_size, max_items, target_items,
    NUM_KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, MIN_ITEM_LEN: tl.constexpr, ITEM_FIELDS: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, MAX_SORTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes the items of all contexts, and counts of 0; one program for all, TILE sequences at a time, each of them
    compared with CHUNK others at a time."""
    pdl_wait(PDL)
    lanes = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.int32)
    for first_seq in range(0, batch_size, TILE):
        seqs = first_seq + lanes
        total += tl.load(context_lens_ptr + seqs, mask=seqs < batch_size, other=0)
    longest = tl.maximum(tl.cdiv(tl.sum(total, axis=0), target_items), MIN_ITEM_LEN)

    # In the order of their items' lengths, longest first: the shortest come last, so that all multiprocessors end
    # together. Everybody is compared with everybody; among very many, where that would take long, no order is needed.
    end_item = 0
    for first_seq in range(0, batch_size, TILE):
        seqs = first_seq + lanes
        live = seqs < batch_size
        lens = tl.load(context_lens_ptr + seqs, mask=live, other=0)
        num_items, item_len = cut(lens, longest, BLOCK)
        num_items = tl.where(live, num_items, 0)
        first_item = tl.zeros([TILE], tl.int32)
        if batch_size > MAX_SORTED:
            first_item = end_item + tl.cumsum(num_items, axis=0) - num_items
        for first_other in range(0, tl.where(batch_size > MAX_SORTED, 0, batch_size), CHUNK):
            others = first_other + tl.arange(0, CHUNK)
            other_lens = tl.load(context_lens_ptr + others, mask=others < batch_size, other=0)
            other_items, other_item_len = cut(other_lens, longest, BLOCK)
            is_before = (other_item_len[None, :] > item_len[:, None]) | (
                (other_item_len[None, :] == item_len[:, None]) & (others[None, :] < seqs[:, None])
            )
            is_before &= (others < batch_size)[None, :]
            first_item += tl.sum(tl.where(is_before, other_items[None, :], 0), axis=1)
        for i in range(tl.max(num_items, axis=0)):
            mask = (i < num_items) & (first_item + i < max_items)
            item_ptrs = items_ptr + (first_item + i) * ITEM_FIELDS
            tl.store(item_ptrs, seqs, mask=mask)
            tl.store(item_ptrs + 1, i * item_len, mask=mask)
            tl.store(item_ptrs + 2, tl.minimum((i + 1) * item_len, lens), mask=mask)
            tl.store(item_ptrs + 3, first_item, mask=mask)
            tl.store(item_ptrs + 4, num_items, mask=mask)
        for head in range(NUM_KV_HEADS):
            tl.store(arrivals_ptr + seqs * NUM_KV_HEADS + head, tl.zeros([TILE], tl.int32), mask=live)
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
