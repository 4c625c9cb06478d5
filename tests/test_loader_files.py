"""What is said of files that are no kernel and no initrd at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from images import MIB, elf_image, write

from lgmp.errors import LgmpError
from lgmp.loader import load_guest
from lgmp.loader.image import ImageFile
from lgmp.memory import GuestMemory


def refusal(kernel: str, initrd: str | None = None) -> str:
    with GuestMemory.create(4 * MIB) as memory, pytest.raises(LgmpError) as caught:
        load_guest(memory, kernel, initrd, [])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_named_with_the_reason(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    kernel = write(tmp_path, elf_image())
    assert refusal(missing) == f"Failed to open {missing}: No such file or directory"
    assert refusal(kernel, missing) == f"Failed to open {missing}: No such file or directory"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "is a directory" in refusal(str(tmp_path))
    assert "is a directory" in refusal(write(tmp_path, elf_image()), str(tmp_path))


def test_a_device_is_refused() -> None:
    assert "/dev/zero is not a regular file" in refusal("/dev/zero")


def test_a_pipe_nobody_writes_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    assert "is not a regular file" in refusal(pipe)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    empty = write(tmp_path, b"", "empty")
    assert "is empty: give a whole kernel" in refusal(empty)
    assert "is empty: give a whole initrd" in refusal(write(tmp_path, elf_image()), empty)


@pytest.mark.parametrize(
    ("magic", "remedy"),
    [
        (b"\x1f\x8b\x08\x00", "gunzip"),
        (b"BZh91AY", "bunzip2"),
        (b"\xfd7zXZ\x00", "unxz"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
        (b"\x5d\x00\x00\x80", "unlzma"),
    ],
)
def test_a_compressed_kernel_is_told_how_to_unpack_it(tmp_path: Path, magic: bytes, remedy: str) -> None:
    assert f"vmlinux is compressed: {remedy} it first" in refusal(write(tmp_path, magic + bytes(1000)))


@pytest.mark.parametrize("content", [b"x", b"\x7fEL", b"#!/bin/sh\n" * 200])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "neither ELF nor a bzImage" in refusal(write(tmp_path, content))


def test_an_unprintable_name_stays_on_one_line(tmp_path: Path) -> None:
    name = os.fsdecode(b"bad\nname\xff")
    message = refusal(write(tmp_path, b"x", name))
    assert r"bad\nname\udcff" in message
    assert message.isprintable()


def test_a_name_with_a_nul_is_refused() -> None:
    assert "Failed to open " in refusal("a\0b")


def test_a_file_that_shrinks_while_it_is_read_is_truncated(tmp_path: Path) -> None:
    path = write(tmp_path, b"x" * 100)
    with ImageFile(path, "kernel") as file:
        os.truncate(path, 50)
        with pytest.raises(LgmpError, match="truncated: its middle"):
            file.read_at(40, 20, "middle")


def test_reads_go_on_where_the_kernel_stopped_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(100))
    whole_read = os.preadv
    monkeypatch.setattr("lgmp.loader.image.preadv", lambda fd, views, offset: whole_read(fd, [views[0][:7]], offset))
    with ImageFile(write(tmp_path, content), "kernel") as file:
        assert file.read_at(3, 90, "middle") == content[3:93]


def test_files_are_closed_again(tmp_path: Path) -> None:
    kernel, initrd = write(tmp_path, elf_image()), write(tmp_path, b"", "initrd")
    before = len(os.listdir("/proc/self/fd"))
    refusal(kernel, initrd)
    refusal(initrd)
    assert len(os.listdir("/proc/self/fd")) == before
