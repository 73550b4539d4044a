"""Llama 2 and 3 (and SmolLM2): Qwen3 without head norms; biases, if any, as the config says."""

from nanovllm.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM


class LlamaAttention(Qwen3Attention):
    qk_norm = False


class LlamaDecoderLayer(Qwen3DecoderLayer):
    attention_class = LlamaAttention


class LlamaForCausalLM(Qwen3ForCausalLM):
    layer_class = LlamaDecoderLayer
