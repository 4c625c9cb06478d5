"""What is behind a device while it is replayed: a copy of its disk, or the other end of its wires, as recorded."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import tempfile
from collections.abc import Iterable, Sequence
from itertools import pairwise

from lgmp.custom_device import describe
from lgmp.disk import SECTOR_BYTES, Disk
from lgmp.errors import LgmpError
from lgmp.tracing.decoding import Request, frame
from lgmp.tracing.events import Done, Take
from lgmp.tracing.recording import Header
from lgmp.virtio import block, console, ids, net

# As workers/net.py: the longest frame on a stream, each of which follows its length.
_MAX_FRAME = (1 << 16) + 64
_LENGTH_BYTES = 4
_READ_BYTES = 1 << 16
_OWN_WORKER = "workers.custom"
# The most bytes of a difference that are shown.
_SHOWN_BYTES = 16


class World:
    """What is behind a device; by itself there is nothing."""

    def __init__(
        self, header: Header, module: str, options: Sequence[str] = (), descriptors: Sequence[int] = ()
    ) -> None:
        """`module`, `options` and `descriptors` are the worker's."""
        self.header = header
        self.module = module
        self.options = list(options)
        self.descriptors = list(descriptors)

    def started(self) -> None:
        """The worker has been started, and has its descriptors."""

    def offered(self, take: Take) -> None:
        """A chain is about to be served."""

    def feed(self, request: Request) -> None:
        """The worker is about to give this answer: have what it takes for that come in."""

    def feed_unknown(self, request: Request) -> None:
        """As `feed`, where nobody has told what came in then: anything will do."""

    def passed_over(self, request: Request) -> None:
        """An answer has come that is compared with nothing."""

    def provoke(self) -> None:
        """The worker is to look at whatever it looks at only when something comes in."""

    def wants(self) -> Sequence[tuple[int, int]]:
        """What to poll for."""
        return ()

    def move(self) -> None:
        """Move what can be moved now."""

    def reset(self) -> None:
        """The device was reset."""

    def compare(self, request: Request, answer: Done) -> list[str]:
        """How `answer` differs from the one of the recording, `request.done`."""
        done = request.done
        assert done is not None
        return [*_different_length(done, answer), *_different_bytes("", done.data, answer.data)]

    def finish(self) -> list[str]:
        """What differs at the end."""
        return []


def _different_length(done: Done, answer: Done) -> list[str]:
    return [] if done.written == answer.written else [f"{answer.written} bytes were written, then {done.written}"]


def _different_bytes(what: str, then: bytes, now: bytes) -> list[str]:
    """Where two answers differ in what both have."""
    both = min(len(then), len(now))
    if then[:both] == now[:both]:
        return []
    at = next(index for index in range(both) if then[index] != now[index])
    count = sum(a != b for a, b in zip(then[:both], now[:both], strict=True))
    shown = slice(at, at + _SHOWN_BYTES)
    return [f"{what}{count} bytes differ, from byte {at} on: {now[shown].hex()}, then {then[shown].hex()}"]


class _Block(World):
    """A disk: the data that was read, and the status."""

    def compare(self, request: Request, answer: Done) -> list[str]:
        done = request.done
        assert done is not None
        found = _different_length(done, answer)
        if done.last != answer.last:
            found.append(f"the status is {answer.last}, then {done.last}")
        # The status byte counts as written, wherever it is; without data nothing else is.
        data = slice(0, max(0, min(done.written, answer.written) - block.STATUS_BYTES))
        for difference in _different_bytes("", done.data[data], answer.data[data]):
            found.append(_with_sector(request, difference, done.data[data], answer.data[data]))
        return found


def _with_sector(request: Request, difference: str, then: bytes, now: bytes) -> str:
    """A difference of what was read, and the first sector of the disk in which it is."""
    if len(request.take.data) < block.HEADER_BYTES:
        return difference
    kind, _, sector = block.HEADER.unpack_from(request.take.data)
    if kind & ~block.VIRTIO_BLK_T_BARRIER != block.VIRTIO_BLK_T_IN:
        return difference
    at = next(index for index in range(len(then)) if then[index] != now[index])
    return f"sector {sector + at // SECTOR_BYTES}: {difference}"


