"""Paged attention with torch's scaled_dot_product_attention: any device, any block size; the readable oracle."""

import torch
import torch.nn.functional as F

from nanovllm.attention import AttentionBackend
from nanovllm.utils.context import Context

MAX_GATHERED_TOKENS = 2**17  # copies of keys and values at once; bounds the memory of a large batch


class SdpaBackend(AttentionBackend):
    supports_cuda_graph = False  # the gathered context is as long as the longest row, which changes every step

    def prepare(self, context: Context) -> None:
        """`backend_data`: the cache slots of every row's context, [B, max_context_len] int64; lengths as ints, and
        starts where not all are decodes; and the mask of the decodes, [num_decodes, their longest context] bool."""
        offsets = torch.arange(context.max_context_len, device=context.block_tables.device)
        slots = context.block_tables[:, offsets // self.block_size].long() * self.block_size + offsets % self.block_size
        # A mask takes a weight to 0, but 0 · NaN is NaN: past its context a row reads its own first slot again.
        slots = slots.where(offsets < context.context_lens[:, None], slots[:, :1])
        lens = context.context_lens.tolist()
        starts = [] if context.cu_seqlens_q is None else context.cu_seqlens_q.tolist()
        longest = max(lens[: context.num_decodes], default=0)
        mask = offsets[:longest] < context.context_lens[: context.num_decodes, None]
        context.backend_data = slots, lens, starts, mask

    def forward(self, q, k_cache, v_cache, scale, context):
        slots, lens, starts, mask = context.backend_data
        k_cache = k_cache.flatten(0, 1)  # [num_slots, num_kv_heads, head_dim]
        v_cache = v_cache.flatten(0, 1)
        num_decodes = context.num_decodes
        outputs = []
        if num_decodes:
            outputs.append(decode(q[:num_decodes], k_cache, v_cache, slots[:num_decodes, : mask.shape[1]], mask, scale))
        for row in range(num_decodes, len(lens)):
            row_slots = slots[row, : lens[row]]
            outputs.append(prefill(q[starts[row] : starts[row + 1]], k_cache[row_slots], v_cache[row_slots], scale))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def decode(q, k_cache, v_cache, slots, mask, scale):
    """One query token a row. q [B, num_heads, head_dim]; slots, mask [B, longest context] -> like q.

    The query heads that share a kv head become the query length of one attention, so that k and v are not repeated.
    """
    batch_size, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    rows = max(MAX_GATHERED_TOKENS // slots.shape[1], 1)
    if batch_size > rows:
        parts = zip(q.split(rows), slots.split(rows), mask.split(rows))
        return torch.cat([decode(q_part, k_cache, v_cache, *part, scale) for q_part, *part in parts])
    shape = (*slots.shape, num_kv_heads, head_dim)
    k = k_cache.index_select(0, slots.flatten()).view(shape).transpose(1, 2)  # [B, num_kv_heads, context, head_dim]
    v = v_cache.index_select(0, slots.flatten()).view(shape).transpose(1, 2)
    q = q.view(batch_size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], scale=scale)
    return out.reshape(batch_size, num_heads, head_dim)


def prefill(q, k, v, scale):
    """The last q_len tokens of one context. q [q_len, num_heads, head_dim]; k, v [len, num_kv_heads, head_dim] -> as q.

    Of the query heads that share a kv head one at a time, so that k and v are not repeated. `enable_gqa` has no fast
    path on CPUs in torch 2.6, where it stores q_len · len scores for each head; and k and v expanded without a copy are
    read wrongly on CUDA by torch 2.12 (pytorch/pytorch#191937).
    """
    q_len, context_len, group = len(q), len(k), q.shape[1] // k.shape[1]
    mask = None
    if q_len < context_len:
        mask = torch.ones(q_len, context_len, dtype=torch.bool, device=q.device).tril(context_len - q_len)
    out = q.new_empty(q.shape)
    q, k, v, heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, out))  # [1, num_heads, q_len, head_dim]
    for i in range(group):
        heads[:, i::group] = F.scaled_dot_product_attention(
            q[:, i::group], k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    return out
