"""The messages of vhost-user, by the numbers: a header, a payload, and descriptors that come beside them.

From QEMU's docs/interop/vhost-user.rst. All numbers are little-endian here, as the machine's own, which is what the
protocol says. The front end is the one with the guest; a back end, which lgmp is, serves the device. Pure: bytes in,
numbers out, and what makes no sense is a ProtocolError.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from lgmp.errors import LgmpError

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Sequence

# {u32 request, u32 flags, u32 size of the payload}
HEADER = Struct("<III")
HEADER_BYTES = HEADER.size
# Flags of the header: the version in the low two bits, whether it is an answer, whether one is wanted (REPLY_ACK).
VERSION_MASK = 0x3
VERSION = 0x1
REPLY = 0x4
NEED_REPLY = 0x8

# The longest payload of any message of ours is a configuration space's; nothing longer is even read.
MAX_PAYLOAD = 4096
# As many descriptors may come with one message (VHOST_MEMORY_BASELINE_NREGIONS).
MAX_DESCRIPTORS = 8
# A configuration space has this many bytes at most (VHOST_USER_MAX_CONFIG_SIZE).
MAX_CONFIG = 256

# The feature bit by which a front end knows that there are protocol features.
VHOST_USER_F_PROTOCOL_FEATURES = 30


class Request(IntEnum):
    """What a front end may ask for."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


# Protocol features, as bit numbers.
VHOST_USER_PROTOCOL_F_MQ = 0
VHOST_USER_PROTOCOL_F_REPLY_ACK = 3
VHOST_USER_PROTOCOL_F_CONFIG = 9
VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12
VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13
VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15
VHOST_USER_PROTOCOL_F_STATUS = 16

# In the number that comes with the descriptors of a vring: its index, and whether there is no descriptor.
VHOST_USER_VRING_IDX_MASK = 0xFF
VHOST_USER_VRING_NOFD_MASK = 0x100

U64 = Struct("<Q")
VRING_STATE = Struct("<II")  # index, num
# index, flags, then the addresses of the front end's: descriptors, used, available, log
VRING_ADDR = Struct("<IIQQQQ")
CONFIG = Struct("<III")  # offset, size, flags
# bytes to map, offset, rings, descriptors of each. C pads it to 24 bytes, some front ends do not.
INFLIGHT = Struct("<QQHH")
_REGION = Struct("<QQQQ")
_TABLE_HEAD = Struct("<II")  # regions, padding


class ProtocolError(LgmpError):
    """A front end sent what it may not send, or not now: the connection is closed, and this is said."""


class Message:
    """One message: who gets it owns the `descriptors`, until he takes them over with `take`."""

    __slots__ = ("descriptors", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """`request` and `flags` as in the header."""
        self.request = request
        self.flags = flags
        self.payload = payload
        self.descriptors = list(descriptors)

    @property
    def name(self) -> str:
        """What it is called, for a person."""
        return name_of(self.request)

    @property
    def needs_reply(self) -> bool:
        """Whether the front end asks for an answer where there is none by rule."""
        return bool(self.flags & NEED_REPLY)

    def take(self, count: int = 1) -> list[int]:
        """The descriptors, of which there have to be `count`; who takes them owns them. Raises ProtocolError."""
        if len(self.descriptors) != count:
            raise ProtocolError(f"{self.name} with {len(self.descriptors)} descriptors, it has {count}")
        taken, self.descriptors = self.descriptors, []
        return taken

    def fields(self, layout: Struct) -> tuple[int, ...]:
        """The payload as `layout` has it. Raises ProtocolError where it has another size."""
        if len(self.payload) != layout.size:
            raise ProtocolError(f"{self.name} with {len(self.payload)} bytes, it has {layout.size}")
        return layout.unpack(self.payload)

    def u64(self) -> int:
        """The payload as one number. Raises ProtocolError."""
        return self.fields(U64)[0]


class RegionDescription:
    """One region of guest memory, as the front end tells of it."""

    __slots__ = ("guest", "offset", "size", "user")

    def __init__(self, guest: int, size: int, user: int, offset: int) -> None:
        """`guest`: guest-physical address; `user`: the front end's own; `size`; `offset` in the file. All in bytes."""
        self.guest = guest
        self.size = size
        self.user = user
        self.offset = offset


def name_of(request: int) -> str:
    """What a request is called, as the specification has it."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


def parse_header(raw: bytes) -> tuple[int, int, int]:
    """The header: request, flags and the size of the payload. Raises ProtocolError."""
    request, flags, size = HEADER.unpack(raw)
    if flags & VERSION_MASK != VERSION:
        raise ProtocolError(f"{name_of(request)} of version {flags & VERSION_MASK} of the protocol, there is {VERSION}")
    if flags & REPLY:
        raise ProtocolError(f"{name_of(request)} as an answer, and nothing was asked")
    if size > MAX_PAYLOAD:
        raise ProtocolError(f"{name_of(request)} with {size} bytes, the longest message has {MAX_PAYLOAD}")
    return request, flags, size


def reply(request: int, payload: bytes) -> bytes:
    """The answer to a request."""
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def parse_memory_table(message: Message) -> list[RegionDescription]:
    """The regions of SET_MEM_TABLE. Raises ProtocolError."""
    payload = message.payload
    if len(payload) < _TABLE_HEAD.size:
        raise ProtocolError(f"{message.name} with {len(payload)} bytes")
    count, _padding = _TABLE_HEAD.unpack_from(payload)
    if not 1 <= count <= MAX_DESCRIPTORS:
        raise ProtocolError(f"{message.name} with {count} regions, there may be 1 to {MAX_DESCRIPTORS}")
    if len(payload) < _TABLE_HEAD.size + count * _REGION.size:
        raise ProtocolError(f"{message.name} with {len(payload)} bytes, too few for {count} regions")
    regions = range(_TABLE_HEAD.size, _TABLE_HEAD.size + count * _REGION.size, _REGION.size)
    return [RegionDescription(*_REGION.unpack_from(payload, at)) for at in regions]


def parse_memory_region(message: Message) -> RegionDescription:
    """The region of ADD_MEM_REG and REM_MEM_REG, behind 8 bytes of padding. Raises ProtocolError."""
    if len(message.payload) != U64.size + _REGION.size:
        raise ProtocolError(f"{message.name} with {len(message.payload)} bytes, it has {U64.size + _REGION.size}")
    return RegionDescription(*_REGION.unpack_from(message.payload, U64.size))
