"""A real worker process, and the launcher's end of its message queues.

What a launcher does for a worker is done here in the same order: READY is waited for, what the driver accepted is
written before the first kick, and a worker that was killed is replaced by one that finds memory and control page as the
first one left them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from time import monotonic
from typing import Self

from lgmp.closing import Closing
from lgmp.mailbox import Mailbox, ToLauncher, ToWorker, create_pair, pack, unpack
from lgmp.testing.driver import FEATURES, PATIENCE, Driver, Unexpected, Used

# The index of the device, as in its messages.
DEVICE = 0
# Queues of one process have one number each, or a worker's successor would find the queues of the one before.
_numbers = count(1)


class WorkerProcess(Closing):
    """A worker process that serves `driver`'s rings; as a context manager it is killed at the end.

    `process` is its Popen, `mailbox` and `completions` are our ends of its message queues. `features` is what the
    driver accepts when it begins, with its first kick and its first after a reset; what it has accepted since is
    `driver.control.accepted_features`. `trace` is our end of its trace socket, None unless that was asked for.
    """

    def __init__(  # noqa: PLR0913  each is a word of what a launcher can say of a worker
        self,
        module: str,
        driver: Driver,
        options: Sequence[str] = (),
        *,
        name: str = "vda",
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        features: int = FEATURES,
        wrapper: Sequence[str] = (),
        trace: bool = False,
    ) -> None:
        """Start `python -m MODULE ... OPTIONS`; `ready` waits until it serves.

        `pass_fds`: the descriptors that it inherits, beside memory and control page; `wrapper`: a command that execs
        the rest of its arguments. `trace`: give it a trace socket. To be started again it needs `pass_fds`, `stdin` and
        `stdout` to be open still.
        """
        self.module = module
        self.driver = driver
        self.options = list(options)
        self.name = name
        self.features = features
        self.trace: socket.socket | None = None
        self._pass_fds = tuple(pass_fds)
        self._standard = stdin, stdout
        self._wrapper = list(wrapper)
        self._wants_trace = trace
        self._heard: list[list[int | str]] = []
        self._is_broken = False
        self._errors = b""
        self._start()

    def _start(self) -> None:
        with contextlib.ExitStack() as undo:
            unique = f"{self.name}-{next(_numbers)}"
            self.mailbox, self.completions = create_pair(unique)
            undo.callback(_let_go, self.mailbox)
            undo.callback(_let_go, self.completions)
            driver = self.driver
            options = self.options
            descriptors = driver.memory.fd, driver.control.fd, *self._pass_fds
            with contextlib.ExitStack() as theirs:
                if self._wants_trace:
                    self.trace, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    theirs.enter_context(end)
                    undo.enter_context(self.trace)
                    options = [f"--trace-fd={end.fileno()}", *options]
                    descriptors = *descriptors, end.fileno()
                command = worker_command(
                    self.module, driver, self.mailbox.name, self.completions.name, self.name, options
                )
                self.process = subprocess.Popen(
                    [*self._wrapper, *command],
                    stdin=self._standard[0],
                    stdout=self._standard[1],
                    stderr=subprocess.PIPE,
                    pass_fds=descriptors,
                )
            self._pidfd = os.pidfd_open(self.process.pid)
            undo.callback(os.close, self._pidfd)
            self._belongings = undo.pop_all()

    def close(self) -> None:
        """Kill it where it still runs, and give back all that is this process's; memory and control page stay."""
        self.process.kill()
        self.process.wait()
        self._take_errors()
        self._belongings.close()

    # Its life

    def ready(self) -> Self:
        """Wait until it says READY."""
        self.expect(ToLauncher.READY, DEVICE)
        return self

    def stop(self) -> int:
        """Have it finish what is in its rings, and end; gives its exit status."""
        self.send(ToWorker.STOP)
        return self.wait()

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send it a signal that ends it, and wait for its end; gives its exit status as Popen does, -signal.

        What it had in flight stays so, for `restart`.
        """
        self.process.send_signal(number)
        return self.wait()

    def restart(self, *, ready: bool = True) -> Self:
        """Start it again as the launcher does, killing it where it still runs, and wait for READY unless told not to.

        The new process has new message queues, and memory and control page as they are: where a driver works with the
        rings (`driver.control.live`), it goes on by itself with what was in flight and with what is in the rings. Of
        what the old one said last, and nobody heard, a BROKEN is still to be heard, and all else is lost.
        """
        self.process.kill()
        self.process.wait()
        self._hear()
        last_words = [message for message in self._heard if message[0] == ToLauncher.BROKEN]
        self.close()
        self._heard.clear()
        self._start()
        if ready:
            self.ready()
        self._heard[:0] = last_words
        return self

    def wait(self) -> int:
        """Wait for its end, and hear what it says until then; gives its exit status."""
        deadline = monotonic() + PATIENCE
        while (code := self.process.poll()) is None:
            if monotonic() > deadline:
                raise Unexpected(f"the worker does not end, and is {self._state()}")
            self._listen(max(0.0, deadline - monotonic()))
        return code

    def errors(self) -> str:
        """What it wrote to stderr, once it has ended; and its predecessors before it."""
        self.wait()
        self._take_errors()
        return self._errors.decode(errors="replace")

    def _take_errors(self) -> None:
        stderr = self.process.stderr
        if stderr is not None and not stderr.closed:
            with stderr:
                self._errors += stderr.read()

    # What the driver does, and the launcher for it

    def begin(self) -> None:
        """What precedes a driver's first kick: what it accepts is written, and that it works with the rings now."""
        control = self.driver.control
        if not control.live:
            control.accepted_features = self.features
            control.live = True

    def kick(self) -> None:
        """Have it look at its rings; without waiting, since a full mailbox is as good as a kick.

        A device that is broken is not kicked: what was kicked is gone, until a reset.
        """
        if not self._is_broken:
            self.begin()
            self.mailbox.post(pack(ToWorker.KICK))

    def collect(self, count: int, queue: int = 0) -> list[Used]:
        """Wait until it has used `count` chains of a ring; gives those, and what else it has used by then.

        Raises Unexpected where it ends or says something else than USED.
        """
        ring = self.driver.queues[queue]
        taken = ring.collect()
        while len(taken) < count:
            message = self.next_message()
            if message[0] != ToLauncher.USED:
                raise Unexpected(f"the worker said {_worded(message)}, with {len(taken)} of {count} chains used")
            taken += ring.collect()
        return taken

    def reset(self) -> None:
        """Reset the device as the launcher does; what it says before RESET_DONE is of no interest."""
        self.driver.control.live = False
        self.send(ToWorker.RESET)
        while (message := self.next_message())[0] != ToLauncher.RESET_DONE:
            if message[0] == ToLauncher.FAILED:
                raise Unexpected(f"the worker said {_worded(message)}")
        self.driver.reset()
        self._is_broken = False

    # Messages

    def send(self, *message: int | str) -> None:
        """Send a message that must not be lost, for example ToWorker.STOP. See `begin` for a KICK."""
        self.post(pack(*message))

    def post(self, raw: bytes) -> None:
        """Send bytes that must not be lost, waiting for room. Raises Unexpected where the worker takes no messages."""
        deadline = monotonic() + PATIENCE
        while not self.mailbox.send(raw, 0.01):
            # As the launcher does, or each would wait for the other.
            self._hear()
            ended = self.process.poll()
            said = [_worded(message) for message in self._heard]
            if ended is not None:
                raise Unexpected(f"the worker ended with {ended} and said {said}")
            if monotonic() > deadline:
                raise Unexpected(f"the worker takes no messages, said {said}, is {self._state()}")

    def _state(self) -> str:
        """What it is doing, where a test finds that it does nothing."""
        answer = []
        for name in ("wchan", "syscall", "status"):
            try:
                with open(f"/proc/{self.process.pid}/{name}") as file:
                    answer.append(file.read())
            except OSError as error:
                answer.append(f"{name}: {error}")
        return "\n".join(answer)

    def wait_to_read(self, descriptor: int) -> None:
        """Wait until there is something to read from a descriptor, and hear meanwhile what the worker says.

        A worker whose completion queue is full waits until it is heard: who waits for its output has to use this.
        """
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self.completions, select.POLLIN)
        deadline = monotonic() + PATIENCE
        while not any(ready == descriptor for ready, _ in poll.poll(100)):
            self._hear()
            if monotonic() > deadline:
                raise Unexpected(f"nothing to read from the worker, which is {self._state()}")

    def next_message(self) -> list[int | str]:
        """Its next message, waited for. Raises Unexpected where it ends or says nothing."""
        if not self._heard:
            self._listen(PATIENCE)
        if not self._heard:
            code = self.process.poll()
            how = f"it says nothing, and is {self._state()}" if code is None else f"it ended with {code}"
            raise Unexpected(f"no message from the worker: {how}")
        return self._heard.pop(0)

    def _listen(self, seconds: float) -> None:
        """Wait for messages, or its end, for at most so long, and hear what it has said."""
        poll = select.poll()
        poll.register(self.completions, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(seconds * 1000)
        self._hear()

    def _hear(self) -> None:
        """Take what it has said by now; a device that is broken nobody works with any more, as the launcher has it."""
        while (raw := self.completions.take()) is not None:
            message = unpack(raw)
            self._heard.append(message)
            if message[0] == ToLauncher.BROKEN:
                self._is_broken = True
                self.driver.control.live = False

    def next_word(self) -> list[int | str]:
        """Its next message that is not USED: who saw the used ring move may not have waited for that."""
        while (message := self.next_message())[0] == ToLauncher.USED:
            pass
        return message

    def expect(self, *message: int | str) -> None:
        """Wait for this message; USED may precede it. Raises Unexpected where it says something else."""
        got = self.next_word()
        if got != list(message):
            raise Unexpected(f"the worker said {_worded(got)}, not {_worded(message)}")

    def broken(self) -> str:
        """Wait for BROKEN, which a driver's broken rule comes to; gives its text. The worker waits for a reset now."""
        return self._text_of(ToLauncher.BROKEN)

    def failure(self) -> str:
        """Wait for FAILED, the last words of a worker that cannot go on; gives its text."""
        return self._text_of(ToLauncher.FAILED)

    def _text_of(self, kind: ToLauncher) -> str:
        got = self.next_word()
        if len(got) != 3 or got[:2] != [kind, DEVICE]:
            raise Unexpected(f"the worker said {_worded(got)}, not {kind.name} and why")
        return str(got[2])


def _worded(message: Sequence[int | str]) -> str:
    """A message for people."""
    try:
        kind = ToLauncher(int(message[0])).name
    except ValueError:
        kind = str(message[0])
    return f"[{', '.join([kind, *map(repr, message[1:])])}]"


def _let_go(mailbox: Mailbox) -> None:
    mailbox.unlink()
    mailbox.close()


def worker_command(
    module: str, driver: Driver, mailbox: str, completions: str, name: str = "vda", options: Sequence[str] = ()
) -> list[str]:
    """The command line of a worker as the launcher writes it; `mailbox`, `completions`: names of message queues."""
    queues = [f"--queue={layout}" for layout in driver.layouts]
    return [
        *(sys.executable, "-P", "-m", module),
        *("--name", name, "--guest", "test", "--device", str(DEVICE)),
        *("--memory-fd", str(driver.memory.fd), "--ram", str(driver.memory.ram_bytes)),
        *("--control-fd", str(driver.control.fd)),
        *("--mailbox", mailbox, "--completions", completions),
        *("--launcher", str(os.getpid())),
        *queues,
        *options,
    ]
