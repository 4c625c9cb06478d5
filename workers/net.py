"""A virtio network device on a tap, or on a stream to a user-mode network stack.

On a tap that knows the virtio header a frame is one readv or one writev, straight into or out of guest memory, header
and all. A frame that is longer than the guest's buffer is dropped whole; one that the tap does not take is dropped, as
on any wire. What the guest did not accept it is not sent.

A driver that merges buffers (VIRTIO_NET_F_MRG_RXBUF) gets a frame in as many chains as it fills. What is read goes into
the chains that are held, which are enough for frames as they have been coming, and the end of a longer one into memory
of our own, so that it is one readv all the same. That end is copied into further chains; where the guest has no more of
them, the frame waits here for its next kick. It is dropped only where the ring could hold no more chains.

While the guest has no buffer nothing is read: frames wait in the tap, which drops what is too much, until its kick.
While the other side takes nothing the guest's frames wait in its ring.

Where this process is killed, a frame that it was sending may go twice, frames that it was receiving may be lost (from a
tap) or come twice (from a stream), as on any wire. The chains of one frame are given back all at once or not at all
(`Virtqueue.push_all`): a driver that has read of n of them in a header finds these n, of that frame, and none that a
successor filled with another one. But a stream must not lose its step, or it is of no use any more:

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
from lgmp.tap import TUNSETOFFLOAD, TUNSETVNETHDRSZ, may_be_given, offloads_for
from lgmp.virtio.ids import VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1
from lgmp.virtio.net import (
    ETHERNET_MTU,
    HEADER_BYTES,
    MODERN_HEADER_BYTES,
    NUM_BUFFERS_AT,
    QUEUES,
    RECEIVE_QUEUE,
    TRANSMIT_QUEUE,
    header_bytes,
    merges_buffers,
)
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
            """Go on after `suspend`, or take over from a killed process.

            That may have been `sending` a frame: the next one is that again. Where it was not, or its ring is not
            served now, a frame that has gone in part is no more to come.
            """

        def suspend(self) -> None:
            """Leave guest memory alone from now on: what is needed of it is copied."""

        def accept(self, features: int) -> None:
            """Hand out no frames but such as a driver can take that accepted `features`, and with its header."""

        def fill(self) -> None:
            """The link is readable: read, if that is not done for each frame."""

        def receive(self, segments: list[memoryview], room: int) -> int:
            """Take a frame into `segments`, which have `room` bytes; may change the list.

            Gives the bytes of header and frame: more than `room` for a frame that does not fit and is lost, NOTHING
            where there is none now, NOT_FOR_IT for one that is lost since the driver cannot take such.
            """

        def received(self, *, but_last: bool) -> None:
            """The frames that were handed out are the guest's now, except perhaps the last one."""

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

# What one of the usual frames takes, with its header and a VLAN tag: so much room is always held for a driver that
# merges buffers, if there is as much.
_USUAL = MODERN_HEADER_BYTES + 18 + ETHERNET_MTU
# How many frames a reset drops at most; more than any tap queues by itself, and an end to a flood.
_FORGET_FRAMES = 4096
# On the stream each frame follows its length in bytes, 32 bits, big-endian.
_LENGTH_BYTES = 4
# The longest frame on the stream: the longest IP packet and what Ethernet puts before it, with room.
MAX_FRAME = (1 << 16) + 64
_LONGEST = MODERN_HEADER_BYTES + MAX_FRAME
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


class DroppedError(Exception):
    """The link did not take a frame; why is for the user."""


