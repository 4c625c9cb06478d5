"""`lgmp top` on a terminal: what is on the screen, and that the terminal is given back however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest
from launching import LGMP, Launch, Terminal, make_disk, prompt, session_processes, wait_until

from lgmp.watching.top import Rates

ROWS, COLUMNS = 24, 80
HEADINGS = ["PID", "NAME", "STATE", "REQ/s", "IN/s", "OUT/s", "KICK/s", "INT/s", "FLY", "CPU%", "MEM", "RST", "ERR"]
WORK = "console lines 10000000 70"
# The sequences that switch to a screen of our own and back, and that hide the cursor and show it.
ENTER, LEAVE, HIDE, SHOW = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25l", "\x1b[?25h"


@pytest.fixture(autouse=True)
def surroundings(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime directory of the test's own, and a terminal's name."""
    # What pyte is.
    monkeypatch.setenv("TERM", "linux")
    # As left behind by another terminal.
    monkeypatch.setenv("LINES", "33")
    monkeypatch.setenv("COLUMNS", "99")


class Screen:
    """What a terminal shows."""

    def __init__(self, terminal: Terminal, rows: int = ROWS, columns: int = COLUMNS) -> None:
        self._terminal = terminal
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._fed = 0
        terminal.resize(rows, columns)

    def lines(self) -> list[str]:
        """The lines of the screen, blanks at their ends left out."""
        data = self._terminal.out.data
        self._stream.feed(data[self._fed :])
        self._fed = len(data)
        return [line.rstrip() for line in self._screen.display]

    def resize(self, rows: int, columns: int) -> None:
        self.lines()
        self._screen.resize(rows, columns)
        self._terminal.resize(rows, columns)

    def row(self, name: str) -> dict[str, str]:
        """The row of a worker by its headings; empty where there is none (whole)."""
        for line in self.lines():
            words = line.split()
            if len(words) == len(HEADINGS) and words[1] == name:
                return dict(zip(HEADINGS, words, strict=True))
        return {}

    def wait_for(self, pattern: str) -> None:
        """Until some line has it."""
        wait_until(lambda: any(re.search(pattern, line) for line in self.lines()), pattern)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as made:
        yield made


