"""Signals that are held back for a moment: none is lost, none comes within, and no handler stays replaced."""

import gc
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm.utils.interrupts import deferred_signals


@pytest.fixture
def without_gc() -> Iterator[None]:
    """Whoever is called by the garbage collector, as Hypothesis is, loses what a handler raises there."""
    gc.disable()
    yield
    gc.enable()


def test_ctrl_c_waits_for_the_end_of_a_launch():
    """In the middle it would leave the other ranks waiting."""
    order = []

    def launch() -> None:
        with deferred_signals():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                order.append("launching")

    with pytest.raises(KeyboardInterrupt):
        launch()
    assert len(order) == 1000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_are_held_back_wherever_they_strike(without_gc):
    """Also as the block is entered or left: what their handlers raise goes through, and none loses its handler."""

    class TooLate(ValueError):  # which `signal` itself raises in threads other than the main one
        pass

    num_alarms = num_raised = num_within = 0

    def ring(*_: Any) -> None:
        nonlocal num_alarms
        num_alarms += 1
        raise TooLate

    def wait_for_an_alarm() -> None:
        nonlocal num_within
        before = num_alarms
        signal.setitimer(signal.ITIMER_REAL, 2e-5)
        while num_alarms == before:
            with deferred_signals():
                try:
                    for _ in range(5):
                        pass
                except TooLate:
                    num_within += 1
                    raise

    def go_on() -> None:
        nonlocal num_raised
        try:
            wait_for_an_alarm()
        except TooLate:
            num_raised += 1

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        while num_alarms < 1000:
            go_on()
            assert signal.getsignal(signal.SIGALRM) is ring
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert num_raised == num_alarms > 0
    assert num_within == 0


def test_what_was_held_back_is_heard_also_when_another_handler_raises_then(without_gc):
    """SIGTERM strikes within the block, SIGALRM as it is left."""

    class TooLate(Exception):
        pass

    def ring(*_: Any) -> None:
        raise TooLate

    num_late, heard = 0, {}  # half of them or so
    # Not a function in Python: another signal's handler may always run as that begins, and it would not go on.
    previous = signal.signal(signal.SIGALRM, ring), signal.signal(signal.SIGTERM, heard.setdefault)
    try:
        for _ in range(6000):
            heard.clear()
            is_sent = False
            try:
                with deferred_signals():
                    os.kill(os.getpid(), signal.SIGTERM)
                    is_sent = True
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-5))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except TooLate:
                num_late += 1
            assert len(heard) == is_sent
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous[0])
        signal.signal(signal.SIGTERM, previous[1])
    assert num_late > 0


def test_of_several_signals_each_is_heard():
    heard = []

    def handle(number: int, frame: Any) -> None:
        heard.append(number)
        raise TimeoutError(number)

    def strike() -> None:
        try:
            raise outer
        except ValueError:
            with deferred_signals():
                for number in signals * 2:
                    os.kill(os.getpid(), number)
                assert not heard

    signals = [signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1]
    previous = [signal.signal(number, handle) for number in signals]
    outer = ValueError("the caller is handling it")
    try:
        with pytest.raises(TimeoutError) as caught:
            strike()
    finally:
        for number, handler in zip(signals, previous):
            signal.signal(number, handler)
    assert sorted(heard) == sorted(signals)
    chain: list[BaseException | None] = [caught.value]
    for _ in signals:
        chain.append(chain[-1] and chain[-1].__context__)
    assert [error.args[0] for error in chain[:-1] if error] == heard[::-1]
    assert chain[-1] is outer
