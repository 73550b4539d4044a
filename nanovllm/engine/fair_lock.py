"""Whose turn it is, when several threads share an engine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class FairLock:
    """A re-entrant lock that no thread can keep to itself by asking for it again at once.

    A plain lock goes to whoever asks first once it is free, and that is the thread that has just let go of it: one that
    takes it for every step of a long call would keep the others out until its last. Here those that wait stand at a
    turnstile, the next one inside, and the thread that comes back finds it taken.

    Ctrl-C may strike between any two lines. Hence re-entrant: where a `with` was interrupted as it was left, the
    clean-up must get in all the same.
    """

    def __init__(self) -> None:
        self._lock, self._turnstile = threading.RLock(), threading.RLock()

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds the lock."""
        return self._lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition asks; it is never out of date

    @contextmanager
    def held(self) -> Iterator[None]:
        try:
            if not self.is_mine:  # the next one waits for us
                self._turnstile.acquire()
            with self._lock:
                self._leave_turnstile()
                yield
        finally:
            self._leave_turnstile()

    def _leave_turnstile(self) -> None:
        try:
            while True:
                self._turnstile.release()
        except RuntimeError:  # not inside, or no longer
            pass
