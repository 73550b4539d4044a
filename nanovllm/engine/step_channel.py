"""The shared memory through which rank 0 tells the others of a step: integers of a fixed layout, no pickle.

Called by engine/worker_group.py and worker.py. The memory has no name: it is an anonymous file that workers inherit, so
nothing can be left behind and nobody else can open it. That there is a step they are told by a byte in a pipe. For most
steps that is all: the decode step before once more, each row a token further.
"""

import mmap
import os
import tempfile
from dataclasses import fields, replace
from operator import attrgetter

import numpy as np

from nanovllm.engine.batch import StepInput

NUM_SLOTS = 4  # rank 0 is never more than two steps ahead
NEW, AGAIN = b"\0", b"\1"  # a step is in its slot; it is the one before, each row a token further
FIELDS = tuple(field.name for field in fields(StepInput) if field.name != "data")
values_of = attrgetter(*FIELDS)
HEADER = 2 + len(FIELDS)  # number of integers that follow, number of the step, its fields


def max_step_size(max_num_batched_tokens: int, max_num_seqs: int, max_blocks: int) -> int:
    """Integers of the largest step there can be: every row new, with its whole block table, and every token's log
    probability a run of its own. See `StepInput.data`."""
    return (3 + 4) * max_num_batched_tokens + 5 * max_num_seqs + 1 + 3 * max_num_seqs * max_blocks


def create_memory(size_bytes: int) -> int:
    """A file descriptor of that much anonymous memory, zero and not yet taken. It is a file as well, without a name."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("nanovllm")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


class StepChannel:
    """A ring of steps, and of each rank: heartbeats, steps taken up, how far in them it is, seconds it has computed.

    A slot has HEADER integers, then the step's data; a step that is the one before AGAIN leaves its slot as it is.
    """

    def __init__(self, num_ranks: int, max_step_size: int, fd: int | None = None):
        """max_step_size: in integers of 8 bytes; fd: the memory that rank 0 has made, else this is rank 0."""
        self.slot_size = HEADER + max_step_size
        num_integers = 4 * num_ranks + NUM_SLOTS * self.slot_size
        self.fd = create_memory(8 * num_integers) if fd is None else fd
        try:
            self._mmap = mmap.mmap(self.fd, 8 * num_integers)
        except BaseException:
            os.close(self.fd)
            raise
        of_ranks = [memoryview(self._mmap).cast("q")[i * num_ranks : (i + 1) * num_ranks] for i in range(4)]
        self.heartbeats, self.num_done, self.progress, self.busy_s = of_ranks  # progress: see TensorParallel
        self.slots = np.frombuffer(self._mmap, np.int64)[4 * num_ranks :].reshape(NUM_SLOTS, self.slot_size)
        self.num_sent = self.num_received = 0
        self._num_taken = 0  # steps that every other rank had taken up when rank 0 last looked
        self._previous: StepInput | None = None  # sent or received

    def has_room(self) -> bool:
        """Whether every other rank has taken up the step whose slot comes next."""
        if self.num_sent - self._num_taken >= NUM_SLOTS:
            self._num_taken = min(self.num_done[1:])
        return self.num_sent - self._num_taken < NUM_SLOTS

    def send(self, step: StepInput) -> bytes:
        """For rank 0, when there is room: what to tell the others in their pipes."""
        previous, self._previous = self._previous, step
        slot_index = self.num_sent % NUM_SLOTS
        self.num_sent += 1
        # The same array has the rows of the same sequences, and nothing else; see `prepare_decode`.
        if previous is not None and step.data is previous.data and step.max_context_len == previous.max_context_len + 1:
            return AGAIN
        slot, size = self.slots[slot_index], len(step.data)
        assert HEADER + size <= self.slot_size, "max_step_size is wrong"
        slot[:HEADER] = size, self.num_sent, *values_of(step)
        slot[HEADER : HEADER + size] = step.data
        return NEW

    def receive(self, told: bytes) -> StepInput:
        """For another rank, which has been `told` of a step in its pipe. The step's data are a copy.

        Raises ValueError for what rank 0 can never have sent.
        """
        previous, slot_index = self._previous, self.num_received % NUM_SLOTS
        self.num_received += 1
        if told == AGAIN and previous is not None:
            self._previous = step = replace(previous, max_context_len=previous.max_context_len + 1)
            return step
        if told != NEW:
            raise ValueError(f"step {self.num_received}: told by the byte {told!r}")
        slot = self.slots[slot_index]
        size, number, *values = slot[:HEADER].tolist()
        if number != self.num_received:
            raise ValueError(f"step {self.num_received}: the channel holds number {number}")
        if not 0 <= size <= self.slot_size - HEADER:
            raise ValueError(f"step {number}: {size} integers, where at most {self.slot_size - HEADER} fit")
        data = slot[HEADER : HEADER + size].copy()
        self._previous = step = StepInput(**dict(zip(FIELDS, values)), data=data)  # what was True is 1
        return step

    def done(self, rank: int) -> None:
        """The step received last has been taken up: its slot may be used again."""
        self.num_done[rank] = self.num_received
