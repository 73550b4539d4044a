"""Attention of `deterministic=True`: bitwise the same for a query in any batch, prompt or decode, on CPU and CUDA."""

from nanovllm.attention import AttentionBackend
from nanovllm.kernels.attention_invariant import paged_attention_invariant, plan_invariant
from nanovllm.kernels.triton_utils import use_triton
from nanovllm.utils.context import Context


class InvariantBackend(AttentionBackend):
    def prepare(self, context: Context) -> None:
        """`backend_data`: the step's plan, by layer shape; filled at the first layer."""
        context.backend_data = None

    def forward(self, q, k, v, k_cache, v_cache, scale, context):
        if context.backend_data is None and use_triton(q):
            context.backend_data = plan_invariant(
                context.cu_seqlens_q, context.context_lens, context.num_decodes, *q.shape, k.shape[1],
                context.max_context_len,
            )  # fmt: skip
        return paged_attention_invariant(
            q, k_cache, v_cache, context.block_tables, context.cu_seqlens_q, context.context_lens, scale,
            context.backend_data,
        )  # fmt: skip
