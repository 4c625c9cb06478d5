"""Launchers that come to a bad end, and what they do while they start a worker: for tests of worker processes."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lgmp.testing import PATIENCE, WorkerProcess


class DoomedLauncher:
    """A launcher in a process of its own, to be killed. `start` runs in it and gives the workers it has started."""

    def __init__(self, start: Callable[[], Sequence[WorkerProcess]]) -> None:
        report, told = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                workers = start()
                names = [name for w in workers for name in (w.mailbox.name, w.completions.name)]
                os.write(told, json.dumps([[w.process.pid for w in workers], names]).encode())
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        os.close(told)
        with os.fdopen(report, "rb") as file:
            assert select.select([file], [], [], PATIENCE)[0], "the launcher did not start its workers"
            pids, self.queue_names = json.loads(os.read(report, 65536))
        self.pidfds = [os.pidfd_open(pid) for pid in pids]

    def kill(self) -> None:
        """Kill it as nothing can be prepared for."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def workers_end(self) -> bool:
        """Wait for the end of all workers; False where one outlives the test's patience."""
        ended = all(select.select([pidfd], [], [], PATIENCE)[0] for pidfd in self.pidfds)
        for pidfd in self.pidfds:
            if not ended:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        return ended


@contextmanager
def signals_held() -> Iterator[None]:
    """All signals blocked within, as the launcher has them while it starts a worker."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
