"""Front ends that are wrong, on purpose or not: each is sent away with one line, and nothing of it is left.

A front end that makes a file of its memory shorter while a worker uses it is another matter: what is not there any more
cannot be read or written, and the kernel ends whoever tries (SIGBUS). With --supervise another worker is started, and
the next front end served; files that are sealed (F_SEAL_SHRINK), as virtual machine monitors have them, cannot shrink.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from fuzzing.choices import OfBytes
from fuzzing.targets import TARGETS
from fuzzing.vhost_user import FuzzedVhostUser
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import Launch, make_disk, pattern, wait_until
from serving import served, worker_of

from lgmp.testing import MISDEEDS, Driver, FrontEnd, SharedMemory, SharedRegion, direct
from lgmp.testing.front_end import EVERYTHING, table
from lgmp.vhost_user.messages import (
    CONFIG,
    HEADER,
    INFLIGHT,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    VRING_ADDR,
    VRING_STATE,
    Request,
)
from lgmp.virtio.block import VIRTIO_BLK_T_IN
from lgmp.virtio.ids import VIRTIO_RING_F_INDIRECT_DESC
from lgmp.virtio.ring import MAX_INDIRECT
from workers.vhost_user import Channel

PAGE = 4096
SECTOR = 512
RINGS = 0x10000
# Two regions in the middle of a file, with a gap between them.
REGIONS = [SharedRegion(0, 0x40000, PAGE), SharedRegion(1 << 32, PAGE, 0x50000)]
GUARD = b"\xa5"
# A message that nobody has heard of.
END = 4711


class Victim:
    """`lgmp serve block`, which has served one front end; what it has now it is to have after each of those here."""

    def __init__(self, launched: Launch, path: Path) -> None:
        self.launched = launched
        self.path = path
        self.pid = worker_of(launched)
        self._heard = self._ends = 0
        self.serve()
        self._before = self._belongings()
        self._said()

    def _belongings(self) -> tuple[int, int]:
        maps = Path(f"/proc/{self.pid}/maps").read_text()
        return len(os.listdir(f"/proc/{self.pid}/fd")), maps.count("memfd:") + maps.count("/socket")

    def _said(self) -> list[str]:
        """What it has said since this was asked last: up to what it says now of one that asks for nonsense."""
        with contextlib.ExitStack() as stack:
            last = self.front_end(stack)
            last.send(END)
            last.wait_for_hang_up()
        self._ends += 1
        self.launched.err.wait_for(f"request {END}, which was not offered", self._ends)
        lines = self.launched.err.text.splitlines()
        new = lines[self._heard : -1]
        self._heard = len(lines)
        return new

    def front_end(self, stack: contextlib.ExitStack) -> FrontEnd:
        driver = stack.enter_context(Driver(queues=2, num=16, memory=SharedMemory(REGIONS, ring_bytes=RINGS)))
        return stack.enter_context(FrontEnd.connect(str(self.path), driver))

    def serve(self) -> None:
        """Serve a good front end, to its end."""
        with contextlib.ExitStack() as stack:
            front_end = self.front_end(stack)
            front_end.begin()
            check_read(front_end)
            front_end.socket.shutdown(socket.SHUT_WR)
            assert front_end.wait_for_hang_up() == b""

    def check(self, *says: str) -> None:
        """It serves the next one, has nothing left of the last, and has said those lines of it, and no others."""
        self.serve()
        assert self._belongings() == self._before
        lines = self._said()
        assert len(lines) == len(says), lines
        for line, expected in zip(lines, says, strict=True):
            assert line.startswith("lgmp: vda: ")
            assert expected in line


@pytest.fixture(scope="module")
def shared_victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    directory = tmp_path_factory.mktemp("hostile")
    disk = make_disk(directory / "disk.img")
    with served("block", str(disk), "--num-queues", "2", socket=directory / "socket") as launched:
        yield Victim(launched, directory / "socket")
    assert disk.read_bytes() == pattern(64)


@pytest.fixture
def victim(shared_victim: Victim) -> Victim:
    return shared_victim


@pytest.fixture
def front_end(victim: Victim) -> Iterator[FrontEnd]:
    """Connected, and all around its regions are guard bytes, which are there still at the end."""
    with contextlib.ExitStack() as stack:
        made = victim.front_end(stack)
        (file,) = made.memory.files
        size = os.fstat(file).st_size
        gaps = [(0, PAGE), (0x41000, 0x50000), (0x51000, size)]
        for start, end in gaps:
            os.pwrite(file, GUARD * (end - start), start)
        memory = os.dup(file)
        stack.callback(os.close, memory)
        yield made
        for start, end in gaps:
            assert os.pread(memory, end - start, start) == GUARD * (end - start)


def check_read(front_end: FrontEnd, sector: int = 0) -> None:
    chain = direct(front_end.driver, struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, sector), SECTOR, 1)
    front_end.rings[0].kick()
    front_end.rings[0].collect(1)
    assert chain.answer == pattern(sector + 1)[-SECTOR:] + b"\0"


def sent_away(front_end: FrontEnd) -> None:
    assert front_end.wait_for_hang_up() == b""
    front_end.close()


def state(index: int, number: int) -> bytes:
    return VRING_STATE.pack(index, number)


# Bytes that are no message


HEADERS = {
    "no version": ((2, 0, 8), "SET_FEATURES of version 0 of the protocol"),
    "another version": ((2, 2, 8), "SET_FEATURES of version 2"),
    "an answer": ((2, VERSION | REPLY, 8), "SET_FEATURES as an answer, and nothing was asked"),
    "too long": ((2, VERSION, 4097), "SET_FEATURES with 4097 bytes, the longest message has 4096"),
    "far too long": ((2, VERSION, 0xFFFFFFFF), "SET_FEATURES with 4294967295 bytes"),
    "nothing there is": ((0, VERSION, 0), "request 0, which was not offered"),
    "the greatest number": ((0xFFFFFFFF, VERSION, 0), "request 4294967295, which was not offered"),
    "not offered": ((Request.POSTCOPY_ADVISE, VERSION, 0), "POSTCOPY_ADVISE, which was not offered"),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("begun", [True, False])
def test_a_header_that_cannot_be(victim: Victim, front_end: FrontEnd, name: str, begun: bool) -> None:
    fields, says = HEADERS[name]
    if begun:
        front_end.begin()
        check_read(front_end)
    front_end.send_raw(HEADER.pack(*fields))
    sent_away(front_end)
    victim.check(f"the front end is sent away: {says}")


SIZES = {
    Request.SET_FEATURES: 8,
    Request.SET_PROTOCOL_FEATURES: 8,
    Request.SET_VRING_NUM: 8,
    Request.SET_VRING_ADDR: 40,
    Request.SET_VRING_BASE: 8,
    Request.GET_VRING_BASE: 8,
    Request.SET_VRING_KICK: 8,
    Request.SET_VRING_CALL: 8,
    Request.SET_VRING_ERR: 8,
    Request.SET_VRING_ENABLE: 8,
    Request.ADD_MEM_REG: 40,
    Request.REM_MEM_REG: 40,
    Request.SET_STATUS: 8,
}


@pytest.mark.parametrize("request_", SIZES, ids=[one.name for one in SIZES])
def test_a_payload_of_another_size(victim: Victim, front_end: FrontEnd, request_: Request) -> None:
    size = SIZES[request_]
    wrong = [0, 1, size - 1, size + 1, 4096]
    for number, each in enumerate(wrong):
        with contextlib.ExitStack() as stack:
            other = front_end if not number else victim.front_end(stack)
            other.negotiate()
            other.send(request_, bytes(each), [other.rings[0].kick_fd])
            sent_away(other)
    victim.check(*(f"the front end is sent away: {request_.name} with {each} bytes, it has {size}" for each in wrong))


@pytest.mark.parametrize(
    ("request_", "payload", "says"),
    [
        (Request.SET_MEM_TABLE, b"", "with 0 bytes"),
        (Request.SET_MEM_TABLE, struct.pack("<II", 0, 0), "with 0 regions, there may be 1 to 8"),
        (Request.SET_MEM_TABLE, struct.pack("<II", 9, 0) + bytes(288), "with 9 regions"),
        (Request.SET_MEM_TABLE, struct.pack("<II", 0xFFFFFFFF, 0), "with 4294967295 regions"),
        (Request.SET_MEM_TABLE, struct.pack("<II", 2, 0) + bytes(63), "with 71 bytes, too few for 2 regions"),
        (Request.GET_CONFIG, b"", "with 0 bytes"),
        (Request.GET_CONFIG, CONFIG.pack(0, 257, 0) + bytes(257), "of 257 bytes at 0"),
        (Request.GET_CONFIG, CONFIG.pack(0xFFFFFFFF, 1, 0) + bytes(1), "of 1 bytes at 4294967295"),
        (Request.GET_INFLIGHT_FD, bytes(19), "with 19 bytes"),
        (Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, 0xFFFF, 0xFFFF), "for 65535 rings of 65535 descriptors"),
    ],
)
def test_contents_that_cannot_be(
    victim: Victim, front_end: FrontEnd, request_: Request, payload: bytes, says: str
) -> None:
    front_end.negotiate()
    front_end.send(request_, payload)
    sent_away(front_end)
    victim.check(f"the front end is sent away: {request_.name} {says}")


def whole_session(front_end: FrontEnd) -> list[tuple[bytes, Sequence[int]]]:
    """All that a front end says, message by message, with its descriptors."""
    said: list[tuple[bytes, Sequence[int]]] = []
    real = front_end.send_raw

    def note(data: bytes, descriptors: Sequence[int] = ()) -> None:
        said.append((data, descriptors))
        real(data, descriptors)

    front_end.send_raw = note  # type: ignore[method-assign]
    front_end.begin()
    front_end.send_raw = real  # type: ignore[method-assign]
    return said


def test_the_end_anywhere_in_a_session(victim: Victim, front_end: FrontEnd) -> None:
    said = whole_session(front_end)
    front_end.socket.close()
    expected = []
    for last, (data, descriptors) in enumerate(said):
        for cut in (0, 5, len(data) // 2 + 6, len(data) - 1):
            if cut >= len(data) or (cut and cut < 5):
                continue
            with contextlib.ExitStack() as stack:
                other = victim.front_end(stack)
                with contextlib.suppress(BrokenPipeError):
                    for whole, with_it in said[:last]:
                        other.send_raw(whole, with_it)
                    if cut:
                        other.send_raw(data[:cut], descriptors)
                        expected.append("the front end is sent away: the connection has ended in the middle of ")
                other.socket.shutdown(socket.SHUT_WR)
                other.wait_for_hang_up()
    victim.check(*expected)


def test_whoever_stops_in_mid_message_keeps_no_one_waiting_once_he_has_gone(
    victim: Victim, front_end: FrontEnd
) -> None:
    front_end.begin()
    front_end.send_raw(HEADER.pack(Request.SET_MEM_TABLE, VERSION, 40) + bytes(39), front_end.memory.files)
    # What it has there is served meanwhile.
    check_read(front_end)
    with contextlib.ExitStack() as stack:
        waiting = victim.front_end(stack)
        waiting.send(Request.GET_FEATURES)
        check_read(front_end, 1)
        front_end.close()
        assert waiting.receive().request == Request.GET_FEATURES
    victim.check("the connection has ended in the middle of SET_MEM_TABLE")


def test_a_message_may_come_byte_by_byte(victim: Victim, front_end: FrontEnd) -> None:
    memory = front_end.memory
    front_end.negotiate()
    whole = table(memory.regions)
    whole = HEADER.pack(Request.SET_MEM_TABLE, VERSION | NEED_REPLY, len(whole)) + whole
    front_end.send_raw(whole[:1], [memory.files[0]])
    for at in range(1, len(whole)):
        front_end.send_raw(whole[at : at + 1], [memory.files[0]] if at == 30 else [])
    assert front_end.receive().number == 0
    for ring in front_end.rings:
        ring.start()
    check_read(front_end)
    front_end.close()
    victim.check()


def test_answers_that_nobody_reads(victim: Victim, front_end: FrontEnd) -> None:
    front_end.begin()
    question = HEADER.pack(Request.GET_CONFIG, VERSION, CONFIG.size + 256) + CONFIG.pack(0, 256, 0) + bytes(256)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(10_000):
            front_end.send_raw(question)
    front_end.close()
    victim.check("the front end is lost: it does not read its answers")


def test_an_answer_waits_for_its_reader_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.vhost_user._REPLY_PATIENCE", 0.01)
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    with pytest.raises(TimeoutError):
        while True:
            channel.send(bytes(5000), None)
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while ours.recv(1 << 16):
            pass
    channel.send(b"answer", None)
    assert ours.recv(100) == b"answer"
    channel.close()
    ours.close()


# Descriptors


@pytest.mark.parametrize("count", [0, 2, 8, 9, 30])
@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_missing_and_surplus_descriptors_of_a_ring(
    victim: Victim, front_end: FrontEnd, request_: Request, count: int
) -> None:
    front_end.begin()
    front_end.send(request_, U64.pack(0), [front_end.rings[0].kick_fd] * count)
    sent_away(front_end)
    many = "more than 8 descriptors with one message"
    victim.check(many if count > 8 else f"{request_.name} with {count} descriptors, it has 1")


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_missing_and_surplus_descriptors_of_memory(victim: Victim, front_end: FrontEnd, count: int) -> None:
    front_end.begin()
    front_end.send(Request.SET_MEM_TABLE, table(REGIONS), front_end.memory.files * count)
    sent_away(front_end)
    victim.check(f"SET_MEM_TABLE with {count} descriptors, it has 2")


def test_descriptors_with_what_has_none(victim: Victim, front_end: FrontEnd) -> None:
    front_end.begin()
    for request in (Request.GET_FEATURES, Request.GET_STATUS, Request.SET_OWNER, Request.GET_QUEUE_NUM):
        front_end.send(request, b"", [front_end.rings[0].call_fd] * 8)
    assert [front_end.receive().request for _ in range(3)] == [Request.GET_FEATURES, Request.GET_STATUS, 17]
    front_end.close()
    victim.check()


def test_descriptors_without_end(victim: Victim, front_end: FrontEnd) -> None:
    front_end.negotiate()
    front_end.send_raw(HEADER.pack(Request.SET_MEM_TABLE, VERSION, 40)[:2], front_end.memory.files * 8)
    front_end.send_raw(b"\0", front_end.memory.files)
    sent_away(front_end)
    victim.check("more than 8 descriptors with one message")


STRANGE: dict[str, Callable[[contextlib.ExitStack], int]] = {
    "/dev/null": lambda stack: opened(stack, os.open("/dev/null", os.O_RDWR)),
    "/dev/zero": lambda stack: opened(stack, os.open("/dev/zero", os.O_RDWR)),
    "a directory": lambda stack: opened(stack, os.open("/", os.O_RDONLY)),
    "a pipe": lambda stack: opened(stack, *os.pipe()),
    "a pipe that nobody reads": lambda stack: opened(stack, *reversed(os.pipe())),
    "a memory file": lambda stack: opened(stack, os.memfd_create("strange")),
    "a full eventfd": lambda stack: opened(stack, full_eventfd(0)),
    "a full eventfd that does not block": lambda stack: opened(stack, full_eventfd(os.EFD_NONBLOCK)),
    "a socket": lambda stack: stack.enter_context(socket.socket()).fileno(),
    "a file": lambda stack: opened(stack, os.open(__file__, os.O_RDONLY)),
}


def opened(stack: contextlib.ExitStack, *descriptors: int) -> int:
    for descriptor in descriptors:
        stack.callback(os.close, descriptor)
    return descriptors[0]


def full_eventfd(flags: int) -> int:
    descriptor = os.eventfd(0, flags)
    os.eventfd_write(descriptor, (1 << 64) - 2)
    return descriptor


@pytest.mark.parametrize("name", STRANGE)
def test_kicks_from_what_is_no_eventfd(victim: Victim, front_end: FrontEnd, name: str) -> None:
    with contextlib.ExitStack() as stack:
        descriptor = STRANGE[name](stack)
        front_end.begin(protocol_features=0)
        front_end.rings[0].set_kick(descriptor)
        # What nobody can wait for is refused; all else may kick.
        if name in ("/dev/null", "/dev/zero", "a directory", "a memory file", "a file"):
            sent_away(front_end)
            victim.check("a descriptor for kicks is none: Operation not permitted")
        else:
            front_end.settle()
            front_end.rings[0].set_kick()
            check_read(front_end)
            front_end.close()
            victim.check()


@pytest.mark.parametrize("name", STRANGE)
def test_calls_to_what_is_no_eventfd(victim: Victim, front_end: FrontEnd, name: str) -> None:
    with contextlib.ExitStack() as stack:
        descriptor = STRANGE[name](stack)
        front_end.begin()
        ring = front_end.rings[0]
        ring.set_call(descriptor)
        ring.set_error(descriptor)
        for _ in range(3):
            direct(front_end.driver, bytes(16), SECTOR, 1)
            ring.kick()
            ring.collect(1, polling=True)
        MISDEEDS["head out of range"](front_end.driver)
        ring.kick()
        wait_until(lambda: front_end.status, "broken")
        front_end.close()
        victim.check("Guest says index 16 is available")


@pytest.mark.parametrize("name", STRANGE)
def test_memory_that_is_none(victim: Victim, front_end: FrontEnd, name: str) -> None:
    with contextlib.ExitStack() as stack:
        descriptor = STRANGE[name](stack)
        front_end.begin()
        check_read(front_end)
        files = front_end.memory.files[0], descriptor
        front_end.send(Request.SET_MEM_TABLE, table([REGIONS[0], SharedRegion(1 << 40, PAGE, user=0)]), files)
        sent_away(front_end)
        if name == "a memory file":
            says = "ends beyond its file, which has 0x0 bytes"
        else:
            says = "cannot map 0x1000 bytes" if name == "a file" else "is in no file that can be mapped"
        victim.check(says)


def test_memory_that_may_only_be_read(victim: Victim, front_end: FrontEnd) -> None:
    front_end.negotiate()
    with contextlib.ExitStack() as stack:
        read_only = opened(stack, os.open(f"/proc/self/fd/{front_end.memory.files[0]}", os.O_RDONLY))
        front_end.send(Request.SET_MEM_TABLE, table(REGIONS), [read_only] * 2)
        sent_away(front_end)
    victim.check("of guest memory: Permission denied")


# Memory and rings that cannot be

ABSURD_REGIONS = {
    "no bytes": (SharedRegion(1 << 40, 0, user=0), "no memory has such a size or place"),
    "the guest's addresses wrap": (SharedRegion((1 << 64) - PAGE, 2 * PAGE, user=0), "no memory has such"),
    "the front end's addresses wrap": (SharedRegion(1 << 40, 2 * PAGE, user=(1 << 64) - PAGE), "no memory has such"),
    "the file's offsets wrap": (SharedRegion(1 << 40, 2 * PAGE, (1 << 64) - PAGE, user=0), "no memory has such"),
    "everything": (SharedRegion(0, (1 << 64) - 1, user=1), "ends beyond its file"),
    "beyond the file": (SharedRegion(1 << 40, 0x100000, user=0), "ends beyond its file"),
    "far beyond the file": (SharedRegion(1 << 40, PAGE, 1 << 62, user=0), "ends beyond its file"),
    "over another": (SharedRegion(0x3F000, 2 * PAGE, user=0), "two regions of memory overlap"),
    "over another in the front end": (SharedRegion(1 << 40, PAGE, 0x40000), "two regions of memory overlap"),
}


@pytest.mark.parametrize("name", ABSURD_REGIONS)
@pytest.mark.parametrize("slot", [True, False], ids=["slot", "table"])
def test_an_absurd_region(victim: Victim, front_end: FrontEnd, name: str, slot: bool) -> None:
    region, says = ABSURD_REGIONS[name]
    front_end.begin()
    check_read(front_end)
    if slot:
        front_end.send(Request.ADD_MEM_REG, bytes(8) + region.pack(), front_end.memory.files)
    else:
        front_end.send(Request.SET_MEM_TABLE, table([*REGIONS, region]), front_end.memory.files * 3)
    sent_away(front_end)
    victim.check(says)


def test_memory_larger_than_all_there_is(victim: Victim, front_end: FrontEnd) -> None:
    with contextlib.ExitStack() as stack:
        huge = opened(stack, os.memfd_create("huge"))
        os.ftruncate(huge, 1 << 62)
        front_end.begin()
        region = SharedRegion(1 << 40, 1 << 61, user=0)
        front_end.send(Request.ADD_MEM_REG, bytes(8) + region.pack(), [huge])
        sent_away(front_end)
    victim.check("cannot map 0x2000000000000000 bytes of guest memory")


def test_more_regions_than_there_are_slots(victim: Victim, front_end: FrontEnd) -> None:
    front_end.negotiate()
    front_end.share()
    with contextlib.suppress(BrokenPipeError):
        for number in range(130):
            region = SharedRegion((1 << 40) + number * PAGE, PAGE, 0x50000, user=(1 << 40) + number * PAGE)
            front_end.send(Request.ADD_MEM_REG, bytes(8) + region.pack(), front_end.memory.files)
    front_end.wait_for_hang_up()
    front_end.close()
    victim.check("more than 128 regions of memory")


def test_removing_what_is_not_there(victim: Victim, front_end: FrontEnd) -> None:
    front_end.begin()
    front_end.send(Request.REM_MEM_REG, bytes(8) + SharedRegion(1 << 40, PAGE).pack())
    sent_away(front_end)
    victim.check("there is no region of memory at 0x10000000000+0x1000 to remove")


@pytest.mark.parametrize("what", ["desc", "used", "avail"])
@pytest.mark.parametrize(
    ("shift", "says"),
    [
        (1, "not a multiple of"),
        (1 << 20, "is not in the memory that is shared"),
        ((1 << 64) - (1 << 48), "is not in the memory that is shared"),
        (0x40000 - RINGS - 16, None),
    ],
)
def test_a_ring_that_is_nowhere(victim: Victim, front_end: FrontEnd, what: str, shift: int, says: str | None) -> None:
    front_end.begin()
    layout = front_end.driver.layouts[0]
    user = front_end.memory.user_address
    addresses = {"desc": user(layout.desc), "used": user(layout.used), "avail": user(layout.avail)}
    if says is None:
        # Its last bytes are beyond the end of its region.
        addresses[what] = user(0x40000 - 16)
        says = "is not within guest memory"
    else:
        addresses[what] = (addresses[what] + shift) % (1 << 64)
    front_end.rings[0].stop()
    payload = VRING_ADDR.pack(0, 0, addresses["desc"], addresses["used"], addresses["avail"], 0)
    front_end.tell(Request.SET_VRING_ADDR, payload)
    front_end.send(Request.SET_VRING_KICK, U64.pack(0), [front_end.rings[0].kick_fd])
    sent_away(front_end)
    victim.check(says)


@pytest.mark.parametrize("num", [0, 3, 0x8001, 0x10000, 0xFFFFFFFF])
def test_a_ring_of_an_absurd_size(victim: Victim, front_end: FrontEnd, num: int) -> None:
    front_end.negotiate()
    front_end.send(Request.SET_VRING_NUM, state(0, num))
    sent_away(front_end)
    victim.check(f"SET_VRING_NUM: a ring of {num} descriptors")


@pytest.mark.parametrize("index", [2, 255, 0x80000000, 0xFFFFFFFF])
def test_a_ring_that_the_device_does_not_have(victim: Victim, front_end: FrontEnd, index: int) -> None:
    front_end.negotiate()
    front_end.send(Request.SET_VRING_ENABLE, state(index, 1))
    sent_away(front_end)
    victim.check(f"SET_VRING_ENABLE for ring {index}, there are 2")


# In the wrong order


def out_of_order() -> dict[str, tuple[Callable[[FrontEnd], None], str]]:
    def before_all(front_end: FrontEnd) -> None:
        front_end.rings[0].set_kick()

    def before_memory(front_end: FrontEnd) -> None:
        front_end.rings[0].describe(0)
        front_end.rings[0].set_kick()

    def twice(front_end: FrontEnd) -> None:
        front_end.begin(protocol_features=0)
        front_end.rings[0].describe(0)

    def record_under_way(front_end: FrontEnd) -> None:
        front_end.begin()
        front_end.set_inflight(front_end.get_inflight())

    def features_nobody_offered(front_end: FrontEnd) -> None:
        front_end.send(Request.SET_FEATURES, U64.pack(EVERYTHING))

    def no_descriptor(front_end: FrontEnd) -> None:
        front_end.begin(protocol_features=0)
        front_end.rings[0].set_none(Request.SET_VRING_KICK)

    return {
        "a kick before all else": (before_all, "SET_VRING_KICK for ring 0 without SET_VRING_NUM before it"),
        "a ring before memory": (before_memory, "is not in the memory that is shared"),
        "a ring described while it runs": (twice, "SET_VRING_NUM for ring 0 while it is started"),
        "a record while rings run": (record_under_way, "SET_INFLIGHT_FD while rings are started"),
        "features that are not offered": (features_nobody_offered, "SET_FEATURES 0xffffffffffffffff"),
        "a ring to be polled": (no_descriptor, "is to be polled, having no descriptor for kicks"),
    }


@pytest.mark.parametrize("name", out_of_order())
def test_messages_in_the_wrong_order(victim: Victim, front_end: FrontEnd, name: str) -> None:
    act, says = out_of_order()[name]
    with contextlib.suppress(AssertionError, OSError):  # it hangs up on who waits for an answer, or says more
        act(front_end)
    front_end.wait_for_hang_up()
    front_end.close()
    victim.check(says)


# Records of requests in flight


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (16, b"\1", "Bad virtblk cmd"),
        (16 + 7 * 16, b"\xff", "Bad virtblk cmd"),
        (16 + 15 * 16, b"\1", "Bad virtblk cmd"),
        (16 + 15 * 16 + 8, b"\xff" * 8, "the in-flight region is of another ring"),
        (8, b"\7\0", "an in-flight region of version 7"),
        (8, b"\1\0\3\0", "for 3 descriptors, not of version 1 for 16"),
        # That nothing is in flight and where the used ring was then: the used ring itself says where it is.
        (12, b"\x09\0\5\0", None),
    ],
)
def test_a_record_that_lies(victim: Victim, front_end: FrontEnd, at: int, value: bytes, says: str | None) -> None:
    front_end.negotiate()
    with front_end.get_inflight(2, 16) as inflight:
        os.pwrite(inflight.descriptor, value, at)
        with contextlib.suppress(AssertionError, OSError):  # it may hang up
            front_end.begin(inflight=inflight)
            front_end.settle()
    front_end.close()
    victim.check(*([says] if says is not None else []))


# Rings with wrong contents


@pytest.mark.parametrize("name", [name for name, misdeed in MISDEEDS.items() if not misdeed.while_in_flight])
def test_a_driver_that_breaks_a_rule_is_told_and_so_is_the_user(victim: Victim, front_end: FrontEnd, name: str) -> None:
    misdeed = MISDEEDS[name]
    features = EVERYTHING if misdeed.indirect_accepted else ~(1 << VIRTIO_RING_F_INDIRECT_DESC)
    if name == "table too long":
        assert front_end.memory.ram_bytes > 16 * (MAX_INDIRECT + 1)
    front_end.begin(features)
    check_read(front_end)
    misdeed(front_end.driver)
    front_end.rings[0].kick()
    front_end.rings[0].wait_for_error()
    if front_end.status:
        front_end.reset()
        front_end.rings[0].start()
        check_read(front_end)
    front_end.close()
    victim.check(misdeed.says)


# At random


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=800), st.integers(0))
def test_any_session_is_served_or_sent_away(data: bytes, seed: int) -> None:
    for random in (OfBytes(data), Random(seed)):
        _target().run(random)


_targets: list[FuzzedVhostUser] = []


def _target() -> FuzzedVhostUser:
    if not _targets:
        _targets.append(FuzzedVhostUser())
    return _targets[0]


@pytest.fixture(scope="module", autouse=True)
def _targets_closed() -> Iterator[None]:
    yield
    while _targets:
        _targets.pop().close()


def test_the_same_seed_sends_the_same() -> None:
    runs = []
    for _ in range(2):
        with closing(TARGETS["vhost-user"][0]()) as target:
            counts = []
            for case in range(40):
                target.run(Random(f"1 {case}"))
                counts.append((target.chains, target.broken))
            runs.append(counts)
    assert runs[0] == runs[1]
    assert runs[0][-1][0] > 400
