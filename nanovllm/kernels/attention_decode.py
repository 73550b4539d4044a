"""Paged attention for one query token a sequence (split-KV, "flash-decoding"). Called by attention/triton.py.

The contexts of a step are cut, on the device, into items: few while there is much to read, and shorter and shorter ones
towards the end, so that all programs end together. A program attends one item for the query heads of one kv head. The
last of a sequence's programs to finish merges what the others left, so that no second kernel has to wait for all.
The grid grows with the batch, not with the longest context a CUDA graph must allow for.
"""

from dataclasses import dataclass

import torch

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
from nanovllm.kernels.triton_utils import (
    jit,
    launch_options,
    next_power_of_2,
    num_multiprocessors,
    pdl_wait,
    prefetch_l2,
    tl,
    use_triton,
)

MIN_ITEM_LEN = 128  # shorter items would take less time than merging them
RESIDENT_PROGRAMS = 3  # on a multiprocessor
# Of partial results that a program holds at a time: where these are all of a sequence's; where there are more; and
# where there are more in a batch of few rows, whose contexts are in many items. It takes registers from all programs.
FEW_NUMBERS, MANY_NUMBERS, MOST_NUMBERS, FEW_ROWS = 4096, 8192, 16384, 8
PREFETCH_BLOCKS = 1  # of an item, before its program waits; two are no better, four are worse


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How a step's contexts are cut, and where partial results lie; the same for every layer."""

    items: torch.Tensor  # [max_items, ITEM_FIELDS] int32
    partial_out: torch.Tensor  # [max_items, num_heads, head_dim] float32
    partial_lse: torch.Tensor  # [max_items, num_heads] float32, log2 of the sum of exponentials
    arrivals: torch.Tensor  # [B, num_kv_heads] int32: how many of a sequence's programs are done; 0 between layers


def paged_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    max_context_len: int,
    out: torch.Tensor | None = None,
    plan: DecodePlan | None = None,
    is_early: bool = False,
) -> torch.Tensor:
    """Attention of each sequence's one query over its whole context -> [B, num_heads, head_dim].

    Args (the others: attention_common.py):
        context_lens: a row of none is zeros.
        max_context_len: no context is longer.
        plan: of `plan_decode` for these context_lens, to share among layers; None for one of its own.
        is_early: another kernel was launched between the plan and this: reading may begin while that one still runs.
    """
    if use_triton(q):
        return paged_attention_decode_triton(
            q, k_cache, v_cache, block_tables, context_lens, scale, max_context_len, out, plan, is_early
        )
    return paged_attention_decode_torch(q, k_cache, v_cache, block_tables, context_lens, scale, max_context_len, out)


