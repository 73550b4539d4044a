"""Linear layers split over tensor-parallel ranks, and how checkpoint tensors fill them.

Column-parallel layers split the output features, row-parallel ones the input features. The loader hands each layer the
full tensors of the checkpoint through `load(name, tensor, shard_id)`; the layer keeps its rank's part.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.activation import silu_and_mul
from nanovllm.kernels.linear import blas_linear, linear, linear_partial, norm_linear
from nanovllm.kernels.linear_invariant import linear_invariant
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.context import get_context
from nanovllm.utils.distributed import TensorParallel
from nanovllm.utils.loader import check_dim, copy_exact
from nanovllm.utils.peer_memory import PeerSum


class LinearBase(nn.Module):
    """A weight [out, in] and maybe a bias [out], as held by this rank."""

    invariant = False  # set by models.build_model: a row's product has the same bits however many other rows there are

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        self.bias = nn.Parameter(torch.empty(output_size)) if bias else None

    def load(self, name: str, tensor: torch.Tensor, shard_id: str | int | None) -> None:
        """Fill the parameter `name` from a full tensor; raises ValueError if the shape is wrong."""
        copy_exact(self.get_parameter(name), tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        return self.product(x)

    @property
    def is_fused(self) -> bool:
        """Whether kernels for few rows take the product and what surrounds it.

        Not with prompts in the step, which is launched kernel by kernel: by cuBLAS the host has done so sooner.
        """
        return self.bias is None and not self.invariant and not get_context().is_prefill

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return (linear_invariant if self.invariant else F.linear)(x, self.weight, self.bias)


class ReplicatedLinear(LinearBase):
    """The whole layer on every rank."""


class MergedColumnParallelLinear(LinearBase):
    """Several products of one input in one matrix, each split by output features; `shard_id` says which."""

    def __init__(self, input_size: int, output_sizes: list[int], bias: bool, tp: TensorParallel):
        self.shard_sizes = [tp.shard("output size", size) for size in output_sizes]
        super().__init__(input_size, sum(self.shard_sizes), bias, tp)

    def load(self, name: str, tensor: torch.Tensor, shard_id: str | int | None) -> None:
        self.load_part(name, tensor, int(shard_id or 0), self.tp.rank, self.tp.size)

    def load_part(self, name: str, tensor: torch.Tensor, index: int, part: int, num_parts: int) -> None:
        """Fill the shard `index` with one of the `num_parts` equal parts of `tensor`."""
        shard_size = self.shard_sizes[index]
        target = self.get_parameter(name).narrow(0, sum(self.shard_sizes[:index]), shard_size)
        check_dim(tensor, 0, shard_size * num_parts)
        copy_exact(target, tensor.narrow(0, part * shard_size, shard_size))

    def forward_normed(
        self, norm: RMSNorm, x: torch.Tensor | PeerSum, residual: torch.Tensor | None, gated: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product of norm(x + residual), and x + residual; `gated`: of its two parts, silu(first) · second.

        x [T, in], partial sums [S, T, in] or a sum over ranks [T, in], residual [T, in] or None -> [T, out], [T, in].
        """
        if self.is_fused:
            return norm_linear(x, residual, norm.weight, norm.eps, self.weight, gated)
        normed, residual = norm(x, residual)
        out = self.product(normed)
        return (silu_and_mul(out, self.invariant) if gated else out), residual


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One product, split by output features."""

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallel):
        super().__init__(input_size, [output_size], bias, tp)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Queries, keys and values in one product, split by heads."""

    SHARDS: ClassVar = {"q": 0, "k": 1, "v": 2}

    def __init__(
        self, hidden_size: int, head_dim: int, num_heads: int, num_kv_heads: int, bias: bool, tp: TensorParallel
    ):
        # With more ranks than key/value heads, several ranks hold the same one.
        self.kv_copies = tp.kv_heads(num_kv_heads) * tp.size // num_kv_heads
        sizes = [n * head_dim for n in (num_heads, num_kv_heads * self.kv_copies, num_kv_heads * self.kv_copies)]
        super().__init__(hidden_size, sizes, bias, tp)

    def load(self, name: str, tensor: torch.Tensor, shard_id: str | int | None) -> None:
        index = self.SHARDS[str(shard_id)]
        copies = self.kv_copies if index else 1
        self.load_part(name, tensor, index, self.tp.rank // copies, self.tp.size // copies)


class RowParallelLinear(LinearBase):
    """Split by input features; the ranks' partial sums are added up.

    May return, instead of [T, out], what the norm that follows adds up: partial sums [S, T, out] in float32 on one
    rank, a sum over ranks that is still to be taken on several.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallel):
        super().__init__(tp.shard("input size", input_size), output_size, bias, tp)

    def load(self, name: str, tensor: torch.Tensor, shard_id: str | int | None) -> None:
        if name == "weight":
            shard_size = self.weight.shape[1]
            check_dim(tensor, 1, shard_size * self.tp.size)
            tensor = tensor.narrow(1, self.tp.rank * shard_size, shard_size)
        super().load(name, tensor, shard_id)

    def forward(self, x: torch.Tensor) -> torch.Tensor | PeerSum:  # type: ignore[override]
        if self.tp.size == 1:
            return linear_partial(x, self.weight) if self.is_fused else self.product(x)
        # The bias once; no partial sums, which would have to be added before they travel.
        bias = self.bias if self.tp.rank == 0 else None
        multiply = linear if self.is_fused else blas_linear
        summand = self.tp.summand(x.shape[0], self.weight.shape[0])
        if summand is None:
            return self.tp.all_reduce(multiply(x, self.weight, bias))
        multiply(x, self.weight, bias, out=summand.x)
        return summand
