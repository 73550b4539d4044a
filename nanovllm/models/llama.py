"""Llama 2 and 3 (and SmolLM2): Qwen3 without head norms; biases, if any, as the config says."""

from nanovllm.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM


class LlamaAttention(Qwen3Attention):
    qk_norm = False


class LlamaForCausalLM(Qwen3ForCausalLM):
    attention_class = LlamaAttention
