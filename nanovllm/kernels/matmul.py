"""Products of 2 to 256 rows, which read their weights at memory speed. Called by kernels/linear.py.

cuBLAS pays about 4 µs beside the bytes of every such product, whatever its size. Here a product asks for its weights,
which no kernel writes, while the kernel before it still runs; takes a gated activation into its end; and, where its
output is too narrow for one tile a multiprocessor, is split over its depth (split-K) into partial sums that the next
RMSNorm adds up.

Two kernels: for up to 32 rows (64, if gated and of a short depth) the weight is the left operand, whose rows fill the
matrix unit's 64 however few the tokens; beyond, the tokens are, 64 a tile, and tiles of both travel by TMA, the copy
engine.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.triton_utils import (
    TensorDescriptor,
    has_pdl,
    has_tma,
    jit,
    launch_options,
    next_power_of_2,
    num_multiprocessors,
    pdl_wait,
    prefetch_l2,
    shared_memory_bytes,
    tl,
    use_triton,
)

BLOCK_N, BLOCK_K = 64, 128  # rows of the weight, and columns a step; the best of benchmarks/products.py in every shape
PREFETCH_DEPTH = 1024  # columns of its weights that a program asks for before it waits
MAX_ROWS = 128  # beyond them cuBLAS does better, but for small weights that are split
MAX_ROWS_SMALL, SMALL_BYTES = 256, 8 * 2**20


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut into programs, and by which kernel they run."""

    block_m: int  # tokens of a tile
    num_splits: int = 1  # parts of the depth
    num_stages: int = 4  # steps in flight
    by_tma: bool = False  # False: `_few_rows_kernel`


