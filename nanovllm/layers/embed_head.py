"""Token embedding and output head, both split by vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.linear_invariant import linear_invariant
from nanovllm.utils.distributed import TensorParallel
from nanovllm.utils.loader import check_dim, copy_exact


class VocabParallelEmbedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.shard_size = tp.shard("vocab_size", vocab_size)
        self.weight = nn.Parameter(torch.empty(self.shard_size, hidden_size))

    def load(self, name: str, tensor: torch.Tensor, shard_id: str | int | None) -> None:
        check_dim(tensor, 0, self.vocab_size)
        copy_exact(self.weight, tensor.narrow(0, self.tp.rank * self.shard_size, self.shard_size))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [T] int64 -> [T, hidden]."""
        return F.embedding(input_ids, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    invariant = False  # as in layers/linear.py

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [B, hidden] -> logits [B, vocab of this rank]."""
        return (linear_invariant if self.invariant else F.linear)(hidden_states, self.weight)
