"""Qwen3, the dense decoder written out to be read; its relatives override what differs.

Activations are [T, hidden]: the T new tokens of all rows of the batch, one after another.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from nanovllm.config import head_dim
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import RotaryEmbedding, get_rope
from nanovllm.utils.context import get_context
from nanovllm.utils.distributed import TensorParallel


class Qwen3Attention(nn.Module):
    qk_norm = True  # an RMSNorm on each head of q and k, before rotation

    def __init__(self, config: Any, rotary_emb: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        dim, num_heads, num_kv_heads = head_dim(config), config.num_attention_heads, config.num_key_value_heads
        qkv_bias, o_bias = self.biases(config)
        self.eps = config.rms_norm_eps
        self.qkv_proj = QKVParallelLinear(config.hidden_size, dim, num_heads, num_kv_heads, qkv_bias, tp)
        self.o_proj = RowParallelLinear(num_heads * dim, config.hidden_size, o_bias, tp)
        self.attn = Attention(num_heads // tp.size, tp.kv_heads(num_kv_heads), dim, rotary_emb)
        self.q_norm = RMSNorm(dim, self.eps) if self.qk_norm else None
        self.k_norm = RMSNorm(dim, self.eps) if self.qk_norm else None

    def biases(self, config: Any) -> tuple[bool, bool]:
        """Whether q, k, v and whether o have a bias."""
        return config.attention_bias, config.attention_bias

    def forward(
        self,
        positions: torch.Tensor,
        norm: RMSNorm,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        kept: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of norm(hidden_states + residual), and the residual stream: [T, hidden] each.

        positions [T] int64; hidden_states [T, hidden], or a sum that the norm takes (see RowParallelLinear), as the
        result may be; residual [T, hidden], None in the first layer; with `kept` [n] the results are [n, hidden].
        """
        qkv, residual = self.qkv_proj.forward_normed(norm, hidden_states, residual)
        q_weight = self.q_norm.weight if self.q_norm is not None else None
        k_weight = self.k_norm.weight if self.k_norm is not None else None
        heads = self.attn(positions, qkv, q_weight, k_weight, self.eps)
        if kept is not None:
            heads, residual = heads[kept], residual[kept]
        return self.o_proj(heads), residual


class Qwen3MLP(nn.Module):
    def __init__(self, config: Any, tp: TensorParallel):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_up_proj = MergedColumnParallelLinear(hidden, [intermediate, intermediate], bias, tp)
        self.down_proj = RowParallelLinear(intermediate, hidden, bias, tp)

    def forward(
        self, norm: RMSNorm, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """down(silu(gate) · up) of norm(hidden_states + residual), and the residual stream; shapes as above."""
        gated, residual = self.gate_up_proj.forward_normed(norm, hidden_states, residual, gated=True)
        return self.down_proj(gated), residual


class Qwen3DecoderLayer(nn.Module):
    def __init__(
        self, config: Any, attention_class: type[Qwen3Attention], rotary_emb: RotaryEmbedding, tp: TensorParallel
    ):
        super().__init__()
        self.self_attn = attention_class(config, rotary_emb, tp)
        self.mlp = Qwen3MLP(config, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`kept` [n] int64: the tokens that go on after attention, from there on [n, hidden]; None for all."""
        # The norms go inside: each is fused with the residual addition before it and, for one row, the product after.
        hidden_states, residual = self.self_attn(positions, self.input_layernorm, hidden_states, residual, kept)
        return self.mlp(self.post_attention_layernorm, hidden_states, residual)


class Qwen3Model(nn.Module):
    def __init__(
        self, config: Any, attention_class: type[Qwen3Attention], rotary_emb: RotaryEmbedding, tp: TensorParallel
    ):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, attention_class, rotary_emb, tp) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states, residual = self.embed_tokens(input_ids), None
        # Nobody reads what the last layer makes of a prompt but for its last token: others only leave keys and values.
        kept, last = get_context().output_tokens, self.layers[-1]
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, kept if layer is last else None)
        return self.norm(hidden_states, residual)[0]


class Qwen3ForCausalLM(nn.Module):
    attention_class: type[Qwen3Attention] = Qwen3Attention
    # Checkpoint names -> the fused parameter that holds them, and which part of it.
    packed_modules_mapping: ClassVar[dict[str, tuple[str, str | int]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }

    def __init__(self, config: Any, max_position: int, device: torch.device, tp: TensorParallel):
        super().__init__()
        rotary_emb = get_rope(config, head_dim(config), max_position, device)
        self.model = Qwen3Model(config, self.attention_class, rotary_emb, tp)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions [T] int64 -> normed hidden states [T, hidden], or of the context's `output_tokens`."""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [B, hidden], one a row -> logits [B, vocab], of this rank's part of the vocabulary."""
        return self.lm_head(hidden_states)