def paged_attention_decode_torch(
    q, k_cache, v_cache, block_tables, context_lens, scale, max_context_len, out=None, plan=None, is_early=False
):
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    out = q.new_empty(q.shape) if out is None else out
    for row, length in enumerate(context_lens.tolist()):
        pages = block_tables[row, : -(-length // block_size)].long()
        k, v = (cache[pages].flatten(0, 1)[:length].float() for cache in (k_cache, v_cache))
        queries = q[row].float().view(num_kv_heads, group, q.shape[2])
        scores = torch.einsum("hgd,thd->hgt", queries, k) * scale
        out[row] = torch.einsum("hgt,thd->hgd", scores.softmax(-1), v).flatten(0, 1)
    return out


def plan_decode(
    context_lens: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int, max_context_len: int
) -> DecodePlan:
    """Cut contexts of lengths context_lens [B] int32, none beyond max_context_len; on CUDA only."""
    device, batch_size = context_lens.device, len(context_lens)
    num_shares, max_items = count_items(batch_size, num_kv_heads, max_context_len, MIN_ITEM_LEN, device)
    plan = DecodePlan(
        torch.empty(max_items, ITEM_FIELDS, dtype=torch.int32, device=device),
        torch.empty(max_items, num_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(max_items, num_heads, dtype=torch.float32, device=device),
        torch.empty(batch_size, num_kv_heads, dtype=torch.int32, device=device),
    )
    write_plan(context_lens, plan.items, plan.arrivals, num_shares, MIN_ITEM_LEN, block_len(head_dim))
    return plan


def block_len(head_dim: int) -> int:
    """Tokens that a program reads at a time, as many bytes of them at a head_dim of 64 as at 128."""
    return BLOCK if head_dim > 64 else 2 * BLOCK


def paged_attention_decode_triton(
    q, k_cache, v_cache, block_tables, context_lens, scale, max_context_len, out=None, plan=None, is_early=False,
    config=None,
):  # fmt: skip
    batch_size, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    check_layout(q, k_cache, v_cache)
    out = q.new_empty(q.shape) if out is None else out
    assert out.is_contiguous()
    if not batch_size:
        return out
    if plan is None:
        is_early = False
        plan = plan_decode(context_lens, num_heads, num_kv_heads, head_dim, max_context_len)
    block = block_len(head_dim)
    # Three stages of 16 KB of keys: two blocks, 64 KB, in flight, and three programs a multiprocessor.
    num_warps, num_stages = config or (4, 3 if k_cache.element_size() * head_dim * block <= 2**14 else 2)
    # As many programs as run at once, or none.
    num_early = RESIDENT_PROGRAMS * num_multiprocessors(q.device) if is_early else 0
    group = num_heads // num_kv_heads
    block_merge = next_power_of_2(group)
    many_numbers = MOST_NUMBERS if batch_size <= FEW_ROWS else MANY_NUMBERS
    _decode_kernel[(num_kv_heads * len(plan.items),)](  # in one dimension: others end at 65,535
        q, k_cache, v_cache, block_tables, plan.items, plan.partial_out, plan.partial_lse, plan.arrivals, out,
        scale * LOG2_E, q.stride(0), block_tables.stride(0), num_early,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, D=head_dim, PAGE=block_size, ITEM_FIELDS=ITEM_FIELDS,
        BLOCK=block, BLOCK_HEADS=max(block_merge, 16), BLOCK_MERGE=block_merge,
        FEW_ITEMS=max(FEW_NUMBERS // (block_merge * head_dim), 1),
        MANY_ITEMS=max(many_numbers // (block_merge * head_dim), 1),
        PREFETCH_BLOCKS=PREFETCH_BLOCKS, num_warps=num_warps, num_stages=num_stages, **launch_options(),
    )  # fmt: skip
    return out


@jit(do_not_specialize=("block_tables_ptr", "table_stride", "num_early"))
def _decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, items_ptr, partial_out_ptr, partial_lse_ptr, arrivals_ptr,
    out_ptr, scale_log2, q_stride, table_stride, num_early,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ITEM_FIELDS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_MERGE: tl.constexpr, FEW_ITEMS: tl.constexpr,
    MANY_ITEMS: tl.constexpr, PREFETCH_BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program an item and kv head; its GROUP query heads are the first rows of a tile that tl.dot accepts."""
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    ROW: tl.constexpr = NUM_KV_HEADS * D
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    item = tl.program_id(0) // NUM_KV_HEADS
    if PDL:  # noqa: SIM102 - this is known when compiling
        # Who comes later would not wait, and has nothing to gain.
        if tl.program_id(0) < num_early:
            prefetch_item(
                k_cache_ptr, v_cache_ptr, block_tables_ptr, table_stride, items_ptr + item * ITEM_FIELDS, kv_head,
                ROW, D, PAGE, BLOCK, PREFETCH_BLOCKS,
            )  # fmt: skip
    pdl_wait(PDL)
    item_ptr = items_ptr + item * ITEM_FIELDS
    seq = tl.load(item_ptr).to(tl.int64)
    begin = tl.load(item_ptr + 1)
    end = tl.load(item_ptr + 2)
    first_item = tl.load(item_ptr + 3)
    num_items = tl.load(item_ptr + 4)
    if seq >= 0:
        dims = tl.arange(0, D)
        offsets = tl.arange(0, BLOCK)
        rows = tl.arange(0, BLOCK_HEADS)
        heads = kv_head * GROUP + rows
        in_group = rows < GROUP
        q = tl.load(q_ptr + seq * q_stride + heads[:, None] * D + dims[None, :], mask=in_group[:, None], other=0.0)
        table_ptr = block_tables_ptr + seq * table_stride
        m = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)  # running maximum of the scores, in units of log2
        l = tl.zeros([BLOCK_HEADS], tl.float32)  # running sum of 2^(score - m)  # noqa: E741
        acc = tl.zeros([BLOCK_HEADS, D], tl.float32)
        pages = load_pages(table_ptr, begin, end, offsets, PAGE, BLOCK)
        for token in range(begin, end, BLOCK):
            # The next pages are asked for now: otherwise each k and v would wait for two reads, one after the other.
            next_pages = load_pages(table_ptr, token + BLOCK, end, offsets, PAGE, BLOCK)
            kv_offsets = page_offsets(pages, token, offsets, ROW, PAGE, BLOCK)[:, None] + kv_head * D + dims[None, :]
            live = token + offsets < end
            k = tl.load(k_cache_ptr + kv_offsets, mask=live[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            scores = tl.where(live[None, :], scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            p = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
            v = tl.load(v_cache_ptr + kv_offsets, mask=live[:, None], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new
            pages = next_pages
        acc = acc / tl.where(l > 0, l, 1.0)[:, None]  # an empty context has no sum

        head_offsets = heads[:, None] * D + dims[None, :]
        if num_items == 1:
            out_offsets = seq * (NUM_HEADS * D) + head_offsets
            tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=in_group[:, None])
        else:
            tl.store(partial_out_ptr + item * (NUM_HEADS * D) + head_offsets, acc, mask=in_group[:, None])
            tl.store(partial_lse_ptr + item * NUM_HEADS + heads, m + tl.log2(l), mask=in_group)
            # All threads' stores come before the count (barrier, release), all loads of a merge after it (acquire).
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + seq * NUM_KV_HEADS + kv_head, 1, sem="acq_rel")
            if arrived == num_items - 1:
                tl.store(arrivals_ptr + seq * NUM_KV_HEADS + kv_head, 0)  # for the next layer
                merge_rows = tl.arange(0, BLOCK_MERGE)
                merge_heads = kv_head * GROUP + merge_rows
                if num_items <= FEW_ITEMS:
                    merged = merge_items(
                        partial_out_ptr, partial_lse_ptr, first_item, num_items, merge_heads, merge_rows < GROUP,
                        NUM_HEADS, D, BLOCK_MERGE, FEW_ITEMS,
                    )  # fmt: skip
                else:
                    merged = merge_items(
                        partial_out_ptr, partial_lse_ptr, first_item, num_items, merge_heads, merge_rows < GROUP,
                        NUM_HEADS, D, BLOCK_MERGE, MANY_ITEMS,
                    )  # fmt: skip
                merge_offsets = seq * (NUM_HEADS * D) + merge_heads[:, None] * D + dims[None, :]
                tl.store(
                    out_ptr + merge_offsets, merged.to(out_ptr.dtype.element_ty), mask=(merge_rows < GROUP)[:, None]
                )


@jit
def prefetch_item(
    k_cache_ptr, v_cache_ptr, block_tables_ptr, table_stride, item_ptr, kv_head,
    ROW: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Have the first keys and values of an item travel to L2, where it is no harm that the newest are being written."""
    # .cg, here and below: this multiprocessor's L1 may hold what the step before left in these places.
    seq = tl.load(item_ptr, cache_modifier=".cg").to(tl.int64)
    begin = tl.load(item_ptr + 1, cache_modifier=".cg")
    end = tl.load(item_ptr + 2, cache_modifier=".cg")
    if seq >= 0:
        LINE: tl.constexpr = 1024 // k_cache_ptr.dtype.element_ty.primitive_bitwidth  # elements in 128 bytes
        offsets = tl.arange(0, BLOCK)
        lines = tl.arange(0, (D + LINE - 1) // LINE) * LINE
        table_ptr = block_tables_ptr + seq * table_stride
        for i in tl.static_range(NUM_BLOCKS):
            tokens = begin + i * BLOCK + offsets
            # Of tokens beyond the end page 0 is asked for, which is there.
            pages = tl.load(table_ptr + tokens // PAGE, mask=tokens < end, other=0, cache_modifier=".cg").to(tl.int64)
            kv_offsets = ((pages * PAGE + tokens % PAGE) * ROW)[:, None] + kv_head * D + lines[None, :]
            prefetch_l2(k_cache_ptr + kv_offsets)
            prefetch_l2(v_cache_ptr + kv_offsets)


@jit
def merge_items(
    partial_out_ptr, partial_lse_ptr, first_item, num_items, heads, head_live,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_MERGE: tl.constexpr, MERGE_ITEMS: tl.constexpr,
):  # fmt: skip
    """The mean of a sequence's partial results, weighted by their sums of exponentials; [BLOCK_MERGE, D] float32."""
    dims = tl.arange(0, D)
    m = tl.full([BLOCK_MERGE], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_MERGE], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_MERGE, D], tl.float32)
    for start in range(0, num_items, MERGE_ITEMS):
        items = start + tl.arange(0, MERGE_ITEMS)
        live = (items < num_items)[:, None] & head_live[None, :]
        rows = (first_item + items)[:, None] * NUM_HEADS + heads[None, :]
        # .cg: written by other multiprocessors, so not from this one's L1.
        lse = tl.load(partial_lse_ptr + rows, mask=live, other=float("-inf"), cache_modifier=".cg")
        out_ptrs = partial_out_ptr + rows[:, :, None] * D + dims[None, None, :]
        out = tl.load(out_ptrs, mask=live[:, :, None], other=0.0, cache_modifier=".cg")
        m_new = tl.where(head_live, tl.maximum(m, tl.max(lse, axis=0)), 0.0)
        weight = tl.exp2(lse - m_new[None, :])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(weight, axis=0)  # noqa: E741
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * out, axis=0)
        m = m_new
    return acc / tl.where(head_live, l, 1.0)[:, None]
