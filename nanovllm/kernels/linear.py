"""Products of few rows, where cuBLAS leaves most of the chip idle. Called by layers/linear.py.

A product of one row is a matrix-vector product at memory speed, with the RMSNorm before it and the gated activation
after it fused in; those of a few more rows are in kernels/matmul.py. Both fetch their weights, which no kernel writes,
while the kernel before them still runs.
"""

from functools import cache

import torch
import torch.nn.functional as F

from nanovllm.kernels.activation import silu_and_mul, silu_and_mul_torch
from nanovllm.kernels.all_reduce import all_reduce_rms_norm
from nanovllm.kernels.matmul import choose_tiling, matmul
from nanovllm.kernels.norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch
from nanovllm.kernels.triton_utils import jit, launch_options, next_power_of_2, pdl_wait, tl, use_triton
from nanovllm.utils.peer_memory import PeerSum


def norm_linear(
    x: torch.Tensor | PeerSum,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, then a product, then (if `gated`) silu(gate) · up.

    Args:
        x: [T, K], or partial sums [S, T, K] in float32 as `linear_partial` leaves them, or a sum over ranks [T, K].
        residual: [T, K], or None for none.
        norm_weight: [K].
        weight: [N, K]; gated: gate rows, then up rows, [2 · I, K].

    Returns:
        [T, N] (gated: [T, I]), and x + residual [T, K].
    """
    if isinstance(x, PeerSum):
        normed, residual = all_reduce_rms_norm(x, residual, norm_weight, eps)
        if takes_gemv(normed, weight):
            return gemv_triton(normed, weight, gated), residual
    elif takes_gemv(x, weight):
        return norm_gemv_triton(x, residual, norm_weight, eps, weight, gated)
    elif residual is None:
        normed, residual = rms_norm(x, norm_weight, eps), x
    else:
        normed, residual = add_rms_norm(x, residual, norm_weight, eps)
    tiling = choose_tiling(normed, weight, gated)
    if tiling is not None:
        return matmul(normed, weight, tiling, gated), residual
    out = blas_linear(normed, weight)
    return (silu_and_mul(out) if gated else out), residual


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K] times weight [N, K]ᵀ, plus bias [N]: [T, N], written to `out` if given."""
    if bias is None and takes_gemv(x, weight):
        return gemv_triton(x, weight, out=out)
    tiling = choose_tiling(x, weight) if bias is None else None
    if tiling is not None:
        return matmul(x, weight, tiling, out=out)
    return blas_linear(x, weight, bias, out)


def blas_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear` by cuBLAS, or by cuBLASLt where that does better: torch asks it for products with a bias."""
    num_tokens, depth = x.shape
    # Up to a seventh less time for such products (docs/benchmarks.md), but not for whole tiles of 64 tokens.
    if bias is None and x.is_cuda and depth > weight.shape[0] and 64 < num_tokens < 256 and num_tokens % 64:
        bias = no_bias(weight.shape[0], weight.dtype, weight.device)
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


@cache
def no_bias(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; of the process, since graphs have the address baked in. The warm-up before a capture makes them."""
    return torch.zeros(size, dtype=dtype, device=device)


def linear_partial(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] times weight [N, K]ᵀ: [T, N], or partial sums [S, T, N] in float32 that the next RMSNorm adds up."""
    tiling = choose_tiling(x, weight, can_split=True)
    return matmul(x, weight, tiling) if tiling is not None else linear(x, weight)


# ---- twins ----


def norm_linear_torch(x, residual, norm_weight, eps, weight, gated=False):
    if residual is None:
        normed, residual = rms_norm_torch(x, norm_weight, eps), x
    else:
        normed, residual = add_rms_norm_torch(x, residual, norm_weight, eps)
    out = F.linear(normed, weight)
    return (silu_and_mul_torch(out) if gated else out), residual


# ---- one row ----


def takes_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x is one row, and a program can hold its rows of the weight in registers, and whole programs cover the
    output."""
    if not use_triton(x) or x.dim() != 2 or x.shape[0] != 1:
        return False
    return weight.shape[1] <= 32768 and weight.shape[0] % 8 == 0 and weight.stride(1) == 1


def gemv_config(depth: int) -> dict[str, int]:
    """Rows a program and warps: about 64 registers of weights a thread, loaded before the wait."""
    block_k = next_power_of_2(depth)
    return {"BLOCK_N": 4 if block_k <= 8192 else 2, "BLOCK_K": block_k, "num_warps": min(max(block_k // 512, 2), 16)}


def gemv_triton(
    x: torch.Tensor, weight: torch.Tensor, gated: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    num_rows = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = x.new_empty(1, num_rows)
    config = gemv_config(weight.shape[1])
    _gemv_kernel[(num_rows // config["BLOCK_N"],)](
        x, x, x, weight, out, out, num_rows, 0.0,
        K=weight.shape[1], NORM=False, RESIDUAL=False, GATED=gated, **config, **launch_options(),
    )  # fmt: skip
    return out


def norm_gemv_triton(x, residual, norm_weight, eps, weight, gated):
    num_rows = weight.shape[0] // 2 if gated else weight.shape[0]
    out, total = x.new_empty(1, num_rows), torch.empty_like(x)
    config = gemv_config(weight.shape[1])
    _gemv_kernel[(num_rows // config["BLOCK_N"],)](
        x, x if residual is None else residual, norm_weight, weight, out, total, num_rows, eps,
        K=weight.shape[1], NORM=True, RESIDUAL=residual is not None, GATED=gated, **config, **launch_options(),
    )  # fmt: skip
    return out, total


@jit
def _gemv_kernel(
    x_ptr, residual_ptr, norm_ptr, weight_ptr, out_ptr, total_ptr, N, eps,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs a program, at full depth; every program norms the one row for itself, which is cheap."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    live = cols < K
    offsets = rows[:, None].to(tl.int64) * K + cols[None, :]
    weight = tl.load(weight_ptr + offsets, mask=live[None, :], other=0.0)
    if GATED:
        up_weight = tl.load(weight_ptr + N.to(tl.int64) * K + offsets, mask=live[None, :], other=0.0)
    if NORM:
        norm = tl.load(norm_ptr + cols, mask=live, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    x = tl.load(x_ptr + cols, mask=live, other=0.0).to(tl.float32)
    if NORM:
        if RESIDUAL:
            x += tl.load(residual_ptr + cols, mask=live, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + cols, total, mask=live)
        x = total.to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps) * norm
        x = x.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
    if GATED:
        # Rounded as the separate product would be.
        gate = out.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = tl.sum(up_weight.to(tl.float32) * x[None, :], axis=1).to(out_ptr.dtype.element_ty).to(tl.float32)
        out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty))
