"""A virtio disk on a file or a block device: a request is a preadv, a pwritev or an fdatasync, in guest memory itself.

Nothing reaches past the end that the disk had at the start: a request that would is answered with IOERR and touches
nothing. What the disk under us fails to do is answered with IOERR too; only a request that is none is fatal.

Requests are done one after the other, in the ring's order, but for writes that are neighbours there and on the disk,
which are done by one system call. Where this process is killed, its successor begins with the first that is not
answered: a write that is done twice is a write, and a FLUSH comes after the writes that it came after. All rings are
served by this one process, so a FLUSH is for what was answered on any of them.

A driver of virtio 1.0 may cut a request into segments wherever it likes, an older one may not.
"""

from __future__ import annotations

import errno
import os

from lgmp import holes
from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS
from lgmp.errors import LgmpError, say
from lgmp.vectors import preadv, pwritev
from lgmp.virtio.block import (
    HEADER,
    HEADER_BYTES,
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEG,
    MAX_WRITE_ZEROES_SECTORS,
    MAX_WRITE_ZEROES_SEG,
    RANGE,
    RANGE_BYTES,
    SECTOR_BYTES,
    STATUS_BYTES,
    VIRTIO_BLK_F_BARRIER,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_BARRIER,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SCSI_CMD,
    VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
)
from lgmp.virtio.ids import VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1
from workers.device import BATCH, IOV_MAX, Complaints, Device, RequestDevice, RequestError, skip

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lgmp.virtio.ring import Request, Virtqueue
    from workers.runtime import Options

    # What a ring gives: the head, the segments to read and those to write.
    Chain = tuple[int, list[memoryview], list[memoryview]]

# What lseek(2) takes.
_OFFSET_MAX = (1 << 63) - 1
# Writes that are neighbours on the disk are done by one system call up to this size.
_TOGETHER_BYTES = 64 << 10
# So many requests are looked at and answered together: where this process is killed, more are not done again.
_GROUP = 16
# A driver that is told as they are done may have so many requests done before anything else is looked at.
_MOST_WHEN_TOLD_EARLY = 2 * BATCH
# Linux makes a request of few segments three of them: a header, data, and the status.
_FEW_SEGMENTS = 3
# Where the file system cannot make zeros, they are written, so many at a time.
_ZERO_BYTES = 1 << 20

_unpack_header = HEADER.unpack
_unpack_header_at = HEADER.unpack_from


