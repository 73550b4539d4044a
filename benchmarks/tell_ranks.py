"""What telling the other ranks of a decode step takes of rank 0's time: `python -m benchmarks.tell_ranks`.

Microseconds of `WorkerGroup.together` around work that does nothing: in a loop, and after a pause as long as the device
takes for a step, in which the processor's caches are put to other uses. It needs no GPU: the other ranks are processes
that take steps up and do nothing with them; with `--asleep` they have to be woken up for each.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from unittest import mock

import torch

from benchmarks import machine
from benchmarks.profiling import DEVICE_STEP_S
from nanovllm import SamplingParams
from nanovllm.engine import worker
from nanovllm.engine.batch import StepInput, prepare_decode
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_channel import StepChannel, max_step_size
from nanovllm.engine.worker_group import WorkerGroup


def make_step(num_rows: int) -> StepInput:
    """A decode step; no row has a block that the device does not know."""
    seqs = []
    for row in range(num_rows):
        seq = Sequence([1] * 500, SamplingParams(), 1000, 256)
        seq.row, seq.block_table, seq.num_slots, seq.num_device_blocks = row, [2 * row, 2 * row + 1], 512, 2
        seqs.append(seq)
    return prepare_decode(seqs)


def other_rank(rank: int, num_ranks: int, step_size: int, ear: int, socket_fd: int, memory_fd: int) -> None:
    channel = StepChannel(num_ranks, step_size, memory_fd)
    next_step = worker.wait_on(ear, socket.socket(fileno=socket_fd), channel, rank)
    while next_step() is not None:
        pass


def measure(num_ranks: int, num_rows: int, num_steps: int, pause_s: float, is_asleep: bool) -> list[float]:
    """Microseconds of each step."""
    step_size = max_step_size(16384, num_rows, 16)
    group = object.__new__(WorkerGroup)  # without its processes
    group.channel = StepChannel(num_ranks, step_size)
    group.bells, group.sockets, group.failure = [], [], None
    processes = []
    for rank in range(1, num_ranks):
        ear, bell = os.pipe()
        ours, theirs = socket.socketpair()
        inherited = ear, theirs.fileno(), group.channel.fd
        numbers = ",".join(map(str, (rank, num_ranks, step_size, *inherited)))
        command = [sys.executable, "-m", "benchmarks.tell_ranks", "--other-rank", numbers]
        processes.append(subprocess.Popen([*command, *(["--asleep"] if is_asleep else [])], pass_fds=inherited))
        os.close(ear)
        group.bells.append(bell)
        group.sockets.append(ours)
    step = make_step(num_rows)
    times = []
    for _ in range(num_steps):
        time.sleep(pause_s)
        while not group.channel.has_room():
            time.sleep(1e-4)
        start = time.perf_counter()
        group.together(step, int)
        times.append(1e6 * (time.perf_counter() - start))
    for bell in group.bells:
        os.close(bell)
    for process in processes:
        process.wait()
    return times[num_steps // 4 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--num-rows", type=int, default=256)
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--asleep", action="store_true")
    parser.add_argument("--other-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.other_rank:
        with mock.patch.object(worker, "AWAKE_S", 0.0 if args.asleep else worker.AWAKE_S):
            other_rank(*map(int, args.other_rank.split(",")))
        return
    results = {}
    for case, pause_s in {"loop": 0.0, "after a pause": DEVICE_STEP_S}.items():
        times = measure(args.num_ranks, args.num_rows, args.num_steps, pause_s, args.asleep)
        low, median, high = statistics.quantiles(times, n=4)
        results[case] = {"us": median, "quartiles": [low, high]}
        print(f"{case:14} {median:6.1f} µs a step ({low:.1f} – {high:.1f})", flush=True)
    print(json.dumps({**machine.provenance(torch.device("cpu")), "results": results}))


if __name__ == "__main__":
    main()
