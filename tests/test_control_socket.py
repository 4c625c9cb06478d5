"""The control socket of a launcher: who may use it, what it does with nonsense, and that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from launching import LGMP, Launch, launch, make_disk, open_queues, open_sockets, prompt, run, wait_until

from lgmp.control_socket import (
    MAX_ANSWER_BYTES,
    MAX_CONNECTIONS,
    MAX_REQUEST_BYTES,
    Connection,
    ControlServer,
    GoneError,
    connect,
    find_guest,
    guests,
)
from lgmp.errors import LgmpError
from lgmp.runtime_directory import RuntimeDirectory
from lgmp.waker import Waker

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="being another user takes root")
NOBODY = 65534


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's runtime directory; its path is longer than an address of a socket may be."""
    base = tmp_path / ("long" * 30)
    base.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    return base / "lgmp"


def connected(directory: Path, pid: int) -> Connection:
    """A connection to a launcher's socket."""
    with RuntimeDirectory(str(directory)) as opened:
        connection = connect(opened, f"{pid}.sock", pid)
    assert connection is not None
    return connection


def raw_socket(directory: Path, pid: int) -> socket.socket:
    """The same, for what no client of ours sends. Every wait on it ends."""
    with RuntimeDirectory(str(directory)) as opened:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.settimeout(60)
        made.connect(opened.address(f"{pid}.sock"))
    return made


def ask(raw: socket.socket, packet: bytes) -> dict[str, object]:
    """Send a packet, and give the answer."""
    raw.send(packet)
    answer = msgpack.unpackb(raw.recv(MAX_ANSWER_BYTES), unicode_errors="surrogateescape")
    assert isinstance(answer, dict) and len(answer) == 1
    return answer


STATUS: bytes = msgpack.packb(["status"])


# Where it is


def test_it_is_its_users_alone_and_goes_with_the_launcher(directory: Path) -> None:
    with prompt() as launched:
        path = directory / f"{launched.pid}.sock"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert os.listdir(directory) == [path.name]
        launched.send("poweroff\n")
        assert launched.end()[0] == 0

    assert not directory.exists()


def test_a_umask_that_takes_all_rights_takes_none_of_ours(directory: Path) -> None:
    with prompt(prefix=("bash", "-c", 'umask 777; exec "$@"', "bash")) as launched:
        assert connected(directory, launched.pid).request("status")


def test_a_guest_that_starts_again_has_it_again(directory: Path) -> None:
    with prompt() as launched:
        with contextlib.closing(connected(directory, launched.pid)) as connection:
            connection.request("status")
            launched.command("reboot")
            with pytest.raises(GoneError):
                connection.receive()
        launched.wait_until_ready()

        assert connected(directory, launched.pid).request("status")


@needs_root
def test_a_directory_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after su, which leaves XDG_RUNTIME_DIR as it was."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for path in (theirs, ours):
        path.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    monkeypatch.setenv("TMPDIR", str(ours))

    with RuntimeDirectory.make() as made:
        assert made.path in (f"/run/user/{os.geteuid()}/lgmp", str(ours / f"lgmp-{os.geteuid()}"))
    assert os.listdir(theirs) == []


def spoil(path: Path, how: str) -> None:
    """Put something in the place of the runtime directory, or make its parent no place for one."""
    match how:
        case "link":
            (path.parent / "elsewhere").mkdir(mode=0o700)
            path.symlink_to(path.parent / "elsewhere")
        case "file":
            path.touch()
        case "open":
            path.mkdir()
            path.chmod(0o755)
        case "another's":
            path.mkdir(mode=0o700)
            os.chown(path, NOBODY, NOBODY)
        case "no parent":
            path.parent.rmdir()


@pytest.mark.parametrize("how", ["link", "file", "open", pytest.param("another's", marks=needs_root), "no parent"])
def test_what_is_not_to_be_trusted_is_not_used(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, fallback = tmp_path / "given", tmp_path / "fallback"
    for path in (given, fallback):
        path.mkdir(mode=0o700)
    spoil(given / "lgmp", how)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(given))
    monkeypatch.setenv("TMPDIR", str(fallback))

    with RuntimeDirectory.make() as made:
        assert made.path != str(given / "lgmp")
    assert str(given / "lgmp") not in [found.path for found in RuntimeDirectory.existing()]


