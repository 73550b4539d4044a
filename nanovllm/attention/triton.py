"""Paged attention with our own Triton kernels, for CUDA: nothing to compile at install, pages from 16 tokens up."""

import torch

from nanovllm.attention import AttentionBackend
from nanovllm.kernels.attention_decode import paged_attention_decode, plan_decode
from nanovllm.kernels.attention_prefill import paged_attention_prefill
from nanovllm.utils.context import Context


class TritonBackend(AttentionBackend):
    def prepare(self, context: Context) -> None:
        """`backend_data`: how the decodes' contexts are cut. Not left to the first layer, so that in all of them
        it is older than the kernel before attention, during which attention begins to read."""
        if context.num_decodes:
            context.backend_data = plan_decode(
                context.context_lens[: context.num_decodes], *self.heads, context.max_context_len
            )

    def forward(self, q, k_cache, v_cache, scale, context):
        n = context.num_decodes
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if n:
            paged_attention_decode(
                q[:n], k_cache, v_cache, context.block_tables[:n], context.context_lens[:n], scale,
                context.max_context_len, out=out[:n], plan=context.backend_data, is_early=True,
            )  # fmt: skip
        if context.cu_seqlens_q is not None:
            paged_attention_prefill(
                q, k_cache, v_cache, context.block_tables[n:], context.cu_seqlens_q[n:], context.context_lens[n:],
                scale, context.max_seqlen_q, out=out,
            )  # fmt: skip
        return out
