"""The ranks that share one model; passed to every split layer, so that two engines can differ in one process."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nanovllm.utils.peer_memory import PeerSum


class Communicator:
    """What ranks do together; all call the same methods in the same order. This one is for a rank that is alone."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, in place."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]."""
        return x[None]

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, in place."""
        return x

    def share_memory(self, width: int, dtype: torch.dtype) -> None:
        """Prepare for sums of rows [*, width] through `summand`, where ranks can; called once, by all."""

    def summand(self, num_rows: int, width: int, is_first: bool) -> "PeerSum | None":
        """Where this rank may write its [num_rows, width] of a sum that the next RMSNorm takes; None: `all_reduce` it.

        The first sum of a forward says so: no two in a row may use the same memory, also across forwards.
        """
        return None

    def abort(self) -> None:
        """Let go of peers, also of those that will never answer; to be called from any thread, and repeatedly."""

    def close(self) -> None:
        """After `abort`, when nobody launches anything any more: give back what is shared with peers."""


class TensorParallel:
    """This process's place among the ranks."""

    def __init__(self, rank: int = 0, size: int = 1, communicator: Communicator | None = None):
        self.rank = rank
        self.size = size
        self.communicator = communicator or Communicator()
        # [1] int64 in memory that all ranks see: how far this one is in the sequence of calls and steps common to all.
        self.progress: Any = None
        self.num_steps = 0

    def end_step(self) -> None:
        """To be called by every rank after the same step."""
        self.num_steps += 1
        self.progress[0] = self.num_steps << 20

    def _begin_call(self) -> Communicator:
        if self.progress is not None:
            self.progress[0] += 1
        return self.communicator

    def shard(self, name: str, total: int) -> int:
        """How much of `total` each rank holds; raises ValueError if it does not divide."""
        if total % self.size:
            raise ValueError(f"{name} = {total} cannot be divided among {self.size} ranks")
        return total // self.size

    def kv_heads(self, total: int) -> int:
        """How many of `total` key/value heads each rank holds: with more ranks than heads, ranks share one."""
        return total // self.size if total >= self.size else 1

    def vocab_shard(self, vocab_size: int) -> int:
        """Token ids of each rank; the last one may have fewer. Padded for aligned products where that leaves no rank
        empty."""
        shard = -(-vocab_size // self.size)
        return -(-shard // 64) * 64 if self.size > 1 and vocab_size >= 64 * self.size**2 else shard

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._begin_call().all_reduce(x)

    def summand(self, num_rows: int, width: int, is_first: bool = False) -> "PeerSum | None":
        return self._begin_call().summand(num_rows, width, is_first)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._begin_call().all_gather(x)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return self._begin_call().broadcast(x)


def check_divisible(hf_config: Any, size: int) -> None:
    """Raise ValueError if a model of this config cannot be split over `size` ranks."""
    kv_heads: Any = getattr(hf_config, "num_key_value_heads", None) or getattr(hf_config, "num_attention_heads", size)
    for name in ("num_attention_heads", "intermediate_size"):
        total = getattr(hf_config, name, size)
        if total % size:
            raise ValueError(f"tensor_parallel_size={size} does not divide the model's {name}, {total}")
    if kv_heads % size and size % kv_heads:
        raise ValueError(
            f"tensor_parallel_size={size} neither divides nor is a multiple of the model's num_key_value_heads, "
            f"{kv_heads}"
        )
    vocab_size = getattr(hf_config, "vocab_size", size**2)
    if vocab_size < size**2:
        raise ValueError(f"tensor_parallel_size={size} leaves ranks without a part of the vocabulary of {vocab_size}")
