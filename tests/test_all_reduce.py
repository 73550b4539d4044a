"""Sums over ranks through shared memory: the kernel itself, in Triton's interpreter, in a process for each rank.

Memory that the processes share stands for that of their GPUs. As in test_kernels.py, the interpreter gets a process of
its own where Triton has been imported without it.
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HANGING_S

triton = pytest.importorskip("triton")

from nanovllm.kernels import all_reduce  # noqa: E402
from nanovllm.layers.embed_head import VocabParallelEmbedding  # noqa: E402
from nanovllm.layers.layernorm import RMSNorm  # noqa: E402
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear  # noqa: E402
from nanovllm.utils import nccl, peer_memory  # noqa: E402
from nanovllm.utils.context import Context, set_context  # noqa: E402
from nanovllm.utils.distributed import Communicator, TensorParallel  # noqa: E402
from nanovllm.utils.peer_memory import HEADER_BYTES, PeerMemory, PeerSum, open_peer_memory, region_bytes  # noqa: E402

INTERPRETED = not isinstance(all_reduce._wait, triton.JITFunction)
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in test_under_the_interpreter")

SHAPE = 5, 12  # of a slot: rows that are no power of two, and too many for some forwards below
DTYPE = torch.float32  # the interpreter computes bfloat16 wrongly
EPS = 1e-6


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGING_S)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- ranks in processes ----


def shared_bytes(num_bytes: int) -> torch.Tensor:
    """Zeros that forks of this process share with it."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


class Ranks:
    """A process for each rank, which runs `work(peers, *args)`."""

    def __init__(self, size: int, work: Callable[..., None], *args: Any):
        self.regions = [shared_bytes(region_bytes(SHAPE, DTYPE)) for _ in range(size)]
        self.abort_flag = shared_bytes(8).view(torch.int64)
        context = multiprocessing.get_context("fork")
        self.processes = [context.Process(target=self._run, args=(rank, work, *args)) for rank in range(size)]
        for process in self.processes:
            process.start()

    def _run(self, rank: int, work: Callable[..., None], *args: Any) -> None:
        addresses = [region.data_ptr() for region in self.regions]
        peers = PeerMemory(addresses, rank, self.regions[rank], self.abort_flag, SHAPE, DTYPE)
        try:
            work(peers, *args)
        except BaseException:
            peers.abort()  # or the others would wait for this one
            raise

    def exit_codes(self) -> list[int | None]:
        for process in self.processes:
            process.join(HANGING_S)
            process.kill()
        return [process.exitcode for process in self.processes]


def take_sums(peers: PeerMemory, outputs: torch.Tensor, seed: int, pace: Callable[[], None]) -> None:
    """Forwards of random numbers of rows, each a sum for the embedding and some pairs for layers; all are checked.

    outputs: [ranks, sums, *SHAPE], in which this rank leaves its own.
    """
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)  # the same on all ranks
    weight = torch.rand(SHAPE[1], generator=generator)
    num_sums = 0
    while num_sums < outputs.shape[1]:
        num_rows, residual = numbers.randint(1, SHAPE[0]), None
        for i in range(min(1 + 2 * numbers.randint(1, 3), outputs.shape[1] - num_sums)):
            summands = list(torch.randn(peers.size, num_rows, SHAPE[1], generator=generator))
            x = peers.summand(num_rows, SHAPE[1], is_first=i == 0)
            assert x is not None
            pace()
            x.x.copy_(summands[peers.rank])
            pace()
            normed, total = all_reduce.all_reduce_rms_norm(x, residual, weight, EPS)
            expected = all_reduce.all_reduce_rms_norm_torch(summands, residual, weight, EPS)
            assert torch.equal(total, expected[1])
            torch.testing.assert_close(normed, expected[0])
            outputs[peers.rank, num_sums, :num_rows] = normed
            residual = total
            num_sums += 1


def dawdle() -> None:
    time.sleep(random.choice([0, 0, 0, 0.001, 0.01]))


@needs_interpreter
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_right_and_the_same_on_all_ranks(size):
    num_sums = 60 // size
    outputs = shared_bytes(size * num_sums * SHAPE[0] * SHAPE[1] * 4).view(DTYPE).view(size, num_sums, *SHAPE)
    assert Ranks(size, take_sums, outputs, torch.seed() % 2**32, dawdle).exit_codes() == [0] * size
    assert outputs.any(-1).any(-1).all()
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def be_slow_to_read(peers: PeerMemory, work: Callable[[], None]) -> None:
    """Rank 1 takes its time between its announcement and its reading."""
    if peers.rank == 1:
        wait = all_reduce._wait

        def slowly(*args: Any) -> None:
            time.sleep(0.02)
            wait(*args)

        all_reduce._wait = slowly
    work()


