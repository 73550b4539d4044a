"""Ctrl-C and other signals, held back for a moment: where what a handler raises would leave other ranks alone, or a
stream capturing."""

import _signal  # what `signal` is made of, without its enums: with them these few calls take eight times as long
import threading
from collections.abc import Callable
from signal import SIGALRM, SIGHUP, SIGINT, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM
from typing import Any

HELD_BACK = [*map(int, (SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM, SIGVTALRM, SIGPROF, SIGUSR1, SIGUSR2))]


class deferred_signals:
    """Handlers that are written in Python run when the block is left. What the system does by itself it does at once.

    Of a signal that comes repeatedly they hear once, as they do of one that the system holds back.
    """

    def __enter__(self) -> None:
        self.caught: dict[int, Any] = {}  # by number, where it struck
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}
        self.replaced: list[int] = []
        if threading.current_thread() is not threading.main_thread():  # which runs all handlers
            return
        for number in HELD_BACK:
            if callable(handler := _signal.getsignal(number)):
                self.handlers[number] = handler
        try:
            for number in self.handlers:
                self.replaced.append(number)
                _signal.signal(number, self.catch)
        except BaseException:  # of a handler that was not replaced yet
            self._restore()
            raise

    def catch(self, number: int, frame: Any) -> None:
        self.caught[number] = frame

    def __exit__(self, *exc_info: object) -> None:
        if self.replaced:
            self._restore()
            if self.caught:
                self._deliver()

    def _restore(self) -> None:
        try:
            while self.replaced:
                _signal.signal(self.replaced[-1], self.handlers[self.replaced[-1]])
                self.replaced.pop()
        finally:  # of a handler that is in its place again, and raises
            if self.replaced:
                self._restore()

    def _deliver(self) -> None:
        number, frame = self.caught.popitem()
        try:
            self.handlers[number](number, frame)
        finally:
            if self.caught:
                self._deliver()
