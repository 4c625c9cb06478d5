"""A virtio network device on a tap, or on a stream to a user-mode network stack.

On a tap that knows the virtio header a frame is one readv or one writev, straight into or out of guest memory, header
and all. A frame that is longer than the guest's buffer is dropped whole; one that the tap does not take is dropped, as
on any wire. What the guest did not accept it is not sent.

While the guest has no buffer nothing is read: frames wait in the tap, which drops what is too much, until its kick.
While the other side takes nothing the guest's frames wait in its ring.

Where this process is killed, a frame that it was sending may go twice, frames that it was receiving may be lost (from a
tap) or come twice (from a stream), as on any wire. But a stream must not lose its step, or it is of no use any more:

- Received: frames are looked at (MSG_PEEK), and taken off the stream when the guest has them. Where the beginning of a
  frame has to be taken off by itself, the kernel counts for the successor what was taken (SO_PEEK_OFF).
- Sent: a frame goes in one system call, when there is room for all of it, whole or not at all. Only a socket with a
  very small buffer takes it in parts; how much of it has gone is noted, and it is the one thing that a kill may leave
  unknown, at the end of the system call. Then the successor leaves the link, and says so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from struct import Struct

from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS
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

        def keep(self, words: memoryview) -> None:
            """Keep in `words` (LINK_WORDS u64) what a successor needs, and go on from what is there."""

        def resume(self, sending: bool) -> None:
            """Take over from a killed process, which may have been `sending` a frame: the next one is that again."""

        def accept(self, features: int) -> None:
            """Hand out no frames but such as a driver can take that accepted `features`."""

        def fill(self) -> None:
            """The link is readable: read, if that is not done for each frame."""

        def receive(self, segments: list[memoryview], room: int) -> int:
            """Take a frame into `segments`, which have `room` bytes; may change the list.

            Gives the bytes of header and frame: more than `room` for a frame that does not fit and is lost, NOTHING
            where there is none now, NOT_FOR_IT for one that is lost since the driver cannot take such.
            """

        def received(self) -> None:
            """The frames that were handed out are the guest's now."""

        def send(self, segments: list[memoryview]) -> bool:
            """Send a frame; False where it has to wait until the link is writable. DroppedError: it is lost."""

        def flush(self) -> bool:
            """Go on with what a reset has left; False where some of it waits until the link is writable."""

        def forget(self) -> None:
            """The device was reset: lose the frames that wait."""

        def close(self) -> None:
            """Give back what is the link's own."""


# What Link.receive gives instead of a length.
NOTHING = 0
NOT_FOR_IT = -1

# The device's state, as u64: whether the link is known to be gone (set before the user is told); then the link's words.
_GONE = 0
LINK_WORDS = 4
_STATE_BYTES = 8 * (1 + LINK_WORDS)

_INT = Struct("i")
_unpack_int = _INT.unpack

_readv = os.readv
_writev = os.writev

# How many frames a reset drops at most; more than any tap queues by itself, and an end to a flood.
_FORGET_FRAMES = 4096
# On the stream each frame follows its length in bytes, 32 bits, big-endian.
_LENGTH_BYTES = 4
# The longest frame on the stream: the longest IP packet and what Ethernet puts before it, with room.
MAX_FRAME = (1 << 16) + 64
# How much of a stream is looked at at once.
_STREAM_BYTES = 1 << 18
# A write of so many bytes to an AF_UNIX stream is one buffer of the kernel's, on all kernels (net/unix/af_unix.c): it
# goes whole, or fails with EAGAIN.
_ONE_PIECE = 15 << 10
# poll(2) calls such a socket writable when three quarters of its buffer are free. In one of this size any frame then
# has room, whatever pieces the kernel makes of it: each takes less than twice its bytes (`_has_room_for`).
_ROOMY = (2 * MAX_FRAME + (16 << 10)) * 4 // 3
# asm-generic/socket.h, asm-generic/sockios.h
_SO_PEEK_OFF = 42
_SIOCOUTQ = 0x5411
# Where the kernel begins to count down what is taken off.
_MARK = 1 << 30

# What a stream keeps, u64 each.
# Where in a frame the stream is: how many bytes of it were taken off, and (low 32 bits) the first four of them.
_PLACE = 0
# What the place will be, and of how many bytes the taking off leads there; none: nothing is under way.
_NEXT_PLACE = 1
_TAKING = 2
# Of the frame that has gone in part: how long it is, with its length; how much has gone (24 bits each); flags.
_SENT = 3
_SENDING = 1 << 48  # a write is under way that may take a part
_ORPHANED = 1 << 49  # its rest is in no ring any more
_IN_PART = "a frame was sent only in part"


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

    def keep(self, words: memoryview) -> None:
        """What there is to keep is in the tap."""

    def resume(self, sending: bool) -> None:
        """A frame that was sent is sent again."""

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

    def received(self) -> None:
        """A frame has left the tap with the read."""

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

    def close(self) -> None:
        """The tap is who opened it's."""


