"""`lgmp demo`: the bundled test guest with a scratch disk."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib import resources

from lgmp.devices import BlockOption
from lgmp.launcher import End, GuestOptions, Running, launch

_MEMORY_BYTES = 16 << 20
_DISK_BYTES = 4 << 20


def demo() -> End:
    """Boot it; gives how that ended. On a terminal the guest has its prompt, else it checks itself and powers off."""
    interactive = os.isatty(0)
    arguments = () if interactive else ("selfcheck disk; poweroff",)
    with tempfile.TemporaryDirectory(prefix="lgmp-demo-") as directory:
        disk = os.path.join(directory, "scratch.img")
        with open(disk, "wb") as file:
            file.truncate(_DISK_BYTES)
        with resources.as_file(resources.files("lgmp") / "testguest.elf") as kernel:
            options = GuestOptions(
                memory_bytes=_MEMORY_BYTES,
                kernel=str(kernel),
                arguments=arguments,
                devices=(BlockOption(disk),),
                name="demo",
                on_running=_show,
            )
            return launch(options)


def _show(running: Running) -> None:
    """Say which process does what, and how to look at it."""
    lines = [
        f"launcher  pid {os.getpid():<7} owns the guest: its memory and its CPU",
        *(f"{'worker':<9} pid {pid:<7} serves {name}" for name, pid in running.workers),
        f"look:  ps -o pid,ppid,args --ppid {os.getpid()}   |   strace -p {running.workers[0][1]}",
    ]
    if os.isatty(0):
        lines.append("the guest's prompt follows: try `help`, `blk read 0 8`, `poweroff`; three ^C end it too")
    print("".join(f"lgmp demo: {line}\n" for line in lines), end="", file=sys.stderr, flush=True)
