"""The console of a running guest: on pipes and files, on terminals, and on nothing at all."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import (
    GUEST,
    LGMP,
    MEM,
    PROMPT,
    Launch,
    Terminal,
    checksum,
    launch,
    lines_of,
    make_disk,
    prompt,
    run,
    session_processes,
    wait_until,
)

pytestmark = pytest.mark.every_host

INPUT_LOST = "lgmp: Failed to get console input, ignoring console.\n"
OUTPUT_LOST = "lgmp: Failed to write console output (Broken pipe), it is discarded.\n"


def numbered_lines(count: int, length: int) -> str:
    """What the guest's `console lines` prints."""
    text = []
    for i in range(count):
        line = f"line {i:08} "
        text.append(line + "".join(chr(ord("a") + (i + n) % 26) for n in range(len(line), length)))
    return "".join(f"{line}\n" for line in [*text, f"console lines: {count} done"])


# Output


def test_much_output_comes_whole_and_in_order() -> None:
    code, out, _err = run("quiet console lines 10000 70; poweroff")

    assert code == 0
    assert out == numbered_lines(10000, 70)


def test_output_comes_whole_when_its_reader_is_slow() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with launch("quiet console lines 2000 70; poweroff", stdout=writing) as launched:
        os.close(writing)
        out = bytearray()
        while data := os.read(reading, 97):
            out += data
        code, _out, _err = launched.end()
    os.close(reading)

    assert code == 0
    assert out.decode() == numbered_lines(2000, 70)


def test_output_goes_to_a_file_behind_what_is_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with log.open("a") as file:
        code, _out, _err = run("quiet console lines 100 70; poweroff", stdout=file.fileno())

    assert code == 0
    assert log.read_text() == "before\n" + numbered_lines(100, 70)


def test_early_output_comes_whole_and_in_order() -> None:
    code, out, _err = run("noconsole quiet console lines 1000 70; poweroff")

    assert code == 0
    assert out == numbered_lines(1000, 70)


def test_a_reader_that_goes_away_ends_nothing() -> None:
    reading, writing = os.pipe()
    with launch("quiet console lines 5000 70; poweroff", stdout=writing) as launched:
        os.close(writing)
        assert os.read(reading, 5) == b"line "
        os.close(reading)
        code, _out, err = launched.end()

    assert (code, err) == (0, OUTPUT_LOST)


def test_early_output_to_a_reader_that_went_away_ends_nothing() -> None:
    reading, writing = os.pipe()
    with launch("noconsole quiet console lines 5000 70; poweroff", stdout=writing) as launched:
        os.close(writing)
        assert os.read(reading, 5) == b"line "
        os.close(reading)
        code, _out, err = launched.end()

    assert (code, err) == (0, "")


def test_a_full_disk_loses_output_and_ends_nothing() -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        code, _out, err = run("quiet console lines 100 70; poweroff", stdout=full.fileno())

    assert code == 0
    assert err == "lgmp: Failed to write console output (No space left on device), it is discarded.\n"


def test_messages_that_nobody_can_have_end_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code, out, _err = run("quiet blk id; echo hello; poweroff", "-v", stderr=writing)
    os.close(writing)

    assert (code, out) == (0, "blk: no disk 0\nhello\n")


# What is closed from the start


def closed(redirection: str) -> tuple[str, ...]:
    """A prefix that closes a descriptor."""
    return ("sh", "-c", f'exec "$@" {redirection}', "sh")


