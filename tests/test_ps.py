"""`lgmp ps`: what it says of guests and their workers, to people and to programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launching import GUEST, LGMP, MEM, Launch, command_line, launch, make_disk, prompt, wait_until

from lgmp.watching import human
from lgmp.watching.process_usage import read_usage

WIDTH = 80
USAGE_KEYS = {"cpu_seconds", "rss_bytes", "pss_bytes"}
GUEST_KEYS = {
    *("name", "pid", "kernel", "memory_bytes", "host", "guest_abi", "socket", "state", "uptime_seconds", "workers"),
    *("error", *USAGE_KEYS),
}
WORKER_KEYS = {
    *("name", "kind", "details", "pid", "state", "restarts", "broken", "error", "queues"),
    *("bytes_in", "bytes_out", "kicks", "interrupts", "errors", *USAGE_KEYS),
}
QUEUE_KEYS = {"num", "next_avail", "next_used", "in_flight", "requests"}

pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def disk(tmp_path: Path) -> list[str]:
    """The option for a disk of 64 sectors."""
    return ["--block", str(make_disk(tmp_path / "a disk.img"))]


def ps(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """`lgmp ps`, and what it says."""
    return subprocess.run([*LGMP, "ps", *words], check=False, capture_output=True, text=True, **how)


def described(launched: Launch) -> dict[str, Any]:
    """A guest as --json has it."""
    ran = ps("--json", str(launched.pid))
    assert (ran.returncode, ran.stderr) == (0, "")
    (guest,) = json.loads(ran.stdout)
    assert isinstance(guest, dict)
    return guest


def worker_of(guest: dict[str, Any], name: str) -> dict[str, Any]:
    (worker,) = [worker for worker in guest["workers"] if worker["name"] == name]
    assert isinstance(worker, dict)
    return worker


# For programs


@pytest.mark.every_host
def test_json_has_all_that_there_is_to_know(directory: Path, disk: list[str]) -> None:
    with prompt("--name", "seen", *disk, "--rng") as launched:
        guest = described(launched)
        workers = launched.workers()

    assert guest.keys() == GUEST_KEYS
    assert (guest["name"], guest["pid"], guest["state"], guest["error"]) == ("seen", launched.pid, "running", None)
    assert guest["kernel"] == GUEST
    assert guest["memory_bytes"] == int(MEM) << 20
    assert guest["host"] in ("embedded", "kernel")
    assert guest["socket"] == str(directory / f"{launched.pid}.sock")
    assert guest["uptime_seconds"] >= 0
    assert [(worker["name"], worker["kind"]) for worker in guest["workers"]] == [
        ("vda", "block"),
        ("rng0", "rng"),
        ("console", "console"),
    ]
    for worker in guest["workers"]:
        assert worker.keys() == WORKER_KEYS
        assert worker["pid"] == workers[worker["name"]]
        assert (worker["state"], worker["restarts"], worker["broken"], worker["error"]) == ("running", 0, False, None)
        assert worker["cpu_seconds"] > 0 and worker["rss_bytes"] > 1 << 20
        assert worker["pss_bytes"] is None or 0 < worker["pss_bytes"] <= worker["rss_bytes"]
        assert all(queue.keys() == QUEUE_KEYS and queue["num"] == 128 for queue in worker["queues"])
    assert [len(worker["queues"]) for worker in guest["workers"]] == [1, 1, 2]
    assert worker_of(guest, "vda")["details"] == f"sectors=64 file={disk[1]}"


@pytest.mark.every_host
def test_counts_follow_what_the_guest_does(disk: list[str]) -> None:
    with prompt(*disk) as launched:
        launched.command("blk id")
        before = worker_of(described(launched), "vda")
        for sector in range(5):
            launched.command(f"blk read {sector} 1")
        after = worker_of(described(launched), "vda")

    ((was,), (now,)) = (before["queues"], after["queues"])
    # Each begins with a reset of the device, after which the queue is at its start; requests are counted on.
    assert now["requests"] == was["requests"] + 5
    assert now["next_avail"] == now["next_used"] > 0
    assert now["in_flight"] == 0
    assert after["kicks"] >= before["kicks"] + 5
    assert after["interrupts"] >= before["interrupts"] + 5
    assert after["bytes_in"] >= before["bytes_in"] + 5 * 512
    assert after["errors"] == before["errors"] == 0


def test_a_request_that_is_not_answered_yet_is_in_flight(disk: list[str]) -> None:
    with prompt(*disk) as launched:
        # The console's input queue has a buffer that waits for a key.
        (inputs, _outputs) = worker_of(described(launched), "console")["queues"]
        assert inputs["in_flight"] == inputs["next_avail"] - inputs["next_used"]
        launched.command("blk id")
        os.kill(launched.workers()["vda"], signal.SIGSTOP)
        launched.send("blk id\n")
        launched.out.wait_for("blk id\n")
        # Stopped, its numbers are still there to be read.
        assert worker_of(described(launched), "vda")["state"] == "running"


@pytest.mark.every_host
def test_a_worker_that_was_killed_is_seen_to_have_been_started_again(disk: list[str]) -> None:
    with prompt(*disk) as launched:
        pid = launched.workers()["vda"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: worker_of(described(launched), "vda")["restarts"] == 1, "restarted")
        wait_until(lambda: worker_of(described(launched), "vda")["state"] == "running", "running")
        worker = worker_of(described(launched), "vda")
        assert worker["pid"] != pid
        assert worker["error"] == f"worker vda (pid {pid}) was killed by SIGKILL"
        text = ps(str(launched.pid)).stdout

    assert f"last error: worker vda (pid {pid}) was killed by SIGKILL" in text


@pytest.mark.every_host
def test_a_device_that_is_out_of_order_is_seen_to_be(disk: list[str]) -> None:
    with prompt(*disk) as launched:
        launched.send("misdeed loop\n")
        wait_until(lambda: worker_of(described(launched), "vda")["broken"], "broken")
        worker = worker_of(described(launched), "vda")
        assert worker["state"] == "running" and "Looped descriptor" in worker["error"]
        text = ps(str(launched.pid)).stdout

    assert any(line.split()[1:3] == ["vda", "broken"] for line in text.splitlines())
    assert "Looped descriptor" in text


def test_memory_and_cpu_are_those_of_the_process() -> None:
    with prompt() as launched:
        guest, usage = described(launched), read_usage(launched.pid)
        assert usage.cpu_seconds is not None and usage.rss_bytes is not None
        assert 0 < guest["cpu_seconds"] <= usage.cpu_seconds
        assert guest["rss_bytes"] > 0

    assert read_usage(launched.pid) == read_usage(None) == (None, None, None)


# For people


@pytest.mark.every_host
def test_the_table_fits_a_terminal_and_has_a_row_for_each_worker(disk: list[str]) -> None:
    with prompt("--name", "seen", *disk) as launched:
        launched.command("blk crc")
        workers = launched.workers()
        ran = ps("seen")

    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "guest seen"
    assert lines[1].startswith(f"  pid {launched.pid}, running, up ")
    headings = lines[2].split()
    assert headings == ["PID", "NAME", "STATE", "RST", "REQS", "IN", "OUT", "KICKS", "INTS", "ERR", "CPU", "MEM"]
    rows = {line.split()[1]: line.split() for line in lines[3:] if line.split()[0].isdigit()}
    assert {name: int(row[0]) for name, row in rows.items()} == workers
    assert all(len(row) == len(headings) for row in rows.values())
    assert rows["vda"][2:4] == ["running", "0"] and int(rows["vda"][4]) > 0
    assert sum("queue " in line for line in lines) == 3


def test_numbers_and_names_of_any_size_keep_the_columns(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with prompt("--name", "n" * 200, "--block", str(make_disk(deep / "x", 1))) as launched:
        lines = ps(str(launched.pid)).stdout.splitlines()

    assert max(map(len, lines)) <= WIDTH
    assert lines[0].endswith("nnn+")


@pytest.mark.parametrize(
    "name",
    ["two words", "-dash", "münchen", "日本", "'\"$HOME`", "a/b", "100%s{}", "\\x1b", "é"],
)
def test_a_guest_of_any_name_is_found_by_it(name: str) -> None:
    with prompt(f"--name={name}") as launched:
        ran = ps("--", name)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.startswith(f"guest {name}\n")
        (guest,) = json.loads(ps("--json", "--", name).stdout)

    assert (guest["name"], guest["pid"]) == (name, launched.pid)


def test_a_kernel_with_any_name_does_nothing_to_the_terminal(tmp_path: Path) -> None:
    kernel = os.fsencode(tmp_path) + b"/\x1b[31m\n\xff"
    os.symlink(GUEST, kernel)
    with Launch("run", MEM, os.fsdecode(kernel), "quiet") as launched:
        launched.wait_until_ready()
        ran = ps(str(launched.pid))
        guest = described(launched)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == f"guest \\x1b[31m\\x0a\\xdcff-{launched.pid}"
    assert os.fsencode(guest["kernel"]) == kernel


def test_no_guests_are_no_error(user_alone: tuple[str, ...]) -> None:
    env = dict(os.environ)
    for words, out in (((), "no guests\n"), (("--json",), "[]\n")):
        ran = subprocess.run([*user_alone, *LGMP, "ps", *words], check=False, capture_output=True, text=True, env=env)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, out, "")


@pytest.fixture
def user_alone() -> tuple[str, ...]:
    """The prefix of commands by a user who has no guests but those of this test."""
    user = 1_000_000 + os.getpid()
    return ("unshare", "--user", f"--map-user={user}", f"--map-group={user}")


def test_two_guests_of_one_name_are_both_listed_and_each_is_found_by_its_pid(user_alone: tuple[str, ...]) -> None:
    with prompt("--name", "twin", prefix=user_alone) as one, prompt("--name", "twin", prefix=user_alone) as two:
        for launched in (one, two):
            ran = subprocess.run(
                [*user_alone, *LGMP, "ps", str(launched.pid)], check=True, capture_output=True, text=True
            )
            assert f"pid {launched.pid}," in ran.stdout and ran.stdout.count("guest twin") == 1
        ran = subprocess.run([*user_alone, *LGMP, "ps"], check=True, capture_output=True, text=True)
        assert ran.stdout.count("guest twin\n") == 2
        ran = subprocess.run([*user_alone, *LGMP, "ps", "twin"], check=False, capture_output=True, text=True)

    pids = ", ".join(str(pid) for pid in sorted((one.pid, two.pid)))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"lgmp: there are 2 guests of the name twin: give the pid of one, of {pids}\n"


def test_a_guest_that_there_is_not_is_one_line_that_says_which_there_are() -> None:
    with prompt("--name", "other") as launched:
        ran = ps("nosuch")

    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("lgmp: no guest has the name or the pid nosuch; there is ")
    assert f"{launched.pid} (other)" in ran.stderr and ran.stderr.count("\n") == 1


def test_a_launcher_that_does_not_answer_is_listed_as_such_and_holds_up_no_other() -> None:
    with prompt("--name", "well") as well, prompt() as stopped:
        stopped.freeze()
        ran = ps()
        listed = {guest["pid"]: guest for guest in json.loads(ps("--json").stdout)}
        stopped.signal(signal.SIGCONT)

    assert ran.returncode == 0
    assert "guest well\n" in ran.stdout
    assert f"guest {stopped.pid}\n  the launcher {stopped.pid} does not answer" in ran.stdout
    assert listed[stopped.pid].keys() == GUEST_KEYS == listed[well.pid].keys()
    assert (listed[stopped.pid]["state"], listed[stopped.pid]["workers"]) == ("not answering", [])
    assert (listed[well.pid]["state"], listed[well.pid]["error"]) == ("running", None)


def test_a_guest_is_found_by_a_user_with_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from cron, which has no XDG_RUNTIME_DIR."""
    env = {name: value for name, value in os.environ.items() if name not in ("XDG_RUNTIME_DIR", "TMPDIR")}
    with prompt("--name", "elsewhere", env=env) as launched:
        assert described(launched)["name"] == "elsewhere"


