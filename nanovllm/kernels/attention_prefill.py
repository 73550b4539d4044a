"""Paged causal attention for runs of new tokens: prompts, chunks of prompts, what follows a cached prefix.

Called by attention/triton.py. Keys and values of the new tokens are in the cache already, so a chunk, a prefix hit and
a whole prompt are one case: the queries are the last tokens of their contexts.
"""

import torch

from nanovllm.kernels.attention_common import LOG2_E, check_layout, load_pages, page_offsets
from nanovllm.kernels.triton_utils import (
    jit,
    launch_options,
    num_multiprocessors,
    pdl_wait,
    shared_memory_bytes,
    tl,
    use_triton,
)


def paged_attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    max_seqlen_q: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's last tokens over its whole context -> [T, num_heads, head_dim].

    Args (the others: attention_common.py):
        cu_seqlens_q: need not begin at 0: rows of q outside all sequences are skipped, and so are theirs of `out`.
        max_seqlen_q: no sequence has more queries.
    """
    run = paged_attention_prefill_triton if use_triton(q) else paged_attention_prefill_torch
    return run(q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale, max_seqlen_q, out)


def paged_attention_prefill_torch(
    q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale, max_seqlen_q, out=None
):
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    out = q.new_empty(q.shape) if out is None else out
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(context_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        pages = block_tables[row, : -(-length // block_size)].long()
        k, v = (cache[pages].flatten(0, 1)[:length].float() for cache in (k_cache, v_cache))
        queries = q[start:end].float().view(end - start, num_kv_heads, group, q.shape[2])
        scores = torch.einsum("qhgd,thd->hgqt", queries, k) * scale
        positions = torch.arange(length, device=q.device)
        seen = positions <= positions[length - (end - start) :, None]  # [q_len, length]
        scores = scores.masked_fill(~seen, float("-inf"))
        out[start:end] = torch.einsum("hgqt,thd->qhgd", scores.softmax(-1), v).flatten(1, 2)
    return out


def paged_attention_prefill_triton(
    q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, scale, max_seqlen_q, out=None, config=None
):
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    check_layout(q, k_cache, v_cache)
    out = q.new_empty(q.shape) if out is None else out
    assert out.is_contiguous()
    batch_size, group = len(context_lens), num_heads // num_kv_heads
    if not num_tokens or not batch_size:
        return out
    block_m, block_n, num_warps, num_stages = config or choose_config(q, max_seqlen_q, num_kv_heads)
    # Tile i belongs to the sequence b with first_tile(b) <= i < first_tile(b + 1), where
    # first_tile(b) = cu_seqlens_q[b] * group // block_m + b: enough for each, at most one to spare.
    num_tiles = num_tokens * group // block_m + batch_size
    _prefill_kernel[(num_kv_heads * num_tiles,)](  # in one dimension: others end at 65,535
        q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, out,
        scale * LOG2_E, batch_size, q.stride(0), block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, D=head_dim, PAGE=block_size,
        BLOCK_M=block_m, BLOCK_N=block_n, SEARCH=256, num_warps=num_warps, num_stages=num_stages, **launch_options(),
    )  # fmt: skip
    return out


# (rows of queries and heads, keys, warps, stages) of a tile; of each list the first that shared memory holds is taken.
LARGE_TILES = (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)
SMALL_TILES = (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)


def choose_config(q: torch.Tensor, max_seqlen_q: int, num_kv_heads: int) -> tuple[int, int, int, int]:
    num_tokens, num_heads, head_dim = q.shape
    if q.element_size() == 4:  # exact float32 has no tensor cores: the largest tile that registers hold
        return 32, 32, 8, 1
    # Where large tiles would leave half of the chip idle, or mostly be empty, small ones, of the fewest rows that wgmma
    # takes. Two of them share a multiprocessor at a head_dim of 64.
    num_slots = num_multiprocessors(q.device) * 128 // head_dim
    is_small = num_tokens * num_heads // 128 * 2 <= num_slots or max_seqlen_q * num_heads // num_kv_heads <= 64
    tiles = SMALL_TILES if is_small else LARGE_TILES
    fitting = [tile for tile in tiles if tile_bytes(tile, head_dim) <= shared_memory_bytes(q.device)]
    return fitting[0] if fitting else tiles[-1]


def tile_bytes(tile: tuple[int, int, int, int], head_dim: int) -> int:
    """Of shared memory, in 16 bits a number: queries, and of each stage keys and values. Before Hopper it is less."""
    block_m, block_n, _, num_stages = tile
    return 2 * head_dim * (block_m + 2 * num_stages * block_n)


@jit(do_not_specialize=("block_tables_ptr", "cu_seqlens_q_ptr", "context_lens_ptr", "batch_size", "table_stride"))
def _prefill_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, cu_seqlens_q_ptr, context_lens_ptr, out_ptr,
    scale_log2, batch_size, q_stride, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEARCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a kv head and BLOCK_M rows of a sequence; row r is query r // GROUP, r % GROUP of the head's group.

    So a tile of keys serves the whole group, and a tile of rows spans few positions: little of its last keys is masked.
    """
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    # The longest contexts of a sequence first, so that none is last.
    tile = tl.num_programs(0) // NUM_KV_HEADS - 1 - tl.program_id(0) // NUM_KV_HEADS
    pdl_wait(PDL)
    seq = -1
    for first_seq in range(0, batch_size, SEARCH):
        seqs = first_seq + tl.arange(0, SEARCH)
        starts = tl.load(cu_seqlens_q_ptr + seqs, mask=seqs < batch_size, other=0)
        seq += tl.sum(((seqs < batch_size) & (starts * GROUP // BLOCK_M + seqs <= tile)).to(tl.int32), axis=0)
    if seq >= 0:
        q_start = tl.load(cu_seqlens_q_ptr + seq)
        q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
        context_len = tl.load(context_lens_ptr + seq)
        first_row = (tile - q_start * GROUP // BLOCK_M - seq) * BLOCK_M
        if first_row < q_len * GROUP:
            dims = tl.arange(0, D)
            rows = first_row + tl.arange(0, BLOCK_M)
            queries = rows // GROUP
            row_live = queries < q_len
            tokens = (q_start + queries).to(tl.int64)
            heads = kv_head * GROUP + rows % GROUP
            q_ptrs = q_ptr + (tokens * q_stride + heads * D)[:, None] + dims[None, :]
            q = tl.load(q_ptrs, mask=row_live[:, None], other=0.0)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum of the scores, in units of log2
            l = tl.zeros([BLOCK_M], tl.float32)  # running sum of 2^(score - m)  # noqa: E741
            acc = tl.zeros([BLOCK_M, D], tl.float32)

            positions = context_len - q_len + queries
            first_position = context_len - q_len + first_row // GROUP
            last_position = tl.minimum(context_len - q_len + (first_row + BLOCK_M - 1) // GROUP, context_len - 1)
            table_ptr = block_tables_ptr + tl.cast(seq, tl.int64) * table_stride
            k_ptr = k_cache_ptr + kv_head * D
            v_ptr = v_cache_ptr + kv_head * D
            # Whole tiles of keys that every row sees need no mask; the rest do.
            whole_end = (first_position + 1) // BLOCK_N * BLOCK_N
            acc, l, m = attend(  # noqa: E741
                q, acc, l, m, positions, k_ptr, v_ptr, table_ptr, 0, whole_end, scale_log2,
                NUM_KV_HEADS * D, D, PAGE, BLOCK_N, False,
            )  # fmt: skip
            acc, l, m = attend(  # noqa: E741
                q, acc, l, m, positions, k_ptr, v_ptr, table_ptr, whole_end, last_position + 1, scale_log2,
                NUM_KV_HEADS * D, D, PAGE, BLOCK_N, True,
            )  # fmt: skip

            out_ptrs = out_ptr + ((tokens * (NUM_KV_HEADS * GROUP) + heads) * D)[:, None] + dims[None, :]
            tl.store(out_ptrs, (acc / l[:, None]).to(out_ptr.dtype.element_ty), mask=row_live[:, None])


@jit
def attend(
    q, acc, l, m, positions, k_ptr, v_ptr, table_ptr, begin, end, scale_log2,  # noqa: E741
    ROW: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys from `begin`, a multiple of BLOCK_N, to `end` into the running softmax (acc, l, m)."""
    dims = tl.arange(0, D)
    offsets = tl.arange(0, BLOCK_N)
    pages = load_pages(table_ptr, begin, end, offsets, PAGE, BLOCK_N)
    for token in range(begin, end, BLOCK_N):
        # The next pages are asked for now: otherwise each k and v would wait for two reads, one after the other.
        next_pages = load_pages(table_ptr, token + BLOCK_N, end, offsets, PAGE, BLOCK_N)
        kv_offsets = page_offsets(pages, token, offsets, ROW, PAGE, BLOCK_N)[:, None] + dims[None, :]
        if MASKED:
            k = tl.load(k_ptr + kv_offsets, mask=(token + offsets < end)[:, None], other=0.0)
        else:
            k = tl.load(k_ptr + kv_offsets)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(positions[:, None] >= token + offsets[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
        acc = acc * alpha[:, None]
        if MASKED:
            v = tl.load(v_ptr + kv_offsets, mask=(token + offsets < end)[:, None], other=0.0)
        else:
            v = tl.load(v_ptr + kv_offsets)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
        pages = next_pages
    return acc, l, m