def test_a_directory_that_others_may_rename_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("TMPDIR", str(shared))
    ours = str(shared / f"lgmp-{os.geteuid()}")

    shared.chmod(0o777)
    with RuntimeDirectory.make() as made:
        assert made.path != ours
    assert os.listdir(shared) == []
    shared.chmod(0o1777)
    if not os.path.isdir(f"/run/user/{os.geteuid()}"):
        with RuntimeDirectory.make() as made:
            assert made.path == ours


def test_a_relative_path_in_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(variable, "relative")

    with RuntimeDirectory.make() as made:
        assert os.path.isabs(made.path)


@contextlib.contextmanager
def user_without_place() -> Iterator[tuple[str, ...]]:
    """The prefix of commands by a user whom every runtime directory is refused."""
    user = 1_000_000 + os.getpid()
    place = Path(f"/tmp/lgmp-{user}")
    place.touch()
    try:
        yield ("unshare", "--user", f"--map-user={user}", f"--map-group={user}")
    finally:
        place.unlink()


def test_where_there_is_no_place_for_it_the_guest_runs_without() -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("XDG_RUNTIME_DIR", "TMPDIR")}
    with user_without_place() as prefix:
        code, _out, err = run("quiet poweroff", "-v", prefix=prefix, env=env)
        assert run("quiet poweroff", prefix=prefix, env=env) == (0, "", "")

    assert code == 0
    (said,) = re.findall(r"^lgmp: no control socket.*$", err, re.MULTILINE)
    assert prefix[2].removeprefix("--map-user=") in said


# Who may use it


def try_as_nobody(path: Path) -> str:
    """What another user gets who asks for the status: an answer, or what is against it."""
    program = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "os.chdir(os.path.dirname(sys.argv[1]))\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.connect(os.path.basename(sys.argv[1]))\n"
        f"s.send({STATUS!r})\n"
        "print(s.recv(100000))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, path], check=False, capture_output=True, text=True)
    return ran.stdout or ran.stderr.splitlines()[-1]


@needs_root
def test_another_user_is_refused_by_the_directory_and_where_that_fails_by_the_launcher() -> None:
    # Not in pytest's own directory, which nobody else may enter.
    base = Path(f"/tmp/lgmp-test-{os.getpid()}")
    base.mkdir(mode=0o700)
    try:
        with prompt(env={**os.environ, "XDG_RUNTIME_DIR": str(base)}) as launched:
            directory = base / "lgmp"
            path = directory / f"{launched.pid}.sock"
            base.chmod(0o755)
            assert "PermissionError" in try_as_nobody(path)
            directory.chmod(0o755)
            assert "PermissionError" in try_as_nobody(path)
            path.chmod(0o666)
            refused = try_as_nobody(path)
            assert refused == "b''\n" or "BrokenPipeError" in refused or "ConnectionResetError" in refused
            directory.chmod(0o700)
            assert connected(directory, launched.pid).request("status")
    finally:
        shutil.rmtree(base)


@needs_root
def test_a_client_does_not_listen_to_a_socket_of_another_user(directory: Path) -> None:
    with RuntimeDirectory.make() as made:
        program = (
            "import os, socket, sys\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            f"s.bind(sys.argv[1])\nos.setuid({NOBODY})\ns.listen()\nprint(flush=True)\nsys.stdin.read()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, "1.sock"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=directory,
        ) as impostor:
            assert impostor.stdout is not None
            impostor.stdout.readline()

            assert connect(made, "1.sock", 1) is None
            assert 1 not in [guest.pid for guest in guests()]
            impostor.kill()


# Nonsense


