"""A virtio disk on a file or a block device: a request is a preadv, a pwritev or an fdatasync, in guest memory itself.

Nothing reaches past the end that the disk had at the start: a request that would is answered with IOERR and touches
nothing. What the disk under us fails to do is answered with IOERR too; only a request that is none is fatal.

Requests are done one after the other, in the ring's order, so at most one is in flight. Where this process is killed in
the middle of one, its successor does that one first, from its beginning: a write that is done twice is a write, and a
FLUSH comes after the writes that it came after.
"""

from __future__ import annotations

import os

from lgmp.control import BYTES_OUT, ERRORS
from lgmp.errors import LgmpError, say
from lgmp.vectors import preadv, pwritev
from lgmp.virtio.block import (
    HEADER,
    HEADER_BYTES,
    SECTOR_BYTES,
    STATUS_BYTES,
    VIRTIO_BLK_F_BARRIER,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_BARRIER,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SCSI_CMD,
)
from workers.device import IOV_MAX, Complaints, Device, RequestDevice, RequestError, skip

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.runtime import Options

# What lseek(2) takes.
_OFFSET_MAX = (1 << 63) - 1

_unpack_header = HEADER.unpack


class Block(RequestDevice):
    """A disk. One queue; a request is a header, data, and a status byte (virtio 1.0, section 5.2.6)."""

    def __init__(
        self,
        fd: int,
        *,
        size: int,
        serial: str,
        read_only: bool = False,
        name: str = "vda",
        say: Callable[[str], None] = say,
    ) -> None:
        """Serve the file `fd`, of which the first `size` bytes are the disk (rounded down to whole sectors).

        `serial` is the answer to GET_ID, its first 20 bytes. `name` begins what is told to the user through `say`.
        """
        super().__init__()
        self.fd = fd
        self.size = size - size % SECTOR_BYTES
        self.serial = serial.encode(errors="replace")[:VIRTIO_BLK_ID_BYTES].ljust(VIRTIO_BLK_ID_BYTES, b"\0")
        self.read_only = read_only
        self.name = name
        self._say = say
        self._complain = Complaints(say)
        self._scsi_was_said = False
        # Whether the driver can ask for its writes to be made safe; where it cannot, each is.
        self._write_back = True
        self._written = 0  # bytes that are not counted yet

    def serve(self) -> bool:
        """As every device of requests."""
        try:
            return super().serve()
        finally:
            if self._written:
                self.statistics[BYTES_OUT] += self._written
                self._written = 0

    def accept(self, features: int) -> None:
        """A driver that took neither FLUSH nor BARRIER has no other way to make its writes safe: sync each."""
        super().accept(features)
        self._write_back = bool(features & (1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_BARRIER))

    def handle(self, queue: int, readable: list[memoryview], writable: list[memoryview]) -> int:  # noqa: ARG002
        """Answer one request; gives 1 for the status byte, and the number of bytes read.

        Raises RequestError for a request without a 16-byte header or without a status byte of its own.
        """
        if not readable or not writable:
            raise RequestError(f"Bad virtblk cmd {{head}} out={len(readable)} in={len(writable)}")
        header = readable[0]
        status = writable.pop()
        if len(header) != HEADER_BYTES:
            raise RequestError(f"Bad iovec size {len(header)} for the header of a virtblk cmd, it is {HEADER_BYTES}")
        if len(status) != STATUS_BYTES:
            raise RequestError(f"Bad iovec size {len(status)} for the status of a virtblk cmd, it is {STATUS_BYTES}")
        kind, _, sector = _unpack_header(header)
        if kind == VIRTIO_BLK_T_IN:
            # The hot path: one read, straight into the guest's pages.
            size = len(writable[0]) if len(writable) == 1 else sum(map(len, writable))
            offset = sector * SECTOR_BYTES
            if offset + size <= self.size and not size % SECTOR_BYTES and len(writable) <= IOV_MAX:
                try:
                    if preadv(self.fd, writable, offset) == size:
                        status[0] = VIRTIO_BLK_S_OK
                        return size + 1
                except OSError:
                    pass  # below it fails again, and is said
        code, written = self._answer(kind, sector, readable[1:], writable)
        status[0] = code
        if code != VIRTIO_BLK_S_OK:
            self.statistics[ERRORS] += 1
        return written + 1

    def _answer(self, kind: int, sector: int, out: list[memoryview], into: list[memoryview]) -> tuple[int, int]:
        """Do what a request asks for; gives its status and how many bytes of `into` were written."""
        barrier = kind & VIRTIO_BLK_T_BARRIER
        # BARRIER and OUT are bits that go with any kind: Linux has sent FLUSH with and without OUT.
        base = kind & ~(VIRTIO_BLK_T_BARRIER | VIRTIO_BLK_T_OUT)
        try:
            if barrier:
                os.fdatasync(self.fd)
            if base == VIRTIO_BLK_T_IN and kind & VIRTIO_BLK_T_OUT:
                self._write(sector, out)
                if barrier or not self._write_back:
                    os.fdatasync(self.fd)
                return VIRTIO_BLK_S_OK, 0
            if base == VIRTIO_BLK_T_IN:
                return VIRTIO_BLK_S_OK, self._read(sector, into)
            if base == VIRTIO_BLK_T_FLUSH:
                os.fdatasync(self.fd)
                return VIRTIO_BLK_S_OK, 0
            if kind == VIRTIO_BLK_T_GET_ID:
                return VIRTIO_BLK_S_OK, self._identify(into)
        except OSError as error:
            self._complain(f"{self.name}: {_what(kind)} at sector {sector}: {error.strerror or error}")
            return VIRTIO_BLK_S_IOERR, 0
        if base == VIRTIO_BLK_T_SCSI_CMD and not self._scsi_was_said:
            self._scsi_was_said = True
            self._say(f"{self.name}: Scsi commands unsupported")
        return VIRTIO_BLK_S_UNSUPP, 0

    def _extent(self, what: str, sector: int, segments: Sequence[memoryview]) -> tuple[int, int]:
        """The offset and size in bytes of a transfer; raises OSError where it is not whole sectors of the disk.

        `what` names it there, "Read" or "Write".
        """
        size = sum(map(len, segments))
        offset = sector * SECTOR_BYTES
        if size % SECTOR_BYTES:
            raise OSError(None, f"{size} bytes are not whole sectors")
        if offset + size > self.size:
            place = f"{what} past end {offset}+{size}" if offset <= _OFFSET_MAX else f"Bad seek to sector {sector}"
            raise OSError(None, f"{place}, the disk has {self.size // SECTOR_BYTES} sectors")
        return offset, size

    def _read(self, sector: int, segments: list[memoryview]) -> int:
        offset, size = self._extent("Read", sector, segments)
        done = 0
        while done < size:
            segments = skip(segments, 0)
            count = preadv(self.fd, segments[:IOV_MAX], offset + done)
            if not count:
                raise OSError(None, "the file has become shorter than the disk")
            done += count
            segments = skip(segments, count)
        return size

    def _write(self, sector: int, segments: list[memoryview]) -> None:
        if self.read_only:
            raise OSError(None, "the disk is read-only")
        offset, size = self._extent("Write", sector, segments)
        done = 0
        while done < size:
            segments = skip(segments, 0)
            count = pwritev(self.fd, segments[:IOV_MAX], offset + done)
            if not count:
                raise OSError(None, "nothing was written")
            done += count
            segments = skip(segments, count)
        self._written += size

    def _identify(self, into: list[memoryview]) -> int:
        done = 0
        for segment in into:
            part = self.serial[done : done + len(segment)]
            segment[: len(part)] = part
            done += len(part)
        return done


