"""A guest that restarts: the launcher execs itself, with the same arguments, in the same process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from launching import GUEST, MEM, Launch, command_line, make_disk, prompt
from networks import GUEST_IP, HOST_IP, namespace

pytestmark = pytest.mark.every_host

BOOTS = 4


def test_the_process_and_its_arguments_stay_and_the_workers_are_new(tmp_path: Path) -> None:
    with prompt("--block", str(make_disk(tmp_path / "disk.img")), "--name", "phoenix") as launched:
        before = launched.workers()
        launched.command("reboot")
        launched.wait_until_ready()
        after = launched.workers()
        title = command_line(launched.pid)
        launched.send("poweroff\n")
        code, _out, err = launched.end()

    assert (code, err) == (0, "")
    assert sorted(after) == sorted(before) == ["console", "vda"]
    assert not set(after.values()) & set(before.values())
    assert title == "lgmp: testguest.elf 16M (phoenix)"


def test_no_descriptor_leaks_into_the_next_boot(tmp_path: Path) -> None:
    with prompt("--block", str(make_disk(tmp_path / "disk.img"))) as launched:
        first = launched.descriptors()
        for _ in range(BOOTS):
            launched.command("reboot")
        launched.wait_until_ready()
        last = launched.descriptors()

    assert last == first


def test_disks_keep_what_was_written_before(tmp_path: Path) -> None:
    with prompt("--block", str(make_disk(tmp_path / "disk.img"))) as launched:
        for boot in range(BOOTS):
            launched.command(f"blk write 0 64 {boot}")
            launched.command("reboot")
            launched.command(f"blk verify 0 64 {boot}")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert out.count("blk verify 0 64: status 0 all equal") == BOOTS


def test_a_tap_is_there_again_alone_and_works_beside_the_disk(tmp_path: Path) -> None:
    options = ("--tunnet", HOST_IP, "--block", str(make_disk(tmp_path / "disk.img")), "--rng")
    with namespace() as here, here.entered(), prompt(*options) as launched:
        launched.command("blk write 0 64 7")
        for _ in range(2):
            launched.command("reboot")
            launched.command(f"net addr {GUEST_IP}")
            launched.command(f"net ping {HOST_IP} 3")
            assert here.interfaces() == ["tap0"]
        launched.command("blk verify 0 64 7")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert (code, err) == (0, "")
    assert out.count("3 of 3 answered") == 2
    assert "blk verify 0 64: status 0 all equal" in out


def test_a_reboot_in_the_kernel_arguments_goes_on_until_a_signal() -> None:
    with Launch("run", "-v", MEM, GUEST, "quiet echo again; reboot") as launched:
        launched.out.wait_for("again\n", times=3)
        launched.signal(signal.SIGTERM)
        code = launched.wait()
        launched.wait_until_nothing_is_left()

    # In the moments of an exec the signal finds nobody who has said what it should do.
    assert code in (128 + signal.SIGTERM, -signal.SIGTERM)