class Tap:
    """A tap that does not block, opened with IFF_NO_PI."""

    buffered = False

    def __init__(self, fd: int, *, has_header: bool) -> None:
        """`has_header`: whether it was opened with IFF_VNET_HDR."""
        self.fd = fd
        self._has_header = has_header
        self._header_bytes = HEADER_BYTES
        self._told = 0  # the size of the header that the tap was told; none yet
        self._offloads = 0
        self._beyond = memoryview(bytearray(1))
        self._scratch = [memoryview(bytearray(HEADER_BYTES))]

    def keep(self, words: memoryview) -> None:
        """What there is to keep is in the tap."""

    def resume(self, sending: bool) -> None:
        """A frame that was sent is sent again."""

    def suspend(self) -> None:
        """A tap takes a frame or does not."""

    def accept(self, features: int) -> None:
        """Tell the tap what it may hand out, and how long a header is; num_buffers it leaves to us (tun_vnet.h)."""
        self._offloads = offloads_for(features) if self._has_header else 0
        self._header_bytes = size = header_bytes(features)
        if self._has_header:
            if size != self._told:
                fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, size.to_bytes(4, "little"))
                self._told = size
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
                count = _readv(self.fd, skip(segments, self._header_bytes)) + self._header_bytes
        except (BlockingIOError, InterruptedError):
            return NOTHING
        finally:
            segments.pop()
        if count > room:
            return count
        if not self._has_header:
            _put(segments, bytes(self._header_bytes))
            return count
        first = segments[0]
        if len(first) >= 2 and not first[0] and not first[1]:  # flags, gso_type: nothing special
            return count
        return count if self._fits_driver(segments) else NOT_FOR_IT

    def received(self, *, but_last: bool) -> None:
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
            _writev(self.fd, segments if self._has_header else skip(segments, self._header_bytes))
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
        self._header_bytes = HEADER_BYTES
        self._buffer = buffer
        self._one_piece = min(_ONE_PIECE, buffer // 2 - 64)
        # What was looked at: from _taken on it is still in the socket, from _start on not handed out.
        self._view = memoryview(bytearray(_STREAM_BYTES))
        self._taken = self._start = self._end = 0
        self._last = 0  # where the last frame that was handed out begins
        # The beginning of the next frame, where that was taken off; its body is lost if a predecessor did it.
        self._begun = bytearray()
        self._is_lost = False
        self._sent = 0  # how much has gone of the frame that is being sent
        self._unsent: list[memoryview] = []  # and what has not
        self._rest = bytearray()  # of a frame that had gone in part when its ring was reset
        self._broken = ""  # why the stream is of no use any more
        self._in_part = False  # whether a predecessor left a frame half sent that nobody has gone on with yet
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
        # `resume` may know better. Until something is to be sent there may be one more: rings may start singly.
        self._in_part = bool(words[_SENT])

    def resume(self, sending: bool) -> None:
        """Go on in the middle of the frame that was being sent, where it is known how much of it has gone."""
        sent = self._words[_SENT]
        if sending and sent and not sent & (_SENDING | _ORPHANED):
            self._sent = sent >> 24 & 0xFFFFFF
            self._in_part = False
        elif self._sent:
            self._orphan()

    def suspend(self) -> None:
        """Keep what has not gone of a frame that has gone in part: its ring may not be served again."""
        self._unsent = [memoryview(b"".join(self._unsent))]

    def _orphan(self) -> None:
        """The rest of the frame that has gone in part is in no ring any more; it goes to `_rest`."""
        rest = b"".join(self._unsent)
        # None of it is here where a frame of a predecessor's was not popped again.
        self._in_part = len(rest) != (self._words[_SENT] & 0xFFFFFF) - self._sent
        self._words[_SENT] |= _ORPHANED
        self._rest += rest
        self._sent = 0
        self._unsent = []

    @property
    def buffered(self) -> bool:
        """Whether a whole frame waits here."""
        return self._next() is not None

    def accept(self, features: int) -> None:
        """Frames are plain, whatever the driver takes, and come after the header that it has."""
        self._header_bytes = header_bytes(features)

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
        self._last = self._start
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
        header = self._header_bytes
        if header + length <= room:
            _put(segments, bytes(header))
            _put(skip(segments, header), frame)
        return header + length

    def received(self, *, but_last: bool = False) -> None:
        """Take off the stream what was handed out; exactly, where that is not from one whole frame to another."""
        # Where some of the last one was taken off before, the rest has begun where that ended.
        end = self._last if but_last else self._start
        count = end - self._taken
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
        taken = self._socket.recv_into(self._view[self._taken : end])  # the same bytes once more
        if exactly:
            words[_PLACE] = place
            words[_TAKING] = 0
            self._stop_counting()
        self._taken = end
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
        if self._broken or self._in_part:
            raise OSError(errno.EPROTO, self._broken or "a frame was sent only in part")
        if self._rest and not self.flush():
            return False
        pieces = skip(segments, self._header_bytes)
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
            self._orphan()
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
        self._features = -1
        self._header_bytes = HEADER_BYTES
        self._any_layout = False
        self._merges = False  # whether a frame may lie in several chains
        self._open = True  # whether the link is
        self._stopped = False
        self._hungry = False  # whether the guest may have a buffer for a frame
        # Buffers taken from the guest, still empty, each with its room; more than one only where they are merged.
        self._chains: list[tuple[int, list[memoryview], int]] = []
        self._room = 0  # of them all
        # Where they are merged: how much room to hold, and for what a frame has beyond that.
        self._enough = _USUAL
        self._spare = memoryview(b"")
        self._frame: bytes | None = None  # one with its header that waits for more buffers
        self._waiting: tuple[int, list[memoryview], int] | None = None  # a frame that the link does not take yet
        self._blocked = False

    def take_over(self) -> None:
        """The link goes on where a predecessor's did, whether or not there is a driver."""
        words = self.state[:_STATE_BYTES].cast("Q")
        self._words = words
        self._open = not words[_GONE]
        self._link.keep(words[1:])

    def resume(self) -> None:
        """Send again what was being sent, and fill again what buffers were in flight; also after `suspend`."""
        self._link.resume(bool(self.queues[TRANSMIT_QUEUE].heads_in_flight()))

    def accept(self, features: int) -> None:
        """The driver accepted these features: the link is told."""
        super().accept(features)
        if features != self._features and self._frame is not None:
            self._frame = None  # it is as another driver takes it
            self.statistics[ERRORS] += 1
        self._features = features
        self._header_bytes = header_bytes(features)
        # A modern driver frames as it likes (virtio 1.0, section 2.6.4).
        self._any_layout = bool(features & (1 << VIRTIO_F_ANY_LAYOUT | 1 << VIRTIO_F_VERSION_1))
        self._merges = merges_buffers(features)
        if self._merges and not self._spare:
            self._spare = memoryview(bytearray(MAX_FRAME))
        try:
            self._link.accept(features)
        except OSError as error:
            self._cut(error)

    def _check_header(self, queue: int, head: int, segments: list[memoryview]) -> int:
        """The bytes that `segments` hold. Raises RingError where the header is not where this driver has to have it."""
        header = self._header_bytes
        first = len(segments[0]) if segments else 0
        total = first if len(segments) == 1 else sum(map(len, segments))
        if first != header:
            # Buffers that are merged have always had the header where their data begins.
            any_layout = self._any_layout or (self._merges and queue == RECEIVE_QUEUE)
            if not any_layout or total < header:
                raise RingError(
                    f"{self.queues[queue].name}: descriptor {head}: Bad iovec size {total if any_layout else first} "
                    f"for the header of a frame, it is {header}"
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

    def _take_chains(self, wanted: int) -> None:
        """Take the guest's next buffers until those that are held have `wanted` bytes, if there are so many."""
        queue = self.queues[RECEIVE_QUEUE]
        while self._room < wanted:
            chain = queue.pop()
            if chain is None:
                return
            head, readable, writable = chain
            if readable:
                raise RingError(f"{queue.name}: descriptor {head}: Output buffers in network recv queue?")
            # What is read may need a segment more, and a merged frame two.
            del writable[IOV_MAX - 2 :]
            room = self._check_header(RECEIVE_QUEUE, head, writable)
            self._chains.append((head, writable, room))
            self._room += room

    def _receive(self) -> None:
        """Hand over what frames there are, at most BATCH, and say so once."""
        if self._merges:
            self._receive_merged()
            return
        receive = self._link.receive
        queue = self.queues[RECEIVE_QUEUE]
        chains = self._chains
        is_numbered = self._header_bytes == MODERN_HEADER_BYTES
        total = dropped = 0
        try:
            for _ in range(BATCH):
                if not chains:
                    self._take_chains(1)
                    if not chains:
                        self._hungry = False
                        return
                head, segments, room = chains[0]
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
                if is_numbered:
                    _number(segments, 1)
                chains.clear()
                self._room = 0
                queue.push(head, count)
                total += count
        except OSError as error:
            self._cut(error)
        finally:
            self._account(total, dropped)

    def _receive_merged(self) -> None:
        """As `_receive`, where a frame may lie in several chains."""
        chains = self._chains
        total = dropped = longest = 0
        try:
            for _ in range(BATCH):
                if self._frame is None:
                    if self._room < self._enough:
                        self._take_chains(self._enough)
                        if not chains:
                            self._hungry = False
                            return
                    count = self._read()
                    longest = max(longest, count)
                if self._frame is not None:
                    count = self._place(self._frame)
                    if count != NOTHING:
                        self._frame = None
                if count == NOTHING:
                    return
                if count == NOT_FOR_IT:
                    dropped += 1
                    continue
                self._give(count)
                total += count
        except OSError as error:
            self._cut(error)
        finally:
            if longest and 2 * longest <= self._enough:
                self._enough = max(_USUAL, self._enough // 2)
            self._account(total, dropped)

    def _read(self) -> int:
        """Read a frame into the buffers that are held; gives as `Link.receive`. One that is longer is `_frame` then."""
        chains = self._chains
        if len(chains) == 1:  # the hot path: such frames as have been coming fit into the first one
            segments, room = [*chains[0][1], self._spare], self._room
        else:
            segments, room = self._places()
        count = self._link.receive(segments, room + MAX_FRAME)
        if count > room:
            if count > room + MAX_FRAME:
                self._complain(f"{self._name}: a frame is longer than {MAX_FRAME} bytes, dropped")
                return NOT_FOR_IT
            self._frame = _get(segments, count)
        return count

    def _place(self, frame: bytes) -> int:
        """Put a frame with its header, which is longer than what was held, into as many of the guest's buffers.

        Gives its size, NOTHING where the guest has to give more buffers first, NOT_FOR_IT where it cannot.
        """
        size = len(frame)
        self._enough = _LONGEST
        self._take_chains(size)
        if self._room >= size:
            _put([segment for _, segments, _ in self._chains for segment in segments], frame)
            return size
        if not self._holds_the_ring():
            self._hungry = False
            return NOTHING
        self._complain(
            f"{self._name}: a frame is longer than all the guest's buffers of {self._room} bytes together, dropped"
        )
        return NOT_FOR_IT

    def _places(self) -> tuple[list[memoryview], int]:
        """The segments of the chains that are held, no more than readv takes, and their room; then our own memory."""
        segments = [segment for _, segments, _ in self._chains for segment in segments]
        room = self._room
        if len(segments) > IOV_MAX - 2:
            del segments[IOV_MAX - 2 :]
            room = sum(map(len, segments))
        segments.append(self._spare)
        return segments, room

    def _holds_the_ring(self) -> bool:
        """Whether the driver has certainly no descriptor left for a further buffer."""
        queue = self.queues[RECEIVE_QUEUE]
        chains = self._chains
        # In an indirect table a chain takes one of them, however many segments it has.
        taken = len(chains) if queue.indirect else sum(len(segments) for _, segments, _ in chains)
        return bool(chains) and taken >= queue.num

    def _give(self, count: int) -> None:
        """Give the guest the chains that a frame of `count` bytes with its header fills, all at once."""
        chains = self._chains
        queue = self.queues[RECEIVE_QUEUE]
        head, segments, room = chains[0]
        if count <= room:
            _number(segments, 1)
            del chains[0]
            self._room -= room
            queue.push(head, count)
            return
        answers = []
        left = count
        for head, _, room in chains:
            answers.append((head, min(left, room)))
            self._room -= room
            left -= room
            if left <= 0:
                break
        _number(segments, len(answers))
        del chains[: len(answers)]
        queue.push_all(answers)

    def _account(self, total: int, dropped: int) -> None:
        """`total` bytes have been handed over, `dropped` frames have not."""
        if total:
            self.statistics[BYTES_IN] += total
            self.notifier.used(RECEIVE_QUEUE)
        if dropped:
            self.statistics[ERRORS] += dropped
        if self._open:
            try:
                # What waits here stays there, for a successor to find.
                self._link.received(but_last=self._frame is not None)
            except OSError as error:
                self._cut(error)

    def _wants_frames(self) -> bool:
        return self._hungry and self._open and not self._stopped

    # From the guest

    def _send(self) -> bool:
        """Send what is in the ring, at most BATCH frames, and say so once; True where there may be more at once."""
        queue = self.queues[TRANSMIT_QUEUE]
        pop = queue.pop
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
                queue.push(head, 0)
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
            return self._frame is not None or self._link.buffered
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
            if self._frame is None:
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

    def suspend(self) -> None:
        """Forget the guest's buffers and its frame that waits: they are in flight, and popped again.

        A frame that waits for more buffers goes on waiting.
        """
        self._forget_chains()
        self._link.suspend()

    def _forget_chains(self) -> None:
        self._hungry = self._blocked = False
        self._chains.clear()
        self._room = 0
        self._waiting = None

    def reset(self) -> None:
        """Forget the guest's buffers, its frame that waits, and the frames that wait for it."""
        self._forget_chains()
        self._any_layout = self._merges = False
        self._features = -1
        self._header_bytes = HEADER_BYTES
        self._enough = _USUAL
        self._frame = None
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


def _number(segments: list[memoryview], count: int) -> None:
    """Say in the header at the start of `segments` how many chains its frame lies in."""
    first = segments[0]
    if len(first) >= MODERN_HEADER_BYTES:
        first[NUM_BUFFERS_AT:MODERN_HEADER_BYTES] = count.to_bytes(2, "little")
    else:
        _put(skip(segments, NUM_BUFFERS_AT), count.to_bytes(2, "little"))


def _make(options: Options) -> Device:
    if options.queue_count != QUEUES:
        raise LgmpError(f"a network device has {QUEUES} rings, not {options.queue_count}")
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
