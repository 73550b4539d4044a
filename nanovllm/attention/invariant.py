"""Attention of `deterministic=True`: bitwise the same for a query in any batch, prompt or decode, on CPU and CUDA."""

from nanovllm.attention import AttentionBackend
from nanovllm.kernels.attention_invariant import paged_attention_invariant, plan_invariant
from nanovllm.kernels.triton_utils import use_triton
from nanovllm.utils.context import Context


class InvariantBackend(AttentionBackend):
    def prepare(self, context: Context) -> None:
        """`backend_data`: the step's plan; on a CPU None, since the kernel's twin does without."""
        if use_triton(context.context_lens):
            context.backend_data = plan_invariant(
                context.cu_seqlens_q, context.context_lens, context.num_decodes, len(context.slot_mapping),
                *self.heads, context.max_context_len,
            )  # fmt: skip

    def forward(self, q, k_cache, v_cache, scale, context):
        return paged_attention_invariant(
            q, k_cache, v_cache, context.block_tables, context.cu_seqlens_q, context.context_lens, scale,
            context.backend_data,
        )  # fmt: skip
