"""Ctrl-C and other signals, held back for a moment: where what a handler raises would leave other ranks alone, or a
stream capturing."""

import _signal  # what `signal` is made of, without its enums: with them these few calls take eight times as long
import threading
from collections.abc import Callable
from signal import SIGALRM, SIGHUP, SIGINT, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU
from typing import Any

HELD_BACK = [*map(int, (SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU, SIGUSR1, SIGUSR2))]


class deferred_signals:
    """Python's handlers of the signals HELD_BACK run when the block is left. What the system does it does at once.

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
        # Not a function in Python: as that begins, the handler of another signal may raise, and this one would be lost.
        catch = self.caught.__setitem__
        try:
            for number in self.handlers:
                self.replaced.append(number)
                _signal.signal(number, catch)
        except BaseException:  # of a handler that was not replaced yet
            self.__exit__()
            raise

    def __exit__(self, *exc_info: object) -> None:
        """Not one handler is left out because another raises, here or, if it is in its place again, at any moment."""
        raised: BaseException | None = None
        while self.replaced or self.caught:
            try:
                self._give_back()
            except BaseException as error:
                if error is not raised:
                    error.__context__ = raised or error.__context__
                raised = error
        if raised is not None:
            context = raised.__context__
            try:
                raise raised
            finally:
                raised.__context__ = context  # where the block is in an `except`, raising put that exception there
                del raised, context  # or they would hold this frame that holds them

    def _give_back(self) -> None:
        while self.replaced:
            number = self.replaced[-1]
            _signal.signal(number, self.handlers[number])
            self.replaced.pop()
        while self.caught:
            number = next(iter(self.caught))
            handler, frame = self.handlers[number], self.caught[number]
            del self.caught[number]  # from here on Python looks for signals again when the handler has begun
            handler(number, frame)
