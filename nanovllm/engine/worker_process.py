"""A tensor-parallel rank beside rank 0, as rank 0 sees it: a process that starts, answers and ends. Made by the group.

It is started as a program (engine/worker.py), so that no script needs a `__main__` guard. It inherits a socket, over
which it is told in JSON what there is to do, and answers; and the read end of a pipe that brings a byte for every step,
at whose end it ends. When rank 0's process ends, however that happens, the system ends it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from nanovllm.engine.handshake import POLL_S, receive_json

EXIT_S = 1.5  # for one that was killed to be gone, as far as an error's message waits for that
# What it runs. First of all, since imports take seconds: when the thread that has started it ends, and that is with its
# process at the latest, the system is to kill it, even one that is stopped. prctl(2), PR_SET_PDEATHSIG.
PROGRAM = f"""
import sys
sys.path[:] = filter(None, sys.path)  # not the current directory, as PYTHONSAFEPATH says from Python 3.11 on
import ctypes, os
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})
if os.getppid() != int(sys.argv[2]):  # it was over before
    os._exit(1)
while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # or memory that ranks share may get a closed stream's number
    pass
os.close(descriptor)
from nanovllm.engine.worker import main
main()
"""


class WorkerProcess:
    def __init__(self, rank: int, boot: dict[str, Any], descriptors: list[int]):
        """Of the calling thread, with whose end it ends. It has the `descriptors` too, under the same numbers."""
        self.rank = rank
        self.state = 0  # which of STATES it has reached
        self.mark: tuple[int, ...] = ()
        self.num_polls = 0
        # Where this process looks for modules, in its order, and where this very package is. A Path is passed over, as
        # Python does with it.
        entries = [entry or os.getcwd() for entry in sys.path if isinstance(entry, str)]
        path = os.pathsep.join([*entries, str(Path(__file__).resolve().parents[2])])
        self.socket, theirs = socket.socketpair()
        with ExitStack() as held, theirs:  # the worker has a copy
            held.enter_context(self.socket)
            ear, self.bell = os.pipe()
            held.callback(self.close_bell)
            held.callback(os.close, ear)  # as long as somebody has it, who rings for a dead worker gets no SIGPIPE
            self.socket.sendall(json.dumps(boot).encode() + b"\n")
            self.socket.settimeout(POLL_S)  # no end comes from a dead worker whose own child has a copy of its side
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, (rank, os.getpid(), theirs.fileno(), ear))],
                pass_fds=[theirs.fileno(), ear, *descriptors],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for rank 0 alone
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            )
            self._held = held.pop_all()

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid})"

    def close_bell(self) -> None:
        bell, self.bell = self.bell, -1
        if bell != -1:
            os.close(bell)

    def close(self) -> None:
        """When it has ended: give back what rank 0 has of it."""
        self._held.close()

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def stands_still_s(self, mark: tuple[int, ...], has_waited: bool) -> float:
        """For how long `mark` has been the same; to be called after every poll, that `has_waited` for POLL_S or not.

        No clock says so: it runs on while all processes are frozen.
        """
        if self.mark != mark:
            self.mark, self.num_polls = mark, 0
        self.num_polls += has_waited
        return self.num_polls * POLL_S

    def last_words(self) -> dict[str, Any]:
        """Of one that has ended: its error, or nothing."""
        while "state" in (answer := receive_json(self.socket)):
            pass
        return answer

    def exit_status(self) -> str:
        """Of one that has ended, or is about to."""
        with suppress(subprocess.TimeoutExpired):
            # No worker ends with 0 as long as it is needed. `Popen` says so where nobody is told how its processes end:
            # when SIGCHLD is ignored, or another thread waits for all of them.
            if code := self.process.wait(timeout=EXIT_S):
                return f"exit code {code}"
        return "an unknown exit code"
