"""Model families by the name in a checkpoint's `architectures`; one short file each. Called by the engine."""

import importlib
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config, head_dim
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.rotary_embedding import get_rope
from nanovllm.utils.distributed import TensorParallel
from nanovllm.utils.loader import iterate_tensors, load_model

MODELS = {
    "LlamaForCausalLM": "nanovllm.models.llama",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3",
}


def get_model_class(hf_config: Any) -> type:
    """The class for a Hugging Face config; raises ValueError, naming what is supported, if there is none."""
    architectures = getattr(hf_config, "architectures", None)
    name = next((name for name in MODELS if isinstance(architectures, list) and name in architectures), None)
    if name is None:
        raise ValueError(
            f"architectures={architectures!r} is not supported; supported: a list with {' or '.join(MODELS)}"
        )
    if getattr(hf_config, "quantization_config", None):  # its tensors would not mean what their names say
        raise ValueError(f"{name} with quantized weights (quantization_config) is not supported; only plain ones are")
    if any(kind != "full_attention" for kind in getattr(hf_config, "layer_types", None) or []) or (
        getattr(hf_config, "use_sliding_window", False)
    ):
        raise ValueError(f"{name} with sliding-window attention layers is not supported; only full attention is")
    if getattr(hf_config, "partial_rotary_factor", None) not in (None, 1):  # transformers 4 has it here
        raise ValueError(f"partial_rotary_factor={hf_config.partial_rotary_factor} is not supported; only 1.0 is")
    if getattr(hf_config, "hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf_config.hidden_act!r} is not supported; only 'silu' is")
    return getattr(importlib.import_module(MODELS[name]), name)


def check_checkpoint(config: Config) -> None:
    """Raises what building and loading the model would, before either takes memory; the weights are not read."""
    hf_config, path = config.hf_config, Path(config.model)
    model_class = get_model_class(hf_config)
    num_tensors = sum(1 for _ in iterate_tensors(path))
    if hf_config.num_hidden_layers > num_tensors:  # building that many would take for ever
        raise ValueError(
            f"{path} has {num_tensors} tensors, too few for num_hidden_layers={hf_config.num_hidden_layers} in its "
            "config.json: the two are not of one model"
        )
    check_rope(hf_config, path)
    meta = torch.device("meta")
    with meta:  # the model as rank 0 will have it, but for the number of positions, on which no weight depends
        model = model_class(hf_config, 1, meta, TensorParallel(0, config.tensor_parallel_size))
    load_model(model, path)


def check_rope(hf_config: Any, path: Path) -> None:
    try:
        table = get_rope(hf_config, head_dim(hf_config), 2, torch.device("cpu")).cos_sin
    except (TypeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{path / 'config.json'} has rope parameters that cannot be: {error!r}") from None
    if not table.isfinite().all():
        raise ValueError(f"{path / 'config.json'} has rope parameters that give no finite angles: check rope_theta")


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
