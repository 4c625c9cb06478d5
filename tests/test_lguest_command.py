"""The command `lguest`: the command line of Linux's own launcher, and what was broken there mended."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from launching import GUEST, MEM, Launch, Terminal, checksum, make_disk, pattern, session_processes

LGUEST = (sys.executable, "-P", "-m", "lgmp.lguest_cli")
POWER_DOWN = "lguest: CRASH: Power down\n"
SECTORS = 64


def lguest(*words: str) -> tuple[int, str, str]:
    """Run `lguest` to its end: exit status, stdout, stderr."""
    with Launch(*words, lgmp=LGUEST) as launched:
        return launched.end()


@pytest.fixture
def disk(tmp_path: Path) -> str:
    return str(make_disk(tmp_path / "disk.img", SECTORS))


def test_a_guest_that_powers_off_ends_with_1_and_says_so_as_ever() -> None:
    assert lguest(MEM, GUEST, "quiet", "echo", "hello;", "poweroff") == (1, "hello\n", POWER_DOWN)


def test_three_interrupts_end_it_with_2() -> None:
    with Terminal() as terminal, Launch(MEM, GUEST, "quiet", terminal=terminal, lgmp=LGUEST) as launched:
        launched.wait_until_ready()
        # Each in a read of its own, and nothing says when it was read: they are typed until it is so.
        while session_processes(launched.session):
            terminal.type("\x03")
            os.sched_yield()
        assert launched.end()[0] == 2


def test_a_signal_ends_it_with_that() -> None:
    with Launch(MEM, GUEST, "quiet", lgmp=LGUEST) as launched:
        launched.wait_until_ready()
        launched.signal(signal.SIGTERM)
        code, _out, err = launched.end()

    assert (code, err) == (128 + signal.SIGTERM, "")


def test_a_reboot_starts_the_same_command_again(disk: str) -> None:
    with Launch(f"--block={disk}", MEM, GUEST, "quiet", lgmp=LGUEST) as launched:
        launched.wait_until_ready()
        launched.command("blk write 0 8 3")
        launched.command("reboot")
        launched.command("blk verify 0 8 3")
        launched.send("misdeed early; poweroff\n")
        code, out, err = launched.end()

    assert code == 1
    assert "blk verify 0 8: status 0 all equal" in out
    assert err == f"lguest: vda gave early output\n{POWER_DOWN}"


# The command line


@pytest.mark.parametrize(
    "words",
    [
        ("--block=DISK", MEM, GUEST, "ARGS"),
        ("--block", "DISK", MEM, GUEST, "ARGS"),  # the original took DISK for the memory
        (MEM, GUEST, "--block", "DISK", "ARGS"),
        (MEM, "--blo=DISK", GUEST, "ARGS"),
        (MEM, GUEST, "ARGS", "--b", "DISK"),
        ("--b=DISK", "--", MEM, GUEST, "ARGS"),
    ],
)
def test_options_stand_anywhere_and_may_be_cut_short(words: tuple[str, ...], disk: str) -> None:
    there = {"DISK": disk, "ARGS": "quiet blk read 0 64; args; poweroff"}
    options = [word.replace("DISK", disk) for word in words]
    code, out, err = lguest(*(there.get(word, word) for word in options))

    assert (code, err) == (1, POWER_DOWN)
    assert f"checksum {checksum(pattern(SECTORS))}" in out
    assert f"args: {there['ARGS']}\n" in out


def test_what_follows_two_hyphens_is_the_kernels_as_it_is() -> None:
    code, out, err = lguest(MEM, GUEST, "quiet", "--", "args;", "-v;", "--block=x", "--;", "poweroff")

    assert (code, err) == (1, POWER_DOWN)
    assert "args: quiet args; -v; --block=x --; poweroff\n" in out


def test_random_bytes_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    source = tmp_path / "bytes"
    source.write_bytes(bytes(range(256)) * 16)

    code, out, err = lguest(f"--rng={source}", MEM, GUEST, "quiet rng read 16; poweroff")

    assert (code, err) == (1, POWER_DOWN)
    assert f"rng read: 16 bytes in 1 buffers, checksum {checksum(bytes(range(16)))}" in out


def test_the_memory_is_the_word_behind_rng() -> None:
    code, out, err = lguest("--rng", MEM, GUEST, "mem; poweroff")

    assert (code, err) == (1, POWER_DOWN)
    assert f"mem: {int(MEM) << 20} bytes" in out


@pytest.mark.parametrize("memory", ["many", "0", "16x", "", "99999"])
def test_a_memory_size_that_is_none_is_refused(memory: str) -> None:
    code, out, err = lguest(memory, GUEST)

    assert (code, out) == (1, "")
    assert re.fullmatch("lguest: .*MEM.*\n", err)


def test_more_arguments_than_the_kernel_takes_are_refused() -> None:
    code, out, err = lguest(MEM, GUEST, "x" * 5000)

    assert (code, out, err.count("\n")) == (1, "", 1)


def test_its_help_names_every_option_and_the_exit_statuses() -> None:
    code, out, err = lguest("--help")

    assert (code, err) == (0, "")
    for name in ("verbose", "tunnet", "block", "initrd", "rng", "username", "chroot"):
        assert f"  --{name}" in out or f", --{name}" in out
    assert "CRASH: Power down" in out


def test_it_is_installed() -> None:
    with Launch("--help", lgmp=(str(Path(sys.executable).parent / "lguest"),)) as launched:
        assert launched.end()[0] == 0
