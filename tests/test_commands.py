"""Commands to a guest that runs: stop, pause, resume, restart-worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import GUEST, HANGS_AFTER, LGMP, MEM, Launch, Terminal, host, make_disk, prompt, run, wait_until
from old_kernel import PREFIX as OLD_KERNEL

pytestmark = [pytest.mark.every_host, pytest.mark.usefixtures("directory")]

LGUEST = (sys.executable, "-P", "-m", "lgmp.lguest_cli")
WORK = "console lines 1000000 70"


@pytest.fixture
def disk(tmp_path: Path) -> list[str]:
    """The option for a disk of 64 sectors."""
    return ["--block", str(make_disk(tmp_path / "a disk.img"))]


def lgmp(*words: str | int, prefix: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """A command: its exit status, stdout and stderr."""
    ran = subprocess.run(
        [*prefix, *LGMP, *map(str, words)], check=False, capture_output=True, text=True, timeout=HANGS_AFTER
    )
    return ran.returncode, ran.stdout, ran.stderr


DONE = (0, "", "")


def status(launched: Launch) -> dict[str, Any]:
    """What `lgmp ps --json` says of a guest."""
    (guest,) = json.loads(lgmp("ps", "--json", launched.pid)[1])
    assert isinstance(guest, dict)
    return guest


def worker_of(launched: Launch, name: str) -> dict[str, Any]:
    (worker,) = [worker for worker in status(launched)["workers"] if worker["name"] == name]
    assert isinstance(worker, dict)
    return worker


def requests(launched: Launch) -> int:
    """How many requests the guest has made of its devices."""
    return sum(queue["requests"] for worker in status(launched)["workers"] for queue in worker["queues"])


def in_flight(launched: Launch) -> int:
    """How many of its console's output requests are not answered yet."""
    flight: int = worker_of(launched, "console")["queues"][1]["in_flight"]
    return flight


def another_guests_life() -> None:
    """A time in which a guest that runs gets a lot done: another is born, works and dies."""
    assert run("quiet console lines 200 70; poweroff", "--name", "another")[0] == 0


@contextlib.contextmanager
def busy(*options: str) -> Iterator[Launch]:
    """A guest at its prompt that has then been given much to print, and has begun."""
    with prompt(*options) as launched:
        launched.send(f"{WORK}\n")
        launched.out.wait_for("line 00000010")
        yield launched


# stop


def test_stop_ends_a_guest_and_returns_once_nothing_is_left(disk: list[str]) -> None:
    with prompt("--name", "mine", *disk) as launched:
        assert lgmp("stop", launched.pid) == DONE
        assert launched.left_behind() == []
        code, _out, err = launched.end()

    assert (code, err) == (0, "")


def test_stop_is_said_where_everything_is() -> None:
    with prompt("-v", "--name", "mine") as launched:
        assert lgmp("stop", launched.pid) == DONE
        code, _out, err = launched.end()

    assert code == 0
    assert err.splitlines()[-1] == "lgmp: guest mine: stopped"


def test_stop_ends_a_guest_at_work(disk: list[str]) -> None:
    with busy(*disk) as launched:
        assert lgmp("stop", launched.pid) == DONE
        assert launched.end()[0] == 0


def test_stop_ends_a_guest_whose_output_nobody_reads() -> None:
    reading, writing = os.pipe()
    with Launch("run", *host.options, MEM, GUEST, f"{host.setting}quiet {WORK}", stdout=writing) as launched:
        os.read(reading, 1)
        assert lgmp("stop", launched.pid) == DONE
        assert launched.wait() == 0
    os.close(reading)
    os.close(writing)


def test_stop_gives_the_terminal_back() -> None:
    with Terminal() as terminal:
        before = terminal.modes()
        with prompt(terminal=terminal) as launched:
            assert terminal.raw
            assert lgmp("stop", launched.pid) == DONE
            assert launched.wait() == 0
            assert terminal.modes() == before


def test_stop_waits_where_the_kernel_has_no_pidfds() -> None:
    with prompt() as launched:
        assert lgmp("stop", launched.pid, prefix=OLD_KERNEL) == DONE
        assert launched.left_behind() == []
        assert launched.end()[0] == 0


def test_a_guest_of_the_lguest_command_is_stopped_as_well() -> None:
    if host.options:
        pytest.skip("it has no options for that")
    with Launch(MEM, GUEST, "quiet", lgmp=LGUEST) as launched:
        launched.wait_until_ready()
        assert lgmp("stop", launched.pid) == DONE
        code, _out, err = launched.end()

    assert (code, err) == (0, "")


