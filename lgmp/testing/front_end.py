"""A vhost-user front end: what QEMU and its like are to a device that `lgmp serve` serves, without a guest.

`FrontEnd` speaks the protocol over a socket, shares the memory of a `Driver`, and starts and stops its rings; the
driver's queues are then filled as anywhere else in this kit. `ServedWorker` is a worker process to connect it to.

    with (
        ServedWorker("workers.custom", ["--", "upside_down.py:UpsideDown"]) as worker,
        Driver(memory=SharedMemory()) as driver,
        FrontEnd.connect(worker.address, driver) as front_end,
    ):
        front_end.begin()
        chain = direct(driver, b"hello", 20)
        front_end.rings[0].kick()
        front_end.rings[0].collect(1)

Nothing that is sent is checked: `send` and `send_raw` are for what a front end may not do. What the back end does that
it may not, or does not do, is `Unexpected`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
import weakref
from array import array
from collections.abc import Iterable, Sequence
from itertools import count
from time import monotonic, sleep
from typing import NamedTuple, Self

from lgmp import shared_file
from lgmp.closing import Closing
from lgmp.memory import DEVICE_PAGES, PAGE_SIZE, GuestMemory
from lgmp.testing.driver import PATIENCE, RAM_BYTES, Driver, DriverQueue, Unexpected, Used
from lgmp.vhost_user.messages import (
    CONFIG,
    HEADER,
    HEADER_BYTES,
    INFLIGHT,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_VRING_NOFD_MASK,
    VRING_ADDR,
    VRING_STATE,
    Request,
    name_of,
)
from lgmp.virtio.ids import VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from lgmp.virtio.inflight import InflightRegion
from lgmp.virtio.ring import full_barrier

# What a ServedWorker offers that is not told to offer something else: what the bus does, whatever the device.
BUS_FEATURES = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
# All there are.
EVERYTHING = (1 << 64) - 1

# Room for the rings, at the end of the first region.
_RING_BYTES = DEVICE_PAGES * PAGE_SIZE
# What every file has behind its last region, so that a byte too many shows.
_GUARD_BYTES = PAGE_SIZE
# Where a front end has the files of guest memory in its own address space. It is a number and no more.
_USER = 0x7F0000000000
_USER_OF_A_FILE = 1 << 36
_INT_BYTES = array("i").itemsize
# A busy wait looks so often, in seconds.
_LOOK_EVERY = 0.002
# linux/mman.h
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000

_numbers = count(1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class SharedRegion(NamedTuple):
    """A region of guest memory, all in bytes: guest-physical address, size, offset in its file; which file it is in.

    `user` is its address in the front end, a default of which goes by file and offset.
    """

    start: int
    size: int
    offset: int = 0
    file: int = 0
    user: int | None = None

    @property
    def user_address(self) -> int:
        """Where the front end has it in its own address space."""
        return _USER + self.file * _USER_OF_A_FILE + self.offset if self.user is None else self.user

    def pack(self) -> bytes:
        """As it stands in a message."""
        return struct.pack("<QQQQ", self.start, self.size, self.user_address, self.offset)


def table(regions: Iterable[SharedRegion]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    packed = [region.pack() for region in regions]
    return struct.pack("<II", len(packed), 0) + b"".join(packed)


class SharedMemory(GuestMemory):
    """Guest memory in one or several regions, in one or several files; `view` has each where the guest has it.

    Between the regions `view` is memory that nobody shares. `files` are the descriptors, by the numbers in `regions`;
    each file has a page behind its last region, which is nobody's.
    """

    def __init__(self, regions: Sequence[SharedRegion] | None = None, *, ring_bytes: int = _RING_BYTES) -> None:
        """Make the memory; without `regions` there is one, as in a Driver's guest.

        The first region begins at guest address 0, at whole pages as all of them; the rings of a driver lie in its last
        `ring_bytes`. Raises OSError where the kernel refuses.
        """
        if regions is None:
            regions = [SharedRegion(0, RAM_BYTES + ring_bytes)]
        if regions[0].start or regions[0].size <= ring_bytes:
            raise ValueError("the first region begins at 0, and has room for the rings and more")
        self.regions = list(regions)
        self.ram_bytes = regions[0].size - ring_bytes
        self.limit = max(region.start + region.size for region in regions)
        self.files: list[int] = []
        with contextlib.ExitStack() as undo:
            for number in range(max(region.file for region in regions) + 1):
                ends = [region.offset + region.size for region in regions if region.file == number]
                size = max(ends, default=0) + _GUARD_BYTES
                self.files.append(shared_file.create("lgmp-guest", -(-size // PAGE_SIZE) * PAGE_SIZE))
                undo.callback(os.close, self.files[-1])
            self.view = _map(self.limit, self.regions, self.files)
            undo.pop_all()
        self.fd = self.files[0]

    def user_address(self, address: int) -> int:
        """The front end's own address of a guest-physical one. Raises ValueError where that is in no region."""
        for region in self.regions:
            if region.start <= address < region.start + region.size:
                return region.user_address + address - region.start
        raise ValueError(f"{address:#x} is in no region")

    def file_of(self, region: SharedRegion) -> int:
        """The descriptor of the file that a region is in."""
        return self.files[region.file]

    def close(self) -> None:
        """Close the files. Views that are still held elsewhere keep the mapping alive."""
        self.view.release()
        while self.files:
            os.close(self.files.pop())
        self.fd = -1


