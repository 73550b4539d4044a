"""silu(gate) * up over a packed product. Called by kernels/linear.py and layers/linear.py."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.triton_utils import jit, launch_options, pdl_wait, tl, use_triton


def silu_and_mul(x: torch.Tensor, invariant: bool = False) -> torch.Tensor:
    """x [T, 2·I], gate in the first half and up in the second -> [T, I], computed in float32.

    invariant: an element's bits do not depend on its place in x.
    """
    return silu_and_mul_triton(x) if use_triton(x) else silu_and_mul_torch(x, invariant)


def silu_and_mul_torch(x: torch.Tensor, invariant: bool = False) -> torch.Tensor:
    gate, up = x.float().chunk(2, -1)
    # F.silu rounds differently at the end of a tensor, where vectors no longer fit, than in the middle.
    silu = gate / (1 + torch.exp(-gate)) if invariant else F.silu(gate)
    return (silu * up).to(x.dtype)


def silu_and_mul_triton(x: torch.Tensor) -> torch.Tensor:
    assert x.stride(-1) == 1
    num_tokens, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_tokens, size)
    if num_tokens:
        block = 1024  # with 4 warps, 8 elements a thread: one 16-byte load each of gate and up
        grid = (num_tokens, -(-size // block))
        _silu_and_mul_kernel[grid](x, out, x.stride(0), I=size, BLOCK=block, num_warps=4, **launch_options())
    return out


@jit
def _silu_and_mul_kernel(x_ptr, out_ptr, x_stride, I: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # noqa: E741
    """One program a BLOCK of a row of I outputs."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < I
    pdl_wait(PDL)
    gate = tl.load(x_ptr + row * x_stride + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + I + cols, mask=live, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + row * I + cols, (silu * up).to(out_ptr.dtype.element_ty), mask=live)
