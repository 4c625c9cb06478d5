"""How much memory a running guest takes: the launcher and each worker, from /proc/PID/smaps_rollup, in KiB.

PSS is what a process takes when every page is divided by the number of processes that share it; its parts are memory of
its own (anonymous), files (Python, libraries) and shared memory (the guest's, which is not lgmp's to save).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from guest import TEST_GUEST, running

_FIELDS = {"Pss": "pss", "Pss_Anon": "anonymous", "Pss_File": "file", "Pss_Shmem": "guest memory"}
# The title that ps shows is set when the device is served already.
_SETTLE_SECONDS = 0.5


def measure() -> dict[str, dict[str, int]]:
    """KiB by process title, for the test guest with 16 MiB, a console and two disks."""
    with tempfile.NamedTemporaryFile() as one, tempfile.NamedTemporaryFile() as two:
        for disk in (one, two):
            disk.truncate(1 << 20)
        arguments = [
            "16",
            TEST_GUEST,
            "--name",
            "bench",
            *("--block", one.name),
            *("--block", two.name),
            "echo ready; idle 60",
        ]
        with running(arguments) as guest:
            guest.wait_for("ready")
            time.sleep(_SETTLE_SECONDS)
            launcher = guest.process.pid
            children = map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
            return {_title(pid): _rollup(pid) for pid in (launcher, *children)}


def _title(pid: int) -> str:
    """What the process calls itself, without the name of a temporary file: `lgmp-block vda`, `lgmp: testguest.elf`."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split()
    return " ".join(words[:2])


def _rollup(pid: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        field, kibibytes = line.split()[:2]
        found[field.rstrip(":")] = int(kibibytes)
    return {name: found[field] for field, name in _FIELDS.items()}