def work_as_is(peers: PeerMemory, *args: Any) -> None:
    be_slow_to_read(peers, lambda: take_sums(peers, *args))


def work_in_one_slot(peers: PeerMemory, *args: Any) -> None:
    assert peers.slots is not None
    peers.slots = peers.slots[:1].expand(peers.slots.shape)
    be_slow_to_read(peers, lambda: take_sums(peers, *args))


def work_without_waiting(peers: PeerMemory, outputs: torch.Tensor, seed: int, _: Any) -> None:
    all_reduce._wait = lambda *args: None
    take_sums(peers, outputs, seed, lambda: time.sleep(0.02 * peers.rank))


@needs_interpreter
@pytest.mark.parametrize(
    ("work", "is_right"), [(work_as_is, True), (work_in_one_slot, False), (work_without_waiting, False)]
)
def test_what_the_protocol_is_for(work, is_right):
    """A rank that is slow to read finds what it should, and does not without slots that take turns; nor may one read
    at once."""
    outputs = shared_bytes(2 * 9 * SHAPE[0] * SHAPE[1] * 4).view(DTYPE).view(2, 9, *SHAPE)
    codes = Ranks(2, work, outputs, 1, lambda: None).exit_codes()
    assert (codes == [0, 0]) == is_right


class Shared(Communicator):
    def __init__(self, peers: PeerMemory):
        self.peers = peers

    def summand(self, num_rows: int, width: int, is_first: bool) -> PeerSum | None:
        return self.peers.summand(num_rows, width, is_first)


