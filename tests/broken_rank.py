"""Logits that go wrong on one rank or on both, for requests known by their seeds. Run as a program it is a worker.

test_tensor_parallel_requests.py has workers started with it in place of engine/worker.py, and installs it in rank 0.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.engine import worker, worker_process
from nanovllm.engine.input_processor import fold_seed
from nanovllm.engine.model_runner import ModelRunner


@dataclass
class Break:
    ranks: tuple[int, ...]
    value: float  # of one logit of the rank's share; -inf: of all
    position: int  # of the first token that is drawn from such logits


def breaks(prompt_len: int) -> dict[int, Break]:
    """By seed, for prompts of this length. All end with an error but the last, which has the other rank's tokens."""
    everywhere = [((rank,), value) for rank in (0, 1) for value in (math.nan, math.inf)]
    everywhere += [((0, 1), value) for value in (math.nan, math.inf, -math.inf)]
    found = [Break(ranks, value, prompt_len + late) for late in (0, 7) for ranks, value in everywhere]
    return dict(enumerate([*found, Break((1,), -math.inf, prompt_len)], 1000))


PROMPT_LEN = 40
BREAKS = breaks(PROMPT_LEN)


def breaking(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Of `ModelRunner.sample` or `sample_adjusted`; on the device, since graphs capture it."""

    def wrapped(
        self: ModelRunner, logits: torch.Tensor, temperatures: Any, seeds: torch.Tensor, positions: Any, *args: Any
    ) -> Any:
        last = torch.arange(logits.shape[1], device=logits.device) == logits.shape[1] - 1
        for seed, broken in BREAKS.items():
            if self.tp.rank in broken.ranks:
                rows = (seeds == fold_seed(seed, 0)) & (positions >= broken.position)
                columns = last | (broken.value == -math.inf)
                logits = logits.masked_fill(rows[:, None] & columns, broken.value)
        return sample(self, logits, temperatures, seeds, positions, *args)

    return wrapped


def install(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    for name in ("sample", "sample_adjusted"):
        patch(ModelRunner, name, breaking(getattr(ModelRunner, name)))


def start_workers_with_it(patch: Callable[[Any, str, Any], None], program: str = __file__) -> list[subprocess.Popen]:
    """The list that every worker is added to when it starts, with this file or another in place of engine/worker.py."""
    popen, workers = subprocess.Popen, []

    def start(command: list[str], *args: Any, **kwargs: Any) -> subprocess.Popen:
        if command[1:3] != ["-c", worker_process.PROGRAM]:  # a compiler that Triton starts
            return popen(command, *args, **kwargs)
        workers.append(popen([sys.executable, program, *command[3:]], *args, **kwargs))
        return workers[-1]

    patch(subprocess, "Popen", start)
    return workers


if __name__ == "__main__":
    install()
    worker.main()
