"""Token embedding and output head, both split by vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.linear_invariant import linear_invariant
from nanovllm.utils.distributed import TensorParallel
from nanovllm.utils.loader import check_dim, copy_exact
from nanovllm.utils.peer_memory import PeerSum


class VocabParallelEmbedding(nn.Module):
    """Each rank holds `shard_size` rows, of which `num_valid` are tokens and the others zero."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.shard_size = tp.vocab_shard(vocab_size)
        self.first_token_id = tp.rank * self.shard_size
        self.num_valid = min(self.shard_size, vocab_size - self.first_token_id)
        self.weight = nn.Parameter(torch.empty(self.shard_size, hidden_size))

    def load(self, name: str, tensor: torch.Tensor, shard_id: str | int | None) -> None:
        check_dim(tensor, 0, self.vocab_size)
        copy_exact(self.weight[: self.num_valid], tensor.narrow(0, self.first_token_id, self.num_valid))
        self.weight.data[self.num_valid :] = 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor | PeerSum:
        """input_ids [T] int64 -> [T, hidden]."""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.first_token_id
        elsewhere = (local < 0) | (local >= self.shard_size)
        summand = self.tp.summand(input_ids.shape[0], self.weight.shape[1], is_first=True)
        out = summand.x if summand is not None else self.weight.new_empty(input_ids.shape[0], self.weight.shape[1])
        torch.index_select(self.weight, 0, local.masked_fill(elsewhere, 0), out=out)
        out.masked_fill_(elsewhere[:, None], 0)
        return summand if summand is not None else self.tp.all_reduce(out)


class ParallelLMHead(VocabParallelEmbedding):
    invariant = False  # as in layers/linear.py

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [B, hidden] -> logits of this rank's tokens, [B, num_valid]."""
        return (linear_invariant if self.invariant else F.linear)(hidden_states, self.weight)[:, : self.num_valid]

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's logits [B, num_valid] -> everybody's, [B, vocab]."""
        if self.tp.size == 1:
            return logits
        padded = F.pad(logits, (0, self.shard_size - self.num_valid))
        return self.tp.all_gather(padded).transpose(0, 1).flatten(1)[:, : self.vocab_size]
