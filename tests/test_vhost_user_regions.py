"""Guest memory in regions: what of it is where, what is no memory, and what cannot be any."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgmp.vhost_user.messages import ProtocolError, RegionDescription
from lgmp.vhost_user.regions import MAX_REGIONS, Regions
from lgmp.virtio.inflight import InflightRegion, inflight_bytes
from lgmp.virtio.ring import RingError, Virtqueue, VringLayout

PAGE = 4096
MakeFile = Callable[[int], int]


@pytest.fixture
def file() -> Iterator[MakeFile]:
    """`file(size)`: a memory file, each byte of which tells which page it is in."""
    with contextlib.ExitStack() as stack:

        def make(size: int) -> int:
            descriptor = os.memfd_create("test")
            stack.callback(os.close, descriptor)
            for at in range(0, size, PAGE):
                os.pwrite(descriptor, bytes([at // PAGE % 256]) * min(PAGE, size - at), at)
            os.ftruncate(descriptor, size)
            return descriptor

        yield make


def mapped(*table: tuple[int, int, int, int], files: Sequence[int], before: Regions | None = None) -> Regions:
    """`table`: guest address, size, front end's address, offset."""
    return (before or Regions()).map_table([RegionDescription(*one) for one in table], files)


def bytes_at(regions: Regions, address: int, size: int) -> bytes | None:
    pieces = regions.pieces(address, size)
    return None if pieces is None else b"".join(pieces)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:test")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Where things are


def test_each_region_is_at_its_offset_and_nothing_is_between(file: MakeFile) -> None:
    one = file(16 * PAGE)
    regions = mapped((0, 2 * PAGE, 0, 4 * PAGE), (8 * PAGE, PAGE, 8 * PAGE, 10 * PAGE), files=[one, one])
    assert bytes_at(regions, 0, 1) == b"\4"
    assert bytes_at(regions, PAGE - 1, 2) == b"\4\5"
    assert bytes_at(regions, 8 * PAGE, PAGE) == b"\12" * PAGE
    for address, size in ((2 * PAGE, 1), (2 * PAGE - 1, 2), (8 * PAGE - 1, 1), (8 * PAGE - 1, 2), (9 * PAGE, 1)):
        assert regions.pieces(address, size) is None
    for address in (0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1):
        assert regions.pieces(address, 1) is None
        assert regions.pieces(address, 0xFFFFFFFF) is None


def test_memory_goes_on_over_regions_that_adjoin_and_in_one_piece_in_none(file: MakeFile) -> None:
    files = [file(PAGE), file(2 * PAGE), file(PAGE)]
    regions = mapped(
        (0, PAGE, 0, 0), (PAGE, PAGE, PAGE, PAGE), (2 * PAGE, PAGE, 2 * PAGE, 0), files=[files[0], files[1], files[2]]
    )
    pieces = regions.pieces(PAGE - 1, PAGE + 2)
    assert pieces is not None
    assert [bytes(piece[:1]) for piece in pieces] == [b"\0", b"\1", b"\0"]
    assert [len(piece) for piece in pieces] == [1, PAGE, 1]
    assert regions.pieces(PAGE - 1, 2 * PAGE + 2) is None
    pieces[0][:] = b"\xee"
    assert os.pread(files[0], 1, PAGE - 1) == b"\xee"


def test_a_piece_of_no_bytes_is_where_memory_is_or_ends(file: MakeFile) -> None:
    regions = mapped((PAGE, PAGE, 0, 0), files=[file(PAGE)])
    assert bytes_at(regions, PAGE, 0) == b""
    assert bytes_at(regions, 2 * PAGE, 0) == b""
    assert regions.pieces(2 * PAGE + 1, 0) is None
    assert regions.pieces(PAGE - 1, 0) is None


def test_the_front_ends_addresses_have_their_own_order(file: MakeFile) -> None:
    regions = mapped((0, PAGE, 0x9000, 0), (PAGE, PAGE, 0x1000, 0), files=[file(PAGE), file(PAGE)])
    assert regions.guest_address(0x9000) == 0
    assert regions.guest_address(0x9FFF) == PAGE - 1
    assert regions.guest_address(0x1001) == PAGE + 1
    for nowhere in (0, 0xFFF, 0x2000, 0x8FFF, 0xA000, (1 << 64) - 1):
        assert regions.guest_address(nowhere) is None


