"""Session-wide fixtures; see helpers.py for what they give."""

import os
import signal
from collections.abc import Callable

# Before torch is imported, which reads it then: threads that wait for work sleep, also in programs that are started
# here. They would spin in the way of other processes, for most of what a test with two threads takes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from helpers import SHAPES, Checkpoint, make_model, save_checkpoint
from hypothesis import HealthCheck, settings

# A shell starts what it leaves in the background with Ctrl-C ignored, which programs that are started here inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Of Hypothesis's complaints those about time: it takes what a busy machine does to a test for the test's own.
settings.register_profile("nanovllm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nanovllm")

# Tiny matrices gain nothing from a second thread, and waiting ones spin in the way of other processes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Checkpoint by its name in `helpers.SHAPES`, made on first use."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            family, overrides = SHAPES[name]
            model = make_model(family, seed=list(SHAPES).index(name), **overrides)
            made[name] = Checkpoint(save_checkpoint(tmp_path_factory.mktemp(name), model), model)
        return made[name]

    return get


@pytest.fixture(scope="session")
def qwen3(checkpoints: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoints("qwen3")
