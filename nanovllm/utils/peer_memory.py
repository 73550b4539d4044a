"""Memory of every rank's GPU that all ranks of this host can read and write: kernels/all_reduce.py adds up through it.

Opened by utils/nccl.py, with CUDA's handles for other processes (no multicast). Each rank has one region: flags, and
behind them SLOTS slots of rows, into which its products are written, and from which all ranks read them.
"""

import ctypes
import importlib
import logging
import struct
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.utils.distributed import Communicator
from nanovllm.utils.libraries import load_library

SLOTS = 3  # the embedding's, and two that take turns: no two sums in a row use the same
FLAG_BYTES = 128  # a flag of 8 bytes to each rank, on a line of its own
HEADER_BYTES = 4096
# Read from peers for one sum. Beyond it a collective that reads every element once, as NCCL's, moves fewer bytes.
MAX_PEER_BYTES = 4 * 2**20
ALLOCATION_BYTES = 2 * 2**20  # what other processes map is whole pages of this size
PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
NATIVE_ATOMICS = 3  # cudaDevP2PAttrNativeAtomicSupported


class Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


@cache
def cudart() -> Any:
    version = str(torch.version.cuda).split(".")[0]
    library = load_library(f"libcudart.so.{'11.0' if version == '11' else version}")
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def check(result: int) -> None:
    if result:
        cudart().cudaGetLastError()  # or torch would find the error at its next call
        raise RuntimeError(f"CUDA: {cudart().cudaGetErrorString(result).decode()}")


def as_tensor(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes on a GPU that torch did not allocate."""
    interface = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=device)


@dataclass
class PeerSum:
    """The sum over ranks of what lies in one slot of each: still to be taken, by the RMSNorm that follows."""

    x: torch.Tensor  # [T, H]: this rank's summand
    slot: int
    peers: "PeerMemory"


class PeerMemory:
    def __init__(
        self, regions: list[int], rank: int, region: torch.Tensor, abort_flag: torch.Tensor, shape: tuple[int, int],
        dtype: torch.dtype,
    ):  # fmt: skip
        """regions: every rank's address. region: this rank's bytes. abort_flag: [1] int64 that this host can write and
        its GPU can read. shape: of a slot, [rows, H]."""
        self.rank, self.size = rank, len(regions)
        self.abort_flag = abort_flag
        self.slots: torch.Tensor | None = region[HEADER_BYTES:].view(dtype).view(SLOTS, *shape)
        self.addresses = torch.tensor([*regions, abort_flag.data_ptr()], device=region.device)
        # Which sum was the last to use each slot. On the device: a graph has all its arguments baked in.
        self.epochs = torch.zeros(SLOTS, dtype=torch.int64, device=region.device)
        self._turn = 0
        self.held = ExitStack()

    def summand(self, num_rows: int, width: int, is_first: bool) -> PeerSum | None:
        """See `Communicator.summand`."""
        if self.slots is None or num_rows > self.slots.shape[1] or width != self.slots.shape[2]:
            return None
        self._turn = 0 if is_first else self._turn + 1
        slot = 0 if is_first else 1 + self._turn % 2
        return PeerSum(self.slots[slot, :num_rows], slot, self)

    def abort(self) -> None:
        """Whatever waits for a peer on this GPU, now or later, goes on with garbage."""
        self.abort_flag[0] = 1

    def close(self) -> None:
        """Give the memory back. Waits for this GPU; nobody may launch anything that uses it any more."""
        self.abort()
        self.slots = None
        self.held.close()


def region_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    return HEADER_BYTES + SLOTS * shape[0] * shape[1] * dtype.itemsize


def open_peer_memory(
    communicator: Communicator, rank: int, size: int, width: int, dtype: torch.dtype, device: torch.device
) -> PeerMemory | None:
    """PeerMemory for sums of up to as many rows [*, width] as it is worth it for; None, on all ranks, if one cannot."""
    shape = MAX_PEER_BYTES // ((size - 1) * width * dtype.itemsize), width
    num_bytes = -(-region_bytes(shape, dtype) // ALLOCATION_BYTES) * ALLOCATION_BYTES
    problem: Exception | None = None

    def gather(*numbers: int) -> list[list[int]]:
        return communicator.all_gather(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()

    with ExitStack() as held:
        handle, regions = Handle(), [0] * size
        try:
            importlib.import_module("triton")  # in which the kernel is written
            check(cudart().cudaSetDevice(device.index))  # should it not be the library that torch calls
            regions[rank] = allocate(num_bytes, held)
            region = as_tensor(regions[rank], num_bytes, device)
            region.zero_()
            torch.cuda.synchronize(device)  # before a peer can know of it
            check(cudart().cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(regions[rank])))
        except (ImportError, RuntimeError) as error:
            problem = error
        handles = gather(problem is None, device.index, *struct.unpack("8q", bytes(handle)))
        if all(is_fine for is_fine, *_ in handles):
            try:
                for peer in range(size):
                    if peer != rank:
                        check_atomics(device.index, handles[peer][1])
                        regions[peer] = map_peer(struct.pack("8q", *handles[peer][2:]), held)
            except RuntimeError as error:
                problem = error
            if all(is_fine for (is_fine,) in gather(problem is None)):
                with torch.inference_mode(False):  # or nobody could write to it outside of the mode
                    abort_flag = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
                used = region[: region_bytes(shape, dtype)]
                peers = PeerMemory(regions, rank, used, abort_flag, shape, dtype)
                peers.held = held.pop_all()
                peers.held.callback(settle, device)  # the last to be added, hence the first to be done
                return peers
    logging.getLogger(__name__).warning("sums over ranks go through NCCL: %s", problem or "a peer has no peer memory")
    return None


def allocate(num_bytes: int, held: ExitStack) -> int:
    """Not by torch, whose segments may be of a kind that has no handle."""
    address = ctypes.c_void_p()
    check(cudart().cudaMalloc(ctypes.byref(address), ctypes.c_size_t(num_bytes)))
    held.callback(cudart().cudaFree, address)
    return address.value or 0


def check_atomics(device: int, peer: int) -> None:
    """With which a rank announces its summand: GPUs that reach each other over PCIe may not have them."""
    is_supported = ctypes.c_int()
    check(cudart().cudaDeviceGetP2PAttribute(ctypes.byref(is_supported), NATIVE_ATOMICS, device, peer))
    if not is_supported.value:
        raise RuntimeError(f"GPU {device} has no native atomic operations on the memory of GPU {peer}")


def map_peer(handle: bytes, held: ExitStack) -> int:
    address = ctypes.c_void_p()
    opened = cudart().cudaIpcOpenMemHandle(ctypes.byref(address), Handle.from_buffer_copy(handle), PEER_ACCESS)
    check(opened)
    held.callback(cudart().cudaIpcCloseMemHandle, address)
    return address.value or 0


def settle(device: torch.device) -> None:
    """Let every kernel end before memory goes: they end soon, having been told to."""
    with suppress(RuntimeError), torch.cuda.device(device):  # of a device that is lost
        cudart().cudaSetDevice(device.index)
        torch.cuda.synchronize()
