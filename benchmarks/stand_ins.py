"""Processes in the place of the ranks beside rank 0, which take steps up and do nothing with them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.step_channel import HEADER, StepChannel
from nanovllm.engine.worker import wait_on
from nanovllm.engine.worker_group import WorkerGroup
from nanovllm.engine.worker_process import WorkerProcess


@contextmanager
def stand_ins(runner: ModelRunner) -> Iterator[None]:
    """Rank 0's `runner` tells them of steps instead of the workers, which go on afterwards; nothing if it has none."""
    workers = runner.workers
    if workers is None:
        yield
        return
    group = object.__new__(WorkerGroup)  # no more of it than a step needs
    group.members, group.failure, group.num_threads = [], None, workers.num_threads
    step_size = workers.channel.slot_size - HEADER
    group.channel = StepChannel(workers.size, step_size)
    sockets, processes = [], []
    for rank in range(1, workers.size):
        ear, bell = os.pipe()
        ours, theirs = socket.socketpair()
        sockets.append(ours)
        member = object.__new__(WorkerProcess)
        member.bell = bell
        group.members.append(member)
        inherited = ear, theirs.fileno(), group.channel.fd
        command = [sys.executable, "-m", "benchmarks.stand_ins", *map(str, (rank, workers.size, step_size, *inherited))]
        with theirs, open(ear, "rb"):
            processes.append(subprocess.Popen(command, pass_fds=inherited))
    progress = runner.tp.progress
    runner.workers, runner.tp.progress = group, group.channel.progress[:1]
    try:
        yield
    finally:
        runner.workers, runner.tp.progress = workers, progress
        for member in group.members:
            os.close(member.bell)
        for sock, process in zip(sockets, processes):
            sock.close()
            process.wait()
        os.close(group.channel.fd)


def main() -> None:
    rank, num_ranks, step_size, ear, socket_fd, memory_fd = map(int, sys.argv[1:])
    next_step = wait_on(ear, socket.socket(fileno=socket_fd), StepChannel(num_ranks, step_size, memory_fd), rank)
    while next_step() is not None:
        pass


if __name__ == "__main__":
    main()
