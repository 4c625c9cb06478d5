"""Hostile front ends: sessions of vhost-user that are nearly right, over a socket, to a server here and to a process.

What has to hold: a front end is answered, or sent away with one line; what it had here goes with it, descriptors and
mappings; no byte of its files is touched outside the regions it shared; and the next front end is served.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from unittest import mock

from fuzzing.guest import BrokenPromise, HostileGuest, Part
from lgmp.testing import PATIENCE, Driver, FrontEnd, SharedMemory, SharedRegion, direct
from lgmp.testing.front_end import BUS_FEATURES, table
from lgmp.vhost_user.backend import PROTOCOL_FEATURES
from lgmp.vhost_user.messages import (
    CONFIG,
    HEADER,
    HEADER_BYTES,
    INFLIGHT,
    MAX_DESCRIPTORS,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_VRING_NOFD_MASK,
    VRING_ADDR,
    VRING_STATE,
    Message,
    Request,
)
from lgmp.virtio.block import VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from lgmp.virtio.console import OUTPUT_QUEUE
from lgmp.virtio.inflight import InflightRegion, inflight_bytes
from lgmp.virtio.net import RECEIVE_QUEUE, VIRTIO_NET_F_MRG_RXBUF
from workers import vhost_user
from workers.block import Block
from workers.console import Console
from workers.device import Device
from workers.net import Net, Stream
from workers.rng import Rng
from workers.runtime import Options

_NUM = 16
_QUEUES = 2
_PAGE = mmap.PAGESIZE
_RING_BYTES = _QUEUES * 2 * _PAGE
_RAM_BYTES = 0x8000
_DISK_BYTES = 0x8000
_DISK = bytes(range(256)) * (_DISK_BYTES // 256)
_BEYOND = b"\xc3" * 5000
_GUARD = 0xA5
_FEATURES = BUS_FEATURES | 1 << VHOST_USER_F_PROTOCOL_FEATURES
_WORDS = (0, 1, 2, 3, 8, _NUM, 127, 128, 255, 256, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)
_LONG_WORDS = (*_WORDS, 1 << 32, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - _PAGE, (1 << 64) - 1)
_ODD_REQUESTS: tuple[list[Part], ...] = ([b"text"], [20], [bytes(16), 512, 1])
_IN_REGIONS = (
    # Where the guest has it is where its file has it; then not so.
    (SharedRegion(0, _RAM_BYTES + _RING_BYTES), SharedRegion(0x100000, 0x4000, 0x20000)),
    (
        SharedRegion(0, _RAM_BYTES + _RING_BYTES, 0x2000),
        SharedRegion(0x1_0000_0000, 0x4000, 0x1F000),
        SharedRegion(0x1_0000_4000, 0x4000, 0, 1),
    ),
)


@dataclass(frozen=True)
class _Sent:
    """A message as it goes over the socket; `size` is what its header says, None for what it is."""

    request: int
    payload: bytes = b""
    descriptors: tuple[int, ...] = ()
    flags: int = VERSION
    size: int | None = None
    before: bytes = b""

    def pack(self) -> bytes:
        size = len(self.payload) if self.size is None else self.size
        return self.before + HEADER.pack(self.request, self.flags, size) + self.payload


class _Guest:
    """A front end's side of one guest: its memory, with guard bytes all around its regions, and what it may send."""

    def __init__(self, regions: Sequence[SharedRegion], stack: contextlib.ExitStack) -> None:
        self.memory = SharedMemory(regions, ring_bytes=_RING_BYTES)
        self.driver = Driver(queues=_QUEUES, num=_NUM, memory=self.memory)
        stack.callback(self.driver.close)
        layouts = self.driver.layouts
        self.guest = HostileGuest(self.memory.view, layouts, _RAM_BYTES, regions[0].size)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(_QUEUES)]
        self.call = os.eventfd(0)
        self.inflight_bytes = _QUEUES * -(-inflight_bytes(_NUM) // 64) * 64
        self.inflight = os.memfd_create("fuzz-inflight")
        os.ftruncate(self.inflight, self.inflight_bytes)
        for descriptor in (*self.kicks, self.call, self.inflight):
            stack.callback(os.close, descriptor)
        # What it may accept.
        self.features = _FEATURES
        self.identities = {_identity(descriptor) for descriptor in self.memory.files}
        self._guards: list[tuple[int, int, int]] = []
        for number, descriptor in enumerate(self.memory.files):
            at, size = 0, os.fstat(descriptor).st_size
            for region in sorted((one for one in regions if one.file == number), key=lambda one: one.offset):
                self._guards.append((number, at, region.offset))
                at = region.offset + region.size
            self._guards.append((number, at, size))
        self.fill_guards()

    def fill_guards(self) -> None:
        """Write the guard bytes."""
        for number, start, end in self._guards:
            os.pwrite(self.memory.files[number], bytes([_GUARD]) * (end - start), start)

    def check_guards(self, described: Sequence[tuple[int, int]]) -> None:
        """Whether they are there still, but for those that a message has `described` as memory (start, end)."""
        for number, start, end in self._guards:
            if any(one < end and start < other for one, other in described):
                continue
            found = os.pread(self.memory.files[number], end - start, start)
            if found != bytes([_GUARD]) * (end - start):
                raise BrokenPromise(f"file {number} was written to between {start:#x} and {end:#x}, which is no region")

    # What it says

    def opening(self, random: Random) -> list[_Sent]:
        """A lawful beginning."""
        every = self.features
        features = (
            every if random.random() < 0.7 else random.choice((0, every & ~(1 << 29), every & ~(1 << 32), 1 << 30))
        )
        sent = [
            _Sent(Request.SET_OWNER),
            _Sent(Request.GET_FEATURES),
            _Sent(Request.GET_PROTOCOL_FEATURES),
            _Sent(Request.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL_FEATURES)),
            _Sent(Request.GET_QUEUE_NUM),
            _Sent(Request.GET_MAX_MEM_SLOTS),
            _Sent(Request.SET_FEATURES, U64.pack(features)),
        ]
        if random.random() < 0.3:
            sent = [one for one in sent if random.random() < 0.8]
        sent.append(self.share())
        if random.random() < 0.3:
            sent += self.keep_inflight(random)
        for number in range(_QUEUES):
            sent += self.start(number, random)
        return sent

    def share(self) -> _Sent:
        regions = self.memory.regions
        return _Sent(Request.SET_MEM_TABLE, table(regions), tuple(map(self.memory.file_of, regions)))

    def keep_inflight(self, random: Random) -> list[_Sent]:
        content = bytearray(self.inflight_bytes)
        if random.random() < 0.5:
            # Somebody's who served the rings before, or claims it.
            region = InflightRegion(memoryview(content), _NUM)
            for _ in range(random.randrange(4)):
                head = random.randrange(_NUM)
                region.inflight[head] = random.choice((1, 1, 0, 0xFF))
                region.counter[head] = random.choice((1, 2, 3, random.getrandbits(64)))
                region.next[head] = random.randrange(_NUM + 2)
            for at in range(random.randrange(3)):
                region.header[6 + at] = random.choice((0, 1, 2, _NUM, 0xFFFF))
        os.pwrite(self.inflight, content, 0)
        asked = INFLIGHT.pack(0, 0, _QUEUES, _NUM)
        kept = INFLIGHT.pack(self.inflight_bytes, 0, _QUEUES, _NUM) + bytes(random.choice((0, 4)))
        return [_Sent(Request.GET_INFLIGHT_FD, asked), _Sent(Request.SET_INFLIGHT_FD, kept, (self.inflight,))]

    def start(self, number: int, random: Random) -> list[_Sent]:
        layout = self.driver.layouts[number]
        user = self.memory.user_address
        addresses = user(layout.desc), user(layout.used), user(layout.avail)
        used = struct.unpack_from("<H", self.memory.view, layout.used + 2)[0]
        parts = [
            _Sent(Request.SET_VRING_NUM, VRING_STATE.pack(number, _NUM)),
            _Sent(Request.SET_VRING_BASE, VRING_STATE.pack(number, used)),
            _Sent(Request.SET_VRING_ADDR, VRING_ADDR.pack(number, 0, *addresses, 0)),
            _Sent(Request.SET_VRING_CALL, U64.pack(number), (self.call,)),
            _Sent(Request.SET_VRING_ERR, U64.pack(number), (self.call,)),
        ]
        random.shuffle(parts)
        return [
            *parts,
            _Sent(Request.SET_VRING_KICK, U64.pack(number), (self.kicks[number],)),
            _Sent(Request.SET_VRING_ENABLE, VRING_STATE.pack(number, 1)),
        ]

    def going_on(self, random: Random) -> list[_Sent]:  # noqa: PLR0911, PLR0912  one for each
        """Something lawful, or nearly, once the rings are started."""
        number = random.randrange(_QUEUES)
        what = random.randrange(17)
        state = VRING_STATE.pack(number, random.randrange(2))
        if what == 0:
            return [_Sent(Request.GET_VRING_BASE, state), *self.start(number, random)]
        if what == 1:
            return [_Sent(Request.SET_VRING_ENABLE, state)]
        if what == 2:
            return [self.share()]
        if what == 3:
            some = random.sample(self.memory.regions, random.randrange(1, len(self.memory.regions) + 1))
            return [_Sent(Request.SET_MEM_TABLE, table(some), tuple(map(self.memory.file_of, some))), self.share()]
        if what in (4, 5):
            region = random.choice(self.memory.regions)
            gone = _Sent(Request.REM_MEM_REG, bytes(8) + region.pack())
            back = _Sent(Request.ADD_MEM_REG, bytes(8) + region.pack(), (self.memory.file_of(region),))
            return [gone, back] if what == 4 else [gone, _Sent(Request.GET_VRING_BASE, state), back]
        if what == 6:
            offset, size = random.randrange(random.choice((100, 300))), random.randrange(random.choice((100, 300)))
            return [_Sent(Request.GET_CONFIG, CONFIG.pack(offset, size, 0) + bytes(size))]
        if what == 7:
            return [_Sent(Request.SET_FEATURES, U64.pack(self.features & ~(random.getrandbits(2) << 28)))]
        if what == 8:
            return [_Sent(Request.SET_STATUS, U64.pack(random.choice((0, 1, 15)))), _Sent(Request.GET_STATUS)]
        if what == 9:
            stops = [_Sent(Request.GET_VRING_BASE, VRING_STATE.pack(one, 0)) for one in range(_QUEUES)]
            return [*stops, *self.keep_inflight(random), *self.start(0, random), *self.start(1, random)]
        if what == 10:
            reset = random.choice((Request.RESET_DEVICE, Request.RESET_OWNER))
            return [_Sent(reset), *self.start(number, random)]
        if what == 11:
            request = random.choice((Request.SET_VRING_CALL, Request.SET_VRING_ERR))
            return [_Sent(request, U64.pack(number | VHOST_USER_VRING_NOFD_MASK))]
        if what == 12:
            return [_Sent(Request.SET_VRING_KICK, U64.pack(number), (self.kicks[number],))]
        if what == 13:
            return [one for one in self.start(number, random) if one.request == Request.SET_VRING_ADDR]
        if what == 14:
            return [_Sent(random.choice((Request.SET_LOG_BASE, Request.SET_LOG_FD)), bytes(16), (self.call,))]
        return [_Sent(random.choice((Request.GET_FEATURES, Request.GET_STATUS, Request.SET_OWNER)))]


