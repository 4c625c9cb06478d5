"""Little to live on: an unprivileged user, small limits. And `lgmp doctor`, which looks at what there is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from launching import GUEST, UNPRIVILEGED, Launch, launch, make_disk, run

LINE = re.compile(r"(ok  |note|FAIL)  [a-z ]+: \S.*")


def doctor(*prefix: str, **how: object) -> tuple[int, list[str]]:
    """The doctor's exit status and lines."""
    with Launch("doctor", prefix=prefix, **how) as launched:  # type: ignore[arg-type]
        code, out, err = launched.end()
    assert err == ""
    return code, out.splitlines()


# Users


def test_a_user_without_any_privilege_or_home_can_run_a_guest(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    env = {name: value for name, value in os.environ.items() if name in ("PATH", "VIRTUAL_ENV")}

    code, out, err = run(
        "quiet blk write 0 64 1; blk verify 0 64 1; poweroff", "--block", str(disk), prefix=UNPRIVILEGED, env=env
    )

    assert (code, err) == (0, "")
    assert "blk verify 0 64: status 0 all equal" in out


def test_a_user_without_any_privilege_can_reboot_a_guest() -> None:
    with launch("quiet", prefix=UNPRIVILEGED) as launched:
        launched.out.wait_for("test> ")
        launched.command("reboot")
        launched.send("poweroff\n")

        assert launched.end()[0] == 0


def test_an_empty_environment_is_enough() -> None:
    assert run("quiet echo hello; poweroff", prefix=("env", "-i")) == (0, "hello\n", "")


def test_a_current_directory_that_is_gone_is_no_matter(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    code, out, err = run("quiet echo hello; poweroff", cwd=gone, prefix=("sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh"))

    assert (code, out, err) == (0, "hello\n", "")


# Limits


@pytest.mark.parametrize("limit", range(8, 32, 2))
def test_with_few_descriptors_a_guest_runs_or_one_line_says_why_not(limit: int, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")

    code, _out, err = run("quiet poweroff", "--block", str(disk), prefix=("prlimit", f"--nofile={limit}"))

    assert (code, err.count("\n")) in ((0, 0), (1, 1)), err
    assert code == 0 or re.match("lgmp: .*open", err), err


def test_without_room_for_message_queues_one_line_says_so() -> None:
    code, _out, err = run("quiet poweroff", prefix=("prlimit", "--msgqueue=1000"))

    assert code == 1
    assert re.fullmatch(r"lgmp: cannot make the message queue \S+: .+ulimit -q.+\n", err), err


def test_without_room_for_one_more_queue_one_line_says_so(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    options = [word for _ in range(20) for word in ("--block", str(disk))]

    # In a user namespace of its own, so that queues of others do not count.
    code, _out, err = run("quiet poweroff", *options, prefix=("prlimit", "--msgqueue=16000", *UNPRIVILEGED))

    assert code == 1
    assert re.fullmatch(r"lgmp: cannot make the message queue \S+: .+ulimit -q.+\n", err), err


def test_too_little_address_space_is_said_in_one_line() -> None:
    with Launch("run", "2048", GUEST, prefix=("prlimit", f"--as={1 << 30}")) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert err.startswith("lgmp: ") and err.count("\n") == 1, err


def test_a_limit_on_the_size_of_files_that_guest_memory_exceeds_is_said_in_one_line() -> None:
    code, _out, err = run("quiet poweroff", prefix=("prlimit", f"--fsize={8 << 20}"))

    assert code == 1
    assert re.fullmatch(r"lgmp: cannot make \d+ MiB of guest memory: .+\n", err), err


def test_a_limit_on_the_size_of_files_is_an_error_of_the_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)

    code, out, err = run(
        "quiet blk fill 0 1 1; blk fill 131071 1 1; poweroff",
        *("--block", str(disk)),
        prefix=("prlimit", f"--fsize={32 << 20}"),
    )

    assert code == 0
    assert "blk fill 0 1: status 0" in out
    assert "blk fill 131071 1: status 1" in out
    assert err == "lgmp: vda: write at sector 131071: File too large\n"


# The doctor


def test_the_doctor_is_content_here() -> None:
    code, lines = doctor()

    assert code == 0
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert not any(line.startswith("FAIL") for line in lines)


def test_the_doctor_looks_at_everything_that_guests_need() -> None:
    _code, lines = doctor()

    looked_at = {line[6:].partition(":")[0] for line in lines}
    assert looked_at >= {
        *("machine", "guest memory", "embedded host", "kernel host", "message queues", "bytes in message queues"),
        *("queues", "messages in a queue", "queue file system", "network device", "processors"),
    }


def test_what_is_not_well_comes_with_a_remedy() -> None:
    _code, lines = doctor("prlimit", "--msgqueue=1000")

    for line in lines:
        assert line.startswith("ok") or ";" in line, line


def test_the_doctor_says_what_to_do_about_a_limit_on_message_queues() -> None:
    code, lines = doctor("prlimit", "--msgqueue=1000")

    assert code == 1
    assert any(line.startswith("FAIL  message queues: ") and "ulimit -q" in line for line in lines)
    assert any(line.startswith("note  bytes in message queues: 1000 ") and "ulimit -q 819200" in line for line in lines)


def test_the_doctor_needs_no_privilege() -> None:
    code, _lines = doctor(*UNPRIVILEGED)

    assert code == 0


@pytest.mark.parametrize("arguments", [("doctor",), ("--help",), ("run", "--help")])
def test_a_reader_that_goes_away_is_no_matter(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    # Where Python does not buffer, argparse keeps the failure to itself.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Launch(*arguments, stdout=writing, env=env) as launched:
        code, _out, err = launched.end()
    os.close(writing)

    assert (code, err) == (1, "")


def test_a_full_disk_is_said() -> None:
    with open("/dev/full", "wb") as full, Launch("doctor", stdout=full.fileno()) as launched:
        code, _out, err = launched.end()

    assert (code, err) == (1, "lgmp: No space left on device\n")