class Block(RequestDevice):
    """A disk on any number of queues; a request is a header, data, and a status byte (virtio 1.0, section 5.2.6)."""

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
        self._may_write = not read_only  # without more ado
        self._any_layout = False
        self._tells_early = False
        # The kinds of request that go with a feature, where the driver accepted that.
        self._range_kinds: tuple[int, ...] = ()

    def accept(self, features: int) -> None:
        """A driver that took neither FLUSH nor BARRIER has no other way to make its writes safe: sync each."""
        super().accept(features)
        self._write_back = bool(features & (1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_BARRIER))
        self._may_write = self._write_back and not self.read_only
        self._any_layout = bool(features & (1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ANY_LAYOUT))
        self._tells_early = bool(features >> VIRTIO_F_VERSION_1 & 1)
        kinds = ((VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_T_DISCARD), (VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_WRITE_ZEROES))
        self._range_kinds = tuple(kind for feature, kind in kinds if features >> feature & 1)

    def serve(self) -> bool:
        """As every device of requests, with a way of its own for reads and writes."""
        more = False
        for number, queue in enumerate(self.queues):
            if self.serve_ring(number, queue):
                more = True
        return more

    def serve_ring(self, number: int, queue: Virtqueue) -> bool:
        """Answer what is in ring `number`, up to a limit; gives whether there is more.

        Raises RingError where the driver broke a rule.
        """
        early = self._tells_early
        # Who hears of a batch when it is done kicks for what comes after.
        left = _MOST_WHEN_TOLD_EARLY if early else min(queue.waiting, BATCH)
        view = queue.view
        # How many are to be done before the driver is told, are done since, and were done when it was told last.
        target = untold = told = 0
        given = 0
        peeks = True
        try:
            while left and (waiting := queue.waiting):
                if not untold:
                    # A modern driver runs beside us. It hears of half of what it has in flight, and goes on with that
                    # while the other half is done. To tell it costs as much as several requests.
                    target = min((waiting + told + 1) // 2 if early else waiting, left)
                most = min(waiting, left, _GROUP)
                requests = queue.peek(most, HEADER_BYTES, STATUS_BYTES) if peeks else None
                done = 0
                while requests and done < len(requests) and untold + done < target:
                    # Writes are cheaper together than told of early.
                    written = self._do_reads(view, requests[done : target - untold])
                    written = written or self._do_writes(view, requests[done:])
                    if not written:
                        break
                    queue.answer(written)
                    given += sum(written)
                    done += len(written)
                if not done:
                    # The next one is of another kind or shape, or one that fails.
                    chain = queue.pop()
                    if chain is None:
                        break  # the driver has taken back what it said
                    # Who cuts a request into many segments does the same to the next one, which `peek` would not show.
                    peeks = len(chain[1]) + len(chain[2]) <= _FEW_SEGMENTS
                    given += self._answer_one(number, queue, chain)
                    done = 1
                left -= done
                untold += done
                if untold >= target:
                    self.notifier.used(number)
                    told = untold
                    untold = 0
        finally:
            self.statistics[BYTES_IN] += given
            if untold:
                self.notifier.used(number)
        return queue.waiting > 0

    def _do_reads(self, view: memoryview, requests: Sequence[Request]) -> list[int]:
        """Do the reads that `requests` begin with, straight into the guest's pages: the hot path.

        Gives the number of bytes written for each that is done. What is no read, or fails, ends it.
        """
        read = preadv
        fd = self.fd
        disk_end = self.size
        written: list[int] = []
        for header, start, end, is_read, status in requests:
            kind, _, sector = _unpack_header_at(view, header)
            size = end - start
            offset = sector * SECTOR_BYTES
            if not is_read or kind != VIRTIO_BLK_T_IN or offset + size > disk_end or size % SECTOR_BYTES:
                break
            try:
                if read(fd, [view[start:end]], offset) != size:
                    break
            except OSError:
                break  # it fails again when it is done by itself, and is said
            view[status] = VIRTIO_BLK_S_OK
            written.append(size + STATUS_BYTES)
        return written

    def _do_writes(self, view: memoryview, requests: Sequence[Request]) -> list[int]:
        """Do the writes that `requests` begin with, neighbours on the disk by one system call; as `_do_reads`.

        A call costs much more than what it copies, other than that of a read.
        """
        segments: list[memoryview] = []
        start_of_run = place = 0
        count = done = written = 0
        for header, start, end, is_read, status in requests if self._may_write else ():
            kind, _, sector = _unpack_header_at(view, header)
            size = end - start
            offset = sector * SECTOR_BYTES
            if is_read or kind != VIRTIO_BLK_T_OUT or offset + size > self.size or size % SECTOR_BYTES:
                break
            if offset != place or place + size - start_of_run > _TOGETHER_BYTES:
                if not self._write_run(segments, start_of_run, place):
                    segments = []
                    break
                done = count
                segments = []
                if written >= _TOGETHER_BYTES:
                    break  # it is time to tell of these
                start_of_run = place = offset
            segments.append(view[start:end])
            place += size
            written += size
            view[status] = VIRTIO_BLK_S_OK  # the driver does not look before the answer
            count += 1
        if segments and self._write_run(segments, start_of_run, place):
            done = count
        return [STATUS_BYTES] * done

    def _write_run(self, segments: Sequence[memoryview], start: int, end: int) -> bool:
        """Write to the disk from byte `start` to byte `end`; gives whether that went well."""
        if not segments:
            return True
        try:
            if pwritev(self.fd, segments, start) != end - start:
                return False
        except OSError:
            return False  # which of them fails, and why, shows when each is done by itself
        self.statistics[BYTES_OUT] += end - start
        return True

    def _answer_one(self, number: int, queue: Virtqueue, chain: Chain) -> int:
        """Answer any request; gives how many bytes were given. Raises RingError."""
        head, readable, writable = chain
        try:
            given = self.handle(number, readable, writable)
        except RequestError as error:
            raise error.in_ring(queue.name, head) from error
        queue.push(head, given)
        return given

    def handle(self, queue: int, readable: list[memoryview], writable: list[memoryview]) -> int:  # noqa: ARG002
        """Answer one request; gives 1 for the status byte, and the number of bytes read.

        Raises RequestError for a request without a header or without a byte for the status, and where the driver may
        not choose its segments, for one where these are not 16 bytes and 1 byte by themselves.
        """
        if not readable or not writable:
            raise RequestError(f"Bad virtblk cmd {{head}} out={len(readable)} in={len(writable)}")
        first = readable.pop(0)
        header: memoryview | bytearray = first
        status = writable.pop()
        if len(header) != HEADER_BYTES or len(status) != STATUS_BYTES:
            if self._any_layout:
                header, readable = _split_header([first, *readable])
                status, writable = _split_status([*writable, status])
            elif len(header) != HEADER_BYTES:
                raise RequestError(
                    f"Bad iovec size {len(header)} for the header of a virtblk cmd, it is {HEADER_BYTES}"
                )
            else:
                raise RequestError(
                    f"Bad iovec size {len(status)} for the status of a virtblk cmd, it is {STATUS_BYTES}"
                )
        kind, _, sector = _unpack_header(header)
        if kind == VIRTIO_BLK_T_IN:
            # One that has several segments, or descriptors that do not lie side by side, and nothing else about it.
            size = len(writable[0]) if len(writable) == 1 else sum(map(len, writable))
            offset = sector * SECTOR_BYTES
            if offset + size <= self.size and not size % SECTOR_BYTES and len(writable) <= IOV_MAX:
                try:
                    if preadv(self.fd, writable, offset) == size:
                        status[0] = VIRTIO_BLK_S_OK
                        return size + STATUS_BYTES
                except OSError:
                    pass  # below it fails again, and is said
        return self._finish(kind, sector, readable, writable, status)

    def _finish(self, kind: int, sector: int, out: list[memoryview], into: list[memoryview], status: memoryview) -> int:
        """Do what a request asks for and say so in its status; gives how many bytes were written, that included."""
        code, written = self._answer(kind, sector, out, into)
        status[0] = code
        if code != VIRTIO_BLK_S_OK:
            self.statistics[ERRORS] += 1
        return written + 1

    def _answer(  # noqa: PLR0911  one for each kind
        self, kind: int, sector: int, out: list[memoryview], into: list[memoryview]
    ) -> tuple[int, int]:
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
            if kind in self._range_kinds:
                return self._clear(kind, out), 0
        except OSError as error:
            self._complain(f"{self.name}: {_what(kind)} at sector {sector}: {error.strerror or error}")
            return VIRTIO_BLK_S_IOERR, 0
        if base == VIRTIO_BLK_T_SCSI_CMD and not self._scsi_was_said:
            self._scsi_was_said = True
            self._say(f"{self.name}: Scsi commands unsupported")
        return VIRTIO_BLK_S_UNSUPP, 0

    def _extent(self, what: str, sector: int, size: int) -> int:
        """The offset in bytes of a transfer of `size` bytes; raises OSError where it is not whole sectors of the disk.

        `what` names it there, "Read" or "Write".
        """
        offset = sector * SECTOR_BYTES
        if size % SECTOR_BYTES:
            raise OSError(None, f"{size} bytes are not whole sectors")
        if offset + size > self.size:
            place = f"{what} past end {offset}+{size}" if offset <= _OFFSET_MAX else f"Bad seek to sector {sector}"
            raise OSError(None, f"{place}, the disk has {self.size // SECTOR_BYTES} sectors")
        return offset

    def _read(self, sector: int, segments: list[memoryview]) -> int:
        size = sum(map(len, segments))
        offset = self._extent("Read", sector, size)
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
        self._refuse_if_read_only()
        size = sum(map(len, segments))
        offset = self._extent("Write", sector, size)
        done = 0
        while done < size:
            segments = skip(segments, 0)
            count = pwritev(self.fd, segments[:IOV_MAX], offset + done)
            if not count:
                raise OSError(None, "nothing was written")
            done += count
            segments = skip(segments, count)
        self.statistics[BYTES_OUT] += size

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise OSError(None, "the disk is read-only")

    def _clear(self, kind: int, out: list[memoryview]) -> int:
        """DISCARD or WRITE_ZEROES: do it to all ranges in `out`, or to none; gives the status. Raises OSError."""
        self._refuse_if_read_only()
        discards = kind == VIRTIO_BLK_T_DISCARD
        flag = 0 if discards else VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        most = MAX_DISCARD_SECTORS if discards else MAX_WRITE_ZEROES_SECTORS
        most_ranges = MAX_DISCARD_SEG if discards else MAX_WRITE_ZEROES_SEG
        size = sum(map(len, out))
        if not size or size % RANGE_BYTES or size > most_ranges * RANGE_BYTES:
            raise OSError(None, f"{size} bytes are not 1 to {most_ranges} ranges of {RANGE_BYTES} bytes")
        ranges = []
        for sector, count, flags in RANGE.iter_unpack(b"".join(out)):
            if flags & ~flag:
                return VIRTIO_BLK_S_UNSUPP
            if count > most:
                raise OSError(None, f"{count} sectors at once, at most {most} may be")
            extent = self._extent(_what(kind).capitalize(), sector, count * SECTOR_BYTES)
            ranges.append((extent, count * SECTOR_BYTES, flags))
        for offset, count, flags in ranges:
            if count and discards:
                try:
                    holes.discard(self.fd, offset, count)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    return VIRTIO_BLK_S_UNSUPP  # the content is there still, as it may be
            elif count:
                self._zero(offset, count, unmap=bool(flags))
        if not self._write_back:
            os.fdatasync(self.fd)
        return VIRTIO_BLK_S_OK

    def _zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Make zeros of `size` bytes at `offset`, a hole where `unmap` allows it and the file system has holes."""
        for make in (holes.punch, holes.zero) if unmap else (holes.zero,):
            try:
                make(self.fd, offset, size)
            except OSError as error:
                if error.errno not in holes.CANNOT:
                    raise
            else:
                return
        zeros = memoryview(bytes(min(size, _ZERO_BYTES)))
        while size:
            count = pwritev(self.fd, [zeros[:size]], offset)
            if not count:
                raise OSError(None, "nothing was written")
            offset += count
            size -= count

    def _identify(self, into: list[memoryview]) -> int:
        done = 0
        for segment in into:
            part = self.serial[done : done + len(segment)]
            segment[: len(part)] = part
            done += len(part)
        return done


def _split_header(readable: list[memoryview]) -> tuple[bytearray, list[memoryview]]:
    """The header of a request, wherever its segments begin and end, and the data behind it. Raises RequestError."""
    header = bytearray()
    for segment in readable:
        header += segment[: HEADER_BYTES - len(header)]
    if len(header) < HEADER_BYTES:
        raise RequestError(f"{len(header)} bytes for the header of a virtblk cmd, it is {HEADER_BYTES}")
    return header, skip(readable, HEADER_BYTES)


def _split_status(writable: list[memoryview]) -> tuple[memoryview, list[memoryview]]:
    """The status of a request, the last byte that may be written, and the room before it. Raises RequestError."""
    into = [segment for segment in writable if segment]
    if not into:
        raise RequestError("0 bytes for the status of a virtblk cmd, it is 1")
    last = into.pop()
    if len(last) > STATUS_BYTES:
        into.append(last[:-STATUS_BYTES])
    return last[-STATUS_BYTES:], into


def _what(kind: int) -> str:
    if kind == VIRTIO_BLK_T_DISCARD:
        return "discard"
    if kind == VIRTIO_BLK_T_WRITE_ZEROES:
        return "write of zeros"
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
