"""How `lgmp run` ends: its exit status, its one line on stderr, and that it leaves nothing behind."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import (
    GUEST,
    LGMP,
    MEM,
    PROMPT,
    Launch,
    Terminal,
    command_line,
    launch,
    lines_of,
    make_disk,
    prompt,
    run,
    session_processes,
    wait_until,
)

pytestmark = pytest.mark.every_host

ENDING_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]


def bytes_waiting(descriptor: int) -> int:
    """How much could be read."""
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


@pytest.fixture
def unread_pipe() -> Iterator[tuple[int, int]]:
    """The ends, for reading and writing, of a pipe that is full as soon as there is anything in it."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def failure(*arguments: str) -> str:
    """The one line with which lgmp refuses these arguments; it must end with 1 and without a traceback."""
    with Launch(*arguments) as launched:
        code, out, err = launched.end()
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lgmp: "), err
    return lines[0].removeprefix("lgmp: ")


# The guest's own ends


def test_a_guest_that_powers_off_ends_with_0_and_silence() -> None:
    assert run("quiet echo hello; poweroff") == (0, "hello\n", "")


def test_a_guest_that_crashes_ends_with_1_and_its_reason() -> None:
    assert run("quiet crash out of cheese") == (1, "", "lgmp: CRASH: out of cheese\n")


def test_all_output_before_a_crash_is_there() -> None:
    code, out, _err = run("quiet console lines 200 70; crash now")

    assert code == 1
    assert len(out.splitlines()) == 201


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("\x1b[2Jred\x07", "\\x1b[2Jred\\x07"),
        ("two\nlines\r\nand more", "two lines and more"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u202eevil", "\\x202eevil"),
    ],
)
def test_a_reason_is_one_line_that_no_terminal_obeys(reason: str, line: str) -> None:
    code, _out, err = run(f"quiet crash {reason}")

    assert code == 1
    assert err == f"lgmp: CRASH: {line}\n"


def test_a_reason_of_any_bytes_is_one_line() -> None:
    with Launch("run", MEM, GUEST, os.fsdecode(b"quiet crash \xff\xfe\x80" + b"x" * 200)) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert err.startswith("lgmp: CRASH: ") and err.count("\n") == 1 and err.isprintable() is False
    assert err.rstrip("\n").isprintable()


# Signals