@pytest.fixture
def xterm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal that has a screen for programs and one for the shell."""
    monkeypatch.setenv("TERM", "xterm")
    with Terminal() as made:
        yield made


def top(terminal: Terminal, *words: str | int) -> Launch:
    """`lgmp top` on a terminal."""
    return Launch("top", *map(str, words), terminal=terminal)


def assert_given_back(terminal: Terminal, modes: list[object]) -> None:
    """The terminal is as it was: its modes, its screen, its cursor."""
    assert terminal.modes() == modes
    text = terminal.out.text
    assert text.count(ENTER) == text.count(LEAVE) == 1
    assert text.rindex(SHOW) > text.rindex(HIDE)


# What it shows


@pytest.mark.every_host
def test_a_guest_at_work_and_its_workers_are_on_the_screen(terminal: Terminal, tmp_path: Path) -> None:
    with prompt("--name", "busy one", "--block", str(make_disk(tmp_path / "d")), "--rng") as launched:
        launched.send(f"{WORK}\n")
        screen = Screen(terminal)
        with top(terminal, launched.pid):
            screen.wait_for("busy one")
            wait_until(lambda: screen.row("console").get("REQ/s", "-") not in ("-", "0"), "requests a second")
            lines, console, disk = screen.lines(), screen.row("console"), screen.row("vda")
            workers = launched.workers()
            terminal.type("q")

    assert lines[0].startswith("lgmp top: 1 guest, ") and "q: quit" in lines[0]
    assert lines[1].split() == HEADINGS
    assert re.fullmatch(rf" *{launched.pid} busy one  running  up \S+  16M \w+ +[\d.]+ +\w+", lines[2])
    assert [line.split()[1] for line in lines[3:6]] == ["vda", "rng0", "console"]
    assert lines[6:] == [""] * (ROWS - 6)
    assert (int(console["PID"]), console["STATE"], console["RST"]) == (workers["console"], "running", "0")
    assert console["KICK/s"] != "0" and console["OUT/s"] != "0"
    assert re.fullmatch(r"\d+\.\d|\d{3}", console["CPU%"])
    assert (disk["REQ/s"], disk["IN/s"], disk["FLY"]) == ("0", "0", "0")


def test_a_column_is_where_its_heading_is(terminal: Terminal) -> None:
    with prompt() as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid):
            wait_until(lambda: screen.row("console").get("CPU%", "-") != "-", "a row")
            lines = screen.lines()
            terminal.type("q")

    (row,) = [line for line in lines if line.split()[1:2] == ["console"]]
    assert len(lines[1]) == len(row) <= COLUMNS
    for heading in ("PID", *HEADINGS[3:]):
        end = lines[1].index(heading) + len(heading)
        assert row[end - 1] != " " and row[end : end + 1] in ("", " ")


def test_a_worker_that_was_replaced_is_seen_at_once(terminal: Terminal) -> None:
    with prompt() as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid):
            wait_until(lambda: screen.row("console"), "a row")
            os.kill(launched.workers()["console"], signal.SIGKILL)
            wait_until(lambda: screen.row("console").get("RST") == "1", "restarted")
            wait_until(lambda: screen.row("console").get("PID") == str(launched.workers()["console"]), "its pid")


def test_a_device_that_is_out_of_order_is_shown_with_what_went_wrong(terminal: Terminal, tmp_path: Path) -> None:
    with prompt("--block", str(make_disk(tmp_path / "d"))) as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid):
            launched.send("misdeed loop\n")
            screen.wait_for("vda +broken")
            screen.wait_for("Looped descriptor")


def test_a_paused_guest_is_shown_to_be(terminal: Terminal) -> None:
    with prompt() as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid):
            screen.wait_for(" running  up ")
            subprocess.run([*LGMP, "pause", str(launched.pid)], check=True)
            screen.wait_for(" paused  up ")


def test_guests_come_and_go(terminal: Terminal) -> None:
    screen = Screen(terminal, 200, COLUMNS)
    with top(terminal):
        with prompt("--name", "first") as first:
            screen.wait_for(f"{first.pid} first  ")
            with prompt("--name", "second") as second:
                screen.wait_for(f"{second.pid} second  ")
                screen.wait_for(f"{first.pid} first  ")
        wait_until(lambda: not any(" first  " in line for line in screen.lines()), "the first gone")
        wait_until(lambda: not any(" second  " in line for line in screen.lines()), "the second gone")
        terminal.type("q")


def test_a_launcher_that_does_not_answer_is_shown_not_to_and_the_keys_still_work(terminal: Terminal) -> None:
    with prompt() as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid) as shown:
            wait_until(lambda: screen.row("console"), "a row")
            launched.freeze()
            screen.wait_for(f"launcher {launched.pid} does not answer")
            assert screen.row("console")
            launched.signal(signal.SIGCONT)
            wait_until(lambda: not any("does not answer" in line for line in screen.lines()), "it answers")
            launched.freeze()
            screen.wait_for(f"launcher {launched.pid} does not answer")
            terminal.type("q")
            assert shown.wait() == 0


# Sizes


@pytest.mark.parametrize("size", [(10, 40), (50, 200), (3, 80), (24, 20), (1, 10), (2, 1)])
def test_it_fits_any_size_that_the_terminal_takes(size: tuple[int, int], terminal: Terminal) -> None:
    with prompt() as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid) as shown:
            wait_until(lambda: screen.row("console"), "a row")
            screen.resize(*size)
            first = "lgmp top: 1 guest, "[: size[1] - 1]
            wait_until(lambda: screen.lines()[0].startswith(first) and len(screen.lines()[0]) <= size[1], "drawn")
            screen.resize(ROWS, COLUMNS)
            wait_until(lambda: screen.row("console"), "a row again")
            terminal.type("q")
            assert shown.wait() == 0


def test_what_finds_no_room_is_reached_by_arrows(terminal: Terminal, tmp_path: Path) -> None:
    disks = [word for number in range(20) for word in ("--block", f"{make_disk(tmp_path / str(number), 1)},ro")]
    with prompt(*disks) as launched:
        screen = Screen(terminal, 12, COLUMNS)
        with top(terminal, launched.pid) as shown:
            wait_until(lambda: screen.row("vda"), "the first row")
            screen.wait_for("arrows: more")
            assert not screen.row("console")
            for _ in range(4):
                terminal.type("\x1b[6~")
            wait_until(lambda: screen.row("console"), "the last row")
            assert not screen.row("vda")
            assert screen.lines()[-1].split()[1] == "console"
            terminal.type("\x1b[A")
            wait_until(lambda: not screen.row("console"), "a line up")
            for _ in range(4):
                terminal.type("\x1b[5~")
            wait_until(lambda: screen.row("vda"), "the first row")
            terminal.type("q")
            assert shown.wait() == 0


def test_names_of_any_length_and_with_any_character_keep_the_screen(terminal: Terminal) -> None:
    with prompt("--name", "ü" * 300) as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid):
            wait_until(lambda: screen.row("console"), "a row")
            assert len(screen.lines()[2]) <= COLUMNS
            assert screen.lines()[1].split() == HEADINGS


# How it ends


@pytest.mark.parametrize("key", ["q", "Q", "\x03"])
def test_it_ends_at_a_key_and_gives_the_terminal_back(key: str, xterm: Terminal) -> None:
    modes = xterm.modes()
    with prompt() as launched:
        screen = Screen(xterm)
        with top(xterm, launched.pid) as shown:
            wait_until(lambda: screen.row("console"), "a row")
            assert xterm.modes() != modes
            xterm.type(key)
            assert shown.wait() == 0

    assert_given_back(xterm, modes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_ends_it_and_it_gives_the_terminal_back(number: signal.Signals, xterm: Terminal) -> None:
    modes = xterm.modes()
    with prompt() as launched:
        screen = Screen(xterm)
        with top(xterm, launched.pid) as shown:
            wait_until(lambda: screen.row("console"), "a row")
            shown.signal(number)
            assert shown.wait() == (0 if number == signal.SIGINT else 128 + number)

    assert_given_back(xterm, modes)
    assert "Traceback" not in xterm.out.text


def test_it_ends_with_its_guest_and_says_so(xterm: Terminal) -> None:
    modes = xterm.modes()
    with prompt("--name", "mortal") as launched:
        screen = Screen(xterm)
        with top(xterm, "mortal") as shown:
            wait_until(lambda: screen.row("console"), "a row")
            launched.send("poweroff\n")
            assert launched.end()[0] == 0
            assert shown.wait() == 0

    assert_given_back(xterm, modes)
    xterm.out.wait_for("guest mortal has ended\r\n")


def test_it_ends_with_a_guest_that_is_killed(xterm: Terminal) -> None:
    modes = xterm.modes()
    with prompt() as launched:
        screen = Screen(xterm)
        with top(xterm, launched.pid) as shown:
            wait_until(lambda: screen.row("console"), "a row")
            os.killpg(launched.session, signal.SIGKILL)
            assert shown.wait() == 0

    assert_given_back(xterm, modes)


def test_it_ends_when_its_terminal_goes_away() -> None:
    master, slave = os.openpty()
    with prompt() as launched:
        shown = subprocess.Popen(
            ["setsid", "--ctty", *LGMP, "top", str(launched.pid)], stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        seen = b""
        while b"console" not in seen:
            seen += os.read(master, 1 << 16)
        os.close(master)

        assert shown.wait(60) != 0
        wait_until(lambda: not session_processes(shown.pid), "all gone")


def test_it_is_suspended_and_goes_on(terminal: Terminal) -> None:
    with prompt() as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid) as shown:
            wait_until(lambda: screen.row("console"), "a row")
            # Nobody else is in its session to whom the terminal would go: a session's only process group is orphaned,
            # and does not stop for SIGTSTP. SIGSTOP it cannot but obey.
            shown.freeze()
            screen.resize(30, 100)
            shown.signal(signal.SIGCONT)
            wait_until(lambda: screen.row("console"), "a row again")
            terminal.type("q")
            assert shown.wait() == 0


# What cannot be


@pytest.mark.parametrize("streams", [{"stdin": subprocess.DEVNULL}, {"stdout": subprocess.PIPE}])
def test_without_a_terminal_it_says_what_there_is_instead(streams: dict[str, int], terminal: Terminal) -> None:
    how = {"stdin": terminal.slave, "stdout": terminal.slave, **streams}
    ran = subprocess.run([*LGMP, "top"], check=False, stderr=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload]

    assert ran.returncode == 1
    assert re.fullmatch(r"lgmp: top needs a terminal .*`lgmp ps`.*\n", ran.stderr)


@pytest.mark.parametrize("name", ["no-such-terminal", ""])
def test_a_terminal_that_is_not_known_is_one_line(
    name: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", name)
    modes = terminal.modes()
    with top(terminal) as shown:
        assert shown.wait() == 1

    terminal.out.wait_for("`lgmp ps`\r\n")
    assert re.fullmatch(r"lgmp: top cannot use this terminal \(TERM=.*\): .*`lgmp ps`\r\n", terminal.out.text)
    assert terminal.modes() == modes


def test_a_terminal_that_can_do_little_will_do(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "vt100")
    with prompt() as launched:
        screen = Screen(terminal)
        with top(terminal, launched.pid) as shown:
            screen.wait_for("console +running")
            terminal.type("q")
            assert shown.wait() == 0


def test_a_guest_that_there_is_not_is_one_line_on_an_untouched_terminal(terminal: Terminal) -> None:
    with top(terminal, "no such guest") as shown:
        assert shown.wait() == 1

    terminal.out.wait_for("\r\n")
    assert terminal.out.text.startswith("lgmp: no guest ")
    assert ENTER not in terminal.out.text


# Rates


def test_a_rate_is_what_came_divided_by_the_time() -> None:
    rates = Rates()

    assert rates.take(10.0, [100, 7]) == [None, None]
    assert rates.take(10.5, [150, 7]) == [100.0, 0.0]
    assert rates.take(10.5, [150, 7]) == [None, None]  # no time has passed
    assert rates.take(12.5, [154, 9]) == [2.0, 1.0]


def test_cpu_is_over_the_last_samples_of_one_process() -> None:
    rates = Rates()

    assert rates.take_cpu(0.0, 1, 5.0) is None
    assert rates.take_cpu(1.0, 1, 5.5) == 50.0
    assert rates.take_cpu(2.0, 1, 5.5) == 25.0
    assert rates.take_cpu(3.0, 2, 0.1) is None  # another process
    assert rates.take_cpu(4.0, 2, 0.2) == pytest.approx(10.0)
    assert rates.take_cpu(5.0, 2, None) is None
    assert rates.take_cpu(6.0, None, None) is None
