"""The kicker: a thread that stops the CPU at a given time, and again until the CPU has taken notice.

It sleeps in a read of a timer descriptor, so that setting the time is one cheap system call for the thread that
runs the guest, and nothing in Python runs until there is something to do.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

from lgmp.errors import LgmpError

# linux/time.h, linux/timerfd.h
_CLOCK_MONOTONIC = 1
_TFD_CLOEXEC = os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1

_NANOSECONDS = 1_000_000_000
# A stop asked for just before the CPU starts is lost; it is asked for again after this time.
RETRY_NANOSECONDS = 1_000_000


class _TimerSpecification(ctypes.Structure):
    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class Kicker:
    """Calls `kick()` at the time set. `kick` gives True to be called again a millisecond later."""

    def __init__(self, kick: Callable[[], bool]) -> None:
        """Start the thread; nothing is set. Raises LgmpError where the kernel has no timer to give."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        self._descriptor = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_CLOEXEC)
        if self._descriptor < 0:
            raise LgmpError(f"cannot make a timer: {os.strerror(ctypes.get_errno())}")
        self._specification = _TimerSpecification()
        self._reference = ctypes.byref(self._specification)
        self._lock = threading.Lock()
        self._kick = kick
        self._closing = False
        # What the timer is set to, in nanoseconds of the monotonic clock; 0 when it is off.
        self._armed = 0
        self._thread = threading.Thread(target=self._run, name="lgmp-kicker", daemon=True)
        self._thread.start()

    def at(self, deadline: int) -> None:
        """Kick at `deadline`, nanoseconds of the monotonic clock (0: never). It replaces what was set before."""
        if deadline == self._armed:
            return
        with self._lock:
            specification = self._specification
            specification.seconds, specification.nanoseconds = divmod(deadline, _NANOSECONDS)
            self._settime(self._descriptor, _TFD_TIMER_ABSTIME, self._reference, None)
            self._armed = deadline

    def soon(self) -> None:
        """Kick in a millisecond, whatever was set before."""
        with self._lock:
            specification = self._specification
            specification.seconds, specification.nanoseconds = 0, RETRY_NANOSECONDS
            self._settime(self._descriptor, 0, self._reference, None)
            self._armed = -1

    def close(self) -> None:
        """End the thread. Nothing else may be called afterwards but this once more."""
        if self._closing:
            return
        self._closing = True
        self.soon()
        self._thread.join()
        os.close(self._descriptor)

    def _run(self) -> None:
        while True:
            os.read(self._descriptor, 8)
            self._armed = 0
            if self._closing:
                return
            if self._kick():
                self.soon()
