"""What a worker tells of its rings while it is traced, and how that is packed into a socket.

The socket is one end of a SOCK_SEQPACKET pair: the worker has one, whoever traces reads the other, and the launcher
holds both, so that neither side ever sees it end before the guest does. A packet is a msgpack array that begins with
the number of the trace it belongs to, its session: what an earlier trace left unread is told from what is news.

    [session, kind, time, ...]             an event; lgmp.tracing.events says what follows, by its kind
    [session, PART, number, of, bytes]     an event larger than a packet, in parts from 0 on
    [session, HEADER, bytes]               what is traced, from the launcher: it precedes all others of its session

Times are nanoseconds of CLOCK_MONOTONIC. A worker that finds no room in the socket waits a little, and then loses
events rather than keep its guest waiting; LOST says how many.
"""

from __future__ import annotations

import msgpack

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Sequence

# The kinds of events.
PART = 0
START = 1  # a worker begins to tell; also one that follows another that was killed
TAKE = 2  # a chain was taken from the available ring
DONE = 3  # a chain was given back
BAD = 4  # the driver broke a rule
RESET = 5  # the driver reset the device
FEATURES = 6  # the driver accepted features
LOST = 7  # events were lost here, since nobody read them
END = 8  # the worker tells no more
HEADER = 9

# How much is told.
OFF = 0
HEADS = 1  # the first bytes of each request and answer
FULL = 2  # everything that it takes to repeat them: descriptors, and all they lead to
PAYLOADS = 3  # requests and answers whole, without their descriptors

# What HEADS tells of each direction of a request, in bytes: a disk's header, the addresses of a frame.
HEAD_BYTES = 64
# What is told of each direction at most, in bytes: hostile chains lead to gigabytes.
SNAP_BYTES = 4 << 20
# A packet is no larger, in bytes; the kernel has room for a dozen of them in a socket that has its usual size.
PACKET_BYTES = 1 << 15
# Nor is the largest event, in bytes: a whole request and its longest chain, or a whole ring.
EVENT_BYTES = 8 << 20
# The socket's room is asked to be this large, in bytes; the kernel gives what net.core.wmem_max lets it.
SOCKET_BYTES = 4 << 20

# Sessions are numbers of so many bits: they fit what a message to a worker may hold, level and all.
_LEVEL_BITS = 2
SESSION_MAX = (1 << 30) - 1

_pack = msgpack.Packer(autoreset=True).pack


def setting(level: int, session: int) -> int:
    """What [TRACE, setting] tells a worker: how much to tell, and which trace that is for."""
    return session << _LEVEL_BITS | level


def level_and_session(setting: int) -> tuple[int, int]:
    """The reverse of `setting`."""
    return setting & ((1 << _LEVEL_BITS) - 1), setting >> _LEVEL_BITS


def packets(session: int, event: Sequence[object]) -> list[bytes]:
    """The packets that carry an event."""
    packet: bytes = _pack((session, *event))
    if len(packet) <= PACKET_BYTES:
        return [packet]
    room = PACKET_BYTES - 64
    pieces = [packet[start : start + room] for start in range(0, len(packet), room)]
    return [_pack((session, PART, number, len(pieces), piece)) for number, piece in enumerate(pieces)]


def header_packet(session: int, header: bytes) -> bytes:
    """The packet that begins a session; `header` is as recordings have it."""
    packet: bytes = _pack((session, HEADER, header))
    return packet


def header_of(packet: bytes) -> tuple[int, bytes] | None:
    """The session that `packet` begins, and its header; None where it is an event. Raises ValueError for neither."""
    message = _unpack(packet)
    if message[1] != HEADER:
        return None
    if len(message) != 3 or type(message[0]) is not int or type(message[2]) is not bytes:
        raise ValueError("a header is not [session, HEADER, bytes]")
    return message[0], message[2]


class Assembler:
    """Makes events of the packets of one session. The worker is not trusted."""

    def __init__(self, session: int) -> None:
        """What belongs to another session is passed over."""
        self._session = session
        self._parts: list[bytes] = []
        self._size = 0

    def take(self, packet: bytes) -> list[object] | None:
        """The event that `packet` completes, as [kind, time, ...]; None where it does not, or is another session's.

        Raises ValueError where it makes no sense.
        """
        message = _unpack(packet)
        if message[0] != self._session:
            return None
        if message[1] != PART:
            self._parts.clear()  # what is incomplete now was lost
            return message[1:]
        match message:
            case [_, _, int(number), int(count), bytes(piece)]:
                pass
            case _:
                raise ValueError("a part of an event is not [session, PART, number, of, bytes]")
        if not number:
            self._parts.clear()
            self._size = 0
        elif number != len(self._parts):
            self._parts.clear()
            return None
        self._size += len(piece)
        if self._size > EVENT_BYTES:
            raise ValueError(f"an event of more than {EVENT_BYTES} bytes")
        self._parts.append(piece)
        if number + 1 != count:
            return None
        whole = b"".join(self._parts)
        self._parts.clear()
        message = _unpack(whole)
        if message[0] != self._session or message[1] == PART:
            raise ValueError("the parts of an event are none")
        return message[1:]


def _unpack(raw: bytes) -> list[object]:
    try:
        message = msgpack.unpackb(raw, max_map_len=0, max_ext_len=0)
    except Exception as error:  # msgpack raises a dozen kinds, and what it is does not matter
        raise ValueError(f"not an event: {raw[:32]!r}") from error
    if type(message) is not list or len(message) < 2 or type(message[0]) is not int:
        raise ValueError(f"not an event: {raw[:32]!r}")
    return message
