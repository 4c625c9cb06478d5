"""How fast the emulated CPU and the host are, as the test guest measures it from inside, in nanoseconds each."""

from __future__ import annotations

import re
import tempfile

from guest import TEST_GUEST, running
from samples import Samples

# What the test guest's `bench` knows, and how often it does it.
_COUNTS = {"hcall": 100_000, "syscall": 100_000, "fault": 100_000, "blk": 2_000}
_RESULT = re.compile(r"bench (\w+): \d+ times, (\d+) ns each")


def measure(runs: int) -> dict[str, Samples]:
    """Nanoseconds for a hypercall, a system call, a page fault, and a 4 KiB disk read that the guest waits for."""
    values: dict[str, list[float]] = {what: [] for what in _COUNTS}
    commands = "; ".join(f"bench {what} {count}" for what, count in _COUNTS.items())
    with tempfile.NamedTemporaryFile() as disk:
        disk.truncate(16 << 20)
        for _ in range(runs):
            with running(["16", TEST_GUEST, "--block", disk.name, f"quiet {commands}; poweroff"]) as guest:
                guest.wait()
                for what, nanoseconds in _RESULT.findall(guest.output.decode(errors="replace")):
                    values[what].append(float(nanoseconds))
    return {what: Samples.of(samples, "ns") for what, samples in values.items() if samples}
