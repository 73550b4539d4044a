"""The bookkeeping of captured decode steps, on CPU: a stand-in "graph" replays by running what it saw captured.

That kernels replay correctly is for test_gpu.py; here it is buckets, padding rows, static buffers, both kinds of graph.
"""

import os
import signal
from typing import Any

import pytest
import torch
from helpers import Checkpoint, assert_matches, greedy, many_prompts

from nanovllm import SamplingParams
from nanovllm.engine.cuda_graph import DecodeGraphs, batch_buckets, capture_stream


class StandInStream:
    def __init__(self, device: Any = None): ...

    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exc_info: object) -> None: ...


class StandInGraph:
    """Replays the steps that were taken between begin and end, into the tensors that they returned then."""

    capturing: Any = None
    num_captured = num_replayed = 0

    def capture_begin(self, **kwargs: Any) -> None:
        self.calls: list[tuple[Any, tuple, Any]] = []
        StandInGraph.num_captured += 1
        StandInGraph.capturing = self

    def capture_end(self) -> None:
        StandInGraph.capturing = None

    def pool(self) -> int:
        return 1

    @torch.inference_mode()
    def replay(self) -> None:
        StandInGraph.num_replayed += 1
        for function, args, static in self.calls:
            for old, new in zip(static, function(*args), strict=True):
                old.copy_(new)


class CopyingGraphs(DecodeGraphs):
    """On a GPU the runner copies the static outputs to the host at once; on CPU there is nowhere to copy them."""

    def replay(self, rows: torch.Tensor, sample: bool = True) -> tuple[torch.Tensor, ...]:
        return tuple(output.clone() for output in super().replay(rows, sample))

    def step(self, rows: torch.Tensor, sample: bool) -> tuple[torch.Tensor, ...]:
        state = self.runner.state
        before = [tensor.clone() for tensor in (state.last_token, state.num_cached_tokens)]
        outputs = super().step(rows, sample)
        if StandInGraph.capturing is not None:  # which executes nothing
            state.last_token.copy_(before[0])
            state.num_cached_tokens.copy_(before[1])
            StandInGraph.capturing.calls.append((super().step, (rows, sample), outputs))
        return outputs


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "Stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "current_stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    StandInGraph.num_captured = StandInGraph.num_replayed = 0


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "adjusted", "mixed"])
def test_graphs_change_nothing(qwen3: Checkpoint, stand_ins: None, kind: str, depth: int) -> None:
    prompts = many_prompts(13)
    adjusted = SamplingParams(temperature=0.8, seed=3, top_k=5, max_tokens=20, ignore_eos=True, logprobs=1)
    params = {
        "plain": [greedy(12 + i % 9) for i in range(13)],
        "adjusted": [adjusted] * 13,
        "mixed": [adjusted if i % 3 == 0 else greedy(12 + i % 9) for i in range(13)],
    }[kind]
    results = []
    for graphs in (False, True):
        llm = qwen3.llm(max_num_seqs=12)
        llm.depth = depth
        if graphs:
            llm.model_runner.graphs = CopyingGraphs(llm.model_runner, 12)
        results.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
    captured = {sample for _, sample in llm.model_runner.graphs.graphs}
    logits = {
        outputs[0].data_ptr() for (_, samples), (_, _, outputs) in llm.model_runner.graphs.graphs.items() if not samples
    }
    assert len(logits) <= 1  # all of them leave their logits in one place
    assert results[0] == results[1]
    if kind != "mixed":  # a batch that asks for nothing has only graphs that draw, the others only graphs that do not
        assert captured == {kind == "plain"}
    assert StandInGraph.num_captured >= 2
    assert StandInGraph.num_replayed > 12


def test_ctrl_c_leaves_no_stream_capturing(qwen3: Checkpoint, stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes effect when the capture has ended; else every capture of the process would fail from then on."""
    events = []
    begin, end = StandInGraph.capture_begin, StandInGraph.capture_end

    def begin_and_strike(graph: Any, **kwargs: Any) -> None:
        begin(graph, **kwargs)
        events.append("begun")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StandInGraph, "capture_begin", begin_and_strike)
    monkeypatch.setattr(StandInGraph, "capture_end", lambda graph: events.append("ended") or end(graph))
    llm = qwen3.llm(max_num_seqs=12)
    llm.model_runner.graphs = CopyingGraphs(llm.model_runner, 12)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2]], greedy(5), use_tqdm=False)
    assert events == ["begun", "ended"]
    monkeypatch.setattr(StandInGraph, "capture_begin", begin)
    assert_matches(qwen3, [[1, 2]], llm.generate([[1, 2]], greedy(5), use_tqdm=False), 5)


def test_every_batch_size_has_a_bucket_close_above() -> None:
    for max_num_seqs in (1, 2, 3, 5, 8, 12, 255, 256, 257, 300, 512, 1000):
        buckets = batch_buckets(max_num_seqs)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == max_num_seqs
        for size in range(1, max_num_seqs + 1):
            bucket = next(bucket for bucket in buckets if bucket >= size)
            assert bucket - size < (8 if size <= 256 else 32)


def test_engines_share_a_capture_stream(stand_ins: None) -> None:
    """For every stream that cuBLAS has seen it keeps a workspace of 32 MiB, for the life of the process."""
    streams = [capture_stream(torch.device("cuda", index)) for index in (6, 7, 6)]
    assert streams[0] is streams[2] is not streams[1]