class _Pipe:
    """Our end of something that the worker reads from: what it is given waits until there is room."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        self._waiting = bytearray()
        os.set_blocking(descriptor, False)

    def give(self, data: bytes) -> None:
        self._waiting += data
        self.move()

    def wants(self) -> list[tuple[int, int]]:
        return [(self._fd, select.POLLOUT)] if self._waiting else []

    def move(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._fd, self._waiting[:_READ_BYTES])]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self._waiting.clear()  # the worker has ended, and that is told by others


class _Rng(World):
    """Random bytes: those of the recording."""

    def __init__(self, header: Header, stack: contextlib.ExitStack) -> None:
        source, ours = _pipe(stack)
        super().__init__(header, "workers.rng", ("--source-fd", str(source), "--", "the recording"), (source,))
        self._source = _Pipe(ours)

    def feed(self, request: Request) -> None:
        if request.done is not None:
            self._source.give(request.done.data)

    def feed_unknown(self, request: Request) -> None:
        if request.take.writable:
            self._source.give(b"\0")

    def wants(self) -> Sequence[tuple[int, int]]:
        return self._source.wants()

    def move(self) -> None:
        self._source.move()


class _Console(World):
    """A console: what was typed comes in, what the guest wrote has to come out."""

    def __init__(self, header: Header, stack: contextlib.ExitStack) -> None:
        theirs_in, ours_in = _pipe(stack)
        ours_out, theirs_out = _pipe(stack)
        options = ("--input-fd", str(theirs_in), "--output-fd", str(theirs_out))
        super().__init__(header, "workers.console", options, (theirs_in, theirs_out))
        self._typed = _Pipe(ours_in)
        self._out = ours_out
        os.set_blocking(ours_out, False)
        # What came out and what has to, as far as they are not compared; and how much has been and was the same.
        self._written = bytearray()
        self._expected = bytearray()
        self._same = 0
        self._differs = False
        # Of each chain that is under way: how much has to have come out when it is given back.
        self._until: dict[int, int] = {}

    def feed(self, request: Request) -> None:
        if request.take.queue == console.INPUT_QUEUE and request.done is not None:
            self._typed.give(request.done.data)

    def offered(self, take: Take) -> None:
        if take.queue == console.OUTPUT_QUEUE:
            self._expected += take.data
            self._until[take.head] = self._same + len(self._expected)

    def feed_unknown(self, request: Request) -> None:
        if request.take.queue == console.INPUT_QUEUE and request.take.writable:
            self.provoke()

    def provoke(self) -> None:
        self._typed.give(b"\n")

    def wants(self) -> Sequence[tuple[int, int]]:
        return [*self._typed.wants(), (self._out, select.POLLIN)]

    def move(self) -> None:
        self._typed.move()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._out, _READ_BYTES):
                self._written += data

    def compare(self, request: Request, answer: Done) -> list[str]:
        found = super().compare(request, answer)
        if request.take.queue == console.OUTPUT_QUEUE and not self._differs:
            # When it is given back it has been written.
            self.move()
            both = min(len(self._expected), len(self._written))
            different = _different_bytes("its output: ", bytes(self._expected[:both]), bytes(self._written[:both]))
            del self._expected[:both]
            del self._written[:both]
            self._same += both
            missing = self._until.pop(request.take.head, 0) - self._same
            if missing > 0 and not different:
                different = [f"its output: {missing} of {len(request.take.data)} bytes did not come out"]
            self._differs = bool(different)
            found += different
        return found

    def reset(self) -> None:
        self._until.clear()

    def finish(self) -> list[str]:
        self.move()
        more = len(self._written) - len(self._expected)
        return [f"its output: {more} bytes came out that the guest has not written"] if more > 0 else []


class _Net(World):
    """A network: the frames for the guest come in, those of the guest have to come out."""

    def __init__(self, header: Header, stack: contextlib.ExitStack) -> None:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        options = ("--stream-fd", str(theirs.fileno()), "--", "the recording")
        super().__init__(header, "workers.net", options, (theirs.fileno(),))
        self._theirs = theirs
        self._fd = ours.fileno()
        self._sent = _Pipe(self._fd)
        self._received = bytearray()

    def started(self) -> None:
        self._theirs.close()

    def feed(self, request: Request) -> None:
        if request.take.queue == net.RECEIVE_QUEUE and request.done is not None:
            data, _size = frame(request)
            self._sent.give(len(data).to_bytes(_LENGTH_BYTES, "big") + data)

    def feed_unknown(self, request: Request) -> None:
        if request.take.queue == net.RECEIVE_QUEUE:
            self.provoke()

    def passed_over(self, request: Request) -> None:
        if request.take.queue == net.TRANSMIT_QUEUE and 0 < frame(request)[1] <= _MAX_FRAME:
            self.move()
            self._next_frame()

    def reset(self) -> None:
        # What was sent of requests that were not given back.
        self.move()
        while self._next_frame() is not None:
            pass

    def provoke(self) -> None:
        data = bytes(60)
        self._sent.give(len(data).to_bytes(_LENGTH_BYTES, "big") + data)

    def wants(self) -> Sequence[tuple[int, int]]:
        events = select.POLLIN
        for _fd, more in self._sent.wants():
            events |= more
        return [(self._fd, events)]

    def move(self) -> None:
        self._sent.move()
        try:
            while data := os.read(self._fd, _READ_BYTES):
                self._received += data
        except BlockingIOError:
            pass
        except ConnectionResetError:
            pass  # the worker has ended, and that is told by others

    def _next_frame(self) -> bytes | None:
        end = _LENGTH_BYTES + int.from_bytes(self._received[:_LENGTH_BYTES], "big")
        if len(self._received) < max(_LENGTH_BYTES, end):
            return None
        data = bytes(self._received[_LENGTH_BYTES:end])
        del self._received[:end]
        return data

    def compare(self, request: Request, answer: Done) -> list[str]:
        done = request.done
        assert done is not None
        found = _different_length(done, answer)
        if request.take.queue == net.RECEIVE_QUEUE:
            # The header is the tap's, which may have had offloads.
            return found + _different_bytes(
                "its frame: ", done.data[net.HEADER_BYTES :], answer.data[net.HEADER_BYTES :]
            )
        then, size = frame(request)
        if not 0 < size <= _MAX_FRAME:
            return found  # no wire takes that
        self.move()
        now = self._next_frame()
        if now is None:
            return [*found, f"its frame of {size} bytes did not come out"]
        if len(now) != len(then):
            found.append(f"its frame came out with {len(now)} bytes, then {len(then)}")
        return found + _different_bytes("its frame: ", then, now)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


# --device


def build(header: Header, device: str | None, stack: contextlib.ExitStack) -> World:
    """What `--device` says, or else the recording; `stack` closes it. Raises LgmpError, with the remedy."""
    if device is None:
        device = _default(header)
    kind, *settings = device.split(",")
    if kind == "block":
        return _block(header, settings, stack)
    if kind in ("net", "console", "rng"):
        if settings:
            raise LgmpError(f"--device {device}: {kind} has no settings, the recording is what is behind it")
        wanted = {"net": net.QUEUES, "console": console.QUEUES, "rng": 1}[kind]
        _check_queues(header, kind, wanted)
        return {"net": _Net, "console": _Console, "rng": _Rng}[kind](header, stack)
    if ":" in kind:
        return _own(header, device)
    raise LgmpError(
        f"--device {kind}: there is block,disk=FILE, net, console, rng, and MODULE:CLASS for one of your own"
    )


def _default(header: Header) -> str:
    if header.worker == _OWN_WORKER:
        # Not as in the recording: whoever made that is not to choose what runs here.
        raise LgmpError("it is of a device of somebody's own: say which that is with --device MODULE:CLASS[,...]")
    if header.type == ids.VIRTIO_ID_BLOCK:
        raise LgmpError(
            "a disk has to be given, as it was when the recording began: --device block,disk=FILE (it is copied)"
        )
    return header.kind


def _own(header: Header, device: str) -> World:
    described = describe(device)
    _check_queues(header, device, described.queue_count)
    return World(header, _OWN_WORKER, ("--kind", described.kind, "--", device))


def _check_queues(header: Header, kind: str, wanted: int) -> None:
    if len(header.queues) != wanted:
        raise LgmpError(f"--device {kind} has {wanted} rings, the recorded {header.kind} has {len(header.queues)}")


def _block(header: Header, settings: Sequence[str], stack: contextlib.ExitStack) -> World:
    path = None
    read_only = bool(header.offered >> block.VIRTIO_BLK_F_RO & 1)
    in_place = False
    for setting in settings:
        name, _, value = setting.partition("=")
        if name == "disk" and value:
            path = value
        elif setting == "ro":
            read_only = True
        elif setting == "inplace":
            in_place = True
        else:
            raise LgmpError(f"--device block has no setting {setting!r}; it has disk=FILE, ro and inplace")
    if path is None:
        raise LgmpError("--device block needs disk=FILE, the disk as it was when the recording began")
    _check_queues(header, "block", 1)
    disk = stack.enter_context(Disk.open(path, read_only=read_only or not in_place))
    _check_capacity(header, path, disk)
    descriptor = disk.descriptor
    if not read_only and not in_place:
        descriptor = _copy(path, disk, stack)
    options = [
        *(("--read-only",) if read_only else ()),
        *("--disk-fd", str(descriptor)),
        *("--serial", _serial(header)),
        *("--", path),
    ]
    return _Block(header, "workers.block", options, (descriptor,))


def _check_capacity(header: Header, path: str, disk: Disk) -> None:
    capacity = int.from_bytes(header.config[:8], "little")
    if len(header.config) >= 8 and disk.sectors != capacity:
        raise LgmpError(
            f"the disk {path} has {disk.sectors} sectors, the recorded one had {capacity}: it is not the same disk"
        )


def _serial(header: Header) -> str:
    """What the recorded worker answered GET_ID with, as workers/block.py finds it."""
    options = list(header.options)
    own, arguments = options, []
    if "--" in options:
        at = options.index("--")
        own, arguments = options[:at], options[at + 1 :]
    for name, value in pairwise(own):
        if name == "--serial":
            return value
    for option in own:
        if option.startswith("--serial="):
            return option.partition("=")[2]
    return (os.path.basename(arguments[0]) if arguments else "") or header.device


def _copy(path: str, disk: Disk, stack: contextlib.ExitStack) -> int:
    """A private copy of a disk, with its holes, that is gone when it is closed."""
    try:
        copy = stack.enter_context(tempfile.TemporaryFile(prefix="lgmp-replay-"))  # noqa: SIM115
        size = os.lseek(disk.descriptor, 0, os.SEEK_END)
        os.ftruncate(copy.fileno(), size)
        for start, end in _extents(disk.descriptor, size):
            _copy_range(disk.descriptor, copy.fileno(), start, end)
    except OSError as error:
        raise LgmpError(
            f"cannot copy {path} to {tempfile.gettempdir()}: {error.strerror}; with TMPDIR it goes elsewhere, and with "
            "--device block,...,inplace there is no copy"
        ) from error
    return copy.fileno()


def _extents(descriptor: int, size: int) -> Iterable[tuple[int, int]]:
    """Where a file has data."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # a hole to the end
            start, end = end, size  # a block device, or a file system without holes
        yield start, end


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        data = os.pread(source, min(1 << 20, end - start), start)
        if not data:
            return
        done = 0
        while done < len(data):
            done += os.pwrite(target, data[done:], start + done)
        start += len(data)
