"""The disk: what a guest reads and writes, what it is refused, and what it is told when the file beneath it fails."""

from __future__ import annotations

import os
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS
from lgmp.testing import Buffer, Driver, Recorder, Used
from lgmp.virtio import block as virtio_block
from lgmp.virtio.block import (
    VIRTIO_BLK_F_BARRIER,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_BARRIER,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SCSI_CMD,
)
from lgmp.virtio.ids import VIRTIO_RING_F_INDIRECT_DESC, VIRTQUEUE_NUM
from lgmp.virtio.ring import RingError
from workers.block import Block
from workers.device import BATCH, IOV_MAX, Complaints

SECTOR = 512
DISK_SECTORS = 64
TABLE = 3 << 20  # an indirect table, out of the way of the buffers
UNTOUCHED = 0xEE  # what a status byte is before the device has said anything
BOTH_FLUSHES = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_BARRIER


@dataclass
class Rig:
    """A disk in this process, its driver, and a file with known contents."""

    fd: int
    size: int = DISK_SECTORS * SECTOR
    read_only: bool = False
    serial: str = "disk.img"
    features: int = BOTH_FLUSHES | 1 << VIRTIO_RING_F_INDIRECT_DESC
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.driver = Driver()
        self.recorder = Recorder()
        self.block = Block(self.fd, size=self.size, serial=self.serial, read_only=self.read_only, say=self.said.append)
        self.block.attach(self.driver.device_queues(), self.recorder)
        self.block.accept(self.features)

    def request(
        self, kind: int, sector: int = 0, out: Sequence[bytes] = (), into: Sequence[int] = (), *, indirect: bool = True
    ) -> tuple[int, int, bytes]:
        """One request through the ring; gives its status, its used length and what was read."""
        self.driver.forget()
        header = self.driver.buffer(struct.pack("<IIQ", kind, 0, sector))
        data_out = [self.driver.buffer(piece) for piece in out]
        data_in = [self.driver.buffer(b"\xdd" * size, writable=True) for size in into]
        data_in = [Buffer(buffer.address, buffer.size, True) for buffer in data_in]
        status = self.driver.buffer(bytes([UNTOUCHED]), writable=True)
        head = self.driver.queues[0].add([header, *data_out, *data_in, status], TABLE if indirect else None)
        assert not self.block.serve()
        (used,) = self.driver.queues[0].collect()
        assert used.head == head
        return self.driver.content(status)[0], used.written, b"".join(map(self.driver.content, data_in))

    def read(self, sector: int, *sizes: int) -> tuple[int, int, bytes]:
        return self.request(VIRTIO_BLK_T_IN, sector, into=sizes)

    def write(self, sector: int, *pieces: bytes) -> tuple[int, int, bytes]:
        return self.request(VIRTIO_BLK_T_OUT, sector, out=pieces)

    def content(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)

    def close(self) -> None:
        self.driver.close()


@pytest.fixture
def disk() -> Iterator[int]:
    """A file of DISK_SECTORS sectors, each different from the others."""
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(bytes([number + 1]) * SECTOR for number in range(DISK_SECTORS)))
        file.flush()
        yield file.fileno()


@pytest.fixture
def rig(disk: int) -> Iterator[Rig]:
    rig = Rig(disk)
    yield rig
    rig.close()


def sectors(*numbers: int) -> bytes:
    """What the disk holds there at the start."""
    return b"".join(bytes([number + 1]) * SECTOR for number in numbers)


# What the launcher puts on the bus


def test_the_features_are_those_of_the_seed_and_its_successors() -> None:
    bits = (VIRTIO_BLK_F_BARRIER, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_FLUSH, VIRTIO_RING_F_INDIRECT_DESC)
    assert virtio_block.features(read_only=False) == sum(1 << bit for bit in bits)
    assert virtio_block.features(read_only=True) == sum(1 << bit for bit in bits) | 1 << VIRTIO_BLK_F_RO


def test_the_config_space_has_capacity_and_seg_max() -> None:
    space = virtio_block.config_space(0x123456789A, VIRTQUEUE_NUM)
    assert space == struct.pack("<QII", 0x123456789A, 0, 126)


