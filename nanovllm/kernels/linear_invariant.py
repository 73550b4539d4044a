"""Batch-invariant products: a row's result is bitwise the same with any number of other rows. Called by layers/.

One tile, one instruction and one order over the depth for every number of rows: no matrix-vector path, no split-K that
depends on the batch, no autotuning, no cuBLAS, whose choice of kernel follows the number of rows.
"""

import functools

import torch
import torch.nn.functional as F

from nanovllm.kernels.triton_utils import jit, launch_options, pdl_wait, shared_memory_bytes, tl, use_triton

CPU_ROWS = 16  # of every product on CPU


def linear_invariant(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] times weight [N, K]ᵀ, plus bias [N] if there is one -> [T, N]."""
    run = linear_invariant_triton if use_triton(x) else linear_invariant_torch
    return run(x, weight, bias)


def linear_invariant_torch(x, weight, bias=None):
    num_rows = rows_at_once(tuple(weight.shape), weight.dtype, bias is not None, torch.get_num_threads())
    parts = []
    for rows in x.split(num_rows):
        tile = x.new_zeros(num_rows, x.shape[1])  # a copy, so that its alignment is the same too
        tile[: len(rows)] = rows
        parts.append(F.linear(tile, weight, bias)[: len(rows)])
    return torch.cat(parts)


@functools.cache
def rows_at_once(shape: tuple[int, int], dtype: torch.dtype, has_bias: bool, num_threads: int) -> int:
    """CPU_ROWS, or 1 if this machine's BLAS computes a row of such a product differently at different places of a tile.

    Some do, for odd shapes, where a tile ends in a kernel of its own. What they do depends on shapes, not on numbers.
    """
    generator = torch.Generator().manual_seed(0)
    row, bias = torch.randn(1, shape[1], generator=generator).to(dtype), torch.zeros(shape[0], dtype=dtype)
    weight = torch.randn(shape, generator=generator).to(dtype)
    out = F.linear(row.repeat(CPU_ROWS, 1), weight, bias if has_bias else None)
    return CPU_ROWS if torch.equal(out, out[:1].expand_as(out)) else 1


def linear_invariant_triton(x, weight, bias=None):
    num_tokens, depth = x.shape
    num_outputs = weight.shape[0]
    x = x.contiguous()
    assert weight.is_contiguous()
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    if not num_tokens:
        return out
    if x.element_size() == 4:  # exact float32 has no tensor cores: a smaller tile that registers hold
        block_m, block_n, block_k, num_warps, num_stages = 64, 64, 32, 4, 2
    else:
        # A stage takes 32 KB: three fit everywhere, four where a multiprocessor has the memory.
        num_stages = 4 if shared_memory_bytes(x.device) > 4 * 2**15 else 3
        block_m, block_n, block_k, num_warps = 128, 128, 64, 8
    grid = (-(-num_tokens // block_m) * -(-num_outputs // block_n),)
    _linear_kernel[grid](
        x, weight, weight if bias is None else bias, out, num_tokens,
        N=num_outputs, K=depth, HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        GROUP_M=8, num_warps=num_warps, num_stages=num_stages, **launch_options(fp_fusion=False),
    )  # fmt: skip
    return out


@jit(do_not_specialize=("M",))
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M,
    N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M tokens by BLOCK_N outputs over the whole depth."""
    # Programs that run together share what they read: all of few rows, or GROUP_M tiles of many, then the next outputs.
    pid = tl.program_id(0)
    num_m = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // group_size * GROUP_M
    tiles_m = tl.minimum(num_m - first_m, GROUP_M)
    tile_m = first_m + pid % group_size % tiles_m
    tile_n = pid % group_size // tiles_m

    tokens = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    outputs = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    token_live = (tokens < M)[:, None]
    output_live = (outputs < N)[:, None]
    x_ptrs = x_ptr + tokens[:, None] * K + cols[None, :]
    weight_ptrs = weight_ptr + outputs[:, None] * K + cols[None, :]
    pdl_wait(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + k, mask=token_live, other=0.0)
            weight = tl.load(weight_ptrs + k, mask=output_live, other=0.0)
        else:
            in_depth = (k + cols < K)[None, :]
            x = tl.load(x_ptrs + k, mask=token_live & in_depth, other=0.0)
            weight = tl.load(weight_ptrs + k, mask=output_live & in_depth, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + tokens[:, None] * N + outputs[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=token_live & (outputs < N)[None, :])