# pause and resume


def test_a_paused_guest_does_nothing_until_it_is_resumed(disk: list[str]) -> None:
    with busy(*disk) as launched:
        assert lgmp("pause", launched.pid) == DONE
        assert status(launched)["state"] == "paused"
        # Its workers finish what it has asked them for.
        wait_until(lambda: in_flight(launched) == 0, "output done")
        before = requests(launched)
        another_guests_life()
        assert requests(launched) == before
        assert status(launched)["state"] == "paused"

        assert lgmp("resume", launched.pid) == DONE
        assert status(launched)["state"] == "running"
        wait_until(lambda: requests(launched) > before, "it goes on")
        assert lgmp("stop", launched.pid) == DONE
        assert launched.end()[0] == 0

    # Nothing was lost or came twice while it stood still.
    numbers = [int(line.split()[1]) for line in launched.out.text.splitlines()[:-2] if line.startswith("line 0")]
    assert numbers[10:] == list(range(10, len(numbers)))


def test_a_guest_that_waits_for_a_key_is_paused_and_gets_what_was_typed_once_it_goes_on() -> None:
    with prompt() as launched:
        assert lgmp("pause", launched.pid) == DONE
        launched.send("echo typed while paused\n")
        another_guests_life()
        assert "typed" not in launched.out.text
        assert lgmp("resume", launched.pid) == DONE
        launched.out.wait_for("typed while paused\n", times=2)  # the echo of the keys, and the command's
        launched.send("poweroff\n")
        assert launched.end()[0] == 0


def test_pausing_and_resuming_may_be_done_twice() -> None:
    with prompt() as launched:
        for command in ("resume", "pause", "pause", "resume", "resume", "pause", "resume"):
            assert lgmp(command, launched.pid) == DONE
            assert status(launched)["state"] == ("paused" if command == "pause" else "running")
        launched.command("echo on")
        launched.send("poweroff\n")
        assert launched.end()[0] == 0


def test_a_paused_guest_can_be_stopped() -> None:
    with busy() as launched:
        assert lgmp("pause", launched.pid) == DONE
        assert lgmp("stop", launched.pid) == DONE
        assert launched.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_a_paused_guest(number: signal.Signals) -> None:
    with prompt() as launched:
        assert lgmp("pause", launched.pid) == DONE
        launched.signal(number)
        assert launched.end()[0] == 128 + number


def test_a_paused_guest_that_is_killed_leaves_nothing(disk: list[str]) -> None:
    with busy(*disk) as launched:
        assert lgmp("pause", launched.pid) == DONE
        launched.signal(signal.SIGKILL)
        launched.wait()
        launched.wait_until_nothing_is_left()


def bytes_read(pid: int) -> int:
    """How much a process has read in all."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def test_three_times_ctrl_c_ends_a_paused_guest() -> None:
    with Terminal() as terminal, prompt(terminal=terminal) as launched:
        assert lgmp("pause", launched.pid) == DONE
        console = launched.workers()["console"]
        for _ in range(2):
            before = bytes_read(console)
            terminal.type("\x03")
            # Each is to be in a read of its own.
            wait_until(lambda was=before: bytes_read(console) > was, "read")  # type: ignore[misc]
        terminal.type("\x03")
        assert launched.wait() == 2


def test_a_paused_guest_costs_no_time() -> None:
    with busy() as launched:
        assert lgmp("pause", launched.pid) == DONE
        wait_until(lambda: in_flight(launched) == 0, "output done")
        before = thread_seconds(launched.pid)
        another_guests_life()

        # One tick, should the kernel count one that began before.
        assert thread_seconds(launched.pid) - before <= 1


def thread_seconds(pid: int) -> int:
    """The CPU time of a process's main thread, in ticks."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# restart-worker


@pytest.mark.parametrize("name", ["vda", "rng0", "console"])
def test_a_worker_is_replaced_and_its_device_goes_on(name: str, disk: list[str]) -> None:
    with prompt(*disk, "--rng") as launched:
        launched.command("blk write 0 8 7")
        before = worker_of(launched, name)
        assert lgmp("restart-worker", name, launched.pid) == DONE
        after = worker_of(launched, name)
        assert (after["state"], after["restarts"]) == ("running", 1)
        assert after["pid"] != before["pid"] and not Path(f"/proc/{before['pid']}").exists()
        launched.command("blk verify 0 8 7; rng read 8")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert "blk verify 0 8: status 0 all equal" in out


