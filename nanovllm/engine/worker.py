"""A tensor-parallel rank beside rank 0: a process that engine/worker_process.py starts, with `main` as its program."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch

from nanovllm.config import Config
from nanovllm.engine.batch import StepInput
from nanovllm.engine.handshake import POLL_S, connect, readable, receive_json
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.step_channel import StepChannel
from nanovllm.utils.distributed import TensorParallel

AWAKE_S = 0.1  # how long a rank looks for its next step before it sleeps
LOOK_S = 5e-5  # between two looks; what it costs is hidden, since a step is launched while the one before runs


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    rank, parent, socket_fd, ear = map(int, sys.argv[1:])
    sock = socket.socket(fileno=socket_fd)

    def tell(**message: str) -> None:
        sock.sendall(json.dumps(message).encode() + b"\n")

    boot = receive_json(sock)
    size = boot["config"]["tensor_parallel_size"]
    channel = StepChannel(size, boot["step_size"], boot["memory"])
    threading.Thread(target=live, args=(channel, rank, parent), daemon=True).start()
    code = 1
    try:
        config = Config(**boot["config"]).of_rank(rank)
        if config.device.type == "cpu":
            torch.set_num_threads(boot["num_threads"])
        else:
            torch.cuda.set_device(config.device)
            torch.cuda.init()

        def meet() -> TensorParallel:
            tell(state="ready")
            tp = connect(boot, rank, size)
            tp.progress = channel.progress[rank : rank + 1]
            return tp

        runner = ModelRunner(config, rank, meet, lambda: tell(state="loaded"))
        tell(state="started")
        runner.loop(wait_on(ear, sock, channel, rank))
        code = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            tell(error=f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # of a pipe that nobody reads any more
            traceback.print_exc()
            sys.stderr.flush()
    finally:
        os._exit(code)  # at once: peers may be gone, and what there is to free ends with the process


def wait_on(ear: int, sock: socket.socket, channel: StepChannel, rank: int) -> Callable[[], StepInput | None]:
    """Waits for the next step; None when there will be no other, as rank 0 has closed the pipe.

    Who has just had one looks for the next, and sleeps only when none comes for a while: to wake a sleeping process up
    takes rank 0 up to 0.1 ms in a virtual machine.
    """
    os.set_blocking(ear, False)

    def listen() -> bytes | None:
        """A byte for a step, empty at the end; None for neither."""
        with contextlib.suppress(BlockingIOError):
            return os.read(ear, 1)
        return None

    def next_step() -> StepInput | None:
        end = time.monotonic() + AWAKE_S
        while (told := listen()) is None:
            if time.monotonic() < end:
                time.sleep(LOOK_S)
            elif sock.fileno() in readable([ear, sock.fileno()]):  # a fork of rank 0's process keeps the pipe open
                return None
        if not told:
            return None
        step = channel.receive(told)
        channel.done(rank)
        return step

    return next_step


def live(channel: StepChannel, rank: int, parent: int) -> None:
    """Show that this process is alive; end it when rank 0's, the `parent`, has ended, should the system not do so."""
    while os.getppid() == parent:
        # Not the CPU time alone: in gVisor it moves in ticks of 10 ms, and a thread that wakes up seldom meets one.
        channel.heartbeats[rank] += 1
        channel.busy_s[rank] = int(time.process_time())
        time.sleep(POLL_S)
    os._exit(1)
