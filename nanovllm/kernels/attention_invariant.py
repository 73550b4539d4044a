"""Batch-invariant paged attention: one kernel for prompts and for decoding. Called by attention/invariant.py.

A query's result is bitwise the same whoever shares its batch, its tile and its step. Keys are cut into splits of SPLIT
tokens at absolute positions; each split is attended from scratch, and splits are merged one by one in their order. A
program keeps to that order alone, or leaves its splits in memory for the last of the sequence's programs to merge:
either way the same operations on the same numbers. Rows of a tile never mix, a key that a row may not see adds an exact
zero, and multiplications and additions are compiled as they are written, without contraction into one rounding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovllm.kernels.attention_common import (
    BLOCK,
    ITEM_FIELDS,
    LOG2_E,
    check_layout,
    count_items,
    load_pages,
    page_offsets,
    write_plan,
)
from nanovllm.kernels.triton_utils import jit, launch_options, next_power_of_2, pdl_wait, tl, use_triton

SPLIT = 256  # tokens; decides the order of sums, so another value gives other bits


@dataclass(frozen=True, slots=True)
class InvariantPlan:
    """Who attends what in a step, and where partial results lie; the same for every layer. D decodes come first.

    Fields of an item: sequence or -1, first key, end of keys, the sequence's first item, number of its items, first
    query among the sequence's new tokens. Only decodes are cut into several items.
    """

    items: torch.Tensor  # [num_items, ITEM_FIELDS] int32
    cu_seqlens_q: torch.Tensor  # [B + 1] int32
    max_splits: int  # of a decode
    partial_m: torch.Tensor  # [D · max_splits, num_heads] float32, the largest score, in units of log2
    partial_l: torch.Tensor  # [D · max_splits, num_heads] float32, the sum of 2^(score - m)
    partial_out: torch.Tensor  # [D · max_splits, num_heads, head_dim] float32, not yet divided by l
    arrivals: torch.Tensor  # [D, num_kv_heads] int32: how many of a sequence's programs are done; 0 between layers


def paged_attention_invariant(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    context_lens: torch.Tensor,
    scale: float,
    plan: InvariantPlan | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's last tokens over its whole context -> [T, num_heads, head_dim].

    Args (the others: attention_common.py):
        cu_seqlens_q: begins at 0; None if each sequence has one query.
        context_lens: at least 1.
        plan: of `plan_invariant` for these lengths, which the kernel needs; its twin does without.
    """
    if use_triton(q):
        assert plan is not None
        return paged_attention_invariant_triton(q, k_cache, v_cache, block_tables, context_lens, scale, plan)
    return paged_attention_invariant_torch(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale)


