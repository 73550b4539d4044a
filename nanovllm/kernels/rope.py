"""What lies between the qkv product and attention: head norms, rotary embedding, KV store. Called by layers/attention.py."""

import torch

from nanovllm.kernels.norm import rms_norm_torch


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm each head of q and k (if weights are given), rotate them, store k and v in the cache.

    Args:
        qkv: [T, (num_heads + 2 · num_kv_heads) · head_dim], q then k then v; q and k are overwritten.
        positions: [T] int64.
        cos_sin: [max_position, head_dim] float32, cosines in the first half and sines in the second.
        q_weight, k_weight: [head_dim] of the per-head RMSNorm, or None for none.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping: [T] int64, block · block_size + offset.

    Returns:
        q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim]; views of `qkv`.
    """
    return qk_norm_rope_store_torch(
        qkv, positions, cos_sin, q_weight, k_weight, eps, k_cache, v_cache, slot_mapping
    )


def qk_norm_rope_store_torch(qkv, positions, cos_sin, q_weight, k_weight, eps, k_cache, v_cache, slot_mapping):
    num_kv_heads, head_dim = k_cache.shape[-2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)  # [T, 1, head_dim / 2]
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = x if weight is None else rms_norm_torch(x, weight, eps)
        x1, x2 = normed.float().chunk(2, -1)
        x.copy_(torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1))
    k_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, v)
    return q, k, v
