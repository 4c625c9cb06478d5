"""Files that no path leads to: memfds, and what there is instead of them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from pathlib import Path

import pytest

from lgmp import shared_file
from lgmp.control import ControlPage
from lgmp.errors import LgmpError
from lgmp.memory import GuestMemory

SIZE = 1 << 16


@pytest.fixture(params=["memfd", "ENOSYS", "EPERM", "absent"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What there is: memfds, or no such system call, or a filter that refuses it, or no such function in Python."""
    if request.param == "absent":
        monkeypatch.delattr(os, "memfd_create")
    elif request.param != "memfd":
        refuse(monkeypatch, getattr(errno, request.param))
    return str(request.param)


@pytest.fixture
def no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSYS)


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def memfd_create(name: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "memfd_create", memfd_create)


def keep_to(monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    monkeypatch.setattr(shared_file, "_DIRECTORIES", tuple(map(str, directories)))


def test_a_file_has_its_size_and_is_zeros(kind: str) -> None:
    fd = shared_file.create("test", SIZE)

    assert os.pread(fd, SIZE + 1, 0) == bytes(SIZE)
    os.close(fd)


def test_a_file_without_a_size_grows(kind: str) -> None:
    fd = shared_file.create("test")
    os.write(fd, b"x" * 5000)

    assert os.fstat(fd).st_size == 5000
    os.close(fd)


def test_two_mappings_see_the_same(kind: str) -> None:
    fd = shared_file.create("test", SIZE)
    first, second = (mmap.mmap(fd, SIZE, mmap.MAP_SHARED) for _ in range(2))
    first[SIZE - 1] = 0x5A

    assert second[SIZE - 1] == 0x5A
    for mapped in (first, second):
        mapped.close()
    os.close(fd)


def test_no_path_leads_to_a_file_and_no_program_inherits_it(kind: str) -> None:
    fd = shared_file.create("test", SIZE)

    assert os.fstat(fd).st_nlink == 0
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(fd)


def test_a_memfd_cannot_change_its_size() -> None:
    fd = shared_file.create("test", SIZE)
    if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
        os.close(fd)
        pytest.skip("this kernel has none")

    for size in (SIZE - 1, SIZE + 1, 0):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_an_unlinked_file_is_its_owners_alone(no_memfd: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to(monkeypatch, tmp_path)
    old = os.umask(0)
    fd = shared_file.create("test", SIZE)
    os.umask(old)

    assert os.fstat(fd).st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == []
    os.close(fd)


def test_names_that_are_taken_are_left_alone(no_memfd: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to(monkeypatch, tmp_path)
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    taken = [tmp_path / f".test.{os.getpid()}.{number}" for number in range(3)]
    for path in taken:
        path.symlink_to(victim)
    fd = shared_file.create("test", SIZE)

    assert sorted(tmp_path.iterdir()) == sorted([victim, *taken])
    assert victim.read_bytes() == b"mine"
    os.close(fd)


def test_a_directory_that_is_not_there_or_cannot_be_written_to_is_passed_over(
    no_memfd: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_to(monkeypatch, tmp_path / "nowhere", Path("/proc"), tmp_path)
    fd = shared_file.create("test", SIZE)

    assert os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
    os.close(fd)


def test_memory_comes_before_disks(no_memfd: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shared_file._is_in_memory("/dev/shm"):
        pytest.skip("/dev/shm is no tmpfs")
    keep_to(monkeypatch, tmp_path, Path("/dev/shm"))
    in_memory = shared_file._is_in_memory(str(tmp_path))
    fd = shared_file.create("test", SIZE)

    assert os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path) if in_memory else "/dev/shm/")
    os.close(fd)


@pytest.mark.parametrize("size", [1 << 61, 1 << 50])
def test_more_than_there_is_room_for_is_refused_with_the_remedy(size: int, no_memfd: None) -> None:
    with pytest.raises(LgmpError, match=r"no room for \d+ MiB .+ as root, or try less MEM"):
        shared_file.create("test", size)


def test_a_refusal_leaves_nothing_open(no_memfd: None) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(LgmpError):
        shared_file.create("test", 1 << 61)

    assert os.listdir("/proc/self/fd") == before


def test_a_lack_of_descriptors_is_no_lack_of_memfds(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EMFILE)

    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        shared_file.create("test", SIZE)


def test_more_memory_than_python_can_map_is_refused_in_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    with pytest.raises(LgmpError) as refusal:
        GuestMemory.create(3 << 30)

    assert str(refusal.value) == (
        "cannot make 3073 MiB of guest memory: a 32-bit Python can use less than 2048 MiB; try less MEM"
    )


def test_guest_memory_and_control_pages_are_the_same_with_and_without_memfds(kind: str) -> None:
    control = ControlPage.create([128, 128])
    with GuestMemory.create(1 << 20, 2) as memory:
        memory.view[memory.limit - 1] = 1
        control.accepted_features = (1 << 64) - 1

        assert memory.limit == (1 << 20) + 2 * 4096
        assert os.pread(memory.fd, 1, memory.limit - 1) == b"\1"
        assert os.pread(control.fd, 8, 0) == b"\xff" * 8
    control.close()
