"""Devices served by vhost-user, as the processes that `lgmp serve` starts, to a front end that is this test.

Nothing of the guest's is real but its rings. What virtual machine monitors make of it is in test_serve_qemu_*.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from launching import Launch, make_disk, pattern, wait_until
from serving import served

from lgmp.testing import (
    ANY_LAYOUT_SHAPES,
    MISDEEDS,
    Buffer,
    Chain,
    Driver,
    FrontEnd,
    ServedWorker,
    SharedMemory,
    SharedRegion,
    Used,
    direct,
)
from lgmp.testing.front_end import EVERYTHING
from lgmp.vhost_user.messages import NEED_REPLY, VERSION, VHOST_USER_F_PROTOCOL_FEATURES, Request
from lgmp.virtio.block import VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from lgmp.virtio.console import INPUT_QUEUE, OUTPUT_QUEUE
from lgmp.virtio.ids import VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC

SECTOR = 512
SECTORS = 64
PAGE = 4096
FAR = 1 << 32
EVENT_IDX = 1 << VIRTIO_RING_F_EVENT_IDX
PROTOCOL = 1 << VHOST_USER_F_PROTOCOL_FEATURES
UPSIDE_DOWN = Path(__file__).parent / "examples" / "upside_down.py"

# A device that keeps what it is asked until it is told, through a FIFO, to answer: `o` the oldest, `n` the newest.
# Each answer has the number of requests that this process has been asked.
KEEPER = """
import os
import select

from workers.device import Device


class Keeper(Device):
    device_type = 42

    def __init__(self, fifo):
        super().__init__()
        self.fifo = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        self.kept = []
        self.asked = 0

    def serve(self):
        while (chain := self.queues[0].pop()) is not None:
            self.asked += 1
            self.kept.append(chain)
        return False

    def wants(self):
        return [(self.fifo, select.POLLIN)] if self.kept else []

    def ready(self, descriptor, events):
        which = os.read(self.fifo, 1)
        head, readable, writable = self.kept.pop(0 if which == b"o" else -1)
        text = b"".join(readable) + b" of %d" % self.asked
        writable[0][:len(text)] = text
        self.queues[0].push(head, len(text))
        self.notifier.used(0)

    def suspend(self):
        self.kept = []

    def reset(self):
        self.kept = []
        super().reset()
"""

Connect = Callable[..., FrontEnd]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where devices are served."""
    return tmp_path / "socket"


@pytest.fixture
def connect(path: Path) -> Iterator[Connect]:
    """`connect()`, `connect(regions, queues=2)`: a front end with a guest of its own, at `path`."""
    with contextlib.ExitStack() as stack:

        def connected(
            regions: Sequence[SharedRegion] | None = None,
            *,
            queues: int = 1,
            start: int = 0,
            driver: Driver | None = None,
        ) -> FrontEnd:
            if driver is None:
                driver = stack.enter_context(Driver(queues=queues, start=start, memory=SharedMemory(regions)))
            return stack.enter_context(FrontEnd.connect(str(path), driver))

        yield connected


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SECTORS)


def read(front_end: FrontEnd, sector: int, into: int | Buffer = SECTOR, queue: int = 0) -> Chain:
    return direct(front_end.driver, struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, sector), into, 1, queue=queue)


def write(front_end: FrontEnd, sector: int, data: bytes | Buffer, queue: int = 0) -> Chain:
    return direct(front_end.driver, struct.pack("<IIQ", VIRTIO_BLK_T_OUT, 0, sector), data, 1, queue=queue)


def content(sector: int) -> bytes:
    return pattern(SECTORS)[sector * SECTOR : (sector + 1) * SECTOR]


def check_read(front_end: FrontEnd, sector: int, queue: int = 0) -> None:
    chain = read(front_end, sector, queue=queue)
    front_end.rings[queue].kick()
    assert front_end.rings[queue].collect(1) == [Used(chain.head, SECTOR + 1)]
    assert chain.answer == content(sector) + b"\0"


# What is agreed upon


