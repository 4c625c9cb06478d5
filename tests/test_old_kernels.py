"""Launches on a kernel of Linux 3.12's time: what came later answers ENOSYS, or EPERM as filters of containers do.

There are no memfds and seals, no pidfds, no getrandom, no close_range, no preadv2 and more; see old_kernel.py.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import old_kernel
import pytest
from launching import PROMPT, Launch, Terminal, launch, make_disk, prompt, wait_until

import lgmp

pytestmark = pytest.mark.skipif(not old_kernel.can_be_entered(), reason="no filters of system calls in this kernel")

WORKERS = ["vda", "rng0", "console"]


@pytest.fixture(params=["ENOSYS", "EPERM"])
def old(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """What a command is started by, so that it sees an old kernel."""
    return (*old_kernel.PREFIX, *(() if request.param == "ENOSYS" else (request.param,)))


@pytest.fixture
def devices(tmp_path: Path) -> list[str]:
    """The options for a disk and random bytes."""
    return ["--block", str(make_disk(tmp_path / "disk.img")), "--rng"]


def mapped_files(pid: int) -> set[str]:
    """The shared files that a process has mapped to write to."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(None, 5)[5] for line in lines if line.split()[1] == "rw-s"}


@pytest.mark.parametrize(
    "call", ["os.memfd_create('x')", "os.pidfd_open(os.getpid())", "os.getrandom(1)", "os.copy_file_range(0, 1, 1)"]
)
def test_there_is_nothing_that_came_later(call: str, old: tuple[str, ...]) -> None:
    asked = subprocess.run(
        [*old, sys.executable, "-c", f"import os; {call}"], check=False, capture_output=True, text=True
    )

    wanted = "PermissionError" if "EPERM" in old else "Function not implemented"
    assert wanted in asked.stderr


def test_the_guest_checks_itself(old: tuple[str, ...]) -> None:
    with Launch("demo", prefix=old) as launched:
        code, out, _err = launched.end()

    assert code == 0, out
    assert out.splitlines()[-1] == "SELF-CHECK PASSED"


def test_all_devices_work(old: tuple[str, ...], devices: list[str]) -> None:
    with prompt(*devices, prefix=old) as launched:
        launched.command("blk write 0 8 1; blk verify 0 8 1")
        launched.command("rng read 100")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert (code, err) == (0, "")
    assert "blk verify 0 8: status 0 all equal" in out
    assert "rng read: 100 bytes" in out


def test_a_guest_reboots(old: tuple[str, ...], devices: list[str]) -> None:
    with prompt(*devices, prefix=old) as launched:
        before = launched.descriptors()
        launched.send("reboot\n")
        launched.out.wait_for(PROMPT, times=2)
        launched.wait_until_ready()
        after = launched.descriptors()
        launched.send("poweroff\n")
        code, _out, err = launched.end()

    assert (code, err) == (0, "")
    assert [name.split(".")[0] for name in after] == [name.split(".")[0] for name in before]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda number: number.name)
@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_is_killed_ends_the_guest_and_is_named(
    name: str, number: signal.Signals, old: tuple[str, ...], devices: list[str]
) -> None:
    with prompt(*devices, "--on-crash", "stop", prefix=old) as launched:
        pid = launched.workers()[name]
        os.kill(pid, number)
        code, _out, err = launched.end()

    assert (code, err) == (1, f"lgmp: worker {name} (pid {pid}) was killed by {number.name}\n")


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_is_killed_while_it_starts_ends_the_guest(
    name: str, old: tuple[str, ...], devices: list[str]
) -> None:
    with launch("quiet", *devices, "--on-crash", "stop", prefix=old) as launched:
        wait_until(lambda: name in launched.workers(), f"worker {name}")
        pid = launched.workers()[name]
        os.kill(pid, signal.SIGKILL)
        code, _out, err = launched.end()

    assert (code, err) == (1, f"lgmp: worker {name} (pid {pid}) was killed by SIGKILL\n")


