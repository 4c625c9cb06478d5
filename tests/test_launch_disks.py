"""Disks of a running guest: what it writes is in the file, what is in the file it reads, and nothing else happens."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import (
    GUEST,
    MEM,
    SECTOR,
    UNPRIVILEGED,
    Launch,
    checksum,
    launch,
    make_disk,
    pattern,
    prompt,
    run,
)

pytestmark = pytest.mark.every_host


def refusal(disk: str, **how: object) -> str:
    """The one line with which a disk is refused."""
    with launch("quiet poweroff", "--block", disk, **how) as launched:
        code, out, err = launched.end()
    assert (code, out) == (1, "")
    assert err.startswith("lgmp: ") and err.count("\n") == 1, err
    return err


# Data


def test_the_guest_reads_what_is_in_the_file(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", sectors=200, seed=9)

    code, out, _err = run("quiet blk read 3 100; blk crc; poweroff", "--block", str(disk))

    assert code == 0
    part = pattern(200, 9)[3 * SECTOR : 103 * SECTOR]
    assert f"blk read 3 100: status 0 checksum {checksum(part)} first {part[:16].hex()}\n" in out
    assert f"blk crc: status 0 sectors 200 checksum {checksum(pattern(200, 9))}\n" in out


def test_the_file_has_what_the_guest_wrote_and_is_otherwise_as_it_was(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", sectors=200)

    code, out, _err = run("quiet blk fill 5 2 170; blk write 100 70 4; blk read 100 70; poweroff", "--block", str(disk))

    assert code == 0
    data, before = disk.read_bytes(), pattern(200)
    assert data[: 5 * SECTOR] == before[: 5 * SECTOR]
    assert data[5 * SECTOR : 7 * SECTOR] == b"\xaa" * 2 * SECTOR
    assert data[7 * SECTOR : 100 * SECTOR] == before[7 * SECTOR : 100 * SECTOR]
    assert f"blk read 100 70: status 0 checksum {checksum(data[100 * SECTOR : 170 * SECTOR])}" in out
    assert data[170 * SECTOR :] == before[170 * SECTOR :]


def test_disks_are_in_the_order_of_the_command_line(tmp_path: Path) -> None:
    first, second = make_disk(tmp_path / "z.img", seed=1), make_disk(tmp_path / "a.img", seed=2)

    code, out, _err = run(
        "quiet blk -d 0 id; blk -d 0 crc; blk -d 1 id; blk -d 1 crc; blk -d 1 fill 0 1 7; blk -d 2 id; poweroff",
        *("--block", str(first), "--block", str(second)),
    )

    assert code == 0
    assert out.splitlines() == [
        "blk id: status 0 id 'z.img'",
        f"blk crc: status 0 sectors 64 checksum {checksum(pattern(64, 1))}",
        "blk id: status 0 id 'a.img'",
        f"blk crc: status 0 sectors 64 checksum {checksum(pattern(64, 2))}",
        "blk fill 0 1: status 0",
        "blk: no disk 2",
    ]
    assert first.read_bytes() == pattern(64, 1)
    assert second.read_bytes() == b"\x07" * SECTOR + pattern(64, 2)[SECTOR:]


def test_many_requests_at_once_get_the_right_data(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", sectors=512)

    code, out, err = run("quiet blk stress 3000 7; blk segs 0 64; poweroff", "--block", str(disk))

    assert (code, err) == (0, "")
    assert "blk stress 3000 7: status 0" in out and " 0 failed, 0 sectors wrong" in out
    assert "blk segs 0 64: status 0 single status 0 all equal" in out


def test_a_disk_can_be_reset_while_it_works(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", sectors=512)

    code, out, err = run("quiet " + "blk reset-under-load 64; " * 5 + "poweroff", "--block", str(disk))

    assert (code, err) == (0, "")
    assert out.count("blk reset-under-load 64: status 0") == 5


def test_scsi_commands_are_answered_as_unsupported(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    code, out, err = run("quiet blk scsi; blk scsi; blk crc; poweroff", "--block", str(disk))

    assert code == 0
    assert out.count("blk scsi: status 2\n") == 2
    assert err == "lgmp: vda: Scsi commands unsupported\n"


def test_flushes_and_barriers_reach_the_disk_before_their_answer(tmp_path: Path) -> None:
    disk, log = make_disk(tmp_path / "disk.img"), tmp_path / "strace"
    strace = ("strace", "-DDD", "-f", "-e", "trace=fdatasync,/^pwrite", "-o", str(log))
    calls = {}
    with prompt("--block", str(disk), prefix=strace) as launched:
        seen, worker = 0, launched.workers()["vda"]
        for command in ("blk write 0 1 1", "blk flush", "blk barrier 1 1 1"):
            launched.command(command)
            # strace writes its line before it lets the process go on.
            so_far = re.findall(rf"^{worker} +(fdatasync|pwrite)\w*\(", log.read_text(), re.MULTILINE)
            calls[command], seen = so_far[seen:], len(so_far)
        launched.send("poweroff\n")
        code, _out, _err = launched.end()

    assert code == 0
    assert calls == {
        "blk write 0 1 1": ["pwrite"],
        "blk flush": ["fdatasync"],
        "blk barrier 1 1 1": ["fdatasync", "pwrite", "fdatasync"],
    }


# What a disk may be


def test_a_read_only_disk_is_only_read(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    disk.chmod(0o444)

    with prompt("--block", f"{disk},ro", prefix=UNPRIVILEGED) as launched:
        launched.command("blk crc")
        launched.command("blk write 0 1 1")
        launched.command("blk flush")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert f"checksum {checksum(pattern(64))}" in out
    assert "blk write 0 1: status 1" in out
    assert "blk flush: status 0" in out
    assert err == "lgmp: vda: write at sector 0: the disk is read-only\n"
    assert disk.read_bytes() == pattern(64)


@pytest.mark.parametrize("name", ["a, b.img", "x,ro.img", "x,rw", "x,ro,ro", ",", " ", "-x", "a=b", "ro"])
def test_a_disk_may_have_any_name(name: str, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / name)
    option = f"--block={name},ro" if name.endswith(",ro") else f"--block={name}"

    code, out, _err = run("quiet blk id; blk crc; poweroff", option, cwd=tmp_path)

    assert code == 0
    assert f"id '{name}'" in out
    assert f"checksum {checksum(disk.read_bytes())}" in out


def test_a_file_that_is_not_whole_sectors_is_a_disk_of_its_whole_sectors(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(pattern(3) + b"tail" * 25)

    code, out, _err = run("quiet blk crc; blk fill 2 1 1; blk fill 3 1 1; poweroff", "--block", str(disk))

    assert code == 0
    assert "blk crc: status 0 sectors 3" in out
    assert "blk fill 2 1: status 0" in out and "blk fill 3 1: status 1" in out
    assert disk.read_bytes() == pattern(2) + b"\x01" * SECTOR + b"tail" * 25


def test_a_sparse_disk_of_terabytes_works_at_its_end(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    sectors = (3 << 40) // SECTOR
    with disk.open("wb") as file:
        file.truncate(sectors * SECTOR)

    code, out, _err = run(
        f"quiet blk fill {sectors - 1} 1 9; blk read {sectors - 1} 1; blk fill {sectors} 1 9; poweroff",
        *("--block", str(disk)),
    )

    assert code == 0
    assert f"blk fill {sectors - 1} 1: status 0" in out
    assert f"blk read {sectors - 1} 1: status 0 checksum {checksum(bytes([9]) * SECTOR)}" in out
    assert f"blk fill {sectors} 1: status 1" in out
    assert disk.stat().st_size == sectors * SECTOR


def test_as_many_disks_as_there_are_interrupts_for(tmp_path: Path) -> None:
    disks = [make_disk(tmp_path / f"{number}.img", sectors=1, seed=number) for number in range(29)]
    options = [word for disk in disks for word in ("--block", str(disk))]

    code, out, _err = run("quiet blk -d 28 crc; blk -d 28 id; poweroff", *options)

    assert code == 0
    assert f"checksum {checksum(pattern(1, 28))}" in out


def test_one_disk_more_is_refused_in_one_line(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    with launch("quiet poweroff", *["--block", str(disk)] * 30) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert err.startswith("lgmp: Too many devices") and err.count("\n") == 1


def test_what_cannot_be_a_disk_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 511)
    os.mkfifo(tmp_path / "fifo")

    assert "truncate -s" in refusal(str(tmp_path / "empty"))
    assert "truncate -s" in refusal(str(tmp_path / "short"))
    assert "Is a directory" in refusal(str(tmp_path))
    assert "neither a file nor a block device" in refusal(f"{tmp_path},ro")
    assert "neither a file nor a block device" in refusal(str(tmp_path / "fifo"))
    assert "neither a file nor a block device" in refusal("/dev/null")
    assert "No such file" in refusal(str(tmp_path / "missing"))
    assert "No such file" in refusal("")
    assert "No such file" in refusal(",ro")


def test_a_disk_that_may_not_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    disk.chmod(0o444)

    assert f"--block {disk},ro" in refusal(str(disk), prefix=UNPRIVILEGED)


def test_a_disk_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    disk.chmod(0)

    for option in (str(disk), f"{disk},ro"):
        line = refusal(option, prefix=UNPRIVILEGED)

        assert "Permission denied" in line and "to let the guest only read it" not in line


def test_a_file_that_shrinks_under_the_guest_is_an_error_of_the_disk(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    with prompt("--block", str(disk)) as launched:
        os.truncate(disk, 4 * SECTOR)
        launched.command("blk read 0 4")
        launched.command("blk read 60 1")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert "blk read 0 4: status 0" in out
    assert "blk read 60 1: status 1" in out


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """A block device that is that file."""
    device = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a loop device")
def test_a_block_device_is_a_disk(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "disk.img", sectors=256)
    with loop_device(image) as device:
        code, out, _err = run(
            "quiet blk crc; blk write 8 100 3; blk flush; blk fill 256 1 1; blk reset-under-load 64; poweroff",
            *("--block", device),
        )
        with open(device, "rb") as file:
            size = file.seek(0, os.SEEK_END)

    assert code == 0
    assert f"blk crc: status 0 sectors 256 checksum {checksum(pattern(256))}" in out
    assert "blk write 8 100: status 0" in out
    assert "blk fill 256 1: status 1" in out
    assert "blk reset-under-load 64: status 0" in out
    assert size == 256 * SECTOR
    assert image.read_bytes()[108 * SECTOR :] == pattern(256)[108 * SECTOR :]
    assert image.read_bytes()[64 * SECTOR : 65 * SECTOR] != pattern(256)[64 * SECTOR : 65 * SECTOR]


def test_a_disk_is_not_made_where_the_guest_cannot_start(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    with Launch("run", MEM, GUEST, "--block", str(disk)) as launched:
        code, _out, _err = launched.end()

    assert code == 1
    assert not disk.exists()
