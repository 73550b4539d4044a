"""Model families by the name in a checkpoint's `architectures`; one short file each. Called by the model runner."""

import importlib
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.linear import LinearBase
from nanovllm.utils.distributed import TensorParallel

MODELS = {
    "LlamaForCausalLM": "nanovllm.models.llama",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3",
}


def find_architecture(architectures: list[str] | None) -> str:
    """The supported one among a config's `architectures`; raises ValueError, naming what is supported, if none is."""
    for name in architectures or []:
        if name in MODELS:
            return name
    raise ValueError(f"architectures={architectures} is not supported; supported: {', '.join(MODELS)}")


def get_model_class(hf_config: Any) -> type:
    """The class for a Hugging Face config; raises ValueError, naming what is supported, if there is none."""
    name = find_architecture(getattr(hf_config, "architectures", None))
    if getattr(hf_config, "quantization_config", None):  # its tensors would not mean what their names say
        raise ValueError(f"{name} with quantized weights (quantization_config) is not supported; only plain ones are")
    if any(kind != "full_attention" for kind in getattr(hf_config, "layer_types", None) or []) or (
        getattr(hf_config, "use_sliding_window", False)
    ):
        raise ValueError(f"{name} with sliding-window attention layers is not supported; only full attention is")
    if getattr(hf_config, "hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf_config.hidden_act!r} is not supported; only 'silu' is")
    return getattr(importlib.import_module(MODELS[name]), name)


def build_model(model_class: type, config: Config, tp: TensorParallel) -> Any:
    """An uninitialised model whose parameters are already on the device, in the dtype, that they will be used in."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with torch.device(config.device):
            model = model_class(config.hf_config, config.max_model_len, config.device, tp)
    finally:
        torch.set_default_dtype(default)
    for module in model.modules():
        if isinstance(module, (LinearBase, ParallelLMHead)):
            module.invariant = config.deterministic
    return model.eval().requires_grad_(False)