def test_a_worker_that_is_killed_has_a_successor_there_too(old: tuple[str, ...], devices: list[str]) -> None:
    with prompt(*devices, prefix=old) as launched:
        before = launched.workers()
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        launched.err.wait_for("started again", times=len(before))
        launched.command("blk crc")
        launched.command("rng read 16")
        launched.send("poweroff\n")
        code, out, err = launched.end()

    assert code == 0
    assert "16 bytes" in out and "blk crc" in out
    assert sorted(re.findall(r"worker \w+ \(pid (\d+)\) was killed by SIGKILL", err)) == sorted(
        map(str, before.values())
    )


def test_all_workers_killed_at_once_end_the_guest_in_one_line(old: tuple[str, ...], devices: list[str]) -> None:
    with prompt(*devices, "--on-crash", "stop", prefix=old) as launched:
        for pid in launched.workers().values():
            os.kill(pid, signal.SIGKILL)
        code, _out, err = launched.end()

    assert code == 1
    assert re.fullmatch(r"lgmp: worker \w+ \(pid \d+\) was killed by SIGKILL\n", err)


def test_a_worker_that_is_stopped_and_goes_on_has_not_ended(old: tuple[str, ...], devices: list[str]) -> None:
    with prompt(*devices, prefix=old) as launched:
        pid = launched.workers()["vda"]
        for _ in range(3):
            os.kill(pid, signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)
        launched.command("blk -d 0 crc")
        launched.send("poweroff\n")
        code, _out, err = launched.end()

    assert (code, err) == (0, "")


def test_the_ends_of_workers_are_heard_of_by_a_launcher_whose_parent_ignored_them(devices: list[str]) -> None:
    # As a shell's `trap '' CHLD` leaves it to what it starts.
    program = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD]); os.execv(sys.argv[1], sys.argv[1:])"
    )
    before = sys.executable, "-c", program, *old_kernel.PREFIX
    with prompt(*devices, "--on-crash", "stop", prefix=before) as launched:
        pid = launched.workers()["vda"]
        os.kill(pid, signal.SIGKILL)
        code, _out, err = launched.end()

    assert (code, err) == (1, f"lgmp: worker vda (pid {pid}) was killed by SIGKILL\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("command", ["", "spin 1000", "console lines 1000000 60"])
def test_a_signal_ends_a_guest(number: signal.Signals, command: str, old: tuple[str, ...]) -> None:
    with launch(f"quiet echo ready; {command}", prefix=old) as launched:
        launched.out.wait_for("ready")
        launched.signal(number)
        code, _out, err = launched.end()

    assert (code, err) == (128 + number, "")


def test_three_times_control_c_ends_a_guest(old: tuple[str, ...]) -> None:
    with Terminal() as terminal, prompt(prefix=old, terminal=terminal) as launched:
        for count in range(1, 4):
            terminal.type("\x03")
            if count < 3:
                terminal.out.wait_for("^C", times=count)
        code, _out, _err = launched.end()

    assert code == 2


def test_a_signal_that_is_ignored_stays_ignored(old: tuple[str, ...]) -> None:
    with prompt(prefix=("env", "--ignore-signal=HUP", *old)) as launched:
        launched.signal(signal.SIGHUP)
        launched.send("echo still here; poweroff\n")
        code, out, _err = launched.end()

    assert code == 0
    assert "still here\n" in out


@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_a_launcher_that_is_killed_leaves_nothing(whom: str, old: tuple[str, ...], devices: list[str]) -> None:
    before = shared_memory_files()
    with prompt(*devices, prefix=old) as launched:
        (os.kill if whom == "launcher" else os.killpg)(launched.session, signal.SIGKILL)
        launched.wait()
        launched.wait_until_nothing_is_left()

    assert shared_memory_files() == before


def shared_memory_files() -> set[str]:
    """The names of all that is in the directories where the memory of guests may be."""
    return {
        f"{directory}/{name}"
        for directory in ("/dev/shm", "/run/shm", "/tmp", "/var/tmp")
        if os.path.isdir(directory)
        for name in os.listdir(directory)
        if name.startswith(".lgmp")
    }


def test_memory_is_a_file_that_no_path_leads_to(old: tuple[str, ...], devices: list[str]) -> None:
    before = shared_memory_files()
    with prompt(*devices, prefix=old) as launched:
        mapped = mapped_files(launched.workers()["vda"])
        visible = shared_memory_files()
        modes = {os.stat(f"/proc/{launched.pid}/fd/{name}").st_mode & 0o777 for name in memory_descriptors(launched)}

    assert len(mapped) == 2, mapped  # guest memory, and the control page
    assert all(re.fullmatch(r"/.+/\.lgmp-(guest|control)\.\d+\.\d+ \(deleted\)", name) for name in mapped), mapped
    assert visible == before
    assert modes == {0o600}


def memory_descriptors(launched: Launch) -> Iterator[str]:
    for name in os.listdir(f"/proc/{launched.pid}/fd"):
        if "/.lgmp-" in os.readlink(f"/proc/{launched.pid}/fd/{name}"):
            yield name


# Where there is little memory


def small(shm: str, others: str = "size=1m") -> tuple[str, ...]:
    """A command in a mount namespace whose directories for shared memory are tmpfs of these options."""
    checkout = shlex.quote(str(Path(lgmp.__file__).resolve().parents[1]))
    script = (
        # It may lie in one of those directories itself.
        f"mount --bind {checkout} /mnt && "
        f"mount -t tmpfs -o {shm} shm /dev/shm && unset XDG_RUNTIME_DIR && "
        # One may be a link to the other.
        "for d in /run/shm /tmp /var/tmp; do "
        f"test -L $d -o ! -d $d || mount -t tmpfs -o {others} other $d || exit 1; done && "
        f"{{ test -d {checkout} || {{ mkdir -p {checkout} && mount --bind /mnt {checkout}; }}; }} && umount /mnt && "
        'exec "$@"'
    )
    return ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)), "sh", "-c", script, "sh")


