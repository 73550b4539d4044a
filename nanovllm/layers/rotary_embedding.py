"""Rotary position embedding: the table of cosines and sines, with the context-extension variants `llama3` and `yarn`.

Rotation itself happens in kernels/rope.py, fused with the head norms and the KV store.
"""

import math
from typing import Any

import torch
from torch import nn


class RotaryEmbedding(nn.Module):
    def __init__(self, inv_freq: torch.Tensor, max_position: int, scale: float, device: torch.device):
        """inv_freq [head_dim / 2] float32; `scale` multiplies cosines and sines (yarn's attention factor)."""
        super().__init__()
        # Everything on the CPU, so that the table is the same on every device.
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device="cpu"), inv_freq)
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1) * scale
        self.cos_sin: torch.Tensor
        self.register_buffer("cos_sin", cos_sin.to(device), persistent=False)


def get_rope(config: Any, head_dim: int, max_position: int, device: torch.device) -> RotaryEmbedding:
    """The table for a Hugging Face config, [max_position, head_dim] float32; one for all layers of a model.

    Raises ValueError for a kind of rope scaling other than default, llama3 and yarn.
    """
    rope = rope_parameters(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = rope["rope_theta"] ** -exponents
    scale = 1.0
    if kind == "llama3":
        inv_freq = llama3_inv_freq(inv_freq, rope)
    elif kind == "yarn":
        inv_freq, scale = yarn_inv_freq(inv_freq, rope, config.max_position_embeddings)
    elif kind != "default" or rope.get("factor") not in (None, 1):  # a factor without a type would be ignored
        raise ValueError(
            f"rope_scaling of type {kind!r} with factor {rope.get('factor')} is not supported; supported: default, "
            "llama3, yarn; default has no factor"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only 1.0 is")
    return RotaryEmbedding(inv_freq, max_position, scale, device)


def rope_parameters(config: Any) -> dict[str, Any]:
    """transformers 5 keeps everything in `rope_parameters`; 4 in `rope_theta` and `rope_scaling`."""
    if getattr(config, "rope_parameters", None):
        return {"rope_theta": 10000.0, **config.rope_parameters}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **(getattr(config, "rope_scaling", None) or {})}


def llama3_inv_freq(inv_freq: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    old_len = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    keep = ((old_len / wavelength - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / rope["factor"]


def yarn_inv_freq(inv_freq: torch.Tensor, rope: dict[str, Any], max_position: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies and the factor on cosines and sines."""
    half = inv_freq.shape[0]
    old_len = rope.get("original_max_position_embeddings") or max_position
    factor = rope.get("factor") or max_position / old_len

    def dim_of(rotations: float) -> float:
        """The (fractional) dimension pair that turns `rotations` times over the original context."""
        return half * math.log(old_len / (rotations * 2 * math.pi)) / math.log(rope["rope_theta"])

    low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    slowed = ((torch.arange(half, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
    inv_freq = inv_freq / factor * slowed + inv_freq * (1 - slowed)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return inv_freq, mscale(1.0) if scale is None else scale