# Reading and writing


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("sizes", [(512,), (1024,), (512, 1024, 512), (1, 510, 1), (0, 512), (512, 0), ()])
def test_a_read_fills_the_segments_and_says_how_much(rig: Rig, sizes: tuple[int, ...], indirect: bool) -> None:
    count = sum(sizes) // SECTOR
    status, written, data = rig.request(VIRTIO_BLK_T_IN, 3, into=sizes, indirect=indirect)
    assert (status, written) == (VIRTIO_BLK_S_OK, sum(sizes) + 1)
    assert data == sectors(*range(3, 3 + count))


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("sizes", [(512,), (1024,), (512, 1024, 512), (1, 510, 1), (0, 512), (512, 0), ()])
def test_a_write_changes_those_sectors_and_no_others(rig: Rig, sizes: tuple[int, ...], indirect: bool) -> None:
    before = rig.content()
    pieces = [bytes([0xA0 + number]) * size for number, size in enumerate(sizes)]
    status, written, _ = rig.request(VIRTIO_BLK_T_OUT, 5, out=pieces, indirect=indirect)
    assert (status, written) == (VIRTIO_BLK_S_OK, 1)
    end = 5 * SECTOR + sum(sizes)
    assert rig.content() == before[: 5 * SECTOR] + b"".join(pieces) + before[end:]


def test_the_whole_disk_can_be_read_and_its_last_sector_written(rig: Rig) -> None:
    status, _, data = rig.read(0, DISK_SECTORS * SECTOR)
    assert (status, data) == (VIRTIO_BLK_S_OK, rig.content())
    assert rig.write(DISK_SECTORS - 1, b"z" * SECTOR)[0] == VIRTIO_BLK_S_OK
    assert rig.content()[-SECTOR:] == b"z" * SECTOR
    assert len(rig.content()) == DISK_SECTORS * SECTOR


def test_a_request_of_more_than_a_mebibyte_goes_in_one() -> None:
    size = (1 << 20) + 65536
    with tempfile.TemporaryFile() as file:
        content = os.urandom(size)
        file.write(content)
        file.flush()
        rig = Rig(file.fileno(), size=size)
        pieces = [content[start : start + 16384][::-1] for start in range(0, size, 16384)]
        assert rig.read(0, *map(len, pieces)) == (VIRTIO_BLK_S_OK, size + 1, content)
        assert rig.write(0, *pieces)[0] == VIRTIO_BLK_S_OK
        assert rig.content() == b"".join(pieces)
        rig.close()


def test_more_segments_than_one_system_call_takes_are_served(rig: Rig, disk: int) -> None:
    """No ring leads to so many, but the device is not to depend on that."""
    count = 16 * IOV_MAX
    header = memoryview(struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 1))
    memory = memoryview(bytearray(2 * count + 1))
    segments = [memory[2 * number : 2 * number + number % 3] for number in range(count)]
    size = sum(map(len, segments))
    segments += [memory[2 * count : 2 * count]] * (IOV_MAX + 1)
    tail = memoryview(bytearray(-size % SECTOR))
    assert rig.block.handle(0, [header], [*segments, tail, memory[-1:]]) == size + len(tail) + 1
    expected = os.pread(disk, size, SECTOR)
    assert b"".join(map(bytes, segments)) == expected

    header = memoryview(struct.pack("<IIQ", VIRTIO_BLK_T_OUT, 0, 2))
    assert rig.block.handle(0, [header, *segments, tail], [memory[-1:]]) == 1
    assert os.pread(disk, size, 2 * SECTOR) == expected


