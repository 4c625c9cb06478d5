"""How fast our block worker answers over vhost-user, beside qemu-storage-daemon doing the same with io_uring.

Both serve one file to one client, the driver in vhost_client.c, which sleeps until it is interrupted, as a guest's
driver does. Our worker looks at its ring for a moment before it sleeps (workers/busy_wait.py); the peer does not, nor
with an iothread that polls. The file lies in the page cache of a disk file system: what is measured is the way there
and back, no disk. On a tmpfs the peer would be handicapped, as io_uring has no short way there, so that is refused.

Every job runs several times on each, in turn (ours, theirs, theirs, ours, ...), so that a machine that slows down
meanwhile slows down both; the ratio is that of two neighbours, and what is told is the median of those.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from samples import Samples

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DISK_BYTES = 1 << 30
# Each 8 bytes of the file hold the number of the 4 KiB block that they are of, as the client expects.
BLOCK_BYTES = 4096

OURS = "lgmp"
PEER = "qemu-storage-daemon"
PEER_PACKAGE = "qemu-system-common"

_CHUNK_BYTES = 1 << 20
_WARM_UP_SECONDS = 0.2
# A server that does not listen after so long, in seconds, is given up.
_PATIENCE = 30.0
# What stat(1) calls the file systems that have no disk under them.
_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")


@dataclass(frozen=True, slots=True)
class Job:
    """What the client has in flight: `depth` requests of `block` bytes at random offsets."""

    name: str
    block: int
    depth: int
    write: bool = False

    @property
    def options(self) -> list[str]:
        """As options of the client."""
        words = ["--block", str(self.block), "--depth", str(self.depth)]
        return [*words, "--write"] if self.write else words


JOBS = (
    Job("4 KiB read, depth 1", 4096, 1),
    Job("4 KiB read, depth 32", 4096, 32),
    Job("4 KiB write, depth 32", 4096, 32, write=True),
    Job("128 KiB read, depth 1", 128 << 10, 1),
    Job("128 KiB read, depth 8", 128 << 10, 8),
)


@dataclass(slots=True)
class Figures:
    """What the rounds of one job on one server gave: a figure for each."""

    iops: list[float] = field(default_factory=list)
    mean_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)

    def summaries(self) -> dict[str, Samples]:
        """By name: requests per second, and microseconds from a request's submission to its answer."""
        return {
            "iops": Samples.of(self.iops, "/s"),
            "mean": Samples.of(self.mean_us, "us"),
            "p99": Samples.of(self.p99_us, "us"),
        }


@dataclass(slots=True)
class Measured:
    """All of it: figures by job and server, and why there are none of the peer's where there are not."""

    figures: dict[str, dict[str, Figures]]
    peer_is_missing: str | None

    def ratio(self, job: str) -> Samples:
        """Our requests per second by the peer's, of each round."""
        ours, peers = (self.figures[job][server].iops for server in (OURS, PEER))
        return Samples.of([our / peer for our, peer in zip(ours, peers, strict=True)], "times")


def measure(rounds: int = 5, seconds: float = 2.0, directory: str = ROOT) -> Measured:
    """Run every job `rounds` times on each server, for `seconds` each, on a file of 1 GiB in `directory`.

    The file has no name and nothing is left of it. Raises RuntimeError where there is no disk under `directory`, no C
    compiler, or a request was not answered as it should be.
    """
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(_disk(directory))
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="lgmp-bench-"))
        client = _build_client(place)
        # The file has no name, so it goes by that of our descriptor.
        path = f"/proc/{os.getpid()}/fd/{disk}"
        missing = None
        if shutil.which(PEER) is None:
            missing = f"there is no {PEER} here (Debian has it in the package {PEER_PACKAGE}): lgmp is measured alone"
        servers = []
        for name, command in _COMMANDS.items():
            if name != PEER or missing is None:
                socket = os.path.join(place, name)
                servers.append(stack.enter_context(_serving(name, socket, command(path, socket))))
        measured = Measured({job.name: {server.name: Figures() for server in servers} for job in JOBS}, missing)
        for job in JOBS:
            for number in range(rounds):
                for server in servers[:: -1 if number % 2 else 1]:
                    _read_through(disk)
                    _run(client, job, server, measured.figures[job.name][server.name], seconds)
                    if job.write:
                        os.fsync(disk)  # so that what one wrote is not written to the disk in the other's time
        return measured


