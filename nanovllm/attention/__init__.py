"""Attention backends: one file each behind one small interface, imported only when chosen."""

import importlib
import importlib.util
from abc import ABC, abstractmethod

import torch

from nanovllm.kernels.triton_utils import can_triton, shared_memory_bytes
from nanovllm.utils.context import Context


class AttentionBackend(ABC):
    """Attention of a batch over the paged cache. Shapes: see `Context` for B and T."""

    supports_cuda_graph = True

    def __init__(self, block_size: int, heads: tuple[int, int, int]):
        self.block_size = block_size  # tokens
        self.heads = heads  # query heads, key/value heads, head_dim: of this rank's part of every layer

    def prepare(self, context: Context) -> None:  # noqa: B027 - optional
        """Derive what all layers of this step share into `context.backend_data`."""

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,  # [T, num_heads, head_dim]
        k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
        v_cache: torch.Tensor,
        scale: float,
        context: Context,
    ) -> torch.Tensor:
        """Causal attention of each row's new tokens, whose keys and values are in the cache, over its whole context.

        Returns [T, num_heads, head_dim].
        """


# name: (module, class, block sizes are multiples of); the fastest first, as measured on an H100 (docs/benchmarks.md)
BACKENDS = {
    "triton": ("nanovllm.attention.triton", "TritonBackend", 16),
    "flash_attn": ("nanovllm.attention.flash_attn", "FlashAttnBackend", 256),
    "sdpa": ("nanovllm.attention.sdpa", "SdpaBackend", 1),
}


def choose_backend(name: str | None, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    """The backend to use: `name` if it can work here (ValueError if not), else the fastest that can."""
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"attention_backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
        problem = why_not(name, device, dtype, block_size, head_dim)
        if problem:
            raise ValueError(f"attention_backend={name!r} cannot be used: {problem}")
        return name
    return next(name for name in BACKENDS if not why_not(name, device, dtype, block_size, head_dim))


def choose_invariant_backend(
    name: str | None, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int
) -> str:
    """As `choose_backend`, for `deterministic=True`: what it runs on follows from the device."""
    only = "triton" if device.type == "cuda" else "sdpa"
    if name not in (None, only):
        raise ValueError(
            f"attention_backend={name!r} has no batch-invariant attention; with deterministic=True on {device.type} "
            f"leave attention_backend None (or say {only!r})"
        )
    problem = why_not(only, device, dtype, block_size, head_dim)
    if problem:
        raise ValueError(f"deterministic=True on {device.type} computes attention in Triton: {problem}")
    return only


def why_not(name: str, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int) -> str | None:
    """What keeps backend `name` from working, or None."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and the engine runs on {device.type}"
    multiple = BACKENDS[name][2]
    if block_size % multiple:
        return f"it needs kvcache_block_size to be a multiple of {multiple}, got {block_size}"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if head_dim not in (16, 32, 64, 128, 256):
            return f"it takes a head_dim that is a power of 2 up to 256, and the model's is {head_dim}"
        if not can_triton(device):
            return (
                f"it needs a GPU of compute capability 8.0 or later, and this is {torch.cuda.get_device_name(device)}"
            )
        if dtype.itemsize * head_dim > 512 and shared_memory_bytes(device) < 168 * 2**10:
            return f"{torch.cuda.get_device_name(device)} has too little shared memory for a head_dim of 256 in float32"
    if name == "flash_attn":
        if importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn is not installed"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 or bfloat16, and dtype is {dtype}"
        if head_dim > 256 or head_dim % 8:
            return f"it takes a head_dim up to 256, a multiple of 8, and the model's is {head_dim}"
    return None


def load_backend(
    name: str, block_size: int, heads: tuple[int, int, int], deterministic: bool = False
) -> AttentionBackend:
    module, cls, _ = ("nanovllm.attention.invariant", "InvariantBackend", 1) if deterministic else BACKENDS[name]
    return getattr(importlib.import_module(module), cls)(block_size, heads)
