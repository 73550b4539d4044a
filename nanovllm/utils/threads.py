"""How many threads torch computes with on a CPU that several ranks share. Called by engine/worker_group.py."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_thread_limits: list[int] = []  # torch's own, and those of the groups that there are


@contextmanager
def shared_cores(size: int) -> Iterator[int]:
    """How many threads each of `size` ranks on CPUs may use; this process keeps to it. Groups may end in any order."""
    if not _thread_limits:
        _thread_limits.append(torch.get_num_threads())
    limit = min(_thread_limits[0], max(1, num_cores() // size))
    _thread_limits.append(limit)
    torch.set_num_threads(min(_thread_limits))
    try:
        yield limit
    finally:
        del _thread_limits[_thread_limits.index(limit, 1)]
        torch.set_num_threads(min(_thread_limits))
        if len(_thread_limits) == 1:
            _thread_limits.clear()
