"""Logits to one token a row."""

import torch
from torch import nn

from nanovllm.kernels.sampling import gumbel_argmax


class Sampler(nn.Module):
    def forward(
        self, logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """logits [B, vocab]; temperatures [B] float32; seeds, positions [B] int64 -> token ids [B] int64."""
        return gumbel_argmax(logits, temperatures, seeds, positions)
