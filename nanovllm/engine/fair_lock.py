"""Whose turn it is, when several threads share an engine."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class FairLock:
    """A lock that no thread can keep to itself by asking for it again at once.

    A plain lock goes to whoever asks first once it is free, and that is the thread that has just let go of it: one that
    takes it for every step of a long call would keep the others out until its last. Here those that wait stand at a
    turnstile, the next one inside, and the thread that comes back finds it taken.

    Ctrl-C may strike between any two lines, also where a `with` is entered or left, and whoever keeps the exception
    keeps all that its frames hold. Hence a function, not a context manager: what it took it lets go of itself.
    """

    def __init__(self) -> None:
        self._lock, self._turnstile = threading.RLock(), threading.RLock()

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds the lock."""
        return is_owned(self._lock)

    def hold(self, work: Callable[[], T]) -> T:
        """`work()`, when it is this thread's turn."""
        try:
            try:
                if not self.is_mine:
                    self._turnstile.acquire()  # the next one waits for us
                    self._lock.acquire()
                release(self._turnstile)
                return work()
            finally:
                self._let_go()
        finally:  # once more: Ctrl-C may have struck in the first
            self._let_go()

    def _let_go(self) -> None:
        """Of whatever this thread has of it."""
        release(self._lock)
        release(self._turnstile)


def is_owned(lock: threading.RLock) -> bool:
    """By this thread. As threading.Condition asks; it is never out of date."""
    return lock._is_owned()  # type: ignore[attr-defined]


def release(lock: threading.RLock) -> None:
    while is_owned(lock):
        lock.release()