NESTED = b"\x91" * 3000 + b"\x01"
GARBAGE = {
    "one byte": b"\xc1",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "a number": msgpack.packb(7),
    "a map": msgpack.packb({"status": 1}),
    "nothing in it": msgpack.packb([]),
    "no such command": msgpack.packb(["destroy"]),
    "a number first": msgpack.packb([1, 2]),
    "one argument too many": msgpack.packb(["status", 1]),
    "an argument too few": msgpack.packb(["restart-worker"]),
    "an argument of another kind": msgpack.packb(["restart-worker", 7]),
    "a truth": msgpack.packb(["trace", "console", True]),
    "no level": msgpack.packb(["trace", "console", 0]),
    "a float": msgpack.packb(["stop", 1.5]),
    "a list in it": msgpack.packb(["stop", ["x"]]),
    "many elements": msgpack.packb(["stop"] * 9),
    "a long text": msgpack.packb(["restart-worker", "x" * 2000]),
    "an array of 2^32-1": b"\xdd\xff\xff\xff\xff",
    "a text of 2^32-1": b"\x91\xdb\xff\xff\xff\xff",
    "two messages": STATUS + STATUS,
    "half a message": STATUS[:-1],
    "nested": NESTED,
    "as large as may be": b"\x00" * MAX_REQUEST_BYTES,
    "larger": b"\x00" * (MAX_REQUEST_BYTES + 1),
    "huge": b"\x91" * 150_000,
    "not UTF-8": b"\x92\xaerestart-worker\xa2\xff\xfe",
    "no such device": msgpack.packb(["restart-worker", "vdz"]),
}


def test_nonsense_is_answered_with_what_is_wrong_with_it_and_nothing_else_happens(directory: Path) -> None:
    with prompt() as launched:
        raw = raw_socket(directory, launched.pid)
        for what, packet in GARBAGE.items():
            answer = ask(raw, packet)
            assert "error" in answer, what
            assert str(answer["error"]).count("\n") == 0
        assert "ok" in ask(raw, STATUS)
        raw.close()
        launched.send("poweroff\n")

        assert launched.end() == (0, launched.out.text, "")


def test_an_empty_packet_is_the_end_of_its_connection_alone(directory: Path) -> None:
    with prompt() as launched:
        raw, other = raw_socket(directory, launched.pid), raw_socket(directory, launched.pid)
        raw.send(b"")
        assert raw.recv(1) == b""
        assert "ok" in ask(other, STATUS)


def test_descriptors_that_are_sent_along_are_not_kept(directory: Path) -> None:
    with prompt() as launched:
        raw = raw_socket(directory, launched.pid)
        assert "ok" in ask(raw, STATUS)
        before = launched.descriptors()
        for _ in range(20):
            socket.send_fds(raw, [STATUS], [0, 1, 2])
            raw.recv(MAX_ANSWER_BYTES)

        assert launched.descriptors() == before


def test_a_client_that_never_reads_is_dropped_and_others_are_served(directory: Path) -> None:
    with prompt() as launched:
        deaf = raw_socket(directory, launched.pid)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                deaf.send(STATUS)

        assert "ok" in ask(raw_socket(directory, launched.pid), STATUS)
        launched.send("poweroff\n")
        assert launched.end()[0] == 0


def test_clients_that_come_and_go_leave_nothing_in_the_launcher(directory: Path) -> None:
    with prompt() as launched:
        before = launched.descriptors()
        for _ in range(20):
            for _ in range(10):
                raw = raw_socket(directory, launched.pid)
                raw.send(STATUS)
                raw.close()
            with raw_socket(directory, launched.pid) as raw:
                assert "ok" in ask(raw, STATUS)

        wait_until(lambda: launched.descriptors() == before, "descriptors closed")


def test_one_connection_too_many_is_told_so(directory: Path) -> None:
    with prompt() as launched:
        held = [connected(directory, launched.pid) for _ in range(MAX_CONNECTIONS)]
        for connection in held:
            assert connection.request("status")
        with (
            contextlib.closing(connected(directory, launched.pid)) as late,
            pytest.raises(LgmpError, match=f"{MAX_CONNECTIONS} connections"),
        ):
            late.request("status")
        held.pop().close()

        def served() -> bool:
            with contextlib.closing(connected(directory, launched.pid)) as again:
                return "connections" not in str(error_of(again))

        wait_until(served, "served again")
        for connection in held:
            connection.close()


def error_of(connection: Connection) -> LgmpError | None:
    """What a launcher has against saying its status."""
    try:
        connection.request("status")
    except LgmpError as error:
        return error
    return None


