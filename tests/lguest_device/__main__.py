"""python -m lguest_device --era ERA [OPTION...] DIRECTORY: mounts there, and serves DIRECTORY/lguest.

Prints READY once it does. Ends at SIGTERM, SIGINT or the end of stdin, so that it does not outlive whoever started it;
its exit status is then 0 if all open files were released, and 1 if not.

--inject WHAT:RESULT[@N] has a system call fail, or lie: WHAT is `open`, `read`, `write` or `write:REQUEST` (INITIALIZE,
IRQ, BREAK, EVENTFD); RESULT is an error's name, and then nothing else comes of the call, or =COUNT, for the answer of a
call that succeeds; N says which of those calls, counted from 1, and without it all.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .fuse import File, FuseServer
from .log import Log, Request
from .module import ERAS, GUESTS, LINES, REQUESTS, Call, Kernel, OpenFile

NAME = "lguest"
_FAULT = re.compile(r"(open|read|write(?::(INITIALIZE|IRQ|BREAK|EVENTFD))?):(?:(E[A-Z0-9]+)|=(\d+))(?:@(\d+))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong: an error's number, or a wrong count where there is none; in the Nth call, or (0) in all."""

    what: str
    number: int
    count: int
    occurrence: int


def fault(text: str) -> Fault:
    """Parse an --inject."""
    found = _FAULT.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WHAT:RESULT[@N]")
    what, _, name, count, occurrence = found.groups()
    number = getattr(errno, name, 0) if name else 0
    if (name and not number) or (count and not what.startswith("write")):
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such error, or no count to give")
    return Fault(what, number, int(count or 0), int(occurrence or 0))


class Device:
    """/dev/lguest: opens files, injects faults into their calls, and logs them."""

    def __init__(self, kernel: Kernel, faults: Sequence[Fault], log: Log | None) -> None:
        """A device without open files."""
        self._kernel = kernel
        self._faults = faults
        self._log = log
        self._seen: Counter[str] = Counter()
        self._opened = 0
        self._names = {number: f"write:{name}" for name, number in REQUESTS.items()}

    def open(self, thread: int) -> File:
        """open(2)."""
        self._opened += 1
        number = self._opened
        wrong = self.fault_for("open")
        if wrong is not None:
            self.note(Request(operation="open", file=number, thread=thread, result=-wrong.number))
            raise OSError(wrong.number, os.strerror(wrong.number))
        self.note(Request(operation="open", file=number, thread=thread))
        return LoggedFile(self, number, OpenFile(self._kernel))

    def note(self, request: Request) -> None:
        """Log a system call."""
        if self._log is not None:
            self._log.add(request)

    def fault_for(self, *names: str) -> Fault | None:
        """What is to go wrong in a call that goes by these names; to be asked once for each call."""
        self._seen.update(names)
        for each in self._faults:
            if each.what in names and each.occurrence in (0, self._seen[each.what]):
                return each
        return None

    def names_of(self, data: bytes) -> Sequence[str]:
        """What a write is called in faults."""
        request = int.from_bytes(data[: self._kernel.word], "little")
        return ("write", self._names[request]) if request in self._names else ("write",)


class LoggedFile:
    """An open file whose calls are logged, and go wrong as they are to."""

    def __init__(self, device: Device, number: int, file: OpenFile) -> None:
        """`number`: what the log calls it."""
        self._device = device
        self._number = number
        self._file = file

    def read(self, call: Call, size: int) -> None:
        """read(2)."""
        wrong = self._device.fault_for("read")
        self._watch(call, wrong, "read", size, b"")
        if wrong is not None:
            call.answer(-wrong.number)
        else:
            self._file.read(call, size)

    def write(self, call: Call, data: bytes) -> None:
        """write(2)."""
        wrong = self._device.fault_for(*self._device.names_of(data))
        self._watch(call, wrong, "write", len(data), data)
        if wrong is not None and wrong.number:
            call.answer(-wrong.number)
        else:
            self._file.write(call, data)

    def interrupt(self, call: Call) -> None:
        """A signal for the caller."""
        self._file.interrupt(call)

    def release(self, done: Callable[[], None]) -> None:
        """The last close(2)."""

        def ended() -> None:
            self._device.note(Request(operation="release", file=self._number, thread=0))
            done()

        self._file.release(ended)

    def _watch(self, call: Call, wrong: Fault | None, operation: str, size: int, sent: bytes) -> None:
        """Have the call's answer logged, and a wrong count given instead of a right one."""
        answer = call.answer

        def logged(result: int | bytes) -> None:
            if wrong is not None and not wrong.number and isinstance(result, int) and result >= 0:
                # More than was written is more than the kernel takes for an answer.
                result = min(wrong.count, size)
            self._device.note(
                Request(
                    operation=operation,
                    file=self._number,
                    thread=call.thread,
                    offset=call.offset,
                    size=size,
                    sent=sent,
                    result=result if isinstance(result, int) else len(result),
                    got=result if isinstance(result, bytes) else b"",
                )
            )
            answer(result)

        call.answer = logged


def main() -> int:
    """Serve to the end."""
    parser = argparse.ArgumentParser(prog="lguest_device", description=__doc__)
    parser.add_argument("--era", choices=ERAS, required=True)
    parser.add_argument("--word", type=int, choices=(4, 8), default=struct.calcsize("@L"))
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--guest-abi", choices=GUESTS)
    parser.add_argument("--log", metavar="FILE")
    parser.add_argument("--inject", type=fault, action="append", default=[])
    parser.add_argument("--remove", action="store_true", help="remove DIRECTORY at the end")
    parser.add_argument("directory")
    options = parser.parse_args()
    era = ERAS[options.era]
    kernel = Kernel(era, GUESTS[options.guest_abi or era.guest_abi], options.lines, options.word)
    device = Device(kernel, options.inject, Log(options.log) if options.log else None)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = FuseServer(options.directory, NAME, device.open, parallel=era.breaks)
    try:
        server.serve((0, ours.fileno()), lambda: print("READY", flush=True))
    finally:
        server.unmount()
        if options.remove:
            os.rmdir(options.directory)
    return 1 if server.open_files else 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    if any(thread.daemon for thread in threading.enumerate()):
        os._exit(status)  # a guest that is still running would have Python wait for it, or crash
    sys.exit(status)
