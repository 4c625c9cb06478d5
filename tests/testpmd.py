"""DPDK's testpmd as a front end of `lgmp serve net`: another driver for virtio, and another monitor's vhost-user.

Its virtio-user port needs no guest. Without huge pages DPDK's memory is a memfd, which is all that vhost-user needs.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

import pytest
from launching import HANGS_AFTER
from networks import GUEST_MAC, Namespace

from lgmp.network import format_mac

_PROMPT = "testpmd> "
# Of DPDK's memory, in MiB, and how many packets it has; each is a frame of the usual size.
_MEMORY = 64
_PACKETS = 8192

needs_testpmd = pytest.mark.skipif(shutil.which("dpdk-testpmd") is None, reason="dpdk-testpmd is not installed")


class Counts:
    """What testpmd's forwarding has done: frames received, sent, and those for which there was no room in the ring."""

    def __init__(self, said: str) -> None:
        """`said` when it was stopped."""
        received, sent, dropped = (
            re.findall(rf"{what}: +(\d+)", said) for what in ("RX-packets", "TX-packets", "TX-dropped")
        )
        # Those of all ports together come last.
        self.received, self.sent, self.dropped = int(received[-1]), int(sent[-1]), int(dropped[-1])


class Testpmd:
    """A testpmd with one port on a socket, which does as it is told."""

    __test__ = False

    def __init__(self, here: Namespace, socket: Path, options: str = "", *own: str) -> None:
        """`options` are those of the port, after a comma each; `own` are testpmd's."""
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        port = f"net_virtio_user0,path={socket},queues=1,mac={format_mac(GUEST_MAC)}{options}"
        command = [
            # One thread takes commands and one forwards; the kernel says where.
            *("dpdk-testpmd", "--lcores", f"(0,1)@({cpus})"),
            *("--no-huge", "-m", str(_MEMORY), "--no-shconf", "--no-pci", "--no-telemetry", "--vdev", port),
            "--log-level=pmd.net.virtio.init:info",
            *("--", "--interactive", "--no-numa", f"--total-num-mbufs={_PACKETS}", *own),
        ]
        self._terminal, terminal = os.openpty()
        # It leaves nothing in there but directories.
        environment = {**os.environ, "RUNTIME_DIRECTORY": str(socket.parent)}
        try:
            with here.entered():
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal, env=environment
                )
        finally:
            os.close(terminal)
        self.started = self._read_to_prompt()

    def __enter__(self) -> Testpmd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.quit()
        finally:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            os.close(self._terminal)

    def quit(self) -> None:
        """Have it end, in order."""
        self._say("quit")
        while self._read() is not None:
            pass
        assert self._process.wait(HANGS_AFTER) == 0

    def ask(self, command: str) -> str:
        """What it says to a command."""
        self._say(command)
        return self._read_to_prompt()

    def forward(self, mode: str) -> None:
        """Begin to forward frames from its port to its port."""
        self.ask(f"set fwd {mode}")
        assert f"{mode} packet forwarding" in self.ask("start")

    def stop(self) -> Counts:
        """Forward no more."""
        return Counts(self.ask("stop"))

    def _say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()

    def _read_to_prompt(self) -> str:
        said = ""
        while not said.endswith(_PROMPT):
            more = self._read()
            assert more is not None, f"testpmd has ended: {said}"
            said += more
        print(said)
        return said

    def _read(self) -> str | None:
        """More of what it says; None at its end."""
        assert select.select([self._terminal], [], [], HANGS_AFTER)[0], "testpmd hangs"
        try:
            return os.read(self._terminal, 65536).decode(errors="replace") or None
        except OSError:  # EIO: nobody has the other end
            return None