def test_without_stdin_the_guest_has_no_input(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    before = disk.read_bytes()

    code, out, err = run("quiet blk crc; poweroff", "--block", str(disk), prefix=closed("<&-"))

    assert (code, err) == (0, INPUT_LOST)
    assert out == f"blk crc: status 0 sectors 64 checksum {checksum(before)}\n"


@pytest.mark.parametrize("commands", ["console lines 100 70", "misdeed early; misdeed notify-last"])
@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_what_is_printed_to_a_closed_descriptor_reaches_no_disk(
    redirection: str, commands: str, tmp_path: Path
) -> None:
    disks = [make_disk(tmp_path / f"{number}.img") for number in range(2)]
    before = [disk.read_bytes() for disk in disks]

    code, out, err = run(
        f"quiet {commands}; blk -d 1 id; poweroff",
        *("-v", "--block", str(disks[0]), "--block", str(disks[1])),
        prefix=closed(redirection),
    )

    assert code == 0
    assert [disk.read_bytes() for disk in disks] == before
    assert ("blk id: status 0" in out) == (redirection == "2>&-")
    assert ("powered off" in err) == (redirection in (">&-", "<&- >&-"))


def test_a_failure_without_stderr_still_ends_with_1() -> None:
    assert run("quiet crash", prefix=closed("2>&-")) == (1, "", "")


# Input


def test_what_is_piped_in_reaches_the_guest_in_order() -> None:
    data = bytes(1 + i * 7 % 250 for i in range(60000))
    with prompt() as launched:
        launched.send(f"console read {len(data)}\n")
        launched.out.wait_for("waiting for")
        launched.send(data)
        launched.out.wait_for("checksum")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert f"console read: {len(data)} bytes, checksum {checksum(data)}\n" in out


def test_input_goes_in_while_output_comes_out() -> None:
    text = "".join(f"echoed {number}\n" for number in range(2000))
    with prompt() as launched:
        writer = threading.Thread(target=launched.send, args=(f"console cat\n{text}\x04poweroff\n",))
        writer.start()
        code, out, _err = launched.end()
        writer.join()

    assert code == 0
    assert text in out
    assert f"console cat: {len(text)} bytes" in out


def test_a_file_can_be_the_input(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo one\necho two\npoweroff\n")
    with script.open() as file:
        code, out, _err = run("quiet", stdin=file.fileno())

    assert code == 0
    assert "\none\n" in out and "\ntwo\n" in out


def test_the_guest_goes_on_after_the_end_of_input() -> None:
    with launch("quiet echo started; console lines 10 20; idle 1; echo still here; poweroff") as launched:
        launched.out.wait_for("started")
        launched.close_stdin()
        code, out, err = launched.end()

    assert code == 0
    assert "still here\n" in out
    assert err in ("", INPUT_LOST)


def test_the_end_of_input_is_said_once() -> None:
    with prompt() as launched:
        launched.close_stdin()
        launched.err.wait_for(INPUT_LOST)
        launched.signal(signal.SIGTERM)
        _code, _out, err = launched.end()

    assert err == INPUT_LOST


def test_a_console_that_is_reset_loses_no_output_and_still_takes_input() -> None:
    with prompt() as launched:
        launched.send("console lines 50 70; console reset; console lines 50 70; console reset; echo up\n")
        launched.out.wait_for("\nup\n")
        launched.send("echo typed; poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    reset = "console reset: up again\n"
    assert numbered_lines(50, 70) + reset + numbered_lines(50, 70) + reset + "up\n" in out
    assert "\ntyped\n" in out


# Terminals


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as made:
        yield made


def test_keys_are_the_guests_while_it_runs(terminal: Terminal) -> None:
    with prompt(terminal=terminal) as launched:
        assert terminal.raw
        terminal.type("echo a\x7fb\r")
        terminal.out.wait_for("\nb\r\n")
        terminal.type("\x03")
        terminal.out.wait_for("^C")
        terminal.type("poweroff\r")

        assert launched.wait() == 0


def three_interrupts(launched: Launch) -> None:
    for count in range(3):
        assert launched.terminal is not None
        launched.terminal.type("\x03")
        if count < 2:
            launched.out.wait_for("^C", times=count + 1)


def kill_worker(number: int) -> Callable[[Launch], None]:
    def kill(launched: Launch) -> None:
        os.kill(launched.workers()["console"], number)

    return kill


# How it ends, what does it, the exit status.
ENDINGS: dict[str, tuple[Callable[[Launch], None], int]] = {
    "power-off": (lambda launched: typed(launched, "poweroff\r"), 0),
    "crash": (lambda launched: typed(launched, "crash ouch\r"), 1),
    "death": (lambda launched: typed(launched, "misdeed triple-fault\r"), 1),
    "ring": (lambda launched: typed(launched, "misdeed head@console\r"), 1),
    "three ^C": (three_interrupts, 2),
    "SIGTERM": (lambda launched: launched.signal(signal.SIGTERM), 128 + signal.SIGTERM),
    "SIGINT": (lambda launched: launched.signal(signal.SIGINT), 128 + signal.SIGINT),
    "SIGHUP": (lambda launched: launched.signal(signal.SIGHUP), 128 + signal.SIGHUP),
    "SIGQUIT": (lambda launched: launched.signal(signal.SIGQUIT), 128 + signal.SIGQUIT),
    "worker killed": (kill_worker(signal.SIGKILL), 1),
    "worker crashed": (kill_worker(signal.SIGSEGV), 1),
    "worker terminated": (kill_worker(signal.SIGTERM), 1),
}


def typed(launched: Launch, keys: str) -> None:
    assert launched.terminal is not None
    launched.terminal.type(keys)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_terminal_has_its_modes_back_after(ending: str, terminal: Terminal) -> None:
    act, status = ENDINGS[ending]
    before = terminal.modes()
    with prompt("--on-crash", "stop", "--on-device-error", "die", terminal=terminal) as launched:
        assert terminal.raw
        act(launched)
        code, _out, _err = launched.end()

    assert code == status
    assert terminal.modes() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_console_whose_worker_is_killed_goes_on_and_the_terminal_stays_raw(number: int, terminal: Terminal) -> None:
    before = terminal.modes()
    with prompt(terminal=terminal) as launched:
        killed = launched.workers()["console"]
        os.kill(killed, number)
        terminal.out.wait_for(
            f"lgmp: worker console (pid {killed}) was killed by {signal.Signals(number).name}; started"
        )
        launched.command("echo still here")
        assert terminal.raw
        assert launched.workers()["console"] != killed
        terminal.type("poweroff\r")
        code, out, _err = launched.end()

    assert code == 0
    assert out.count("still here") == 2  # typed, and said
    assert terminal.modes() == before


def test_the_terminal_has_its_modes_back_after_the_launcher_is_killed(terminal: Terminal) -> None:
    before = terminal.modes()
    with prompt(terminal=terminal) as launched:
        launched.signal(signal.SIGKILL)
        launched.wait()
        launched.wait_until_nothing_is_left()

    assert terminal.modes() == before


def test_a_script_has_its_terminal_back_after_the_launcher_is_killed(terminal: Terminal) -> None:
    before = terminal.modes()
    # The session's leader lives on, so the terminal stays what it was.
    with prompt(terminal=terminal, prefix=("sh", "-c", '"$@"; echo "status $?"; read line', "sh")) as launched:
        launcher = next(
            pid for pid, line in session_processes(launched.session).items() if line.startswith("lgmp: testguest")
        )
        os.kill(launcher, signal.SIGKILL)
        terminal.out.wait_for("status 137")
        wait_until(lambda: len(session_processes(launched.session)) == 1, "only the shell left")
        wait_until(lambda: terminal.modes() == before, "the modes restored")


def test_the_terminal_is_raw_again_after_a_reboot_and_restored_at_the_end(terminal: Terminal) -> None:
    before = terminal.modes()
    with prompt(terminal=terminal) as launched:
        terminal.type("reboot\r")
        terminal.out.wait_for(PROMPT, times=2)
        assert terminal.raw
        terminal.type("poweroff\r")
        assert launched.wait() == 0

    assert terminal.modes() == before


def test_a_failure_to_start_leaves_the_terminal_as_it_was(terminal: Terminal) -> None:
    before = terminal.modes()
    with Launch("run", MEM, "/dev/null", terminal=terminal) as launched:
        assert launched.wait() == 1

    assert terminal.modes() == before


def test_a_terminal_that_changes_its_size_all_the_time_changes_nothing_else(terminal: Terminal) -> None:
    with prompt(terminal=terminal) as launched:
        terminal.type("console lines 2000 70\r")
        for count in range(500):
            terminal.resize(24 + count % 7, 80 + count % 13)
        terminal.out.wait_for(PROMPT, times=2)
        terminal.type("poweroff\r")
        assert launched.wait() == 0

    assert numbered_lines(2000, 70) in "".join(f"{line}\n" for line in lines_of(terminal.out.text))


def test_two_interrupts_are_the_guests(terminal: Terminal) -> None:
    with prompt(terminal=terminal) as launched:
        for count in range(2):
            terminal.type("\x03")
            terminal.out.wait_for("^C", times=count + 1)
        terminal.type("x\x03")
        terminal.out.wait_for("^C", times=3)
        terminal.type("poweroff\r")

        assert launched.wait() == 0


def test_three_interrupts_end_a_guest_that_takes_no_input(terminal: Terminal) -> None:
    with launch("quiet echo ready; misdeed deaf", terminal=terminal) as launched:
        terminal.out.wait_for("misdeed deaf")
        wait_until(lambda: "console" in launched.workers(), "the console's worker")
        # Each in a read of its own, and nothing says when it was read: they are typed until it is so.
        while session_processes(launched.session):
            terminal.type("\x03")
            os.sched_yield()
        code, out, _err = launched.end()

    assert code == 2
    assert "Traceback" not in out


def test_a_terminal_that_goes_away_ends_the_guest() -> None:
    # As when the window is closed: the terminal's last user has gone, and the session gets SIGHUP.
    master, slave = os.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", *LGMP, "run", MEM, GUEST, "quiet"], stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    seen = b""
    while PROMPT.encode() not in seen:
        seen += os.read(master, 1000)
    os.close(master)

    code = process.wait(60)

    assert code == 128 + signal.SIGHUP
    assert session_processes(process.pid) == {}
    assert re.search(rb"Traceback", seen) is None
