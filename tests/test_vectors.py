"""preadv and pwritev where a filter of system calls refuses them, which is no reason not to read a disk."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lgmp import vectors

CONTENT = bytes(range(256)) * 16


@pytest.fixture(params=["preadv", "seek and readv"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """A file, once with and once without the calls."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "preadv":

            def refuse(*arguments: object) -> int:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

            patch.setattr(os, "preadv", refuse)
            patch.setattr(os, "pwritev", refuse)
        importlib.reload(vectors)
        yield fd
    importlib.reload(vectors)
    os.close(fd)


def test_a_read_fills_all_buffers_from_its_place_on(file: int) -> None:
    first, second = bytearray(7), bytearray(500)

    assert vectors.preadv(file, [memoryview(first), memoryview(second)], 1000) == 507
    assert bytes(first + second) == CONTENT[1000:1507]


def test_a_read_at_the_end_gives_what_there_is(file: int) -> None:
    buffer = bytearray(10)

    assert vectors.preadv(file, [memoryview(buffer)], len(CONTENT) - 3) == 3
    assert vectors.preadv(file, [memoryview(buffer)], len(CONTENT)) == 0


def test_a_write_goes_to_its_place_and_nowhere_else(file: int) -> None:
    assert vectors.pwritev(file, [memoryview(b"ab"), memoryview(b"cde")], 100) == 5

    assert os.pread(file, len(CONTENT) + 1, 0) == CONTENT[:100] + b"abcde" + CONTENT[105:]


def test_places_beyond_two_and_four_gibibytes_are_reached(file: int) -> None:
    for place in ((2 << 30) - 1, (4 << 30) + 512):
        buffer = bytearray(3)

        assert vectors.pwritev(file, [memoryview(b"far")], place) == 3
        assert vectors.preadv(file, [memoryview(buffer)], place) == 3
        assert buffer == b"far"


def test_a_failure_is_the_files_own(file: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        vectors.preadv(file, [memoryview(bytearray(1))], -2)