@pytest.mark.parametrize("number", ENDING_SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_guest_that_sleeps(number: signal.Signals, tmp_path: Path) -> None:
    with prompt("--block", str(make_disk(tmp_path / "disk.img"))) as launched:
        launched.signal(number)
        code, _out, err = launched.end()

    assert (code, err) == (128 + number, "")


@pytest.mark.parametrize("command", ["spin 1000", "misdeed deaf", "misdeed halt-blocked", "console lines 1000000 60"])
def test_a_signal_ends_a_guest_whatever_it_does(command: str) -> None:
    with launch(f"quiet echo ready; {command}") as launched:
        launched.out.wait_for("ready")
        launched.signal(signal.SIGTERM)
        code, _out, err = launched.end()

    assert (code, err) == (128 + signal.SIGTERM, "")


def test_what_the_guest_printed_before_a_signal_is_there() -> None:
    with prompt() as launched:
        launched.send("console lines 3 20\n")
        launched.out.wait_for(PROMPT, times=2)
        launched.signal(signal.SIGTERM)
        _code, out, _err = launched.end()

    assert "console lines: 3 done" in out


def test_a_signal_ends_a_guest_whose_output_nobody_reads(unread_pipe: tuple[int, int]) -> None:
    reading, writing = unread_pipe
    with launch("quiet console lines 100000 80", stdout=writing) as launched:
        wait_until(lambda: bytes_waiting(reading), "the pipe full")
        launched.signal(signal.SIGTERM)
        code, _out, err = launched.end()

    assert (code, err) == (128 + signal.SIGTERM, "")


def test_one_signal_is_enough_where_a_worker_is_stuck_and_its_mailbox_full(tmp_path: Path) -> None:
    with prompt("--block", str(make_disk(tmp_path / "disk.img"))) as launched:
        os.kill(launched.workers()["vda"], signal.SIGSTOP)
        # Its requests stay unanswered, and its mailbox takes fewer kicks than these.
        launched.send("poll on\n" + "misdeed same-head; " * 3 + "\n")
        launched.out.wait_for("misdeed same-head\r\n" if launched.terminal else "misdeed same-head\n")
        launched.signal(signal.SIGTERM)
        code, _out, err = launched.end()

    assert (code, err) == (128 + signal.SIGTERM, "")


def test_a_signal_ends_a_guest_that_prints_early_to_nobody(unread_pipe: tuple[int, int]) -> None:
    reading, writing = unread_pipe
    with launch("noconsole quiet console lines 100000 80", stdout=writing) as launched:
        wait_until(lambda: bytes_waiting(reading), "the pipe full")
        launched.signal(signal.SIGTERM)
        code, _out, err = launched.end()

    assert (code, err) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("ending", ["poweroff", "reboot"])
def test_a_signal_counts_while_a_worker_keeps_the_end_waiting(ending: str) -> None:
    with launch(f"noconsole quiet echo ready; idle 1; echo away; {ending}", "-v") as launched:
        launched.out.wait_for("ready")
        wait_until(lambda: "console" in launched.workers(), "the console's worker")
        os.kill(launched.workers()["console"], signal.SIGSTOP)
        launched.err.wait_for("powered off" if ending == "poweroff" else "reboot")
        launched.signal(signal.SIGTERM)
        code, out, _err = launched.end()

    assert code == 128 + signal.SIGTERM
    assert out.count("ready") == 1


def test_a_signal_at_any_moment_of_the_start_leaves_nothing() -> None:
    codes = set()
    for step in range(16):
        with launch("quiet") as launched:
            time.sleep(step * 0.015)  # any moment will do
            launched.signal(signal.SIGTERM)
            code, _out, err = launched.end()
        codes.add(code)
        assert "Traceback" not in err

    # Killed before it could do anything about it, or ended in order.
    assert codes <= {-signal.SIGTERM, 128 + signal.SIGTERM}


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    with launch("quiet", prefix=("env", "--ignore-signal=HUP")) as launched:
        launched.out.wait_for(PROMPT)
        launched.signal(signal.SIGHUP)
        launched.send("echo still here; poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert "still here\n" in out


def test_an_ignored_hangup_stays_ignored_across_a_reboot() -> None:
    with launch("quiet", prefix=("env", "--ignore-signal=HUP")) as launched:
        launched.out.wait_for(PROMPT)
        launched.send("reboot\n")
        launched.out.wait_for(PROMPT, times=2)
        launched.signal(signal.SIGHUP)
        launched.send("poweroff\n")
        code, _out, _err = launched.end()

    assert code == 0


# Arguments


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("walk",),
        ("run",),
        ("run", MEM),
        ("run", MEM, GUEST, "--no-such-option"),
        ("run", MEM, GUEST, "--host", "moon"),
        ("run", MEM, GUEST, "--block"),
        ("demo", "extra"),
        ("doctor", "extra"),
    ],
)
def test_wrong_usage_ends_with_1_the_usage_and_a_line(arguments: tuple[str, ...]) -> None:
    with Launch(*arguments) as launched:
        code, out, err = launched.end()

    assert (code, out) == (1, "")
    usage, line = err.splitlines()
    assert usage.startswith("usage: lgmp")
    assert line.startswith("lgmp: ")


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("demo", "--help"), ("doctor", "--help")])
def test_help_ends_with_0(arguments: tuple[str, ...]) -> None:
    with Launch(*arguments) as launched:
        code, out, err = launched.end()

    assert (code, err) == (0, "")
    assert out.startswith("usage: lgmp")


@pytest.mark.parametrize(
    "size", ["0", "-1", "1", "64K", "many", "", "4096M", "5G", "99999999999999999999", "0x40", "٣٢"]
)
def test_memory_that_no_guest_can_have_is_refused_in_one_line(size: str) -> None:
    assert "MEM" in failure("run", size, GUEST)


@pytest.mark.parametrize("size", ["16", "16M", "0016"])
def test_memory_is_mebibytes(size: str) -> None:
    with Launch("run", size, GUEST, "mem; poweroff") as launched:
        code, out, _err = launched.end()

    assert code == 0
    assert f"mem: {16 << 20} bytes" in out


def test_a_name_must_be_printable() -> None:
    assert "--name" not in failure("run", "--name", "a\nb", MEM, GUEST)


def test_a_message_about_a_strange_file_name_is_one_line() -> None:
    assert "\\x0a\\x1b[2J" in failure("run", MEM, GUEST, "--block", "/no\n\x1b[2Jsuch/disk")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (("args; poweroff",), "args; poweroff"),
        (("quiet", "args;", "poweroff"), "quiet args; poweroff"),
        (("--", "args;", "--block=x", "-v;", "poweroff"), "args; --block=x -v; poweroff"),
        (("quiet", "--name", "me", "args; poweroff"), "quiet args; poweroff"),
        (("root=/dev/vda", "--", "args; poweroff"), "root=/dev/vda args; poweroff"),
    ],
)
def test_kernel_arguments_arrive_as_they_are(words: tuple[str, ...], arguments: str) -> None:
    with Launch("run", MEM, GUEST, *words) as launched:
        code, out, _err = launched.end()

    assert code == 0
    assert f"args: {arguments}\n" in out


# Images


