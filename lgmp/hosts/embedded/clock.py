"""How fast the time-stamp counter runs, which the guest is told so that it can use it as its clock."""

from __future__ import annotations

import time
from collections.abc import Callable

# Shorter than this, and the reading is too coarse for a clock (a microsecond's jitter in 20 ms is 50 ppm).
_SHORTEST_NANOSECONDS = 20_000_000


class TscClock:
    """Measures the counter against the monotonic clock from when it is made to when it is asked."""

    def __init__(self, read_tsc: Callable[[], int]) -> None:
        """`read_tsc()`: the counter as guests see it."""
        self._read_tsc = read_tsc
        self._steady = _counter_is_steady()
        self._start = self._reading()

    def khz(self) -> int:
        """Its frequency in kHz; 0 where it does not run at one speed at all times, and the guest must not use it."""
        if not self._steady:
            return 0
        started = self._start[0]
        short = _SHORTEST_NANOSECONDS - (time.monotonic_ns() - started)
        if short > 0:
            time.sleep(short / 1e9)
        nanoseconds, ticks = self._reading()
        return round((ticks - self._start[1]) * 1_000_000 / (nanoseconds - started))

    def _reading(self) -> tuple[int, int]:
        """The tightest of a few readings of both clocks, as (nanoseconds, ticks)."""
        best: tuple[int, int, int] | None = None
        for _ in range(5):
            before = time.monotonic_ns()
            ticks = self._read_tsc()
            after = time.monotonic_ns()
            if best is None or after - before < best[0]:
                best = (after - before, (before + after) // 2, ticks)
        assert best is not None
        return best[1], best[2]


def _counter_is_steady() -> bool:
    """Whether the processor says that the counter runs at a constant rate, asleep or not (/proc/cpuinfo)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return False
    return "constant_tsc" in flags and "nonstop_tsc" in flags
