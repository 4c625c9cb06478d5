"""Traces and recordings for tests: the commands as processes, and a worker without a guest that is traced."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launching import HANGS_AFTER, LGMP, Launch, Stream

from lgmp.closing import Closing
from lgmp.mailbox import ToWorker
from lgmp.testing import WorkerProcess
from lgmp.tracing import wire
from lgmp.tracing.events import Event, Finish, parse
from lgmp.tracing.recording import Header, Writer
from lgmp.tracing.wire import Assembler, setting


def lgmp(*words: str | int | Path) -> tuple[int, str, str]:
    """A command: its exit status, stdout and stderr."""
    ran = subprocess.run([*LGMP, *map(str, words)], check=False, capture_output=True, text=True, timeout=HANGS_AFTER)
    return ran.returncode, ran.stdout, ran.stderr


class Tracing(Closing):
    """`lgmp trace` or `lgmp record` of a device of a guest, begun."""

    def __init__(self, launched: Launch, device: str, *words: str | Path, command: str = "trace") -> None:
        self.process = subprocess.Popen(
            [*LGMP, command, str(launched.pid), device, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out = Stream(self.process.stdout.fileno())
        self.err = Stream(self.process.stderr.fileno())
        try:
            self.err.wait_for("^C ends it")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream, file in ((self.out, self.process.stdout), (self.err, self.process.stderr)):
            stream.join()
            assert file is not None
            file.close()

    def interrupt(self) -> tuple[int, list[str], str]:
        """^C; its exit status, its lines, and what it says last."""
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def end(self) -> tuple[int, list[str], str]:
        """Wait for its end; its exit status, its lines, and what it says last."""
        code = self.process.wait(HANGS_AFTER)
        self.out.join()
        self.err.join()
        return code, self.out.text.splitlines(), self.err.text.splitlines()[-1]


class TracedWorker:
    """A worker that is driven without a guest, and traced. Made with `trace=True`."""

    def __init__(self, worker: WorkerProcess, level: int = wire.FULL, session: int = 1) -> None:
        assert worker.trace is not None
        self.worker = worker
        self._socket = worker.trace
        self._session = session
        self._assembler = Assembler(session)
        self._socket.settimeout(HANGS_AFTER)
        worker.send(ToWorker.TRACE, setting(level, session))
        # What follows from here on is traced.
        self._told = [self._next()]

    def events(self) -> list[Event]:
        """Everything it has told, up to its END, which this asks for."""
        self.worker.send(ToWorker.TRACE, wire.OFF)
        return self.until_end()

    def until_end(self) -> list[Event]:
        while not isinstance(self._told[-1], Finish):
            self._told.append(self._next())
        return self._told

    def _next(self) -> Event:
        while (raw := self._assembler.take(self._socket.recv(1 << 18))) is None:
            pass
        return parse(raw)

    def save(
        self, path: Path, events: Sequence[Event], *, kind: int, config: bytes = b"", options: Sequence[str] = ()
    ) -> Path:
        """Make a recording of events."""
        from lgmp.tracing.events import raw  # noqa: PLC0415

        driver = self.worker.driver
        header = Header(
            "test",
            self.worker.name,
            kind,
            self.worker.module,
            tuple(options),
            self.worker.features,
            config,
            tuple(driver.layouts),
            driver.memory.ram_bytes,
            driver.memory.limit,
            0,
        )
        with path.open("wb") as file:
            writer = Writer(file, header)
            for event in events:
                writer.write(raw(event))
        return path


def drain(trace: socket.socket) -> int:
    """Throw away what there is to read; gives how many packets that was."""
    count = 0
    timeout = trace.gettimeout()
    trace.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while trace.recv(1 << 18):
            count += 1
    trace.settimeout(timeout)
    return count
