"""Logits to one token a row. Rows that ask for more than a temperature have their logits adjusted first.

The order is vLLM's: allowed and grammar -> bad words -> min_tokens -> bias -> callables -> penalties -> temperature ->
min-p -> top-k -> top-p -> draw. All before the temperature change logits; the filters after it only take tokens out,
and are part of the draw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.filtering import NEG_INF, Filters, filtered_argmax
from nanovllm.kernels.sampling import gumbel_argmax
from nanovllm.sampling_params import NOTHING_LEFT

NUM_ADJUSTED_AT_ONCE = 2**24  # logits, each of which takes some 25 bytes in float32 and what is made of that


def rows_at_once(vocab_size: int) -> int:
    """How many rows are adjusted together, at the most."""
    return max(1, NUM_ADJUSTED_AT_ONCE // vocab_size)


@dataclass(slots=True)
class LogitsAdjustments:
    """What `n` of a batch's rows ask for; device tensors; index pairs are [2, m] int64 of (row among the n, id)."""

    rows: torch.Tensor  # [n] int64, rows of the batch
    filters: Filters | None = None
    allowed: torch.Tensor | None = None  # [n, vocab] bool, from allowed_token_ids and grammars
    banned: torch.Tensor | None = None  # pairs: bad words about to be completed, ends before min_tokens
    bias: tuple[torch.Tensor, torch.Tensor] | None = None  # pairs, [m] float32
    processors: list[tuple[int, Callable[[torch.Tensor], torch.Tensor]]] | None = None  # (row among the n, function)
    # Of the p rows with penalties. A count is twice how often the output has the token, plus one if the prompt has it.
    penalized: torch.Tensor | None = None  # [p] int64, rows among the n
    penalties: torch.Tensor | None = None  # [3, p, 1] float32: presence, frequency, repetition
    counts: torch.Tensor | None = None  # [p, vocab] int32

    @property
    def changes_logits(self) -> bool:
        changes = self.allowed, self.banned, self.bias, self.processors, self.penalized
        return any(change is not None for change in changes)


class Sampler(nn.Module):
    def forward(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        adjustments: Sequence[LogitsAdjustments] = (),
    ) -> torch.Tensor:
        """logits [B, vocab]; temperatures [B] float32; seeds, positions [B] int64 -> token ids [B] int64.

        adjustments: of different rows; those that change logits of no more than `rows_at_once` each.
        Not an id but -1 where the largest score is not finite, and NOTHING_LEFT where only the adjustments made it so.
        """
        if sum(len(part.rows) for part in adjustments) < len(logits):
            token_ids = gumbel_argmax(logits, temperatures, seeds, positions)
        else:
            token_ids = torch.empty_like(positions)
        # The rows that ask are drawn by themselves: the others' logits need not be copied, nor be float32.
        for part in adjustments:
            rows = part.rows
            if part.filters is not None and not part.changes_logits:
                drawn = filtered_argmax(logits, rows, temperatures, seeds, positions, part.filters)
            else:
                draws = temperatures[rows], seeds[rows], positions[rows]
                asking = logits[rows].float()
                is_sound = asking.amax(-1).isfinite()
                asking = adjust_logits(asking, part)
                if part.filters is not None:
                    drawn = filtered_argmax(asking, torch.arange(len(rows), device=rows.device), *draws, part.filters)
                else:
                    drawn = gumbel_argmax(asking, *draws)
                drawn = drawn.masked_fill_(drawn < 0, NOTHING_LEFT).masked_fill_(~is_sound, -1)
            token_ids.index_copy_(0, rows, drawn)
        return token_ids


def adjust_logits(logits: torch.Tensor, a: LogitsAdjustments) -> torch.Tensor:
    """logits [n, vocab] float32 -> what the temperature divides and the filters see; what is not allowed is -inf."""
    if a.allowed is not None:
        logits = logits.masked_fill(~a.allowed, NEG_INF)
    if a.banned is not None:
        logits[a.banned[0], a.banned[1]] = NEG_INF
    if a.bias is not None:
        (rows, token_ids), values = a.bias
        logits.index_put_((rows, token_ids), values, accumulate=True)
    for row, processor in a.processors or ():
        logits[row] = processor(logits[row])
    if a.penalized is not None:
        logits.index_copy_(0, a.penalized, penalize(logits[a.penalized], a.penalties, a.counts))
    return logits


def penalize(logits: torch.Tensor, penalties: Any, counts: Any) -> torch.Tensor:
    """Presence, frequency (both on the output alone) and repetition (prompt and output) penalties."""
    presence, frequency, repetition = penalties
    logits = torch.where(counts > 0, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    in_output = counts >> 1
    return logits - frequency * in_output - presence * (in_output > 0)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Of rows [m, vocab] float32. Padded to whole 16 bytes: the order of CUDA's sums depends on a row's alignment."""
    vocab_size = logits.shape[1]
    if vocab_size % 4:
        logits = F.pad(logits, (0, -vocab_size % 4), value=NEG_INF)
    return logits.log_softmax(-1)[:, :vocab_size]


@dataclass(slots=True)
class LogprobsTensors:
    """Log probabilities of m chosen tokens and of the k likeliest in their places."""

    chosen: torch.Tensor  # [m] float32
    ranks: torch.Tensor  # [m] int64, from 1
    top: torch.Tensor  # [m, k] float32
    top_ids: torch.Tensor  # [m, k] int64

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LogprobsTensors":
        return LogprobsTensors(*map(function, (self.chosen, self.ranks, self.top, self.top_ids)))

    @classmethod
    def cat(cls, parts: list["LogprobsTensors"]) -> "LogprobsTensors":
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def tolist(self) -> list[tuple[float, int, list[float], list[int]]]:
        return list(zip(self.chosen.tolist(), self.ranks.tolist(), self.top.tolist(), self.top_ids.tolist()))


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobsTensors:
    """logits [m, vocab] as the model gave them, token_ids [m] int64, -1 for none; of equals the lowest id is first."""
    size = rows_at_once(logits.shape[1])
    return LogprobsTensors.cat([_logprobs(*part, k) for part in zip(logits.split(size), token_ids.split(size))])


def _logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobsTensors:
    logprobs = log_softmax(logits.float())
    chosen = logprobs.gather(1, token_ids.clamp(min=0)[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    # topk() breaks ties as its algorithm happens to, which depends on m. Here none are left: a log probability's
    # distance from 0 has the order of its bits, and the id follows it in the same number.
    keys = logprobs.abs().view(torch.int32).long()
    keys.bitwise_left_shift_(32).bitwise_or_(torch.arange(logprobs.shape[1], device=keys.device))
    top_ids = keys.topk(k, -1, largest=False).values.bitwise_and_(0xFFFFFFFF)
    return LogprobsTensors(chosen.squeeze(1), ranks, logprobs.gather(1, top_ids), top_ids)