@pytest.mark.parametrize("limit", [1, 511, 700, 4096])
def test_system_calls_that_do_less_than_asked_are_continued(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """preadv and pwritev may always do less; here they do at most `limit` bytes of the first segment."""
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr("workers.block.preadv", lambda fd, into, at: preadv(fd, [into[0][:limit]], at))
    monkeypatch.setattr("workers.block.pwritev", lambda fd, out, at: pwritev(fd, [out[0][:limit]], at))
    assert rig.read(1, 300, 212, 1024) == (VIRTIO_BLK_S_OK, 1537, sectors(1, 2, 3))
    assert rig.write(9, b"x" * 700, b"y" * 836)[0] == VIRTIO_BLK_S_OK
    assert rig.content()[9 * SECTOR : 12 * SECTOR] == b"x" * 700 + b"y" * 836


def test_requests_are_answered_in_batches_and_the_driver_told_once_for_each(rig: Rig) -> None:
    header = rig.driver.buffer(struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 0))
    data, status = rig.driver.buffer(SECTOR, writable=True), rig.driver.buffer(1, writable=True)
    heads = [rig.driver.queues[0].add([header, data, status]) for _ in range(BATCH + 5)]
    assert rig.block.serve()
    assert rig.recorder.used_queues == [0]
    assert not rig.block.serve()
    assert rig.recorder.used_queues == [0, 0]
    assert rig.driver.queues[0].collect() == [Used(head, SECTOR + 1) for head in heads]
    assert not rig.block.serve()
    assert rig.recorder.used_queues == [0, 0]


# Past the end, and what is not whole sectors

PAST_THE_END = [
    (DISK_SECTORS, 1),
    (DISK_SECTORS - 1, 2),
    (DISK_SECTORS + 1, 0),
    (0, DISK_SECTORS + 1),
    (1 << 32, 1),
    (1 << 55, 1),  # 512 times it is 2**64: zero, for who counts in 64 bits
    ((1 << 55) + 3, 1),
    ((1 << 64) - 1, 1),
]


@pytest.mark.parametrize(("sector", "count"), PAST_THE_END)
def test_a_read_past_the_end_is_an_error_and_reads_nothing(rig: Rig, sector: int, count: int) -> None:
    status, written, data = rig.read(sector, count * SECTOR)
    assert (status, written) == (VIRTIO_BLK_S_IOERR, 1)
    assert data == b"\xdd" * (count * SECTOR)


@pytest.mark.parametrize(("sector", "count"), PAST_THE_END)
def test_a_write_past_the_end_is_an_error_and_writes_nothing(rig: Rig, sector: int, count: int) -> None:
    before = rig.content()
    assert rig.write(sector, b"!" * (count * SECTOR))[:2] == (VIRTIO_BLK_S_IOERR, 1)
    assert rig.content() == before


@pytest.mark.parametrize("size", [1, 511, 513, 1023])
def test_what_is_not_whole_sectors_is_an_error(rig: Rig, size: int) -> None:
    before = rig.content()
    assert rig.read(0, size) == (VIRTIO_BLK_S_IOERR, 1, b"\xdd" * size)
    assert rig.write(0, b"!" * size)[0] == VIRTIO_BLK_S_IOERR
    assert rig.content() == before


def test_a_last_piece_of_less_than_a_sector_is_no_part_of_the_disk(disk: int) -> None:
    os.pwrite(disk, b"tail", DISK_SECTORS * SECTOR)
    rig = Rig(disk, size=DISK_SECTORS * SECTOR + 4)
    assert rig.read(DISK_SECTORS, SECTOR)[0] == VIRTIO_BLK_S_IOERR
    assert rig.write(DISK_SECTORS, b"!" * SECTOR)[0] == VIRTIO_BLK_S_IOERR
    assert rig.content().endswith(b"tail")
    rig.close()


# Other requests


@pytest.mark.parametrize("kind", [VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_FLUSH | VIRTIO_BLK_T_OUT])
def test_a_flush_is_answered_after_fdatasync(rig: Rig, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    calls = record_calls(monkeypatch, rig)
    assert rig.request(kind)[:2] == (VIRTIO_BLK_S_OK, 1)
    assert calls == ["fdatasync"]


def test_a_barrier_write_comes_after_all_earlier_data_and_is_safe_when_answered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch, rig)
    kind = VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_BARRIER
    assert rig.request(kind, 0, out=[b"b" * SECTOR])[:2] == (VIRTIO_BLK_S_OK, 1)
    assert calls == ["fdatasync", "pwritev", "fdatasync"]
    assert rig.content()[:SECTOR] == b"b" * SECTOR


def test_a_barrier_read_comes_after_all_earlier_data(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch, rig)
    kind = VIRTIO_BLK_T_IN | VIRTIO_BLK_T_BARRIER
    assert rig.request(kind, 7, into=[SECTOR]) == (VIRTIO_BLK_S_OK, SECTOR + 1, sectors(7))
    assert calls == ["fdatasync"]


