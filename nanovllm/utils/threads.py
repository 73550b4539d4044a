"""How many threads torch computes with on a CPU that several ranks share. Called by engine/worker_group.py."""

import os

import torch


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(size: int) -> int:
    """How many threads each of `size` ranks may compute with: its part of the cores, no more than torch does now."""
    return min(torch.get_num_threads(), max(1, num_cores() // size))


class limited_threads:
    """What the calling thread computes in the block uses so many threads, where it is a number.

    It is a setting of each thread, but one that uses torch for the first time meanwhile begins with this number.
    """

    def __init__(self, num_threads: int | None):
        self.num_threads = num_threads

    def __enter__(self) -> None:
        if self.num_threads is not None:
            self.before = torch.get_num_threads()
            torch.set_num_threads(self.num_threads)

    def __exit__(self, *exc_info: object) -> None:
        if self.num_threads is not None:
            torch.set_num_threads(self.before)