def test_a_launcher_that_has_no_descriptors_left_ends_connections_until_it_has(directory: Path) -> None:
    with prompt() as launched:
        used = {int(name) for name in os.listdir(f"/proc/{launched.pid}/fd")}
        lowest_free = next(number for number in range(1000) if number not in used)
        soft, hard = resource.prlimit(launched.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(launched.pid, resource.RLIMIT_NOFILE, (lowest_free, hard))
        for _ in range(3):
            with contextlib.closing(connected(directory, launched.pid)) as connection, pytest.raises(GoneError):
                connection.request("status")
        resource.prlimit(launched.pid, resource.RLIMIT_NOFILE, (soft, hard))

        assert connected(directory, launched.pid).request("status")
        launched.send("poweroff\n")
        assert launched.end()[0] == 0


def test_a_client_of_an_impostor_says_so_in_one_line(directory: Path) -> None:
    answers = [b"\xc1", b"", b"\x07", b"\x80", *(msgpack.packb({"ok": what}) for what in (None, {}, {"name": 1}, [1]))]
    with RuntimeDirectory.make() as made, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as impostor:
        impostor.bind(made.address(f"{os.getpid()}.sock"))
        impostor.listen()
        for answer in answers:
            client = subprocess.Popen(
                [*LGMP, "stop", str(os.getpid())], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            with impostor.accept()[0] as accepted:
                accepted.recv(MAX_REQUEST_BYTES)
                accepted.send(answer)
                out, err = client.communicate()

            assert (client.returncode, out) == (1, "")
            assert re.fullmatch(r"lgmp: .*\n", err), err


# What stays behind


def test_the_workers_take_the_socket_of_a_killed_launcher_away(directory: Path) -> None:
    with prompt() as launched:
        launched.signal(signal.SIGKILL)
        launched.wait()
        wait_until(lambda: not launched.left_behind(), "nothing left")


@pytest.fixture
def stale(directory: Path) -> int:
    """The process id of a launcher that was killed with all of its workers, and left its socket."""
    with prompt() as launched:
        os.killpg(launched.session, signal.SIGKILL)
        launched.wait()
        assert open_sockets(launched.pid) == [str(directory / f"{launched.pid}.sock")]
        wait_until(lambda: not launched.workers(), "workers gone")
    return launched.pid


def test_the_next_launch_sweeps_the_socket_of_a_dead_launcher(directory: Path, stale: int) -> None:
    assert run("quiet poweroff")[0] == 0

    assert not directory.exists()


def test_ps_sweeps_the_socket_of_a_dead_launcher(directory: Path, stale: int) -> None:
    ran = subprocess.run([*LGMP, "ps", "--json"], check=True, capture_output=True, text=True)

    assert os.listdir(directory) == []
    assert stale not in [guest["pid"] for guest in json.loads(ran.stdout)]


def test_sockets_that_were_never_finished_are_swept_and_nothing_else_is(directory: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    with RuntimeDirectory.make() as made:
        unfinished = (f"{dead.pid}.new", f"{os.getpid()}.new", f"{dead.pid}.sock")
        for name in unfinished:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bound:
                bound.bind(made.address(name))
    others = ["1.sock", "notes", "x.sock", ".sock", f"{dead.pid}.new.txt"]
    for name in others:
        (directory / name).touch()

    assert run("quiet poweroff")[0] == 0

    # One may be about to be finished.
    assert sorted(os.listdir(directory)) == sorted([*others, f"{os.getpid()}.new"])


def test_a_launcher_killed_at_any_moment_of_its_start_leaves_nothing_that_is_not_swept(directory: Path) -> None:
    disk = make_disk(directory.parent.parent / "disk.img")
    killed = []
    for step in range(12):
        with launch("quiet", "--block", str(disk), "--rng") as launched:
            killed.append(launched.pid)
            wait_until(directory.exists, "the directory")
            for _ in range(step * 5):
                os.listdir(directory)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launched.session, signal.SIGKILL)
            launched.process.kill()
            launched.wait()

    assert run("quiet poweroff")[0] == 0
    assert not directory.exists()
    assert [name for pid in killed for name in open_queues(pid, ("vda", "rng0", "console"))] == []


# Who does not answer


def test_a_stopped_launcher_is_said_not_to_answer_and_does_once_it_goes_on(directory: Path) -> None:
    with prompt() as launched:
        launched.freeze()
        (guest,) = [guest for guest in guests() if guest.pid == launched.pid]
        assert guest.status is None
        assert f"kill -CONT {launched.pid}" in guest.problem
        with pytest.raises(LgmpError, match="does not answer"):
            find_guest(str(launched.pid))
        # Until no more of them can wait to be accepted.
        with RuntimeDirectory(str(directory)) as opened, pytest.raises(LgmpError, match="does not answer"):
            while True:
                connect(opened, f"{launched.pid}.sock", launched.pid)
        with pytest.raises(LgmpError, match="does not answer"):
            find_guest(str(launched.pid))
        launched.signal(signal.SIGCONT)

        wait_until(lambda: error_of_finding(launched) is None, "found again")
        assert os.path.exists(directory / f"{launched.pid}.sock")


def error_of_finding(launched: Launch) -> LgmpError | None:
    """What is against finding a guest."""
    try:
        find_guest(str(launched.pid)).close()
    except LgmpError as error:
        return error
    return None


# Descriptors


class Tracing:
    """A launcher's commands whose traces are pipes."""

    def __init__(self) -> None:
        self.answer_bytes = MAX_ANSWER_BYTES - 100
        self.reading, self.writing = os.pipe()
        self.ended: list[str] = []

    def status(self) -> dict[str, object]:
        return {"text": "x" * self.answer_bytes}

    def stop(self) -> None:
        raise AssertionError("not asked for")

    pause = resume = stop

    def restart_worker(self, name: str) -> None:
        raise LgmpError(f"no device {name}")

    def trace(self, name: str, level: int) -> int:
        if name == "none":
            raise LgmpError("no device none")
        os.write(self.writing, f"{name} {level}".encode())
        return self.reading

    def trace_ended(self, name: str) -> None:
        self.ended.append(name)

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)


@pytest.fixture
def tracing(directory: Path) -> Iterator[Tracing]:
    """What a server in this process commands."""
    waker, commands = Waker(), Tracing()
    server = ControlServer(waker, commands)
    waker.start()
    yield commands
    waker.close()
    server.close()
    commands.close()


def test_a_trace_comes_as_a_descriptor_and_ends_with_its_connection(directory: Path, tracing: Tracing) -> None:
    connection = connected(directory, os.getpid())
    with pytest.raises(LgmpError, match="no device none"):
        connection.request_descriptor("trace", "none", 1)
    got = connection.request_descriptor("trace", "vda", 2)
    assert os.read(got, 100) == b"vda 2"
    assert not os.get_inheritable(got)
    os.close(got)
    assert tracing.ended == []
    connection.close()

    wait_until(lambda: tracing.ended == ["vda"], "the trace's end")


def test_the_trace_of_a_client_that_does_not_read_ends(directory: Path, tracing: Tracing) -> None:
    raw = raw_socket(directory, os.getpid())
    raw.send(msgpack.packb(["trace", "vda", 1]))
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            raw.send(STATUS)

    wait_until(lambda: tracing.ended == ["vda"], "the trace's end")


def test_a_descriptor_that_comes_with_an_answer_that_has_no_use_for_it_is_closed(
    directory: Path, tracing: Tracing
) -> None:
    connection = connected(directory, os.getpid())
    connection.request("trace", "vda", 1)
    before = os.listdir("/proc/self/fd")
    connection.request("trace", "vda", 1)

    assert os.listdir("/proc/self/fd") == before


def test_an_answer_as_large_as_may_be_arrives(directory: Path, tracing: Tracing) -> None:
    answer = connected(directory, os.getpid()).request("status")

    assert answer == tracing.status()


def test_an_answer_that_is_larger_is_said_to_be(directory: Path, tracing: Tracing) -> None:
    tracing.answer_bytes = MAX_ANSWER_BYTES

    with pytest.raises(LgmpError, match=f"{MAX_ANSWER_BYTES} is the most"):
        connected(directory, os.getpid()).request("status")
