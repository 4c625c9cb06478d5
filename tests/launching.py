"""Launchers as real processes: started, talked to, and looked at from outside, as their users do.

Nothing here waits for a fixed time. What a test waits for has until HANGS_AFTER, which is far more than anything takes
and is there so that a hang fails; no assertion depends on how long something took.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import posix_ipc

import lgmp
from lgmp.control_socket import connect
from lgmp.runtime_directory import RuntimeDirectory

LGMP = (sys.executable, "-P", "-m", "lgmp")
GUEST = str(Path(lgmp.__file__).parent / "testguest.elf")
MEM = "16"
PROMPT = "test> "
SECTOR = 512

# Seconds.
HANGS_AFTER = 60.0
_LOOK_EVERY = 0.005

# In a user namespace of its own, as a user whom no capability is left to: on whatever uid the tests run.
UNPRIVILEGED = ("unshare", "--user", "--map-user=65534", "--map-group=65534")

_FNV_START = 0x811C9DC5
_FNV_PRIME = 0x01000193


def checksum(data: bytes) -> str:
    """FNV-1a 32, as the test guest prints it."""
    value = _FNV_START
    for byte in data:
        value = (value ^ byte) * _FNV_PRIME & 0xFFFFFFFF
    return f"{value:08x}"


def pattern(sectors: int, seed: int = 1) -> bytes:
    """Bytes that differ from sector to sector."""
    return b"".join(bytes((seed + sector * 7 + i) % 251 for i in range(SECTOR)) for sector in range(sectors))


def make_disk(path: Path, sectors: int = 64, seed: int = 1) -> Path:
    """A disk image with a pattern."""
    path.write_bytes(pattern(sectors, seed))
    return path


def wait_until(predicate: Callable[[], object], what: str) -> None:
    """Return once `predicate()` holds; fail, naming `what`, where it never does."""
    deadline = time.monotonic() + HANGS_AFTER
    while not predicate():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(_LOOK_EVERY)


def session_processes(session: int) -> dict[int, str]:
    """The live processes of a session: their command lines by process id."""
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            # After the name, which may hold anything: state, ppid, pgrp, session.
            state, _ppid, _pgrp, its_session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found[int(entry)] = command_line(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def command_line(pid: int) -> str:
    """What ps shows of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")


def open_queues(launcher: int, devices: Sequence[str] = ("vda", "vdb", "console")) -> list[str]:
    """Which of the message queues that a launcher makes exist by name."""
    names = (f"/lgmp.{launcher}.{device}{end}" for device in devices for end in ("", ".done"))
    return [name for name in names if _queue_exists(name)]


def _queue_exists(name: str) -> bool:
    try:
        posix_ipc.MessageQueue(name).close()
    except posix_ipc.ExistentialError:
        return False
    return True


def open_sockets(launcher: int, env: Mapping[str, str] = os.environ) -> list[str]:
    """The control sockets of a launcher with that environment, wherever it may have made them."""
    directories = ["/run/user/*/lgmp", "/tmp/lgmp-*"]
    for variable, name in (("XDG_RUNTIME_DIR", "lgmp"), ("TMPDIR", "lgmp-*")):
        if env.get(variable):
            directories.append(f"{glob.escape(env[variable])}/{name}")
    return sorted({path for directory in directories for path in glob.glob(f"{directory}/{launcher}.*")})


def _sweep_socket(path: str) -> None:
    """Take a socket away as the next launch would, if that would."""
    directory, name = os.path.split(path)
    with RuntimeDirectory(directory) as opened:
        connect(opened, name, int(name.partition(".")[0]))