def test_a_worker_is_replaced_at_work(disk: list[str]) -> None:
    with prompt(*disk) as launched:
        launched.send("blk stress 20000 1\n")
        wait_until(lambda: worker_of(launched, "vda")["kicks"] > 20, "stress")
        for _ in range(3):
            assert lgmp("restart-worker", "vda", launched.pid) == DONE
        launched.out.wait_for("blk stress 20000 1: ")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert "0 failed, 0 sectors wrong" in out


def test_a_worker_of_a_paused_guest_is_replaced(disk: list[str]) -> None:
    with busy(*disk) as launched:
        assert lgmp("pause", launched.pid) == DONE
        for name in ("console", "vda"):
            assert lgmp("restart-worker", name, launched.pid) == DONE
            assert worker_of(launched, name)["state"] == "running"
        assert status(launched)["state"] == "paused"
        before = requests(launched)
        assert lgmp("resume", launched.pid) == DONE
        wait_until(lambda: requests(launched) > before, "it goes on")
        assert lgmp("stop", launched.pid) == DONE
        assert launched.end()[0] == 0


def test_a_worker_that_is_stopped_is_replaced(disk: list[str]) -> None:
    with prompt(*disk) as launched:
        os.kill(launched.workers()["vda"], signal.SIGSTOP)
        assert lgmp("restart-worker", "vda", launched.pid) == DONE
        launched.command("blk crc")
        launched.send("poweroff\n")
        assert launched.end()[0] == 0


# What cannot be


@pytest.mark.parametrize("command", [("stop",), ("pause",), ("resume",), ("restart-worker", "vda"), ("ps",)])
def test_a_guest_that_there_is_not_is_one_line(command: tuple[str, ...]) -> None:
    code, out, err = lgmp(*command, "no such guest")

    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("lgmp: no guest ")


def test_a_device_that_there_is_not_is_one_line_that_says_which_there_are(disk: list[str]) -> None:
    with prompt("--name", "mine", *disk) as launched:
        assert lgmp("restart-worker", "vdz", launched.pid) == (
            1,
            "",
            "lgmp: guest mine has no device vdz; it has vda, console\n",
        )


@pytest.mark.parametrize(
    "words", [("stop", "a", "b"), ("restart-worker",), ("pause", "--now"), ("ps", "--jso", "a", "b")]
)
def test_a_wrong_command_line_is_said(words: tuple[str, ...]) -> None:
    code, out, err = lgmp(*words)

    assert (code, out) == (1, "")
    assert err.startswith(f"usage: lgmp {words[0]} ") and "\nlgmp: " in err


@pytest.mark.parametrize("command", ["ps", "top", "stop", "pause", "resume", "restart-worker"])
def test_every_command_has_its_help_and_is_in_that_of_all(command: str) -> None:
    code, out, err = lgmp(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: lgmp {command} ") and "GUEST" in out

    assert f"  {command}" in lgmp("--help")[1] or f", {command}" in lgmp("--help")[1]


# Whose guest it is


def test_with_one_guest_it_need_not_be_named_and_with_two_it_must() -> None:
    # A user who has no guests but those of this test.
    user = 1_000_000 + os.getpid()
    prefix = ("unshare", "--user", f"--map-user={user}", f"--map-group={user}")
    code, _out, err = lgmp("stop", prefix=prefix)
    assert (code, err) == (1, "lgmp: no guest runs that is yours; `lgmp run` starts one\n")

    with prompt("--name", "one", prefix=prefix) as one:
        for words in (("pause",), ("restart-worker", "console"), ("resume",)):
            assert lgmp(*words, prefix=prefix) == DONE
        with prompt("--name", "two", prefix=prefix) as two:
            code, _out, err = lgmp("stop", prefix=prefix)
            known = ", ".join(f"{pid} ({name})" for pid, name in sorted([(one.pid, "one"), (two.pid, "two")]))
            assert (code, err) == (1, f"lgmp: there are 2 guests: give the pid of one, of {known}\n")
            assert lgmp("stop", "two", prefix=prefix) == DONE
        assert lgmp("stop", prefix=prefix) == DONE
        assert one.end()[0] == 0
