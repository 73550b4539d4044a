"""Model families by the name in a checkpoint's `architectures`; one short file each."""

import importlib
from typing import Any

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
    if any(kind != "full_attention" for kind in getattr(hf_config, "layer_types", None) or []) or (
        getattr(hf_config, "use_sliding_window", False)
    ):
        raise ValueError(f"{name} with sliding-window attention layers is not supported; only full attention is")
    if getattr(hf_config, "hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf_config.hidden_act!r} is not supported; only 'silu' is")
    return getattr(importlib.import_module(MODELS[name]), name)
