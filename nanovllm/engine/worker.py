"""The tensor-parallel ranks beside rank 0: how they start, are told of steps, die and end. Used by the model runner.

Each is a process of its own, started as `python -m nanovllm.engine.worker`, so that no script needs a `__main__` guard.
It inherits three files: a socket (a byte wakes it up; it answers in JSON), the memory of the step channel, and the read
end of a pipe that closes when rank 0's process ends, however that happens.
"""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine.batch import StepInput
from nanovllm.engine.step_channel import StepChannel, max_step_size
from nanovllm.errors import EngineDeadError
from nanovllm.utils.distributed import Communicator, TensorParallel

POLL_S = 0.2  # how often rank 0 looks after its workers, and a worker shows that it is alive
END_S = 3.0  # for a worker to end by itself


class WorkerGroup:
    """Rank 0's view of the others. A thread watches them: when one dies or hangs, it ends all and `check` says so."""

    def __init__(self, config: Config):
        self.size = config.tensor_parallel_size
        self.timeout_s = config.worker_timeout_s
        self.pid = os.getpid()
        self.failure: str | None = None
        self.communicator: Communicator | None = None
        self._closed = False
        self._lock = threading.Lock()
        # Where CPU ranks meet; nobody else may look in.
        self.directory = tempfile.mkdtemp(prefix="nanovllm-")
        max_blocks = -(-config.max_model_len // config.kvcache_block_size)
        step_size = max_step_size(config.max_num_batched_tokens, config.max_num_seqs, max_blocks)
        self.channel = StepChannel(self.size, step_size)
        lifeline, self._lifeline = os.pipe()
        boot = {
            "config": config_to_json(config),
            "step_size": step_size,
            "directory": self.directory,
            "unique_id": "",
            "num_threads": (num_threads := max(1, (os.cpu_count() or 1) // self.size)),
        }
        self.is_cuda = config.device.type == "cuda"
        self._watcher: threading.Thread | None = None
        self._threads_before = torch.get_num_threads()
        if self.is_cuda:
            from nanovllm.utils.nccl import make_unique_id

            boot["unique_id"] = make_unique_id().hex()
        else:
            torch.set_num_threads(min(num_threads, self._threads_before))
        self.boot = boot
        self.sockets: list[socket.socket] = []
        self.processes: list[subprocess.Popen] = []
        try:
            for rank in range(1, self.size):
                self._start(rank, lifeline)
            os.close(lifeline)
            for sock in self.sockets:
                sock.sendall(json.dumps(boot).encode() + b"\n")
        except BaseException:
            self.stop()
            raise

    def _start(self, rank: int, lifeline: int) -> None:
        ours, theirs = socket.socketpair()
        descriptors = theirs.fileno(), lifeline, self.channel.fd
        package_root = str(Path(__file__).resolve().parents[2])  # where this very package is
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.engine.worker", str(rank), *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for rank 0 alone
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
        theirs.close()
        self.sockets.append(ours)
        self.processes.append(process)

    def connect(self) -> TensorParallel:
        """Wait until every worker is about to meet the others, and meet them; EngineDeadError if one cannot."""
        self._wait_for("ready")
        tp = connect(self.boot, 0, self.size)
        self.communicator = tp.communicator
        return tp

    def loaded(self) -> None:
        """Wait until every worker has its weights. From now on a thread watches over them."""
        self._wait_for("loaded")
        shutil.rmtree(self.directory, ignore_errors=True)
        self._watcher = threading.Thread(target=self._watch, name="nanovllm-workers", daemon=True)
        self._watcher.start()

    def _wait_for(self, state: str) -> None:
        for rank, sock in enumerate(self.sockets, 1):
            while not select.select([sock], [], [], POLL_S)[0]:
                for other in range(1, self.size):
                    if self.processes[other - 1].poll() is not None:
                        raise EngineDeadError(self._describe(other))
            answer = receive_json(sock)
            if answer.get("state") != state:
                raise EngineDeadError(self._describe(rank, answer))

    @contextmanager
    def together(self, step: StepInput) -> Iterator[None]:
        """Around rank 0's own part of `step`: the others begin theirs.

        Ctrl-C waits until all ranks have launched it. Whatever else goes wrong within leaves them waiting for each
        other, so it is the end: EngineDeadError.
        """
        with deferred_interrupts():
            try:
                self.check()
                while not self.channel.has_room():
                    time.sleep(1e-4)
                    self.check()
                self.channel.send(step)
                self._wake()
                yield
            except EngineDeadError:
                raise
            except BaseException as error:
                self._await_failure()
                self.fail(f"rank 0 failed in a step: {type(error).__name__}: {error}")
                raise EngineDeadError(self.failure) from error

    def _wake(self) -> None:
        for sock in self.sockets:
            sock.send(b"\0")

    def check(self) -> None:
        """Raise EngineDeadError if a rank is lost."""
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    def _await_failure(self) -> None:
        """An operation with a dead peer may fail before the watching thread has seen the death."""
        deadline = time.monotonic() + 5 * POLL_S
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def fail(self, reason: str) -> None:
        """End all ranks, and whatever waits for one of them."""
        with self._lock:
            if self.failure is None and not self._closed:
                self.failure = reason
        self._kill()
        if self.communicator is not None:
            self.communicator.abort()

    def _watch(self) -> None:
        marks: dict[int, tuple[str, int]] = {}
        since: dict[int, float] = {}
        while not self._closed and self.failure is None:
            ready = select.select(self.sockets, [], [], POLL_S)[0]
            for rank, (sock, process) in enumerate(zip(self.sockets, self.processes), 1):
                if self._closed:
                    return
                if sock in ready or process.poll() is not None:
                    self.fail(self._describe(rank, receive_json(sock)))
                    return
                # On a GPU a step is taken up at once, or the main thread hangs; a CPU may well compute for minutes.
                num_done = int(self.channel.num_done[rank])
                is_late = self.is_cuda and num_done < self.channel.num_sent
                mark = ("step", num_done) if is_late else ("beat", int(self.channel.heartbeats[rank]))
                if marks.get(rank) != mark:
                    marks[rank], since[rank] = mark, time.monotonic()
                elif time.monotonic() - since[rank] > self.timeout_s:
                    self.fail(f"rank {rank} (process {process.pid}) has not moved for {self.timeout_s:g} s")
                    return

    def _describe(self, rank: int, answer: dict[str, Any] | None = None) -> str:
        """How `rank` ended."""
        process = self.processes[rank - 1]
        answer = answer if answer is not None else receive_json(self.sockets[rank - 1])
        try:
            code: int | None = process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            code = None
        reason = f": {answer['error']}" if "error" in answer else ""
        return f"rank {rank} (process {process.pid}) ended with exit code {code}{reason}"

    def stop(self) -> None:
        """End the workers, kindly first; harmless when repeated."""
        if os.getpid() != self.pid:  # a fork of rank 0's process does not own them
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self.failure is None and self.channel.num_sent == self.channel.num_done[1:].min():
            try:
                self.channel.send(None)
                self._wake()
                deadline = time.monotonic() + END_S
                for process in self.processes:
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, OSError):
                pass
        self._kill()
        if self.communicator is not None:
            self.communicator.abort()
        if self._watcher is not None:
            self._watcher.join()
        for sock in self.sockets:
            sock.close()
        os.close(self._lifeline)
        os.close(self.channel.fd)
        shutil.rmtree(self.directory, ignore_errors=True)
        torch.set_num_threads(self._threads_before)

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Ctrl-C takes effect when the block is left."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    caught: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            previous(*caught[0])


def config_to_json(config: Config) -> dict[str, Any]:
    """The arguments of `Config` that make the same one in another process."""
    arguments = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    return {**arguments, "dtype": str(config.dtype).removeprefix("torch."), "device": str(config.device)}


def connect(boot: dict[str, Any], rank: int, size: int) -> TensorParallel:
    """Meet the other ranks."""
    if boot["unique_id"]:
        from nanovllm.utils.nccl import NcclCommunicator

        return TensorParallel(rank, size, NcclCommunicator(bytes.fromhex(boot["unique_id"]), rank, size))
    from nanovllm.utils.gloo import GlooCommunicator

    return TensorParallel(rank, size, GlooCommunicator(os.path.join(boot["directory"], "store"), rank, size))


def receive_json(sock: socket.socket) -> dict[str, Any]:
    """One line; empty if the other side is gone."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            byte = sock.recv(1)
        except OSError:
            return {}
        if not byte:
            return {}
        line += byte
    return json.loads(line)


# ---- in the worker's process ----


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    rank, socket_fd, lifeline, memory_fd = map(int, sys.argv[1:])
    sock = socket.socket(fileno=socket_fd)

    def tell(**message: str) -> None:
        sock.sendall(json.dumps(message).encode() + b"\n")

    boot = receive_json(sock)
    size = boot["config"]["tensor_parallel_size"]
    channel = StepChannel(size, boot["step_size"], memory_fd)
    threading.Thread(target=live, args=(channel, rank, lifeline, boot["directory"]), daemon=True).start()
    code = 1
    try:
        config = Config(**boot["config"])
        object.__setattr__(config, "device", rank_device(config.device, rank))
        if config.device.type == "cpu":
            torch.set_num_threads(boot["num_threads"])
        else:
            torch.cuda.set_device(config.device)
            torch.cuda.init()
        from nanovllm.engine.model_runner import ModelRunner

        def meet() -> TensorParallel:
            tell(state="ready")
            return connect(boot, rank, size)

        ModelRunner(config, rank, meet, lambda: tell(state="loaded")).loop(wait_on(sock, channel, rank))
        code = 0
    except BaseException as error:
        traceback.print_exc()
        tell(error=f"{type(error).__name__}: {error}")
    finally:
        sys.stderr.flush()
        os._exit(code)  # at once: peers may be gone, and what there is to free ends with the process


def rank_device(device: torch.device, rank: int) -> torch.device:
    """Rank 0's device is the first of a row."""
    return device if device.type == "cpu" else torch.device(device.type, device.index + rank)


def wait_on(sock: socket.socket, channel: StepChannel, rank: int) -> Callable[[], StepInput | None]:
    """Sleeps until the next step; None at the end."""

    def next_step() -> StepInput | None:
        if not sock.recv(1):
            return None
        step = channel.receive()
        channel.done(rank)
        return step

    return next_step


def live(channel: StepChannel, rank: int, lifeline: int, directory: str) -> None:
    """Show that this process is alive, and end it when rank 0's has ended."""
    while not select.select([lifeline], [], [], POLL_S)[0]:
        channel.heartbeats[rank] += 1
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