def test_the_writes_of_a_driver_that_can_ask_for_no_flush_are_each_safe(
    disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(disk, features=1 << VIRTIO_RING_F_INDIRECT_DESC)
    calls = record_calls(monkeypatch, rig)
    assert rig.write(0, b"w" * SECTOR)[0] == VIRTIO_BLK_S_OK
    assert calls == ["pwritev", "fdatasync"]
    rig.close()


@pytest.mark.parametrize("feature", [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_BARRIER])
def test_the_writes_of_a_driver_that_can_ask_are_not_synced_unasked(
    disk: int, monkeypatch: pytest.MonkeyPatch, feature: int
) -> None:
    rig = Rig(disk, features=1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << feature)
    calls = record_calls(monkeypatch, rig)
    assert rig.write(0, b"w" * SECTOR)[0] == VIRTIO_BLK_S_OK
    assert calls == ["pwritev"]
    rig.close()


def record_calls(monkeypatch: pytest.MonkeyPatch, rig: Rig) -> list[str]:
    """The order of writes and syncs from now on; both still happen, and neither is after the answer."""
    calls: list[str] = []

    def recorded(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def function(*arguments: object) -> object:
            assert rig.driver.queues[0].used_index() == rig.driver.queues[0].next_used, "it was answered already"
            calls.append(name)
            return call(*arguments)

        return function

    monkeypatch.setattr(os, "fdatasync", recorded("fdatasync", os.fdatasync))
    monkeypatch.setattr("workers.block.pwritev", recorded("pwritev", os.pwritev))
    return calls


@pytest.mark.parametrize(
    ("serial", "sizes", "answer"),
    [
        ("ABC123", [20], b"ABC123".ljust(20, b"\0")),
        ("x" * 20, [20], b"x" * 20),
        ("twenty characters and more", [20], b"twenty characters an"),
        ("in pieces", [4, 16], b"in pieces".ljust(20, b"\0")),
        ("short", [3], b"sho"),
        ("long buffer", [24], b"long buffer".ljust(20, b"\0") + b"\xdd" * 4),
        ("", [20], bytes(20)),
    ],
)
def test_get_id_gives_the_serial(disk: int, serial: str, sizes: list[int], answer: bytes) -> None:
    rig = Rig(disk, serial=serial)
    written = min(20, sum(sizes)) + 1
    assert rig.request(VIRTIO_BLK_T_GET_ID, into=sizes) == (VIRTIO_BLK_S_OK, written, answer)
    rig.close()


def test_scsi_commands_are_unsupported_and_that_is_said_once(rig: Rig) -> None:
    for _ in range(3):
        # A SCSI request has its command and sense data where others have data.
        answer = rig.request(VIRTIO_BLK_T_SCSI_CMD, out=[bytes(6)], into=[96, 16])
        assert answer[:2] == (VIRTIO_BLK_S_UNSUPP, 1)
    assert rig.request(VIRTIO_BLK_T_SCSI_CMD | VIRTIO_BLK_T_OUT, out=[bytes(6)])[0] == VIRTIO_BLK_S_UNSUPP
    assert rig.said == ["vda: Scsi commands unsupported"]


@pytest.mark.parametrize("kind", [6, 9, 11, 12, 13, 0x10, 0x100, 0x40000000, 0x7FFFFFFF])
def test_requests_of_unknown_kind_are_unsupported_and_change_nothing(rig: Rig, kind: int) -> None:
    before = rig.content()
    assert rig.request(kind, 0, out=[b"!" * SECTOR], into=[SECTOR]) == (VIRTIO_BLK_S_UNSUPP, 1, b"\xdd" * SECTOR)
    assert rig.content() == before


# What is no request


@pytest.mark.parametrize(
    ("out", "into", "sentence"),
    [
        ([16], [], "Bad virtblk cmd 7 out=1 in=0"),
        ([], [1], "Bad virtblk cmd 7 out=0 in=1"),
        ([15], [1], "Bad iovec size 15 for the header of a virtblk cmd, it is 16"),
        ([17], [1], "Bad iovec size 17 for the header of a virtblk cmd, it is 16"),
        ([0, 16], [1], "Bad iovec size 0 for the header of a virtblk cmd, it is 16"),
        ([16], [512, 2], "Bad iovec size 2 for the status of a virtblk cmd, it is 1"),
        ([16], [1, 0], "Bad iovec size 0 for the status of a virtblk cmd, it is 1"),
    ],
)
def test_a_request_without_header_or_status_is_fatal(rig: Rig, out: list[int], into: list[int], sentence: str) -> None:
    good = struct.pack("<IIQ", VIRTIO_BLK_T_FLUSH, 0, 0)
    rig.driver.queues[0].free = [7, 8, 9]
    buffers = [rig.driver.buffer(good.ljust(size, b"\0")[:size]) for size in out]
    rig.driver.queues[0].add([*buffers, *(rig.driver.buffer(size, writable=True) for size in into)])
    with pytest.raises(RingError) as caught:
        rig.block.serve()
    assert str(caught.value) == f"vda: queue 0: descriptor 7: {sentence}"
    assert rig.driver.queues[0].collect() == []


# When the file fails


def test_a_read_only_disk_refuses_writes_and_reads_all_the_same(disk: int) -> None:
    rig = Rig(disk, read_only=True)
    before = rig.content()
    assert rig.write(0, b"!" * SECTOR)[:2] == (VIRTIO_BLK_S_IOERR, 1)
    assert rig.content() == before
    assert rig.read(4, SECTOR) == (VIRTIO_BLK_S_OK, SECTOR + 1, sectors(4))
    assert rig.request(VIRTIO_BLK_T_FLUSH)[0] == VIRTIO_BLK_S_OK
    assert rig.said == ["vda: write at sector 0: the disk is read-only"]
    rig.close()


def test_a_full_device_is_an_error_for_the_guest() -> None:
    with open("/dev/full", "r+b", buffering=0) as full:
        rig = Rig(full.fileno())
        assert rig.write(0, b"!" * SECTOR)[:2] == (VIRTIO_BLK_S_IOERR, 1)
        assert rig.said == ["vda: write at sector 0: No space left on device"]
        rig.close()


def test_a_descriptor_that_may_not_write_is_an_error_for_the_guest(disk: int) -> None:
    readable = os.open(f"/proc/self/fd/{disk}", os.O_RDONLY)
    rig = Rig(readable)
    assert rig.write(0, b"!" * SECTOR)[0] == VIRTIO_BLK_S_IOERR
    assert rig.read(0, SECTOR)[0] == VIRTIO_BLK_S_OK
    rig.close()
    os.close(readable)


def test_a_descriptor_that_may_not_read_is_an_error_for_the_guest(disk: int) -> None:
    writable = os.open(f"/proc/self/fd/{disk}", os.O_WRONLY)
    rig = Rig(writable)
    assert rig.read(0, SECTOR)[:2] == (VIRTIO_BLK_S_IOERR, 1)
    assert rig.write(0, b"!" * SECTOR)[0] == VIRTIO_BLK_S_OK
    rig.close()
    os.close(writable)


@pytest.mark.parametrize("left", [0, 10 * SECTOR, 10 * SECTOR + 100])
def test_a_file_that_became_shorter_is_an_error_where_it_is_missing(rig: Rig, disk: int, left: int) -> None:
    os.ftruncate(disk, left)
    status, written, _ = rig.read(9, 2 * SECTOR)
    assert (status, written) == (VIRTIO_BLK_S_IOERR, 1)
    assert rig.said == ["vda: read at sector 9: the file has become shorter than the disk"]


def test_a_write_that_the_system_cuts_short_is_an_error_for_the_guest(rig: Rig) -> None:
    """RLIMIT_FSIZE lets the first half through and refuses the rest with EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 * SECTOR, limits[1]))
    try:
        answer = rig.write(8, b"!" * (2 * SECTOR))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answer[:2] == (VIRTIO_BLK_S_IOERR, 1)
    assert rig.said == ["vda: write at sector 8: File too large"]


def test_a_flush_that_fails_is_an_error_for_the_guest() -> None:
    reader, writer = os.pipe()  # fdatasync refuses a pipe
    rig = Rig(writer)
    assert rig.request(VIRTIO_BLK_T_FLUSH)[:2] == (VIRTIO_BLK_S_IOERR, 1)
    assert rig.request(VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_BARRIER, out=[b"!" * SECTOR])[0] == VIRTIO_BLK_S_IOERR
    rig.close()
    os.close(reader)
    os.close(writer)


def test_a_failing_disk_does_not_flood_stderr(rig: Rig) -> None:
    for _ in range(100):
        rig.read(DISK_SECTORS, SECTOR)
    assert len(rig.said) == 1


def test_complaints_that_were_kept_are_counted() -> None:
    said: list[str] = []
    now = 0.0
    complain = Complaints(said.append, seconds=5.0, clock=lambda: now)
    for number in range(4):
        complain(f"no. {number}")
    now = 5.0
    complain("later")
    now = 10.0
    complain("much later")
    assert said == ["no. 0", "later (and 3 more such lines)", "much later"]


# Reset


def test_after_a_reset_the_disk_serves_a_new_driver(rig: Rig) -> None:
    rig.read(0, SECTOR)
    header = rig.driver.buffer(struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 0))
    rig.driver.queues[0].add([header, rig.driver.buffer(1, writable=True)])  # and it is never looked at
    rig.block.reset()
    rig.driver.reset()
    rig.block.accept(rig.features)
    assert rig.read(2, SECTOR) == (VIRTIO_BLK_S_OK, SECTOR + 1, sectors(2))


# Against a model

MODEL_SECTORS = 8
transfers = st.tuples(
    st.sampled_from([VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, 11]),
    st.booleans(),
    st.integers(0, MODEL_SECTORS + 1) | st.integers(0, (1 << 64) - 1),
    st.lists(st.integers(0, 1025) | st.sampled_from([512, 1024, 2048]), max_size=6),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(transfers, max_size=12))
def test_a_disk_is_as_good_as_an_array_of_bytes(script: list[tuple[int, bool, int, list[int], bool]]) -> None:
    """Any sequence of requests leaves the file as the same sequence leaves a bytearray, and reads what that holds."""
    with tempfile.TemporaryFile() as file:
        model = bytearray(os.urandom(MODEL_SECTORS * SECTOR))
        file.write(model)
        file.flush()
        rig = Rig(file.fileno(), size=len(model))
        for number, (kind, barrier, sector, sizes, indirect) in enumerate(script):
            size = sum(sizes)
            start = sector * SECTOR
            fits = size % SECTOR == 0 and start + size <= len(model)
            pieces = [bytes([number + 1]) * length for length in sizes]
            bits = VIRTIO_BLK_T_BARRIER if barrier else 0
            if kind == VIRTIO_BLK_T_OUT:
                status = rig.request(kind | bits, sector, out=pieces, indirect=indirect)[0]
                assert status == (VIRTIO_BLK_S_OK if fits else VIRTIO_BLK_S_IOERR)
                if fits:
                    model[start : start + size] = b"".join(pieces)
            elif kind == VIRTIO_BLK_T_IN:
                status, written, data = rig.request(kind | bits, sector, into=sizes, indirect=indirect)
                assert (status, written) == ((VIRTIO_BLK_S_OK, size + 1) if fits else (VIRTIO_BLK_S_IOERR, 1))
                assert data == (model[start : start + size] if fits else b"\xdd" * size)
            else:
                expected = VIRTIO_BLK_S_OK if kind == VIRTIO_BLK_T_FLUSH else VIRTIO_BLK_S_UNSUPP
                assert rig.request(kind, sector, out=pieces, indirect=indirect)[0] == expected
            assert rig.content() == model
        rig.close()


# Statistics


def test_bytes_and_errors_are_counted(rig: Rig) -> None:
    rig.write(0, bytes(SECTOR), bytes(2 * SECTOR))
    rig.read(0, SECTOR)
    assert rig.block.statistics[BYTES_OUT] == 3 * SECTOR
    assert rig.block.statistics[BYTES_IN] == 1 + SECTOR + 1  # and a status byte each
    assert rig.block.statistics[ERRORS] == 0
    rig.read(DISK_SECTORS, SECTOR)
    rig.request(VIRTIO_BLK_T_SCSI_CMD)
    assert rig.block.statistics[ERRORS] == 2
