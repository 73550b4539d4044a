"""RMSNorm, with the residual stream's addition fused in front."""

import torch
from torch import nn

from nanovllm.kernels.all_reduce import all_reduce_rms_norm
from nanovllm.kernels.norm import add_rms_norm, rms_norm
from nanovllm.utils.peer_memory import PeerSum


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: torch.Tensor | PeerSum, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] and the residual stream so far (None before the first layer) -> normed sum, the sum."""
        if isinstance(x, PeerSum):
            return all_reduce_rms_norm(x, residual, self.weight, self.eps)
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)
