"""The libraries of CUDA that torch brings. Called by utils/nccl.py and peer_memory.py."""

import ctypes
import glob
import os
from contextlib import suppress

import torch


def load_library(name: str) -> ctypes.CDLL:
    """As torch has loaded it, or from the packages beside torch."""
    beside = os.path.join(os.path.dirname(torch.__path__[0]), "nvidia", "*", "lib", name)
    for path in [name, *glob.glob(beside)]:
        with suppress(OSError):
            return ctypes.CDLL(path)
    raise RuntimeError(f"{name}, which tensor_parallel_size > 1 uses on CUDA, is neither loaded nor beside torch")
