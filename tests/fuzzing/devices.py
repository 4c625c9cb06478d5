"""Each device in this process, on rings that a hostile guest has filled.

What has to hold: a RingError is the only thing that ends its service, and a reset mends that; it writes to guest memory
nowhere but in its used rings and in what it was given to write to; its disk ends where it ends.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import tempfile
from random import Random

from fuzzing.guest import BrokenPromise, GuardedMemory, HostileGuest, Part, WatchedVirtqueue, fresh_region
from lgmp.control import STATE_BYTES
from lgmp.memory import PAGE_SIZE
from lgmp.testing import Recorder
from lgmp.virtio import net as virtio_net
from lgmp.virtio.block import (
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
)
from lgmp.virtio.console import INPUT_QUEUE, OUTPUT_QUEUE
from lgmp.virtio.console import QUEUES as CONSOLE_QUEUES
from lgmp.virtio.ids import VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC
from lgmp.virtio.ring import RingError, VringLayout
from workers.block import Block
from workers.console import Console
from workers.device import BATCH, Device
from workers.net import Net, Stream
from workers.rng import Rng

_RAM_BYTES = 0x10000
_NUM = 16
_SECTORS = 64
_DISK = bytes(range(256)) * 2 * _SECTORS
# More than a device does of what guests here ask at once: a console writes 64 KiB in each.
_STEPS = 10000
# The frames that a card is sent in one case, at most.
_FRAMES = 7
# What follows the disk in its file.
_BEYOND = b"\xc3" * 5000
_KINDS = (0, 1, 2, 3, 4, 5, 8, 9, 11, 13, 0x80000000, 0x80000001, 0x80000005, 0xFFFFFFFF)
_INDIRECT = 1 << VIRTIO_RING_F_INDIRECT_DESC
_VERSION_1 = 1 << VIRTIO_F_VERSION_1
_MERGED = 1 << virtio_net.VIRTIO_NET_F_MRG_RXBUF
_MODERN_DISK = _VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
_ANY_LAYOUT = 1 << VIRTIO_F_ANY_LAYOUT


def _quiet(text: str) -> None:
    """What a device says to the user is of no interest here."""


class FuzzedDevice:
    """One device, one case after the other; a subclass says which."""

    name: str
    queues: int
    features: tuple[int, ...] = (_INDIRECT, 0)

    def __init__(self) -> None:
        """One memory and one backing serve all cases; each has a device of its own."""
        pages = -(-VringLayout.legacy_bytes(_NUM) // PAGE_SIZE)
        layouts = [VringLayout.legacy(_NUM, _RAM_BYTES + n * pages * PAGE_SIZE) for n in range(self.queues)]
        self._memory = GuardedMemory(_RAM_BYTES + self.queues * pages * PAGE_SIZE)
        self._layouts = layouts
        self._guest = HostileGuest(self._memory.view, layouts, _RAM_BYTES, self._memory.limit)
        self.chains = self.broken = 0

    # What is different from device to device

    def make(self, random: Random) -> Device:
        """A device on this backing."""
        raise NotImplementedError

    def request(self, random: Random, queue: int) -> list[Part]:
        """A request that is right, or nearly."""
        raise NotImplementedError

    def feed(self, random: Random) -> None:
        """Something for the device to take in."""

    def drain(self) -> None:
        """Take what the device has put out."""

    def prove(self, device: Device) -> None:
        """Have it answer a good request, and look at the answer."""
        raise NotImplementedError

    def look(self) -> None:
        """Look at what no guest may change."""

    def close(self) -> None:
        """Give the backing back."""

    # What is the same

    def run(self, random: Random) -> None:
        """One case. Raises BrokenPromise, or what the device should not have raised."""
        guest, memory = self._guest, self._memory
        device = self.make(random)
        state = memoryview(bytearray(STATE_BYTES))
        regions = [fresh_region(_NUM) for _ in self._layouts]
        features = random.choice(self.features)

        def attach(device: Device) -> list[WatchedVirtqueue]:
            queues = [
                WatchedVirtqueue(memory, layout, f"dev: queue {number}", regions[number])
                for number, layout in enumerate(self._layouts)
            ]
            device.attach(queues, Recorder(), state=state)
            device.accept(features)
            return queues

        guest.begin()
        queues = attach(device)
        try:
            for _ in range(random.randrange(1, 4)):
                for number in range(self.queues):
                    self._fill(random, number)
                self.feed(random)
                before = bytearray(memory.view)
                try:
                    if random.random() < 0.15:
                        # Another takes its place, as when a process was killed.
                        self.chains += sum(queue.seen for queue in queues)
                        device.close()
                        device = self.make(random)
                        queues = attach(device)
                        for queue in queues:
                            queue.resume()
                        device.resume()
                    self._serve(device)
                except RingError:
                    self.broken += 1
                    self._compare(before, queues)
                    device.reset()
                    guest.begin()
                    device.accept(features)
                else:
                    self._compare(before, queues)
                self.drain()
                self.look()
            self.chains += sum(queue.seen for queue in queues)
            device.reset()
            self.drain()
            guest.begin()
            device.accept(0)
            self.prove(device)
        finally:
            device.close()

    def _fill(self, random: Random, queue: int) -> None:
        if random.random() < 0.1:
            self._guest.noise(random, queue)
            return
        for _ in range(random.randrange(1, 4)):
            self._guest.offer(random, queue, self.request(random, queue))
        if random.random() < 0.6:
            for _ in range(random.randrange(1, 3)):
                self._guest.spoil(random, queue)

    def _serve(self, device: Device) -> None:
        """Have it do all it can do now. Raises BrokenPromise where it does not come to an end."""
        more = True
        for _ in range(_STEPS):
            if more:  # as workers.runtime.Worker.serve, whose guest kicks once
                more = device.serve()
            poll = select.poll()
            for descriptor, events in device.wants():
                poll.register(descriptor, events)
            ready = poll.poll(0)
            for descriptor, events in ready:
                device.ready(descriptor, events)
            self.drain()
            if not more and not ready:
                return
        raise BrokenPromise("the device finds more to do without end")

    def _compare(self, before: bytearray, queues: list[WatchedVirtqueue]) -> None:
        """Whether anything was written to but what may be; what `before` was comes to be what is now."""
        view = self._memory.view
        for queue, layout in zip(queues, self._layouts, strict=True):
            end = layout.used + 4 + 8 * layout.num
            before[layout.used : end] = view[layout.used : end]
            for address, size in queue.written:
                before[address : address + size] = view[address : address + size]
            # A buffer that it keeps may be written to in the next round.
            del queue.written[: -4 * BATCH]
        if view != before:
            at = next(at for at, (one, other) in enumerate(zip(view, before, strict=True)) if one != other)
            raise BrokenPromise(f"guest memory was written to at {at:#x}, where it was not given")

    def _ask(self, device: Device, parts: list[Part], queue: int = 0) -> list[bytes]:
        """Have a good request answered; gives what is in its parts afterwards."""
        view, layout = self._memory.view, self._layouts[queue]
        at = 0x100
        places = []
        for number, part in enumerate(parts):
            size = part if isinstance(part, int) else len(part)
            flags = (2 if isinstance(part, int) else 0) | (number + 1 < len(parts))
            view[at : at + size] = bytes(size) if isinstance(part, int) else part
            struct.pack_into("<QIHH", view, layout.desc + 16 * number, at, size, flags, number + 1)
            places.append((at, size))
            at += size
        index = struct.unpack_from("<H", view, layout.used + 2)[0]
        struct.pack_into("<H", view, layout.avail + 4 + 2 * (index % _NUM), 0)
        struct.pack_into("<H", view, layout.avail + 2, (index + 1) & 0xFFFF)
        self._serve(device)
        if struct.unpack_from("<H", view, layout.used + 2)[0] != (index + 1) & 0xFFFF:
            raise BrokenPromise("a good request is not answered")
        return [bytes(view[at : at + size]) for at, size in places]


class FuzzedBlock(FuzzedDevice):
    """A disk, at times one that is only to be read."""

    name = "block"
    queues = 1
    features = (_INDIRECT | 1 << VIRTIO_BLK_F_FLUSH, _INDIRECT | _MODERN_DISK, _INDIRECT, 0)

    def __init__(self) -> None:
        """In a file that is longer than the disk."""
        super().__init__()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by close
        self._file.write(_DISK + _BEYOND)
        self._file.flush()
        self._read_only = False

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def make(self, random: Random) -> Device:
        """A disk of the file's first sectors."""
        self._read_only = random.random() < 0.2
        if self._read_only:
            os.pwrite(self._file.fileno(), _DISK, 0)
        return Block(
            self._file.fileno(), size=len(_DISK), serial="fuzzed", read_only=self._read_only, name="vda", say=_quiet
        )

    def request(self, random: Random, queue: int) -> list[Part]:
        """Reads and writes, in it and beyond it, of whole sectors and others."""
        sector = random.choice((0, random.randrange(_SECTORS), _SECTORS - 1, _SECTORS, 1 << 54, (1 << 64) - 1))
        header = struct.pack("<IIQ", random.choice(_KINDS), 0, sector)
        parts: list[Part] = [header]
        size = random.choice((0, 20, 511, 512, 512, 512, 1024, 4096))
        pieces = random.choice((1, 1, 2, 5))
        for _ in range(pieces):
            parts.append(random.randbytes(size) if header[0] & 1 else size)
        return [*parts, 1]

    def look(self) -> None:
        """The file behind the disk is as it was, and what is only to be read is."""
        fd = self._file.fileno()
        if os.fstat(fd).st_size != len(_DISK + _BEYOND) or os.pread(fd, len(_BEYOND), len(_DISK)) != _BEYOND:
            raise BrokenPromise("the file behind the disk's end has changed")
        if self._read_only and os.pread(fd, len(_DISK), 0) != _DISK:
            raise BrokenPromise("a disk that is only to be read has changed")

    def prove(self, device: Device) -> None:
        """Write a sector, read it."""
        content = _DISK[512:1024] if self._read_only else bytes(reversed(range(256))) * 2
        header = struct.pack("<IIQ", VIRTIO_BLK_T_OUT, 0, 7)
        if self._ask(device, [header, content, 1])[2] != bytes([self._read_only]):
            raise BrokenPromise("a write has the wrong status")
        if self._ask(device, [struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 7), 512, 1])[1:] != [content, b"\0"]:
            raise BrokenPromise("the disk does not hold what was written")
        if self._ask(device, [struct.pack("<IIQ", VIRTIO_BLK_T_GET_ID, 0, 0), 20, 1])[1] != b"fuzzed".ljust(20, b"\0"):
            raise BrokenPromise("the disk has another name")


