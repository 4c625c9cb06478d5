"""The waker: the launcher's second thread, which sleeps in one poll on everything that is not the guest.

The guest has the main thread. The completion queue, the ends of workers, signals and whatever else may want the
launcher's attention are descriptors here; each has a function that is called, in this thread, when it is readable.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import signal
import threading
import time
from collections.abc import Callable

# Linux's pipes hold this much; none that comes while one is full is heard of.
_PIPE_BYTES = 1 << 16
# What is written where no signal came: there is none of this number.
_DOORBELL = b"\0"


class Waker:
    """A poll loop in a thread. A handler must not block, and must not raise."""

    def __init__(self) -> None:
        """Nothing is watched yet, and the thread does not run."""
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._signal_handlers: dict[int, Callable[[int], None]] = {}
        self._old_wakeup_descriptor: int | None = None
        self._closing = False
        # What is to be called later: (when, number, what), where the numbers keep those of one time in order.
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._later_number = 0
        self._later_lock = threading.Lock()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lgmp-waker", daemon=True)
        # The numbers of the signals that came, and the doorbell of `close`.
        self._heard, self._bell = os.pipe()
        for descriptor in (self._heard, self._bell):
            os.set_blocking(descriptor, False)
        self.watch(self._heard, self._hear)

    def watch(self, descriptor: int, handler: Callable[[], object]) -> None:
        """Call `handler` whenever `descriptor` is readable or at its end. Before `start`, or from a handler."""

        def call() -> None:
            handler()

        self._handlers[descriptor] = call
        self._poll.register(descriptor, select.POLLIN)

    def forget(self, descriptor: int) -> None:
        """Watch it no longer. Before `start`, or from a handler."""
        self._poll.unregister(descriptor)
        del self._handlers[descriptor]

    def on_signal(self, number: int, handler: Callable[[int], None]) -> None:
        """Call `handler(number)` for each signal `number` that has a Python handler, which would wait for the guest.

        That one is the caller's to set, after this. SIGCHLD's is called once for many, and where more signals came than
        the pipe takes: it looks for itself what there is, and nothing is lost. Before `start`, in the main thread.
        """
        if self._old_wakeup_descriptor is None:
            self._old_wakeup_descriptor = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self._signal_handlers[number] = handler

    def call_later(self, seconds: float, call: Callable[[], object]) -> None:
        """Call `call` in this thread, `seconds` from now, unless `close` comes first. From any thread."""
        with self._later_lock:
            self._later_number += 1
            heapq.heappush(self._later, (time.monotonic() + seconds, self._later_number, call))
        self._ring()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, in the main thread. Raises what a handler raised, if one did. May be called twice."""
        if self._bell < 0:
            return
        if self._thread.is_alive():
            self._closing = True
            self._ring()
            self._thread.join()
        if self._old_wakeup_descriptor is not None:
            signal.set_wakeup_fd(self._old_wakeup_descriptor)
        os.close(self._bell)
        os.close(self._heard)
        self._bell = -1
        if self._failure is not None:
            raise self._failure

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it wakes up anyway
            os.write(self._bell, _DOORBELL)

    def _call_what_is_due(self) -> float | None:
        """Call what is due by now; gives the milliseconds until something else is, None where nothing is."""
        while True:
            with self._later_lock:
                if not self._later:
                    return None
                left = self._later[0][0] - time.monotonic()
                if left > 0:
                    return left * 1000
                call = heapq.heappop(self._later)[2]
            call()

    def _hear(self) -> None:
        heard = os.read(self._heard, _PIPE_BYTES)
        for number in heard:
            if number in self._signal_handlers and number != signal.SIGCHLD:
                self._signal_handlers[number](number)
        was_full = len(heard) == _PIPE_BYTES
        if signal.SIGCHLD in self._signal_handlers and (was_full or signal.SIGCHLD in heard):
            self._signal_handlers[signal.SIGCHLD](signal.SIGCHLD)

    def _run(self) -> None:
        try:
            while not self._closing:
                for descriptor, _events in self._poll.poll(self._call_what_is_due()):
                    handler = self._handlers.get(descriptor)
                    if handler is not None:
                        handler()
        except BaseException as failure:  # a defect of ours: `close` raises it in the main thread
            self._failure = failure
            raise