def forward_a_layer(tp: TensorParallel, biases: bool, is_prefill: bool, input_ids: torch.Tensor) -> torch.Tensor:
    """Embedding, norm and product, product, norm, gated product, product, norm: [T, hidden]."""
    _, hidden = SHAPE
    embed = VocabParallelEmbedding(64, hidden, tp)
    layers = [
        MergedColumnParallelLinear(hidden, [16], biases, tp), RowParallelLinear(16, hidden, biases, tp),
        MergedColumnParallelLinear(hidden, [24, 24], biases, tp), RowParallelLinear(24, hidden, biases, tp),
    ]  # fmt: skip
    norms = [RMSNorm(hidden, EPS) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for module in (embed, *layers, *norms):
        module.requires_grad_(False)
    embed.load("weight", torch.randn(64, hidden, generator=generator), None)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            is_split = isinstance(layer, MergedColumnParallelLinear)
            for i in range(len(layer.shard_sizes) if is_split else 1):
                sizes = [layer.shard_sizes[i] * tp.size if is_split else hidden]
                if name == "weight":
                    sizes.append(hidden if is_split else parameter.shape[1] * tp.size)
                layer.load(name, torch.randn(sizes, generator=generator), i if is_split else None)
    for norm in norms:
        norm.weight.copy_(torch.rand(hidden, generator=generator))
    with set_context(Context(is_prefill, 0, *[None] * 3, 0)):  # type: ignore[list-item]
        x, residual = layers[0].forward_normed(norms[0], embed(input_ids), None)
        x, residual = layers[2].forward_normed(norms[1], layers[1](x), residual, gated=True)
        summed = layers[3](x)
    assert isinstance(summed, PeerSum) == (tp.size > 1)
    return norms[2](summed, residual)[0]


def check_layers(peers: PeerMemory, biases: bool) -> None:
    for num_rows, is_prefill in ((3, False), (1, False), (SHAPE[0], True), (1, True), (1, False)):
        input_ids = torch.arange(num_rows) * 13
        tp = TensorParallel(peers.rank, peers.size, Shared(peers))
        actual, alone = (forward_a_layer(ranks, biases, is_prefill, input_ids) for ranks in (tp, TensorParallel()))
        torch.testing.assert_close(actual, alone, rtol=1e-4, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize("biases", [False, True])
def test_layers_leave_their_sums_to_the_norm(biases):
    """Two ranks compute what one does, also one row, whose products are kernels of their own."""
    assert Ranks(2, check_layers, biases).exit_codes() == [0, 0]


def wait_for_ever(peers: PeerMemory, is_over: torch.Tensor) -> None:
    if peers.rank == 0:
        for i in range(3):
            x = peers.summand(2, SHAPE[1], is_first=i == 0)
            assert x is not None
            all_reduce.all_reduce_rms_norm(x, None, torch.ones(SHAPE[1]), EPS)
            is_over[0] = 1


@needs_interpreter
def test_an_abort_ends_the_wait_for_a_peer_that_never_comes():
    is_over = shared_bytes(8)
    ranks = Ranks(2, wait_for_ever, is_over)
    time.sleep(1)
    assert ranks.processes[0].is_alive()
    assert not is_over[0]
    ranks.abort_flag[0] = 1
    assert ranks.exit_codes() == [0, 0]


# ---- whose memory it is ----


def test_no_two_sums_in_a_row_share_a_slot():
    region = torch.zeros(region_bytes(SHAPE, DTYPE), dtype=torch.uint8)
    peers = PeerMemory([0, 0], 0, region, torch.zeros(1, dtype=torch.int64), SHAPE, DTYPE)
    sums = [peers.summand(3, SHAPE[1], is_first) for is_first in [True, False, False, False, True, False, True]]
    assert [x.slot for x in sums if x is not None] == [0, 2, 1, 2, 0, 2, 0]
    begin, size = region.data_ptr() + HEADER_BYTES, SHAPE[0] * SHAPE[1] * 4
    assert all(isinstance(x, PeerSum) and x.x.data_ptr() == begin + x.slot * size for x in sums)
    assert all(x is not None and x.x.shape == (3, SHAPE[1]) for x in sums)
    assert peers.summand(SHAPE[0], SHAPE[1], True) is not None
    assert peers.summand(SHAPE[0] + 1, SHAPE[1], True) is None
    assert peers.summand(1, SHAPE[1] + 1, True) is None
    peers.close()
    peers.close()
    assert peers.summand(1, SHAPE[1], True) is None
    assert peers.abort_flag[0] == 1


class FakeCuda:
    """What of libcudart is used, in one process: a handle is the address."""

    is_without_atomics = False

    def __init__(self, fails: str = ""):
        self.fails, self.calls, self.blocks = fails, [], {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> int:
            self.calls.append(name)
            return 1 if name == self.fails else getattr(self, "_" + name, lambda *args: 0)(*args)

        if name.startswith("_"):
            raise AttributeError(name)
        return call

    def cudaGetErrorString(self, code: int) -> bytes:
        return b"it failed"

    def _cudaMalloc(self, pointer: Any, size: ctypes.c_size_t) -> int:
        block = torch.empty(size.value, dtype=torch.uint8)
        pointer._obj.value = block.data_ptr()
        self.blocks[block.data_ptr()] = block
        return 0

    def _cudaFree(self, address: ctypes.c_void_p) -> int:
        del self.blocks[address.value]
        return 0

    def _cudaIpcGetMemHandle(self, handle: Any, address: ctypes.c_void_p) -> int:
        ctypes.memmove(handle, ctypes.byref(address), 8)
        return 0

    def _cudaDeviceGetP2PAttribute(self, pointer: Any, attribute: int, device: int, peer: int) -> int:
        pointer._obj.value = not self.is_without_atomics
        return 0

    def _cudaIpcOpenMemHandle(self, pointer: Any, handle: Any, flags: int) -> int:
        assert flags == 1
        ctypes.memmove(pointer, ctypes.byref(handle), 8)
        return 0


class Threads(Communicator):
    def __init__(self, size: int):
        self.barrier, self.given = threading.Barrier(size), {}

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype in nccl.DTYPES
        self.given[threading.current_thread().name] = x
        self.barrier.wait()
        out = torch.stack([self.given[str(rank)] for rank in range(self.barrier.parties)])
        self.barrier.wait()
        return out


@pytest.mark.parametrize("fails", ["", "cudaMalloc", "cudaIpcGetMemHandle", "cudaIpcOpenMemHandle", "atomics"])
def test_all_ranks_share_memory_or_none_does(monkeypatch, fails):
    """One of three fails at something, and everything is given back, once, mappings before memory."""
    drivers, communicator = [FakeCuda(), FakeCuda(fails), FakeCuda()], Threads(3)
    drivers[1].is_without_atomics = fails == "atomics"
    driver = lambda: drivers[int(threading.current_thread().name)]  # noqa: E731
    monkeypatch.setattr(peer_memory, "cudart", driver)
    monkeypatch.setattr(peer_memory, "as_tensor", lambda address, size, device: driver().blocks[address])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    opened: list[Any] = [None] * 3

    def meet(rank: int) -> None:
        opened[rank] = open_peer_memory(communicator, rank, 3, 1000, torch.bfloat16, torch.device("cpu", 0))
        if opened[rank] is not None:
            driver().calls.clear()
            communicator.barrier.wait()
            opened[rank].close()
            opened[rank].close()

    threads = [threading.Thread(target=meet, args=(rank,), name=str(rank)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(driver.blocks for driver in drivers)
    if fails:
        assert opened == [None] * 3
    else:
        assert opened[0].addresses[:3].tolist() == opened[2].addresses[:3].tolist()
        for driver in drivers:
            assert driver.calls == ["cudaSetDevice", *["cudaIpcCloseMemHandle"] * 2, "cudaFree"]
