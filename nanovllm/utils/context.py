"""What one forward pass needs beside its input ids: the only global of the forward path."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Context:
    """A batch of `B` rows with `T` new tokens in all; the first `num_decodes` rows have one token each.

    Every key and value of the batch is stored before any row attends, so a row may read what another row computes.
    """

    is_prefill: bool  # some row computes more than its newest token; such a step is never captured
    num_decodes: int
    slot_mapping: torch.Tensor  # [T] int64: where each token's KV goes; token slots of the cache
    block_tables: torch.Tensor  # [B, max_blocks] int32
    context_lens: torch.Tensor  # [B] int32: tokens of KV per row, this step's included
    max_context_len: int
    cu_seqlens_q: torch.Tensor | None = None  # [B + 1] int32: where each row's new tokens begin; prefill only
    max_seqlen_q: int = 1
    output_tokens: torch.Tensor | None = None  # [n] int64: of the T tokens those whose output is asked for; None: all
    # What the backend derives once a step for all layers.
    backend_data: object = None


# Of the thread: two engines may run in two threads.
_current: ContextVar[Context | None] = ContextVar("nanovllm_context", default=None)


def get_context() -> Context:
    context = _current.get()
    assert context is not None, "a model runs inside `with set_context(...)`"
    return context


@contextmanager
def set_context(context: Context) -> Iterator[None]:
    """Make `context` the current one; refuses nesting, which would be two forwards at once."""
    assert _current.get() is None, "one forward at a time"
    try:
        _current.set(context)
        yield
    finally:
        clear_context(context)


def clear_context(context: Context) -> None:
    """Not the current one any more; another may be, since whoever keeps an exception keeps `set_context` waiting."""
    if _current.get() is context:
        _current.set(None)
