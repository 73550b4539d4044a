"""Sums over ranks through peer memory, alone: the kernel against its twin, and what becomes of it without its peer.

Each rank is a process of its own, started from here, so that one which hangs can be ended. Four ranks have a GPU each
where there are four; on two GPUs two ranks share one, whose time is sliced, so that sums take some milliseconds.
"""

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HANGING_S

from nanovllm.kernels import all_reduce
from nanovllm.utils import peer_memory
from nanovllm.utils.gloo import GlooCommunicator
from nanovllm.utils.nccl import PEER_MEMORY, NcclCommunicator, make_unique_id
from nanovllm.utils.peer_memory import MAX_PEER_BYTES, SLOTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

EPS = 1e-6
ROWS = [*range(1, 65), *range(127, 258)]
SOME_ROWS = [1, 2, 7, 64, 130, 170]  # where GPUs are shared
RANKS = pytest.mark.parametrize("size", [2, 4])


class SharingCommunicator(GlooCommunicator):
    """For more ranks than GPUs, which NCCL refuses."""

    peers = None

    def __init__(self, store_path: str, rank: int, size: int):
        super().__init__(store_path, rank, size)
        self.rank = rank
        # CUDA has no answer for a GPU and itself.
        peer_memory.check_atomics = lambda device, peer: None if device == peer else check_atomics(device, peer)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(super().all_reduce(x.cpu()))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return super().all_gather(x.cpu()).to(x.device)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(super().broadcast(x.cpu()))

    share_memory = NcclCommunicator.share_memory
    summand = NcclCommunicator.summand
    close = NcclCommunicator.close


check_atomics = peer_memory.check_atomics


def run_ranks(work: Callable[..., None], size: int, *args: Any, exit_codes: tuple[int, ...] | None = None) -> None:
    """`work(communicator, rank, *args)` in a process for each rank."""
    exit_codes = exit_codes or (0,) * size
    context = multiprocessing.get_context("spawn")
    unique_id = make_unique_id()  # by this process, which the ranks must be able to reach: it stays
    with tempfile.TemporaryDirectory() as folder:
        meeting = unique_id, f"{folder}/store"
        processes = [context.Process(target=start, args=(*meeting, rank, size, work, *args)) for rank in range(size)]
        for process in processes:
            process.start()
        processes[0].join(HANGING_S / 4)
        for process, exit_code in zip(processes, exit_codes):
            process.join(0 if exit_code else 20)
            process.kill()
            process.join()
    assert tuple(process.exitcode for process in processes) == exit_codes


def start(unique_id: bytes, store_path: str, rank: int, size: int, work: Callable[..., None], *args: Any) -> None:
    num_gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % num_gpus)
    os.environ[PEER_MEMORY] = "1"
    if size <= num_gpus:
        communicator: Any = NcclCommunicator(unique_id, rank, size)
    else:
        communicator = SharingCommunicator(store_path, rank, size)
    with torch.inference_mode():
        work(communicator, rank, *args)


def close(communicator: Any) -> None:
    """When the other ranks, too, read no more."""
    communicator.all_reduce(torch.zeros(1, device="cuda")).item()
    communicator.close()


def check_every_number_of_rows(communicator: Any, rank: int, width: int, dtype: torch.dtype) -> None:
    """Outputs are NaN before, and sums come in forwards of five with a residual from the second on."""
    communicator.share_memory(width, dtype)
    assert communicator.peers.size == communicator.size
    max_rows = communicator.peers.slots.shape[1]
    assert max_rows >= max(SOME_ROWS)
    empty_like = torch.empty_like
    torch.empty_like = lambda x: torch.full_like(x, torch.nan)  # type: ignore[assignment]
    torch.manual_seed(rank)
    weight = communicator.broadcast(torch.rand(width, device="cuda").to(dtype))
    for num_rows in ROWS if isinstance(communicator, NcclCommunicator) else SOME_ROWS:
        if num_rows > max_rows:
            assert communicator.summand(num_rows, width, is_first=True) is None
            continue
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
@RANKS
def test_every_number_of_rows(size, width, dtype):
    run_ranks(check_every_number_of_rows, size, width, dtype)


def replay_at_different_paces(communicator: Any, rank: int) -> None:
    """Graphs of several sizes, eager sums and collectives in turns, with pauses that differ between ranks, on device
    and host.

    All ranks know all's summands, so that comparing needs no talk that would bring them into step.
    """
    width, sizes, num_sums, num_ranks = 1024, [1, 8, 200], 7, communicator.size
    num_replays = 3000 if isinstance(communicator, NcclCommunicator) else 150
    communicator.share_memory(width, torch.bfloat16)
    peers = communicator.peers
    assert peers.size == num_ranks
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_sums, num_ranks, max(sizes), width, generator=generator).cuda().bfloat16()
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    count, num_wrong = torch.zeros((), device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    own, common = random.Random(rank), random.Random(num_ranks)

    def forward(num_rows: int) -> None:
        count.add_(1).remainder_(64)
        residual = None
        for i in range(num_sums):
            summands = [(inputs[i, peer, :num_rows] * (count + i)).bfloat16() for peer in range(num_ranks)]
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


@RANKS
def test_graphs_at_different_paces(size):
    run_ranks(replay_at_different_paces, size)


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
    run_ranks(lose_the_peer, 2, sig, exit_codes=(0, -signal.SIGKILL))
