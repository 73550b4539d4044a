"""RMSNorm, alone and fused with the addition before it. Called by layers/layernorm.py and kernels/linear.py."""

import torch

from nanovllm.kernels.triton_utils import jit, launch_options, next_power_of_2, pdl_wait, tl, use_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] * rsqrt(mean(x², -1) + eps) * weight [H], computed in float32."""
    return rms_norm_triton(x, weight, eps) if use_triton(x) else rms_norm_torch(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, H]. The sum is rounded to residual's dtype before it is normed.

    x is [T, H], or [S, T, H] float32: the partial sums of a split product (kernels/linear.py), which are added here.
    """
    if use_triton(x):
        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_torch(x, residual, weight, eps)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dim() == 3:
        x = x.sum(0)
    residual = (x + residual).to(residual.dtype)
    return rms_norm_torch(residual, weight, eps), residual


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows of x may be strided; elements of a row may not."""
    assert x.stride(-1) == 1
    out = x.new_empty(x.shape)
    _launch(x, x, weight, out, out, eps, has_residual=False)
    return out


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.stride(-1) == residual.stride(-1) == 1
    out, total = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    _launch(x, residual, weight, out, total, eps, has_residual=True)
    return out, total


def _launch(x, residual, weight, out, total, eps, has_residual):
    num_tokens, hidden_size = x.shape[-2:]
    if not num_tokens:
        return
    block = next_power_of_2(hidden_size)
    # 8 elements a thread are one 16-byte load; more than 16 warps would only lengthen the reduction.
    num_warps = min(max(block // 256, 1), 16)
    _norm_kernel[(num_tokens,)](
        x, residual, weight, out, total, x.stride(-2), residual.stride(0), x.stride(0), eps,
        H=hidden_size, BLOCK=block, SPLIT=x.shape[0] if x.dim() == 3 else 1, HAS_RESIDUAL=has_residual,
        num_warps=num_warps, **launch_options(),
    )  # fmt: skip


@jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, part_stride, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row of H elements."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    live = cols < H
    weight = tl.load(weight_ptr + cols, mask=live, other=0.0).to(tl.float32)  # before the wait: nobody writes weights
    pdl_wait(PDL)
    x_ptrs = x_ptr + row * x_stride + cols
    x = tl.load(x_ptrs, mask=live, other=0.0)
    for part in tl.static_range(1, SPLIT):
        x += tl.load(x_ptrs + part * part_stride, mask=live, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=live, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * H + cols, x, mask=live)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    tl.store(out_ptr + row * H + cols, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=live)
