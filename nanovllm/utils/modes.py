"""Torch's modes while the model runs; entered by the model runner and around a graph's capture."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A user's autocast switched off, which is for other models: this one has its types.

    Nothing where none is on: Ctrl-C inside torch's own `__enter__` or `__exit__` would leave its count of nested blocks
    wrong for good, and the user's next autocast would keep what it had cast of weights that have changed since. To be
    entered within `torch.inference_mode()`, whose end switches on again what such a Ctrl-C leaves switched off.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
