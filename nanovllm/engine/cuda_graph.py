"""Captures the whole decode step, from rows' state to their next state, per batch-size bucket and on first use."""

import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.utils.interrupts import deferred_signals
from nanovllm.utils.modes import without_autocast

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner


CAPTURE_LOCK = threading.Lock()  # two engines may be in two threads


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: padding stays below 8 rows up to 256 and below 32 beyond."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@cache
def capture_stream(device: torch.device) -> Any:
    """One for all captures of a process: cuBLAS keeps a workspace for every stream that it has ever seen.

    The graphs of all engines share that workspace: they must be replayed on one stream, as they are unless a user runs
    two engines at the same time under different `torch.cuda.stream(...)`.
    """
    return torch.cuda.Stream(device)


class DecodeGraphs:
    def __init__(self, runner: "ModelRunner", max_num_seqs: int):
        self.runner = runner
        self.buckets = batch_buckets(max_num_seqs)
        # What graphs that do not sample leave: logits of each one's own would be gigabytes together.
        num_valid, dtype = runner.model.lm_head.num_valid, runner.config.dtype
        self.logits = torch.empty(max_num_seqs, num_valid, dtype=dtype, device=runner.device)
        self.clear()

    def clear(self) -> None:
        """Forget all graphs: they have the cache's address baked in."""
        # (bucket, whether it samples) -> graph, its rows, its outputs
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self.loaded: dict[tuple[int, bool], torch.Tensor] = {}  # the rows that a graph holds
        self.pool: Any = None  # shared by all graphs: only one replays at a time

    def replay(self, rows: torch.Tensor, sample: bool = True) -> tuple[torch.Tensor, ...]:
        """Run the decode step for permanent `rows` [B] int64; what it returns is valid until the next replay.

        Returns the token ids [B] int64; without `sample`, which leaves the rows' state as it is, what `forward_decode`
        does.
        """
        batch_size = rows.shape[0]
        key = next(size for size in self.buckets if size >= batch_size), sample
        if key not in self.graphs:
            self.capture(*key)
        graph, static_rows, outputs = self.graphs[key]
        if self.loaded.get(key) is not rows:
            static_rows[:batch_size].copy_(rows)
            static_rows[batch_size:].fill_(self.runner.state.padding_row)
            self.loaded[key] = rows
        graph.replay()
        return tuple(output[:batch_size] for output in outputs)

    def capture(self, bucket: int, sample: bool = True) -> None:
        """Record the step for `bucket` rows; nothing of it is executed but a warm-up on padding rows."""
        with torch.inference_mode(False):  # or `replay` could write into it in that mode alone
            rows = torch.full((bucket,), self.runner.state.padding_row, device=self.runner.device)
        previous = torch.cuda.current_stream()
        # torch.cuda.graph() would collect garbage and empty the allocator's cache, 0.1 s each time.
        stream = capture_stream(self.runner.device)
        graph = torch.cuda.CUDAGraph()
        with CAPTURE_LOCK, torch.cuda.stream(stream), torch.inference_mode(), without_autocast(self.runner.device):
            stream.wait_stream(previous)
            self.step(rows, sample)
            stream.synchronize()
            with deferred_signals():  # or the stream, which is the process's, could be left capturing
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    outputs = self.step(rows, sample)
                finally:
                    graph.capture_end()
        previous.wait_stream(stream)
        self.pool = graph.pool()
        self.graphs[bucket, sample] = graph, rows, outputs

    def step(self, rows: torch.Tensor, sample: bool) -> tuple[torch.Tensor, ...]:
        """What a graph records."""
        max_context_len = self.runner.config.max_model_len
        if sample:
            return (self.runner.run_decode(rows, max_context_len),)
        logits, *others = self.runner.forward_decode(rows, max_context_len)
        return self.logits[: len(rows)].copy_(logits), *others
