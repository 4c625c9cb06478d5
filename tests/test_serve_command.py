"""`lgmp serve` as a command: its words, its socket, and how it and its worker end."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from launching import Launch, make_disk, pattern, wait_until
from serving import served, worker_of

from lgmp.testing import Driver, FrontEnd, ServedWorker, SharedMemory, direct
from lgmp.vhost_user.messages import Request
from lgmp.virtio.block import VIRTIO_BLK_T_IN

UPSIDE_DOWN = str(Path(__file__).parent / "examples" / "upside_down.py")
USER = "nobody"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="--chroot and --username take root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def disk(tmp_path: Path) -> str:
    return str(make_disk(tmp_path / "disk.img"))


@contextlib.contextmanager
def front_end_on(connection: socket.socket) -> Iterator[FrontEnd]:
    with Driver(memory=SharedMemory()) as driver, FrontEnd(connection, driver) as front_end:
        yield front_end


@contextlib.contextmanager
def front_end_at(path: Path) -> Iterator[FrontEnd]:
    with Driver(memory=SharedMemory()) as driver, FrontEnd.connect(str(path), driver) as front_end:
        yield front_end


def check_disk(front_end: FrontEnd) -> None:
    """Have sector 0 read."""
    chain = direct(front_end.driver, VIRTIO_BLK_T_IN.to_bytes(16, "little"), 512, 1)
    front_end.rings[0].kick()
    front_end.rings[0].collect(1)
    assert chain.answer == pattern(1) + b"\0"


def refused(*words: str, cwd: Path | None = None, pass_fds: Sequence[int] = ()) -> str:
    """What it says and ends with: one line, behind the usage where the words make no sense."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lgmp", "serve", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        pass_fds=pass_fds,
    )
    assert (done.returncode, done.stdout) == (1, "")
    *usage, line = done.stderr.splitlines()
    assert usage in ([], ["usage: lgmp serve KIND [WHAT] --socket PATH [options]"])
    assert line.startswith("lgmp: ")
    return line


# Its words

DISK = "disk.img"
AT = ("--socket", "socket")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "takes either --socket PATH or --fd N"),
        (("block", DISK), "takes either --socket PATH or --fd N"),
        (("block", DISK, *AT, "--fd", "3"), "takes either --socket PATH or --fd N"),
        (AT, "takes one of block, net, rng, console, or --device MODULE:CLASS"),
        (("block", DISK, "--device", "a:b", *AT), "takes one of block, net, rng, console, or --device MODULE:CLASS"),
        (("floppy", *AT), "choose from"),
        (("block", DISK, "--colour", *AT), "unrecognized arguments: --colour"),
        (("block", *AT), "takes a disk: lgmp serve block disk.img --socket PATH"),
        (("block", "none.img", *AT), "Failed to open none.img: No such file or directory"),
        (("block", DISK, "--num-queues", "0", *AT), "--num-queues 0: it takes a number from 1 to 64"),
        (("block", DISK, "--num-queues", "65", *AT), "--num-queues 65: it takes a number from 1 to 64"),
        (("block", DISK, "--tap", "t0", *AT), "--tap is an option of `lgmp serve net`"),
        (("rng", "--read-only", *AT), "--read-only is an option of `lgmp serve block`"),
        (("rng", "none", *AT), "/dev/urandom is always there"),
        (("rng", ".", *AT), "it has no random bytes; /dev/urandom has"),
        (("console", "tty", *AT), "takes no 'tty'"),
        (("net", *AT), "takes one of --tap NAME, --tap-fd N, --tunnet ADDRESS and --net user"),
        (("net", "--tap", "t0", "--net", "user", *AT), "takes one of --tap NAME"),
        (("net", "--tap-fd", "77", *AT), "descriptor 77 is not open: it has to be inherited"),
        (("net", "--tap", "t0", "--mac", "zz", *AT), "it is six bytes in hexadecimal"),
        (("--device", "none.py:Mine", *AT), "cannot read none.py"),
        (("--device", f"{UPSIDE_DOWN}:Mine", *AT), "has no class Mine; it has UpsideDown"),
        (("--device", f"{UPSIDE_DOWN}:UpsideDown,tilt=1", *AT), "has no option tilt: it takes sign"),
        (("block", DISK, "--socket", "none/socket"), "cannot listen at .*/none/socket: No such file or directory"),
        (("block", DISK, "--socket", DISK), "is there already, and is no socket: give --socket another name"),
        (("block", DISK, "--socket", "s" * 120), "choose one of at most 107 bytes"),
        (("block", DISK, "--fd", "99"), "--fd 99 is no socket that is open here: Bad file descriptor"),
        (("block", DISK, "--fd", "0"), "--fd 0 is no socket that is open here"),
        (("block", DISK, "--fd", "three"), "invalid int value: 'three'"),
        (("block", DISK, *AT, "--chroot", "none"), "an empty directory will do for --chroot"),
        (("block", DISK, *AT, "--username", "no-such-user"), "give --username one of those in `getent passwd`"),
    ],
)
def test_words_that_make_no_sense_come_to_one_line_with_a_remedy(
    tmp_path: Path, disk: str, words: tuple[str, ...], says: str
) -> None:
    import re  # noqa: PLC0415  for this one alone

    before = sorted(os.listdir(tmp_path))
    assert re.search(says, refused(*words, cwd=tmp_path))
    assert sorted(os.listdir(tmp_path)) == before
    assert Path(disk).read_bytes() == pattern(64)


