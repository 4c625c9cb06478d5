"""Stand-ins for /dev/lguest (`lguest_device/`) as tests use them: started, looked at, and taken down."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType

import pytest
from launching import HANGS_AFTER
from lguest_device.log import Request, read_log

_TESTS = os.path.dirname(os.path.abspath(__file__))
_MNT_DETACH = 2

# The eras of the device, by the first kernel of each.
DEVICE_ERAS = ("2.6.25", "2.6.30", "2.6.31")
# The guests (a row of GUEST_ABIS) that run on each.
GUESTS_OF = {"2.6.25": "2.6.26", "2.6.30": "2.6.30", "2.6.31": "3.x"}

# For tests that need a stand-in: mounting it takes root.
needs_lguest_device = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"),
    reason="mounting a stand-in for /dev/lguest takes root and FUSE",
)


class LguestDevice:
    """A stand-in for /dev/lguest, of its own process, to be used in a `with`: `path` is the file.

    `era`: one of DEVICE_ERAS; `word`: the bytes of the launcher's unsigned long, if not the tests' own; `lines`: the
    interrupt lines that the kernel has; `guest_abi`: the guest's dialect (a row of GUEST_ABIS), if not what the era's
    own kernels speak, 2.6.26 or 3.x; `inject`: faults, as `lguest_device/__main__.py` has them.

    At its end it fails unless every file was released: each launcher has ended, each descriptor is closed.
    """

    def __init__(
        self,
        era: str = "2.6.31",
        *,
        word: int | None = None,
        lines: int | None = None,
        guest_abi: str | None = None,
        inject: Sequence[str] = (),
    ) -> None:
        # Whoever of us two dies, the other one leaves nothing behind: the log has no name, the directory two owners.
        self._log = os.memfd_create("lguest-device-log")
        self._directory = tempfile.mkdtemp(prefix="lguest-device-")
        self.path = os.path.join(self._directory, "lguest")
        options = ["--era", era, "--log", f"/proc/self/fd/{self._log}", "--remove"]
        for name, value in (("--word", word), ("--lines", lines), ("--guest-abi", guest_abi)):
            options += [name, str(value)] if value is not None else []
        for each in inject:
            options += ["--inject", each]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lguest_device", *options, self._directory],
            cwd=_TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._log,),
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"READY\n":
            self._take_down()
            raise AssertionError("the stand-in for /dev/lguest does not start")

    def __enter__(self) -> LguestDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = self._take_down()
        if kind is None:
            assert status == 0, f"not every open file was released, or the stand-in died: {status}"

    def requests(self, *operations: str) -> list[Request]:
        """The system calls that it has answered so far, in that order; of all operations, or of these."""
        return [each for each in self._read_log() if not operations or each.operation in operations]

    def _take_down(self) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            status = self.process.wait(HANGS_AFTER)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process.stdout.close()
        # It has done so itself, unless it was killed.
        ctypes.CDLL(None).umount2(os.fsencode(self._directory), _MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self._directory)
        os.close(self._log)
        return status

    def _read_log(self) -> list[Request]:
        return read_log(os.pread(self._log, os.fstat(self._log).st_size, 0))


def host_options(device: LguestDevice, era: str) -> tuple[str, ...]:
    """What has `lgmp run` use the device, spoken to as in that era, for a guest of that era."""
    return ("--host", "kernel", "--lguest-device", device.path, "--lguest-abi", era, "--guest-abi", GUESTS_OF[era])


# In a mount namespace of its own a device can have the name it has on a machine with the module; and this personality
# makes the kernel call itself 2.6.something.
AS_ON_SUCH_A_MACHINE = """
set -e
dev=$(mktemp -d)
mount -t tmpfs none "$dev"
for node in null zero full random urandom tty fuse; do touch "$dev/$node"; mount --bind /dev/$node "$dev/$node"; done
mkdir "$dev/pts" "$dev/shm"
mount --rbind /dev/pts "$dev/pts"
ln -s pts/ptmx "$dev/ptmx"
touch "$dev/lguest"
mount --bind "$0" "$dev/lguest"
mount --move "$dev" /dev
rmdir "$dev"
exec setarch --uname-2.6 "$@"
"""


def on_a_machine_with(device: LguestDevice) -> tuple[str, ...]:
    return ("unshare", "--mount", "sh", "-c", AS_ON_SUCH_A_MACHINE, device.path)
