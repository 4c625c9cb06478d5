"""Every message with which the original launcher ended, in the command `lguest`, for the same reason.

The formats are those of the C program (2.6.25; a few of 3.13 are named so). Each is provoked here from outside: by a
command line, by a file, or by what a guest does. What cannot come up, or deliberately does not end the guest, stands at
the end with the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from images import E_MACHINE, elf_image, spoiled
from launching import GUEST, MEM, UNPRIVILEGED, Launch, make_disk
from networks import GUEST_IP, HOST_IP, Namespace, needs

LGUEST = (sys.executable, "-P", "-m", "lgmp.lguest_cli")
SECTORS = 64
TAP = f"--tunnet={HOST_IP}"

_CONVERSIONS = {
    "s": ".+",
    "u": r"\d+",
    "i": r"-?\d+",
    "zu": r"\d+",
    "zi": r"-?\d+",
    "lu": r"\d+",
    "llu": r"\d+",
    "#lx": "0x[0-9a-f]+",
}


def expression(format_: str) -> str:
    """A regular expression for what printf would make of a format."""
    parts = re.split(r"%(#lx|llu|lu|zu|zi|[sui])", format_)
    return "".join(_CONVERSIONS[part] if number % 2 else re.escape(part) for number, part in enumerate(parts))


@dataclass
class Files:
    """The files of a test."""

    directory: Path

    def kernel(self, image: bytes) -> str:
        path = self.directory / "vmlinux"
        path.write_bytes(image)
        return str(path)

    def disk(self) -> str:
        return str(make_disk(self.directory / "disk.img", SECTORS))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def lguest(*words: str, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None) -> tuple[int, str, list[str]]:
    """Run `lguest` to its end: exit status, stdout, and the lines on stderr without "lguest: "."""
    with Launch(*words, lgmp=LGUEST, prefix=prefix, env=env) as launched:
        code, out, err = launched.end()
    lines = err.splitlines()
    assert all(line.startswith("lguest: ") for line in lines), err
    return code, out, [line.removeprefix("lguest: ") for line in lines]


# Of a command line and its files

Words = Callable[[Files], tuple[str, ...]]

REFUSED: list[tuple[str, Words]] = [
    ("Usage: lguest [--verbose] ", lambda files: ()),
    ("Usage: lguest [--verbose] ", lambda files: (MEM,)),
    ("Failed to open %s: No such file or directory", lambda files: (MEM, "/no/such/kernel")),
    ("Failed to open %s: No such file or directory", lambda files: ("--initrd=/no/such/initrd", MEM, GUEST)),
    ("Failed to open %s: No such file or directory", lambda files: ("--block=/no/such/disk", MEM, GUEST)),
    ("Reading kernel", lambda files: (MEM, str(files.directory))),
    ("Reading kernel", lambda files: (MEM, files.kernel(elf_image()[:20]))),
    ("Reading program headers", lambda files: (MEM, files.kernel(elf_image()[:60]))),
    ("Reading offset %lu len %lu gave %zi", lambda files: (MEM, files.kernel(elf_image()[:-10]))),
    ("Malformed elf header", lambda files: (MEM, files.kernel(spoiled(elf_image(), E_MACHINE, "<H", 62)))),
    ("This doesn't look like a bzImage to me", lambda files: (MEM, files.kernel(b"#!/bin/sh\n" * 100))),
    ("Too many devices", lambda files: (*["--rng"] * 30, MEM, GUEST)),
    ("must specify bridge name", lambda files: ("--tunnet=bridge:", MEM, GUEST)),
    # 3.13
    ("Failed to parse IP address '%s'", lambda files: ("--tunnet=192.168.19", MEM, GUEST)),
    ("Failed to parse mac address '%s'", lambda files: ("--tunnet=192.168.19.1:xyz", MEM, GUEST)),
    ("getpwnam failed, incorrect username?", lambda files: ("--username=no-such-user", MEM, GUEST)),
    ('chroot("%s") failed: No such file or directory', lambda files: ("--chroot=/no/such/directory", MEM, GUEST)),
]


@pytest.mark.parametrize(("format_", "words"), REFUSED, ids=[each[0] for each in REFUSED])
def test_what_cannot_start_ends_with_1_and_the_words_of_the_original(format_: str, words: Words, files: Files) -> None:
    code, out, lines = lguest(*words(files))

    assert (code, out, len(lines)) == (1, "", 1)
    assert re.search(expression(format_), lines[0]), lines


@pytest.mark.parametrize(
    ("format_", "option"),
    [
        ("(Failed to open|configuring) /dev/net/tun: ", TAP),
        # 3.13
        (r'chroot\("/"\) failed: Operation not permitted', "--chroot=/"),
        ("initgroups failed: Operation not permitted", "--username=root"),
    ],
)
def test_what_takes_root_ends_with_1_and_the_words_of_the_original(format_: str, option: str) -> None:
    code, out, lines = lguest(option, MEM, GUEST, prefix=UNPRIVILEGED)

    assert (code, out, len(lines)) == (1, "", 1)
    assert re.match(format_, lines[0]), lines
    assert "root" in lines[0]


def test_a_bridge_that_is_not_there_ends_with_1_and_the_words_of_the_original(here: Namespace) -> None:
    with here.entered():
        code, out, lines = lguest("--tunnet=bridge:br9", MEM, GUEST)

    assert (code, out, len(lines)) == (1, "", 1)
    assert re.match(expression("can't add %s to bridge %s"), lines[0]), lines
    assert here.interfaces() == []


def test_an_unknown_option_is_named_before_the_usage() -> None:
    code, out, lines = lguest("--no-such-option", MEM, GUEST)

    assert (code, out) == (1, "")
    assert lines[:2] == ["unrecognized option '--no-such-option'", "Unknown argument --no-such-option"]
    assert re.fullmatch(expression("Usage: lguest [--verbose] ") + ".*", lines[2])


# Of a guest

DISK = ("--block", "disk")

DIED: list[tuple[str, str, tuple[str, ...]]] = [
    # The original's reason began with the place in its own source; ours begins with the device, queue and descriptor.
    ("Invalid address %#lx", "misdeed outside", DISK),
    ("Invalid address %#lx", "misdeed past-end", DISK),
    ("Invalid address %#lx", "misdeed wrap-32", DISK),
    ("Desc next is %u", "misdeed next", DISK),
    ("Guest moved used index from %u to %u", "misdeed avail-jump", DISK),
    ("Guest says index %u is available", "misdeed head", DISK),
    ("Descriptor has out after in", "misdeed out-after-in", DISK),
    ("Looped descriptor", "misdeed loop", DISK),
    ("Looped descriptor", "misdeed self-loop@console", ()),
    ("Bad iovec size %zu for %s", "misdeed header-15", DISK),
    ("Bad iovec size %zu for %s", "misdeed status-2", DISK),
    ("Bad virtblk cmd %u out=%u in=%u", "misdeed no-status", DISK),
    ("Bad virtblk cmd %u out=%u in=%u", "misdeed no-header", DISK),
    ("Input buffers in output queue?", "misdeed writable-output", ()),
    ("Bad NOTIFY %#lx", "misdeed notify-limit", ()),
    ("Bad NOTIFY %#lx", "misdeed notify-top", ()),
    ("CRASH: out of cheese", "crash out of cheese", ()),
    ("CRASH: Power down", "poweroff", ()),
    # 3.13
    ("Invalid size for indirect buffer table", "misdeed indirect-length", DISK),
    ("Output buffers in rng?", "misdeed readable-input@rng", ("--rng",)),
]


@pytest.mark.parametrize(("format_", "commands", "options"), DIED, ids=[f"{each[0]}-{each[1]}" for each in DIED])
def test_a_guest_that_must_end_does_with_1_and_the_words_of_the_original(
    format_: str, commands: str, options: tuple[str, ...], files: Files
) -> None:
    options = tuple(files.disk() if word == "disk" else word for word in options)

    code, out, lines = lguest(*options, MEM, GUEST, f"quiet {commands}; echo alive")

    assert (code, len(lines)) == (1, 1), lines
    assert re.search(expression(format_), lines[0]), lines
    assert "alive" not in out


def test_a_readable_buffer_for_input_ends_a_guest_with_the_words_of_the_original() -> None:
    with (
        open("/dev/zero", "rb") as endless,
        Launch(MEM, GUEST, "quiet misdeed readable-input", lgmp=LGUEST, stdin=endless.fileno()) as launched,
    ):
        code, _out, err = launched.end()

    assert code == 1
    assert re.fullmatch(r"lguest: console: .*: Output buffers in console in queue\?\n", err)


def test_a_writable_frame_ends_a_guest_with_the_words_of_the_original(here: Namespace) -> None:
    with here.entered():
        code, _out, lines = lguest(TAP, MEM, GUEST, "quiet misdeed writable-output@net")

    assert code == 1
    assert re.fullmatch(r"eth0: queue 1: descriptor 0: Input buffers in output queue\?", lines[0])


def test_a_readable_buffer_for_frames_ends_a_guest_with_the_words_of_the_original(here: Namespace) -> None:
    needs("ping")
    with here.entered(), Launch(TAP, MEM, GUEST, "quiet misdeed readable-input@net", lgmp=LGUEST) as launched:
        launched.out.wait_for("misdeed readable-input")
        with subprocess.Popen(["ping", "-q", "-i", "0.2", GUEST_IP], stdout=subprocess.DEVNULL) as ping:
            code, _out, err = launched.end()
            ping.terminate()

    assert code == 1
    assert re.fullmatch(r"lguest: eth0: queue 0: descriptor \d+: Output buffers in network recv queue\?\n", err)


def test_a_reboot_that_finds_no_program_any_more_ends_with_the_words_of_the_original(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    # Python finds its packages by where it is, which is nowhere.
    path = os.pathsep.join((str(Path(__file__).parent.parent), sysconfig.get_path("purelib")))
    with Launch(
        *(MEM, GUEST, "quiet"),
        lgmp=(str(python), "-P", "-m", "lgmp.lguest_cli"),
        env={**os.environ, "PYTHONPATH": path},
    ) as launched:
        launched.wait_until_ready()
        python.unlink()
        launched.send("reboot\n")
        code, _out, err = launched.end()

    assert (code, err) == (1, f"lguest: Could not exec {python}: No such file or directory\n")


# What is said and ends nothing


def test_early_output_is_said_and_ignored(files: Files) -> None:
    code, out, lines = lguest("--block", files.disk(), MEM, GUEST, "quiet misdeed early; blk crc; poweroff")

    assert (code, lines) == (1, ["vda gave early output", "CRASH: Power down"])
    assert "blk crc: status 0" in out


def test_the_end_of_input_is_said() -> None:
    with Launch(MEM, GUEST, "quiet", lgmp=LGUEST) as launched:
        launched.wait_until_ready()
        launched.close_stdin()
        launched.err.wait_for("lguest: Failed to get console input, ignoring console.\n")


def test_scsi_commands_are_said_to_be_unsupported(files: Files) -> None:
    code, _out, lines = lguest("--block", files.disk(), MEM, GUEST, "quiet blk scsi; poweroff")

    assert (code, lines) == (1, ["vda: Scsi commands unsupported", "CRASH: Power down"])


ANSWERED = [
    ("Write past end %llu+%u", "misdeed write-past-end"),
    ("Write past end %llu+%u", "misdeed write-across-end"),
    ("Bad seek to sector %llu", "misdeed sector-negative"),
]


@pytest.mark.parametrize(("format_", "commands"), ANSWERED)
def test_what_is_beyond_a_disk_is_said_and_answered_as_an_error(format_: str, commands: str, files: Files) -> None:
    """The original ended the guest for it, as it could not tell the guest in another way; a real disk answers."""
    code, out, lines = lguest("--block", files.disk(), MEM, GUEST, f"quiet {commands}; echo alive; poweroff")

    assert (code, len(lines)) == (1, 2)
    assert re.search(expression(format_), lines[0]), lines
    assert "1 requests finished, status 1" in out and "alive" in out


# What is left of the original's list
NOT_HERE = {
    "Bad alignment %p for %s": "a header is read from wherever it lies",
    "Creating clone": "there are no threads for devices, but processes: `cannot start the worker of ...`",
    "Mmaping %u pages of /dev/zero": "guest memory is a memfd, and what is too much is refused by its size",
    "Not enough memory for devices": "the interrupts end first, at 31 queues of the 127 that there is memory for",
    "Resetting break": "/dev/lguest",
    "Running guest failed": "/dev/lguest",
    "Seeking to program headers": "an offset of 32 bits is always one that can be sought to",
    "Triggering irq %i": "/dev/lguest",
    "Writing to /dev/lguest": "/dev/lguest",
    "Bringing interface %s up": "who may make a tap may do that",
    "Setting %s interface address": "what no interface can have is refused before",
    "getting hw address for %s": "it is chosen, not asked for",
    "interface %s does not exist!": "it was made the moment before",
    "opening IP socket": "there is none: netlink",
    "reading network": "a tap that is gone is said, and the guest goes on without it",
    "forking": "there is no waker process",
    "fstat() on initrd '%s'": "what is open can be asked for its size",
}


# Those that have a test of their own above.
BY_THEMSELVES = {
    "Could not exec %s",
    "Output buffers in console in queue?",
    "Output buffers in network recv queue?",
    "can't add %s to bridge %s",
    "configuring /dev/net/tun",
}

# All of 2.6.25, sorted. Of `%s:%i: Invalid address` the part that is for people; `%s` is the reason of a death.
FATAL = """
%s
Bad NOTIFY %#lx
Bad alignment %p for %s
Bad iovec size %zu for %s
Bad seek to sector %llu
Bad virtblk cmd %u out=%u in=%u
Bringing interface %s up
Could not exec %s
Creating clone
Desc next is %u
Descriptor has out after in
Failed to open %s
Guest moved used index from %u to %u
Guest says index %u is available
Input buffers in output queue?
Invalid address %#lx
Looped descriptor
Malformed elf header
Mmaping %u pages of /dev/zero
Not enough memory for devices
Output buffers in console in queue?
Output buffers in network recv queue?
Reading kernel
Reading offset %lu len %lu gave %zi
Reading program headers
Resetting break
Running guest failed
Seeking to program headers
Setting %s interface address
This doesn't look like a bzImage to me
Too many devices
Triggering irq %i
Usage: lguest [--verbose]
Write past end %llu+%u
Writing to /dev/lguest
can't add %s to bridge %s
configuring /dev/net/tun
forking
fstat() on initrd '%s'
getting hw address for %s
interface %s does not exist!
must specify bridge name
opening IP socket
reading network
"""


def test_every_fatal_message_of_the_original_has_its_place() -> None:
    """Provoked, or with the reason why not; never both."""
    provoked = (
        BY_THEMSELVES | {each[0] for each in REFUSED} | {each[0] for each in DIED} | {each[0] for each in ANSWERED}
    )
    placed = {format_.strip().removesuffix(": No such file or directory") for format_ in provoked}
    placed |= {"%s" if format_.startswith("CRASH: ") else format_ for format_ in placed}

    fatal = FATAL.strip().splitlines()
    assert [format_ for format_ in fatal if format_ not in placed | set(NOT_HERE)] == []
    assert not placed & set(NOT_HERE)
    assert set(NOT_HERE) <= set(fatal)