def _our_command(path: str, socket: str) -> list[str]:
    return [sys.executable, "-P", "-m", "lgmp", "serve", "block", path, "--socket", socket]


def _peer_command(path: str, socket: str) -> list[str]:
    file = f"driver=file,node-name=file,filename={path},aio=io_uring,cache.direct=off"
    export = f"type=vhost-user-blk,id=export,node-name=file,addr.type=unix,addr.path={socket},writable=on"
    return [PEER, "--blockdev", file, "--export", export]


_COMMANDS = {OURS: _our_command, PEER: _peer_command}


@contextlib.contextmanager
def _disk(directory: str) -> Iterator[int]:
    """The descriptor of a file without a name, filled with the numbers of its blocks."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, check=False)
    if kind.returncode:
        raise RuntimeError(kind.stderr.strip())
    if kind.stdout.strip() in _IN_MEMORY:
        raise RuntimeError(
            f"{directory} is on a {kind.stdout.strip()}, where {PEER} would be at a disadvantage:"
            " name a directory on a disk with --directory"
        )
    with tempfile.TemporaryFile(dir=directory) as file:
        descriptor = file.fileno()
        words = BLOCK_BYTES // 8
        for start in range(0, DISK_BYTES, _CHUNK_BYTES):
            numbers = array.array("Q")
            for block in range(start // BLOCK_BYTES, (start + _CHUNK_BYTES) // BLOCK_BYTES):
                numbers.extend(array.array("Q", [block]) * words)
            os.pwrite(descriptor, numbers, start)
        os.fsync(descriptor)
        yield descriptor


def _read_through(disk: int) -> None:
    """Have the whole file in the page cache, where nobody holds it: there are kernels that take back what is idle."""
    buffer = bytearray(_CHUNK_BYTES)
    for start in range(0, DISK_BYTES, _CHUNK_BYTES):
        os.preadv(disk, [buffer], start)


def _build_client(place: str) -> str:
    """Compile vhost_client.c into the directory `place`; gives the program's path."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vhost_client.c")
    program = os.path.join(place, "vhost_client")
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", program, source]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise RuntimeError("the client is in C and there is no gcc here: apt install gcc libc6-dev") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the client does not compile:\n{error.stderr.strip()}") from error
    return program


@dataclass(frozen=True, slots=True)
class Server:
    """A back end that listens on `socket`; what it says goes to the file `log`."""

    name: str
    socket: str
    process: subprocess.Popen[bytes]
    log: BinaryIO

    def words(self) -> str:
        """The last of what it said, and how it ended if it did."""
        self.log.seek(0)
        words = self.log.read().decode(errors="replace").strip()[-500:]
        status = self.process.poll()
        return words if status is None else f"{words} (exit status {status})"

    def wait(self) -> None:
        """Wait until it listens. Raises RuntimeError where it does not."""
        deadline = time.monotonic() + _PATIENCE
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not serve: {self.words()}")
            time.sleep(0.01)

    def end(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def _serving(name: str, socket: str, command: Sequence[str]) -> Iterator[Server]:
    """A server that listens, and is ended on the way out."""
    with tempfile.TemporaryFile() as log:
        # It ends with this process, even where that is killed and ends nobody.
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        server = Server(name, socket, process, log)
        try:
            server.wait()
            yield server
        finally:
            server.end()


def _run(client: str, job: Job, server: Server, figures: Figures, seconds: float) -> None:
    """Run a job once, and add what it gave to `figures`. Raises RuntimeError where that was not what it should be."""
    times = ["--seconds", str(seconds), "--warm-up", str(_WARM_UP_SECONDS), "--span", str(DISK_BYTES)]
    done = subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", "--", client, *job.options, *times, server.socket],
        capture_output=True,
        text=True,
        check=False,
    )
    where = f"{job.name}, {server.name}"
    if done.returncode:
        raise RuntimeError(f"{where}: {done.stderr.strip() or done.returncode}; the server: {server.words()}")
    numbers = json.loads(done.stdout)
    if numbers["errors"] or numbers["mismatches"]:
        raise RuntimeError(f"{where}: {numbers['errors']} requests failed, {numbers['mismatches']} got wrong data")
    figures.iops.append(numbers["iops"])
    figures.mean_us.append(numbers["mean_us"])
    figures.p99_us.append(numbers["p99_us"])
