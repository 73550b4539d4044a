"""Products of few rows, where cuBLAS leaves most of the chip idle. Called by layers/linear.py.

A product of one row is a matrix-vector product at memory speed, with the RMSNorm before it and the gated activation
after it fused in. A product of up to 256 rows into a narrow output is split over its depth (split-K), so that its few
tiles fill the chip; the partial sums are added by the RMSNorm that follows anyway. Both fetch their weights, which no
kernel writes, while the kernel before them still runs.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels.activation import silu_and_mul, silu_and_mul_torch
from nanovllm.kernels.all_reduce import all_reduce_rms_norm
from nanovllm.kernels.norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch
from nanovllm.kernels.triton_utils import (
    jit,
    launch_options,
    next_power_of_2,
    num_multiprocessors,
    pdl_wait,
    tl,
    use_triton,
)
from nanovllm.utils.peer_memory import PeerSum

MAX_SPLIT_K_ROWS = 256
MAX_SPLIT_K_BYTES = 8 * 2**20  # a larger weight takes longer to read than to launch, and cuBLAS reads it as fast
BLOCK_N, BLOCK_K = 64, 128  # of the split-K product; the best of a sweep over the 0.6B shapes, docs/benchmarks.md


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
        if normed.shape[0] == 1 and fits_gemv(weight):
            return gemv_triton(normed, weight, gated), residual
    elif use_triton(x) and x.shape[0] == 1 and x.dim() == 2 and fits_gemv(weight):
        return norm_gemv_triton(x, residual, norm_weight, eps, weight, gated)
    elif residual is None:
        normed, residual = rms_norm(x, norm_weight, eps), x
    else:
        normed, residual = add_rms_norm(x, residual, norm_weight, eps)
    out = F.linear(normed, weight)
    return (silu_and_mul(out) if gated else out), residual


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K] times weight [N, K]ᵀ, plus bias [N]: [T, N], written to `out` if given."""
    if bias is None and use_triton(x) and x.dtype != torch.float32 and x.shape[0] == 1 and fits_gemv(weight):
        return gemv_triton(x, weight, out=out)
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def linear_partial(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] times weight [N, K]ᵀ: [T, N], or partial sums [S, T, N] in float32 that the next RMSNorm adds up."""
    if use_triton(x) and x.dtype != torch.float32:
        num_splits = 1 if x.shape[0] == 1 and fits_gemv(weight) else choose_num_splits(x, weight)
        if num_splits > 1:
            return split_k_triton(x, weight, num_splits)
    return linear(x, weight)


# ---- twins ----


def norm_linear_torch(x, residual, norm_weight, eps, weight, gated=False):
    if residual is None:
        normed, residual = rms_norm_torch(x, norm_weight, eps), x
    else:
        normed, residual = add_rms_norm_torch(x, residual, norm_weight, eps)
    out = F.linear(normed, weight)
    return (silu_and_mul_torch(out) if gated else out), residual


def split_k_torch(x, weight, num_splits):
    parts = zip(x.float().chunk(num_splits, 1), weight.float().chunk(num_splits, 1))
    return torch.stack([F.linear(a, b) for a, b in parts])


# ---- one row ----


def fits_gemv(weight: torch.Tensor) -> bool:
    """Whether a program can hold its rows of the weight in registers, and whole programs cover the output."""
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


# ---- few rows ----


def choose_num_splits(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Splits that give every multiprocessor a tile, or 1 where the product is better left to cuBLAS."""
    num_tokens, depth = x.shape
    num_outputs = weight.shape[0]
    if weight.nbytes > MAX_SPLIT_K_BYTES:
        return 1
    if num_tokens > MAX_SPLIT_K_ROWS or num_outputs % BLOCK_N or depth % BLOCK_K:
        return 1
    num_tiles = num_outputs // BLOCK_N * -(-num_tokens // block_m(num_tokens))
    num_splits = 8
    while num_splits > 1 and (depth % (num_splits * BLOCK_K) or num_tiles * num_splits > num_multiprocessors(x.device)):
        num_splits //= 2
    return num_splits


def block_m(num_tokens: int) -> int:
    """Two tiles of 64 rows beat one of 128 up to there: more, smaller accumulators."""
    return min(max(next_power_of_2(num_tokens), 16), 64 if num_tokens <= 128 else 128)


def split_k_triton(x: torch.Tensor, weight: torch.Tensor, num_splits: int) -> torch.Tensor:
    num_tokens, depth = x.shape
    out = torch.empty(num_splits, num_tokens, weight.shape[0], dtype=torch.float32, device=x.device)
    rows = block_m(num_tokens)
    _split_k_kernel[(weight.shape[0] // BLOCK_N, -(-num_tokens // rows), num_splits)](
        x, weight, out, num_tokens, weight.shape[0], x.stride(0),
        K=depth, SPLIT=num_splits, BLOCK_M=rows, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        num_warps=4, num_stages=4, **launch_options(),
    )  # fmt: skip
    return out


@jit(do_not_specialize=("M",))
def _split_k_kernel(
    x_ptr, weight_ptr, out_ptr, M, N, x_stride,
    K: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_N outputs by BLOCK_M rows over one of SPLIT parts of the depth. The weight is the left operand:
    its 64 rows fill the matrix unit's, however few the tokens."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    depth: tl.constexpr = K // SPLIT
    cols = part * depth + tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + outputs[:, None].to(tl.int64) * K + cols[None, :]
    if PDL:  # the tile's first lines travel to L2 while the predecessor runs; 64 elements are a line
        lines = tl.arange(0, 2 * BLOCK_K // 128)
        for k in tl.static_range(0, min(depth, 1024), BLOCK_K):
            lines_ptr = weight_ptr + outputs[:, None].to(tl.int64) * K + part * depth + k + lines[None, :] * 64
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines_ptr], dtype=tl.int32, is_pure=False, pack=1
            )
    pdl_wait(PDL)
    live = tokens[None, :] < M
    x_ptrs = x_ptr + tokens[None, :].to(tl.int64) * x_stride + cols[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, depth, BLOCK_K):
        weight = tl.load(weight_ptrs + k)
        x = tl.load(x_ptrs + k, mask=live, other=0.0)
        acc = tl.dot(weight, x, acc)
    out_ptrs = out_ptr + part.to(tl.int64) * M * N + tokens[None, :].to(tl.int64) * N + outputs[:, None]
    tl.store(out_ptrs, acc, mask=live)