def test_too_little_room_is_said_in_one_line_with_the_remedy(old: tuple[str, ...]) -> None:
    with launch("quiet poweroff", prefix=(*small("size=8m"), *old)) as launched:
        code, _out, err = launched.end()

    assert code == 1
    assert re.fullmatch(
        r"lgmp: no room for 16 MiB of shared memory: /dev/shm has 8 MiB left; "
        r"mount -o remount,size=17M /dev/shm as root, or try less MEM\n",
        err,
    ), err


@pytest.mark.skipif(os.geteuid() != 0, reason="the remedy is root's")
def test_the_remedy_helps(old: tuple[str, ...]) -> None:
    remedy = ("sh", "-c", 'mount -o remount,size=17M /dev/shm && exec "$@"', "sh")
    with launch("quiet echo hello; poweroff", prefix=(*small("size=8m"), *remedy, *old)) as launched:
        code, out, err = launched.end()

    assert (code, out, err) == (0, "hello\n", "")


@pytest.mark.parametrize(
    ("shm", "others", "where"),
    [
        ("size=64m", "size=64m", "/dev/shm"),
        ("size=0", "size=1m", "/dev/shm"),  # of any size
        ("size=8m", "size=64m", "/tmp"),
        ("size=64m,ro", "size=64m", "/tmp"),
    ],
)
def test_memory_is_where_there_is_room_for_it(shm: str, others: str, where: str) -> None:
    if where == "/tmp" and os.path.isdir("/run/shm") and not os.path.islink("/run/shm"):
        where = "/run/shm"
    with prompt(prefix=(*small(shm, others), *old_kernel.PREFIX)) as launched:
        mapped = mapped_files(launched.workers()["console"])

    assert any(name.startswith(f"{where}/") for name in mapped), mapped
