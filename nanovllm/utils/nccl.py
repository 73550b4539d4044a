"""Ranks on GPUs: the few functions of NCCL that we need, on torch's current stream. Made by engine/handshake.py.

Not torch.distributed's process group: that one runs collectives on a stream of its own, which costs two event waits
each inside a captured step, and its watchdog ends the process when a peer dies, where we raise an exception.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from nanovllm.utils.distributed import Communicator
from nanovllm.utils.libraries import load_library
from nanovllm.utils.peer_memory import PeerMemory, PeerSum, open_peer_memory

DTYPES = {torch.int32: 2, torch.int64: 4, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # ncclDataType_t
SUM = 0  # ncclRedOp_t
LOCK_TIMEOUT_S = 1.0
# "0": decode steps add up through NCCL, not over peer memory.
PEER_MEMORY = "NANOVLLM_PEER_MEMORY"


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)


@cache
def nccl() -> Any:
    library = load_library("libnccl.so.2")
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def check(result: int) -> None:
    if result:
        raise RuntimeError(f"NCCL: {nccl().ncclGetErrorString(result).decode()}")


@contextmanager
def on_this_host() -> Iterator[None]:
    """The ranks meet through a socket that one of them opens: on the loopback interface, unless the user says else.

    Not for longer than it takes: what the process starts later may well talk to other hosts.
    """
    is_ours = "NCCL_SOCKET_IFNAME" not in os.environ
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    try:
        yield
    finally:
        if is_ours:
            os.environ.pop("NCCL_SOCKET_IFNAME", None)


def make_unique_id() -> bytes:
    """What all ranks of one communicator must be given; made by rank 0."""
    unique_id = UniqueId()
    with on_this_host():
        check(nccl().ncclGetUniqueId(ctypes.byref(unique_id)))
    return bytes(unique_id)


class NcclCommunicator(Communicator):
    peers: PeerMemory | None = None

    def __init__(self, unique_id: bytes, rank: int, size: int):
        """On torch's current device; returns when all ranks are here."""
        self.rank, self.size = rank, size
        self.comm: ctypes.c_void_p | None = ctypes.c_void_p()
        self._lock = threading.Lock()  # an abort comes from another thread
        with on_this_host():
            check(nccl().ncclCommInitRank(ctypes.byref(self.comm), size, UniqueId.from_buffer_copy(unique_id), rank))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._call("ncclAllReduce", x, x, x.numel(), DTYPES[x.dtype], SUM)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        self._call("ncclAllGather", x, out, x.numel(), DTYPES[x.dtype])
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self._call("ncclBroadcast", x, x, x.numel(), DTYPES[x.dtype], 0)
        return x

    def share_memory(self, width: int, dtype: torch.dtype) -> None:
        if os.environ.get(PEER_MEMORY) == "0":  # which all ranks inherit
            return
        device = torch.device("cuda", torch.cuda.current_device())
        self.peers = open_peer_memory(self, self.rank, self.size, width, dtype, device)

    def summand(self, num_rows: int, width: int, is_first: bool) -> PeerSum | None:
        return self.peers.summand(num_rows, width, is_first) if self.peers is not None else None

    def _call(self, name: str, source: torch.Tensor, target: torch.Tensor, count: int, *args: int) -> None:
        assert target.is_contiguous()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr())
        with self._lock:
            if self.comm is None:
                raise RuntimeError("NCCL: the communicator has been aborted")
            check(getattr(nccl(), name)(*pointers, ctypes.c_size_t(count), *args, self.comm, stream))

    def abort(self) -> None:
        if self.peers is not None:
            self.peers.abort()
        # A thread that waits for a dead peer inside NCCL holds the lock until it is told to stop.
        locked = self._lock.acquire(timeout=LOCK_TIMEOUT_S)
        comm, self.comm = self.comm, None
        if locked:
            self._lock.release()  # at once: the abort may wait for graphs, which a thread at `_call` would never let go
        if comm is not None:
            nccl().ncclCommAbort(comm)

    def close(self) -> None:
        if self.peers is not None:
            self.peers.close()
