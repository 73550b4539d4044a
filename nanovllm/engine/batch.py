"""Sequences -> integers -> input tensors. Called by the model runner; the only place where requests become tensors.

B rows, T new tokens in all, R permanent rows. The device keeps each running request's state in a permanent row, so a
decode step needs nothing from the host but which rows take part: their newest tokens have never left the device.
"""

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanovllm.engine.sequence import DecodingSequences, Sequence

PROMPT_LOGPROBS_CHUNK = 256  # positions whose logits exist at once
FEW_UPDATES = 8  # new entries of block tables, up to which one launch each is quicker than a copy and its pinned memory


class RequestState:
    """Device-resident state of the running requests, by permanent row. Row R pads batches.

    The padding row stays at position 0, and its block is one past the pool, so its KV lands where nobody reads.
    """

    def __init__(self, num_rows: int, max_blocks: int, padding_block: int, device: torch.device):
        self.padding_row = num_rows
        self.device = device
        with torch.inference_mode(False):  # or steps could write into them in that mode alone
            self.last_token = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
            self.num_cached_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
            self.temperatures = torch.zeros(num_rows + 1, dtype=torch.float32, device=device)
            self.seeds = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
            self.block_tables = torch.full((num_rows + 1, max_blocks), padding_block, dtype=torch.int32, device=device)

    def write_blocks(self, updates: np.ndarray | torch.Tensor | None) -> None:
        """updates [3, U] int64: rows, indices in their tables, block ids; on the host or the device; None for none."""
        if updates is None:
            return
        if isinstance(updates, np.ndarray):
            if updates.shape[1] <= FEW_UPDATES:  # each id travels as the argument of a launch: nothing is copied
                for row, index, block_id in updates.T.tolist():
                    self.block_tables[row, index].fill_(block_id)
                return
            updates = to_device(updates, self.device)
        rows, indices, block_ids = updates.unbind()
        self.block_tables.index_put_((rows, indices), block_ids.int())


@dataclass(slots=True)
class StepInput:
    """One step in integers: what every rank is told of it, and all that a rank without sequences needs."""

    is_prefill: bool  # some row computes more than its newest sampled token
    is_plain: bool  # every draw is from softmax(logits / temperature), and nothing else is asked for
    num_rows: int  # B
    num_tokens: int  # T
    num_updates: int  # U, new entries of block tables
    num_decodes: int  # the first rows: their one input id is the row's last token
    num_logprob_runs: int  # L, runs of prompt tokens whose log probabilities are asked for
    max_seqlen_q: int  # over the rows that are no decodes
    max_context_len: int
    # int64, one part after another. A decode step: rows [B], block updates [3, U]. A prefill step: input ids [T],
    # positions [T], slots [T], rows [B], context lens [B], cu_seqlens_q [B + 1], updates [3, U], seeds [B],
    # temperatures [B] (float64), and last, for the host alone, logprob runs [4, L], see `logprob_runs`.
    data: np.ndarray

    @property
    def logprob_runs(self) -> list[tuple[int, int, int, int]]:
        """As `prompt_logprob_runs` found them."""
        return [tuple(run) for run in self.data[len(self.data) - 4 * self.num_logprob_runs :].reshape(4, -1).T.tolist()]


@dataclass(slots=True)
class PrefillBatch:
    """A step in which some row computes more than its newest token. Device tensors, int64 but for the temperatures."""

    num_decodes: int
    max_seqlen_q: int
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

    row_ids: bytes  # [B] int64, the permanent rows; as bytes they are quick to compare
    max_context_len: int
    rows: torch.Tensor  # [B] int64, the same on the device
    block_updates: np.ndarray | None  # [3, U] int64, see RequestState.write_blocks


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy without waiting for the device: from pinned memory, which is not reused before the copy is done."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def block_updates(seqs: list[Sequence]) -> array:
    """The block table entries that the device has not been told of: rows [U], indices [U], block ids [U]."""
    rows, indices, block_ids = array("q"), array("q"), array("q")
    for seq in seqs:
        if seq.num_device_blocks < len(seq.block_table):
            for i in range(seq.num_device_blocks, len(seq.block_table)):
                rows.append(seq.row)
                indices.append(i)
                block_ids.append(seq.block_table[i])
            seq.num_device_blocks = len(seq.block_table)
    return rows + indices + block_ids