def choose_tiling(x: torch.Tensor, weight: torch.Tensor, gated: bool = False, can_split: bool = False) -> Tiling | None:
    """For x [T, K] and weight [N, K]; None where others do better, as benchmarks/products.py found for the shapes of
    two models on an H100. Before Hopper a kernel cannot fetch weights while another ends, and nothing was measured.
    """
    num_tokens, depth = x.shape
    num_outputs = weight.shape[0]
    if not use_triton(x) or not has_pdl() or x.dtype == torch.float32:
        return None
    if num_outputs % BLOCK_N or depth % BLOCK_K or num_tokens < 2:
        return None
    if num_tokens > (64 if gated else MAX_ROWS_SMALL if can_split and weight.nbytes <= SMALL_BYTES else MAX_ROWS):
        return None
    is_few = num_tokens <= (64 if gated and depth <= 1024 else 32)
    block_m = max(next_power_of_2(num_tokens), 16) if is_few else 64
    num_tiles = num_outputs // BLOCK_N * -(-num_tokens // block_m)
    num_processors, num_splits, min_steps = num_multiprocessors(x.device), 1, 2 if is_few else 4
    while can_split and num_tiles * num_splits * 2 <= num_processors:
        steps_of_half, rest = divmod(depth, num_splits * 2 * BLOCK_K)
        if rest or steps_of_half < min_steps:
            break
        num_splits *= 2
    if is_few and num_tiles * num_splits * 2 < num_processors and depth > 2048:
        return None  # too few programs read for too long
    if not is_few and (not has_tma() or (num_tokens > 64 and num_tiles * num_splits > num_processors)):
        return None  # a second round for a few of the tiles would take as long as the first
    num_steps = depth // num_splits // BLOCK_K
    num_stages = 4 if is_few or num_steps <= 8 else 5 if num_steps <= 16 or num_tokens <= 64 else 7
    stage_bytes = (BLOCK_N + block_m) * BLOCK_K * x.element_size()
    fitting = min((shared_memory_bytes(x.device) - 2048) // stage_bytes, num_steps)
    return Tiling(block_m, num_splits, min(num_stages, fitting), by_tma=not is_few) if fitting >= 2 else None


def matmul(
    x: torch.Tensor, weight: torch.Tensor, tiling: Tiling, gated: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K] times weight [N, K]ᵀ.

    Returns [T, N]; gated, of a weight of gate rows, then up rows: silu(gate) · up, [T, N / 2]; split: the partial sums,
    [num_splits, T, N] in float32.
    """
    num_tokens, depth = x.shape
    num_outputs, num_splits = weight.shape[0], tiling.num_splits
    assert num_outputs % BLOCK_N == 0 == depth % (BLOCK_K * num_splits)
    assert x.stride(1) == 1 and weight.is_contiguous() and not (gated and num_splits > 1)
    if num_splits > 1:
        out = torch.empty(num_splits, num_tokens, num_outputs, dtype=torch.float32, device=x.device)
    elif out is None:
        out = x.new_empty(num_tokens, num_outputs // 2 if gated else num_outputs)
    # Tiles of the same weights one after the other, so that the second finds them in L2.
    grid = (-(-num_tokens // tiling.block_m), num_outputs // BLOCK_N, num_splits)
    options = dict(
        K=depth, NUM_SPLITS=num_splits, BLOCK_M=tiling.block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GATED=gated,
        PREFETCH_DEPTH=min(depth // num_splits, PREFETCH_DEPTH), num_warps=4 if tiling.block_m <= 64 else 8,
        num_stages=tiling.num_stages, **launch_options(),
    )  # fmt: skip
    if not tiling.by_tma:
        _few_rows_kernel[grid](x, weight, out, num_tokens, num_outputs, x.stride(0), **options)
    else:
        x_tiles = TensorDescriptor(x, [num_tokens, depth], [x.stride(0), 1], [tiling.block_m, BLOCK_K])
        rows = BLOCK_N // 2 if gated else BLOCK_N
        weight_tiles = TensorDescriptor(weight, [num_outputs, depth], [depth, 1], [rows, BLOCK_K])
        _more_rows_kernel[grid](x_tiles, weight_tiles, weight, out, num_tokens, num_outputs, **options)
    return out


def matmul_torch(x, weight, tiling, gated=False, out=None):
    if tiling.num_splits > 1:
        parts = zip(x.float().chunk(tiling.num_splits, 1), weight.float().chunk(tiling.num_splits, 1))
        return torch.stack([F.linear(a, b) for a, b in parts])
    product = F.linear(x, weight)
    product = silu_and_mul_torch(product) if gated else product
    return product if out is None else out.copy_(product)


@jit(do_not_specialize=("M",))
def _few_rows_kernel(
    x_ptr, weight_ptr, out_ptr, M, N, x_stride,
    K: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, PREFETCH_DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK_N rows of the weight by BLOCK_M tokens, over one of NUM_SPLITS parts of the depth."""
    tile = tl.program_id(1)
    part = tl.program_id(2)
    DEPTH: tl.constexpr = K // NUM_SPLITS
    row_ptrs = weight_ptr + tile_rows(tile, N, BLOCK_N, GATED)[:, None].to(tl.int64) * K + part * DEPTH
    if PDL:
        prefetch_rows(row_ptrs, PREFETCH_DEPTH, BLOCK_K)
    pdl_wait(PDL)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = tokens < M
    cols = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens[:, None].to(tl.int64) * x_stride + part * DEPTH + cols[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, DEPTH, BLOCK_K):
        weight = tl.load(row_ptrs + k + cols[None, :])
        x = tl.load(x_ptrs + k, mask=live[:, None], other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc)
    acc = tl.trans(acc)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        store_gated(out_ptr, gate, up, tokens, tile * (BLOCK_N // 2), M, N // 2)
    else:
        store_tile(out_ptr, acc, tokens, tile * BLOCK_N, part, M, N)


@jit(do_not_specialize=("M",))
def _more_rows_kernel(
    x_tiles, weight_tiles, weight_ptr, out_ptr, M, N,
    K: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, PREFETCH_DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_few_rows_kernel`; of a gated product gates and ups are two products of the same tokens."""
    tile = tl.program_id(1)
    part = tl.program_id(2)
    DEPTH: tl.constexpr = K // NUM_SPLITS
    ROWS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    if PDL:
        row_ptrs = weight_ptr + tile_rows(tile, N, BLOCK_N, GATED)[:, None].to(tl.int64) * K + part * DEPTH
        prefetch_rows(row_ptrs, PREFETCH_DEPTH, BLOCK_K)
    pdl_wait(PDL)
    # The last tile ends with the last token and shares some with the one before it, to which both write the same bits:
    # TMA is slow to fill a tile with zeros beyond the end. With one token in the second tile a product took 1.6 times
    # as long as with 64.
    first_token = tl.minimum(tl.program_id(0) * BLOCK_M, tl.maximum(M - BLOCK_M, 0))
    tokens = first_token + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, ROWS), tl.float32)
    acc_up = tl.zeros((BLOCK_M, ROWS), tl.float32)
    for k in tl.range(part * DEPTH, (part + 1) * DEPTH, BLOCK_K):
        x = x_tiles.load([first_token, k])  # zeros beyond the last token
        weight = weight_tiles.load([tile * ROWS, k])
        acc = tl.dot(x, tl.trans(weight), acc)
        if GATED:
            up_weight = weight_tiles.load([N // 2 + tile * ROWS, k])
            acc_up = tl.dot(x, tl.trans(up_weight), acc_up)
    if GATED:
        store_gated(out_ptr, acc, acc_up, tokens, tile * ROWS, M, N // 2)
    else:
        store_tile(out_ptr, acc, tokens, tile * ROWS, part, M, N)


@jit
def tile_rows(tile, N, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The rows of the weight that belong to a tile; of a gated product half of them gates, half the same rows' ups."""
    lanes = tl.arange(0, BLOCK_N)
    if GATED:
        HALF: tl.constexpr = BLOCK_N // 2
        return tile * HALF + lanes % HALF + lanes // HALF * (N // 2)
    else:
        return tile * BLOCK_N + lanes


@jit
def prefetch_rows(row_ptrs, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    lines = tl.arange(0, BLOCK_K // 64) * 64  # elements of 2 bytes in 128
    for k in tl.static_range(0, DEPTH, BLOCK_K):
        prefetch_l2(row_ptrs + k + lines[None, :])


@jit
def store_tile(out_ptr, acc, tokens, first_output, part, M, N):
    outputs = first_output + tl.arange(0, acc.shape[1])
    out_ptrs = out_ptr + part.to(tl.int64) * M * N + tokens[:, None].to(tl.int64) * N + outputs[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(tokens < M)[:, None])


@jit
def store_gated(out_ptr, gate, up, tokens, first_output, M, num_outputs):
    dtype = out_ptr.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)  # rounded as the separate product would be
    up = up.to(dtype).to(tl.float32)
    outputs = first_output + tl.arange(0, gate.shape[1])
    out_ptrs = out_ptr + tokens[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    tl.store(out_ptrs, (gate / (1.0 + tl.exp(-gate)) * up).to(dtype), mask=(tokens < M)[:, None])
