"""Products of 2 to 256 rows, which read their weights at memory speed. Called by kernels/linear.py.

cuBLAS pays about 4 µs beside the bytes of every such product, whatever its size. Here a product asks for its weights,
which no kernel writes, while the kernel before it still runs; takes a gated activation into its end; and, where its
output is too narrow for one tile a multiprocessor, is split over its depth (split-K) into partial sums that the next
RMSNorm adds up.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.triton_utils import jit, launch_options, pdl_wait, prefetch_l2, tl

PREFETCH_DEPTH = 1024  # columns of its weights that a program asks for before it waits


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut into programs: tiles of outputs by tokens, over one of `num_splits` parts of the depth."""

    block_n: int  # outputs; of a gated product half of them are gates
    block_m: int  # tokens
    block_k: int  # of the depth, a step
    num_splits: int = 1
    swap: bool = True  # the weight is the left operand, whose rows fill the matrix unit's 64, however few the tokens
    num_warps: int = 4
    num_stages: int = 4


def matmul(x: torch.Tensor, weight: torch.Tensor, tiling: Tiling, gated: bool = False) -> torch.Tensor:
    """x [T, K] times weight [N, K]ᵀ.

    Returns [T, N]; gated, of a weight of gate rows, then up rows: silu(gate) · up, [T, N / 2]; split: the partial sums,
    [num_splits, T, N] in float32.
    """
    num_tokens, depth = x.shape
    num_outputs = weight.shape[0]
    assert num_outputs % tiling.block_n == 0 == depth % (tiling.block_k * tiling.num_splits)
    assert x.stride(1) == 1 and weight.is_contiguous() and not (gated and tiling.num_splits > 1)
    if tiling.num_splits > 1:
        out = torch.empty(tiling.num_splits, num_tokens, num_outputs, dtype=torch.float32, device=x.device)
    else:
        out = x.new_empty(num_tokens, num_outputs // 2 if gated else num_outputs)
    grid = (num_outputs // tiling.block_n, -(-num_tokens // tiling.block_m), tiling.num_splits)
    options = asdict(tiling)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    _matmul_kernel[grid](
        x, weight, out, num_tokens, num_outputs, x.stride(0), K=depth, GATED=gated, PREFETCH_DEPTH=PREFETCH_DEPTH,
        **{name.upper(): value for name, value in options.items()}, **launch, **launch_options(),
    )  # fmt: skip
    return out


def matmul_torch(x, weight, tiling, gated=False):
    if tiling.num_splits > 1:
        parts = zip(x.float().chunk(tiling.num_splits, 1), weight.float().chunk(tiling.num_splits, 1))
        return torch.stack([F.linear(a, b) for a, b in parts])
    out = F.linear(x, weight)
    return silu_and_mul_torch(out) if gated else out


@jit(do_not_specialize=("M",))
def _matmul_kernel(
    x_ptr, weight_ptr, out_ptr, M, N, x_stride,
    K: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, GATED: tl.constexpr, PREFETCH_DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK_N rows of the weight by BLOCK_M tokens, over one of NUM_SPLITS parts of the depth."""
    tile = tl.program_id(0)
    part = tl.program_id(2)
    DEPTH: tl.constexpr = K // NUM_SPLITS
    lanes = tl.arange(0, BLOCK_N)
    if GATED:  # as many gates as ups, of the same outputs
        HALF: tl.constexpr = BLOCK_N // 2
        rows = tile * HALF + lanes % HALF + lanes // HALF * (N // 2)
    else:
        rows = tile * BLOCK_N + lanes
    row_offsets = rows[:, None].to(tl.int64) * K + part * DEPTH
    if PDL:  # 64 elements are a line
        lines = tl.arange(0, BLOCK_K // 64)
        for k in tl.static_range(0, min(DEPTH, PREFETCH_DEPTH), BLOCK_K):
            prefetch_l2(weight_ptr + row_offsets + k + lines[None, :] * 64)
    pdl_wait(PDL)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = tokens < M
    cols = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + row_offsets + cols[None, :]
    x_ptrs = x_ptr + tokens[:, None].to(tl.int64) * x_stride + part * DEPTH + cols[None, :]
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, DEPTH, BLOCK_K):
        weight = tl.load(weight_ptrs + k)
        x = tl.load(x_ptrs + k, mask=live[:, None], other=0.0)
        if SWAP:
            acc = tl.dot(weight, tl.trans(x), acc)
        else:
            acc = tl.dot(x, tl.trans(weight), acc)
    if SWAP:
        acc = tl.trans(acc)
    if GATED:
        dtype = out_ptr.dtype.element_ty
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        gate = gate.to(dtype).to(tl.float32)  # rounded as the separate product would be
        up = up.to(dtype).to(tl.float32)
        outputs = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out_ptrs = out_ptr + tokens[:, None].to(tl.int64) * (N // 2) + outputs[None, :]
        tl.store(out_ptrs, (gate / (1.0 + tl.exp(-gate)) * up).to(dtype), mask=live[:, None])
    else:
        part_ptr = out_ptr + part.to(tl.int64) * M * N
        out_ptrs = part_ptr + tokens[:, None].to(tl.int64) * N + rows[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
