"""The disk as a driver of virtio 1.0 and later has it: any framing, holes and zeros, several rings, whole batches."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgmp import holes
from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS
from lgmp.testing import ANY_LAYOUT_SHAPES, Buffer, Driver, Recorder, Used
from lgmp.virtio import block as virtio_block
from lgmp.virtio.block import (
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEG,
    MAX_WRITE_ZEROES_SECTORS,
    MAX_WRITE_ZEROES_SEG,
    SEG_MAX,
    SIZE_MAX,
    VIRTIO_BLK_F_BARRIER,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
)
from lgmp.virtio.ids import VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC
from lgmp.virtio.ring import RingError
from workers.block import Block
from workers.device import BATCH

SECTOR = 512
# Large enough for file systems with large blocks to have holes in it.
DISK_SECTORS = 2048
DISK_BYTES = DISK_SECTORS * SECTOR
TABLE = 3 << 20  # an indirect table, out of the way of the buffers
UNTOUCHED = 0xEE  # what a status byte is before the device has said anything
UNMAP = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
KINDS = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES)
LEGACY = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_RING_F_INDIRECT_DESC
MODERN = LEGACY | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES


@dataclass
class Rig:
    """A disk in this process and its driver, with as many rings as are wanted."""

    fd: int
    size: int = DISK_BYTES
    read_only: bool = False
    features: int = MODERN
    queues: int = 1
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.driver = Driver(queues=self.queues)
        self.recorder = Recorder()
        self.block = self.attached()

    def attached(self) -> Block:
        """A disk that goes on where the one before it stopped."""
        block = Block(self.fd, size=self.size, serial="disk.img", read_only=self.read_only, say=self.said.append)
        block.attach(self.driver.device_queues(), self.recorder)
        block.accept(self.features)
        return block

    def offer(
        self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, queue: int = 0
    ) -> tuple[int, Buffer, Buffer]:
        """Offer a request with its data in one segment; gives its head, where the data is and where the status."""
        header = self.driver.buffer(struct.pack("<IIQ", kind, 0, sector))
        data = self.driver.buffer(out) if out else self.driver.buffer(b"\xdd" * into)
        data = Buffer(data.address, data.size, not out)
        status = Buffer(self.driver.buffer(bytes([UNTOUCHED])).address, 1, True)
        head = self.driver.queues[queue].add([header, *([data] if data.size else []), status])
        return head, data, status

    def request(self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, queue: int = 0) -> tuple[int, bytes]:
        """One request; gives its status and what was read."""
        self.driver.forget()
        head, data, status = self.offer(kind, sector, out, into, queue)
        self.block.serve()
        (used,) = self.driver.queues[queue].collect()
        code = self.status(status)
        assert used == Used(head, into + 1 if code == VIRTIO_BLK_S_OK else 1)
        return code, self.driver.content(data)

    def clear(self, kind: int, *ranges: tuple[int, int, int]) -> int:
        """DISCARD or WRITE_ZEROES of ranges (sector, count, flags); gives its status."""
        return self.request(kind, out=b"".join(struct.pack("<QII", *one) for one in ranges))[0]

    def status(self, buffer: Buffer) -> int:
        return self.driver.content(buffer)[0]

    def content(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)

    def close(self) -> None:
        self.driver.close()


CONTENT = b"".join(struct.pack("<Q", number + 1) * (SECTOR // 8) for number in range(DISK_SECTORS))


@pytest.fixture(params=["file", "memory"])
def disk(request: pytest.FixtureRequest) -> Iterator[int]:
    """A file with every sector different from the others and none zero: on disk, and in memory (without ZERO_RANGE)."""
    if request.param == "file":
        with tempfile.TemporaryFile() as file:
            os.pwrite(file.fileno(), CONTENT, 0)
            os.fsync(file.fileno())
            yield file.fileno()
    else:
        fd = os.memfd_create("disk")
        os.pwrite(fd, CONTENT, 0)
        yield fd
        os.close(fd)


@pytest.fixture
def rig(disk: int) -> Iterator[Rig]:
    rig = Rig(disk)
    yield rig
    rig.close()


def zeroed(*ranges: tuple[int, int]) -> bytes:
    """What the disk holds with zeros in these ranges (sector, count)."""
    content = bytearray(CONTENT)
    for sector, count in ranges:
        content[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
    return bytes(content)


def is_hole(fd: int, sector: int, count: int) -> bool:
    """Whether the file has a hole there."""
    try:
        return os.lseek(fd, sector * SECTOR, os.SEEK_DATA) >= (sector + count) * SECTOR
    except OSError as error:
        return error.errno == errno.ENXIO  # a hole to the end


# What a back end puts on the bus


def test_a_modern_driver_is_offered_all_that_its_disk_can_do() -> None:
    always = (
        *(VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH),
        *(VIRTIO_BLK_F_TOPOLOGY, VIRTIO_RING_F_INDIRECT_DESC),
    )
    bits = sum(1 << bit for bit in always)
    writable = bits | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    offered = virtio_block.modern_features
    assert offered(read_only=False, queues=1, can_discard=False) == writable
    assert offered(read_only=False, queues=1, can_discard=True) == writable | 1 << VIRTIO_BLK_F_DISCARD
    assert offered(read_only=True, queues=1, can_discard=True) == bits | 1 << VIRTIO_BLK_F_RO
    assert offered(read_only=True, queues=4, can_discard=False) == bits | 1 << VIRTIO_BLK_F_RO | 1 << VIRTIO_BLK_F_MQ
    assert not offered(read_only=False, queues=4, can_discard=True) >> VIRTIO_BLK_F_BARRIER & 1


@pytest.mark.parametrize(("block_size", "exponent", "minimum"), [(512, 3, 8), (4096, 0, 1), (2048, 1, 2), (8192, 0, 1)])
def test_the_modern_config_space_is_that_of_the_kernels_header(block_size: int, exponent: int, minimum: int) -> None:
    space = virtio_block.modern_config_space(0x123456789A, queues=3, block_size=block_size, can_discard=True)
    assert len(space) == 60
    assert struct.unpack_from("<QII", space) == (0x123456789A, SIZE_MAX, SEG_MAX)
    assert space[16:20] == bytes(4)
    assert struct.unpack_from("<IBBHI", space, 20) == (block_size, exponent, 0, minimum, 0)
    assert struct.unpack_from("<BxH", space, 32) == (1, 3)
    alignment = max(block_size, 4096) // SECTOR
    assert struct.unpack_from("<III", space, 36) == (MAX_DISCARD_SECTORS, MAX_DISCARD_SEG, alignment)
    assert struct.unpack_from("<IIB", space, 48) == (MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SEG, 1)
    assert space[57:] == bytes(3)


def test_a_disk_that_has_no_holes_says_nothing_of_discards() -> None:
    space = virtio_block.modern_config_space(100, queues=1, block_size=512, can_discard=False)
    assert space[36:48] == bytes(12)
    assert struct.unpack_from("<IIB", space, 48) == (MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SEG, 0)


def test_the_largest_request_that_may_be_is_one_system_call() -> None:
    assert SEG_MAX * SIZE_MAX <= 0x7FFFF000  # MAX_RW_COUNT of the kernel


def test_seabios_which_multiplies_in_16_bits_finds_room_for_a_cluster_in_a_request() -> None:
    assert SEG_MAX * SIZE_MAX & 0xFFFF >= 4096


# Framing


def cut(buffer: Buffer, places: Sequence[int]) -> list[Buffer]:
    """A piece of memory as several segments, that begin at `places`."""
    ends = sorted({min(place, buffer.size) for place in [*places, buffer.size]})
    pairs = zip([0, *ends[:-1]], ends, strict=True)
    return [Buffer(buffer.address + start, end - start, buffer.writable) for start, end in pairs]


def framed(rig: Rig, kind: int, sector: int, data: bytes, room: int, places: Sequence[int]) -> tuple[Used, bytes, int]:
    """A request whose parts are cut at `places`, whatever belongs to what; gives its answer, data read and status."""
    rig.driver.forget()
    out = rig.driver.buffer(struct.pack("<IIQ", kind, 0, sector) + data)
    into = rig.driver.buffer(b"\xdd" * room + bytes([UNTOUCHED]))
    segments = [*cut(out, places), *cut(Buffer(into.address, into.size, True), places)]
    rig.driver.queues[0].add(segments, TABLE)
    rig.block.serve()
    (used,) = rig.driver.queues[0].collect()
    answer = rig.driver.content(into)
    return Used(0, used.written), answer[:-1], answer[-1]


@pytest.mark.parametrize("feature", [VIRTIO_F_VERSION_1, VIRTIO_F_ANY_LAYOUT])
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_FLUSH, 99]),
    sector=st.integers(0, 9),
    count=st.integers(0, 3),
    odd=st.integers(0, 1),
    places=st.lists(
        st.integers(0, 1600) | st.sampled_from([0, 15, 16, 17, 511, 512, 513, 528, 1024, 1040]), max_size=9
    ),
)
def test_where_segments_begin_and_end_is_nothing_to_a_modern_disk(
    feature: int, kind: int, sector: int, count: int, odd: int, places: list[int]
) -> None:
    """Any cut of the same bytes has the answer of header, data and status by themselves."""
    answers = []
    for cuts in ([16, count * SECTOR + odd], places, []):
        with tempfile.TemporaryFile() as file:
            os.pwrite(file.fileno(), CONTENT[: 8 * SECTOR], 0)
            rig = Rig(file.fileno(), size=8 * SECTOR, features=LEGACY | 1 << feature)
            size = count * SECTOR + odd
            writes = kind == VIRTIO_BLK_T_OUT
            answer = framed(rig, kind, sector, b"w" * size if writes else b"", 0 if writes else size, cuts)
            answers.append((answer, rig.content(), rig.block.statistics[ERRORS]))
            rig.close()
    assert answers[1:] == answers[:1] * 2
    assert answers[0][0][2] != UNTOUCHED


@pytest.mark.parametrize("shape", ANY_LAYOUT_SHAPES)
def test_requests_of_every_shape_are_answered(rig: Rig, shape: str) -> None:
    written = ANY_LAYOUT_SHAPES[shape](rig.driver, struct.pack("<IIQ", VIRTIO_BLK_T_OUT, 0, 3), b"w" * SECTOR, 1)
    read = ANY_LAYOUT_SHAPES[shape](rig.driver, struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 3), 2 * SECTOR, 1)
    rig.block.serve()
    assert rig.driver.queues[0].collect() == [Used(written.head, 1), Used(read.head, 2 * SECTOR + 1)]
    assert written.answer == b"\0"
    assert read.answer == b"w" * SECTOR + CONTENT[4 * SECTOR : 5 * SECTOR] + b"\0"


@pytest.mark.parametrize(
    ("out", "into", "sentence"),
    [
        ([15], [1], "15 bytes for the header of a virtblk cmd, it is 16"),
        ([0, 7, 0, 8], [1], "15 bytes for the header of a virtblk cmd, it is 16"),
        ([16], [0, 0], "0 bytes for the status of a virtblk cmd, it is 1"),
        ([16], [], "Bad virtblk cmd 7 out=1 in=0"),
        ([], [1], "Bad virtblk cmd 7 out=0 in=1"),
    ],
)
def test_a_request_without_room_for_header_or_status_is_fatal(
    rig: Rig, out: list[int], into: list[int], sentence: str
) -> None:
    rig.driver.queues[0].free = [7, 8, 9, 10, 11, 12]
    rig.driver.queues[0].add(
        [rig.driver.buffer(size) for size in out] + [rig.driver.buffer(size, True) for size in into]
    )
    with pytest.raises(RingError) as caught:
        rig.block.serve()
    assert str(caught.value) == f"vda: queue 0: descriptor 7: {sentence}"
    assert rig.driver.queues[0].collect() == []


# Holes and zeros


def test_a_discard_makes_a_hole(rig: Rig, disk: int) -> None:
    before = os.fstat(disk).st_blocks
    assert rig.clear(VIRTIO_BLK_T_DISCARD, (512, 1024, 0)) == VIRTIO_BLK_S_OK
    assert is_hole(disk, 512, 1024)
    assert before - os.fstat(disk).st_blocks >= 1024
    assert rig.content() == zeroed((512, 1024))


def test_zeros_that_may_be_a_hole_are_one(rig: Rig, disk: int) -> None:
    assert rig.clear(VIRTIO_BLK_T_WRITE_ZEROES, (512, 1024, UNMAP)) == VIRTIO_BLK_S_OK
    assert is_hole(disk, 512, 1024)
    assert rig.content() == zeroed((512, 1024))


def test_zeros_that_may_be_no_hole_keep_their_place(rig: Rig, disk: int) -> None:
    before = os.fstat(disk).st_blocks
    assert rig.clear(VIRTIO_BLK_T_WRITE_ZEROES, (512, 1024, 0)) == VIRTIO_BLK_S_OK
    assert os.fstat(disk).st_blocks >= before
    assert rig.content() == zeroed((512, 1024))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", [[(0, 1)], [(2047, 1)], [(3, 2)], [(0, 2048)], [(1, 7), (100, 900)], [(5, 0)]])
def test_all_ranges_are_cleared_and_nothing_else(rig: Rig, kind: int, ranges: list[tuple[int, int]]) -> None:
    assert rig.clear(kind, *((*one, 0) for one in ranges)) == VIRTIO_BLK_S_OK
    assert rig.content() == zeroed(*ranges)


@pytest.mark.parametrize(
    ("kind", "most", "sectors"),
    [
        (VIRTIO_BLK_T_DISCARD, MAX_DISCARD_SEG, MAX_DISCARD_SECTORS),
        (VIRTIO_BLK_T_WRITE_ZEROES, MAX_WRITE_ZEROES_SEG, MAX_WRITE_ZEROES_SECTORS),
    ],
)
def test_as_much_at_once_as_was_offered_and_no_more(kind: int, most: int, sectors: int) -> None:
    fd = os.memfd_create("disk")
    os.ftruncate(fd, (sectors + 1) * SECTOR)
    os.pwrite(fd, CONTENT, 0)
    rig = Rig(fd, size=(sectors + 1) * SECTOR)
    flags = UNMAP if kind == VIRTIO_BLK_T_WRITE_ZEROES else 0  # or it is all written
    assert rig.clear(kind, *[(0, 1, 0)] * (most + 1)) == VIRTIO_BLK_S_IOERR
    assert rig.clear(kind, (0, sectors + 1, flags)) == VIRTIO_BLK_S_IOERR
    assert os.pread(fd, DISK_BYTES, 0) == CONTENT
    assert rig.clear(kind, *((number, 1, 0) for number in range(most))) == VIRTIO_BLK_S_OK
    assert os.pread(fd, DISK_BYTES, 0) == zeroed((0, most))
    assert rig.clear(kind, (0, sectors, flags)) == VIRTIO_BLK_S_OK
    assert is_hole(fd, 0, sectors)
    assert rig.block.statistics[ERRORS] == 2
    rig.close()
    os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [(2048, 1), (2047, 2), (2049, 0), (1 << 55, 1), ((1 << 64) - 1, 1)])
def test_nothing_is_cleared_where_one_range_is_beyond_the_end(rig: Rig, kind: int, bad: tuple[int, int]) -> None:
    assert rig.clear(kind, (0, 8, 0), (*bad, 0)) == VIRTIO_BLK_S_IOERR
    assert rig.content() == CONTENT
    assert len(rig.said) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 15, 17, 31])
def test_ranges_that_are_not_whole_are_an_error(rig: Rig, kind: int, size: int) -> None:
    assert rig.request(kind, out=struct.pack("<QIIQII", 0, 8, 0, 8, 8, 0)[:size])[0] == VIRTIO_BLK_S_IOERR
    assert rig.content() == CONTENT
    ranges = MAX_DISCARD_SEG if kind == VIRTIO_BLK_T_DISCARD else MAX_WRITE_ZEROES_SEG
    name = "discard" if kind == VIRTIO_BLK_T_DISCARD else "write of zeros"
    assert rig.said == [f"vda: {name} at sector 0: {size} bytes are not 1 to {ranges} ranges of 16 bytes"]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [(VIRTIO_BLK_T_DISCARD, UNMAP), (VIRTIO_BLK_T_DISCARD, 2), (VIRTIO_BLK_T_WRITE_ZEROES, 2), (13, 1 << 31 | 1)],
)
def test_flags_that_nobody_knows_are_unsupported(rig: Rig, kind: int, flags: int) -> None:
    assert rig.clear(kind, (0, 8, 0), (8, 8, flags)) == VIRTIO_BLK_S_UNSUPP
    assert rig.content() == CONTENT


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_disk_is_not_cleared(disk: int, kind: int) -> None:
    rig = Rig(disk, read_only=True)
    assert rig.clear(kind, (0, 8, 0)) == VIRTIO_BLK_S_IOERR
    assert rig.content() == CONTENT
    rig.close()


@pytest.mark.parametrize(
    ("kind", "feature"),
    [(VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_F_DISCARD), (VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_F_WRITE_ZEROES)],
)
def test_who_did_not_accept_it_may_not_ask_for_it(disk: int, kind: int, feature: int) -> None:
    rig = Rig(disk, features=MODERN & ~(1 << feature))
    assert rig.clear(kind, (0, 8, 0)) == VIRTIO_BLK_S_UNSUPP
    assert rig.content() == CONTENT
    rig.block.accept(MODERN)
    assert rig.clear(kind, (0, 8, 0)) == VIRTIO_BLK_S_OK
    assert rig.content() == zeroed((0, 8))
    rig.close()


def refuse(number: int) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("flags", [0, UNMAP])
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL])
def test_zeros_are_written_in_pieces_where_the_file_system_cannot_make_them(
    monkeypatch: pytest.MonkeyPatch, flags: int, number: int
) -> None:
    sectors = 5 * 2048 + 7
    fd = os.memfd_create("disk")
    os.pwrite(fd, b"x" * ((sectors + 1) * SECTOR), 0)
    rig = Rig(fd, size=(sectors + 1) * SECTOR)
    monkeypatch.setattr(holes, "punch", refuse(number))
    monkeypatch.setattr(holes, "zero", refuse(number))
    sizes: list[int] = []

    def pwritev(fd: int, out: Sequence[memoryview], at: int) -> int:
        sizes.append(sum(map(len, out)))
        return os.pwritev(fd, [out[0][: 700 * SECTOR]], at)  # which may always write less

    monkeypatch.setattr("workers.block.pwritev", pwritev)
    assert rig.clear(VIRTIO_BLK_T_WRITE_ZEROES, (0, sectors, flags)) == VIRTIO_BLK_S_OK
    assert rig.content() == bytes(sectors * SECTOR) + b"x" * SECTOR
    assert max(sizes) <= 1 << 20
    rig.close()
    os.close(fd)


@pytest.mark.parametrize(("kind", "function"), [(VIRTIO_BLK_T_DISCARD, "discard"), (VIRTIO_BLK_T_WRITE_ZEROES, "zero")])
def test_a_file_system_that_fails_to_clear_is_an_error_for_the_guest(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, kind: int, function: str
) -> None:
    monkeypatch.setattr(holes, function, refuse(errno.ENOSPC))
    assert rig.clear(kind, (0, 8, 0)) == VIRTIO_BLK_S_IOERR
    assert rig.said[0].endswith("at sector 0: No space left on device")
    assert rig.content() == CONTENT


def test_a_discard_that_there_is_not_is_unsupported(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holes, "discard", refuse(errno.EOPNOTSUPP))
    assert rig.clear(VIRTIO_BLK_T_DISCARD, (0, 8, 0)) == VIRTIO_BLK_S_UNSUPP


@pytest.mark.parametrize("kind", KINDS)
def test_who_cannot_flush_has_it_safe_when_it_is_answered(
    disk: int, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    rig = Rig(disk, features=MODERN & ~(1 << VIRTIO_BLK_F_FLUSH))
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.pread(fd, DISK_BYTES, 0)))
    assert rig.clear(kind, (0, 8, 0)) == VIRTIO_BLK_S_OK
    assert synced == [zeroed((0, 8))]
    rig.close()


# The file under it


def test_whether_a_file_can_have_holes_is_found_out_without_a_change(disk: int) -> None:
    before = os.fstat(disk)
    assert holes.can_punch(disk)
    after = os.fstat(disk)
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
    assert os.pread(disk, DISK_BYTES + 1, 0) == CONTENT


def test_what_cannot_be_written_or_is_no_file_can_have_no_holes(disk: int) -> None:
    readable = os.open(f"/proc/self/fd/{disk}", os.O_RDONLY)
    assert not holes.can_punch(readable)
    os.close(readable)
    reader, writer = os.pipe()
    assert not holes.can_punch(writer)
    os.close(reader)
    os.close(writer)


def test_a_hole_can_be_beyond_four_gibibytes() -> None:
    """Where a C long is 32 bits, too."""
    start = (5 << 30) + 4096
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 6 << 30)
    for offset in (start & 0xFFFFFFFF, start):
        os.pwrite(fd, b"x" * (256 << 10), offset)
    holes.discard(fd, start, 256 << 10)
    assert os.pread(fd, 256 << 10, start & 0xFFFFFFFF) == b"x" * (256 << 10)
    assert os.pread(fd, 256 << 10, start) == bytes(256 << 10)
    assert is_hole(fd, start // SECTOR, 512)
    assert os.fstat(fd).st_size == 6 << 30
    os.close(fd)


def test_a_file_is_transferred_by_sectors_of_512_bytes(disk: int) -> None:
    assert holes.logical_block_size(disk) == SECTOR


@contextlib.contextmanager
def loop_device(image: Path, block_size: int) -> Iterator[int]:
    """A block device that is that file, open for reading and writing."""
    command = ["losetup", "--find", "--show", "--sector-size", str(block_size), str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        fd = os.open(device, os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a loop device")
@pytest.mark.parametrize("block_size", [512, 4096])
def test_a_block_device_is_cleared_as_a_file_is(tmp_path: Path, block_size: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(CONTENT)
    with loop_device(image, block_size) as fd:
        assert holes.logical_block_size(fd) == block_size
        assert holes.can_punch(fd)
        rig = Rig(fd)
        assert rig.clear(VIRTIO_BLK_T_DISCARD, (256, 256, 0), (512, 256, 0)) == VIRTIO_BLK_S_OK
        assert rig.clear(VIRTIO_BLK_T_WRITE_ZEROES, (1024, 256, 0), (1536, 256, UNMAP)) == VIRTIO_BLK_S_OK
        assert rig.clear(VIRTIO_BLK_T_WRITE_ZEROES, (3, 2, 0), (9, 1, UNMAP)) == VIRTIO_BLK_S_OK  # less than a block
        assert (
            rig.request(VIRTIO_BLK_T_IN, 1020, into=8 * SECTOR)[1] == zeroed((1024, 256))[1020 * SECTOR : 1028 * SECTOR]
        )
        assert rig.request(VIRTIO_BLK_T_FLUSH)[0] == VIRTIO_BLK_S_OK
        assert rig.said == []
        assert os.pread(fd, DISK_BYTES, 0) == zeroed((256, 512), (1024, 256), (1536, 256), (3, 2), (9, 1))
        rig.close()
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        assert not holes.can_punch(readable)
        os.close(readable)
    with open(image, "rb") as file:
        assert is_hole(file.fileno(), 256, 512)
        assert is_hole(file.fileno(), 1536, 256)


# Several rings


def test_every_ring_is_served_and_the_driver_told_of_each(disk: int) -> None:
    rig = Rig(disk, queues=3)
    heads = [rig.offer(VIRTIO_BLK_T_IN, number, into=SECTOR, queue=number) for number in range(3)]
    assert not rig.block.serve()
    for number, (head, data, status) in enumerate(heads):
        assert rig.driver.queues[number].collect() == [Used(head, SECTOR + 1)]
        assert rig.driver.content(data) == CONTENT[number * SECTOR :][:SECTOR]
        assert rig.status(status) == VIRTIO_BLK_S_OK
    assert rig.recorder.used_queues == [0, 1, 2]
    rig.close()


def test_a_full_ring_does_not_keep_the_others_waiting(disk: int) -> None:
    rig = Rig(disk, queues=2)
    header, data = rig.driver.buffer(struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, 0)), rig.driver.buffer(SECTOR, True)
    status, table = rig.driver.buffer(1, True), rig.driver.buffer(16 * 3)
    for _ in range(2 * BATCH + 1):
        rig.driver.queues[0].add([header, data, status], table.address)
    head, _, _ = rig.offer(VIRTIO_BLK_T_IN, 1, into=SECTOR, queue=1)
    assert rig.block.serve()
    assert rig.driver.queues[1].collect() == [Used(head, SECTOR + 1)]
    assert len(rig.driver.queues[0].collect()) == 2 * BATCH
    assert not rig.block.serve()
    assert len(rig.driver.queues[0].collect()) == 1
    rig.close()


def test_a_flush_is_for_what_was_answered_on_any_ring(disk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(disk, queues=2)
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.pread(fd, SECTOR, 0)))
    assert rig.request(VIRTIO_BLK_T_OUT, 0, b"w" * SECTOR, queue=1)[0] == VIRTIO_BLK_S_OK
    assert synced == []
    assert rig.request(VIRTIO_BLK_T_FLUSH, queue=0)[0] == VIRTIO_BLK_S_OK
    assert synced == [b"w" * SECTOR]
    rig.close()


def test_rings_may_be_replaced_while_the_disk_is_suspended(disk: int) -> None:
    rig = Rig(disk, queues=2)
    assert rig.request(VIRTIO_BLK_T_IN, 1, into=SECTOR, queue=1)[0] == VIRTIO_BLK_S_OK
    rig.block.suspend()
    rig.block.queues = rig.driver.device_queues()
    rig.block.accept(MODERN)
    rig.block.resume()
    assert rig.request(VIRTIO_BLK_T_IN, 2, into=SECTOR, queue=1) == (VIRTIO_BLK_S_OK, CONTENT[2 * SECTOR :][:SECTOR])
    rig.close()


# Neighbours


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is done to the disk from now on: the call, the sector where it begins, and the number of sectors."""
    calls: list[tuple[str, int, int]] = []

    def recorded(name: str, call: Callable[[int, Sequence[memoryview], int], int]) -> Callable[..., int]:
        def function(fd: int, segments: Sequence[memoryview], at: int) -> int:
            calls.append((name, at // SECTOR, sum(map(len, segments)) // SECTOR))
            return call(fd, segments, at)

        return function

    monkeypatch.setattr("workers.block.pwritev", recorded("write", os.pwritev))
    monkeypatch.setattr("workers.block.preadv", recorded("read", os.preadv))
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append(("sync", 0, 0)))
    return calls


def test_writes_that_follow_each_other_are_one_call(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    offered = [rig.offer(VIRTIO_BLK_T_OUT, 8 * number, bytes([number + 1]) * 4096) for number in range(5)]
    assert not rig.block.serve()
    assert calls == [("write", 0, 40)]
    assert rig.driver.queues[0].collect() == [Used(head, 1) for head, _, _ in offered]
    assert [rig.status(status) for _, _, status in offered] == [VIRTIO_BLK_S_OK] * 5
    assert rig.content()[: 6 * 4096] == b"".join(bytes([n + 1]) * 4096 for n in range(5)) + CONTENT[5 * 4096 : 6 * 4096]
    assert rig.block.statistics[BYTES_OUT] == 5 * 4096
    assert rig.block.statistics[BYTES_IN] == 5


def test_nothing_overtakes_what_was_asked_before_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    heads = [
        rig.offer(VIRTIO_BLK_T_OUT, 0, b"a" * SECTOR)[0],
        rig.offer(VIRTIO_BLK_T_OUT, 1, b"b" * SECTOR)[0],
        rig.offer(VIRTIO_BLK_T_FLUSH)[0],
        rig.offer(VIRTIO_BLK_T_OUT, 2, b"c" * SECTOR)[0],
        rig.offer(VIRTIO_BLK_T_IN, 3, into=SECTOR)[0],
        rig.offer(VIRTIO_BLK_T_OUT, 3, b"d" * SECTOR)[0],
        rig.offer(VIRTIO_BLK_T_OUT, 3, b"e" * SECTOR)[0],
        rig.offer(VIRTIO_BLK_T_OUT, 2, b"f" * SECTOR)[0],
        rig.offer(VIRTIO_BLK_T_IN, 2, into=SECTOR)[0],
    ]
    assert not rig.block.serve()
    assert calls == [
        *(("write", 0, 2), ("sync", 0, 0), ("write", 2, 1), ("read", 3, 1)),
        *(("write", 3, 1), ("write", 3, 1), ("write", 2, 1), ("read", 2, 1)),
    ]
    assert [used.head for used in rig.driver.queues[0].collect()] == heads
    assert rig.content()[: 5 * SECTOR] == b"".join(c * SECTOR for c in (b"a", b"b", b"f", b"e")) + CONTENT[2048:2560]


def test_what_is_large_waits_for_nobody(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    for number in range(3):
        rig.offer(VIRTIO_BLK_T_OUT, 256 * number, b"x" * (128 << 10))
    for number in range(3):
        rig.offer(VIRTIO_BLK_T_OUT, 1024 + 80 * number, b"y" * (40 << 10))
    assert not rig.block.serve()
    assert calls == [("write", 256 * n, 256) for n in range(3)] + [("write", 1024 + 80 * n, 80) for n in range(3)]


def test_a_failure_among_neighbours_is_that_of_one_request(rig: Rig) -> None:
    """RLIMIT_FSIZE ends in the third of five: the first two are written, the others refused with EFBIG."""
    offered = [rig.offer(VIRTIO_BLK_T_OUT, 2 * number, b"!" * (2 * SECTOR)) for number in range(5)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * SECTOR, limits[1]))
    try:
        assert not rig.block.serve()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    codes = [rig.status(status) for _, _, status in offered]
    assert codes == [VIRTIO_BLK_S_OK] * 2 + [VIRTIO_BLK_S_IOERR] * 3
    assert rig.driver.queues[0].collect() == [Used(head, 1) for head, _, _ in offered]
    assert rig.said == ["vda: write at sector 4: File too large"]
    assert rig.content()[: 4 * SECTOR] == b"!" * (4 * SECTOR)
    assert rig.content()[5 * SECTOR :] == CONTENT[5 * SECTOR :]
    assert rig.block.statistics[ERRORS] == 3
    assert rig.block.statistics[BYTES_OUT] == 4 * SECTOR


def test_what_comes_before_a_broken_rule_is_answered(rig: Rig) -> None:
    offered = [rig.offer(VIRTIO_BLK_T_OUT, number, b"w" * SECTOR) for number in range(2)]
    rig.driver.queues[0].offer(rig.driver.layouts[0].num)  # no ring has that descriptor
    with pytest.raises(RingError, match="Guest says index 128 is available"):
        rig.block.serve()
    assert rig.driver.queues[0].collect() == [Used(head, 1) for head, _, _ in offered]
    assert rig.content()[: 3 * SECTOR] == b"w" * (2 * SECTOR) + CONTENT[2 * SECTOR : 3 * SECTOR]


class Killed(BaseException):
    """Stands in for the death of the process."""


def test_neighbours_that_a_killed_process_held_are_done_by_its_successor(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = [rig.offer(VIRTIO_BLK_T_OUT, number, bytes([number + 65]) * SECTOR) for number in range(4)]
    offered.append(rig.offer(VIRTIO_BLK_T_FLUSH))

    def die(fd: int, segments: Sequence[memoryview], at: int) -> int:
        os.pwrite(fd, segments[0], at)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("workers.block.pwritev", die)
        with pytest.raises(Killed):
            rig.block.serve()
    assert rig.driver.queues[0].collect() == []
    rig.block = rig.attached()
    calls = record_calls(monkeypatch)
    assert not rig.block.serve()
    assert calls == [("write", 0, 4), ("sync", 0, 0)]
    assert rig.driver.queues[0].collect() == [Used(head, 1) for head, _, _ in offered]
    assert rig.content()[: 4 * SECTOR] == b"".join(bytes([number + 65]) * SECTOR for number in range(4))


# When the driver is told


@pytest.mark.parametrize(("features", "times"), [(MODERN, 2), (LEGACY, 1)])
@pytest.mark.parametrize("kind", [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT])
def test_a_modern_driver_need_not_wait_for_the_end_of_a_batch(disk: int, kind: int, features: int, times: int) -> None:
    rig = Rig(disk, features=features)
    size = 128 << 10
    for number in range(4):
        rig.offer(kind, 256 * number, b"w" * size if kind == VIRTIO_BLK_T_OUT else b"", size)
    assert not rig.block.serve()
    assert rig.recorder.used_queues == [0] * times
    rig.close()


@pytest.mark.parametrize("features", [MODERN, LEGACY])
@pytest.mark.parametrize("kind", [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, 99])
def test_the_driver_is_told_of_a_request_without_data_too(disk: int, kind: int, features: int) -> None:
    rig = Rig(disk, features=features)
    parts = [rig.driver.buffer(struct.pack("<IIQ", kind, 0, 0)), Buffer(0, 0, kind != VIRTIO_BLK_T_OUT)]
    head = rig.driver.queues[0].add([*parts, rig.driver.buffer(1, True)])
    assert not rig.block.serve()
    assert rig.driver.queues[0].collect() == [Used(head, 1)]
    assert rig.recorder.used_queues == [0]
    rig.close()


def test_a_modern_driver_is_told_twice_of_a_batch_whatever_its_shape(disk: int) -> None:
    rig = Rig(disk)
    for number in range(BATCH):
        header = rig.driver.buffer(struct.pack("<IIQ", VIRTIO_BLK_T_IN, 0, number))
        pieces = [rig.driver.buffer(SECTOR // 4, True) for _ in range(4)]
        table = rig.driver.buffer(16 * 6)
        rig.driver.queues[0].add([header, *pieces, rig.driver.buffer(1, True)], table.address)
    assert not rig.block.serve()
    assert rig.recorder.used_queues == [0, 0]
    assert rig.driver.queues[0].collect() == [Used(number, SECTOR + 1) for number in range(BATCH)]
    rig.close()


def test_a_driver_that_goes_on_meanwhile_is_told_of_half_of_what_it_has_in_flight(
    disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(disk)
    ring = rig.driver.queues[0]
    told: list[int] = []
    again = 0

    def go_on(_queue: int) -> None:
        """As a driver that needs until the next call to offer new requests for those that it was told of."""
        nonlocal again
        for _ in range(again):
            rig.offer(VIRTIO_BLK_T_IN, into=SECTOR)
        again = len(ring.collect())
        told.append(again)

    monkeypatch.setattr(rig.recorder, "used", go_on)
    for _ in range(BATCH):
        rig.offer(VIRTIO_BLK_T_IN, into=SECTOR)
    assert rig.block.serve()
    assert told == [BATCH // 2] * 4
    rig.close()


# Against a model

MODEL_SECTORS = 64
scripts = st.lists(
    st.tuples(
        st.sampled_from([VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, *KINDS]),
        st.integers(-1, MODEL_SECTORS),  # -1: where the one before it ends
        st.integers(1, 20),
    ),
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(scripts, st.booleans())
def test_batches_leave_the_disk_as_one_request_after_the_other_leaves_an_array(
    script: list[tuple[int, int, int]], modern: bool
) -> None:
    with tempfile.TemporaryFile() as file:
        model = bytearray(os.urandom(MODEL_SECTORS * SECTOR))
        os.pwrite(file.fileno(), model, 0)
        rig = Rig(file.fileno(), size=len(model), features=MODERN if modern else MODERN & ~(1 << VIRTIO_F_VERSION_1))
        expected = []
        end = 0
        for number, (kind, place, count) in enumerate(script):
            sector = end if place < 0 else place
            end = sector + count
            start, stop = sector * SECTOR, end * SECTOR
            data = b""
            code = VIRTIO_BLK_S_OK if stop <= len(model) or kind == VIRTIO_BLK_T_FLUSH else VIRTIO_BLK_S_IOERR
            read = b""
            if kind == VIRTIO_BLK_T_OUT:
                data = bytes([number]) * (count * SECTOR)
            elif kind in KINDS:
                data = struct.pack("<QII", sector, count, 0)
            into = count * SECTOR if kind == VIRTIO_BLK_T_IN else 0
            if kind == VIRTIO_BLK_T_IN:
                read = bytes(model[start:stop]) if code == VIRTIO_BLK_S_OK else b"\xdd" * into
            elif kind != VIRTIO_BLK_T_FLUSH and code == VIRTIO_BLK_S_OK:
                model[start:stop] = data if kind == VIRTIO_BLK_T_OUT else bytes(stop - start)
            head, buffer, status = rig.offer(kind, sector, data, into)
            written = into + 1 if code == VIRTIO_BLK_S_OK else 1
            expected.append((Used(head, written), buffer if into else None, read, status, code))
        assert not rig.block.serve()
        assert rig.driver.queues[0].collect() == [used for used, _, _, _, _ in expected]
        for _, room, read, status, code in expected:
            assert rig.status(status) == code
            assert room is None or rig.driver.content(room) == read
        assert rig.content() == model
        rig.close()