def prepare_decode(seqs: list[Sequence]) -> StepInput:
    decoding = seqs if isinstance(seqs, DecodingSequences) else DecodingSequences(seqs)
    updates = block_updates(decoding.grown)
    if decoding.data is None:
        decoding.data = np.frombuffer(decoding.rows, dtype=np.int64)
    return StepInput(
        is_prefill=False,
        is_plain=decoding.is_plain,
        num_rows=len(seqs),
        num_tokens=len(seqs),
        num_updates=len(updates) // 3,
        num_decodes=len(seqs),
        num_logprob_runs=0,
        max_seqlen_q=1,
        max_context_len=decoding.longest.num_cached_tokens + 1,
        # Without updates the same array each time, which the step channel knows again.
        data=np.frombuffer(decoding.rows + updates, dtype=np.int64) if updates else decoding.data,
    )


def decode_batch(step: StepInput, device: torch.device, previous: DecodeBatch | None = None) -> DecodeBatch:
    """`previous`: the batch of the step before; if its rows are these, they need not travel again."""
    row_ids = step.data[: step.num_rows].tobytes()
    if previous is not None and previous.row_ids == row_ids:
        rows = previous.rows
    else:
        rows = to_device(step.data[: step.num_rows], device)
    return DecodeBatch(
        row_ids=row_ids,
        max_context_len=step.max_context_len,
        rows=rows,
        block_updates=step.data[step.num_rows :].reshape(3, -1) if step.num_updates else None,
    )


def prepare_prefill(seqs: list[Sequence]) -> StepInput:
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
    context_lens = [seq.num_cached_tokens + seq.num_scheduled_tokens for seq in seqs]
    updates = block_updates(seqs)
    runs = prompt_logprob_runs(seqs)
    parts: list[Any] = [
        input_ids,
        positions,
        slots,
        [seq.row for seq in seqs],
        context_lens,
        cu_seqlens,
        updates,
        [seq.seed for seq in seqs],
        np.array([seq.sampling_params.temperature for seq in seqs], dtype=np.float64).view(np.int64),
        np.array(runs, dtype=np.int64).T.ravel(),
    ]
    return StepInput(
        is_prefill=True,
        is_plain=all([seq.is_plain for seq in seqs]),
        num_rows=len(seqs),
        num_tokens=num_tokens,
        num_updates=len(updates) // 3,
        num_decodes=num_decodes,
        num_logprob_runs=len(runs),
        max_seqlen_q=max((seq.num_scheduled_tokens for seq in seqs[num_decodes:]), default=1),
        max_context_len=max(context_lens),
        data=np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]),
    )


def prefill_batch(step: StepInput, device: torch.device) -> PrefillBatch:
    num_rows, num_tokens = step.num_rows, step.num_tokens
    sizes = [num_tokens] * 3 + [num_rows, num_rows, num_rows + 1, 3 * step.num_updates, num_rows, num_rows]
    packed = to_device(step.data[: sum(sizes)], device)
    input_ids, positions, slots, rows, context_lens, cu_seqlens, updates, seeds, temperatures = packed.split(sizes)
    return PrefillBatch(
        num_decodes=step.num_decodes,
        max_seqlen_q=step.max_seqlen_q,
        max_context_len=step.max_context_len,
        input_ids=input_ids,
        positions=positions,
        slot_mapping=slots,
        rows=rows,
        context_lens=context_lens,
        cu_seqlens_q=cu_seqlens,
        block_updates=updates.view(3, -1) if step.num_updates else None,
        seeds=seeds,
        temperatures=temperatures.view(torch.float64).float(),
    )


def prompt_logprob_runs(seqs: list[Sequence]) -> list[tuple[int, int, int, int]]:
    """The runs of prompt tokens whose log probabilities this step yields, none longer than its logits may be.

    Each is (row, position of its first token, and where the hidden states that predict it begin and end within T).
    """
    runs, offset = [], 0
    for row, seq in enumerate(seqs):
        count = seq.num_scheduled_tokens
        if seq.wants_prompt_logprobs:
            first = seq.num_cached_tokens + 1  # the token that the first hidden state predicts
            last = min(first + count, seq.num_prompt_tokens)
            for start in range(first, last, PROMPT_LOGPROBS_CHUNK):
                stop = min(start + PROMPT_LOGPROBS_CHUNK, last)
                runs.append((row, start, offset + start - first, offset + stop - first))
        offset += count
    return runs
