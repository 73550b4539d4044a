"""Attention over the paged KV cache: from the packed qkv product to the heads' outputs."""

import torch
from torch import nn

from nanovllm.attention import AttentionBackend
from nanovllm.kernels.rope import qk_norm_rope_store
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.context import get_context


class Attention(nn.Module):
    """Head norms (if any), rotation, KV store, attention. The runner binds `k_cache`, `v_cache` and `backend`."""

    k_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor
    backend: AttentionBackend

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, rotary_emb: RotaryEmbedding):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.rotary_emb = rotary_emb

    def forward(
        self,
        positions: torch.Tensor,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor:
        """positions [T] int64; qkv [T, (num_heads + 2 · num_kv_heads) · head_dim] -> [T, num_heads · head_dim]."""
        context = get_context()
        k_cache, v_cache, cos_sin = self.k_cache, self.v_cache, self.rotary_emb.cos_sin
        q = qk_norm_rope_store(qkv, positions, cos_sin, q_norm, k_norm, eps, k_cache, v_cache, context.slot_mapping)
        return self.backend.forward(q, k_cache, v_cache, self.scale, context).flatten(1)