def _map(size: int, regions: Sequence[SharedRegion], files: Sequence[int]) -> memoryview:
    """So much memory of nobody's, with the regions mapped over it; unmapped when the last view of it has gone."""
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    size = -(-size // PAGE_SIZE) * PAGE_SIZE
    base = _mmap(None, size, prot, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    memory = (ctypes.c_ubyte * size).from_address(base)
    weakref.finalize(memory, _libc.munmap, base, size)
    for region in regions:
        _mmap(base + region.start, region.size, prot, mmap.MAP_SHARED | _MAP_FIXED, files[region.file], region.offset)
    return memoryview(memory).cast("B")


def _mmap(*arguments: int | None) -> int:
    address: int = _libc.mmap(*arguments)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


class Reply(NamedTuple):
    """What the back end answered; `descriptors` are the receiver's to close."""

    request: int
    payload: bytes
    descriptors: list[int]

    @property
    def number(self) -> int:
        """The payload as one number."""
        return int(U64.unpack(self.payload)[0])


class InflightFile(Closing):
    """A file in which a back end keeps the requests in flight of some rings: the front end's, for the next back end."""

    def __init__(self, descriptor: int, size: int, offset: int, queues: int, num: int) -> None:
        """`descriptor`, which this object then owns, and what came with it: bytes, rings, descriptors of each."""
        self.descriptor = descriptor
        self.size = size
        self.offset = offset
        self.queues = queues
        self.num = num
        self._map = mmap.mmap(descriptor, offset + size)

    def pack(self) -> bytes:
        """As it stands in a message."""
        return INFLIGHT.pack(self.size, self.offset, self.queues, self.num)

    def region(self, queue: int = 0) -> InflightRegion:
        """What is in flight of a ring."""
        stride = self.size // self.queues
        return InflightRegion(memoryview(self._map)[self.offset + queue * stride :], self.num)

    def heads(self, queue: int = 0) -> list[int]:
        """The heads of the chains in flight of a ring, oldest first."""
        return self.region(queue).heads()

    def close(self) -> None:
        """Give it back. A back end that still has it keeps it."""
        os.close(self.descriptor)


class FrontEndRing:
    """One ring: `kick_fd`, `call_fd` and `error_fd` are its eventfds. Where it is in memory, its driver knows."""

    def __init__(self, front_end: FrontEnd, number: int) -> None:
        """Not started."""
        self._front_end = front_end
        self.number = number
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def queue(self) -> DriverQueue:
        """The driver's side of it."""
        return self._front_end.driver.queues[self.number]

    # What the front end says of it

    def start(self, base: int | None = None, *, enable: bool = True) -> None:
        """Say all there is to say of it; it is served from then on, where `enable` is.

        `base`: the index of the available ring to go on from; without it, the used ring's, as after the death of a back
        end.
        """
        self.describe(base)
        self.set_call()
        self.set_error()
        self.set_kick()
        if enable and self._front_end.has_protocol_features:
            self.enable()

    def describe(self, base: int | None = None) -> None:
        """SET_VRING_NUM, SET_VRING_BASE and SET_VRING_ADDR."""
        front_end = self._front_end
        base = self.queue.used_index() if base is None else base
        front_end.tell(Request.SET_VRING_NUM, VRING_STATE.pack(self.number, self.queue.layout.num))
        front_end.tell(Request.SET_VRING_BASE, VRING_STATE.pack(self.number, base))
        self.set_addresses()

    def set_addresses(self) -> None:
        """SET_VRING_ADDR."""
        layout = self.queue.layout
        user = self._front_end.memory.user_address
        addresses = user(layout.desc), user(layout.used), user(layout.avail)
        self._front_end.tell(Request.SET_VRING_ADDR, VRING_ADDR.pack(self.number, 0, *addresses, 0))

    def set_kick(self, descriptor: int | None = None) -> None:
        """SET_VRING_KICK, which starts the ring; with another descriptor if given."""
        self._set(Request.SET_VRING_KICK, self.kick_fd if descriptor is None else descriptor)

    def set_call(self, descriptor: int | None = None) -> None:
        """SET_VRING_CALL."""
        self._set(Request.SET_VRING_CALL, self.call_fd if descriptor is None else descriptor)

    def set_error(self, descriptor: int | None = None) -> None:
        """SET_VRING_ERR."""
        self._set(Request.SET_VRING_ERR, self.error_fd if descriptor is None else descriptor)

    def _set(self, request: int, descriptor: int) -> None:
        self._front_end.tell(request, U64.pack(self.number), [descriptor])

    def set_none(self, request: Request) -> None:
        """SET_VRING_CALL and its like with no descriptor: the front end looks itself."""
        self._front_end.tell(request, U64.pack(self.number | VHOST_USER_VRING_NOFD_MASK))

    def enable(self, enabled: bool = True) -> None:
        """SET_VRING_ENABLE."""
        self._front_end.tell(Request.SET_VRING_ENABLE, VRING_STATE.pack(self.number, enabled))

    def stop(self) -> int:
        """GET_VRING_BASE, which stops it; gives the index of the available ring to go on from."""
        reply = self._front_end.ask(Request.GET_VRING_BASE, VRING_STATE.pack(self.number, 0))
        number, base = VRING_STATE.unpack(reply.payload)
        if number != self.number:
            raise Unexpected(f"ring {self.number} was stopped, and the answer is of ring {number}")
        return int(base)

    # What its driver does

    def kick(self) -> None:
        """Have the device look at it, wanted or not."""
        os.eventfd_write(self.kick_fd, 1)

    @property
    def wants_kicks(self) -> bool:
        """Whether the device asks for kicks, where EVENT_IDX was not accepted."""
        return not self.queue.memory.view[self.queue.layout.used]

    @property
    def avail_event(self) -> int:
        """With EVENT_IDX: the index of the available ring beyond which the device wants to be kicked."""
        layout = self.queue.layout
        return self._word(layout.used + 4 + 8 * layout.num)[0]

    def ask_for_calls(self, wanted: bool = True) -> None:
        """Whether the device is to call, where EVENT_IDX was not accepted."""
        self.queue.set_avail(0 if wanted else 1, self.queue.next_avail)

    def set_used_event(self, index: int) -> None:
        """With EVENT_IDX: have the device call when the used ring goes beyond `index`."""
        layout = self.queue.layout
        self._word(layout.avail + 4 + 2 * layout.num)[0] = index & 0xFFFF

    def _word(self, address: int) -> memoryview:
        """A u16 of guest memory, to be loaded and stored in one piece."""
        return self.queue.memory.view[address : address + 2].cast("H")

    def calls(self) -> int:
        """How often the device has called since this was asked last."""
        return _take(self.call_fd)

    def errors(self) -> int:
        """How often the back end has said that the ring is broken, since this was asked last."""
        return _take(self.error_fd)

    def wait_for_call(self) -> None:
        """Wait until the device has called. Raises Unexpected where it does not, or has hung up."""
        self._front_end.wait_for(self.call_fd, f"no call for ring {self.number}")
        self.calls()

    def wait_for_error(self) -> None:
        """Wait until the back end says that the ring is broken. Raises Unexpected."""
        self._front_end.wait_for(self.error_fd, f"ring {self.number} is not said to be broken")
        self.errors()

    def collect(self, count: int, *, polling: bool = False) -> list[Used]:
        """Wait until so many chains are used; gives those, and what else was used by then.

        By its calls, or with `polling` without them, and asking for them with EVENT_IDX.
        """
        deadline = monotonic() + PATIENCE
        taken = self._collect()
        while len(taken) < count:
            if not polling:
                self.wait_for_call()
            elif monotonic() > deadline:
                raise Unexpected(f"{len(taken)} of {count} chains are used")
            else:
                sleep(_LOOK_EVERY)
            taken += self._collect()
        return taken

    def _collect(self) -> list[Used]:
        taken = self.queue.collect()
        if self._front_end.features >> VIRTIO_RING_F_EVENT_IDX & 1:
            self.set_used_event(self.queue.next_used)
            full_barrier()
            taken += self.queue.collect()
        return taken

    def close(self) -> None:
        """Close its eventfds."""
        for descriptor in (self.kick_fd, self.call_fd, self.error_fd):
            os.close(descriptor)


class FrontEnd(Closing):
    """One connection to a back end, for the rings of one `driver`.

    `features` and `protocol_features` are those accepted; `rings` are as many as the driver has queues.
    """

    def __init__(self, connection: socket.socket, driver: Driver) -> None:
        """Speak over `connection`, a stream socket, which this object then owns. Nothing is said yet.

        The memory of `driver`, which stays the caller's, is to be a SharedMemory.
        """
        self.socket = connection
        self.socket.settimeout(PATIENCE)
        self.driver = driver
        self.features = self.protocol_features = 0
        self.rings = [FrontEndRing(self, number) for number in range(len(driver.queues))]

    @classmethod
    def connect(cls, address: str, driver: Driver) -> Self:
        """Connect to a socket by its path. Raises OSError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address)
            return cls(connection, driver)
        except BaseException:
            connection.close()
            raise

    @property
    def memory(self) -> SharedMemory:
        """The driver's memory."""
        memory = self.driver.memory
        if not isinstance(memory, SharedMemory):
            raise TypeError("the driver of a front end has a SharedMemory: Driver(memory=SharedMemory())")
        return memory

    @property
    def has_protocol_features(self) -> bool:
        """Whether VHOST_USER_F_PROTOCOL_FEATURES was accepted, without which every ring that is started is enabled."""
        return bool(self.features >> VHOST_USER_F_PROTOCOL_FEATURES & 1)

    def close(self) -> None:
        """Hang up, and close the eventfds; may be called twice."""
        self.socket.close()
        while self.rings:
            self.rings.pop().close()

    # Messages

    def send_raw(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send bytes, and descriptors with the first of them. Raises OSError where nobody is there any more."""
        if descriptors:
            sent = socket.send_fds(self.socket, [data], descriptors)
            data = data[sent:]
        if data:
            self.socket.sendall(data)

    def send(self, request: int, payload: bytes = b"", descriptors: Sequence[int] = (), flags: int = VERSION) -> None:
        """Send one message, whether or not it makes sense, and wait for nothing."""
        self.send_raw(HEADER.pack(request, flags, len(payload)) + payload, descriptors)

    def receive(self) -> Reply:
        """Wait for an answer. Raises Unexpected where none comes."""
        descriptors: list[int] = []
        request, flags, size = HEADER.unpack(self._read(HEADER_BYTES, descriptors))
        if flags != VERSION | REPLY:
            raise Unexpected(f"an answer to {name_of(request)} with flags {flags:#x}")
        return Reply(request, self._read(size, descriptors), descriptors)

    def _read(self, size: int, descriptors: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more, ancillary, _, _ = self.socket.recvmsg(size - len(data), socket.CMSG_SPACE(8 * _INT_BYTES))
            except TimeoutError as error:
                raise Unexpected("no answer from the back end") from error
            for _level, _kind, content in ancillary:
                descriptors += array("i", content)
            if not more:
                raise Unexpected(f"the back end has hung up, with {len(data)} of {size} bytes said")
            data += more
        return data

    def ask(self, request: int, payload: bytes = b"", descriptors: Sequence[int] = (), flags: int = VERSION) -> Reply:
        """Send a message, and wait for the answer to it. Raises Unexpected."""
        self.send(request, payload, descriptors, flags)
        reply = self.receive()
        if reply.request != request:
            raise Unexpected(f"{name_of(request)} was asked, and {name_of(reply.request)} is answered")
        return reply

    def tell(self, request: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Send a message that has no answer of its own; waits until it is obeyed, where REPLY_ACK was accepted.

        Raises Unexpected where it is declined.
        """
        if not self.protocol_features >> VHOST_USER_PROTOCOL_F_REPLY_ACK & 1:
            self.send(request, payload, descriptors)
        elif refusal := self.ask(request, payload, descriptors, VERSION | NEED_REPLY).number:
            raise Unexpected(f"{name_of(request)} was declined with {refusal}")

    def settle(self) -> None:
        """Wait until all that was sent is obeyed, with or without REPLY_ACK."""
        self.ask(Request.GET_FEATURES)

    def wait_for(self, descriptor: int, otherwise: str) -> None:
        """Wait until there is something to read from `descriptor`. Raises Unexpected where the back end hangs up."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self.socket, select.POLLRDHUP)
        ready = [which for which, _ in poll.poll(PATIENCE * 1000)]
        if descriptor not in ready:
            raise Unexpected(f"{otherwise}, and the back end {'has hung up' if ready else 'says nothing'}")

    def wait_for_hang_up(self) -> bytes:
        """Wait until the back end hangs up; gives what it said before. Raises Unexpected where it does not."""
        said = b""
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return said  # it had not read all that was sent
            except TimeoutError as error:
                raise Unexpected("the back end does not hang up") from error
            if not data:
                return said
            said += data

    # What a front end does in this order: begin does all of it

    def begin(
        self,
        features: int = EVERYTHING,
        *,
        protocol_features: int = EVERYTHING,
        bases: Sequence[int] | None = None,
        inflight: InflightFile | None = None,
    ) -> None:
        """Negotiate, share memory and start all rings, from their `bases` if given.

        `features` and `protocol_features` are the most that is accepted. `inflight` is what another back end has left.
        """
        self.negotiate(features, protocol_features)
        self.share()
        if inflight is not None:
            self.set_inflight(inflight)
        for ring in self.rings:
            ring.start(None if bases is None else bases[ring.number])

    def negotiate(self, features: int = EVERYTHING, protocol_features: int = EVERYTHING) -> None:
        """Accept those of the features that are offered."""
        self.protocol_features = 0
        self.send(Request.SET_OWNER)
        self.features = self.ask(Request.GET_FEATURES).number & features
        if self.has_protocol_features:
            accepted = self.ask(Request.GET_PROTOCOL_FEATURES).number & protocol_features
            self.send(Request.SET_PROTOCOL_FEATURES, U64.pack(accepted))
            self.protocol_features = accepted
        self.tell(Request.SET_FEATURES, U64.pack(self.features))

    def share(self, regions: Sequence[SharedRegion] | None = None) -> None:
        """SET_MEM_TABLE, with all regions or some."""
        regions = self.memory.regions if regions is None else regions
        self.tell(Request.SET_MEM_TABLE, table(regions), [self.memory.file_of(region) for region in regions])

    def add_region(self, region: SharedRegion) -> None:
        """ADD_MEM_REG."""
        self.tell(Request.ADD_MEM_REG, bytes(8) + region.pack(), [self.memory.file_of(region)])

    def remove_region(self, region: SharedRegion) -> None:
        """REM_MEM_REG."""
        self.tell(Request.REM_MEM_REG, bytes(8) + region.pack())

    # And what else there is

    def config(self, offset: int, size: int) -> bytes:
        """So many bytes of the configuration space."""
        reply = self.ask(Request.GET_CONFIG, CONFIG.pack(offset, size, 0) + bytes(size))
        if reply.payload[: CONFIG.size] != CONFIG.pack(offset, size, 0) or len(reply.payload) != CONFIG.size + size:
            raise Unexpected(f"{size} bytes at {offset} were asked for, and the answer is {reply.payload!r}")
        return reply.payload[CONFIG.size :]

    def queue_count(self) -> int:
        """How many rings the device has."""
        return self.ask(Request.GET_QUEUE_NUM).number

    @property
    def status(self) -> int:
        """The device's status byte."""
        return self.ask(Request.GET_STATUS).number

    @status.setter
    def status(self, status: int) -> None:
        self.tell(Request.SET_STATUS, U64.pack(status))

    def reset(self) -> None:
        """RESET_DEVICE, and the driver's rings at their start; none is started."""
        self.tell(Request.RESET_DEVICE)
        self.driver.reset()

    def get_inflight(self, queues: int | None = None, num: int | None = None) -> InflightFile:
        """GET_INFLIGHT_FD: have a file made, for as many rings, of as many descriptors, as the driver has."""
        queues = len(self.rings) if queues is None else queues
        num = self.driver.layouts[0].num if num is None else num
        reply = self.ask(Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, num))
        (descriptor,) = reply.descriptors
        return InflightFile(descriptor, *INFLIGHT.unpack_from(reply.payload))

    def set_inflight(self, inflight: InflightFile) -> None:
        """SET_INFLIGHT_FD: the back end is to keep its requests in flight there, and to go on with what there is."""
        self.tell(Request.SET_INFLIGHT_FD, inflight.pack(), [inflight.descriptor])


def _take(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
        return 0


class ServedWorker(Closing):
    """A worker process that serves one device by vhost-user, as `lgmp serve` starts it; killed at the end.

    `address` is what front ends connect to, one after the other; `process` is its Popen.
    """

    def __init__(  # noqa: PLR0913  each is a word of what a worker can be told
        self,
        module: str,
        options: Sequence[str] = (),
        *,
        name: str = "vda",
        queues: int = 1,
        features: int = BUS_FEATURES,
        config: bytes = b"",
        once: bool = False,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        """Start `python -m MODULE --vhost-user-fd ... OPTIONS`. Front ends may connect at once.

        `queues`, `features` and `config` are what it offers; `pass_fds`: the descriptors that it inherits.
        """
        # In no directory: whoever is to take it away may be killed.
        self.address = f"\0lgmp-testing.{os.getpid()}.{next(_numbers)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(self.address)
            listener.listen()
            command = [
                *(sys.executable, "-P", "-m", module, "--name", name),
                *("--vhost-user-fd", str(listener.fileno()), *(("--once",) if once else ())),
                *("--virtio-features", f"{features:#x}", "--queues", str(queues), "--config-space", config.hex()),
                *options,
            ]
            self.process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.PIPE,
                pass_fds=[listener.fileno(), *pass_fds],
            )

    def connect(self, driver: Driver) -> FrontEnd:
        """A front end that is connected to it."""
        return FrontEnd.connect(self.address, driver)

    def stop(self) -> tuple[int, str]:
        """Have it end by SIGTERM; gives its exit status and what it has said on stderr."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait for its end; gives its exit status and what it has said on stderr. Raises Unexpected."""
        try:
            _, said = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise Unexpected("the worker does not end") from error
        return self.process.returncode, said.decode(errors="replace")

    def close(self) -> None:
        """Kill it where it still runs."""
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