@pytest.mark.parametrize(
    "features",
    [EVERYTHING, ~EVENT_IDX, ~(1 << VIRTIO_RING_F_INDIRECT_DESC), ~PROTOCOL, 1 << 32, 0],
    ids=["all", "no event indexes", "no indirect tables", "no protocol features", "modern alone", "legacy"],
)
@pytest.mark.parametrize("start", [0, 0xFFFC])
def test_whatever_is_agreed_upon_the_disk_is_read_and_written(
    disk: Path, path: Path, connect: Connect, features: int, start: int
) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect(start=start)
        front_end.begin(features)
        for sector in range(9):
            check_read(front_end, sector)
        write(front_end, 3, b"\x77" * SECTOR)
        front_end.rings[0].kick()
        front_end.rings[0].collect(1)
        assert disk.read_bytes()[3 * SECTOR : 4 * SECTOR] == b"\x77" * SECTOR
        if features >> VIRTIO_RING_F_INDIRECT_DESC & features >> 32 & 1:
            for shape in ANY_LAYOUT_SHAPES.values():
                chain = shape(front_end.driver, struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 7), SECTOR, 1)
                front_end.rings[0].kick()
                front_end.rings[0].collect(1)
                assert chain.answer == content(7) + b"\0"


def test_without_acknowledgements_it_goes_as_well(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect()
        front_end.begin(protocol_features=0)
        check_read(front_end, 1)
        assert front_end.rings[0].stop() == 1


def test_a_front_end_learns_what_the_device_has(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), "--num-queues", "3", socket=path) as launched:
        front_end = connect(queues=3)
        front_end.begin()
        assert struct.unpack("<Q", front_end.config(0, 8)) == (SECTORS,)
        assert front_end.config(200, 56) == bytes(56)
        assert front_end.queue_count() == 3
        assert front_end.ask(Request.GET_MAX_MEM_SLOTS).number >= 8
        assert front_end.status == 0
        for queue in (2, 0, 1):
            check_read(front_end, queue, queue)
        reply = front_end.ask(Request.SET_LOG_BASE, bytes(16), [front_end.rings[0].call_fd], VERSION | NEED_REPLY)
        assert reply.number == 1
        launched.err.wait_for("asks for SET_LOG_BASE, which was not offered; declined")
        check_read(front_end, 5)


def test_rings_are_started_and_stopped_one_by_one(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), "--num-queues", "2", socket=path):
        front_end = connect(queues=2)
        front_end.negotiate()
        front_end.share()
        for queue in (1, 0):
            front_end.rings[queue].start()
            check_read(front_end, queue, queue)
        assert front_end.rings[1].stop() == 1
        check_read(front_end, 2, 0)
        front_end.rings[1].start(1)
        check_read(front_end, 3, 1)
        assert front_end.rings[0].stop() == 2
        check_read(front_end, 4, 1)


# Memory


SPREAD = [
    SharedRegion(0, 0x200000, 4 * PAGE),
    SharedRegion(FAR, PAGE, 0x300000),
    SharedRegion(FAR + PAGE, PAGE, 0, 1),
    SharedRegion(FAR + 0x100000, PAGE, PAGE, 2),
]


def test_buffers_are_read_and_written_in_any_region_and_over_their_borders(
    disk: Path, path: Path, connect: Connect
) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect(SPREAD)
        front_end.begin()
        view = front_end.memory.view
        before = [os.pread(file, 1 << 24, 0) for file in front_end.memory.files]
        for number, place in enumerate((FAR, FAR + PAGE - 100, FAR + PAGE, FAR + 0x100000, FAR + 0x101000 - SECTOR)):
            read(front_end, number, Buffer(place, SECTOR, True))
            front_end.rings[0].kick()
            front_end.rings[0].collect(1)
            assert view[place : place + SECTOR] == content(number)
            write(front_end, 40 + number, Buffer(place, SECTOR))
            front_end.rings[0].kick()
            front_end.rings[0].collect(1)
            assert disk.read_bytes()[(40 + number) * SECTOR : (41 + number) * SECTOR] == content(number)
        for file, old in zip(front_end.memory.files, before, strict=True):
            new = os.pread(file, 1 << 24, 0)
            regions = [one for one in SPREAD if front_end.memory.file_of(one) == file]
            for region in regions:
                start, end = region.offset, region.offset + region.size
                new = new[:start] + old[start:end] + new[end:]
            assert new == old  # but for what lies in the regions


