"""A terminal goes raw and comes back, and is left alone where it is somebody else's."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator

import pytest

from lgmp.terminal import RawTerminal
from lgmp.testing import PATIENCE

LFLAG, CC = 3, 6
RAW = termios.ISIG | termios.ICANON | termios.ECHO


@pytest.fixture
def terminal() -> Iterator[int]:
    """A pseudo-terminal that is nobody's controlling terminal."""
    master, slave = pty.openpty()
    yield slave
    os.close(master)
    os.close(slave)


def test_a_raw_terminal_has_no_signals_lines_or_echo_and_is_else_unchanged(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    assert RawTerminal.enter(terminal)
    after = termios.tcgetattr(terminal)
    assert after[LFLAG] == before[LFLAG] & ~RAW
    assert after[:LFLAG] == before[:LFLAG]


def test_a_key_arrives_at_once(terminal: int) -> None:
    modes = termios.tcgetattr(terminal)
    modes[CC][termios.VMIN] = 5  # as somebody may have left it
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
    RawTerminal.enter(terminal)
    modes = termios.tcgetattr(terminal)
    assert (modes[CC][termios.VMIN], modes[CC][termios.VTIME]) == (1, 0)


def test_restoring_gives_back_every_mode_any_number_of_times(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    raw = RawTerminal.enter(terminal)
    assert raw
    raw.restore()
    assert termios.tcgetattr(terminal) == before
    raw.restore()
    raw.restore(only_if_raw=True)
    assert termios.tcgetattr(terminal) == before


def test_a_terminal_that_was_restored_meanwhile_goes_raw_again_and_has_its_old_modes_back(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    raw = RawTerminal.enter(terminal)
    assert raw
    raw.restore()
    raw.enter_again()
    assert not termios.tcgetattr(terminal)[LFLAG] & RAW
    raw.restore()
    assert termios.tcgetattr(terminal) == before


def test_another_process_can_restore_from_the_argument(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    raw = RawTerminal.enter(terminal)
    assert raw
    RawTerminal.from_argument(terminal, raw.to_argument()).restore(only_if_raw=True)
    assert termios.tcgetattr(terminal) == before


def test_the_argument_is_what_stty_prints_and_takes(terminal: int) -> None:
    stty = subprocess.run(["stty", "-g"], stdin=terminal, capture_output=True, text=True, check=True).stdout.strip()
    before = termios.tcgetattr(terminal)
    raw = RawTerminal.enter(terminal)
    assert raw
    assert raw.to_argument() == stty
    subprocess.run(["stty", raw.to_argument()], stdin=terminal, check=True)
    assert termios.tcgetattr(terminal) == before


@pytest.mark.parametrize("text", ["", "1:2:3:4", "x:1:2:3:4", "1:2:3:4:100", "-1:0:0:0:0", "100000000:0:0:0:0"])
def test_an_argument_that_is_none_is_refused(terminal: int, text: str) -> None:
    with pytest.raises(ValueError):
        RawTerminal.from_argument(terminal, text)


def test_an_argument_of_another_system_restores_nothing(terminal: int) -> None:
    RawTerminal.enter(terminal)
    before = termios.tcgetattr(terminal)
    RawTerminal.from_argument(terminal, "1:2:3:4:5:6").restore()
    assert termios.tcgetattr(terminal) == before


def test_a_terminal_that_somebody_has_restored_already_keeps_its_modes(terminal: int) -> None:
    raw = RawTerminal.enter(terminal)
    assert raw
    modes = termios.tcgetattr(terminal)
    modes[LFLAG] |= termios.ISIG  # a shell's line editor: signals, but neither lines nor echo
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
    theirs = termios.tcgetattr(terminal)
    raw.restore(only_if_raw=True)
    assert termios.tcgetattr(terminal) == theirs


def test_what_is_no_terminal_is_left_alone() -> None:
    reader, writer = os.pipe()
    assert RawTerminal.enter(reader) is None
    RawTerminal.from_argument(reader, ":".join(["0"] * 36)).restore()
    os.close(reader)
    os.close(writer)
    assert RawTerminal.enter(reader) is None


def test_a_terminal_that_has_hung_up_is_no_error() -> None:
    master, slave = pty.openpty()
    raw = RawTerminal.enter(slave)
    assert raw
    os.close(master)
    raw.restore()
    raw.restore(only_if_raw=True)
    os.close(slave)


def in_a_session(act: Callable[[], bool]) -> bool:
    """What `act` finds in a process whose controlling terminal is descriptor 0, and which is in its foreground."""
    pid, master = pty.fork()
    if not pid:
        answer = 2
        try:
            signal.alarm(int(PATIENCE))
            answer = 0 if act() else 1
        finally:
            os._exit(answer)
    status = os.waitpid(pid, 0)[1]
    os.close(master)
    assert os.waitstatus_to_exitcode(status) in (0, 1)
    return status == 0


def in_the_background(act: Callable[[], bool]) -> bool:
    """As `in_a_session`, but in a process group that is not in the foreground."""

    def fork() -> bool:
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            os._exit(0 if act() else 1)
        return os.waitpid(pid, 0)[1] == 0

    return in_a_session(fork)


def test_the_foreground_may_have_its_terminal_raw() -> None:
    def act() -> bool:
        before = termios.tcgetattr(0)
        raw = RawTerminal.enter(0)
        was_raw = termios.tcgetattr(0)[LFLAG] & RAW == 0
        assert raw
        raw.restore()
        return was_raw and termios.tcgetattr(0) == before

    assert in_a_session(act)


def test_the_background_leaves_the_terminals_modes_alone() -> None:
    def act() -> bool:
        before = termios.tcgetattr(0)
        return RawTerminal.enter(0) is None and termios.tcgetattr(0) == before

    assert in_the_background(act)


def test_a_terminal_left_raw_is_restored_even_from_the_background() -> None:
    """When the launcher is killed, a shell may have taken the foreground before the worker has heard of it."""

    def act() -> bool:
        before = termios.tcgetattr(0)
        saved = RawTerminal(0, [*before[:4], *(c if isinstance(c, int) else c[0] for c in before[CC])])
        modes = termios.tcgetattr(0)
        modes[LFLAG] &= ~RAW
        termios.tcsetattr(0, termios.TCSANOW, modes)
        saved.restore()
        untouched = termios.tcgetattr(0)[LFLAG] & RAW == 0
        saved.restore(only_if_raw=True)
        return untouched and termios.tcgetattr(0) == before

    assert in_the_background(act)