class _Strange:
    """Descriptors that are none of those that a front end should send."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        def keep(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        memory = keep(os.memfd_create("fuzz-huge"))
        os.ftruncate(memory, 1 << 40)
        small = keep(os.memfd_create("fuzz-small"))
        os.ftruncate(small, 100)
        plain = keep(os.memfd_create("fuzz-plain"))
        os.ftruncate(plain, 1 << 20)
        full = keep(os.eventfd((1 << 32) - 1, os.EFD_NONBLOCK))
        os.eventfd_write(full, (1 << 64) - 2 - ((1 << 32) - 1))
        blocking = keep(os.eventfd(0))
        os.eventfd_write(blocking, (1 << 64) - 2)
        sockets = [stack.enter_context(one) for one in socket.socketpair()]
        reading, writing = os.pipe()
        poll = stack.enter_context(contextlib.closing(select.epoll()))
        self.all = (
            *(memory, small, plain, full, blocking, keep(reading), keep(writing), sockets[0].fileno(), poll.fileno()),
            keep(os.open(f"/proc/self/fd/{plain}", os.O_RDONLY)),
            *(keep(os.open(path, os.O_RDONLY)) for path in ("/", "/dev/null", "/dev/zero")),
            keep(os.memfd_create("fuzz-empty")),
            keep(os.open("/dev/null", os.O_WRONLY)),
        )


def _mutated(random: Random, sent: list[_Sent], strange: Sequence[int]) -> list[_Sent]:  # noqa: PLR0912  as many ways
    """One thing about a session made wrong, or perhaps only different."""
    at = random.randrange(len(sent))
    longer = [number for number, one in enumerate(sent) if len(one.payload) > VRING_STATE.size]
    if longer and random.random() < 0.5:  # those with addresses
        at = random.choice(longer)
    one = sent[at]
    payload, descriptors = one.payload, one.descriptors
    what = random.randrange(15)
    if what == 0:
        return sent[:at] + sent[at + 1 :]
    if what == 1:
        return [*sent[:at], one, *sent[at:]]
    if what == 2:
        other = random.randrange(len(sent))
        sent[at], sent[other] = sent[other], one
        return sent
    if what in (3, 4, 5) and len(payload) >= 4:
        size = 8 if len(payload) >= 8 and random.random() < 0.5 else 4
        place = random.randrange(len(payload) // size) * size
        word = random.choice(_WORDS if size == 4 else _LONG_WORDS)
        if random.random() < 0.5:  # near to what it was
            old = int.from_bytes(payload[place : place + size], "little")
            word = (old + random.choice((-_PAGE, -1, 1, 8, 0x800, _PAGE, 0x10000))) % (1 << 8 * size)
        payload = payload[:place] + word.to_bytes(size, "little") + payload[place + size :]
    elif what == 6:
        payload = payload[: random.randrange(len(payload) + 1)]
    elif what == 7:
        payload += random.randbytes(random.choice((1, 4, 8, 24, 300)))
    elif what == 8:
        one = replace(one, size=random.choice((0, 1, 7, 8, 12, 40, 4095, 4096, 4097, 1 << 31, (1 << 32) - 1)))
    elif what == 9:
        one = replace(one, flags=random.choice((0, 2, 3, REPLY, VERSION | REPLY, VERSION | 0x10, (1 << 32) - 1)))
    elif what == 10:
        one = replace(one, request=random.choice((0, *Request, 41, 42, 1000, (1 << 32) - 1)))
    elif what == 11:
        descriptors = descriptors[: random.randrange(len(descriptors) + 1)]
    elif what == 12:
        descriptors += tuple(random.choice(strange) for _ in range(random.randrange(1, 9)))
    elif what == 13:
        descriptors = tuple(random.choice(strange) if random.random() < 0.7 else fd for fd in descriptors or (0,))
    else:
        one = replace(one, before=random.randbytes(random.randrange(1, 20)))
    sent[at] = replace(one, payload=payload, descriptors=descriptors)
    return sent


def _session(random: Random, guest: _Guest, strange: Sequence[int]) -> tuple[list[_Sent], int]:
    """What a front end says, and how many bytes of that it leaves out at the end."""
    sent = guest.opening(random)
    for _ in range(random.randrange(8)):
        sent += guest.going_on(random)
    if random.random() < 0.8:
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            sent = _mutated(random, sent, strange) or sent
    if random.random() < 0.5:
        sent = [one if random.random() < 0.7 else replace(one, flags=one.flags | NEED_REPLY) for one in sent]
    return sent, random.choice((0, 0, 0, random.randrange(1, 20)))


def _say(connection: socket.socket, sent: Sequence[_Sent], left_out: int) -> None:
    """Send a session, as far as there is room for it and somebody who takes it."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        for number, one in enumerate(sent):
            data = one.pack()
            if number + 1 == len(sent) and left_out:
                data = data[:-left_out]
            if data and one.descriptors:
                data = data[socket.send_fds(connection, [data], one.descriptors) :]
            if data:
                connection.sendall(data)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def _hear(connection: socket.socket, sent: Sequence[_Sent]) -> None:
    """Take what was answered. Raises BrokenPromise where it is no row of answers to what was sent."""
    data = b""
    descriptors: list[int] = []
    try:
        while True:
            more, found, _, _ = socket.recv_fds(connection, 1 << 16, MAX_DESCRIPTORS)
            descriptors += found
            if not more:
                break
            data += more
    except ConnectionResetError:
        pass  # it had not taken all that was sent
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if any(one.before or one.size is not None for one in sent):
        return  # who knows what that was
    asked = iter([one.request for one in sent])
    while data:
        if len(data) < HEADER_BYTES:
            raise BrokenPromise(f"half an answer: {data!r}")
        request, flags, size = HEADER.unpack_from(data)
        if flags != VERSION | REPLY or len(data) < HEADER_BYTES + size:
            raise BrokenPromise(f"an answer with flags {flags:#x} and {len(data)} of {size} bytes")
        if request not in asked:
            raise BrokenPromise(f"an answer to request {request}, which is not what is to be answered next")
        data = data[HEADER_BYTES + size :]


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _belongings(pid: int | str) -> tuple[int, int]:
    """How many descriptors a process has, and how many mappings of files that have no name."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return len(os.listdir(f"/proc/{pid}/fd")), len(re.findall(r"/memfd:(?:lgmp-guest|lgmp-inflight|fuzz)", maps))


@dataclass
class _Watched:
    """What a server has been told in one session."""

    messages: int = 0
    described: list[tuple[int, int]] = field(default_factory=list)
    guards_hold: bool = True


class _Server(vhost_user.Server):
    """A server that ends its service with each front end, and whose messages are watched."""

    watched: _Watched
    guest: _Guest
    random: Random

    def _connect(self, connection: socket.socket) -> None:  # type: ignore[override]
        super()._connect(connection)
        assert self._backend is not None
        handle = self._backend.handle

        def watched(message: Message) -> tuple[bytes, int | None] | None:
            self._watch(message)
            answer = handle(message)
            self._go_on()
            return answer

        self._backend.handle = watched  # type: ignore[method-assign]

    def _watch(self, message: Message) -> None:
        """Note what may be written to from now on."""
        watched = self.watched
        watched.messages += 1
        payload = message.payload
        if message.request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG):
            for at in range(8, len(payload) - 31, 32):
                _, size, _, offset = struct.unpack_from("<QQQQ", payload, at)
                watched.described.append((offset, offset + size))
        elif any(_identity(descriptor) in self.guest.identities for descriptor in message.descriptors):
            watched.guards_hold = False  # its memory for an eventfd, or as the record of its rings

    def _go_on(self) -> None:
        """The guest does something meanwhile."""
        if self.random.random() < 0.3:
            queue = self.random.randrange(_QUEUES)
            self.guest.guest.offer(self.random, queue, _request(self.random, self._device, queue))
            if self.random.random() < 0.2:
                self.guest.guest.spoil(self.random, queue)
            if self.random.random() < 0.8:
                os.eventfd_write(self.guest.kicks[queue], 1)

    def _hang_up(self) -> None:
        super()._hang_up()
        self._stopping = True

    def _finish(self) -> None:
        """There is another case."""

    def one_session(self) -> None:
        """Serve the front end that waits, until it has gone."""
        self._stopping = False
        self.serve()
        if self._channel is not None or self._backend is not None or self._kicks or self._running or self._queues:
            raise BrokenPromise("the server has not let go of everything")


def _request(random: Random, device: Device | None, queue: int) -> list[Part]:
    """One of a driver's, mostly of that of `device`."""
    if random.random() < 0.05:
        return random.choice(_ODD_REQUESTS)
    if isinstance(device, Console) and queue == OUTPUT_QUEUE:
        return [random.randbytes(random.randrange(300))]
    if isinstance(device, (Console, Rng)):
        return [random.randrange(1, 700)]
    if isinstance(device, Net):
        size = random.choice((10, 12, 14, 72, 600, 1526))
        return [size] if queue == RECEIVE_QUEUE else [bytes(random.choice((10, 12))) + random.randbytes(size)]
    header = struct.pack("<IIQ", random.choice((VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT)), 0, random.randrange(70))
    return [header, random.choice((512, random.randbytes(512))), 1]


