"""What becomes of a guest whose processes die, and that nothing is left of it: no process, no queue."""

from __future__ import annotations

import os
import re
import signal
import sys
import sysconfig
from pathlib import Path

import pytest
from launching import (
    launch,
    make_disk,
    prompt,
    wait_until,
)

import lgmp

pytestmark = pytest.mark.every_host

DEADLY = [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV]
WORKERS = ["vda", "vdb", "console"]
# The guest ends with its first worker.
STOP = ("--on-crash", "stop")


@pytest.fixture
def disks(tmp_path: Path) -> list[str]:
    """The options for two disks."""
    return [word for name in ("a", "b") for word in ("--block", str(make_disk(tmp_path / name)))]


# Workers that end, where that is to be the guest's end


@pytest.mark.parametrize("number", DEADLY, ids=lambda number: number.name)
@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_is_killed_ends_the_guest_and_is_named(
    name: str, number: signal.Signals, disks: list[str]
) -> None:
    with prompt(*disks, *STOP) as launched:
        pid = launched.workers()[name]
        os.kill(pid, number)
        code, _out, err = launched.end()

    assert code == 1
    assert err == f"lgmp: worker {name} (pid {pid}) was killed by {number.name}\n"


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_is_killed_while_it_starts_ends_the_guest(name: str, disks: list[str]) -> None:
    with launch("quiet", *disks, *STOP) as launched:
        wait_until(lambda: name in launched.workers(), f"worker {name}")
        pid = launched.workers()[name]
        os.kill(pid, signal.SIGKILL)
        code, _out, err = launched.end()

    assert code == 1
    assert err == f"lgmp: worker {name} (pid {pid}) was killed by SIGKILL\n"


@pytest.mark.parametrize(
    ("name", "command"), [("vda", "blk stress 1000000 1"), ("console", "console lines 1000000 70")]
)
def test_a_worker_that_is_killed_at_work_ends_the_guest(name: str, command: str, disks: list[str]) -> None:
    with prompt(*disks, *STOP) as launched:
        launched.send(f"console lines 5 20; {command}\n")
        launched.out.wait_for("5 done")
        pid = launched.workers()[name]
        os.kill(pid, signal.SIGKILL)
        code, _out, err = launched.end()

    assert code == 1
    assert err == f"lgmp: worker {name} (pid {pid}) was killed by SIGKILL\n"


def test_a_worker_that_dies_in_a_reset_ends_the_guest(disks: list[str]) -> None:
    with prompt(*disks, *STOP) as launched:
        pid = launched.workers()["vda"]
        os.kill(pid, signal.SIGSTOP)
        launched.send("blk id\n")
        launched.out.wait_for("blk id\n")
        os.kill(pid, signal.SIGKILL)
        code, _out, err = launched.end()

    assert code == 1
    assert err == f"lgmp: worker vda (pid {pid}) was killed by SIGKILL\n"


def test_all_workers_killed_at_once_end_the_guest_in_one_line(disks: list[str]) -> None:
    with prompt(*disks, *STOP) as launched:
        for pid in launched.workers().values():
            os.kill(pid, signal.SIGKILL)
        code, _out, err = launched.end()

    assert code == 1
    assert re.fullmatch(r"lgmp: worker \w+ \(pid \d+\) was killed by SIGKILL\n", err)


# Workers that end, and have successors


@pytest.mark.parametrize("number", DEADLY, ids=lambda number: number.name)
@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_is_killed_is_named_and_started_again(
    name: str, number: signal.Signals, disks: list[str]
) -> None:
    with prompt(*disks) as launched:
        pid = launched.workers()[name]
        os.kill(pid, number)
        launched.err.wait_for("started again")
        launched.command("blk -d 0 crc; blk -d 1 crc")
        launched.wait_until_ready()
        successor = launched.workers()[name]
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert out.count("blk crc: status 0") == 2
    start = f"lgmp: worker {name} (pid {pid}) was killed by {number.name}; started again as pid {successor}, "
    assert err.startswith(start) and err.count("\n") == 1


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_is_killed_while_it_starts_is_started_again(name: str, disks: list[str]) -> None:
    with launch("quiet", *disks) as launched:
        wait_until(lambda: name in launched.workers(), f"worker {name}")
        pid = launched.workers()[name]
        os.kill(pid, signal.SIGKILL)
        launched.err.wait_for(f"lgmp: worker {name} (pid {pid}) was killed by SIGKILL; started again as pid ")
        launched.wait_until_ready()
        launched.command("blk -d 0 crc; blk -d 1 crc")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert out.count("blk crc: status 0") == 2


def test_a_disk_goes_on_under_load_whose_worker_is_killed_and_killed_again(disks: list[str]) -> None:
    with prompt(*disks) as launched:
        launched.send("console lines 5 20; blk stress 2000 1; poweroff\n")
        launched.out.wait_for("5 done")
        for times in range(1, 9):
            os.kill(launched.workers()["vda"], signal.SIGKILL)
            launched.err.wait_for("started again", times)
            wait_until(lambda: "vda" in launched.workers() or launched.process.poll() is not None, "its successor")
            if launched.process.poll() is not None:
                break
        code, out, _err = launched.end()

    assert code == 0
    assert ", 0 failed, 0 sectors wrong" in out


