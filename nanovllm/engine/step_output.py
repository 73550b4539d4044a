"""What a launched step leaves on the device, and its way to the host. Made by the model runner, read by the engine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanovllm.engine.batch import StepInput
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import LogprobsTensors, compute_logprobs


@dataclass(slots=True)
class StepOutput:
    """On the device: tokens [B] int64, and for the rows that asked: numbers and log probabilities of their tokens;
    (row, position of the first token, log probabilities) of runs of prompt tokens."""

    token_ids: torch.Tensor
    logprobs: tuple[list[int], LogprobsTensors] | None = None
    prompt_logprobs: list[tuple[int, int, LogprobsTensors]] | None = None
    error: BaseException | None = None  # a user's callable raised; every rank has done its part all the same


class PendingTokens:
    """The tokens of a launched step, [B], and the log probabilities some rows asked for, on their way to the host."""

    def __init__(self, step: StepInput, output: StepOutput, check: Callable[[], None] | None = None):
        """check: raises if the tokens are not to be trusted, because a rank was lost."""
        self.num_tokens = step.num_tokens  # that the step computes
        self.is_plain = step.is_plain
        self.event = None
        self.check = check
        self.token_ids = self._to_host(output.token_ids)
        self.logprobs = output.logprobs and (output.logprobs[0], output.logprobs[1].map(self._to_host))
        runs = output.prompt_logprobs or ()
        self.prompt_logprobs = [(row, first, run.map(self._to_host)) for row, first, run in runs]
        if output.token_ids.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    @staticmethod
    def _to_host(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cuda:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def wait(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        if self.check is not None:
            self.check()
        return self.token_ids.tolist()


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
