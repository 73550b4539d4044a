"""Paged attention with the package flash-attn (version 2), for CUDA; its pages are multiples of 256 tokens."""

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from nanovllm.attention import AttentionBackend
from nanovllm.utils.context import Context


class FlashAttnBackend(AttentionBackend):
    def prepare(self, context: Context) -> None:
        """`backend_data`: cumulative context lengths of the rows that are not decodes, [B - num_decodes + 1] int32."""
        if context.cu_seqlens_q is not None:
            lens = context.context_lens[context.num_decodes :]
            context.backend_data = F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))

    def forward(self, q, k_cache, v_cache, scale, context):
        n = context.num_decodes
        if context.cu_seqlens_q is None:
            return self._decode(q, k_cache, v_cache, scale, context)
        out = torch.empty_like(q)
        if n:  # split-KV only helps, and only works, for single queries
            out[:n] = self._decode(q[:n], k_cache, v_cache, scale, context)
        out[n:] = flash_attn_varlen_func(
            q[n:],
            k_cache,
            v_cache,
            cu_seqlens_q=context.cu_seqlens_q[n:] - n,
            cu_seqlens_k=context.backend_data,
            max_seqlen_q=context.max_seqlen_q,
            max_seqlen_k=context.max_context_len,
            softmax_scale=scale,
            causal=True,
            block_table=context.block_tables[n:],
        )
        return out

    def _decode(self, q, k_cache, v_cache, scale, context: Context):
        n = context.num_decodes
        return flash_attn_with_kvcache(
            q.unsqueeze(1),
            k_cache,
            v_cache,
            cache_seqlens=context.context_lens[:n],
            block_table=context.block_tables[:n],
            softmax_scale=scale,
            causal=True,
        ).squeeze(1)