class FuzzedNet(FuzzedDevice):
    """A card on a stream, at whose other end we are."""

    name = "net"
    queues = virtio_net.QUEUES
    features: tuple[int, ...] = (_INDIRECT | _ANY_LAYOUT, _INDIRECT, 0)

    def __init__(self) -> None:
        """No stream yet: each card has its own."""
        super().__init__()
        self._ours: socket.socket | None = None
        self._theirs: socket.socket | None = None
        self._said = b""

    def close(self) -> None:
        """Close the stream."""
        for end in (self._ours, self._theirs):
            if end is not None:
                end.close()

    def make(self, random: Random) -> Device:
        """A card on a fresh stream."""
        self.close()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        return Net(Stream(self._theirs.fileno()), say=_quiet)

    def request(self, random: Random, queue: int) -> list[Part]:
        """Buffers for frames, and frames; the header by itself, or with the frame."""
        size = random.choice((0, 1, 14, 60, 1514, 9000))
        one = random.random() < 0.4
        if queue == virtio_net.RECEIVE_QUEUE:
            return [10 + size] if one else [10, size]
        frame = random.randbytes(min(size, 60)).ljust(size, b"f")
        header = bytes(random.choice((10, 10, 10, 9, 12)))
        return [header + frame] if one else [header, frame]

    def feed(self, random: Random) -> None:
        """Frames of all lengths."""
        assert self._ours is not None
        for _ in range(random.randrange(3)):  # in up to three rounds: _FRAMES at most, with that of `prove`
            frame = bytes(random.choice((1, 14, 60, 1514, 9014)))
            self._ours.sendall(struct.pack("!I", len(frame)) + frame)

    def drain(self) -> None:
        """Take the frames."""
        assert self._ours is not None
        self._said = b""
        while True:
            try:
                said = self._ours.recv(1 << 20)
            except BlockingIOError:
                return
            if not said:
                return
            self._said = (self._said + said)[-4096:]

    def prove(self, device: Device) -> None:
        """A frame out and a frame in."""
        assert self._ours is not None
        header, frame = bytes(10), b"out".ljust(60, b".")
        sent = b""
        index = self._guest_sends(header, frame)
        for _ in range(4):
            device.serve()
            self.drain()
            sent += self._said
        if self._used_index(1) != index or not sent.endswith(struct.pack("!I", 60) + frame):
            raise BrokenPromise("a frame of the guest's was not sent")
        self._ours.sendall(struct.pack("!I", 60) + b"in".ljust(60, b"."))
        for _ in range(_FRAMES):  # those of before a reset that nobody had read come first
            if self._ask(device, [10, 1514])[1].startswith(b"in"):
                return
        raise BrokenPromise("a frame for the guest was not received")

    def _used_index(self, queue: int) -> int:
        index: int = struct.unpack_from("<H", self._memory.view, self._layouts[queue].used + 2)[0]
        return index

    def _guest_sends(self, header: bytes, frame: bytes) -> int:
        """Offer a frame; gives what the used ring's index will be."""
        view, layout = self._memory.view, self._layouts[virtio_net.TRANSMIT_QUEUE]
        view[:10], view[0x40 : 0x40 + len(frame)] = header, frame
        struct.pack_into("<QIHHQIHH", view, layout.desc, 0, 10, 1, 1, 0x40, len(frame), 0, 0)
        struct.pack_into("<HHH", view, layout.avail, 0, 1, 0)
        return 1


