"""`lgmp serve` as a process that tests start, and connect front ends to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from launching import Launch, wait_until


@contextlib.contextmanager
def served(kind: str, *words: str, socket: Path) -> Iterator[Launch]:
    """An `lgmp serve KIND` that has said that a front end may connect to `socket`; at its end nothing may be left.

    What it said is shown with a test that fails.
    """
    with Launch("serve", kind, *words, "--socket", str(socket)) as launched:
        try:
            launched.err.wait_for("lgmp: serving ")
            yield launched
        finally:
            print(f"serve {kind}:", launched.err.text)
        launched.process.terminate()
        launched.end()
        assert not os.path.exists(socket)


def worker_of(launched: Launch) -> int:
    """The process that serves the device, once there is one."""
    wait_until(launched.workers, "a worker is there")
    (pid,) = launched.workers().values()
    return pid