def test_most_addresses_need_no_arithmetic(file: MakeFile) -> None:
    one, two = file(16 * PAGE), file(32 * PAGE)
    regions = mapped((0, 8 * PAGE, 0, 0), (1 << 32, 32 * PAGE, 1 << 40, 0), files=[one, two])
    assert (regions.low, regions.limit) == (0, 8 * PAGE)
    assert regions.view[3 * PAGE] == 3
    regions = mapped((2 * PAGE, PAGE, 0, 2 * PAGE), (8 * PAGE, PAGE * 2, 1 << 40, 8 * PAGE), files=[one, one])
    assert (regions.low, regions.limit) == (8 * PAGE, 10 * PAGE)
    assert regions.view[8 * PAGE] == 8
    regions = mapped((0, PAGE, 0, PAGE), files=[one])
    assert (regions.low, regions.limit, len(regions.view)) == (0, 0, 0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_piece_of_memory_is_what_a_plain_model_has(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    offsets = data.draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
    model: dict[int, int] = {}
    table = []
    at = 0
    content = bytes(range(1, 101))
    for gap, size, offset in zip(gaps, sizes, offsets, strict=True):
        at += gap
        table.append((at, size, 1000 - at, offset))
        model.update({at + number: content[offset + number] for number in range(size)})
        at += size
    # Not in order, and in the front end in the reverse order, with gaps.
    table = [(start, size, (9 - number) * 1000, offset) for number, (start, size, _, offset) in enumerate(table)]
    table = data.draw(st.permutations(table))
    descriptor = os.memfd_create("test")
    try:
        os.pwrite(descriptor, content, 0)
        regions = mapped(*table, files=[descriptor] * count)
    finally:
        os.close(descriptor)
    for address in range(at + 2):
        for size in range(1, at + 3 - address):
            wanted = [model.get(place) for place in range(address, address + size)]
            found = bytes_at(regions, address, size)
            assert found == (None if None in wanted else bytes(one for one in wanted if one is not None))


# What cannot be memory


@pytest.mark.parametrize(
    "region",
    [
        (0, 0, 0, 0),
        ((1 << 64) - PAGE, 2 * PAGE, 0, 0),
        (0, 2 * PAGE, (1 << 64) - PAGE, 0),
        (0, 2 * PAGE, 0, (1 << 64) - PAGE),
        (0, (1 << 64) - 1, 2, 0),
    ],
    ids=["no bytes", "guest wraps", "user wraps", "offset wraps", "everything"],
)
def test_a_region_that_no_memory_has_is_refused(file: MakeFile, region: tuple[int, int, int, int]) -> None:
    with pytest.raises(ProtocolError, match="no memory has such a size or place"):
        mapped(region, files=[file(PAGE)])


@pytest.mark.parametrize("region", [(0, PAGE + 1, 0, 0), (0, 1, 0, PAGE), (0, PAGE, 0, 1), (0, 1 << 63, 0, 0)])
def test_a_region_beyond_its_file_is_refused(file: MakeFile, region: tuple[int, int, int, int]) -> None:
    with pytest.raises(ProtocolError, match="ends beyond its file, which has 0x1000 bytes"):
        mapped(region, files=[file(PAGE)])


def test_what_cannot_be_mapped_is_refused() -> None:
    reading, writing = os.pipe()
    ends = socket.socketpair()
    others = [os.open(path, os.O_RDWR) for path in ("/dev/null", "/dev/zero")] + [os.open("/", os.O_RDONLY)]
    for descriptor in (reading, writing, ends[0].fileno(), *others):
        with pytest.raises(ProtocolError, match="is in no file that can be mapped; give the guest shared memory"):
            mapped((0, PAGE, 0, 0), files=[descriptor])
    for descriptor in (reading, writing, *others):
        os.close(descriptor)
    for end in ends:
        end.close()


def test_a_file_that_may_only_be_read_is_refused(file: MakeFile) -> None:
    descriptor = os.open(f"/proc/self/fd/{file(PAGE)}", os.O_RDONLY)
    with pytest.raises(ProtocolError, match=r"cannot map 0x1000 bytes of guest memory: Permission denied"):
        mapped((0, PAGE, 0, 0), files=[descriptor])
    os.close(descriptor)


def test_more_than_there_are_addresses_for_is_refused(file: MakeFile) -> None:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, (1 << 63) - PAGE)
    with pytest.raises(ProtocolError, match="cannot map 0x7fffffffffff0000 bytes of guest memory"):
        mapped((0, (1 << 63) - 0x10000, 0, 0), files=[descriptor])
    os.close(descriptor)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, PAGE, 0, 0), (0, PAGE, 1 << 20, 0)),
        ((0, 2 * PAGE, 0, 0), (PAGE, PAGE, 1 << 20, 0)),
        ((PAGE, PAGE, 0, 0), (0, PAGE + 1, 1 << 20, 0)),
        ((0, 2 * PAGE, 0, 0), (1 << 20, PAGE, PAGE, 0)),
        ((1 << 30, PAGE, 5, 0), (1 << 20, PAGE, 0, 0)),
    ],
)
def test_regions_that_overlap_are_refused(
    file: MakeFile, one: tuple[int, int, int, int], other: tuple[int, int, int, int]
) -> None:
    with pytest.raises(ProtocolError, match="two regions of memory overlap"):
        mapped(one, other, files=[file(2 * PAGE), file(2 * PAGE)])


def test_two_regions_may_be_the_same_piece_of_a_file(file: MakeFile) -> None:
    one = file(PAGE)
    regions = mapped((0, PAGE, 0, 0), (1 << 20, PAGE, 1 << 20, 0), files=[one, one])
    (piece,) = regions.pieces(0, 1) or []
    piece[0] = 77
    assert bytes_at(regions, 1 << 20, 1) == b"\x4d"