def broken_images(directory: Path) -> dict[str, tuple[str, ...]]:
    """Arguments after `run`, none of which can work."""
    good = Path(GUEST).read_bytes()

    def image(name: str, data: bytes) -> str:
        path = directory / name
        path.write_bytes(data)
        return str(path)

    large = directory / "large"
    with large.open("wb") as file:
        file.truncate(32 << 20)
    return {
        "missing": (MEM, "/no/such/kernel"),
        "directory": (MEM, str(directory)),
        "device": (MEM, "/dev/null"),
        "empty": (MEM, image("empty", b"")),
        "text": (MEM, image("text", b"#!/bin/sh\necho hello\n")),
        "header only": (MEM, image("header", good[:52])),
        "truncated": (MEM, image("truncated", good[: len(good) // 2])),
        "64 bit": (MEM, "/proc/self/exe"),
        "entry outside": (MEM, image("entry", good[:24] + b"\xff\xff\xff\xff" + good[28:])),
        "too little memory": ("1", GUEST),
        "initrd missing": (MEM, GUEST, "--initrd", "/no/such/initrd"),
        "initrd too large": (MEM, GUEST, "--initrd", str(large)),
        "initrd a directory": (MEM, GUEST, "--initrd", str(directory)),
        "arguments too long": (MEM, GUEST, "x" * 5000),
    }


def test_what_cannot_be_booted_is_refused_in_one_line(tmp_path: Path) -> None:
    for what, arguments in broken_images(tmp_path).items():
        line = failure("run", *arguments)

        assert line, what


def test_an_initrd_reaches_the_guest(tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x" * 5000)

    code, out, _err = run("mem; poweroff", "--initrd", str(initrd))

    assert code == 0
    assert "initrd 8192 bytes" in out  # whole pages, as every lguest launcher has it


@pytest.mark.parametrize("name", [b"\xff\xfe.elf", "käse.elf".encode(), b"two  words.elf", b"-v", b"new\nline"])
def test_a_kernel_and_a_disk_may_have_any_name(name: bytes, tmp_path: Path) -> None:
    kernel = os.path.join(os.fsencode(tmp_path), name)
    os.symlink(GUEST, kernel)
    disk = kernel + b".img"
    Path(os.fsdecode(disk)).write_bytes(bytes(1 << 16))

    with Launch("run", MEM, os.fsdecode(kernel), "--block", os.fsdecode(disk), "quiet blk crc; poweroff") as launched:
        code, out, err = launched.end()

    assert (code, err) == (0, "")
    assert "blk crc: status 0 sectors 128" in out


# What it says while it runs


def test_ps_shows_what_each_process_is(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    with prompt("--block", str(disk), "--name", "testing") as launched:
        launcher = command_line(launched.pid)
        workers = {name: command_line(pid) for name, pid in launched.workers().items()}

    assert launcher == "lgmp: testguest.elf 16M (testing)"
    assert workers == {
        "vda": f"lgmp-block vda {disk} (guest testing)",
        "console": "lgmp-console console (guest testing)",
    }


def test_there_is_one_process_for_the_guest_and_one_for_each_device(tmp_path: Path) -> None:
    disks = [make_disk(tmp_path / f"{number}.img") for number in range(2)]
    with prompt(*(word for disk in disks for word in ("--block", str(disk)))) as launched:
        parents = {
            pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            for pid in session_processes(launched.session)
        }
        workers = launched.workers()

    assert sorted(workers) == ["console", "vda", "vdb"]
    assert sorted(parents) == sorted([launched.pid, *workers.values()])
    assert {parents[pid] for pid in workers.values()} == {launched.pid}


def test_the_kernel_host_is_refused_with_the_remedy() -> None:
    assert "--host embedded" in failure("run", "--host", "kernel", MEM, GUEST)


def test_the_embedded_host_can_be_asked_for() -> None:
    assert run("quiet echo hello; poweroff", "--host", "embedded") == (0, "hello\n", "")


def test_python_modules_in_the_current_directory_are_not_imported(tmp_path: Path) -> None:
    for name in ("lgmp", "workers", "msgpack", "posix_ipc", "select", "getopt", "setproctitle", "site"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a trap')\n")

    with Launch(
        "run", MEM, GUEST, "quiet echo hello; poweroff", cwd=tmp_path, lgmp=(str(Path(LGMP[0]).parent / "lgmp"),)
    ) as launched:
        assert launched.end() == (0, "hello\n", "")


def test_on_a_terminal_the_last_line_begins_at_its_left_edge() -> None:
    with Terminal() as terminal, launch("quiet crash ouch", terminal=terminal) as launched:
        code, _out, _err = launched.end()
        terminal.out.wait_for("ouch")

    assert code == 1
    assert lines_of(terminal.out.text) == ["lgmp: CRASH: ouch"]
