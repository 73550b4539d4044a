"""What lies between the qkv product and attention: head norms, rotation, KV store. Called by layers/attention.py."""

import torch

from nanovllm.kernels.norm import rms_norm_torch
from nanovllm.kernels.triton_utils import jit, launch_options, next_power_of_2, pdl_wait, tl, use_triton


def qk_norm_rope_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Norm each head of q and k (if weights are given), rotate them, store k and v in the cache.

    Args:
        qkv: [T, (num_heads + 2 · num_kv_heads) · head_dim], q then k then v; q is overwritten.
        positions: [T] int64.
        cos_sin: [max_position, head_dim] float32, cosines in the first half and sines in the second.
        q_weight, k_weight: [head_dim] of the per-head RMSNorm, or None for none.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping: [T] int64, block · block_size + offset.

    Returns:
        q [T, num_heads, head_dim], normed and rotated, a view of `qkv`.
    """
    run = qk_norm_rope_store_triton if use_triton(qkv) else qk_norm_rope_store_torch
    return run(qkv, positions, cos_sin, q_weight, k_weight, eps, k_cache, v_cache, slot_mapping)


def split_heads(qkv: torch.Tensor, num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim] of `qkv`."""
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v


def qk_norm_rope_store_torch(qkv, positions, cos_sin, q_weight, k_weight, eps, k_cache, v_cache, slot_mapping):
    num_kv_heads, head_dim = k_cache.shape[-2:]
    q, k, v = split_heads(qkv, num_kv_heads, head_dim)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)  # [T, 1, head_dim / 2]

    def rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        normed = x if weight is None else rms_norm_torch(x, weight, eps)
        x1, x2 = normed.float().chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)

    q.copy_(rotate(q, q_weight))
    k_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, rotate(k, k_weight))
    v_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, v)
    return q


def qk_norm_rope_store_triton(qkv, positions, cos_sin, q_weight, k_weight, eps, k_cache, v_cache, slot_mapping):
    num_kv_heads, head_dim = k_cache.shape[-2:]
    q, _, _ = split_heads(qkv, num_kv_heads, head_dim)
    assert (q_weight is None) == (k_weight is None)
    assert qkv.stride(1) == 1
    assert all(x.is_contiguous() for x in (k_cache, v_cache, cos_sin))
    if len(qkv):
        num_heads = q.shape[1]
        block_half = next_power_of_2(head_dim // 2)
        # Both halves of the tile are 8 elements a thread in 2 warps: one 16-byte load each, and small enough a program
        # that even one token spreads over several multiprocessors.
        block_heads = max(512 // block_half, 1)
        grid = (len(qkv), -(-(num_heads + 2 * num_kv_heads) // block_heads))
        _qk_norm_rope_store_kernel[grid](
            qkv, positions, cos_sin, q_weight, k_weight, k_cache, v_cache, slot_mapping, qkv.stride(0), eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, D=head_dim, HAS_NORM=q_weight is not None,
            BLOCK_HEADS=block_heads, BLOCK_HALF=block_half, num_warps=2, **launch_options(),
        )  # fmt: skip
    return q


@jit(do_not_specialize=("positions_ptr", "slot_mapping_ptr"))
def _qk_norm_rope_store_kernel(
    qkv_ptr, positions_ptr, cos_sin_ptr, q_weight_ptr, k_weight_ptr, k_cache_ptr, v_cache_ptr, slot_mapping_ptr,
    qkv_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token and BLOCK_HEADS of its heads, counted through q, k and v; x1 and x2 are a head's halves."""
    dtype = qkv_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    cols = tl.arange(0, BLOCK_HALF)
    is_q = (heads < NUM_HEADS)[:, None]
    is_k = ((heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS))[:, None]
    is_v = ((heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS))[:, None]
    in_half = cols < D // 2
    if HAS_NORM:  # before the wait: nobody writes weights
        q_weight1 = tl.load(q_weight_ptr + cols, mask=in_half, other=0.0)
        q_weight2 = tl.load(q_weight_ptr + D // 2 + cols, mask=in_half, other=0.0)
        k_weight1 = tl.load(k_weight_ptr + cols, mask=in_half, other=0.0)
        k_weight2 = tl.load(k_weight_ptr + D // 2 + cols, mask=in_half, other=0.0)
    pdl_wait(PDL)

    position = tl.load(positions_ptr + token)
    slot = tl.load(slot_mapping_ptr + token)
    x_ptrs = qkv_ptr + token * qkv_stride + heads[:, None] * D + cols[None, :]
    live = (is_q | is_k | is_v) & in_half[None, :]
    raw1 = tl.load(x_ptrs, mask=live, other=0.0)
    raw2 = tl.load(x_ptrs + D // 2, mask=live, other=0.0)
    cos = tl.load(cos_sin_ptr + position * D + cols, mask=in_half, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * D + D // 2 + cols, mask=in_half, other=0.0)[None, :]

    x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + eps)[:, None]
        weight1 = tl.where(is_q, q_weight1[None, :], k_weight1[None, :]).to(tl.float32)
        weight2 = tl.where(is_q, q_weight2[None, :], k_weight2[None, :]).to(tl.float32)
        x1 = (x1 * scale * weight1).to(dtype).to(tl.float32)
        x2 = (x2 * scale * weight2).to(dtype).to(tl.float32)
    rotated1 = (x1 * cos - x2 * sin).to(dtype)
    rotated2 = (x2 * cos + x1 * sin).to(dtype)

    q_live = is_q & in_half[None, :]
    tl.store(x_ptrs, rotated1, mask=q_live)
    tl.store(x_ptrs + D // 2, rotated2, mask=q_live)
    # Pointers of rows of other kinds run outside the slot; their masks are off.
    k_ptrs = k_cache_ptr + slot * (NUM_KV_HEADS * D) + (heads - NUM_HEADS)[:, None] * D + cols[None, :]
    k_live = is_k & in_half[None, :]
    tl.store(k_ptrs, rotated1, mask=k_live)
    tl.store(k_ptrs + D // 2, rotated2, mask=k_live)
    v_heads = heads - NUM_HEADS - NUM_KV_HEADS
    v_ptrs = v_cache_ptr + slot * (NUM_KV_HEADS * D) + v_heads[:, None] * D + cols[None, :]
    v_live = is_v & in_half[None, :]
    tl.store(v_ptrs, raw1, mask=v_live)
    tl.store(v_ptrs + D // 2, raw2, mask=v_live)
