"""What is known of the system calls that came in: a line of JSON for each, written before it is answered."""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A system call on the device.

    `operation` is open, read, write or release; `file` counts the opens, from 1; `thread` is the caller's id (0 for
    release); `offset` is in the file. `sent` is what was written, `size` its length or that of the reader's buffer.
    `result` is what the call returned, -errno where it failed, and `got` the bytes that it read.
    """

    operation: str
    file: int
    thread: int
    offset: int = 0
    size: int = 0
    sent: bytes = b""
    result: int = 0
    got: bytes = b""

    @property
    def error(self) -> str | None:
        """The name of the error, as in errno.h."""
        return errno.errorcode[-self.result] if self.result < 0 else None


class Log:
    """Written by several threads."""

    def __init__(self, path: str) -> None:
        """`path` is made anew."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()

    def add(self, request: Request) -> None:
        """Note that this is about to be answered."""
        line = json.dumps({**asdict(request), "sent": request.sent.hex(), "got": request.got.hex()})
        with self._lock:
            os.write(self._fd, line.encode() + b"\n")


def read_log(data: bytes) -> list[Request]:
    """What a log of that content says."""
    lines = [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
    return [
        Request(**{**each, "sent": bytes.fromhex(each["sent"]), "got": bytes.fromhex(each["got"])}) for each in lines
    ]
