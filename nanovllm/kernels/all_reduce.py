"""The sum over ranks of few rows, within the RMSNorm that follows. Called by layers/layernorm.py, kernels/linear.py.

One-shot: every rank reads all ranks' rows from their memory (utils/peer_memory.py) and adds them in the same order, so
that all have the same bits. How sums are kept apart, on every rank alike:

- Sums are numbered, on the device. A rank announces the number of a sum to its peers once its kernel runs, which is
  after all that it launched before: so its summand is written, and every earlier sum is done with.
- A rank reads a peer's slot only after the peer has announced this sum, or the next: a peer can be one ahead, not two.
- A slot is written again when this rank is done with a sum that came after the slot's last one, since no two sums in a
  row use the same slot. For that later sum every peer has announced itself, hence is done with the slot's last one.

Nothing in this depends on the number of rows, on which program of a grid runs when, on graphs, or on what else runs in
between, as long as ranks take the same sums in the same order and every kernel waits (`pdl_wait`) for the one before.
"""

import torch

from nanovllm.kernels.norm import rms_norm_torch
from nanovllm.kernels.triton_utils import jit, launch_options, next_power_of_2, pdl_wait, tl
from nanovllm.utils.peer_memory import FLAG_BYTES, HEADER_BYTES, SLOTS, PeerSum

ANNOUNCE = "release"  # how a number is stored: after everything else that this GPU has stored
POLLS = 256  # between two looks at the abort flag, which is far away: about 0.2 ms


def all_reduce_rms_norm(
    x: PeerSum, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, num_warps: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(total), total), both [T, H]; total is the sum over ranks plus residual [T, H], added in float32."""
    num_tokens, hidden_size = x.x.shape
    normed, total = torch.empty_like(x.x), torch.empty_like(x.x)
    if not num_tokens:
        return normed, total
    assert x.x.is_contiguous() and (residual is None or residual.is_contiguous())
    peers, block = x.peers, next_power_of_2(hidden_size)
    assert peers.slots is not None
    _all_reduce_rms_norm_kernel[(num_tokens,)](
        x.x, x.x if residual is None else residual, weight, normed, total,
        peers.addresses, peers.epochs, x.slot, peers.slots.stride(0), eps,
        RANK=peers.rank, SIZE=peers.size, H=hidden_size, BLOCK=block, HAS_RESIDUAL=residual is not None,
        SLOTS=SLOTS, FLAG_STRIDE=FLAG_BYTES // 8, HEADER=HEADER_BYTES, POLLS=POLLS, ANNOUNCE=ANNOUNCE,
        num_warps=num_warps or min(max(block // 256, 1), 16), **launch_options(),
    )  # fmt: skip
    return normed, total


def all_reduce_rms_norm_torch(
    summands: list[torch.Tensor], residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin, of the summands [T, H] of all ranks."""
    total = torch.zeros_like(summands[0], dtype=torch.float32)
    for summand in summands:
        total += summand
    total = (total if residual is None else total + residual).to(summands[0].dtype)
    return rms_norm_torch(total, weight, eps), total


@jit(do_not_specialize=("slot", "slot_stride"))
def _all_reduce_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, addresses_ptr, epochs_ptr, slot, slot_stride, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SLOTS: tl.constexpr, FLAG_STRIDE: tl.constexpr, HEADER: tl.constexpr, POLLS: tl.constexpr, ANNOUNCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row of H elements."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    live = cols < H
    weight = tl.load(weight_ptr + cols, mask=live, other=0.0).to(tl.float32)
    flags_ptr = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int64))
    abort_ptr = tl.load(addresses_ptr + SIZE).to(tl.pointer_type(tl.int64))
    pdl_wait(PDL)
    # The sum before this one was in another slot, and only this slot's number is written while others may read.
    epoch = tl.load(epochs_ptr + (slot + 1) % SLOTS)
    for i in tl.static_range(2, SLOTS):
        epoch = tl.maximum(epoch, tl.load(epochs_ptr + (slot + i) % SLOTS))
    epoch += 1
    if row == 0:
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                peer_ptr = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int64))
                tl.atomic_xchg(peer_ptr + RANK * FLAG_STRIDE, epoch, sem=ANNOUNCE, scope="sys")
        tl.store(epochs_ptr + slot, epoch)
    own = tl.load(x_ptr + row * H + cols, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * H + cols, mask=live, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            total += own
        else:
            slots_ptr = (tl.load(addresses_ptr + rank) + HEADER).to(tl.pointer_type(x_ptr.dtype.element_ty))
            _wait(flags_ptr + rank * FLAG_STRIDE, epoch, abort_ptr, POLLS)
            ptrs = slots_ptr + slot * slot_stride + row * H + cols
            if H % 16 == 0:  # what the compiler cannot know of an address that it loads
                ptrs = tl.multiple_of(ptrs, 16)
            # .cg: a line that this multiprocessor holds may be of the slot's sum before.
            total += tl.load(ptrs, mask=live, other=0.0, cache_modifier=".cg").to(tl.float32)
    if HAS_RESIDUAL:
        total += residual
    rounded = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * H + cols, rounded, mask=live)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / H + eps)
    tl.store(normed_ptr + row * H + cols, (total * scale * weight).to(normed_ptr.dtype.element_ty), mask=live)


@jit
def _wait(flag_ptr, epoch, abort_ptr, POLLS: tl.constexpr):
    """Until a peer has announced `epoch`, or all is over. One thread of the program polls; the others wait for it."""
    seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
    polls = 0
    while seen < epoch:
        polls += 1
        if polls == POLLS:
            polls = 0
            if tl.load(abort_ptr, volatile=True) != 0:
                epoch = seen
        seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
