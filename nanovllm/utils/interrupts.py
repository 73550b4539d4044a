"""Ctrl-C, held back for a moment: where it would leave other ranks alone, or a stream capturing."""

import _signal  # what `signal` is made of, without its enums: with them these few calls take eight times as long
import threading
from collections.abc import Callable
from signal import SIGINT
from typing import Any


class deferred_interrupts:
    """Ctrl-C takes effect when the block is left."""

    def __enter__(self) -> None:
        self.caught: list[tuple[Any, ...]] = []
        self.previous: Callable[..., Any] | None = None
        previous = _signal.getsignal(SIGINT)
        if callable(previous):  # or nobody is interrupted
            try:
                _signal.signal(SIGINT, self.catch)
                self.previous = previous
            except ValueError:  # of another thread, which nobody interrupts; else of a handler of another signal
                if threading.current_thread() is threading.main_thread():
                    raise

    def catch(self, *args: Any) -> None:
        self.caught.append(args)

    def __exit__(self, *exc_info: object) -> None:
        if self.previous is not None:
            _signal.signal(SIGINT, self.previous)
            if self.caught:
                self.previous(*self.caught[0])
