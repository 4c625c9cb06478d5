"""When a process that ended is to be started again: at once, in a while, or not any more.

One that ends without having got anything done, so often within so many seconds, is given up: sooner where it ended of
itself than where somebody keeps killing it. Each time it is left alone twice as long. An exit is its own doing; a
signal may be, but not before it was ready: until then it touches nothing of the guest's.
"""

from __future__ import annotations

import contextlib
import signal
import time
from enum import Enum

_EXITS_AT_MOST = 5
_CRASHES_AT_MOST = 10
_KILLS_AT_MOST = 100
# In seconds.
_WITHIN = 10.0
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 1.0
_KILLS = (signal.SIGKILL, signal.SIGTERM)


class _End(Enum):
    """How a process ended."""

    EXIT = 1
    CRASH = 2  # by a signal that may be its own doing
    KILL = 3  # by somebody


class Restarts:
    """What has become of one process after another."""

    def __init__(self) -> None:
        """None has been started yet."""
        # When one ended without having got anything done, and how.
        self._futile: list[tuple[float, _End]] = []
        # How much had been done when it was started.
        self._done_before: tuple[int, ...] = ()

    def started(self, done: tuple[int, ...]) -> None:
        """Another one starts; `done` are numbers that change when something is done."""
        self._done_before = done

    def forgive(self) -> None:
        """Whatever was, does not count."""
        self._futile.clear()

    def pause(self, code: int, done: tuple[int, ...], *, was_ready: bool) -> float | None:
        """How long to leave it alone, in seconds; None where it is to be given up.

        It ended with `code`, as subprocess has it: negative for a signal.
        """
        if done != self._done_before:
            self.forgive()
            return 0
        end = _End.EXIT if code >= 0 else _End.CRASH if was_ready and -code not in _KILLS else _End.KILL
        now = time.monotonic()
        self._futile = [(when, how) for when, how in self._futile if now - when < _WITHIN]
        self._futile.append((now, end))
        ends = [how for _when, how in self._futile]
        exits, kills = ends.count(_End.EXIT), ends.count(_End.KILL)
        crashes = len(ends) - kills
        if exits >= _EXITS_AT_MOST or crashes >= _CRASHES_AT_MOST or kills >= _KILLS_AT_MOST:
            return None
        return min(_FIRST_PAUSE * 2 ** (crashes - 2), _LONGEST_PAUSE) if end is not _End.KILL and crashes > 1 else 0


def describe_end(title: str, code: int | None) -> str:
    """How the process that `title` names ended, for a person: its exit code or its signal."""
    if code is None:
        return f"{title} still runs"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"{title} was killed by {signal.Signals(-code).name}"
        return f"{title} was killed by signal {-code}"
    return f"{title} exited with code {code}"
