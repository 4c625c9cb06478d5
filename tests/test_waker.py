"""The waker: what it hears of while the main thread does something else."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lgmp.waker import Waker

HANGS_AFTER = 20.0
PIPE_BYTES = 1 << 16


@pytest.fixture
def waker() -> Iterator[Waker]:
    """A waker that is not closed yet, and signal handlers as they were."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
    before = {number: signal.signal(number, lambda _number, _frame: None) for number in numbers}
    yield Waker()
    for number, handler in before.items():
        signal.signal(number, handler)


class Calls:
    """What handlers were called with, and in which threads."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.threads: set[str] = set()
        self._news = threading.Condition()

    def __call__(self, number: int) -> None:
        with self._news:
            self.numbers.append(number)
            self.threads.add(threading.current_thread().name)
            self._news.notify_all()

    def wait_for(self, count: int) -> None:
        """Until there were so many."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.numbers) >= count, HANGS_AFTER), self.numbers


def test_signals_are_heard_of_one_by_one_in_the_wakers_thread(waker: Waker) -> None:
    calls = Calls()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        waker.on_signal(number, calls)
    waker.start()
    sent = [signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1]
    for number in sent:
        signal.raise_signal(number)
    calls.wait_for(len(sent))
    waker.close()

    assert calls.numbers == sent
    assert calls.threads == {"lgmp-waker"}


def test_signals_that_came_before_its_start_are_heard_of(waker: Waker) -> None:
    calls = Calls()
    waker.on_signal(signal.SIGUSR1, calls)
    waker.on_signal(signal.SIGCHLD, calls)
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGCHLD)
    waker.start()
    calls.wait_for(2)
    waker.close()

    assert calls.numbers == [signal.SIGUSR1, signal.SIGCHLD]


def test_a_signal_without_a_handler_here_is_nothing_to_it(waker: Waker) -> None:
    calls = Calls()
    waker.on_signal(signal.SIGUSR1, calls)
    waker.start()
    signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGUSR1)
    calls.wait_for(1)
    waker.close()

    assert calls.numbers == [signal.SIGUSR1]


def test_the_end_of_a_child_is_heard_of_though_more_signals_came_than_the_pipe_takes(waker: Waker) -> None:
    calls = Calls()
    waker.on_signal(signal.SIGCHLD, calls)
    assert os.write(waker._bell, bytes([signal.SIGUSR1]) * PIPE_BYTES) == PIPE_BYTES
    signal.raise_signal(signal.SIGCHLD)
    waker.start()
    calls.wait_for(1)
    waker.close()

    assert set(calls.numbers) == {signal.SIGCHLD}


def test_it_can_be_closed_though_the_pipe_is_full(waker: Waker) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def handle(number: int) -> None:
        entered.set()
        go_on.wait(HANGS_AFTER)

    waker.on_signal(signal.SIGUSR1, handle)
    waker.start()
    signal.raise_signal(signal.SIGUSR1)
    assert entered.wait(HANGS_AFTER)
    os.write(waker._bell, bytes(PIPE_BYTES))
    threading.Timer(0.05, go_on.set).start()
    waker.close()

    assert not waker._thread.is_alive()


@pytest.mark.parametrize("started", [False, True])
def test_closed_it_leaves_no_descriptor_and_the_old_wakeup_descriptor(started: bool) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    outer = signal.set_wakeup_fd(writing)
    before = os.listdir("/proc/self/fd")
    waker = Waker()
    waker.on_signal(signal.SIGUSR1, lambda number: None)
    waker.on_signal(signal.SIGUSR2, lambda number: None)
    if started:
        waker.start()
    waker.close()

    assert signal.set_wakeup_fd(outer) == writing
    assert os.listdir("/proc/self/fd") == before
    os.close(reading)
    os.close(writing)


def test_descriptors_are_watched_until_they_are_forgotten(waker: Waker) -> None:
    reading, writing = os.pipe()
    heard = threading.Event()

    def handle() -> None:
        os.read(reading, 1)
        waker.forget(reading)
        heard.set()

    waker.watch(reading, handle)
    waker.start()
    os.write(writing, b"xx")
    assert heard.wait(HANGS_AFTER)
    waker.close()

    assert os.read(reading, 9) == b"x"
    os.close(reading)
    os.close(writing)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_handler_raises_is_raised_when_it_is_closed(waker: Waker) -> None:
    def handle(number: int) -> None:
        raise ZeroDivisionError

    waker.on_signal(signal.SIGUSR1, handle)
    waker.start()
    signal.raise_signal(signal.SIGUSR1)
    waker._thread.join(HANGS_AFTER)

    with pytest.raises(ZeroDivisionError):
        waker.close()


def test_what_is_to_be_called_later_is_called_in_its_turn_and_in_the_wakers_thread(waker: Waker) -> None:
    calls = Calls()
    waker.call_later(0.5, lambda: calls(2))
    waker.call_later(0, lambda: calls(0))
    waker.start()
    waker.call_later(0, lambda: calls(1))
    calls.wait_for(3)
    waker.close()

    assert calls.numbers == [0, 1, 2]
    assert calls.threads == {"lgmp-waker"}


def test_what_is_called_later_may_ask_for_more(waker: Waker) -> None:
    calls = Calls()

    def again() -> None:
        calls(1)
        if len(calls.numbers) < 5:
            waker.call_later(0, again)

    waker.start()
    waker.call_later(0, again)
    calls.wait_for(5)
    waker.close()

    assert calls.numbers == [1] * 5


def test_what_is_not_due_when_the_waker_is_closed_is_never_called(waker: Waker) -> None:
    calls = Calls()
    waker.start()
    waker.call_later(1000, lambda: calls(1))
    waker.close()

    assert calls.numbers == []