def test_a_worker_that_dies_in_a_reset_has_a_successor_for_the_fresh_device(disks: list[str]) -> None:
    with prompt(*disks) as launched:
        pid = launched.workers()["vda"]
        os.kill(pid, signal.SIGSTOP)
        launched.send("blk crc; poweroff\n")
        launched.out.wait_for("blk crc; poweroff\n")
        os.kill(pid, signal.SIGKILL)
        code, out, err = launched.end()

    assert code == 0
    assert "blk crc: status 0" in out
    assert err.startswith(f"lgmp: worker vda (pid {pid}) was killed by SIGKILL; started again as pid ")


def test_all_workers_killed_at_once_are_all_started_again(disks: list[str]) -> None:
    with prompt(*disks) as launched:
        for pid in launched.workers().values():
            os.kill(pid, signal.SIGKILL)
        launched.err.wait_for("started again", len(WORKERS))
        launched.command("blk -d 0 crc; blk -d 1 crc")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert out.count("blk crc: status 0") == 2


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("raise SystemExit(3)", r"exited with code 3"),
        ("raise SystemExit(0)", r"exited with code 0"),
    ],
)
def test_a_worker_that_does_not_come_up_ends_the_guest(
    program: str, end: str, tmp_path: Path, disks: list[str]
) -> None:
    with launch("quiet", *disks, env=with_broken_workers(tmp_path, program)) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert re.fullmatch(rf"lgmp: worker \w+ \(pid \d+\) {end}\n", err), err


def test_a_worker_that_always_crashes_ends_the_guest_where_it_is_to(tmp_path: Path, disks: list[str]) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"
    with launch("quiet", *disks, *STOP, env=with_broken_workers(tmp_path, crash)) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert re.fullmatch(r"lgmp: worker \w+ \(pid \d+\) was killed by SIGABRT\n", err), err


def with_broken_workers(directory: Path, program: str) -> dict[str, str]:
    """An environment where disks and the console have a worker that is `program`, and nothing else."""
    broken = directory / "broken" / "workers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").touch()
    for module in ("block", "console"):
        (broken / f"{module}.py").write_text(f"{program}\n")
    return {**os.environ, "PYTHONPATH": str(broken.parent)}


def test_a_worker_that_cannot_be_started_is_said_in_one_line(disks: list[str]) -> None:
    # An interpreter that is told that it is a file which is not there, and so has to be told where its library is.
    env = {
        **os.environ,
        "PYTHONHOME": sys.base_prefix,
        "PYTHONPATH": f"{Path(lgmp.__file__).parents[1]}:{sysconfig.get_path('purelib')}",
    }
    prefix = ("bash", "-c", 'exec -a /nowhere/python "$@"', "bash")
    with launch("quiet", *disks, env=env, prefix=prefix) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert re.fullmatch(r"lgmp: cannot start the worker of vda: .+'/nowhere/python'\n", err), err


def test_a_guest_goes_on_while_a_worker_it_does_not_need_is_stopped(disks: list[str]) -> None:
    with prompt(*disks) as launched:
        pid = launched.workers()["vdb"]
        os.kill(pid, signal.SIGSTOP)
        launched.command("blk -d 0 crc")
        os.kill(pid, signal.SIGCONT)
        launched.command("blk -d 1 crc")
        launched.send("poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert out.count("blk crc: status 0") == 2


def test_terminating_the_whole_session_ends_it_in_order(disks: list[str]) -> None:
    # As timeout(1) and many a script do. Whether a worker is started again before that is seen is chance.
    with prompt(*disks) as launched:
        os.killpg(launched.session, signal.SIGTERM)
        code, _out, err = launched.end()

    assert code == 128 + signal.SIGTERM
    assert re.fullmatch(r"(lgmp: worker \w+ \(pid \d+\) was killed by SIGTERM; started again as .*\n)*", err)


# The launcher


def test_workers_go_when_their_launcher_is_killed(disks: list[str]) -> None:
    with prompt(*disks) as launched:
        launched.signal(signal.SIGKILL)
        launched.wait()
        launched.wait_until_nothing_is_left()
        launched.err.join()

        assert launched.err.text == ""


def test_workers_go_when_their_launcher_is_killed_while_they_work(disks: list[str]) -> None:
    with prompt(*disks) as launched:
        launched.send("console lines 5 20; blk stress 1000000 1\n")
        launched.out.wait_for("5 done")
        launched.signal(signal.SIGKILL)
        launched.wait()
        launched.wait_until_nothing_is_left()


def test_workers_go_when_their_launcher_is_killed_and_nobody_reads_the_output() -> None:
    reading, writing = os.pipe()
    with launch("quiet console lines 100000 70", stdout=writing) as launched:
        os.read(reading, 1)
        launched.signal(signal.SIGKILL)
        launched.wait()
        launched.wait_until_nothing_is_left()
    os.close(reading)
    os.close(writing)


def test_everything_killed_at_once_leaves_nothing(disks: list[str]) -> None:
    with prompt(*disks) as launched:
        os.killpg(launched.session, signal.SIGKILL)
        launched.wait()
        launched.wait_until_nothing_is_left()
