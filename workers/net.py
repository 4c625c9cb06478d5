"""A virtio network device on a tap, or on a stream to a user-mode network stack.

On a tap that knows the virtio header a frame is one readv or one writev, straight into or out of guest memory, header
and all. A frame that is longer than the guest's buffer is dropped whole; one that the tap does not take is dropped, as
on any wire. What the guest did not accept it is not sent.

While the guest has no buffer nothing is read: frames wait in the tap, which drops what is too much, until its kick.
While the other side takes nothing the guest's frames wait in its ring.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select

from lgmp.errors import LgmpError, say
from lgmp.tap import TUNSETOFFLOAD, may_be_given, offloads_for
from lgmp.virtio.ids import VIRTIO_F_ANY_LAYOUT
from lgmp.virtio.net import HEADER_BYTES, QUEUES, RECEIVE_QUEUE, TRANSMIT_QUEUE
from lgmp.virtio.ring import RingError
from workers.device import BATCH, IOV_MAX, Complaints, Device, skip

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from workers.runtime import Options

    class Link(Protocol):
        """Where frames come from and go to. Segments begin with the virtio header. OSError: the link is broken."""

        fd: int

        @property
        def buffered(self) -> bool:
            """Whether there is a frame to receive that poll(2) does not know of."""

        def accept(self, features: int) -> None:
            """Hand out no frames but such as a driver can take that accepted `features`."""

        def fill(self) -> None:
            """The link is readable: read, if that is not done for each frame."""

        def receive(self, segments: list[memoryview], room: int) -> int:
            """Take a frame into `segments`, which have `room` bytes; may change the list.

            Gives the bytes of header and frame: more than `room` for a frame that does not fit and is lost, NOTHING
            where there is none now, NOT_FOR_IT for one that is lost since the driver cannot take such.
            """

        def send(self, segments: list[memoryview]) -> bool:
            """Send a frame; False where it has to wait until the link is writable. DroppedError: it is lost."""

        def flush(self) -> bool:
            """Go on with a frame that was sent in part; False where the rest waits until the link is writable."""

        def forget(self) -> None:
            """The device was reset: lose the frames that wait."""


# What Link.receive gives instead of a length.
NOTHING = 0
NOT_FOR_IT = -1

_readv = os.readv
_writev = os.writev

# How many frames a reset drops at most; more than any tap queues by itself, and an end to a flood.
_FORGET_FRAMES = 4096
# On the stream each frame follows its length in bytes, 32 bits, big-endian.
_LENGTH_BYTES = 4
# The longest frame on the stream: the longest IP packet and what Ethernet puts before it, with room.
MAX_FRAME = (1 << 16) + 64
# How much is read from a stream at once.
_STREAM_BYTES = 1 << 18


class DroppedError(Exception):
    """The link did not take a frame; why is for the user."""


class Tap:
    """A tap that does not block, opened with IFF_NO_PI."""

    buffered = False

    def __init__(self, fd: int, *, has_header: bool) -> None:
        """`has_header`: whether it was opened with IFF_VNET_HDR, and headers of 10 bytes."""
        self.fd = fd
        self._has_header = has_header
        self._offloads = 0
        self._beyond = memoryview(bytearray(1))
        self._scratch = [memoryview(bytearray(HEADER_BYTES))]

    def accept(self, features: int) -> None:
        """Tell the tap what it may hand out."""
        self._offloads = offloads_for(features) if self._has_header else 0
        if self._has_header:
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, self._offloads)

    def fill(self) -> None:
        """A tap is read frame by frame."""

    def receive(self, segments: list[memoryview], room: int) -> int:
        """One readv. A byte beyond the buffer tells a frame that fits from one of which the tap lost the rest."""
        segments.append(self._beyond)
        try:
            if self._has_header:
                count = _readv(self.fd, segments)
            else:
                count = _readv(self.fd, skip(segments, HEADER_BYTES)) + HEADER_BYTES
        except (BlockingIOError, InterruptedError):
            return NOTHING
        finally:
            segments.pop()
        if count > room:
            return count
        if not self._has_header:
            _put(segments, bytes(HEADER_BYTES))
            return count
        first = segments[0]
        if len(first) >= 2 and not first[0] and not first[1]:  # flags, gso_type: nothing special
            return count
        return count if self._fits_driver(segments) else NOT_FOR_IT

    def _fits_driver(self, segments: list[memoryview]) -> bool:
        """Whether the driver can take what the header says; a header that says too much is mended if it can be."""
        header = _get(segments, HEADER_BYTES)
        if not may_be_given(header[0], header[1], self._offloads):
            return False
        if header[0] and not self._offloads:  # "the checksum is right" is news to this driver
            _put(segments, b"\0")
        return True

    def send(self, segments: list[memoryview]) -> bool:
        """One writev."""
        try:
            _writev(self.fd, segments if self._has_header else skip(segments, HEADER_BYTES))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno == errno.EBADFD:
                raise
            raise DroppedError(_not_taken(error)) from error
        return True

    def flush(self) -> bool:
        """A tap takes a frame or does not."""
        return True

    def forget(self) -> None:
        """Have the tap hand out plain frames, and drop those it has."""
        self.accept(0)
        for _ in range(_FORGET_FRAMES):
            try:
                _readv(self.fd, self._scratch)
            except (BlockingIOError, InterruptedError):
                return


def _not_taken(error: OSError) -> str:
    match error.errno:
        case errno.EIO:
            return "the tap is down"
        case errno.EINVAL:
            return "the tap does not take a frame like this"
    return f"the tap does not take a frame: {error.strerror or error}"


class Stream:
    """A stream socket to a user-mode stack (passt): each frame follows its length. There are no offloads."""

    def __init__(self, fd: int) -> None:
        """`fd` is made non-blocking."""
        self.fd = fd
        os.set_blocking(fd, False)
        self._data = bytearray(_STREAM_BYTES)
        self._view = memoryview(self._data)
        self._start = self._end = 0  # what was read and not handed out yet
        self._rest = bytearray()  # of a frame that was begun to be sent

    @property
    def buffered(self) -> bool:
        """Whether a whole frame waits here."""
        return self._next() is not None

    def accept(self, features: int) -> None:
        """Frames are plain, whatever the driver takes."""

    def _next(self) -> int | None:
        """The length of the next frame, if it is here as a whole. Raises OSError where the length is impossible."""
        have = self._end - self._start
        if have < _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._view[self._start : self._start + _LENGTH_BYTES], "big")
        if not 0 < length <= MAX_FRAME:
            raise OSError(errno.EPROTO, f"it sent a frame of {length} bytes")
        return length if have >= _LENGTH_BYTES + length else None

    def fill(self) -> None:
        """Read what there is and has room here, once."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start > _STREAM_BYTES // 2 or self._end == _STREAM_BYTES:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        if self._end == _STREAM_BYTES:
            return
        try:
            count = _readv(self.fd, [self._view[self._end :]])
        except (BlockingIOError, InterruptedError):
            return
        if not count:
            raise OSError(errno.ECONNRESET, "it has ended")
        self._end += count

    def receive(self, segments: list[memoryview], room: int) -> int:
        """The next frame, copied from what was read."""
        length = self._next()
        if length is None:
            return NOTHING
        begin = self._start + _LENGTH_BYTES
        self._start = begin + length
        if HEADER_BYTES + length <= room:
            _put(segments, bytes(HEADER_BYTES))
            _put(skip(segments, HEADER_BYTES), self._view[begin : begin + length])
        return HEADER_BYTES + length

    def send(self, segments: list[memoryview]) -> bool:
        """Send the frame, or begin to: what does not go now is kept, and goes first."""
        if not self.flush():
            return False
        segments = skip(segments, HEADER_BYTES)
        length = sum(map(len, segments))
        if not 0 < length <= MAX_FRAME:
            raise DroppedError(f"a frame of {length} bytes")
        word = length.to_bytes(_LENGTH_BYTES, "big")
        try:
            done = _writev(self.fd, [word, *segments[: IOV_MAX - 1]])
        except (BlockingIOError, InterruptedError):
            return False
        if done < _LENGTH_BYTES + length:
            self._rest += word[done:]
            for segment in skip(segments, max(0, done - _LENGTH_BYTES)):
                self._rest += segment
        return True

    def flush(self) -> bool:
        """Write what is left of the frame before."""
        try:
            while self._rest:
                del self._rest[: os.write(self.fd, self._rest)]
        except (BlockingIOError, InterruptedError):
            return False
        return True

    def forget(self) -> None:
        """Drop the whole frames that are here; the stream has to go on where it is."""
        while (length := self._next()) is not None:
            self._start += _LENGTH_BYTES + length


