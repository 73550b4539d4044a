"""What a launched step leaves on the device, and its way to the host. Made by the model runner, read by the engine."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.batch import StepInput
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import LogprobsTensors, compute_logprobs

ZEROS = np.broadcast_to(np.int64(0), 200_000)


def pass_time() -> None:
    """Some 50 to 70 µs in which other threads have the interpreter, no memory is read, and the core is not given away.

    Who sleeps, however briefly, may find the core's caches in other uses, and the next step takes longer. What a poll
    costs is hidden where a step is launched ahead.
    """
    np.add.reduce(ZEROS)


@dataclass(slots=True)
class StepOutput:
    """On the device: tokens [B] int64, and for the rows that asked: numbers and log probabilities of their tokens;
    (row, position of the first token, log probabilities) of runs of prompt tokens."""

    token_ids: torch.Tensor
    logprobs: tuple[list[int], LogprobsTensors] | None = None
    prompt_logprobs: list[tuple[int, int, LogprobsTensors]] | None = None
    error: BaseException | None = None  # a user's callable raised; every rank has done its part all the same


class TokenBuffers:
    """Pinned memory for the tokens of a step, and an event, which are used again: to make them anew takes longer.

    Whoever takes one gives it back when the tokens are read. One that an exception kept is torch's to free.
    """

    def __init__(self, max_num_seqs: int):
        self.max_num_seqs = max_num_seqs
        self.idle: list[tuple[torch.Tensor, torch.Event]] = []

    def take(self) -> tuple[torch.Tensor, torch.Event]:
        return self.idle.pop() if self.idle else self.make()

    def make(self) -> tuple[torch.Tensor, torch.Event]:
        with torch.inference_mode(False):  # or nobody could write into it outside of the mode
            buffer = torch.empty(self.max_num_seqs, dtype=torch.int64, pin_memory=True)
        return buffer, torch.Event("cuda", enable_timing=False)  # torch.cuda's looks for its stream in Python

    def give_back(self, buffer: torch.Tensor, event: torch.Event) -> None:
        self.idle.append((buffer, event))


class PendingTokens:
    """The tokens of a launched step, [B], and the log probabilities some rows asked for, on their way to the host."""

    def __init__(
        self,
        step: StepInput,
        output: StepOutput,
        check: Callable[[], None] | None = None,
        buffers: TokenBuffers | None = None,
    ):
        """check: raises if the tokens are not to be trusted, because a rank was lost; buffers: None on a CPU."""
        self.num_tokens = step.num_tokens  # that the step computes
        self.is_prefill, self.is_plain = step.is_prefill, step.is_plain
        self.check = check
        self.token_ids = output.token_ids
        self.buffers = buffers
        if buffers is not None:
            self.buffer, self.event = buffers.take()
            self.token_ids = self.buffer[: step.num_rows].copy_(output.token_ids, non_blocking=True)
        self.logprobs = output.logprobs and (output.logprobs[0], output.logprobs[1].map(to_host))
        runs = output.prompt_logprobs or ()
        self.prompt_logprobs = [(row, first, run.map(to_host)) for row, first, run in runs]
        if buffers is not None:
            self.event.record()

    def wait(self) -> list[int]:
        """The tokens, once; raises what `check` does as soon as it would, since a lost rank's part never comes."""
        if self.check is not None:
            while self.buffers is not None and not self.event.query():
                self.check()
                pass_time()
            self.check()
        elif self.buffers is not None:
            self.event.synchronize()
        token_ids: list[int] = self.token_ids.tolist()
        if self.buffers is not None:
            self.buffers.give_back(self.buffer, self.event)
        return token_ids


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy without waiting for the device; there once an event recorded after it has come."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def sampled_logprobs(
    seqs: list[Sequence], logits: torch.Tensor, token_ids: torch.Tensor
) -> tuple[list[int], LogprobsTensors] | None:
    """For the rows that ask: their numbers, and their sampled tokens' log probabilities."""
    rows = [row for row, seq in enumerate(seqs) if seq.sampling_params.logprobs is not None]
    if not rows:
        return None
    k = max(seqs[row].sampling_params.logprobs or 0 for row in rows)
    index = torch.tensor(rows, device=logits.device)
    return rows, compute_logprobs(logits[index], token_ids[index], k)
