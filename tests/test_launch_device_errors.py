"""A guest that breaks a rule of a device, and a device that fails: the guest loses the device, and not its life."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launching import LGMP, SECTOR, Launch, checksum, launch, make_disk, pattern, prompt, run, wait_until
from test_launch_misdeeds import BLOCK_FATAL, INDIRECT_FATAL, RING_FATAL

pytestmark = pytest.mark.every_host

SECTORS = 64
CONTENT = f"blk crc: status 0 sectors {SECTORS} checksum {checksum(pattern(SECTORS))}\n"
LOST = "is out of order until its driver resets it"

# Answers "ok", but for the first so many requests ever: for those it raises an exception.
FAILING = """
from workers.device import RequestDevice

class Failing(RequestDevice):
    device_type = 42

    def __init__(self, times="200"):
        super().__init__()
        self.times = int(times)

    def handle(self, queue, readable, writable):
        if self.state[0] < self.times:
            self.state[0] += 1
            raise ValueError("no luck")
        writable[0][:2] = b"ok"
        return 2
"""


@pytest.fixture
def disk(tmp_path: Path) -> tuple[str, str]:
    """The options for a disk."""
    return ("--block", str(make_disk(tmp_path / "disk.img", SECTORS)))


@pytest.fixture
def failing(tmp_path: Path) -> str:
    """What --device takes for a device that fails."""
    file = tmp_path / "failing.py"
    file.write_text(FAILING)
    return f"{file}:Failing"


def said(launched: Launch, name: str) -> dict[str, Any]:
    """What `lgmp ps` knows of a device."""
    listed = subprocess.run([*LGMP, "ps", "--json", str(launched.pid)], check=True, capture_output=True)
    (guest,) = json.loads(listed.stdout)
    (worker,) = [worker for worker in guest["workers"] if worker["name"] == name]
    return dict(worker)


# A guest that breaks the rules


def test_whatever_ring_of_a_disk_it_breaks_a_guest_can_reset_the_disk_and_go_on(disk: tuple[str, str]) -> None:
    fatal = RING_FATAL | INDIRECT_FATAL | BLOCK_FATAL
    with prompt(*disk) as launched:
        for misdeed in fatal:
            launched.command(f"misdeed {misdeed}; status block0 wait; reset block0; blk crc")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert out.count("status block0: 47 needs reset\nreset block0: status 00\n" + CONTENT) == len(fatal)
    for line, (misdeed, reason) in zip(err.splitlines(), fatal.items(), strict=True):
        assert re.fullmatch(rf"lgmp: vda: queue 0: {reason}.*; vda {LOST}", line), misdeed


def test_a_disk_that_was_broken_is_read_and_written_after_its_reset(disk: tuple[str, str]) -> None:
    code, out, _err = run(
        "quiet misdeed head; status block0 wait; reset block0; blk read 0 8; blk write 8 8 3; blk verify 8 8 3; "
        "status block0; poweroff",
        *disk,
    )

    assert code == 0
    assert "status block0: 47 needs reset\n" in out
    assert f"blk read 0 8: status 0 checksum {checksum(pattern(SECTORS)[: 8 * SECTOR])} first" in out
    assert "blk verify 8 8: status 0 all equal\nstatus block0: 07\n" in out


def test_a_console_that_was_broken_comes_up_again() -> None:
    with prompt() as launched:
        for misdeed in ("loop", "head", "out-after-in"):
            launched.command(f"misdeed {misdeed}@console")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert out.count("survived ") == 3
    assert err.count(f"; console {LOST}\n") == len(err.splitlines()) == 3


def test_other_devices_go_on_and_the_error_is_kept(disk: tuple[str, str], tmp_path: Path) -> None:
    other = make_disk(tmp_path / "other.img", SECTORS, seed=2)
    with prompt(*disk, "--block", str(other), "--rng") as launched:
        launched.command("misdeed head; status block0 wait; blk -d 1 crc; rng read 100; status block0; status block1")
        broken = said(launched, "vda")
        launched.command("blk crc; status block0")
        mended = said(launched, "vda")
        other_worker = said(launched, "vdb")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert CONTENT.replace(checksum(pattern(SECTORS)), checksum(pattern(SECTORS, 2))) in out
    assert "rng read: 100 bytes" in out
    assert "status block0: 47 needs reset\nstatus block1: 07\n" in out
    assert CONTENT + "status block0: 07\n" in out
    error = "vda: queue 0: Guest says index 128 is available, the ring has 128"
    assert (broken["broken"], broken["state"], broken["error"], broken["restarts"]) == (True, "running", error, 0)
    assert (mended["broken"], mended["error"], mended["pid"]) == (False, error, broken["pid"])
    assert (other_worker["broken"], other_worker["error"]) == (False, None)


def test_kicks_of_a_broken_device_are_ignored(disk: tuple[str, str]) -> None:
    # Its driver notices only that there is no answer.
    with prompt(*disk, "--rng") as launched:
        launched.command("blk -d 0 id; misdeed loop@rng; status rng0 wait; misdeed notify-ring-inside; rng read 10")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert "status rng0: 47 needs reset\n" in out
    assert "rng read: 10 bytes" in out
    assert err.count("\n") == 1


def test_a_broken_device_stays_so_when_its_worker_is_killed(disk: tuple[str, str]) -> None:
    with prompt(*disk) as launched:
        launched.command("misdeed head; status block0 wait")
        os.kill(launched.workers()["vda"], signal.SIGKILL)
        launched.err.wait_for("started again")
        wait_until(lambda: said(launched, "vda")["state"] == "running", "its successor")
        launched.command("status block0; blk crc")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert out.count("status block0: 47 needs reset\n") == 2
    assert CONTENT in out


def test_a_guest_dies_of_it_where_it_is_to(disk: tuple[str, str]) -> None:
    code, out, err = run("quiet misdeed head; echo alive", *disk, "--on-device-error", "die")

    assert (code, out) == (1, "misdeed head\n")
    assert err == "lgmp: vda: queue 0: Guest says index 128 is available, the ring has 128\n"


# A device that fails


def test_a_device_that_fails_now_and_then_answers_all_the_same(failing: str) -> None:
    code, out, err = run("quiet ask 42 hello; status 42; poweroff", "--device", f"{failing},times=2")

    assert (code, out) == (0, "ask 42: 2 bytes 'ok'\nstatus 42: 07\n")
    assert err.count("ValueError: no luck\n") == 2  # each the end of a traceback
    defect = rf"lgmp: failing0: ValueError: no luck; this is a defect of {re.escape(failing)}"
    assert len(re.findall(rf"^{defect}; started again as pid \d+, 1 in flight$", err, re.MULTILINE)) == 2


def test_a_device_that_always_fails_is_given_up_with_its_last_words(failing: str, disk: tuple[str, str]) -> None:
    with prompt(*disk, "--device", failing) as launched:
        launched.command("ask 42 hello; status 42; blk crc")
        given_up = said(launched, "failing0")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert "ask: no answer, the device needs a reset\nstatus 42: 47 needs reset\n" + CONTENT in out
    words = f"failing0: ValueError: no luck; this is a defect of {failing}"
    remedy = "or you do (lgmp restart-worker failing0)"
    assert err.splitlines()[-1] == f"lgmp: {words}; it keeps ending, and is given up; failing0 {LOST} {remedy}"
    assert given_up["error"] == f"{words}; it keeps ending, and is given up"
    assert (given_up["state"], given_up["pid"], given_up["broken"]) == ("given up", None, True)


def test_a_device_that_was_given_up_is_revived_by_a_reset_of_its_driver(failing: str) -> None:
    with prompt("--device", f"{failing},times=6") as launched:
        launched.command("ask 42 hello")
        given_up = said(launched, "failing0")
        # The next request resets the device, and fails once more at most: its worker is another each time.
        launched.command("reset 42; ask 42 hello; status 42")
        revived = said(launched, "failing0")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert given_up["state"] == "given up"
    assert (revived["state"], revived["broken"]) == ("running", False)
    assert out.index("ask: no answer, the device needs a reset\n") < out.index("ask 42: 2 bytes 'ok'\nstatus 42: 07\n")
    assert "lgmp: failing0 was reset by its driver; started again as pid " in err


def test_a_device_that_was_given_up_goes_on_where_it_was_when_its_worker_is_restarted(failing: str) -> None:
    with prompt("--device", f"{failing},times=6") as launched:
        launched.command("ask 42 hello; status 42")
        before = said(launched, "failing0")
        subprocess.run([*LGMP, "restart-worker", "failing0", str(launched.pid)], check=True)
        wait_until(lambda: said(launched, "failing0")["queues"][0]["in_flight"] == 0, "the answer")
        launched.command("status 42")
        after = said(launched, "failing0")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert (before["state"], before["broken"], before["queues"][0]["in_flight"]) == ("given up", True, 1)
    assert (after["state"], after["broken"]) == ("running", False)
    assert [line for line in out.splitlines() if line.startswith("status")] == [
        "status 42: 47 needs reset",
        "status 42: 07",
    ]


def test_a_worker_that_can_have_no_successor_is_given_up_until_it_can(disk: tuple[str, str]) -> None:
    with prompt(*disk) as launched:
        limits = resource.prlimit(launched.pid, resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir(f"/proc/{launched.pid}/fd")))
        # There is room for a few where others were closed, but not for all that a process needs.
        resource.prlimit(launched.pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        os.kill(launched.workers()["vda"], signal.SIGKILL)
        launched.err.wait_for("is given up")
        resource.prlimit(launched.pid, resource.RLIMIT_NOFILE, limits)
        subprocess.run([*LGMP, "restart-worker", "vda", str(launched.pid)], check=True)
        launched.command("blk crc; status block0")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert CONTENT + "status block0: 07\n" in out
    assert "; it has no successor (" in err


def test_a_device_that_fails_ends_the_guest_where_it_is_to(failing: str) -> None:
    code, out, err = run("quiet ask 42 hello", "--device", failing, "--on-crash", "stop")

    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"lgmp: failing0: ValueError: no luck; this is a defect of {failing}"


def test_a_device_that_is_given_up_ends_the_guest_where_a_broken_one_does(failing: str) -> None:
    code, _out, err = run("quiet ask 42 hello", "--device", failing, "--on-device-error", "die")

    assert code == 1
    assert err.splitlines()[-1].endswith(f"a defect of {failing}; it keeps ending, and is given up")


def test_a_worker_that_somebody_keeps_killing_is_replaced_every_time(disk: tuple[str, str]) -> None:
    with launch("quiet blk stress 3000 1; poweroff", *disk) as launched:
        for times in range(1, 20):
            wait_until(lambda: launched.process.poll() is not None or "vda" in launched.workers(), "a worker")
            if launched.process.poll() is not None:
                break
            os.kill(launched.workers()["vda"], signal.SIGKILL)
            launched.err.wait_for("started again", times)
        code, out, _err = launched.end()

    assert code == 0
    assert ", 0 failed, 0 sectors wrong" in out