def paged_attention_invariant_torch(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale):
    """One query at a time, so that every shape follows from its position alone, and so do the order of sums, the
    strides and, since torch's allocations are aligned and q is copied, the alignment of everything that is read."""
    block_size, num_kv_heads = k_cache.shape[1:3]
    out = q.new_empty(q.shape)
    starts = list(range(len(q) + 1)) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for row, length in enumerate(context_lens.tolist()):
        pages = block_tables[row, : -(-length // block_size)].long()
        k, v = (cache[pages].flatten(0, 1).transpose(0, 1).unsqueeze(0) for cache in (k_cache, v_cache))
        for i in range(starts[row], starts[row + 1]):
            num_keys = length - (starts[row + 1] - 1 - i)
            query = q[i].clone().view(1, num_kv_heads, -1, q.shape[2])  # a kv head's group as its query length
            heads = F.scaled_dot_product_attention(query, k[:, :, :num_keys], v[:, :, :num_keys], scale=scale)
            out[i] = heads.reshape(q.shape[1:])
    return out


def queries_per_tile(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """(rows of a tile, queries of a tile): each query has a row for each head of its group."""
    group = num_heads // num_kv_heads
    rows = max(next_power_of_2(group), 16)  # the least that tl.dot takes
    return rows, rows // group


def plan_invariant(
    cu_seqlens_q: torch.Tensor | None,
    context_lens: torch.Tensor,
    num_decodes: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_context_len: int,
) -> InvariantPlan:
    """Plan a step of B sequences with num_tokens queries, of which the first num_decodes have one each.

    cu_seqlens_q is [B + 1] int32, None if all are decodes; context_lens [B] int32, none beyond max_context_len.
    """
    device = context_lens.device
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(num_decodes + 1, dtype=torch.int32, device=device)
    max_splits = max(-(-max_context_len // SPLIT), 1)
    # As `plan_decode`, but of whole splits.
    num_shares, max_items = count_items(num_decodes, num_kv_heads, max_context_len, SPLIT, device)
    items = torch.zeros(max_items, ITEM_FIELDS, dtype=torch.int32, device=device)
    arrivals = torch.empty(num_decodes, num_kv_heads, dtype=torch.int32, device=device)
    if num_decodes:
        write_plan(context_lens[:num_decodes], items, arrivals, num_shares, SPLIT, SPLIT)
    if num_decodes < len(context_lens):
        queries = queries_per_tile(num_heads, num_kv_heads)[1]
        items = torch.cat((items, prefill_items(cu_seqlens_q, context_lens, num_decodes, num_tokens, queries)))
    rows = num_decodes * max_splits
    partial_m, partial_l = torch.empty(2, rows, num_heads, dtype=torch.float32, device=device)
    partial_out = torch.empty(rows, num_heads, head_dim, dtype=torch.float32, device=device)
    return InvariantPlan(items, cu_seqlens_q, max_splits, partial_m, partial_l, partial_out, arrivals)


def prefill_items(
    cu_seqlens_q: torch.Tensor, context_lens: torch.Tensor, num_decodes: int, num_tokens: int, queries: int
) -> torch.Tensor:
    """Items of `queries` tokens each for the sequences that are not decodes, the longest contexts of each first."""
    starts = cu_seqlens_q[num_decodes:].long()
    q_lens, lens = starts.diff(), context_lens[num_decodes:].long()
    seqs = torch.arange(len(starts), device=starts.device)
    # Tile i belongs to the sequence b with first_tiles[b] <= i < first_tiles[b + 1]: enough for each, at most one to
    # spare. So the number of tiles is known without waiting for the device.
    first_tiles = (starts - num_decodes) // queries + seqs
    num_tiles = (num_tokens - num_decodes) // queries + len(lens)
    tiles = torch.arange(num_tiles, device=starts.device).flip(0)
    owners = torch.searchsorted(first_tiles, tiles, right=True) - 1
    first_queries = (tiles - first_tiles[owners]) * queries
    ends = lens[owners] - q_lens[owners] + torch.minimum(first_queries + queries, q_lens[owners])
    items = torch.zeros(num_tiles, ITEM_FIELDS, dtype=torch.int32, device=starts.device)
    items[:, 0] = torch.where(first_queries < q_lens[owners], owners + num_decodes, -1)
    items[:, 2] = ends
    items[:, 4] = 1
    items[:, 5] = first_queries
    return items


def paged_attention_invariant_triton(q, k_cache, v_cache, block_tables, context_lens, scale, plan):
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    check_layout(q, k_cache, v_cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not num_tokens:
        return out
    block_m, queries = queries_per_tile(num_heads, num_kv_heads)
    # As the decode kernel: three stages at head_dim 128 in 16 bits, three programs a multiprocessor; without the limit
    # on registers there would be two.
    small = k_cache.element_size() * head_dim <= 256
    options = {"num_stages": 3, "maxnreg": 168} if small and block_m == 16 else {"num_stages": 2}
    _invariant_kernel[(num_kv_heads * len(plan.items),)](  # in one dimension: others end at 65,535
        q, k_cache, v_cache, block_tables, plan.cu_seqlens_q, context_lens, plan.items,
        plan.partial_m, plan.partial_l, plan.partial_out, plan.arrivals, out,
        scale * LOG2_E, plan.max_splits, q.stride(0), block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, QUERIES=queries, D=head_dim, PAGE=block_size,
        ITEM_FIELDS=ITEM_FIELDS, BLOCK_M=block_m, BLOCK=BLOCK, SPLIT=SPLIT,
        num_warps=4, **options, **launch_options(fp_fusion=False),
    )  # fmt: skip
    return out


@jit(
    do_not_specialize=(
        "block_tables_ptr", "cu_seqlens_q_ptr", "context_lens_ptr", "partial_m_ptr", "partial_l_ptr",
        "partial_out_ptr", "arrivals_ptr", "max_splits", "table_stride",
    )
)  # fmt: skip
def _invariant_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, cu_seqlens_q_ptr, context_lens_ptr, items_ptr,
    partial_m_ptr, partial_l_ptr, partial_out_ptr, arrivals_ptr, out_ptr,
    scale_log2, max_splits, q_stride, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    ITEM_FIELDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program an item and kv head; row r of its tile is query r // GROUP, head r % GROUP of the group."""
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    item_ptr = items_ptr + tl.program_id(0) // NUM_KV_HEADS * ITEM_FIELDS
    pdl_wait(PDL)
    seq = tl.load(item_ptr).to(tl.int64)
    begin = tl.load(item_ptr + 1)
    end = tl.load(item_ptr + 2)
    first_item = tl.load(item_ptr + 3)
    num_items = tl.load(item_ptr + 4)
    first_query = tl.load(item_ptr + 5)
    if seq >= 0:
        q_start = tl.load(cu_seqlens_q_ptr + seq)
        q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
        context_len = tl.load(context_lens_ptr + seq)
        dims = tl.arange(0, D)
        rows = tl.arange(0, BLOCK_M)
        queries = first_query + rows // GROUP
        live = (rows < QUERIES * GROUP) & (queries < q_len)
        heads = kv_head * GROUP + rows % GROUP
        positions = context_len - q_len + queries
        tokens = (q_start + queries).to(tl.int64)
        q_ptrs = q_ptr + (tokens * q_stride + heads * D)[:, None] + dims[None, :]
        q = tl.load(q_ptrs, mask=live[:, None], other=0.0)
        table_ptr = block_tables_ptr + seq * table_stride
        k_ptr = k_cache_ptr + kv_head * D
        v_ptr = v_cache_ptr + kv_head * D
        partial_row = seq * max_splits
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        for split in range(begin, end, SPLIT):
            split_m, split_l, split_acc = attend_split(
                q, positions, k_ptr, v_ptr, table_ptr, split, tl.minimum(split + SPLIT, end), scale_log2,
                NUM_KV_HEADS * D, D, PAGE, BLOCK_M, BLOCK,
            )  # fmt: skip
            if begin == 0:
                m, l, acc = merge(m, l, acc, split_m, split_l, split_acc)  # noqa: E741
            else:  # to be merged when all before it are
                part_heads = (partial_row + split // SPLIT) * NUM_HEADS + heads
                tl.store(partial_m_ptr + part_heads, split_m, mask=live)
                tl.store(partial_l_ptr + part_heads, split_l, mask=live)
                tl.store(partial_out_ptr + part_heads[:, None] * D + dims[None, :], split_acc, mask=live[:, None])

        merged = num_items == 1
        if num_items > 1:
            if begin == 0:  # in place of its last split: all up to there
                part_heads = (partial_row + end // SPLIT - 1) * NUM_HEADS + heads
                tl.store(partial_m_ptr + part_heads, m, mask=live)
                tl.store(partial_l_ptr + part_heads, l, mask=live)
                tl.store(partial_out_ptr + part_heads[:, None] * D + dims[None, :], acc, mask=live[:, None])
            # All threads' stores come before the count (barrier, release), all loads of a merge after it (acquire).
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + seq * NUM_KV_HEADS + kv_head, 1, sem="acq_rel")
            merged = arrived == num_items - 1
            if merged:
                tl.store(arrivals_ptr + seq * NUM_KV_HEADS + kv_head, 0)  # for the next layer
                m = tl.full([BLOCK_M], float("-inf"), tl.float32)
                l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
                acc = tl.zeros([BLOCK_M, D], tl.float32)
                first_end = tl.load(items_ptr + first_item * ITEM_FIELDS + 2)
                for part in range(first_end // SPLIT - 1, tl.cdiv(context_len, SPLIT)):
                    part_heads = (partial_row + part) * NUM_HEADS + heads
                    # .cg: written by other multiprocessors, so not from this one's L1.
                    part_m = tl.load(partial_m_ptr + part_heads, mask=live, other=0.0, cache_modifier=".cg")
                    part_l = tl.load(partial_l_ptr + part_heads, mask=live, other=1.0, cache_modifier=".cg")
                    part_ptrs = partial_out_ptr + part_heads[:, None] * D + dims[None, :]
                    part_acc = tl.load(part_ptrs, mask=live[:, None], other=0.0, cache_modifier=".cg")
                    m, l, acc = merge(m, l, acc, part_m, part_l, part_acc)  # noqa: E741
        if merged:
            out_ptrs = out_ptr + ((tokens * NUM_HEADS + heads) * D)[:, None] + dims[None, :]
            tl.store(out_ptrs, (acc / l[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])


@jit
def attend_split(
    q, positions, k_ptr, v_ptr, table_ptr, begin, end, scale_log2,
    ROW: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(m, l, acc) of the keys from `begin` to `end` that lie at or before each row's position; -inf, 0, 0 for none."""
    dims = tl.arange(0, D)
    offsets = tl.arange(0, BLOCK)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    pages = load_pages(table_ptr, begin, end, offsets, PAGE, BLOCK)
    for token in range(begin, end, BLOCK):
        # The next pages are asked for now: otherwise each k and v would wait for two reads, one after the other.
        next_pages = load_pages(table_ptr, token + BLOCK, end, offsets, PAGE, BLOCK)
        kv_offsets = page_offsets(pages, token, offsets, ROW, PAGE, BLOCK)[:, None] + dims[None, :]
        stored = (token + offsets < end)[:, None]
        k = tl.load(k_ptr + kv_offsets, mask=stored, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(positions[:, None] >= token + offsets[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet
        p = tl.exp2(scores - base[:, None])
        alpha = tl.exp2(m - base)
        l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
        v = tl.load(v_ptr + kv_offsets, mask=stored, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
        pages = next_pages
    return m, l, acc


@jit
def merge(m, l, acc, m2, l2, acc2):  # noqa: E741
    """The softmax sums of two runs of keys as one. Merging with a run of which a row sees nothing changes no bit."""
    m_new = tl.maximum(m, m2)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - base)
    beta = tl.exp2(m2 - base)
    return m_new, l * alpha + l2 * beta, acc * alpha[:, None] + acc2 * beta[:, None]