class Net(Device):
    """A network device. Two queues, receive and transmit (virtio 1.0, section 5.1)."""

    def __init__(self, link: Link, *, name: str = "eth0", say: Callable[[str], None] = say) -> None:
        """`name` begins what is told to the user through `say`."""
        super().__init__()
        self._link = link
        self._name = name
        self._say = say
        self._complain = Complaints(say)
        self._any_layout = False
        self._open = True  # whether the link is
        self._stopped = False
        self._hungry = False  # whether the guest may have a buffer for a frame
        self._buffer: tuple[int, list[memoryview], int] | None = None  # one taken from the guest, still empty, its room
        self._waiting: tuple[int, list[memoryview]] | None = None  # a frame that the link does not take yet
        self._blocked = False

    def accept(self, features: int) -> None:
        """The driver accepted these features: the link is told."""
        super().accept(features)
        self._any_layout = bool(features >> VIRTIO_F_ANY_LAYOUT & 1)
        try:
            self._link.accept(features)
        except OSError as error:
            self._cut(error)

    def _check_header(self, queue: int, head: int, segments: list[memoryview]) -> int:
        """The bytes that `segments` hold. Raises RingError where the header is not where this driver has to have it."""
        first = len(segments[0]) if segments else 0
        total = first if len(segments) == 1 else sum(map(len, segments))
        if first != HEADER_BYTES and not (self._any_layout and total >= HEADER_BYTES):
            found = total if self._any_layout else first
            raise RingError(
                f"{self.queues[queue].name}: descriptor {head}: Bad iovec size {found} for the header of a frame, "
                f"it is {HEADER_BYTES}"
            )
        return total

    def _cut(self, error: OSError) -> None:
        """The link is broken, and stays so; the guest goes on without."""
        if self._open:
            self._open = False
            self._blocked = False
            self._say(f"{self._name}: its network is gone ({error.strerror or error}); the guest goes on without it")

    # To the guest

    def _take_buffer(self) -> tuple[int, list[memoryview], int] | None:
        """The guest's next buffer for a frame; None where it has none."""
        if self._buffer is None:
            queue = self.queues[RECEIVE_QUEUE]
            chain = queue.pop()
            if chain is None:
                self._hungry = False
                return None
            head, readable, writable = chain
            if readable:
                raise RingError(f"{queue.name}: descriptor {head}: Output buffers in network recv queue?")
            del writable[IOV_MAX - 1 :]
            self._buffer = head, writable, self._check_header(RECEIVE_QUEUE, head, writable)
        return self._buffer

    def _receive(self) -> None:
        """Hand over what frames there are, at most BATCH, and say so once."""
        receive = self._link.receive
        push = self.queues[RECEIVE_QUEUE].push
        used = False
        try:
            for _ in range(BATCH):
                buffer = self._buffer or self._take_buffer()
                if buffer is None:
                    return
                head, segments, room = buffer
                count = receive(segments, room)
                if count == NOTHING:
                    return
                if count == NOT_FOR_IT:
                    continue
                if count > room:
                    self._complain(f"{self._name}: a frame is longer than the guest's buffer of {room} bytes, dropped")
                    continue
                self._buffer = None
                push(head, count)
                used = True
        except OSError as error:
            self._cut(error)
        finally:
            if used:
                self.notifier.used(RECEIVE_QUEUE)

    def _wants_frames(self) -> bool:
        return self._hungry and self._open and not self._stopped

    # From the guest

    def _send(self) -> bool:
        """Send what is in the ring, at most BATCH frames, and say so once; True where there may be more at once."""
        queue = self.queues[TRANSMIT_QUEUE]
        pop = queue.pop
        push = queue.push
        send = self._link.send
        used = False
        try:
            for _ in range(BATCH):
                chain = self._waiting or self._pop_frame(pop())
                if chain is None:
                    self._blocked = not self._flush()
                    return False
                head, segments = chain
                self._waiting = chain
                try:
                    if self._open and not send(segments):
                        self._blocked = True
                        return False
                except DroppedError as error:
                    self._complain(f"{self._name}: a frame from the guest is dropped: {error}")
                except OSError as error:
                    self._cut(error)
                self._waiting = None
                push(head, 0)
                used = True
            return True
        finally:
            if used:
                self.notifier.used(TRANSMIT_QUEUE)

    def _flush(self) -> bool:
        try:
            return not self._open or self._link.flush()
        except OSError as error:
            self._cut(error)
            return True

    def _pop_frame(
        self, chain: tuple[int, list[memoryview], list[memoryview]] | None
    ) -> tuple[int, list[memoryview]] | None:
        if chain is None:
            return None
        head, readable, writable = chain
        if writable:
            name = self.queues[TRANSMIT_QUEUE].name
            raise RingError(f"{name}: descriptor {head}: Input buffers in output queue?")
        self._check_header(TRANSMIT_QUEUE, head, readable)
        return head, readable

    # As every device

    def serve(self) -> bool:
        """Send what the guest has; where it may have new buffers, frames that wait here can go into them."""
        self._hungry = True
        more = not self._blocked and self._send()
        if self._wants_frames() and self._link_has_frames():
            self._receive()
            more |= self._wants_frames() and self._link_has_frames()
        return more

    def _link_has_frames(self) -> bool:
        try:
            return self._link.buffered
        except OSError as error:
            self._cut(error)
            return False

    def wants(self) -> Sequence[tuple[int, int]]:
        """Frames while there may be a buffer for them; room for the guest's while one waits."""
        events = (select.POLLIN if self._wants_frames() else 0) | (select.POLLOUT if self._blocked else 0)
        return ((self._link.fd, events),) if events else ()

    def ready(self, descriptor: int, events: int) -> None:  # noqa: ARG002
        """Move a batch in each direction that is ready, from a stream what one read of it gives."""
        if events & ~select.POLLOUT and self._wants_frames():
            try:
                self._link.fill()
            except OSError as error:
                self._cut(error)
            self._receive()
            # What was read and is not handed over now would be forgotten: nothing tells of it.
            while self._wants_frames() and self._link_has_frames():
                self._receive()
        if events & ~select.POLLIN and self._blocked:
            self._blocked = False
            # More to send than fits a batch is the same as having to wait: messages come first.
            self._blocked = self._send() or self._blocked

    def stop(self) -> None:
        """Receive no more. What the guest has sent goes if it can go at once: nobody waits for a wire."""
        self._stopped = True

    def reset(self) -> None:
        """Forget the guest's buffers, its frame that waits, and the frames that wait for it."""
        self._hungry = self._blocked = self._any_layout = False
        self._buffer = self._waiting = None
        try:
            if self._open:
                self._link.forget()
        except OSError as error:
            self._cut(error)
        super().reset()


