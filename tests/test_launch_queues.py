"""The names of message queues: that they are there only while workers start, and nothing is left of them.

All of it in a namespace where queues can be seen.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import GUEST, LGMP, MEM, Launch, launch, make_disk, session_processes, wait_until

WORKERS = ["vda", "vdb", "console"]


@pytest.fixture
def disks(tmp_path: Path) -> list[str]:
    """The options for two disks."""
    return [word for name in ("a", "b") for word in ("--block", str(make_disk(tmp_path / name)))]


class Namespace:
    """A mount and IPC namespace of its own where /dev/mqueue is mounted: `prefix` starts a command in it."""

    SETUP = """
        dev=$(mktemp -d) && mount -t tmpfs none $dev && mkdir $dev/mqueue $dev/pts $dev/shm &&
        for node in null zero full random urandom tty; do
            touch $dev/$node && mount --bind /dev/$node $dev/$node || exit 1
        done &&
        mount -t mqueue none $dev/mqueue && mount --rbind $dev /dev && rmdir $dev 2>/dev/null
        echo ready && exec cat
    """

    def __init__(self) -> None:
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        self._process = subprocess.Popen(
            ["unshare", *user, "--mount", "--ipc", "sh", "-c", self.SETUP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        user = ["--user", "--preserve-credentials"] if user else []
        self.prefix = ("nsenter", *user, "--mount", "--ipc", "--target", str(self._process.pid), "--")

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def queues(self) -> list[str]:
        """The names of all message queues."""
        return sorted(os.listdir(f"/proc/{self._process.pid}/root/dev/mqueue"))

    def make_queue(self, name: str) -> None:
        """A queue that somebody left behind."""
        program = f"import posix_ipc; posix_ipc.MessageQueue('/{name}', posix_ipc.O_CREX).close()"
        subprocess.run([*self.prefix, LGMP[0], "-c", program], check=True)

    def run(self, commands: str, *options: str) -> int:
        """Run a guest to its end; the launcher's exit status."""
        with launch(f"quiet {commands}", *options, prefix=self.prefix) as launched:
            return launched.end()[0]


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def test_queues_have_names_only_until_all_workers_are_ready(namespace: Namespace, disks: list[str]) -> None:
    with launch("quiet", *disks, prefix=namespace.prefix) as launched:
        wait_until(lambda: f"lgmp.{launched.pid}.console.done" in namespace.queues(), "queues")
        wait_until(lambda: not namespace.queues(), "no queues")
        launched.command("blk -d 0 crc; blk -d 1 crc")
        launched.send("poweroff\n")

        assert launched.end()[0] == 0
    assert namespace.queues() == []


def test_the_next_launch_sweeps_what_dead_launchers_left(namespace: Namespace) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    foreign = ["lgmp", "lgmp.", "lgmp.x.vda", "other"]
    for name in (f"lgmp.{dead.pid}.vda", f"lgmp.{dead.pid}.vda.done", f"lgmp.{os.getpid()}.vda", *foreign):
        namespace.make_queue(name)

    code = namespace.run("poweroff")

    left = namespace.queues()
    for name in left:
        os.unlink(f"/proc/{namespace._process.pid}/root/dev/mqueue/{name}")
    assert code == 0
    assert left == sorted([*foreign, f"lgmp.{os.getpid()}.vda"])


@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_a_launcher_killed_at_any_moment_leaves_nothing_that_the_next_does_not_sweep(
    whom: str, namespace: Namespace, disks: list[str]
) -> None:
    for step in range(20):
        with launch("quiet", *disks, prefix=namespace.prefix) as launched:
            time.sleep(step * 0.012)  # any moment will do
            with contextlib.suppress(ProcessLookupError):
                (os.kill if whom == "launcher" else os.killpg)(launched.session, signal.SIGKILL)
            launched.process.kill()  # it may not have had a group of its own yet
            launched.wait()
            wait_until(lambda it=launched: not session_processes(it.session), "workers gone")  # type: ignore[misc]

    assert namespace.run("poweroff") == 0
    assert namespace.queues() == []


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_killed_at_any_moment_ends_the_guest_where_it_is_to(
    name: str, namespace: Namespace, disks: list[str]
) -> None:
    for step in range(8):
        with launch("quiet", *disks, "--on-crash", "stop", prefix=namespace.prefix) as launched:
            pid = kill_at_some_moment(launched, name, step)
            code, _out, err = launched.end()

        assert (code, err) == (1, f"lgmp: worker {name} (pid {pid}) was killed by SIGKILL\n")
    assert namespace.queues() == []


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_killed_at_any_moment_has_a_successor(name: str, namespace: Namespace, disks: list[str]) -> None:
    for step in range(8):
        with launch("quiet", *disks, prefix=namespace.prefix) as launched:
            pid = kill_at_some_moment(launched, name, step)
            launched.err.wait_for("started again")
            launched.wait_until_ready()
            # It sees no names in there, and the successor may not be READY yet.
            wait_until(lambda: not namespace.queues(), "no queues")
            launched.command("blk -d 0 crc; blk -d 1 crc")
            launched.send("poweroff\n")
            code, out, err = launched.end()

        assert code == 0
        assert out.count("blk crc: status 0") == 2
        assert err.startswith(f"lgmp: worker {name} (pid {pid}) was killed by SIGKILL; started again as pid ")
        assert err.count("\n") == 1
    assert namespace.queues() == []


def kill_at_some_moment(launched: Launch, name: str, step: int) -> int:
    """Kill a worker soon after it was started, later with each `step`; gives its process id."""
    wait_until(lambda: name in launched.workers(), f"worker {name}")
    pid = launched.workers()[name]
    time.sleep(step * 0.02)  # any moment will do
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_failure_to_start_leaves_no_queue(namespace: Namespace, disks: list[str]) -> None:
    with Launch("run", MEM, "/dev/null", *disks, prefix=namespace.prefix) as launched:
        assert launched.end()[0] == 1
    with Launch("run", MEM, GUEST, *disks, "--initrd", "/nowhere", prefix=namespace.prefix) as launched:
        assert launched.end()[0] == 1

    assert namespace.queues() == []
