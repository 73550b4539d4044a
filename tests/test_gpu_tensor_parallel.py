"""Ranks on several CUDA devices: the same model in bfloat16, and a lost rank gives everything back."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from helpers import HANGING_S
from test_gpu import TOLERANCE, Model
from test_gpu import model as model  # the fixture
from test_tensor_parallel import assert_gone, is_running, worker_pids

from nanovllm import LLM, EngineDeadError, SamplingParams
from nanovllm.utils.nccl import PEER_MEMORY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

LENGTHS = [1, 2, 17, 255, 256, 257, 300, 511, 512, 513, 700]


def used_bytes() -> list[int]:
    gc.collect()
    torch.cuda.empty_cache()
    return [total - free for free, total in map(torch.cuda.mem_get_info, range(2))]


def num_sums(llm: LLM) -> int:
    """How many sums over ranks have gone over peer memory."""
    peers = llm.model_runner.tp.communicator.peers
    return int(peers.epochs.max()) if peers is not None else 0


@pytest.fixture(autouse=True, params=["NCCL", "peer memory"])
def uses_peers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether sums of few rows go over peer memory."""
    monkeypatch.setenv(PEER_MEMORY, str(int(request.param == "peer memory")))
    return request.param == "peer memory"


@pytest.fixture(scope="module")
def seasoned(model: Model) -> None:
    """The process has had an engine of two ranks: kernels are loaded, and NCCL has what it keeps until the end."""
    with model.llm(tensor_parallel_size=2) as llm:
        llm.generate([[1, 2, 3]] * 30, SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(4, marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs"))]
)
def test_logprobs_equal_transformers(model: Model, num_ranks: int, enforce_eager: bool, uses_peers: bool):
    """Of the tokens that the ranks draw, and of the prompts, in chunks; and the plain path draws the same tokens."""
    prompts, _ = model.requests(LENGTHS, 0, seed=1)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    seeded = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=7)
    options: dict[str, Any] = {"max_num_batched_tokens": 300, "enforce_eager": enforce_eager}
    with model.llm(tensor_parallel_size=num_ranks, **options) as llm:
        assert llm.model_runner.kv_cache.shape[4] == model.reference.config.num_key_value_heads // num_ranks
        outputs = llm.generate(prompts, params, use_tqdm=False)
        same = [a["token_ids"] == b["token_ids"] for a, b in zip(outputs, llm.generate(prompts, plain, use_tqdm=False))]
        draws = [[o["token_ids"] for o in llm.generate(prompts, seeded, use_tqdm=False)] for _ in range(2)]
        pids = worker_pids(llm)
        # Every decode step takes its sums so, and chunks of up to 300 tokens do.
        assert (num_sums(llm) > 4 * 39 * (1 + 2 * model.reference.config.num_hidden_layers)) == uses_peers
    assert_gone(pids)
    assert sum(same) >= len(same) - 2  # a cached prefix may round a tie the other way
    assert sum(a == b for a, b in zip(*draws)) >= len(prompts) - 2
    full = [output.prompt_token_ids + output["token_ids"] for output in outputs]
    expected = model.expected([ids[:1] for ids in full], [ids[1:] for ids in full])
    for output, ids, wanted in zip(outputs, full, expected):
        entries = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        actual = torch.tensor([entry[token_id].logprob for entry, token_id in zip(entries, ids[1:], strict=True)])
        assert (actual - wanted).abs().max() < TOLERANCE


MEMORY_SLACK = 2**26  # bytes
END_S = 5.0  # no process of an engine survives it for longer


def send_nonsense(llm: LLM) -> None:
    """The next step that a worker is told of is of a kind that there is not, on which it raises."""
    channel = llm.model_runner.workers.channel
    send = channel.send

    def sends(step: Any) -> bytes:
        send(step)
        return b"?"

    channel.send = sends


@pytest.mark.parametrize(
    ("fault", "enforce_eager", "message"),
    [
        (signal.SIGKILL, False, "exit code -9"),
        (signal.SIGKILL, True, "exit code -9"),
        (signal.SIGSTOP, False, "has not moved for 2 s, and was killed: exit code -9"),
        (None, False, "exit code 1: ValueError: step"),
    ],
)
def test_a_lost_rank_ends_the_engine_and_gives_its_memory_back(
    model: Model,
    seasoned: None,
    fault: signal.Signals | None,
    enforce_eager: bool,
    message: str,
    uses_peers: bool,
    record_property: Any,
):
    """It is killed, or hangs, or (None) raises in a step."""
    options: dict[str, Any] = {"enforce_eager": enforce_eager, "worker_timeout_s": 2}
    params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    before = used_bytes()
    llm = model.llm(tensor_parallel_size=2, **options)
    pids, struck = worker_pids(llm), []
    assert (num_sums(llm) > 0) == uses_peers  # what is lost below is waited for in there, or in NCCL

    def strike() -> None:
        struck.append(time.monotonic())
        if fault is None:
            send_nonsense(llm)
        else:
            os.kill(pids[0], fault)

    threading.Timer(1.0, strike).start()
    with pytest.raises(EngineDeadError, match=message):
        llm.generate([[1, 2, 3]] * 30, params, use_tqdm=False)
    error_s = time.monotonic() - struck[0]
    assert error_s < 10
    with pytest.raises(EngineDeadError):
        llm.generate([[1]], use_tqdm=False)
    closed = time.monotonic()
    llm.close()
    assert_gone(pids)
    end_s = time.monotonic() - closed
    assert end_s < END_S
    record_property("seconds to the error and of close()", [round(error_s, 1), round(end_s, 1)])
    left = [a - b for a, b in zip(used_bytes(), before)]
    record_property("bytes left", left)
    assert max(left) <= MEMORY_SLACK
    if fault != signal.SIGKILL or enforce_eager:
        return
    with model.llm(tensor_parallel_size=2, **options) as new:
        assert len(new.generate([[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True))[0]["token_ids"]) == 5


RANK_0 = """
import sys
from nanovllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=2, max_model_len=2048, num_kvcache_blocks=100, max_num_seqs=32)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    llm.generate([[1, 2, 3]] * 30, params, use_tqdm=False)
    print(llm.model_runner.workers.members[0].process.pid, flush=True)
    while True:
        llm.generate([[1, 2, 3]] * 30, params, use_tqdm=False)
"""


def test_rank_0_is_lost(model: Model, record_property: Any):
    """In the middle of its steps, with a worker that waits for it on the GPU."""
    before = used_bytes()
    command = [sys.executable, "-c", RANK_0, model.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            time.sleep(0.5)
            assert is_running(pid)
        finally:
            process.kill()
    struck = time.monotonic()
    assert_gone([pid])
    end_s = time.monotonic() - struck
    assert end_s < END_S
    record_property("seconds to the worker's end", round(end_s, 1))
    deadline = time.monotonic() + HANGING_S  # the driver's own cleaning
    while max(left := [a - b for a, b in zip(used_bytes(), before)]) > MEMORY_SLACK and time.monotonic() < deadline:
        time.sleep(0.1)
    record_property("bytes left", left)
    assert max(left) <= MEMORY_SLACK
