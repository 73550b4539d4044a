"""Sequences -> input tensors. Called by the model runner; the only place where requests become tensors.

B rows, T new tokens in all, R permanent rows. The device keeps each running request's state in a permanent row, so a
decode step needs nothing from the host but which rows take part: their newest tokens have never left the device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanovllm.engine.sequence import Sequence


class RequestState:
    """Device-resident state of the running requests, by permanent row. Row R pads batches.

    The padding row stays at position 0, and its block is one past the pool, so its KV lands where nobody reads.
    """

    def __init__(self, num_rows: int, max_blocks: int, padding_block: int, device: torch.device):
        self.padding_row = num_rows
        self.device = device
        self.last_token = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self.num_cached_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self.temperatures = torch.zeros(num_rows + 1, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self.block_tables = torch.full((num_rows + 1, max_blocks), padding_block, dtype=torch.int32, device=device)

    def write_blocks(self, updates: torch.Tensor | None) -> None:
        """updates [3, U] int64: rows, indices in their tables, block ids; None for none."""
        if updates is not None:
            self.block_tables[updates[0], updates[1]] = updates[2].int()


@dataclass(slots=True)
class PrefillBatch:
    """A step in which some row computes more than its newest token. Device tensors, int64 but for the temperatures."""

    num_decodes: int  # the first rows: their one input id is the row's last token
    max_seqlen_q: int  # over the other rows
    max_context_len: int
    input_ids: torch.Tensor  # [T]; 0 for decodes
    positions: torch.Tensor  # [T]
    slot_mapping: torch.Tensor  # [T], token slots of the cache
    rows: torch.Tensor  # [B], permanent rows
    context_lens: torch.Tensor  # [B], this step's tokens included
    cu_seqlens_q: torch.Tensor  # [B + 1]
    block_updates: torch.Tensor | None  # [3, U], see RequestState.write_blocks
    seeds: torch.Tensor  # [B]
    temperatures: torch.Tensor  # [B] float32


@dataclass(slots=True)
class DecodeBatch:
    """A step in which every row computes its newest token."""

    row_ids: list[int]  # the permanent rows
    max_context_len: int
    rows: torch.Tensor  # [B] int64, the same on the device
    block_updates: torch.Tensor | None  # [3, U] int64, see RequestState.write_blocks


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy without waiting for the device: from pinned memory, which is not reused before the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def block_updates(seqs: list[Sequence]) -> list[tuple[int, int, int]]:
    """The block table entries (row, index, block id) that the device has not been told of."""
    updates = []
    for seq in [seq for seq in seqs if seq.num_device_blocks < len(seq.block_table)]:
        for i in range(seq.num_device_blocks, len(seq.block_table)):
            updates.append((seq.row, i, seq.block_table[i]))
        seq.num_device_blocks = len(seq.block_table)
    return updates


def prepare_decode(seqs: list[Sequence], device: torch.device, previous: DecodeBatch | None = None) -> DecodeBatch:
    """`previous`: the batch of the step before; if its rows are these, they need not travel again."""
    updates = block_updates(seqs)
    row_ids = [seq.row for seq in seqs]
    if previous is not None and previous.row_ids == row_ids:
        rows = previous.rows
    else:
        rows = to_device(np.array(row_ids, dtype=np.int64), device)
    return DecodeBatch(
        row_ids=row_ids,
        max_context_len=max([seq.num_cached_tokens for seq in seqs]) + 1,
        rows=rows,
        block_updates=to_device(np.array(updates, dtype=np.int64).T.copy(), device) if updates else None,
    )


def prepare_prefill(seqs: list[Sequence], device: torch.device) -> PrefillBatch:
    """Everything packed into one array, so that it takes one copy."""
    num_decodes = sum(seq.is_decoding for seq in seqs)
    cu_seqlens = np.zeros(len(seqs) + 1, dtype=np.int64)
    np.cumsum([seq.num_scheduled_tokens for seq in seqs], out=cu_seqlens[1:])
    num_tokens = int(cu_seqlens[-1])
    input_ids, positions, slots = np.zeros((3, num_tokens), dtype=np.int64)
    for seq, begin, end in zip(seqs, cu_seqlens, cu_seqlens[1:]):
        first, last = seq.num_cached_tokens, seq.num_cached_tokens + seq.num_scheduled_tokens
        if not seq.is_decoding:
            input_ids[begin:end] = seq.token_ids[first:last]
        positions[begin:end] = own = np.arange(first, last)
        first_block = first // seq.block_size
        table = np.array(seq.block_table[first_block : (last - 1) // seq.block_size + 1])
        slots[begin:end] = table[own // seq.block_size - first_block] * seq.block_size + own % seq.block_size
    parts: dict[str, Any] = {
        "input_ids": input_ids,
        "positions": positions,
        "slot_mapping": slots,
        "rows": [seq.row for seq in seqs],
        "context_lens": [seq.num_cached_tokens + seq.num_scheduled_tokens for seq in seqs],
        "cu_seqlens_q": cu_seqlens,
        "block_updates": np.array(block_updates(seqs), dtype=np.int64).reshape(-1, 3).T.ravel(),
        "seeds": [seq.seed for seq in seqs],
        "temperatures": np.array([seq.sampling_params.temperature for seq in seqs], dtype=np.float64).view(np.int64),
    }
    packed = to_device(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts.values()]), device)
    tensors = dict(zip(parts, packed.split([len(part) for part in parts.values()])))
    tensors["block_updates"] = tensors["block_updates"].view(3, -1)
    tensors["temperatures"] = tensors["temperatures"].view(torch.float64).float()
    return PrefillBatch(
        num_decodes=num_decodes,
        max_seqlen_q=max((seq.num_scheduled_tokens for seq in seqs[num_decodes:]), default=1),
        max_context_len=max(parts["context_lens"]),
        **tensors,
    )
