"""`lgmp stop`, `pause`, `resume` and `restart-worker`: commands to a guest that runs, over its control socket.

Each returns once what it asks for has come about, or raises LgmpError.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import Any

from lgmp.control_socket import GoneError, Guest, find_guest
from lgmp.errors import LgmpError

# Seconds for something to come about that usually takes milliseconds, and from one look to the next.
_PATIENCE = 10.0
_LOOK_EVERY = 0.01


def stop(which: str | None) -> int:
    """End a guest, and wait until its launcher has ended."""
    guest = find_guest(which)
    end = _EndOfLauncher(guest)
    guest.request("stop")
    end.wait()
    return 0


def pause(which: str | None) -> int:
    """Have a guest stand still until it is resumed, and wait until it does."""
    guest = find_guest(which)
    guest.request("pause")
    status = _wait_for(guest, lambda status: status["state"] != "pausing")
    if status is None:
        raise LgmpError(f"guest {guest.name} does not stand still yet: it waits for a device; `lgmp ps` shows them")
    return 0


def resume(which: str | None) -> int:
    """Have a guest that was paused go on."""
    find_guest(which).request("resume")
    return 0


def restart_worker(name: str, which: str | None) -> int:
    """Replace a worker by a new one, and wait until that serves the device."""
    guest = find_guest(which)
    before = _worker(guest, name)["restarts"]
    guest.request("restart-worker", name)

    def is_there(_status: dict[str, Any]) -> bool:
        worker = _worker(guest, name)
        if worker["restarts"] > before and worker["state"] == "given up":
            raise LgmpError(str(worker["error"]))
        return bool(worker["restarts"] > before and worker["state"] == "running")

    if _wait_for(guest, is_there) is None:
        raise LgmpError(f"the new worker of {name} is not there yet; `lgmp ps` shows what it does")
    return 0


def _worker(guest: Guest, name: str) -> dict[str, Any]:
    assert guest.status is not None
    workers: list[dict[str, Any]] = guest.status["workers"]
    for worker in workers:
        if worker["name"] == name:
            return worker
    names = ", ".join(worker["name"] for worker in workers)
    raise LgmpError(f"guest {guest.name} has no device {name}; it has {names}")


def _wait_for(guest: Guest, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The first status of which something is so, None if that takes too long. Raises LgmpError where the guest ends."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        status = guest.refresh()
        if is_so(status):
            return status
        if status["state"] == "ending":
            raise GoneError(f"guest {guest.name} is about to end")
        time.sleep(_LOOK_EVERY)
    return None


class _EndOfLauncher:
    """Waits until a launcher has exited, whether or not anybody has asked for its exit status."""

    def __init__(self, guest: Guest) -> None:
        """It is there when this is made."""
        self._pid = guest.pid
        self._pidfd: int | None = None
        self._started: bytes | None = None
        self._connection = guest.connection
        if self._connection is None or not self._connection.same_processes:
            return
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except (AttributeError, OSError):  # before Linux 5.3, or it has ended just now
            self._started = self._when_started()

    def wait(self) -> None:
        if self._connection is not None and self._pidfd is None and self._started is None:
            # All that can be seen of it from here is that it closes this, which it does last.
            _wait_until_readable(self._connection.fileno())
        if self._pidfd is not None:
            _wait_until_readable(self._pidfd)
            os.close(self._pidfd)
        while self._started is not None and self._when_started() == self._started:
            time.sleep(_LOOK_EVERY)

    def _when_started(self) -> bytes | None:
        """In the system's words; None where it has ended."""
        try:
            with open(f"/proc/{self._pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return None
        # proc(5): state and starttime are the fields 3 and 22.
        return None if fields[0] in (b"Z", b"X") else fields[19]


def _wait_until_readable(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
