"""Paged attention with our own Triton kernels, for CUDA: nothing to compile at install, pages from 16 tokens up."""

import torch

from nanovllm.attention import AttentionBackend
from nanovllm.kernels.attention_decode import paged_attention_decode, plan_decode
from nanovllm.kernels.attention_prefill import paged_attention_prefill
from nanovllm.utils.context import Context


class TritonBackend(AttentionBackend):
    def prepare(self, context: Context) -> None:
        """`backend_data`: how the decodes' contexts are cut, by layer shape; filled at the first layer."""
        context.backend_data = None

    def forward(self, q, k, v, k_cache, v_cache, scale, context):
        n = context.num_decodes
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if n:
            if context.backend_data is None:
                (num_heads, head_dim), num_kv_heads = q.shape[1:], k.shape[1]
                context.backend_data = plan_decode(
                    context.context_lens[:n], num_heads, num_kv_heads, head_dim, context.max_context_len
                )
            paged_attention_decode(
                q[:n], k_cache, v_cache, context.block_tables[:n], context.context_lens[:n], scale,
                context.max_context_len, out=out[:n], plan=context.backend_data,
            )  # fmt: skip
        if context.cu_seqlens_q is not None:
            paged_attention_prefill(
                q, k_cache, v_cache, context.block_tables[n:], context.cu_seqlens_q[n:], context.context_lens[n:],
                scale, context.max_seqlen_q, out=out,
            )  # fmt: skip
        return out