class FuzzedVhostUser:
    """Servers in this process. `chains` are messages that were handled, `broken` front ends that were sent away."""

    name = "vhost-user"

    def __init__(self) -> None:
        """A disk, an entropy source, a console and a card, each served by one server in all cases."""
        self.chains = self.broken = 0
        self._lines: list[str] = []
        self._stack = stack = contextlib.ExitStack()
        stack.enter_context(mock.patch.object(vhost_user, "say", self._lines.append))
        self._guests = [_Guest(regions, stack) for regions in _IN_REGIONS]
        self._strange = _Strange(stack)
        self._disk = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  the stack closes it
        self._disk.write(_DISK + _BEYOND)
        self._disk.flush()
        self._source, self._feed = self._pipe()
        typed, self._type = self._pipe()
        self._shown, out = self._pipe()
        self._wire, card = (stack.enter_context(end) for end in socket.socketpair())
        self._wire.setblocking(False)
        devices = (
            Block(self._disk.fileno(), size=_DISK_BYTES, serial="fuzzed", say=self._lines.append),
            Rng(self._source, source="a pipe", say=self._lines.append),
            Console(typed, out, say=self._lines.append),
            Net(Stream(card.fileno()), say=self._lines.append),
        )
        offered = BUS_FEATURES, BUS_FEATURES, BUS_FEATURES, BUS_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF
        self._servers = [self._serve(*each) for each in zip(devices, offered, strict=True)]
        for number in range(len(devices)):
            self._prove(number)
        gc.collect()  # what others have left in this process
        self._before = _belongings("self")

    def _pipe(self) -> tuple[int, int]:
        reading, writing = os.pipe2(os.O_NONBLOCK)
        self._stack.callback(os.close, reading)
        self._stack.callback(os.close, writing)
        return reading, writing

    def _serve(self, device: Device, features: int) -> tuple[_Server, str, int]:
        self._stack.callback(device.close)
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        address = f"\0lgmp-fuzz.{os.getpid()}.{id(device)}"
        listener.bind(address)
        listener.listen()
        words = ["--name", "dev", "--vhost-user-fd", str(os.dup(listener.fileno())), "--queues", str(_QUEUES)]
        options = Options([*words, "--virtio-features", f"{features:#x}", "--config-space", "00ff"], {})
        server = _Server(options, device)
        self._stack.callback(server._own.close)
        self._stack.callback(server._epoll.close)
        self._stack.callback(os.close, server._bell)
        self._stack.callback(os.close, server._doorbell)
        return server, address, features | 1 << VHOST_USER_F_PROTOCOL_FEATURES

    def close(self) -> None:
        """Give it all back."""
        self._stack.close()

    def _send(self, frame: bytes) -> None:
        """A frame for the card, which may not have taken those before."""
        with contextlib.suppress(BlockingIOError):
            self._wire.sendall(struct.pack("!I", len(frame)) + frame)

    def run(self, random: Random) -> None:
        """One front end. Raises BrokenPromise, or what the server should not have raised."""
        number = random.randrange(len(self._servers))
        guest = random.choice(self._guests)
        guest.guest.begin()
        guest.features = self._servers[number][2]
        if random.random() < 0.5:
            os.write(self._feed, random.randbytes(300))
            os.write(self._type, b"typed")
            self._send(random.randbytes(random.choice((14, 60, 600))))
        sent, left_out = _session(random, guest, self._strange.all)
        watched = self._go(number, guest, random, sent, left_out)
        self.chains += watched.messages
        gone = [line for line in self._lines if "the front end is" in line]
        if len(gone) > 1:
            raise BrokenPromise(f"one front end, and it is said that {gone}")
        self.broken += len(gone)
        if watched.guards_hold:
            guest.check_guards(watched.described)
        guest.fill_guards()
        after = _belongings("self")
        if after[0] > self._before[0] or after[1] > self._before[1]:
            raise BrokenPromise(f"descriptors and mappings: {self._before} before, {after} after it")
        self._before = after  # others in this process may have given something back
        if os.pread(self._disk.fileno(), len(_BEYOND) + 1, _DISK_BYTES) != _BEYOND:
            raise BrokenPromise("the disk's file was written to beyond its end")
        if random.random() < 0.1:
            self._prove(number)

    def _go(self, number: int, guest: _Guest, random: Random, sent: Sequence[_Sent], left_out: int) -> _Watched:
        self._lines.clear()
        server, address, _ = self._servers[number]
        server.watched = _Watched()
        server.guest = guest
        server.random = random
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(address)
            connection.setblocking(False)
            _say(connection, sent, left_out)
            server.one_session()
            connection.setblocking(True)
            _hear(connection, sent)
        for reading in (self._shown, self._source, self._wire.fileno()):
            with contextlib.suppress(BlockingIOError):
                while os.read(reading, 1 << 16):
                    pass
        return server.watched

    def _prove(self, number: int) -> None:
        """A front end that does all rightly is served. Raises BrokenPromise."""
        guest = self._guests[0]
        guest.guest.begin()
        guest.driver.reset()
        guest.driver.forget()
        os.pwrite(self._disk.fileno(), _DISK[:512], 0)
        guest.features = _FEATURES
        parts: list[list[bytes | int]] = [[bytes(16), 512, 1], [8], [b"hello"], [bytes(12) + bytes(60)]]
        queue = 1 if number >= 2 else 0
        chain = direct(guest.driver, *parts[number], queue=queue)
        os.write(self._feed, bytes(8))
        still = Random(0)
        with mock.patch.object(_Server, "_go_on", lambda self: None):
            self._go(number, guest, still, guest.opening(_Steady()), 0)
        (used,) = guest.driver.queues[queue].collect()
        answers = [_DISK[:512] + b"\0", bytes(8), b"", b""]
        if used.head != chain.head or chain.answer != answers[number]:
            raise BrokenPromise(f"a good front end is not served: {used}, {chain.answer!r}")