def _get(segments: list[memoryview], count: int) -> bytes:
    """The first `count` bytes of `segments`."""
    found = bytearray()
    for segment in segments:
        found += segment[: count - len(found)]
        if len(found) == count:
            break
    return bytes(found)


def _put(segments: list[memoryview], data: bytes | memoryview) -> None:
    """Put `data`, for which there is room, at the start of `segments`."""
    done = 0
    for segment in segments:
        part = data[done : done + len(segment)]
        segment[: len(part)] = part
        done += len(part)
        if done == len(data):
            return


def _make(options: Options) -> Device:
    if len(options.queues) != QUEUES:
        raise LgmpError(f"a network device has {QUEUES} rings, --queue was given {len(options.queues)} times")
    if ("tap-fd" in options.own) == ("stream-fd" in options.own):
        raise LgmpError("a network device needs either --tap-fd or --stream-fd")
    if "stream-fd" in options.own:
        return Net(Stream(options.number("stream-fd")), name=options.name)
    return Net(Tap(options.number("tap-fd"), has_header="vnet-header" in options.own), name=options.name)


def main() -> None:
    """Serve a network device: `python -m workers.net --help` says how."""
    from workers.runtime import run  # noqa: PLC0415  the device above is of use without a process around it

    run(
        "net",
        _make,
        {
            "tap-fd=": "the open tap, which does not block",
            "vnet-header": "the tap has a virtio header before each frame",
            "stream-fd=": "the open socket of a user-mode stack, where each frame follows its length",
        },
    )


if __name__ == "__main__":
    main()