class Stream:
    """What comes out of a descriptor, read as it comes by a thread of its own."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data = bytearray()
        self._ended = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._descriptor, 1 << 16)
            except OSError:  # EIO: the last slave of a pseudo-terminal was closed
                data = b""
            with self._news:
                self._data += data
                self._ended = not data
                self._news.notify_all()
            if not data:
                return

    @property
    def data(self) -> bytes:
        """Everything so far."""
        with self._news:
            return bytes(self._data)

    @property
    def text(self) -> str:
        """Everything so far, as text."""
        return self.data.decode(errors="replace")

    def wait_for(self, text: str, times: int = 1) -> None:
        """Return once `text` has come so many times; fail where it does not."""
        wanted = text.encode()
        with self._news:
            come = self._news.wait_for(lambda: self._data.count(wanted) >= times or self._ended, HANGS_AFTER)
            assert come and self._data.count(wanted) >= times, (
                f"{text!r} did not come {times} times, but {bytes(self._data[-2000:])!r}"
            )

    def join(self) -> None:
        """Return at the end of the stream."""
        self._thread.join(HANGS_AFTER)
        assert not self._thread.is_alive(), "the stream does not end"


class Terminal:
    """A pseudo-terminal: `slave` is for processes, what they print is in `out`."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        self.out = Stream(self.master)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.slave)
        self.out.join()
        os.close(self.master)

    def modes(self) -> list[object]:
        """Its modes, as tcgetattr has them."""
        return list(termios.tcgetattr(self.slave))

    @property
    def raw(self) -> bool:
        """Whether keys come one by one, unechoed, ^C as any other."""
        flags = termios.tcgetattr(self.slave)[3]
        return not flags & (termios.ISIG | termios.ICANON | termios.ECHO)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.master, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        """As a window does that is dragged at its corner."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Launch:
    """An `lgmp` in a session of its own: that is how its processes are found, whatever became of their parents.

    stdin is a pipe that stays open until `close_stdin`; stdout and stderr are read as they come. `stdin`, `stdout` and
    `stderr` replace them by descriptors. With `terminal` all three are that, and it controls the session. `prefix` is a
    command to start it by.
    """

    def __init__(
        self,
        *arguments: str,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        terminal: Terminal | None = None,
        prefix: Sequence[str] = (),
        lgmp: Sequence[str] = LGMP,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.terminal = terminal
        if terminal is not None:
            stdin = stdout = stderr = terminal.slave
        self.process = subprocess.Popen(
            [*(("setsid", "--ctty") if terminal is not None else ("setsid",)), *prefix, *lgmp, *arguments],
            stdin=subprocess.PIPE if stdin is None else stdin,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE if stderr is None else stderr,
            env=env,
            cwd=cwd,
        )
        self.session = self.process.pid
        self._env = os.environ if env is None else env
        self._out = terminal.out if terminal is not None else _stream(self.process.stdout)
        self._err = terminal.out if terminal is not None else _stream(self.process.stderr)

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in session_processes(self.session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for path in open_sockets(self.session, self._env):
            _sweep_socket(path)  # of one that was killed just now
        for stream, file in ((self._out, self.process.stdout), (self._err, self.process.stderr)):
            if file is not None and stream is not None:
                stream.join()
                file.close()
        self.close_stdin()

    @property
    def pid(self) -> int:
        """The launcher's process id, where it was started without a shell."""
        return self.process.pid

    @property
    def out(self) -> Stream:
        """stdout."""
        assert self._out is not None
        return self._out

    @property
    def err(self) -> Stream:
        """stderr."""
        assert self._err is not None
        return self._err

    def send(self, text: str | bytes) -> None:
        """Write to stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() if isinstance(text, str) else text)
        self.process.stdin.flush()

    def command(self, line: str) -> None:
        """Give the guest at its prompt a command, and wait until it has its prompt again."""
        prompts = self.out.text.count(PROMPT)
        if self.terminal is not None:
            self.terminal.type(f"{line}\r")
        else:
            self.send(f"{line}\n")
        self.out.wait_for(PROMPT, prompts + 1)

    def close_stdin(self) -> None:
        """The end of input."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def signal(self, number: int) -> None:
        """Send the launcher a signal."""
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Stop the launcher (SIGSTOP), and wait until all of its threads stand still."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: set(_thread_states(self.pid)) == {"T"}, "stopped")

    def wait(self) -> int:
        """The launcher's exit status, once it has one; what it leaves behind is looked at by `left_behind`."""
        return self.process.wait(HANGS_AFTER)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; the exit status, stdout and stderr. Fails where anything is left behind."""
        code = self.wait()
        assert self.left_behind() == []
        for stream in (self._out, self._err):
            if stream is not None and self.terminal is None:
                stream.join()
        return code, self._out.text if self._out else "", self._err.text if self._err else ""

    def left_behind(self) -> list[str]:
        """Processes, queue names and sockets that are still there."""
        return [*self._processes_and_queues(), *open_sockets(self.session, self._env)]

    def _processes_and_queues(self) -> list[str]:
        return [*(f"{pid} {line}" for pid, line in session_processes(self.session).items()), *open_queues(self.session)]

    def wait_until_nothing_is_left(self) -> None:
        """For a launcher that was killed: its workers notice, and go, and the next launch sweeps what they cannot."""
        wait_until(lambda: not self._processes_and_queues(), f"nothing left, but {self.left_behind()}")
        for path in open_sockets(self.session, self._env):
            _sweep_socket(path)
        assert self.left_behind() == []

    def workers(self) -> dict[str, int]:
        """The process ids of the workers, by the name of their device."""
        found = {}
        for pid, line in session_processes(self.session).items():
            words = line.split()
            if words and words[0].startswith("lgmp-"):
                found[words[1]] = pid
            elif "--name" in words and any(word.startswith("workers.") for word in words):
                found[words[words.index("--name") + 1]] = pid
        return found

    def wait_until_ready(self) -> None:
        """Until the guest has its prompt, all workers have said READY, and all show their titles."""
        self.out.wait_for(PROMPT)
        wait_until(lambda: not open_queues(self.session), "all workers READY")
        wait_until(
            lambda: not any("--launcher" in line for line in session_processes(self.session).values()),
            "all titles set",
        )

    def descriptors(self) -> list[str]:
        """What the launcher has open, numbers of pipes and sockets left out."""
        found = []
        for number in sorted(os.listdir(f"/proc/{self.pid}/fd"), key=int):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{self.pid}/fd/{number}").partition(":[")[0])
        return sorted(found)


def _thread_states(pid: int) -> list[str]:
    """The states of a process's threads, as proc(5) has them."""
    stats = [Path(f"/proc/{pid}/task/{thread}/stat").read_text() for thread in os.listdir(f"/proc/{pid}/task")]
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


