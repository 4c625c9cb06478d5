"""The control page: what outlives a worker, shared between processes, and no more than it says."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest

from lgmp.control import STATE_BYTES, STATISTICS, ControlPage, control_bytes
from lgmp.virtio.inflight import USED_IDX_U16
from lgmp.virtio.ring import MAX_RING

NUMS = [8, 128, 1, 256]


@pytest.fixture
def page() -> Iterator[ControlPage]:
    page = ControlPage.create(NUMS)
    yield page
    page.close()


def test_a_fresh_page_is_at_the_start_of_every_ring(page: ControlPage) -> None:
    assert page.accepted_features == 0
    assert not page.live
    assert [page.position(queue) for queue in range(len(NUMS))] == [(0, 0)] * len(NUMS)
    assert [region.num for region in page.inflight] == NUMS
    assert list(page.statistics) == [0] * STATISTICS
    assert bytes(page.state) == bytes(STATE_BYTES)


def test_two_mappings_see_the_same(page: ControlPage) -> None:
    workers = ControlPage(os.dup(page.fd), NUMS)
    page.accepted_features = 1 << 63 | 1 << 28
    page.live = True
    workers.inflight[1].header[USED_IDX_U16] = 0xFFFE
    workers.inflight[1].inflight[127] = 1
    workers.statistics[STATISTICS - 1] = 1 << 40
    workers.state[-5:] = b"state"
    assert workers.accepted_features == 1 << 63 | 1 << 28
    assert workers.live
    assert page.position(1) == (0xFFFF, 0xFFFE)
    assert page.statistics[STATISTICS - 1] == 1 << 40
    assert bytes(page.state[-5:]) == b"state"
    workers.close()


def test_the_parts_of_a_page_are_apart_from_each_other(page: ControlPage) -> None:
    """Each is filled with what it can hold, and none has changed when all are full."""
    page.accepted_features = (1 << 64) - 1
    page.live = True
    for number in range(STATISTICS):
        page.statistics[number] = number
    page.state[:] = bytes([0xAA]) * STATE_BYTES
    for queue, region in enumerate(page.inflight):
        region.header[USED_IDX_U16] = 0x8000 + queue
        for head in range(region.num):
            region.inflight[head] = 1
            region.counter[head] = (1 << 63) + queue
    assert page.accepted_features == (1 << 64) - 1
    assert page.live
    assert list(page.statistics) == list(range(STATISTICS))
    assert bytes(page.state) == bytes([0xAA]) * STATE_BYTES
    for queue, region in enumerate(page.inflight):
        assert page.position(queue) == (0x8000 + queue + region.num, 0x8000 + queue)
        assert set(region.counter) == {(1 << 63) + queue}


def test_a_reset_takes_back_what_is_of_the_driver_and_nothing_else(page: ControlPage) -> None:
    page.accepted_features = 5
    page.live = True
    page.statistics[0] = 6
    page.state[0] = 7
    last = page.inflight[-1]
    last.header[USED_IDX_U16] = 8
    last.inflight[0], last.counter[0] = 1, 9
    page.reset()
    assert page.accepted_features == 0
    assert not page.live
    assert page.position(len(NUMS) - 1) == (0, 0)
    assert last.heads() == []
    assert (page.statistics[0], page.state[0], last.taken()) == (6, 7, 9)


def test_a_queue_that_the_device_has_not_is_refused(page: ControlPage) -> None:
    with pytest.raises(IndexError):
        page.position(len(NUMS))


def test_a_ring_may_be_as_long_as_virtio_allows() -> None:
    page = ControlPage.create([MAX_RING] * 2)
    assert control_bytes([MAX_RING] * 2) >= 2 * 16 * (MAX_RING + 1)
    page.inflight[1].inflight[MAX_RING - 1] = 1
    page.inflight[1].counter[MAX_RING - 1] = 1
    assert (page.position(0), page.position(1)) == ((0, 0), (1, 0))
    page.close()


def test_views_outlive_the_page_they_were_taken_from() -> None:
    page = ControlPage.create([8])
    region, statistics = page.inflight[0], page.statistics
    page.close()
    region.inflight[3] = 1
    statistics[0] = 5
    assert (region.heads(), statistics[0]) == ([3], 5)


def test_a_file_that_is_too_small_is_no_control_page() -> None:
    fd = os.memfd_create("small")
    os.ftruncate(fd, control_bytes(NUMS) - 1)
    with pytest.raises(ValueError, match="too small"):
        ControlPage(fd, NUMS)
    os.close(fd)


def test_a_page_of_other_rings_is_refused(page: ControlPage) -> None:
    fd = os.dup(page.fd)
    with pytest.raises(ValueError, match="for 8 descriptors, not of version 1 for 128"):
        ControlPage(fd, [128, 8])
    os.close(fd)


def test_nobody_who_has_the_page_can_make_it_smaller_or_bigger(page: ControlPage) -> None:
    size = control_bytes(NUMS)
    for other in (0, size - mmap.PAGESIZE, size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(page.fd, other)
    assert size % mmap.PAGESIZE == 0
    assert fcntl.fcntl(page.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
