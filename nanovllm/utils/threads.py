"""How many threads torch computes with on a CPU that several ranks share. Called by engine/worker_group.py."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(size: int) -> int:
    """How many threads each of `size` ranks may compute with: its part of the cores, no more than torch does now."""
    return min(torch.get_num_threads(), max(1, num_cores() // size))


@contextmanager
def limited_threads(num_threads: int | None) -> Iterator[None]:
    """What this thread computes in the block uses so many threads, if it is a number. A setting of each thread."""
    before = torch.get_num_threads()
    if num_threads in (None, before):
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