class _Steady(Random):
    """Decides always the same: all that is likely, nothing that is not."""

    def random(self) -> float:
        """Between what is likely and what is not."""
        return 0.5


class FuzzedServe:
    """`lgmp serve block` as a process, which serves one front end after another."""

    name = "vhost-user process"

    def __init__(self) -> None:
        """One process for all cases."""
        self.chains = self.broken = 0
        self._stack = stack = contextlib.ExitStack()
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (directory / "disk").write_bytes(_DISK)
        self._address = str(directory / "socket")
        self._errors = stack.enter_context((directory / "errors").open("wb+"))
        self._guests = [_Guest(regions, stack) for regions in _IN_REGIONS]
        self._strange = _Strange(stack)
        command = [sys.executable, "-P", "-m", "workers.block", "--name", "vda", "--queues", str(_QUEUES)]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, (directory / "disk").open("r+b") as disk:
            listener.bind(self._address)
            listener.listen()
            command += ["--vhost-user-fd", str(listener.fileno()), "--virtio-features", f"{BUS_FEATURES:#x}"]
            command += ["--disk-fd", str(disk.fileno()), "disk"]
            descriptors = listener.fileno(), disk.fileno()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=self._errors, pass_fds=descriptors
            )
        stack.callback(self._process.wait)
        stack.callback(self._process.kill)
        self._prove()
        self._before = _belongings(self._process.pid)

    def run(self, random: Random) -> None:
        """One front end. Raises BrokenPromise."""
        guest = random.choice(self._guests)
        guest.guest.begin()
        for queue in range(_QUEUES):
            for _ in range(random.randrange(4)):
                guest.guest.offer(random, queue, _request(random, None, queue))
            if random.random() < 0.3:
                guest.guest.spoil(random, queue)
        sent, left_out = _session(random, guest, self._strange.all)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(self._address)
            _say(connection, sent, left_out)
            try:
                _hear(connection, sent)
            except TimeoutError as error:
                raise BrokenPromise("the worker does not hang up") from error
        self.chains += len(sent)

    def _prove(self) -> None:
        guest = self._guests[0]
        guest.guest.begin()
        guest.driver.reset()
        guest.driver.forget()
        with FrontEnd.connect(self._address, guest.driver) as front_end:
            front_end.begin()
            chain = direct(guest.driver, struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 3), 512, 1)
            front_end.rings[0].kick()
            front_end.rings[0].collect(1)
            if chain.answer[-1]:
                raise BrokenPromise("a good front end is not served")
            for ring in front_end.rings:
                ring.stop()
            front_end.socket.shutdown(socket.SHUT_WR)
            front_end.wait_for_hang_up()

    def close(self) -> None:
        """Serve a good front end, and end. Raises BrokenPromise."""
        with self._stack:
            self._prove()
            after = _belongings(self._process.pid)
            self._process.terminate()
            code = self._process.wait(PATIENCE)
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")
            self.broken = said.count("the front end is")
            if code or "Traceback" in said or "defect" in said:
                raise BrokenPromise(f"the worker ended with {code} and said {said[-3000:]}")
            if after != self._before:
                raise BrokenPromise(f"descriptors and mappings: {self._before} before, {after} after all")
