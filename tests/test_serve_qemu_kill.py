"""Workers of `lgmp serve` killed at random, and started again, while a Linux guest in QEMU works its disk and network.

    scripts/test tests/test_serve_qemu_kill.py --kills 200 --seed 1

The seed decides who is killed and when; what the victim is doing just then is up to the machine. QEMU 7.2 aborts where
the back end of a vhost-user-rng-pci is on a chardev with reconnect, so there is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from random import Random

import pytest
from launching import HANGS_AFTER, Launch, wait_until
from networks import GUEST_IP, HOST_IP, Namespace, needs
from qemu_guest import Guest, block, needs_qemu, net
from serving import served, worker_of
from web_server import WebServer

pytestmark = needs_qemu

MIB = 1 << 20
DISK = 64 * MIB
MAC = "02:00:00:00:ab:0c"
# How many are killed while they are at work, and not at any time.
AT_WORK = 0.8
# How many of these are in a system call, or have just come out of one. Others may be looking at their rings in vain.
IN_A_CALL = 0.5
# From one look whether a worker is at work to the next, in seconds.
BETWEEN_LOOKS = 0.0, 0.01
# Of x86-64 (asm/unistd_64.h): epoll_wait and epoll_pwait.
WAITING_CALLS = (232, 281)
# What a guest's kernel says of a request that was not answered, or not well.
BAD_NEWS = re.compile(r"I/O error|blocked for more than|timed out|timeout|Call Trace|not a head|BUG:")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("--kills")
    return count


class Load:
    """Programs that write to parts of the disk, and read back what they wrote, until they are told to stop.

    Most write a request at a time, past the page cache; the last one through it, which sends many at once.
    """

    PARTS = ("0 4 8k oflag=direct", "4 4 64k oflag=direct", "8 8 2M conv=fsync")
    PLACE = 2 * MIB

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        guest.ask("rm -f stop")
        self._jobs = [guest.start(f"exercise-disk {part}") for part in self.PARTS]

    def written(self) -> list[dict[int, str]]:
        """For each part, the checksums of what was written last to its places."""
        lines = [job.output.splitlines() for job in self._jobs]
        return [{int(line.split()[0]): line.split()[1] for line in part} for part in lines]

    def check_alive(self) -> None:
        """Fail where a program has ended."""
        for job in self._jobs:
            assert not job.ended, (job.wait(), self._guest.kernel_log()[-2000:])

    def end(self, path: Path) -> None:
        """Have the programs stop; fail where one was not content, or the file has not what they wrote last."""
        self._guest.ask("touch stop")
        for job in self._jobs:
            answer = job.wait()
            assert answer.status == 0, (answer, self._guest.kernel_log()[-2000:])
        content = path.read_bytes()
        for part in self.written():
            assert part
            for place, digest in part.items():
                assert hashlib.md5(content[place * self.PLACE :][: self.PLACE]).hexdigest() == digest, f"place {place}"


def kill_worker(launched: Launch, random: Random, *, at_work: bool) -> None:
    """Kill whoever serves the device now, and wait until that is gone.

    `at_work`: when it waits for nothing, but does what it was asked for; that is a small part of its time.
    """
    pid = worker_of(launched)
    in_a_call = random.random() < IN_A_CALL
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        deadline = time.monotonic() + HANGS_AFTER
        while at_work and not stopped_at_work(pid, in_a_call=in_a_call):
            os.kill(pid, signal.SIGCONT)
            time.sleep(random.uniform(*BETWEEN_LOOKS))  # another moment
            assert time.monotonic() < deadline, "the worker has nothing to do"
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in launched.workers().values(), "the killed worker is gone")


def stopped_at_work(pid: int, *, in_a_call: bool) -> bool:
    """Stop a process; gives whether it was doing anything but sleep until there is something to do.

    `in_a_call`: whether that has to be a system call.
    """
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "stopped")
    # proc(5): the number of the system call that it is in, -1 if it is in none.
    number = int(Path(f"/proc/{pid}/syscall").read_text().split()[0])
    return number not in WAITING_CALLS and (number >= 0 or not in_a_call)


# How many of each kind a worker has that serves nobody; its one socket is the one that it listens at.
REST = {"socket:": 1, "[eventfd]": 0, "/memfd:memory-backend": 0, "/memfd:lgmp-inflight": 0}


def belongings(worker: int) -> dict[str, int]:
    """How many descriptors and mappings of each kind a worker has."""
    names = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        names += Path(f"/proc/{worker}/maps").read_text().splitlines()
        for number in os.listdir(f"/proc/{worker}/fd"):
            with contextlib.suppress(FileNotFoundError):
                names.append(os.readlink(f"/proc/{worker}/fd/{number}"))
    return {kind: sum(kind in name for name in names) for kind in REST}


def serves(launched: Launch) -> bool:
    """Whether a front end has begun to start a worker's rings.

    Before that none is killed: where a back end ends while it is asked for its features, QEMU 7.2 looks for none again
    (seen with query-chardev: its end of the connection stays "disconnected").
    """
    return any(belongings(worker)["/memfd:memory-backend"] for worker in launched.workers().values())


def wait_until_all_write(load: Load) -> None:
    wait_until(lambda: all(load.written()), "all are writing")


def check_kernel_log(guest: Guest) -> None:
    log = guest.kernel_log()
    assert not BAD_NEWS.search(log), log[-4000:]


def test_a_guest_whose_workers_are_killed_all_the_time_finds_nothing_wrong(
    here: Namespace, tmp_path: Path, kills: int, seed: int
) -> None:
    needs("ping")
    print("seed", seed)
    random = Random(seed)
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(DISK))
    with contextlib.ExitStack() as undo:
        serving = {}
        sockets = {kind: tmp_path / f"{kind}.sock" for kind in ("block", "net")}
        for kind, words in (("block", [str(disk)]), ("net", ["--tunnet", HOST_IP])):
            with here.entered():
                serving[kind] = undo.enter_context(served(kind, *words, "--supervise", socket=sockets[kind]))
        with here.entered():
            server = undo.enter_context(WebServer(HOST_IP, random.randbytes(MIB)))
        devices = [*block(sockets["block"], reconnect=True), *net(sockets["net"], MAC, reconnect=True)]
        guest = undo.enter_context(Guest(devices))
        guest.ask(f"ip address add {GUEST_IP}/24 dev eth0 && ip link set eth0 up")
        load = Load(guest)
        fetch = f"wget -q -O - http://{HOST_IP}:{server.server_port}/ | md5sum"
        fetching = guest.start(f"until test -e stop; do {fetch}; done")

        for _ in range(kills):
            victim = serving[random.choice(["block", "block", "net"])]  # the disk has more to lose
            wait_until(partial(serves, victim), "QEMU has found the worker again")
            kill_worker(victim, random, at_work=random.random() < AT_WORK)
            load.check_alive()

        load.end(disk)
        assert set(fetching.wait().output.split()) == {server.checksum, "-"}
        said = here.ping(GUEST_IP, 3)
        assert said.returncode == 0, said
        check_kernel_log(guest)
        guest.power_off()


def test_a_service_that_is_started_again_goes_on_with_the_requests_that_are_in_flight(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(DISK))
    socket = tmp_path / "disk.sock"
    with contextlib.ExitStack() as service:

        def start() -> Launch:
            return service.enter_context(served("block", str(disk), socket=socket))

        start()
        with Guest(block(socket, reconnect=True)) as guest:
            load = Load(guest)
            wait_until_all_write(load)
            for _ in range(2):
                service.close()
                wait_until(partial(serves, start()), "QEMU has found the new service")
                load.check_alive()
            load.end(disk)
            check_kernel_log(guest)


def test_a_worker_whose_front_end_is_killed_under_load_serves_the_next_with_nothing_left(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(DISK))
    socket = tmp_path / "disk.sock"
    with served("block", str(disk), socket=socket) as launched:
        worker = worker_of(launched)
        for _ in range(2):
            with Guest(block(socket)) as guest:
                wait_until_all_write(Load(guest))
                assert belongings(worker) != REST
            wait_until(lambda: belongings(worker) == REST, "the worker has let go of all")
        assert worker_of(launched) == worker
