"""Ranks on CPUs: torch's gloo over the loopback interface. Made by engine/handshake.py."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.utils.distributed import Communicator

# A backstop: the engine notices a dead or stuck rank itself, much sooner, and ends it, which ends the operation.
TIMEOUT = timedelta(hours=24)


class GlooCommunicator(Communicator):
    def __init__(self, store_path: str, rank: int, size: int):
        """store_path: of a file where the ranks meet. As long as it exists it is written to, also at the very end.

        Raises RuntimeError if it does not exist: FileStore would wait five minutes for it, and all threads with it.
        """
        if not os.path.exists(store_path):
            raise RuntimeError(f"the ranks cannot meet: {store_path} is gone")
        gloo: Any = dist.ProcessGroupGloo  # whose stubs know nothing of what is used here
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = TIMEOUT
        options._threads = 2
        self.size = size
        self.group = gloo(dist.FileStore(store_path, size), rank, size, options)
        # Who has met all others may find that it cannot go on, and end. To those who were still meeting that would be a
        # broken connection; after this nobody is.
        self.group.barrier(dist.BarrierOptions()).wait()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.group.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        self.group.allgather([list(out)], [x]).wait()
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self.group.broadcast([x], dist.BroadcastOptions()).wait()
        return x
