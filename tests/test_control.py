"""The control page: what outlives a worker, shared between processes, and no more than it says."""

from __future__ import annotations

import fcntl
import mmap
import os

import pytest

from lgmp.control import CONTROL_PAGE_BYTES, MAX_QUEUES, NEXT_AVAIL, NEXT_USED, ControlPage


def test_a_fresh_page_is_at_the_start_of_every_ring() -> None:
    page = ControlPage.create()
    assert page.accepted_features == 0
    assert all(list(page.position(queue)) == [0, 0] for queue in range(MAX_QUEUES))
    page.close()


def test_two_mappings_see_the_same() -> None:
    launchers = ControlPage.create()
    workers = ControlPage(os.dup(launchers.fd))
    launchers.accepted_features = 1 << 63 | 1 << 28
    workers.position(1)[NEXT_AVAIL] = 0xFFFF
    workers.position(1)[NEXT_USED] = 0xFFFE
    assert workers.accepted_features == 1 << 63 | 1 << 28
    assert list(launchers.position(1)) == [0xFFFF, 0xFFFE]
    workers.close()
    launchers.close()


def test_positions_are_apart_from_each_other_and_from_the_features() -> None:
    page = ControlPage.create()
    for queue in range(MAX_QUEUES):
        position = page.position(queue)
        position[NEXT_AVAIL], position[NEXT_USED] = queue, 0x8000 + queue
    page.accepted_features = (1 << 64) - 1
    assert [list(page.position(queue)) for queue in range(MAX_QUEUES)] == [
        [queue, 0x8000 + queue] for queue in range(MAX_QUEUES)
    ]
    page.close()


def test_a_reset_takes_everything_back() -> None:
    page = ControlPage.create()
    page.accepted_features = 5
    position = page.position(MAX_QUEUES - 1)
    position[NEXT_USED] = 7
    page.reset()
    assert page.accepted_features == 0
    assert list(position) == [0, 0]
    page.close()


@pytest.mark.parametrize("queue", [-1, MAX_QUEUES])
def test_a_queue_without_a_place_is_refused(queue: int) -> None:
    page = ControlPage.create()
    with pytest.raises(IndexError):
        page.position(queue)
    page.close()


def test_a_position_outlives_the_page_it_was_taken_from() -> None:
    page = ControlPage.create()
    position = page.position(0)
    page.close()
    position[NEXT_AVAIL] = 3
    assert position[NEXT_AVAIL] == 3


def test_a_file_that_is_too_small_is_no_control_page() -> None:
    fd = os.memfd_create("small")
    os.ftruncate(fd, CONTROL_PAGE_BYTES - 1)
    with pytest.raises(ValueError, match="too small"):
        ControlPage(fd)
    os.close(fd)


def test_nobody_who_has_the_page_can_make_it_smaller_or_bigger() -> None:
    page = ControlPage.create()
    for size in (0, CONTROL_PAGE_BYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(page.fd, size)
    assert mmap.PAGESIZE == CONTROL_PAGE_BYTES
    assert fcntl.fcntl(page.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    page.close()
