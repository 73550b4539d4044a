"""The gated activation of the MLP."""

import torch
from torch import nn

from nanovllm.kernels.activation import silu_and_mul


class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, 2 · intermediate], gate then up -> [T, intermediate]."""
        return silu_and_mul(x)