class FuzzedModernNet(FuzzedNet):
    """A card whose driver has the longer header, and may have frames in several buffers."""

    name = "modern net"
    features = tuple(
        bits | indirect
        for bits in (_VERSION_1, _VERSION_1 | _MERGED, _VERSION_1 | _MERGED, _MERGED)
        for indirect in (_INDIRECT, 0)
    )

    def request(self, random: Random, queue: int) -> list[Part]:
        """Buffers too short for a frame as well."""
        size = random.choice((0, 1, 14, 60, 700, 1514, 4000))
        if queue == virtio_net.RECEIVE_QUEUE:
            more = random.choice((0, 0, 1, 2))
            return [random.choice((12, 12, 20, size + 12)), *(random.choice((0, 5, size)) for _ in range(more))]
        header = bytes(random.choice((12, 12, 12, 11, 10, 30)))
        frame = random.randbytes(min(size, 60)).ljust(size, b"f")
        return [header + frame] if random.random() < 0.5 else [header, frame]


class FuzzedConsole(FuzzedDevice):
    """A console on two pipes."""

    name = "console"
    queues = CONSOLE_QUEUES

    def __init__(self) -> None:
        """Two pipes serve all cases."""
        super().__init__()
        self._input, self._typing = os.pipe()
        self._reading, self._output = os.pipe()
        for fd in (self._typing, self._reading):
            os.set_blocking(fd, False)
        self._said = b""

    def close(self) -> None:
        """Close the pipes."""
        for fd in (self._input, self._typing, self._reading, self._output):
            os.close(fd)

    def make(self, random: Random) -> Device:
        """A console."""
        self._empty(self._input)
        return Console(self._input, self._output, say=_quiet)

    @staticmethod
    def _empty(fd: int) -> bytes:
        found = b""
        while select.select([fd], [], [], 0)[0]:
            found = (found + os.read(fd, 1 << 16))[-4096:]
        return found

    def request(self, random: Random, queue: int) -> list[Part]:
        """Buffers and text."""
        sizes = [random.choice((0, 1, 16, 256, 5000)) for _ in range(random.choice((1, 1, 1, 3)))]
        return list(sizes) if queue == INPUT_QUEUE else [b"x" * size for size in sizes]

    def feed(self, random: Random) -> None:
        """Keys."""
        if random.random() < 0.5:
            os.write(self._typing, b"k" * random.randrange(1, 50))

    def drain(self) -> None:
        """Read what was said."""
        self._said = self._empty(self._reading)

    def prove(self, device: Device) -> None:
        """A line out and a line in."""
        self._serve(device)  # what a reset kept is said first
        said = b""
        view, layout = self._memory.view, self._layouts[OUTPUT_QUEUE]
        view[:5] = b"hello"
        struct.pack_into("<QIHH", view, layout.desc, 0, 5, 0, 0)
        struct.pack_into("<HHH", view, layout.avail, 0, 1, 0)
        for _ in range(4):
            device.serve()
            self.drain()
            said += self._said
        if not said.endswith(b"hello"):
            raise BrokenPromise(f"the console said {said[-50:]!r}")
        self._empty(self._input)
        os.write(self._typing, b"typed")
        if not self._ask(device, [64], INPUT_QUEUE)[0].startswith(b"typed"):
            raise BrokenPromise("what was typed did not come")


class FuzzedRng(FuzzedDevice):
    """An entropy source of zeros."""

    name = "rng"
    queues = 1

    def __init__(self) -> None:
        """One file serves all cases."""
        super().__init__()
        self._source = os.open("/dev/zero", os.O_RDONLY)

    def close(self) -> None:
        """Close the file."""
        os.close(self._source)

    def make(self, random: Random) -> Device:
        """An entropy source."""
        return Rng(self._source, source="/dev/zero", say=_quiet)

    def request(self, random: Random, queue: int) -> list[Part]:
        """Buffers, of any size."""
        return [random.choice((0, 1, 32, 4096, 0x8000)) for _ in range(random.choice((1, 1, 2)))]

    def prove(self, device: Device) -> None:
        """Bytes."""
        view = self._memory.view
        view[0x100:0x120] = b"\xff" * 32
        if self._ask(device, [32])[0] != bytes(32):
            raise BrokenPromise("no bytes of the source's")
