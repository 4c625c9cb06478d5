"""The waker: the launcher's second thread, which sleeps in one poll on everything that is not the guest.

The guest has the main thread. The completion queue, the ends of workers, signals and whatever else may want the
launcher's attention are descriptors here; each has a function that is called, in this thread, when it is readable.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


class Waker:
    """A poll loop in a thread. A handler must not block, and must not raise."""

    def __init__(self) -> None:
        """Nothing is watched yet, and the thread does not run."""
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lgmp-waker", daemon=True)
        self.watch(self._doorbell, lambda: os.eventfd_read(self._doorbell))

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

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Raises what a handler raised, if one did."""
        if self._thread.is_alive():
            self._closing = True
            os.eventfd_write(self._doorbell, 1)
            self._thread.join()
        os.close(self._doorbell)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._closing:
                for descriptor, _events in self._poll.poll():
                    handler = self._handlers.get(descriptor)
                    if handler is not None:
                        handler()
        except BaseException as failure:  # a defect of ours: `close` raises it in the main thread
            self._failure = failure
            raise
