"""The ranks that share one model; passed to every split layer, so that two engines can differ in one process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks."""

    rank: int = 0
    size: int = 1

    def shard(self, name: str, total: int) -> int:
        """How much of `total` each rank holds; raises ValueError if it does not divide."""
        if total % self.size:
            raise ValueError(f"{name} = {total} cannot be divided among {self.size} ranks")
        return total // self.size
