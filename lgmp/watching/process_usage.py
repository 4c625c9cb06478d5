"""What processes use of this machine, as /proc has it. It is for whoever wants to know to read, not for a launcher."""

from __future__ import annotations

import os
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """CPU time of all its threads, and memory; None where /proc does not say.

    `rss_bytes` has what it shares with others in full, guest memory for one; `pss_bytes` its part of that.
    """

    cpu_seconds: float | None = None
    rss_bytes: int | None = None
    pss_bytes: int | None = None


def read_usage(pid: int | None) -> Usage:
    """What a process uses, as far as this user may know it; `pid` is None where there is none."""
    return Usage() if pid is None else read_cheap_usage(pid)._replace(pss_bytes=_read_pss(pid))


def read_cheap_usage(pid: int | None) -> Usage:
    """The same without `pss_bytes`, for which the kernel has to look at every page of it."""
    if pid is None:
        return Usage()
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            # After the name, which may hold anything.
            fields = file.read(4096).rpartition(b")")[2].split()
        # proc(5): utime, stime and rss are the fields 14, 15 and 24.
        return Usage((int(fields[11]) + int(fields[12])) / _TICKS, int(fields[21]) * _PAGE_BYTES)
    except (OSError, IndexError):
        return Usage()


def _read_pss(pid: int) -> int | None:
    """Its proportional set size; there is none on old kernels, or of another user's process."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return None