def test_regions_come_and_go_while_the_ring_is_served(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect(SPREAD)
        front_end.begin()
        for turn in range(20):
            chains = [read(front_end, number, Buffer(FAR + PAGE - 256, SECTOR, True)) for number in range(3)]
            front_end.rings[0].kick()
            front_end.remove_region(SPREAD[3])
            if turn % 2:
                front_end.share(SPREAD[:3])
            front_end.add_region(SPREAD[3])
            assert [used.head for used in front_end.rings[0].collect(3)] == [chain.head for chain in chains]
            front_end.driver.forget()
        read(front_end, 1, Buffer(SPREAD[3].start, SECTOR, True))
        front_end.rings[0].kick()
        front_end.rings[0].collect(1)


def test_a_table_may_be_set_again_at_any_time(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path) as launched:
        front_end = connect(SPREAD)
        front_end.begin()
        pid = launched.workers()["vda"]
        check_read(front_end, 0)
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        mappings = Path(f"/proc/{pid}/maps").read_text().count("lgmp-guest")
        for turn in range(30):
            chains = [read(front_end, number) for number in range(8)]
            front_end.rings[0].kick()
            front_end.share()
            front_end.rings[0].collect(8)
            assert [chain.answer for chain in chains] == [content(number) + b"\0" for number in range(8)], turn
        assert len(os.listdir(f"/proc/{pid}/fd")) == descriptors
        assert Path(f"/proc/{pid}/maps").read_text().count("lgmp-guest") == mappings


def test_a_ring_whose_memory_is_away_waits_for_it(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect(SPREAD)
        front_end.begin()
        check_read(front_end, 0)
        front_end.remove_region(SPREAD[0])
        chain = read(front_end, 1)
        front_end.rings[0].kick()
        front_end.settle()
        assert front_end.rings[0].queue.collect() == []
        front_end.add_region(SPREAD[0])
        assert front_end.rings[0].collect(1) == [Used(chain.head, SECTOR + 1)]


# Stopped and gone on with


def test_a_stopped_ring_is_left_alone_and_gone_on_with(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect(start=0xFFF0)
        front_end.begin()
        ring = front_end.rings[0]
        for turn in range(20):
            chains = [read(front_end, number) for number in range(5)]
            if turn % 2:
                ring.kick()
            base = ring.stop()
            used = ring.queue.used_index()
            front_end.settle()
            assert ring.queue.used_index() == used == base
            ring.start(base)
            assert [one.head for one in ring.collect(5)] == [chain.head for chain in chains]
            front_end.driver.forget()
        assert ring.queue.used_index() == (0xFFF0 + 100) & 0xFFFF


def test_a_disabled_ring_is_left_alone_until_it_is_enabled(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect()
        front_end.begin()
        ring = front_end.rings[0]
        check_read(front_end, 0)
        ring.enable(False)
        chain = read(front_end, 1)
        ring.kick()
        front_end.settle()
        assert ring.queue.collect() == []
        ring.enable()
        assert ring.collect(1) == [Used(chain.head, SECTOR + 1)]


def test_a_held_buffer_for_random_bytes_is_filled_once_whoever_holds_it(
    tmp_path: Path, path: Path, connect: Connect
) -> None:
    source = tmp_path / "fifo"
    os.mkfifo(source)
    writing = os.open(source, os.O_RDWR)
    with served("rng", str(source), socket=path):
        front_end = connect()
        front_end.begin()
        ring = front_end.rings[0]
        chains = [direct(front_end.driver, 4) for _ in range(3)]
        ring.kick()
        front_end.settle()
        assert ring.stop() == 0
        ring.start(0)
        front_end.share()
        os.write(writing, b"abcd")
        assert ring.collect(1) == [Used(chains[0].head, 4)]
        assert ring.stop() == 1
        os.write(writing, b"efghijkl")
        front_end.settle()
        assert ring.queue.collect() == []
        ring.start(1)
        ring.collect(2)
        assert [chain.answer for chain in chains] == [b"abcd", b"efgh", b"ijkl"]
    os.close(writing)


@contextlib.contextmanager
def console(features: int = EVERYTHING) -> Iterator[tuple[FrontEnd, int, int]]:
    """A console that writes to a pipe: its front end, the pipe's reading end, how much it takes."""
    reading, writing = os.pipe()
    room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PAGE)
    with (
        ServedWorker("workers.console", queues=2, pass_fds=[writing], stdout=writing) as worker,
        Driver(queues=2, memory=SharedMemory()) as driver,
        worker.connect(driver) as front_end,
    ):
        os.close(writing)
        front_end.begin(features)
        yield front_end, reading, room
    os.close(reading)


def read_exactly(descriptor: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = os.read(descriptor, count - len(data))
        assert more
        data += more
    return data


@pytest.mark.parametrize("how", ["stop", "table", "reset"])
def test_output_that_is_half_written_is_written_once_and_to_its_end(how: str) -> None:
    text = bytes(number % 251 for number in range(3 * PAGE))
    with console() as (front_end, reading, room):
        ring = front_end.rings[OUTPUT_QUEUE]
        direct(front_end.driver, text, queue=OUTPUT_QUEUE)
        second = direct(front_end.driver, b"and this", queue=OUTPUT_QUEUE)
        ring.kick()
        wait_until(lambda: _in_pipe(reading) == room, "a pipe that is full")
        front_end.settle()
        if how == "stop":
            assert ring.stop() == 0
            assert read_exactly(reading, room) == text[:room]
            ring.start(0)
        elif how == "table":
            front_end.share()
            assert read_exactly(reading, room) == text[:room]
        else:
            front_end.reset()
            assert read_exactly(reading, room) == text[:room]
        assert read_exactly(reading, len(text) - room) == text[room:]
        assert read_exactly(reading, 8) == b"and this"
        if how != "reset":
            assert ring.collect(2)[1].head == second.head
        else:
            for each in front_end.rings:
                each.start()
            direct(front_end.driver, b"anew", queue=OUTPUT_QUEUE)
            ring.kick()
            assert read_exactly(reading, 4) == b"anew"


def _in_pipe(reading: int) -> int:
    number = bytearray(4)
    fcntl.ioctl(reading, 0x541B, number)  # FIONREAD
    return int.from_bytes(number, "little")


def test_what_is_typed_goes_to_whoever_has_a_buffer(path: Path, connect: Connect) -> None:
    with served("console", socket=path) as launched:
        front_end = connect(queues=2)
        front_end.begin()
        ring = front_end.rings[INPUT_QUEUE]
        chain = direct(front_end.driver, 16, queue=INPUT_QUEUE)
        ring.kick()
        launched.send("typed")
        assert ring.collect(1) == [Used(chain.head, 5)]
        chain = direct(front_end.driver, 16, queue=INPUT_QUEUE)
        ring.kick()
        front_end.settle()
        base = ring.stop()
        launched.send("later")
        ring.start(base)
        ring.collect(1)
        assert chain.answer.startswith(b"later")
        front_end.close()
        launched.send("to the next")
        front_end = connect(queues=2)
        front_end.begin()
        chain = direct(front_end.driver, 16, queue=INPUT_QUEUE)
        front_end.rings[INPUT_QUEUE].kick()
        front_end.rings[INPUT_QUEUE].collect(1)
        assert chain.answer.startswith(b"to the next")


# Kicks and calls


def test_calls_are_made_only_where_they_are_wanted(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect()
        front_end.begin(~EVENT_IDX)
        ring = front_end.rings[0]
        ring.ask_for_calls(False)
        read(front_end, 0)
        ring.kick()
        ring.collect(1, polling=True)
        front_end.settle()
        ring.calls()  # one may have been made at the start
        for sector in range(5):
            read(front_end, sector)
            ring.kick()
            ring.collect(1, polling=True)
        front_end.settle()
        assert ring.calls() == 0
        ring.ask_for_calls()
        check_read(front_end, 5)


def test_with_event_indexes_a_call_comes_when_the_ring_has_come_so_far(
    disk: Path, path: Path, connect: Connect
) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect(start=0xFFFE)
        front_end.begin()
        ring = front_end.rings[0]
        check_read(front_end, 0)
        front_end.settle()
        ring.calls()
        ring.set_used_event(0xFFFE + 4)
        for sector in range(3):
            read(front_end, sector)
            ring.kick()
            wait_until(lambda: len(ring.queue.collect()), "used")
        front_end.settle()
        assert ring.calls() == 0
        read(front_end, 3)
        ring.kick()
        ring.wait_for_call()
        assert len(ring.queue.collect()) == 1


@pytest.mark.parametrize("features", [EVERYTHING, ~EVENT_IDX], ids=["event indexes", "flags"])
def test_an_idle_device_asks_for_kicks(disk: Path, path: Path, connect: Connect, features: int) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect()
        front_end.begin(features)
        ring = front_end.rings[0]
        for sector in range(6):
            check_read(front_end, sector)
            if features & EVENT_IDX:
                wait_until(lambda: ring.avail_event == sector + 1, "a kick asked for")  # noqa: B023  it is called at once
            else:
                wait_until(lambda: ring.wants_kicks, "a kick asked for")


def test_requests_of_before_the_start_need_no_kick(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect()
        chain = read(front_end, 9)
        front_end.begin()
        assert front_end.rings[0].collect(1) == [Used(chain.head, SECTOR + 1)]


def test_who_gives_no_call_looks_himself(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect()
        front_end.begin()
        ring = front_end.rings[0]
        ring.set_none(Request.SET_VRING_CALL)
        ring.set_none(Request.SET_VRING_ERR)
        read(front_end, 1)
        ring.kick()
        ring.collect(1, polling=True)


# Resets, and drivers that break rules


@pytest.mark.parametrize("by_status", [True, False])
def test_after_a_reset_another_driver_begins(disk: Path, path: Path, connect: Connect, by_status: bool) -> None:
    with served("block", str(disk), socket=path):
        front_end = connect()
        front_end.begin()
        for _ in range(3):
            front_end.status = 15
            assert front_end.status == 15
            check_read(front_end, 1)
            if by_status:
                front_end.status = 0
                front_end.driver.reset()
            else:
                front_end.reset()
            assert front_end.status == 0
            read(front_end, 2)
            front_end.rings[0].kick()
            front_end.settle()
            assert front_end.rings[0].queue.collect() == []
            front_end.driver.reset()
            front_end.rings[0].start()


@pytest.mark.parametrize("name", ["head out of range", "loop", "address outside memory", "avail index jumps"])
def test_a_broken_ring_is_told_of_and_works_again_after_a_reset(
    disk: Path, path: Path, connect: Connect, name: str
) -> None:
    misdeed = MISDEEDS[name]
    with served("block", str(disk), socket=path) as launched:
        front_end = connect()
        front_end.begin()
        front_end.status = 15
        check_read(front_end, 0)
        misdeed(front_end.driver)
        front_end.rings[0].kick()
        front_end.rings[0].wait_for_error()
        assert front_end.status == 15 | VIRTIO_CONFIG_S_NEEDS_RESET
        launched.err.wait_for("the device is out of order until its driver resets it")
        assert misdeed.says in launched.err.text
        front_end.rings[0].kick()
        front_end.settle()
        front_end.reset()
        assert front_end.status == 0
        front_end.rings[0].start()
        check_read(front_end, 4)
        assert len(launched.err.text.splitlines()) == 2


def test_a_broken_ring_takes_its_neighbours_along(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), "--num-queues", "2", socket=path):
        front_end = connect(queues=2)
        front_end.begin()
        MISDEEDS["head out of range"](front_end.driver, 1)
        front_end.rings[1].kick()
        front_end.rings[0].wait_for_error()
        front_end.rings[1].wait_for_error()
        front_end.reset()
        for ring in front_end.rings:
            ring.start()
        check_read(front_end, 3, 0)
        check_read(front_end, 4, 1)


# Back ends that die, and front ends that go


class Keeper:
    """A device that keeps what it is asked, served with a supervisor, and its front ends."""

    def __init__(self, directory: Path, path: Path, stack: contextlib.ExitStack) -> None:
        (directory / "keeper.py").write_text(KEEPER)
        fifo = directory / "fifo"
        os.mkfifo(fifo)
        self._fifo = os.open(fifo, os.O_RDWR)
        stack.callback(os.close, self._fifo)
        self._path = path
        words = "--supervise", "--device", f"{directory / 'keeper.py'}:Keeper,fifo={fifo}"
        self.launched = stack.enter_context(Launch("serve", *words, "--socket", str(path)))
        self.launched.err.wait_for("lgmp: serving ")
        self.driver = stack.enter_context(Driver(memory=SharedMemory(), start=0xFFFC))
        self._stack = stack
        self._deaths = 0

    def connect(self) -> FrontEnd:
        return self._stack.enter_context(FrontEnd.connect(str(self._path), self.driver))

    def ask(self, front_end: FrontEnd, *texts: bytes) -> dict[bytes, Chain]:
        chains = {text: direct(self.driver, text, 20) for text in texts}
        front_end.rings[0].kick()
        return chains

    def answer(self, front_end: FrontEnd, which: bytes) -> Used:
        os.write(self._fifo, which)
        (used,) = front_end.rings[0].collect(1)
        return used

    def die(self) -> None:
        """kill -9, and wait for the next."""
        (pid,) = self.launched.workers().values()
        os.kill(pid, signal.SIGKILL)
        self._deaths += 1
        self.launched.err.wait_for("started again as pid", self._deaths)


@pytest.fixture
def keeper(tmp_path: Path, path: Path) -> Iterator[Keeper]:
    with contextlib.ExitStack() as stack:
        yield Keeper(tmp_path, path, stack)


def test_with_a_region_each_request_is_answered_once_whoever_dies(keeper: Keeper) -> None:
    front_end = keeper.connect()
    front_end.negotiate()
    with front_end.get_inflight() as inflight:
        front_end.begin(inflight=inflight)
        chains = keeper.ask(front_end, b"a", b"b", b"c", b"d", b"e")
        assert keeper.answer(front_end, b"n").head == chains[b"e"].head
        assert keeper.answer(front_end, b"o").head == chains[b"a"].head
        left = [chains[text].head for text in (b"b", b"c", b"d")]
        assert inflight.heads() == left
        keeper.die()
        assert front_end.wait_for_hang_up() == b""
        chains |= keeper.ask(front_end, b"f")  # which nobody serves
        front_end = keeper.connect()
        front_end.begin(inflight=inflight)
        assert keeper.answer(front_end, b"n").head == chains[b"f"].head
        assert keeper.answer(front_end, b"n").head == chains[b"d"].head
        keeper.die()
        front_end = keeper.connect()
        front_end.begin(inflight=inflight)
        assert keeper.answer(front_end, b"o").head == chains[b"b"].head
        assert keeper.answer(front_end, b"o").head == chains[b"c"].head
        assert [chains[text].answer.rstrip(b"\0") for text in (b"e", b"d", b"b", b"c")] == [
            b"e of 5",
            b"d of 4",
            b"b of 2",
            b"c of 2",
        ]
        assert keeper.driver.queues[0].outstanding == []
        assert inflight.heads() == []
        chains = keeper.ask(front_end, b"g")
        assert keeper.answer(front_end, b"o").head == chains[b"g"].head


def test_without_a_region_requests_are_asked_anew_from_the_used_index(keeper: Keeper) -> None:
    front_end = keeper.connect()
    front_end.begin()
    chains = keeper.ask(front_end, b"a", b"b", b"c", b"d")
    assert keeper.answer(front_end, b"o").head == chains[b"a"].head
    keeper.die()
    front_end = keeper.connect()
    front_end.begin()
    assert [keeper.answer(front_end, b"o").head for _ in range(3)] == [chains[text].head for text in (b"b", b"c", b"d")]
    assert keeper.driver.queues[0].outstanding == []
    assert chains[b"d"].answer.startswith(b"d of 3")


def test_a_stop_in_the_middle_loses_nothing_that_is_answered_out_of_order(keeper: Keeper) -> None:
    front_end = keeper.connect()
    front_end.begin()
    chains = keeper.ask(front_end, b"a", b"b", b"c", b"d")
    assert keeper.answer(front_end, b"n").head == chains[b"d"].head
    base = front_end.rings[0].stop()
    front_end.rings[0].start(base)
    assert [keeper.answer(front_end, b"n").head for _ in range(3)] == [chains[text].head for text in (b"c", b"b", b"a")]
    assert keeper.driver.queues[0].outstanding == []


def test_a_front_end_that_goes_in_the_middle_is_forgotten_and_the_next_one_served(keeper: Keeper) -> None:
    front_end = keeper.connect()
    front_end.begin()
    keeper.ask(front_end, b"a", b"b")
    front_end.settle()
    front_end.close()
    keeper.driver.reset()
    front_end = keeper.connect()
    front_end.begin()
    chains = keeper.ask(front_end, b"c")
    assert keeper.answer(front_end, b"o").head == chains[b"c"].head


def test_killed_under_load_every_write_is_there_and_was_answered_once(
    disk: Path, path: Path, connect: Connect, seed: int
) -> None:
    with Launch("serve", "block", str(disk), "--supervise", "--socket", str(path)) as launched:
        launched.err.wait_for("lgmp: serving ")
        driver = Driver(num=64, memory=SharedMemory())
        front_end = connect(driver=driver)
        front_end.negotiate()
        with front_end.get_inflight() as inflight:
            front_end.begin(inflight=inflight)
            written = 0
            for death in range(1, 6):
                chains = []
                for number in range(16):
                    written += 1
                    chains.append(write(front_end, number, struct.pack("<I", written) * 128))
                front_end.rings[0].kick()
                os.kill(launched.workers()["vda"], signal.SIGKILL)
                launched.err.wait_for("started again as pid", death)
                front_end = connect(driver=driver)
                front_end.begin(inflight=inflight)
                used = front_end.rings[0].collect(16)
                assert sorted(one.head for one in used) == sorted(chain.head for chain in chains)
                assert [chain.answer for chain in chains] == [b"\0"] * 16
                image = disk.read_bytes()
                for number in range(16):
                    assert struct.unpack_from("<I", image, number * SECTOR) == (written - 15 + number,)
                driver.forget()
        front_end.close()
        driver.close()


def test_front_ends_are_served_one_after_the_other(disk: Path, path: Path, connect: Connect) -> None:
    with served("block", str(disk), socket=path) as launched:
        first, second = connect(), connect()
        first.begin()
        check_read(first, 1)
        second.send(Request.GET_FEATURES)
        check_read(first, 2)
        first.close()
        assert second.receive().request == Request.GET_FEATURES
        pid = launched.workers()["vda"]
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        second.close()
        for sector in range(5):
            front_end = connect()
            front_end.begin()
            check_read(front_end, sector)
            front_end.close()
        front_end = connect()
        front_end.settle()
        assert len(os.listdir(f"/proc/{pid}/fd")) == descriptors
        assert "lgmp-guest" not in Path(f"/proc/{pid}/maps").read_text()
        assert len(launched.err.text.splitlines()) == 1


# Devices of one's own


def test_a_device_of_the_users_own_is_served(path: Path, connect: Connect) -> None:
    with Launch("serve", "--device", f"{UPSIDE_DOWN}:UpsideDown,sign=x", "--socket", str(path)) as launched:
        launched.err.wait_for("lgmp: serving upside0 ")
        front_end = connect()
        front_end.begin()
        chain = direct(front_end.driver, b"hello", 20)
        front_end.rings[0].kick()
        (used,) = front_end.rings[0].collect(1)
        assert chain.answer[: used.written].decode() == "ollǝɥx"
        # No room for the answer: the driver's fault.
        direct(front_end.driver, b"hello", 2)
        front_end.rings[0].kick()
        front_end.rings[0].wait_for_error()
        launched.err.wait_for("no room for an answer of 8 bytes")


def test_the_kit_drives_a_device_as_its_documentation_says() -> None:
    with (
        ServedWorker("workers.custom", ["--", f"{UPSIDE_DOWN}:UpsideDown"]) as worker,
        Driver(memory=SharedMemory()) as driver,
        FrontEnd.connect(worker.address, driver) as front_end,
    ):
        front_end.begin()
        chain = direct(driver, b"hello", 20)
        front_end.rings[0].kick()
        front_end.rings[0].collect(1)
        assert chain.answer.startswith(b"oll")
        front_end.close()
        assert worker.stop() == (0, "")