def _stream(file: IO[bytes] | None) -> Stream | None:
    return None if file is None else Stream(file.fileno())


@dataclass(frozen=True)
class Host:
    """What guests run on: more `options` for `lgmp run`, and a setting for the test guest (ends with a space)."""

    options: tuple[str, ...] = ()
    setting: str = ""


# What `launch` takes: what is there. Tests marked `every_host` are run once for each host; conftest.py sets it.
host = Host()


def launch(commands: str, *options: str, **how: object) -> Launch:
    """A launcher whose test guest runs `commands`, ';' between them, then has its prompt."""
    commands = host.setting + commands
    words = (*host.options, *options, *(("--", commands) if commands else ()))
    return Launch("run", MEM, GUEST, *words, **how)  # type: ignore[arg-type]


def run(commands: str, *options: str, **how: object) -> tuple[int, str, str]:
    """Run the commands in a test guest to its end: exit status, stdout, stderr. Fails where anything is left behind."""
    with launch(commands, *options, **how) as launched:
        return launched.end()


@contextlib.contextmanager
def prompt(*options: str, **how: object) -> Iterator[Launch]:
    """A test guest at its prompt, all its workers ready."""
    with launch("quiet", *options, **how) as launched:
        launched.wait_until_ready()
        yield launched


def lines_of(text: str) -> list[str]:
    """The lines of a terminal or a pipe."""
    return text.replace("\r\n", "\n").splitlines()