def test_a_guest_with_many_devices_is_shown_whole(tmp_path: Path) -> None:
    disks = [word for number in range(20) for word in ("--block", f"{make_disk(tmp_path / str(number), 1)},ro")]
    with launch("quiet", *disks) as launched:
        launched.out.wait_for("test> ")
        assert len(described(launched)["workers"]) == 21


def test_ps_disturbs_no_worker(disk: list[str]) -> None:
    with prompt(*disk) as launched:
        pid = launched.workers()["vda"]
        os.kill(pid, signal.SIGSTOP)
        assert worker_of(described(launched), "vda")["pid"] == pid
        assert command_line(pid).startswith("lgmp-block vda")
        os.kill(pid, signal.SIGCONT)


# Numbers


@pytest.mark.parametrize(
    ("number", "count", "size"),
    [
        (None, "-", "-"),
        (0, "0", "0"),
        (0.25, "0.2", "0.2"),
        (9.99, "10", "10"),
        (999, "999", "999"),
        (1000, "1.0k", "1000"),
        (1024, "1.0k", "1.0k"),
        (9_960, "10k", "9.7k"),
        (999_499, "999k", "976k"),
        (999_500, "1.0M", "976k"),
        (64 << 20, "67M", "64M"),
        (10**18, "1.0E", "888P"),
    ],
)
def test_numbers_are_short(number: float | None, count: str, size: str) -> None:
    assert (human.count(number), human.size(number)) == (count, size)


@pytest.mark.parametrize("power", range(19))
def test_no_number_is_longer_than_its_column(power: int) -> None:
    for number in (10**power, 10**power - 1, 1 << (3 * power), (1 << (3 * power)) - 1, 9.95 * 10**power):
        assert max(len(human.count(number)), len(human.size(number))) <= 5


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (0, "0.00s"),
        (9.994, "9.99s"),
        (9.996, "10.0s"),
        (59.96, "1m00s"),
        (3599.6, "1h00m"),
        (86399.6, "1d00h"),
        (100 * 86400, "100d00h"),
    ],
)
def test_times_are_short(number: float | None, text: str) -> None:
    assert human.seconds(number) == text
