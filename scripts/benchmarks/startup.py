"""How long it takes to start: Python alone, a worker, the launcher with its devices; and to boot a guest.

All in milliseconds from just before the exec: Python to its first statement, a worker to its READY, the launcher to the
guest's first instruction.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from time import monotonic_ns

from guest import TEST_GUEST, running
from samples import Samples
from worker import BlockWorker

# What a program of ours writes to its stdout: when it got there, on the clock that all processes share.
_STAMP = "import os, time; os.write(1, str(time.monotonic_ns()).encode())"

# `lgmp run 16 TESTGUEST --block DISK`, with a stamp before the guest's first instruction.
_LAUNCH = """\
import os, sys, time
from lgmp.cli import finish
from lgmp.devices import BlockOption
from lgmp.launcher import GuestOptions, launch
end = launch(GuestOptions(
    memory_bytes=16 << 20,
    kernel=sys.argv[1],
    arguments=("quiet poweroff",),
    devices=(BlockOption(sys.argv[2]),),
    on_running=lambda running: os.write(1, str(time.monotonic_ns()).encode()),
))
sys.exit(finish(end))
"""


def measure_start(runs: int) -> dict[str, Samples]:
    """Milliseconds to start each, `runs` times in turn."""
    values: dict[str, list[float]] = {"Python": [], "worker": [], "launcher": []}
    with tempfile.NamedTemporaryFile() as disk:
        disk.truncate(1 << 20)
        for number in range(runs + 1):
            measured = {
                "Python": _until_stamp(["-c", _STAMP]),
                "worker": _worker(disk.fileno()),
                "launcher": _until_stamp(["-c", _LAUNCH, TEST_GUEST, disk.name]),
            }
            if number:  # the first round brings the files into memory
                for kind, value in measured.items():
                    values[kind].append(value)
    return {kind: Samples.of(samples, "ms") for kind, samples in values.items()}


def measure_test_guest(runs: int) -> Samples:
    """Seconds from `lgmp run` with the test guest and a disk to its exit, the guest having powered off."""
    values = []
    with tempfile.NamedTemporaryFile() as disk:
        disk.truncate(1 << 20)
        for _ in range(runs + 1):
            with running(["16", TEST_GUEST, "--block", disk.name, "poweroff"]) as guest:
                values.append(guest.wait())
    return Samples.of(values[1:], "s")


def measure_kernel(arguments: Sequence[str], until: str, runs: int) -> Samples:
    """Seconds from `lgmp run ARGUMENTS` to the first time that `until` is seen on the guest's console."""
    values = []
    for _ in range(runs + 1):
        with running(arguments) as guest:
            values.append(guest.wait_for(until))
    return Samples.of(values[1:], "s")


def _until_stamp(arguments: Sequence[str]) -> float:
    start = monotonic_ns()
    result = subprocess.run(
        [sys.executable, "-P", *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False, text=True
    )
    digits = result.stdout[: len(str(start))]
    if result.returncode or not digits.isdigit():
        raise RuntimeError(f"it ended with {result.returncode}: {result.stdout}{result.stderr}")
    return (int(digits) - start) / 1e6


def _worker(disk_fd: int) -> float:
    with BlockWorker(disk_fd) as worker:
        return (worker.ready_ns - worker.started_ns) / 1e6