def _not_taken(error: OSError) -> str:
    match error.errno:
        case errno.EIO:
            return "the tap is down"
        case errno.EINVAL:
            return "the tap does not take a frame like this"
    return f"the tap does not take a frame: {error.strerror or error}"


class Stream:
    """A stream socket to a user-mode stack (passt): each frame follows its length. There are no offloads."""

    def __init__(self, fd: int, *, enlarge: bool = True) -> None:
        """`fd` is made non-blocking; `enlarge`: and its buffer so large that it takes any frame whole, if it may be."""
        # A tap does without it; socket is costly to import, and has nothing more of use here.
        import _socket  # noqa: PLC0415

        self.fd = fd
        os.set_blocking(fd, False)
        self._socket = socket = _socket.socket(fileno=os.dup(fd))
        self._level = _socket.SOL_SOCKET
        self._peek = _socket.MSG_PEEK
        buffer = socket.getsockopt(self._level, _socket.SO_SNDBUF)
        if buffer < _ROOMY and enlarge:
            # The kernel doubles it, and gives what the administrator allows.
            socket.setsockopt(self._level, _socket.SO_SNDBUF, _ROOMY // 2)
            buffer = socket.getsockopt(self._level, _socket.SO_SNDBUF)
        self._buffer = buffer
        self._one_piece = min(_ONE_PIECE, buffer // 2 - 64)
        # What was looked at: from _taken on it is still in the socket, from _start on not handed out.
        self._view = memoryview(bytearray(_STREAM_BYTES))
        self._taken = self._start = self._end = 0
        # The beginning of the next frame, where that was taken off; its body is lost if a predecessor did it.
        self._begun = bytearray()
        self._is_lost = False
        self._sent = 0  # how much has gone of the frame that is being sent
        self._unsent: list[memoryview] = []  # and what has not
        self._rest = bytearray()  # of a frame that had gone in part when its ring was reset
        self._broken = ""  # why the stream is of no use any more
        self._words = memoryview(bytearray(8 * LINK_WORDS)).cast("Q")

    def keep(self, words: memoryview) -> None:
        """Find the place in the stream, and look whether a predecessor left a frame half sent."""
        self._words = words
        if words[_TAKING]:
            taken = self._count_taken(words[_TAKING])
            if taken == words[_TAKING]:
                words[_PLACE] = words[_NEXT_PLACE]
            elif taken:
                self._broken = "it is not known where a frame begins"
            words[_TAKING] = 0
        self._stop_counting()
        count, word = words[_PLACE] >> 32, words[_PLACE] & 0xFFFFFFFF
        self._begun[:] = word.to_bytes(_LENGTH_BYTES, "big")[:count].ljust(count, b"\0")
        self._is_lost = count > _LENGTH_BYTES
        if words[_SENT]:
            # `resume` may know better.
            self._broken = self._broken or _IN_PART

    def resume(self, sending: bool) -> None:
        """Go on in the middle of the frame that was being sent, where it is known how much of it has gone."""
        sent = self._words[_SENT]
        if sent and sending and not sent & (_SENDING | _ORPHANED):
            self._sent = sent >> 24 & 0xFFFFFF
            if self._broken == _IN_PART:
                self._broken = ""

    @property
    def buffered(self) -> bool:
        """Whether a whole frame waits here."""
        return self._next() is not None

    def accept(self, features: int) -> None:
        """Frames are plain, whatever the driver takes."""

    def _next(self) -> int | None:
        """The length of the next frame, if it is here as a whole. Raises OSError where the length is impossible."""
        begun = len(self._begun)
        have = begun + self._end - self._start
        if have < _LENGTH_BYTES:
            return None
        word: memoryview | bytearray = self._view[self._start : self._start + _LENGTH_BYTES]
        if begun:
            word = (self._begun[:_LENGTH_BYTES] + word)[:_LENGTH_BYTES]
        length = int.from_bytes(word, "big")
        if not 0 < length <= MAX_FRAME:
            raise OSError(errno.EPROTO, f"it sent a frame of {length} bytes")
        return length if have >= _LENGTH_BYTES + length else None

    def fill(self) -> None:
        """Look at what there is, once, where no whole frame is here yet."""
        if self._broken:
            raise OSError(errno.EPROTO, self._broken)
        if self.buffered:
            return
        self.received()
        self._taken = self._start = self._end = 0
        try:
            self._end = self._socket.recv_into(self._view, 0, self._peek)
        except (BlockingIOError, InterruptedError):
            return
        if not self._end:
            raise OSError(errno.ECONNRESET, "it has ended")
        if not self.buffered:
            # It is taken off, or poll(2) would tell of it for ever.
            self._begun += self._view[: self._end]
            self._start = self._end
            self.received()

    def receive(self, segments: list[memoryview], room: int) -> int:
        """The next frame, copied from what was looked at."""
        length = self._next()
        if length is None:
            return NOTHING
        end = self._start + _LENGTH_BYTES + length
        is_lost = False
        if self._begun:
            end -= len(self._begun)
            frame = memoryview(self._begun + self._view[self._start : end])[_LENGTH_BYTES:]
            is_lost, self._is_lost = self._is_lost, False
            self._begun = bytearray()
        else:
            frame = self._view[self._start + _LENGTH_BYTES : end]
        self._start = end
        if is_lost:
            return NOT_FOR_IT
        if HEADER_BYTES + length <= room:
            _put(segments, bytes(HEADER_BYTES))
            _put(skip(segments, HEADER_BYTES), frame)
        return HEADER_BYTES + length

    def received(self) -> None:
        """Take off the stream what was handed out; exactly, where that is not from one whole frame to another."""
        count = self._start - self._taken
        if not count:
            return
        words = self._words
        place = len(self._begun) << 32 | int.from_bytes(self._begun[:_LENGTH_BYTES].ljust(_LENGTH_BYTES, b"\0"), "big")
        exactly = place or words[_PLACE]
        if exactly:
            # A successor that finds _TAKING asks the kernel how much was taken: all of it, or nothing.
            words[_NEXT_PLACE] = place
            self._start_counting()
            words[_TAKING] = count
        taken = self._socket.recv_into(self._view[self._taken : self._start])  # the same bytes once more
        if exactly:
            words[_PLACE] = place
            words[_TAKING] = 0
            self._stop_counting()
        self._taken = self._start
        if taken != count:
            raise OSError(errno.EPROTO, f"it gave {taken} bytes of {count} that were there")

    # A read takes from SO_PEEK_OFF, where that is set, what it takes off the stream. Kernels before 3.4 know nothing of
    # it, and not of this process's end: what was under way is taken to be done.

    def _start_counting(self) -> None:
        try:  # noqa: SIM105  contextlib is costly to import
            self._socket.setsockopt(self._level, _SO_PEEK_OFF, _MARK)
        except OSError:
            pass

    def _stop_counting(self) -> None:
        try:  # noqa: SIM105  contextlib is costly to import
            self._socket.setsockopt(self._level, _SO_PEEK_OFF, -1)
        except OSError:
            pass

    def _count_taken(self, at_most: int) -> int:
        try:
            return _MARK - self._socket.getsockopt(self._level, _SO_PEEK_OFF)
        except OSError:
            return at_most

    def send(self, segments: list[memoryview]) -> bool:
        """Send the frame, whole if that can be; of one that went in part, send the rest."""
        if self._broken:
            raise OSError(errno.EPROTO, self._broken)
        if self._rest and not self.flush():
            return False
        pieces = skip(segments, HEADER_BYTES)
        length = sum(map(len, pieces))
        done = self._sent
        if not done and not 0 < length <= MAX_FRAME:
            raise DroppedError(f"a frame of {length} bytes")
        pieces.insert(0, memoryview(length.to_bytes(_LENGTH_BYTES, "big")))
        if len(pieces) > IOV_MAX:
            pieces = [memoryview(b"".join(pieces))]
        if done or length > self._one_piece - _LENGTH_BYTES:
            return self._send_long(pieces, _LENGTH_BYTES + length)
        try:
            _writev(self.fd, pieces)
        except (BlockingIOError, InterruptedError):
            return False
        return True

    def _send_long(self, pieces: list[memoryview], size: int) -> bool:
        """Send a frame that goes whole only where the socket has room for it, or the rest of one that went in part."""
        words = self._words
        done = self._sent
        if done and words[_SENT] & 0xFFFFFF != size:
            raise OSError(errno.EPROTO, "the guest has changed a frame that it had given out to be sent")
        if not done and self._buffer >= _ROOMY:
            if not self._has_room_for(size):
                return False
        else:
            words[_SENT] = _SENDING | done << 24 | size
        pieces = skip(pieces, done)
        try:
            count = _writev(self.fd, pieces)
        except (BlockingIOError, InterruptedError):
            count = 0
        done += count
        if done == size or not done:
            self._sent = words[_SENT] = 0
            self._unsent = []
            return bool(done)
        words[_SENT] = done << 24 | size
        self._sent = done
        self._unsent = skip(pieces, count)
        return False

    def _has_room_for(self, size: int) -> bool:
        (waiting,) = _unpack_int(fcntl.ioctl(self.fd, _SIOCOUTQ, bytes(_INT.size)))
        return bool(waiting + 2 * size + (16 << 10) <= self._buffer)

    def flush(self) -> bool:
        """Write what a reset has left of a frame that had gone in part."""
        try:
            while self._rest:
                del self._rest[: os.write(self.fd, self._rest)]
                if not self._rest:
                    self._words[_SENT] = 0
        except (BlockingIOError, InterruptedError):
            return False
        return True

    def forget(self) -> None:
        """Drop the whole frames that are here; the stream has to go on where it is, in both directions."""
        if self._sent:
            self._words[_SENT] |= _ORPHANED
            self._rest += b"".join(self._unsent)
            self._sent = 0
            self._unsent = []
        while (length := self._next()) is not None:
            self._start += _LENGTH_BYTES + length - len(self._begun)
            self._begun = bytearray()
            self._is_lost = False
        self.received()

    def close(self) -> None:
        """Close our own descriptor of it."""
        self._socket.close()


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
        self._waiting: tuple[int, list[memoryview], int] | None = None  # a frame that the link does not take yet
        self._blocked = False

    def take_over(self) -> None:
        """The link goes on where a predecessor's did, whether or not there is a driver."""
        words = self.state[:_STATE_BYTES].cast("Q")
        self._words = words
        self._open = not words[_GONE]
        self._link.keep(words[1:])

    def resume(self) -> None:
        """Send again what was being sent, and fill again what buffers were in flight."""
        self._link.resume(bool(self.queues[TRANSMIT_QUEUE].heads_in_flight()))

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
            self._words[_GONE] = 1
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
        total = dropped = 0
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
                    dropped += 1
                    continue
                if count > room:
                    dropped += 1
                    self._complain(f"{self._name}: a frame is longer than the guest's buffer of {room} bytes, dropped")
                    continue
                self._buffer = None
                push(head, count)
                total += count
        except OSError as error:
            self._cut(error)
        finally:
            if total:
                self.statistics[BYTES_IN] += total
                self.notifier.used(RECEIVE_QUEUE)
            if dropped:
                self.statistics[ERRORS] += dropped
            self._take_off()

    def _take_off(self) -> None:
        if self._open:
            try:
                self._link.received()
            except OSError as error:
                self._cut(error)

    def _wants_frames(self) -> bool:
        return self._hungry and self._open and not self._stopped

    # From the guest

    def _send(self) -> bool:
        """Send what is in the ring, at most BATCH frames, and say so once; True where there may be more at once."""
        queue = self.queues[TRANSMIT_QUEUE]
        pop = queue.pop
        push = queue.push
        send = self._link.send
        total = dropped = 0
        try:
            for _ in range(BATCH):
                chain = self._waiting or self._pop_frame(pop())
                if chain is None:
                    self._blocked = not self._flush()
                    return False
                head, segments, size = chain
                self._waiting = chain
                try:
                    if self._open and not send(segments):
                        self._blocked = True
                        return False
                    if not self._open:
                        dropped += 1
                except DroppedError as error:
                    dropped += 1
                    self._complain(f"{self._name}: a frame from the guest is dropped: {error}")
                except OSError as error:
                    dropped += 1
                    self._cut(error)
                self._waiting = None
                push(head, 0)
                total += size
            return True
        finally:
            if total:
                self.statistics[BYTES_OUT] += total
                self.notifier.used(TRANSMIT_QUEUE)
            if dropped:
                self.statistics[ERRORS] += dropped

    def _flush(self) -> bool:
        try:
            return not self._open or self._link.flush()
        except OSError as error:
            self._cut(error)
            return True

    def _pop_frame(
        self, chain: tuple[int, list[memoryview], list[memoryview]] | None
    ) -> tuple[int, list[memoryview], int] | None:
        if chain is None:
            return None
        head, readable, writable = chain
        if writable:
            name = self.queues[TRANSMIT_QUEUE].name
            raise RingError(f"{name}: descriptor {head}: Input buffers in output queue?")
        return head, readable, self._check_header(TRANSMIT_QUEUE, head, readable)

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

    def close(self) -> None:
        """Close what is the link's own."""
        self._link.close()


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