def _what(kind: int) -> str:
    base = kind & ~(VIRTIO_BLK_T_BARRIER | VIRTIO_BLK_T_OUT)
    if base == VIRTIO_BLK_T_FLUSH:
        return "flush"
    return "write" if kind & VIRTIO_BLK_T_OUT else "read"


def _make(options: Options) -> Device:
    if "disk-fd" not in options.own:
        raise LgmpError("a disk needs --disk-fd")
    fd = options.number("disk-fd")
    try:
        # The end of a block device is where it seeks to; fstat does not know it.
        size = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise LgmpError(f"{options.name}: not a disk: {error.strerror}") from error
    if "capacity" in options.own:
        size = min(size, options.number("capacity") * SECTOR_BYTES)
    image = options.arguments[0] if options.arguments else ""
    return Block(
        fd,
        size=size,
        serial=options.own.get("serial") or os.path.basename(image) or options.name,
        read_only="read-only" in options.own,
        name=options.name,
    )


def main() -> None:
    """Serve a disk: `python -m workers.block --help` says how."""
    from workers.runtime import run  # noqa: PLC0415  the device above is of use without a process around it

    run(
        "block",
        _make,
        {
            "disk-fd=": "the open disk",
            "read-only": "refuse writes",
            "serial=": "the answer to GET_ID",
            "capacity=": "in 512-byte sectors, where it is less than the whole disk",
        },
    )


if __name__ == "__main__":
    main()
