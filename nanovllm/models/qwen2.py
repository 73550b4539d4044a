"""Qwen2 and Qwen2.5: Qwen3 without head norms, with a bias on q, k and v."""

from typing import Any

from nanovllm.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM


class Qwen2Attention(Qwen3Attention):
    qk_norm = False

    def biases(self, config: Any) -> tuple[bool, bool]:
        return True, False


class Qwen2ForCausalLM(Qwen3ForCausalLM):
    attention_class = Qwen2Attention
