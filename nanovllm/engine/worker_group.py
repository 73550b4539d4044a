"""Rank 0's side of the other tensor-parallel ranks: they start, are told of steps, die and end. Used by the runner.

Each of them is a process of its own (engine/worker_process.py), which inherits the memory of the step channel.
"""

import os
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch

from nanovllm.config import Config
from nanovllm.engine.batch import StepInput
from nanovllm.engine.handshake import POLL_S, STATES, config_to_json, connect, readable, receive_json
from nanovllm.engine.step_channel import StepChannel, create_memory, max_step_size
from nanovllm.engine.worker_process import WorkerProcess
from nanovllm.errors import EngineDeadError
from nanovllm.utils.distributed import Communicator, TensorParallel
from nanovllm.utils.interrupts import deferred_signals
from nanovllm.utils.threads import limited_threads, share_of_cores

T = TypeVar("T")
END_S = 3.0  # for a worker to end by itself
START_PATIENCE = 60  # times as long as a step may one stand still that is starting


class WorkerGroup:
    """Rank 0's view of the others. A thread starts and watches them: if one dies or hangs, it ends all; see `check`."""

    def __init__(self, config: Config):
        self.size = config.tensor_parallel_size
        self.device = config.device
        self.timeout_s = config.worker_timeout_s
        self.pid = os.getpid()
        self.failure: str | None = None
        self.communicator: Communicator | None = None
        self.members: list[WorkerProcess] = []  # of ranks 1, 2, …
        # Rank 0 computes with as many as the others. None: it leaves torch's number as it is.
        self.num_threads = share_of_cores(self.size) if self.device.type == "cpu" else None
        self._watcher: threading.Thread | None = None
        self._closed = False
        self._have_ended = threading.Lock()  # all workers, when it is free; an Event is not for the garbage collector
        self._have_ended.acquire()
        self._is_noticed = False  # a rank's loss, which will be the `failure` as soon as it is known how it ended
        self._lock = threading.RLock()  # the garbage collector may call `stop` within `fail`
        self._held = ExitStack()  # what is given back at the end
        try:
            self._start_all(config)
        except BaseException:
            self.stop()
            raise

    def _start_all(self, config: Config) -> None:
        with ExitStack() as held:
            # Where a standard stream is closed, its number must not become a file's that workers inherit.
            for _ in range(3):
                held.callback(os.close, os.open(os.devnull, os.O_RDWR))
            self._prepare(config)
            are_started: Future[None] = Future()
            watcher = threading.Thread(target=self._watch, args=(are_started,), name="nanovllm-workers", daemon=True)
            watcher.start()
            self._watcher = watcher
            are_started.result()

    def _prepare(self, config: Config) -> None:
        """What the ranks share, and what workers are told."""
        step_size = max_step_size(config.max_num_batched_tokens, config.max_num_seqs, config.max_blocks)
        self.channel = StepChannel(self.size, step_size)
        self._held.callback(delattr, self, "channel")  # and with it what maps the memory
        self._held.callback(os.close, self.channel.fd)
        self.boot: dict[str, Any] = {
            "config": config_to_json(config),
            "step_size": step_size,
            "memory": self.channel.fd,  # descriptors have the same numbers in a worker
            "num_threads": self.num_threads,
        }
        if self.device.type == "cuda":
            from nanovllm.utils.nccl import make_unique_id

            self.boot["unique_id"] = make_unique_id().hex()
        else:
            self.store = create_memory(0)  # a file in which they meet
            self._held.callback(os.close, self.store)
            self.boot["store"] = f"/proc/self/fd/{self.store}"

    def connect(self) -> TensorParallel:
        """Wait until every worker is about to meet the others, and meet them; EngineDeadError if one cannot."""
        self.wait_for("ready")
        boot = self.boot
        if "store" in boot:
            # A worker's descriptor: FileStore writes into what has this name when it is destroyed, which may be after
            # this process has closed its own and somebody else's file has the number. A worker's is never closed.
            boot = {**boot, "store": f"/proc/{self.members[0].process.pid}/fd/{self.store}"}
        results: list[Any] = []

        def meet() -> None:
            try:
                if self.device.type == "cuda":  # a setting of each thread
                    torch.cuda.set_device(self.device)
                results.append(connect(boot, 0, self.size))
            except BaseException as error:
                results.append(error)

        # In a thread of its own: who waits in there for a rank that has died waits for minutes, or for ever, and Ctrl-C
        # does not help.
        thread = threading.Thread(target=meet, name="nanovllm-connect", daemon=True)
        thread.start()
        while thread.is_alive():
            self.check()
            thread.join(POLL_S / 10)
        if isinstance(results[0], BaseException):
            raise results[0]
        self.communicator = results[0].communicator
        results[0].progress = self.channel.progress[:1]
        return results[0]

    def loaded(self) -> None:
        """Wait until every worker has its weights, and hence has met all others."""
        self.wait_for("loaded")

    def wait_for(self, state: str) -> None:
        """Until every worker has said that it is that far; EngineDeadError if one is lost before."""
        while not self._have_reached(state):
            self.check()
            time.sleep(POLL_S / 10)

    def _have_reached(self, state: str) -> bool:
        return min((worker.state for worker in self.members), default=0) >= STATES.index(state)

    def abandon_start(self, error: BaseException) -> None:
        """End the workers, since rank 0 cannot start; EngineDeadError if `error` only says that one was lost."""
        # What both ranks find wrong, memory above all, rank 0 says best; only talking to a lost one fails this way.
        is_failed_call = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        is_lost = is_failed_call and self.is_lost()
        self.stop()
        if is_lost and not isinstance(error, EngineDeadError):
            raise EngineDeadError(self.failure) from error

    def together(self, step: StepInput, work: Callable[[], T]) -> T:
        """`work()`, rank 0's own part of `step`, while the others do theirs.

        Ctrl-C, as other signals, waits until all ranks have launched it. Whatever else goes wrong leaves them waiting
        for each other, so it is the end: EngineDeadError, or what else than an Exception it was.
        """
        with deferred_signals(), limited_threads(self.num_threads):
            try:
                self._wait_for_room()
                told = self.channel.send(step)
                for worker in self.members:
                    os.write(worker.bell, told)
                return work()
            except EngineDeadError:
                raise
            except BaseException as error:
                self.is_lost()
                self.fail(f"rank 0 failed in a step: {type(error).__name__}: {error}")
                # Whoever keeps the exception keeps no tensors, and no graphs, for whose end the communicator's waits.
                traceback.clear_frames(error.__traceback__)
                if not isinstance(error, Exception):
                    raise
                raise EngineDeadError(self.failure) from error

    def _wait_for_room(self) -> None:
        self.check()
        while not self.channel.has_room():
            time.sleep(1e-4)
            self.check()

    def check(self) -> None:
        """Raise EngineDeadError if a rank is lost."""
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    def is_lost(self) -> bool:
        """Whether a rank is. What is done with a dead peer may fail before the watching thread has seen the death."""
        deadline = time.monotonic() + 5 * POLL_S
        while self.failure is None and not self._closed and (self._is_noticed or time.monotonic() < deadline):
            time.sleep(0.01)
        return self.failure is not None

    def fail(self, reason: str) -> None:
        """End all ranks, and whatever waits for one of them."""
        with self._lock:
            if self.failure is None and not self._closed:
                self.failure = reason
        self._kill()
        if self.communicator is not None:
            self.communicator.abort()

    def _watch(self, are_started: "Future[None]") -> None:
        try:
            descriptors = [self.channel.fd, *([self.store] if "store" in self.boot else [])]
            for rank in range(1, self.size):
                self.members.append(WorkerProcess(rank, self.boot, descriptors))
            are_started.set_result(None)
            self._watch_until_lost()
        except BaseException as error:
            if not are_started.done():
                are_started.set_exception(error)
            else:  # or nobody would notice a lost rank
                self.fail(f"rank 0 cannot watch over the others: {type(error).__name__}: {error}")
        self._have_ended.acquire()  # since they end with the thread that has started them

    def _watch_until_lost(self) -> None:
        while not self._closed and self.failure is None:
            ready = readable([worker.socket.fileno() for worker in self.members])
            for worker in self.members:
                if self._closed:
                    return
                if worker.socket.fileno() in ready or worker.has_ended:
                    answer = receive_json(worker.socket)
                    if "state" not in answer:
                        self._is_noticed = True
                        self.fail(self._describe_lost(worker, answer))
                        return
                    worker.state = STATES.index(answer["state"])
                # A driver that starts, a slow disk or a compiler may stop all threads for long.
                is_started = worker.state == STATES.index("started")
                limit_s = self.timeout_s if is_started else START_PATIENCE * self.timeout_s
                if worker.stands_still_s(self._mark(worker), has_waited=not ready) > limit_s:
                    self._is_noticed = True
                    worker.process.kill()
                    self.fail(f"{worker} has not moved for {limit_s:g} s, and was killed: {worker.exit_status()}")
                    return

    def _mark(self, worker: WorkerProcess) -> tuple[int, ...]:
        """What changes as long as nothing holds `worker` up."""
        # All ranks do the same, one thing after another: who stays behind rank 0 hangs, whatever lives in it; but a CPU
        # may only be slow.
        channel, rank = self.channel, worker.rank
        own = channel.progress[rank]
        if own < channel.progress[0]:
            return worker.state, own, channel.busy_s[rank] if self.device.type == "cpu" else 0
        return worker.state, -1, channel.heartbeats[rank]

    def _describe_lost(self, worker: WorkerProcess, answer: dict[str, Any]) -> str:
        """`worker` has ended; so have others, perhaps, a moment before or because of it. Who was killed comes first."""
        time.sleep(POLL_S)
        answers = {worker: answer}
        answers |= {other: other.last_words() for other in self.members if other is not worker and other.has_ended}
        lost = sorted(answers, key=lambda worker: (worker.process.poll() or 0) >= 0)
        return "; ".join(self._describe(worker, answers[worker]) for worker in lost)

    def _describe(self, worker: WorkerProcess, answer: dict[str, Any]) -> str:
        """How it ended, and what it said last."""
        reason = f": {answer['error']}" if "error" in answer else ""
        return f"{worker} ended with {worker.exit_status()}{reason}"

    def stop(self) -> None:
        """End the workers, kindly first; harmless when repeated. Signals wait until they have ended."""
        if os.getpid() != self.pid:  # a fork of rank 0's process does not own them
            return
        with deferred_signals():
            with self._lock:
                if self._closed:
                    return
                self._closed = True
            try:
                self._end_kindly()
            finally:
                self._end()

    def _end(self) -> None:
        self._kill()
        self._have_ended.release()
        if self.communicator is not None:
            self.communicator.abort()
            self.communicator.close()
        # The garbage collector calls `stop` from any thread.
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        self.communicator = None
        for worker in self.members:
            worker.close()
        self._held.close()

    def _end_kindly(self) -> None:
        if self.failure is not None or not self._have_reached("started"):
            return
        if self.channel.num_sent > min(self.channel.num_done[1:]):  # nobody needs these steps any more
            return
        with suppress(subprocess.TimeoutExpired, OSError):
            for worker in self.members:
                worker.close_bell()
                worker.socket.shutdown(socket.SHUT_WR)  # where a fork holds copies of the bells
            deadline = time.monotonic() + END_S
            for worker in self.members:
                worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))

    def _kill(self) -> None:
        """End all at once. They have ended then, but for who is in a driver's call that does not return."""
        for worker in self.members:
            if not worker.has_ended:
                worker.process.kill()
        deadline = time.monotonic() + END_S
        for worker in self.members:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))
