"""Sums over two GPUs through peer memory, alone: the kernel against its twin, and what becomes of it without its peer.

Each rank is a process of its own, started from here, so that one which hangs can be ended.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HANGING_S

from nanovllm.kernels import all_reduce
from nanovllm.utils.nccl import PEER_MEMORY, NcclCommunicator, make_unique_id
from nanovllm.utils.peer_memory import MAX_PEER_BYTES, SLOTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

EPS = 1e-6
ROWS = [*range(1, 65), *range(127, 258)]


def run_ranks(work: Callable[..., None], *args: Any, exit_codes: tuple[int, ...] = (0, 0)) -> None:
    """`work(communicator, rank, *args)` in a process for each rank."""
    context = multiprocessing.get_context("spawn")
    unique_id = make_unique_id()  # by this process, which the ranks must be able to reach: it stays
    processes = [context.Process(target=start, args=(unique_id, rank, work, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    processes[0].join(HANGING_S / 4)
    processes[1].join(0 if exit_codes[1] else 20)
    for process in processes:
        process.kill()
        process.join()
    assert tuple(process.exitcode for process in processes) == exit_codes


def start(unique_id: bytes, rank: int, work: Callable[..., None], *args: Any) -> None:
    torch.cuda.set_device(rank)
    os.environ[PEER_MEMORY] = "1"
    communicator = NcclCommunicator(unique_id, rank, 2)
    with torch.inference_mode():
        work(communicator, rank, *args)


def close(communicator: NcclCommunicator) -> None:
    """When the other rank, too, reads no more."""
    communicator.all_reduce(torch.zeros(1, device="cuda")).item()
    communicator.close()


def check_every_number_of_rows(communicator: NcclCommunicator, rank: int, width: int, dtype: torch.dtype) -> None:
    """Outputs are NaN before, and sums come in forwards of five with a residual from the second on."""
    communicator.share_memory(width, dtype)
    assert communicator.peers is not None
    empty_like = torch.empty_like
    torch.empty_like = lambda x: torch.full_like(x, torch.nan)  # type: ignore[assignment]
    torch.manual_seed(rank)
    weight = communicator.broadcast(torch.rand(width, device="cuda").to(dtype))
    for num_rows in ROWS:
        residual = None
        for i in range(5):
            x = communicator.summand(num_rows, width, is_first=i == 0)
            assert x is not None
            x.x.copy_(torch.randn(num_rows, width, device="cuda"))
            summands = list(communicator.all_gather(x.x))
            normed, total = all_reduce.all_reduce_rms_norm(x, residual, weight, EPS)
            expected = all_reduce.all_reduce_rms_norm_torch(summands, residual, weight, EPS)
            torch.testing.assert_close(total, expected[1], rtol=0, atol=0)
            torch.testing.assert_close(normed, expected[0], rtol=1e-2, atol=1e-2)
            for output in communicator.all_gather(torch.stack([normed, total])):
                assert torch.equal(output, torch.stack([normed, total]))
            residual = total
    torch.empty_like = empty_like
    close(communicator)


@pytest.mark.parametrize(
    ("width", "dtype"), [(1024, torch.bfloat16), (4096, torch.bfloat16), (2560, torch.float16), (1000, torch.float32)]
)
def test_every_number_of_rows(width, dtype):
    run_ranks(check_every_number_of_rows, width, dtype)


def replay_at_different_paces(communicator: NcclCommunicator, rank: int, num_replays: int) -> None:
    """Graphs of several sizes, eager sums and NCCL in turns, with pauses that differ between ranks, on device and host.

    Both ranks know both's summands, so that comparing needs no talk that would bring them into step.
    """
    width, sizes, num_sums = 1024, [1, 8, 200], 7
    communicator.share_memory(width, torch.bfloat16)
    peers = communicator.peers
    assert peers is not None
    inputs = torch.randn(num_sums, 2, max(sizes), width, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    count, num_wrong = torch.zeros((), device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    own, common = random.Random(rank), random.Random(2)

    def forward(num_rows: int) -> None:
        count.add_(1).remainder_(64)
        residual = None
        for i in range(num_sums):
            summands = [(inputs[i, peer, :num_rows] * (count + i)).bfloat16() for peer in range(2)]
            x = communicator.summand(num_rows, width, is_first=i == 0)
            assert x is not None
            if own.random() < 0.5:
                torch.cuda._sleep(own.randrange(50_000))
            x.x.copy_(summands[rank])
            _, total = all_reduce.all_reduce_rms_norm(x, residual, weight, EPS)
            num_wrong.add_((total != all_reduce.all_reduce_rms_norm_torch(summands, residual, weight, EPS)[1]).sum())
            residual = total

    graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for num_rows in sizes:
            forward(num_rows)
            graphs[num_rows] = []
            for _ in range(3):  # with other pauses each
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                forward(num_rows)
                graph.capture_end()
                graphs[num_rows].append(graph)
        before = peers.epochs.max().item()
        for i in range(num_replays):
            graphs[common.choice(sizes)][common.randrange(3)].replay()
            if own.random() < 0.02:
                time.sleep(own.random() * 0.01)
            if i % 100 == 0:
                forward(common.choice(sizes))
                communicator.all_reduce(torch.zeros(5, device="cuda"))
        assert num_wrong.item() == 0
        assert peers.epochs.max().item() == before + (num_replays + -(-num_replays // 100)) * num_sums
    close(communicator)


def test_graphs_at_different_paces():
    run_ranks(replay_at_different_paces, 3000)


def lose_the_peer(communicator: NcclCommunicator, rank: int, sig: signal.Signals) -> None:
    width = 4096
    communicator.share_memory(width, torch.bfloat16)
    assert communicator.peers is not None
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)

    def forward() -> None:
        for i in range(50):
            x = communicator.summand(256, width, is_first=i == 0)
            assert x is not None
            all_reduce.all_reduce_rms_norm(x, None, weight, EPS)

    forward()
    torch.cuda.synchronize()
    if rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), sig)
    forward()
    is_over = torch.cuda.Event()
    is_over.record()
    time.sleep(3)
    assert not is_over.query()
    begin = time.monotonic()
    communicator.abort()
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 3
    communicator.abort()
    before = torch.cuda.mem_get_info()[0]
    communicator.close()
    communicator.close()
    if sig == signal.SIGKILL:  # else it is the peer's as well, until that ends
        assert torch.cuda.mem_get_info()[0] - before > SLOTS * MAX_PEER_BYTES
    torch.zeros(1, device="cuda").item()  # the device is as good as ever


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_an_abort_ends_the_wait_for_a_lost_peer(sig):
    run_ranks(lose_the_peer, sig, exit_codes=(0, -signal.SIGKILL))
