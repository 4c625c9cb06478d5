"""The back end's side of one connection: what the front end has said, and what follows from that for the rings.

A message comes in, an answer goes out, and in between rings are started and stopped. Whoever runs the device is its
`Host`: told before the rings change that he has to let go of them, and finds them in `running` afterwards.

A ring is started by SET_VRING_KICK, as soon as its descriptor is there and without waiting for a kick: there may be
requests in it that were kicked for long ago. It stops with GET_VRING_BASE. In between it is served while it is enabled.
"""

from __future__ import annotations

import mmap
import os

from lgmp import shared_file
from lgmp.vhost_user.messages import (
    CONFIG,
    INFLIGHT,
    MAX_CONFIG,
    U64,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_CONFIG,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_STATUS,
    VHOST_USER_VRING_IDX_MASK,
    VHOST_USER_VRING_NOFD_MASK,
    VRING_ADDR,
    VRING_STATE,
    ProtocolError,
    Request,
    name_of,
    parse_memory_region,
    parse_memory_table,
    reply,
)
from lgmp.vhost_user.regions import MAX_REGIONS, Regions
from lgmp.virtio.ids import (
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from lgmp.virtio.inflight import InflightRegion, inflight_bytes
from lgmp.virtio.ring import MAX_RING, RingError, Virtqueue, VringLayout

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from lgmp.vhost_user.messages import Message

    class Host(Protocol):
        """Who runs the device whose rings these are."""

        def suspend(self) -> None:
            """The rings are about to change: touch none of them until they are looked up in `running` again."""

        def reset(self) -> None:
            """The driver reset the device. Its rings are still there, for what it has given out, and then no more."""

        def say(self, text: str) -> None:
            """A line for the user."""


PROTOCOL_FEATURES = (
    1 << VHOST_USER_PROTOCOL_F_MQ
    | 1 << VHOST_USER_PROTOCOL_F_REPLY_ACK
    | 1 << VHOST_USER_PROTOCOL_F_CONFIG
    | 1 << VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    | 1 << VHOST_USER_PROTOCOL_F_RESET_DEVICE
    | 1 << VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
    | 1 << VHOST_USER_PROTOCOL_F_STATUS
)
# The regions of an in-flight file begin at multiples of this, as with other back ends: one may go on from another's.
_INFLIGHT_ALIGN = 64

# What a front end may ask, and a back end that has not offered it may decline.
_DECLINED = frozenset(
    (
        Request.SET_LOG_BASE,
        Request.SET_LOG_FD,
        Request.SEND_RARP,
        Request.NET_SET_MTU,
        Request.SET_BACKEND_REQ_FD,
        Request.IOTLB_MSG,
        Request.SET_VRING_ENDIAN,
        Request.SET_CONFIG,
        Request.VRING_KICK,
    )
)


class Declined(Exception):
    """The request is not obeyed, and that harms nothing."""


class Answer:
    """What goes back: bytes, and perhaps a descriptor, which is the receiver's to close."""

    __slots__ = ("descriptor", "payload")

    def __init__(self, payload: bytes, descriptor: int | None = None) -> None:
        """`payload` without its header."""
        self.payload = payload
        self.descriptor = descriptor


class Vring:
    """What the front end has said of one ring."""

    def __init__(self, index: int) -> None:
        """Nothing yet."""
        self.index = index
        self.num = 0
        self.base = 0
        # Where its parts are: descriptors, used, available; addresses of the front end's.
        self.addresses: tuple[int, int, int] | None = None
        self.kick: int | None = None
        self.call: int | None = None
        self.error: int | None = None
        self.started = False
        # Whether the status was set to 0 since: it is not served, and where it has come to is still to be asked for.
        self.halted = False
        self.enabled = False
        # Whether the driver broke a rule since it was started.
        self.broken = False
        # As Virtqueue has it.
        self.lag = 0
        # Its own, unless the front end keeps one.
        self.inflight: InflightRegion | None = None
        # Its own of before it was stopped, where that has something in it for whoever goes on from `base`.
        self.left: InflightRegion | None = None
        # None where it is not started, or not in guest memory just now.
        self.queue: Virtqueue | None = None

    def close(self) -> None:
        """Close its descriptors."""
        for descriptor in (self.kick, self.call, self.error):
            if descriptor is not None:
                os.close(descriptor)
        self.kick = self.call = self.error = None


class Backend:
    """One connection, from the back end's side."""

    def __init__(self, host: Host, *, name: str, features: int, config: bytes, queues: int) -> None:
        """A device that offers `features` (64 bits) and `queues` rings, and has `config` as its configuration space.

        `name` is what messages call it.
        """
        self._host = host
        self._name = name
        self.offered = features | 1 << VHOST_USER_F_PROTOCOL_FEATURES
        self._config = config.ljust(MAX_CONFIG, b"\0")
        self.features = 0
        self.protocol_features = 0
        self.status = 0
        # Whether the status was set to 0 since a ring was started.
        self._reset_is_due = False
        self.memory = Regions()
        self.vrings = [Vring(index) for index in range(queues)]
        # What the front end keeps of the requests in flight: a region for each ring, of so many descriptors.
        self._inflight: memoryview | None = None
        self._inflight_queues = self._inflight_num = 0
        self._handlers: dict[int, Callable[[Message], Answer | None]] = {
            Request.GET_FEATURES: lambda _message: Answer(U64.pack(self.offered)),
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: lambda _message: None,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: lambda _message: Answer(U64.pack(PROTOCOL_FEATURES)),
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: lambda _message: Answer(U64.pack(len(self.vrings))),
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_CONFIG: self._get_config,
            Request.GET_INFLIGHT_FD: self._get_inflight_fd,
            Request.SET_INFLIGHT_FD: self._set_inflight_fd,
            Request.RESET_DEVICE: self._reset_device,
            Request.GET_MAX_MEM_SLOTS: lambda _message: Answer(U64.pack(MAX_REGIONS)),
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.SET_STATUS: self._set_status,
            Request.GET_STATUS: lambda _message: Answer(U64.pack(self.status)),
        }

    def running(self) -> list[Vring]:
        """The rings that are to be served now; each has a `queue`."""
        return [ring for ring in self.vrings if ring.queue is not None and self._is_served(ring)]

    def _is_served(self, ring: Vring) -> bool:
        # Who knows nothing of protocol features knows nothing of SET_VRING_ENABLE.
        enabled = ring.enabled or not self.features >> VHOST_USER_F_PROTOCOL_FEATURES & 1
        return enabled and not ring.halted and not ring.broken

    def handle(self, message: Message) -> tuple[bytes, int | None] | None:
        """Obey a message; gives what to answer, with a descriptor that is to be closed when it is sent.

        Closes the descriptors of the message, but for those it keeps. Raises ProtocolError.
        """
        try:
            answer = self._obey(message)
            acknowledgement = 0
        except Declined:
            answer = None
            acknowledgement = 1
        finally:
            for descriptor in message.descriptors:
                os.close(descriptor)
            message.descriptors = []
        if answer is None:
            if not (message.needs_reply and self.protocol_features >> VHOST_USER_PROTOCOL_F_REPLY_ACK & 1):
                return None
            answer = Answer(U64.pack(acknowledgement))
        return reply(message.request, answer.payload), answer.descriptor

    def _obey(self, message: Message) -> Answer | None:
        handler = self._handlers.get(message.request)
        if handler is not None:
            return handler(message)
        if message.request not in _DECLINED:
            raise ProtocolError(f"{message.name}, which was not offered")
        self._host.say(f"{self._name}: the front end asks for {message.name}, which was not offered; declined")
        raise Declined

    # Features

    def _set_features(self, message: Message) -> None:
        features = message.u64()
        if features & ~self.offered:
            raise ProtocolError(f"{message.name} {features:#x}, and {self.offered:#x} are offered")
        self._host.suspend()
        self.features = features
        self._remake_queues()

    def _set_protocol_features(self, message: Message) -> None:
        features = message.u64()
        if features & ~PROTOCOL_FEATURES:
            raise ProtocolError(f"{message.name} {features:#x}, and {PROTOCOL_FEATURES:#x} are offered")
        self.protocol_features = features

    def _get_config(self, message: Message) -> Answer:
        if len(message.payload) < CONFIG.size:
            raise ProtocolError(f"{message.name} with {len(message.payload)} bytes")
        offset, size, flags = CONFIG.unpack_from(message.payload)
        if len(message.payload) != CONFIG.size + size or offset + size > MAX_CONFIG:
            raise ProtocolError(f"{message.name} of {size} bytes at {offset}, with {len(message.payload)} bytes")
        # What lies behind the configuration space reads as zeros: newer front ends know longer ones.
        return Answer(CONFIG.pack(offset, size, flags) + self._config[offset : offset + size])

    # Resets

    def _set_status(self, message: Message) -> None:
        status = message.u64()
        if status > 0xFF:
            raise ProtocolError(f"{message.name} {status:#x}, it is a byte")
        if status:
            # That it needs a reset is the device's to say, and no driver can take it back (virtio 1.0, section 2.1.2).
            self.status = status | self.status & VIRTIO_CONFIG_S_NEEDS_RESET
            return
        # QEMU sends this before GET_VRING_BASE, and where the guest is merely paused as well. Whether its driver has
        # reset the device shows when its rings begin anew, or do not.
        self._host.suspend()
        self.status = 0
        self._reset_is_due = True
        for ring in self.vrings:
            ring.halted = ring.started

    def _reset_device(self, _message: Message) -> None:
        self.status = 0
        self._reset_is_due = False
        self._host.reset()
        for ring in self.vrings:
            inflight = ring.inflight
            self._stop(ring)
            # Of a ring that was stopped before, it may still be gone on with: some front ends reset after every stop.
            if inflight is not None:
                inflight.reset()
                ring.left = None
            ring.enabled = False

    def _reset_owner(self, _message: Message) -> None:
        # It is of old, and back ends are advised to disable the rings and do no more.
        self._host.suspend()
        for ring in self.vrings:
            ring.enabled = False

    # Memory

    def _set_mem_table(self, message: Message) -> None:
        table = parse_memory_table(message)
        self._set_memory(message, len(table), lambda fds: self.memory.map_table(table, fds))

    def _add_mem_reg(self, message: Message) -> None:
        region = parse_memory_region(message)
        self._set_memory(message, 1, lambda fds: self.memory.add(region, fds[0]))

    def _rem_mem_reg(self, message: Message) -> None:
        region = parse_memory_region(message)
        # Some front ends send its descriptor with it.
        self._set_memory(message, len(message.descriptors), lambda _fds: self.memory.without(region))

    def _set_memory(self, message: Message, descriptors: int, change: Callable[[list[int]], Regions]) -> None:
        taken = message.take(descriptors)
        try:
            memory = change(taken)
        finally:
            for descriptor in taken:
                os.close(descriptor)
        self._host.suspend()
        self.memory = memory
        self._remake_queues()

    def _remake_queues(self) -> None:
        """Memory or features have changed: look at the rings anew. One that is not in memory now may be later."""
        for ring in self.vrings:
            before, ring.queue = ring.queue, None
            if ring.started:
                layout = self._layout(ring)
                if layout is not None:
                    self._make_queue(ring, layout)
                elif before is not None:
                    ring.base = before.stop()  # it may be asked for before there is memory again

    # Rings

    def _ring(self, message: Message, index: int) -> Vring:
        if index >= len(self.vrings):
            raise ProtocolError(f"{message.name} for ring {index}, there are {len(self.vrings)}")
        return self.vrings[index]

    def _stopped_ring(self, message: Message) -> tuple[Vring, int]:
        index, number = message.fields(VRING_STATE)
        ring = self._ring(message, index)
        if ring.halted:
            self._stop(ring)
        if ring.started:
            raise ProtocolError(f"{message.name} for ring {index} while it is started")
        return ring, number

    def _set_vring_num(self, message: Message) -> None:
        ring, num = self._stopped_ring(message)
        if not 1 <= num <= MAX_RING or num & (num - 1):
            raise ProtocolError(f"{message.name}: a ring of {num} descriptors; a power of two up to {MAX_RING} may be")
        ring.num = num

    def _set_vring_base(self, message: Message) -> None:
        ring, base = self._stopped_ring(message)
        if base > 0xFFFF:
            raise ProtocolError(f"{message.name} {base:#x}, an index has 16 bits")
        if base != ring.base:
            ring.left = None
        ring.base = base

    def _set_vring_addr(self, message: Message) -> None:
        index, flags, desc, used, avail, _log = message.fields(VRING_ADDR)
        ring = self._ring(message, index)
        if flags:
            raise ProtocolError(f"{message.name} with flags {flags:#x}: a log was not offered")
        self._host.suspend()
        ring.addresses = desc, used, avail
        self._remake_queues()

    def _get_vring_base(self, message: Message) -> Answer:
        index, _ = message.fields(VRING_STATE)
        ring = self._ring(message, index)
        self._host.suspend()
        self._stop(ring)
        return Answer(VRING_STATE.pack(index, ring.base))

    def _set_vring_enable(self, message: Message) -> None:
        index, enable = message.fields(VRING_STATE)
        ring = self._ring(message, index)
        if enable > 1:
            raise ProtocolError(f"{message.name} {enable} for ring {index}, it is 0 or 1")
        self._host.suspend()
        ring.enabled = bool(enable)

    def _vring_descriptor(self, message: Message) -> tuple[Vring, int | None]:
        """Of which ring it is, and the descriptor, if there is one."""
        word = message.u64()
        if word & ~(VHOST_USER_VRING_IDX_MASK | VHOST_USER_VRING_NOFD_MASK):
            raise ProtocolError(f"{message.name} {word:#x}")
        ring = self._ring(message, word & VHOST_USER_VRING_IDX_MASK)
        if word & VHOST_USER_VRING_NOFD_MASK:
            message.take(0)
            return ring, None
        (descriptor,) = message.take()
        # For the front end as well: a write to an eventfd that it has filled would wait for ever.
        os.set_blocking(descriptor, False)
        return ring, descriptor

    def _set_vring_call(self, message: Message) -> None:
        ring, descriptor = self._vring_descriptor(message)
        ring.call, old = descriptor, ring.call
        if old is not None:
            os.close(old)

    def _set_vring_err(self, message: Message) -> None:
        ring, descriptor = self._vring_descriptor(message)
        ring.error, old = descriptor, ring.error
        if old is not None:
            os.close(old)

    def _set_vring_kick(self, message: Message) -> None:
        ring, descriptor = self._vring_descriptor(message)
        if descriptor is None:
            raise ProtocolError(f"ring {ring.index} is to be polled, having no descriptor for kicks: give it one")
        self._host.suspend()
        if ring.halted:
            self._stop(ring)
        ring.kick, old = descriptor, ring.kick
        if old is not None:
            os.close(old)
        if not ring.started:
            self._start(ring)

    def _layout(self, ring: Vring) -> VringLayout | None:
        """Where a ring is in guest memory; None where it is nowhere."""
        if ring.addresses is None:
            return None
        desc, used, avail = map(self.memory.guest_address, ring.addresses)
        if desc is None or used is None or avail is None:
            return None
        return VringLayout(ring.num, desc, avail, used)

    def _start(self, ring: Vring) -> None:
        if not ring.num or ring.addresses is None:
            missing = "SET_VRING_ADDR" if ring.num else "SET_VRING_NUM"
            raise ProtocolError(f"{name_of(Request.SET_VRING_KICK)} for ring {ring.index} without {missing} before it")
        layout = self._layout(ring)
        if layout is None:
            addresses = ", ".join(f"{address:#x}" for address in ring.addresses)
            raise ProtocolError(f"ring {ring.index} at {addresses} is not in the memory that is shared")
        ring.inflight = self._inflight_of(ring)
        queue = self._make_queue(ring, layout)
        queue.begin(ring.base)
        ring.lag = queue.lag
        ring.started = True
        if self._reset_is_due:
            self._reset_is_due = False
            if not (ring.base or ring.inflight.used_idx or any(ring.inflight.inflight)):
                self._host.reset()

    def _make_queue(self, ring: Vring, layout: VringLayout) -> Virtqueue:
        """Look at a ring where it is now. Raises ProtocolError."""
        assert ring.inflight is not None
        try:
            queue = Virtqueue(
                self.memory,
                layout,
                name=f"{self._name}: queue {ring.index}",
                inflight=ring.inflight,
                event_idx=bool(self.features >> VIRTIO_RING_F_EVENT_IDX & 1),
            )
        except RingError as error:
            raise ProtocolError(str(error)) from error
        queue.lag = ring.lag
        queue.indirect = bool(self.features >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        ring.queue = queue
        return queue

    def _stop(self, ring: Vring) -> None:
        """Nobody serves it any more: where it is to go on is `base`."""
        if ring.queue is not None:
            ring.base = ring.queue.stop()
        if ring.inflight is not None:
            ring.left = ring.inflight if any(ring.inflight.inflight) else None
        ring.queue = ring.inflight = None
        ring.lag = 0
        ring.started = ring.halted = ring.broken = False
        if ring.kick is not None:
            os.close(ring.kick)
            ring.kick = None

    def broken(self) -> None:
        """The driver broke a rule: its rings are nobody's until they are stopped and started again."""
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET
        for ring in self.vrings:
            ring.broken = ring.started

    def close(self) -> None:
        """The connection has ended."""
        for ring in self.vrings:
            ring.queue = ring.inflight = ring.left = None
            ring.started = False
            ring.close()
        self.memory = Regions()
        self._inflight = None

    # Requests in flight

    def _get_inflight_fd(self, message: Message) -> Answer:
        _size, _offset, queues, num = self._inflight_fields(message)
        size = queues * _inflight_stride(num)
        descriptor = shared_file.create("lgmp-inflight", size)
        # As many bytes as were sent: front ends differ in the padding they expect.
        return Answer(INFLIGHT.pack(size, 0, queues, num).ljust(len(message.payload), b"\0"), descriptor)

    def _set_inflight_fd(self, message: Message) -> None:
        size, offset, queues, num = self._inflight_fields(message)
        (descriptor,) = message.take()
        try:
            if any(ring.started for ring in self.vrings):
                raise ProtocolError(f"{message.name} while rings are started")
            needed = queues * _inflight_stride(num)
            end = offset + needed
            if size < needed or os.fstat(descriptor).st_size < end:
                raise ProtocolError(f"{message.name} with too small a file for {queues} rings of {num} descriptors")
            # From its start, since offsets have to be those of pages.
            mapping = mmap.mmap(descriptor, end, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"{message.name}: cannot map it: {error}") from error
        finally:
            os.close(descriptor)
        self._inflight = memoryview(mapping)[offset:end]
        self._inflight_queues = queues
        self._inflight_num = num

    def _inflight_fields(self, message: Message) -> Sequence[int]:
        if len(message.payload) < INFLIGHT.size:
            raise ProtocolError(f"{message.name} with {len(message.payload)} bytes, it has {INFLIGHT.size}")
        size, offset, queues, num = INFLIGHT.unpack_from(message.payload)
        if not 1 <= queues <= len(self.vrings) or not 1 <= num <= MAX_RING:
            raise ProtocolError(f"{message.name} for {queues} rings of {num} descriptors, there are {len(self.vrings)}")
        return size, offset, queues, num

    def _inflight_of(self, ring: Vring) -> InflightRegion:
        """The record of a ring that is to be started. Raises ProtocolError."""
        if self._inflight is None or ring.index >= self._inflight_queues:
            if ring.left is not None and ring.left.num == ring.num:
                return ring.left
            return InflightRegion(memoryview(bytearray(inflight_bytes(ring.num))), ring.num)
        at = ring.index * _inflight_stride(self._inflight_num)
        try:
            return InflightRegion(self._inflight[at:], self._inflight_num)
        except ValueError as error:
            raise ProtocolError(f"ring {ring.index}: {error}") from error


def _inflight_stride(num: int) -> int:
    return (inflight_bytes(num) + _INFLIGHT_ALIGN - 1) // _INFLIGHT_ALIGN * _INFLIGHT_ALIGN
