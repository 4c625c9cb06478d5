"""`lgmp demo`, with a terminal and without."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Launch, Terminal, session_processes


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose temporary files are in a directory that must be empty again at the end."""
    yield {**os.environ, "TMPDIR": str(tmp_path)}
    assert os.listdir(tmp_path) == []


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as made:
        yield made


def test_without_a_terminal_the_guest_checks_itself(scratch: dict[str, str]) -> None:
    with Launch("demo", env=scratch) as launched:
        code, out, err = launched.end()

    assert code == 0, out
    assert out.splitlines()[-1] == "SELF-CHECK PASSED"
    assert "not ok" not in out
    assert re.search(rf"^lgmp demo: launcher +pid {launched.pid} ", err, re.MULTILINE)
    assert re.search(r"^lgmp demo: worker +pid \d+ +serves vda$", err, re.MULTILINE)
    assert re.search(r"^lgmp demo: worker +pid \d+ +serves console$", err, re.MULTILINE)


def test_it_names_the_processes_that_there_are(scratch: dict[str, str], terminal: Terminal) -> None:
    with Launch("demo", env=scratch, terminal=terminal) as launched:
        launched.wait_until_ready()
        named = dict(re.findall(r"(?:pid (\d+) +(?:serves (\w+))?)", terminal.out.text))
        there = session_processes(launched.session)
        workers = {str(pid): name for name, pid in launched.workers().items()}
        terminal.type("poweroff\r")
        assert launched.wait() == 0

    assert set(map(int, named)) == set(there)
    assert {pid: name for pid, name in named.items() if name} == workers


def test_on_a_terminal_it_has_a_prompt_and_a_disk(scratch: dict[str, str], terminal: Terminal) -> None:
    before = terminal.modes()
    with Launch("demo", env=scratch, terminal=terminal) as launched:
        launched.wait_until_ready()
        launched.command("blk write 0 8 1")
        launched.command("blk verify 0 8 1")
        terminal.type("poweroff\r")
        code, out, _err = launched.end()

    assert code == 0
    assert "blk verify 0 8: status 0 all equal" in out
    assert terminal.modes() == before


def test_it_can_be_rebooted_and_leaves_no_file(scratch: dict[str, str], terminal: Terminal) -> None:
    with Launch("demo", env=scratch, terminal=terminal) as launched:
        launched.wait_until_ready()
        launched.command("reboot")
        launched.command("reboot")
        terminal.type("poweroff\r")
        code, _out, _err = launched.end()

    assert code == 0


def test_ended_by_a_signal_it_leaves_no_file(scratch: dict[str, str]) -> None:
    with Launch("demo", env=scratch) as launched:
        launched.out.wait_for("test guest")
        launched.signal(signal.SIGTERM)
        code, _out, _err = launched.end()

    assert code in (128 + signal.SIGTERM, 0)