def test_regions_need_not_be_pages(file: MakeFile) -> None:
    regions = mapped((100, 10, 5, 4095), files=[file(2 * PAGE)])
    assert bytes_at(regions, 100, 10) == b"\0" + b"\1" * 9
    assert regions.pieces(99, 1) is None
    assert regions.pieces(110, 1) is None


# How they change


def test_a_file_that_is_mapped_stays_so(file: MakeFile) -> None:
    one, two = file(4 * PAGE), file(PAGE)
    before = mapped((0, 4 * PAGE, 0, 0), files=[one])
    again = os.dup(one)
    after = mapped((0, PAGE, 0, 0), (PAGE, PAGE, PAGE, 0), files=[again, two], before=before)
    os.close(again)
    assert after.regions[0].file is before.regions[0].file
    assert mappings() == 2
    del before, after
    assert mappings() == 0


def test_a_file_that_has_grown_is_mapped_anew(file: MakeFile) -> None:
    one = file(PAGE)
    before = mapped((0, PAGE, 0, 0), files=[one])
    os.ftruncate(one, 2 * PAGE)
    after = before.add(RegionDescription(PAGE, PAGE, PAGE, PAGE), one)
    assert bytes_at(after, PAGE - 1, 2) == b"\0\0"
    assert bytes_at(before, PAGE, 1) is None


def test_regions_are_added_and_removed(file: MakeFile) -> None:
    one, two = file(PAGE), file(PAGE)
    regions = mapped((0, PAGE, 0, 0), files=[one])
    more = regions.add(RegionDescription(4 * PAGE, PAGE, 4 * PAGE, 0), two)
    assert bytes_at(more, 4 * PAGE, 1) == b"\0"
    assert regions.pieces(4 * PAGE, 1) is None
    with pytest.raises(ProtocolError, match="overlap"):
        more.add(RegionDescription(0, PAGE, 1 << 30, 0), two)
    # Where it is in its file is not what it goes by: QEMU does not say.
    less = more.without(RegionDescription(0, PAGE, 0, 12345))
    assert less.pieces(0, 1) is None
    assert bytes_at(less, 4 * PAGE, 1) == b"\0"
    for wrong in ((0, PAGE, 0, 0), (4 * PAGE, PAGE, 0, 0), (4 * PAGE, 1, 4 * PAGE, 0)):
        with pytest.raises(ProtocolError, match="there is no region of memory at"):
            less.without(RegionDescription(*wrong))
    assert less.without(RegionDescription(4 * PAGE, PAGE, 4 * PAGE, 0)).pieces(4 * PAGE, 1) is None


def test_there_is_an_end_to_regions(file: MakeFile) -> None:
    one = file(PAGE)
    regions = Regions()
    for number in range(MAX_REGIONS):
        regions = regions.add(RegionDescription(number * PAGE, PAGE, number * PAGE, 0), one)
    with pytest.raises(ProtocolError, match=f"more than {MAX_REGIONS} regions"):
        regions.add(RegionDescription(MAX_REGIONS * PAGE, PAGE, MAX_REGIONS * PAGE, 0), one)
    assert mappings() <= MAX_REGIONS


def test_what_is_refused_leaves_nothing_mapped_and_nothing_open(file: MakeFile) -> None:
    good = file(PAGE)
    bad = os.open(f"/proc/self/fd/{file(PAGE)}", os.O_RDONLY)
    before = descriptors(), mappings()
    for table in (
        [(0, PAGE, 0, 0), (PAGE, PAGE, PAGE, 0)],
        [(0, PAGE, 0, 0), (PAGE, 2 * PAGE, PAGE, 0)],
        [(0, PAGE, 0, 0), (0, PAGE, PAGE, 0)],
    ):
        with pytest.raises(ProtocolError):
            mapped(*table, files=[good, bad])
    assert (descriptors(), mappings()) == before
    os.close(bad)


# Rings in them


def test_a_ring_lies_in_one_region(file: MakeFile) -> None:
    files = [file(4 * PAGE), file(4 * PAGE)]
    regions = mapped((0, 4 * PAGE, 0, 0), (4 * PAGE, 4 * PAGE, 1 << 30, 0), files=files)
    record = InflightRegion(memoryview(bytearray(inflight_bytes(256))), 256)

    def ring(desc: int, avail: int, used: int) -> Virtqueue:
        return Virtqueue(regions, VringLayout(256, desc, avail, used), name="vda: queue 0", inflight=record)

    ring(0, PAGE, 2 * PAGE)
    ring(4 * PAGE, PAGE, 7 * PAGE)
    for parts in ((4 * PAGE - 16, 0, 0), (0, 4 * PAGE - 2, 0), (0, 0, 8 * PAGE - 4), (0, 0, 1 << 40)):
        with pytest.raises(RingError, match="is not within guest memory"):
            ring(*parts)
