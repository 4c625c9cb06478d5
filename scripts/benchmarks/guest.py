"""Runs `lgmp run` as a user would, with its console on a pipe."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from time import monotonic_ns

TEST_GUEST = str(resources.files("lgmp") / "testguest.elf")
# A guest that says nothing for so long, in seconds, is given up.
PATIENCE = 60


class Guest:
    """A running launcher; `output` is what its guest and it itself have said so far."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start `lgmp run ARGUMENTS`."""
        self.started_ns = monotonic_ns()
        self.process = subprocess.Popen(
            [os.path.join(os.path.dirname(sys.executable), "lgmp"), "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = b""

    def wait_for(self, text: str) -> float:
        """Seconds from the start until the guest has said `text`. Raises RuntimeError where it does not come."""
        assert self.process.stdout is not None
        console = self.process.stdout.fileno()
        wanted = text.encode()
        while wanted not in self.output:
            if not select.select([console], [], [], PATIENCE)[0]:
                raise RuntimeError(f"the guest has been silent for {PATIENCE} s and never said {text!r}")
            chunk = os.read(console, 65536)
            if not chunk:
                raise RuntimeError(f"the guest ended and never said {text!r}: {self._last_words()}")
            self.output += chunk
        return (monotonic_ns() - self.started_ns) / 1e9

    def wait(self) -> float:
        """Seconds from the start until the launcher exits. Raises RuntimeError unless it exits with 0."""
        try:
            output, _ = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the guest still runs after {PATIENCE} s") from error
        seconds = (monotonic_ns() - self.started_ns) / 1e9
        self.output += output
        if self.process.returncode:
            raise RuntimeError(f"lgmp run exited with {self.process.returncode}: {self._last_words()}")
        return seconds

    def _last_words(self) -> str:
        return self.output.decode(errors="replace")[-500:].strip()

    def end(self) -> None:
        """End it if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.communicate()


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[Guest]:
    """A guest that is ended on the way out, if not before."""
    guest = Guest(arguments)
    try:
        yield guest
    finally:
        guest.end()