def test_a_descriptor_that_is_no_stream_socket_is_refused(disk: str) -> None:
    datagrams, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    internet = socket.socket()
    with datagrams, other, internet:
        for each in (datagrams, internet):
            number = each.fileno()
            line = refused("block", disk, "--fd", str(number), pass_fds=[number])
            assert line == f"lgmp: --fd {number} is no stream socket of AF_UNIX"


def test_a_connection_cannot_be_supervised(disk: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = theirs.fileno()
        line = refused("block", disk, "--supervise", "--fd", str(number), pass_fds=[number])
        assert line.endswith("--supervise takes --socket, or a socket that listens")


def test_help_has_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lgmp", "serve", "--help"], capture_output=True, text=True, check=True
    )
    assert "lgmp serve block disk.img --socket /tmp/vda.sock" in done.stdout


# Its socket


def test_a_name_that_nobody_listens_at_is_taken_over(disk: str, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with served("block", disk, socket=path), front_end_at(path) as front_end:
        front_end.begin()
        check_disk(front_end)


@pytest.mark.parametrize("once", [True, False])
def test_a_name_that_is_served_is_refused_and_served_on(disk: str, path: Path, once: bool) -> None:
    with served("block", disk, *(("--once",) if once else ()), socket=path):
        line = refused("block", disk, "--socket", str(path))
        assert line == f"lgmp: another process serves at {path}: end that, or give --socket another name"
        with front_end_at(path) as front_end:
            front_end.begin()
            check_disk(front_end)
            assert "another process serves" in refused("block", disk, "--socket", str(path))
            check_disk(front_end)


def test_a_name_that_another_has_taken_meanwhile_is_left_to_him(disk: str, path: Path) -> None:
    with Launch("serve", "block", disk, "--socket", str(path)) as launched:
        launched.err.wait_for("lgmp: serving ")
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            launched.signal(signal.SIGTERM)
            assert launched.end()[0] == 128 + signal.SIGTERM
        assert path.is_socket()


@pytest.mark.parametrize("number", [0, 7])
def test_a_listening_socket_may_be_inherited(disk: str, path: Path, number: int) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with _inheriting("block", disk, "--supervise", descriptor=listener.fileno(), number=number) as launched:
            launched.err.wait_for("lgmp: serving ")
            for death in (1, 2):
                with front_end_at(path) as front_end:
                    front_end.begin()
                    check_disk(front_end)
                    os.kill(worker_of(launched), signal.SIGKILL)
                    launched.err.wait_for("started again as pid", death)
                    front_end.wait_for_hang_up()
            launched.signal(signal.SIGTERM)
            assert launched.end()[0] == 128 + signal.SIGTERM
        assert path.is_socket()  # it is not ours to take away


@pytest.mark.parametrize("number", [0, 7])
def test_a_connection_may_be_inherited_and_is_all_that_is_served(disk: str, number: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs, _inheriting("block", disk, descriptor=theirs.fileno(), number=number) as launched:
        theirs.close()
        with front_end_on(ours) as front_end:
            front_end.begin()
            check_disk(front_end)
        code, _, said = launched.end()
        assert code == 0
        assert len(said.splitlines()) == 1


def _inheriting(*words: str, descriptor: int, number: int) -> Launch:
    """It inherits `descriptor` as `number`, from a shell, as Python would close it."""
    prefix = ("sh", "-c", f'exec "$@" {number}<&0 0</dev/null', "sh") if number else ()
    return Launch("serve", *words, "--fd", str(number), stdin=descriptor, prefix=prefix)


# Its end


def test_with_once_it_ends_with_its_first_front_end(disk: str, path: Path) -> None:
    with Launch("serve", "block", disk, "--once", "--socket", str(path)) as launched:
        launched.err.wait_for("lgmp: serving ")
        with front_end_at(path) as front_end:
            front_end.begin()
            check_disk(front_end)
            with front_end_at(path) as late:
                late.send(Request.GET_FEATURES)
                front_end.close()
                assert late.wait_for_hang_up() == b""
        assert launched.end()[0] == 0
        assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("connected", [True, False])
def test_a_signal_ends_it_and_its_worker_and_takes_the_name_away(
    disk: str, path: Path, number: signal.Signals, connected: bool
) -> None:
    with (
        Launch("serve", "block", disk, "--supervise", "--socket", str(path)) as launched,
        contextlib.ExitStack() as stack,
    ):
        launched.err.wait_for("lgmp: serving ")
        if connected:
            front_end = stack.enter_context(front_end_at(path))
            front_end.begin()
            check_disk(front_end)
        launched.signal(number)
        code, _, said = launched.end()
        assert code == 128 + number
        assert not path.exists()
        assert len(said.splitlines()) == 1


def test_a_worker_that_is_killed_ends_it(disk: str, path: Path) -> None:
    with Launch("serve", "block", disk, "--socket", str(path)) as launched:
        launched.err.wait_for("lgmp: serving ")
        pid = worker_of(launched)
        os.kill(pid, signal.SIGKILL)
        code, _, said = launched.end()
        assert code == 1
        why = f"lgmp: worker vda (pid {pid}) was killed by SIGKILL; with --supervise it would be started again"
        assert said.splitlines()[1:] == [why]
        assert not path.exists()


def test_a_worker_that_cannot_begin_ends_it(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\nfrom workers.device import Device\n\n\nclass Mine(Device):\n    device_type = 42\n\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        if '--describe' not in sys.argv:\n            raise ValueError('not today')\n"
    )
    for words in ((), ("--supervise",)):
        with Launch("serve", *words, "--device", f"{tmp_path}/mine.py:Mine", "--socket", str(path)) as launched:
            code, _, said = launched.end()
        assert code == 1
        assert "ValueError: not today; this is a defect of" in said
        assert not path.exists()


def test_a_supervisor_that_is_killed_takes_worker_and_name_along(disk: str, path: Path) -> None:
    with Launch("serve", "block", disk, "--supervise", "--socket", str(path)) as launched:
        launched.err.wait_for("lgmp: serving ")
        with front_end_at(path) as front_end:
            front_end.begin()
            check_disk(front_end)
            launched.signal(signal.SIGKILL)
            launched.wait_until_nothing_is_left()
            wait_until(lambda: not path.exists(), "the socket's name gone")
            front_end.wait_for_hang_up()


def test_a_stopped_worker_lets_go_of_what_it_was_given(disk: str) -> None:
    descriptor = os.open(disk, os.O_RDWR)
    options = ["--disk-fd", str(descriptor), "--", disk]
    with ServedWorker("workers.block", options, pass_fds=[descriptor]) as worker:
        os.close(descriptor)
        with Driver(memory=SharedMemory()) as driver, worker.connect(driver) as front_end:
            front_end.begin()
            check_disk(front_end)
            assert worker.stop() == (0, "")
            front_end.wait_for_hang_up()


def test_a_worker_says_what_is_wrong_with_its_words() -> None:
    for words, says in (
        (["--vhost-user-fd", "77"], "missing --virtio-features, --queues; see --help"),
        (["--vhost-user-fd", "77", "--virtio-features", "0", "--queues", "1"], "descriptor 77 is no socket"),
        (["--vhost-user-fd", "0", "--virtio-features", "0", "--queues", "257"], "a number from 1 to 256"),
        (["--vhost-user-fd", "0", "--virtio-features", "0", "--queues", "2"], "an entropy source has 1 ring, not 2"),
    ):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "workers.rng", "--name", "rng0", "--source-fd", "0", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert says in done.stderr


# Its worker's rights


@needs_root
@pytest.mark.parametrize("supervise", [True, False])
def test_a_worker_may_be_locked_in_and_somebody_else(disk: str, path: Path, tmp_path: Path, supervise: bool) -> None:
    jail = tmp_path / "jail"
    jail.mkdir(mode=0o700)
    Path(disk).chmod(0o600)
    words = ["--chroot", str(jail), "--username", USER, *(["--supervise"] if supervise else [])]
    with served("block", disk, *words, socket=path) as launched:
        for death in range(2):
            with front_end_at(path) as front_end:
                front_end.negotiate()
                with front_end.get_inflight() as inflight:
                    front_end.begin(inflight=inflight)
                    check_disk(front_end)
                pid = worker_of(launched)
                assert os.readlink(f"/proc/{pid}/root") == str(jail)
                assert os.stat(f"/proc/{pid}").st_uid == pwd.getpwnam(USER).pw_uid
                front_end.send(99)  # what it says of that it can say locked in
                front_end.wait_for_hang_up()
            if supervise and not death:
                os.kill(pid, signal.SIGKILL)
                launched.err.wait_for("started again as pid")
