"""A virtio console on two descriptors: what is typed goes to the guest, what the guest says comes out whole.

Output is never lost and never out of order, whatever the descriptor does: a pipe that is full, a terminal that ^S has
stopped. What cannot be written yet is kept, and the driver gets a buffer back only when all of it is written.
Three ^C within about a second, each read by itself, ask for the end of the guest. On a terminal they are seen even when
the guest takes no input (any more, or yet): what is typed meanwhile waits here, in order.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from time import monotonic

from lgmp.errors import LgmpError, say
from lgmp.terminal import RawTerminal
from lgmp.virtio.console import INPUT_QUEUE, OUTPUT_QUEUE, QUEUES
from lgmp.virtio.ring import RingError
from workers.device import BATCH, IOV_MAX, Device, skip

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.runtime import Options

INTERRUPT_KEY = b"\x03"
# A terminal's answer to "where is the cursor" (ECMA-48's CPR, ESC [ row ; column R), which a shell in the guest may ask
# at each prompt, so also after each ^C. Nobody typed it.
LONGEST_REPORT = 16
# "Within about a second": from the first of three to the last, in seconds.
INTERRUPTS_WITHIN = 1.5
# A pipe that poll(2) calls writable takes this much without waiting (PIPE_BUF).
CHUNK = 4096
# What is typed while the guest has no buffer is kept up to this many bytes; after that the terminal keeps it.
AHEAD = 256
# What a reset leaves unwritten is kept up to this many bytes.
TAIL = 1 << 20
# How long a terminal is left alone whose foreground is another's, in seconds.
BACKGROUND_SECONDS = 1.0
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Console(Device):
    """A console. Two queues, input and output (virtio 1.0, section 5.3)."""

    def __init__(
        self,
        input_fd: int,
        output_fd: int,
        *,
        terminal: RawTerminal | None = None,
        say: Callable[[str], None] = say,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Read from `input_fd`, write to `output_fd`; `terminal` is restored at the end of input and on close."""
        super().__init__()
        self._terminal = terminal
        self._say = say
        self._clock = clock
        # Descriptors of our own that do not block, where there can be such: the open file behind 0 and 1 is shared
        # with others (a shell, a pager), and its flags are theirs.
        self._input = _unblocked(input_fd, os.O_RDONLY)
        self._output = _unblocked(output_fd, os.O_WRONLY)
        self._owned = {self._input, self._output} - {input_fd, output_fd}
        self._input_is_terminal = os.isatty(input_fd)
        self._input_open = True
        self._output_open = True
        self._output_failed = False  # and the user knows
        self._live = False
        self._hungry = False  # whether the guest may have a buffer for input
        self._not_before = 0.0  # when to look at a terminal in the background again
        self._buffer: tuple[int, list[memoryview]] | None = None  # a buffer taken from the guest, still empty
        self._ahead = bytearray()
        self._interrupts: list[float] = []
        self._tail = bytearray()  # output of before a reset
        self._head = -1  # the output chain that is being written
        self._segments: list[memoryview] = []  # what is left of it
        self._blocked = False

    # Input

    def _wants_input(self) -> bool:
        if not self._input_open or self._clock() < self._not_before:
            return False
        if self._live and self._hungry:
            return True
        return self._input_is_terminal and len(self._ahead) < AHEAD

    def _take_buffer(self) -> list[memoryview] | None:
        """The guest's next buffer for input that has room; None where it has none."""
        if not self._live:
            return None
        while self._buffer is None:
            chain = self.queues[INPUT_QUEUE].pop()
            if chain is None:
                self._hungry = False
                return None
            head, readable, writable = chain
            if readable:
                raise RingError(
                    f"{self.queues[INPUT_QUEUE].name}: descriptor {head}: Output buffers in console in queue?"
                )
            writable = skip(writable[:IOV_MAX], 0)
            if writable:
                self._buffer = head, writable
            else:
                self._give_buffer(head, 0)
        return self._buffer[1]

    def _give_buffer(self, head: int, count: int) -> None:
        self._buffer = None
        self.queues[INPUT_QUEUE].push(head, count)
        self.notifier.used(INPUT_QUEUE)

    def _give_ahead(self) -> None:
        """Hand over what was typed ahead, as far as the guest has buffers for it."""
        while self._ahead:
            segments = self._take_buffer()
            if segments is None or self._buffer is None:
                return
            done = 0
            for segment in segments:
                part = self._ahead[done : done + len(segment)]
                segment[: len(part)] = part
                done += len(part)
            del self._ahead[:done]
            self._give_buffer(self._buffer[0], done)

    def _read(self) -> None:
        """Read what is there, once: into the guest's own buffer, or behind what was typed ahead."""
        self._give_ahead()
        segments = None if self._ahead else self._take_buffer()
        if segments is None and not (self._input_is_terminal and len(self._ahead) < AHEAD):
            return
        ahead = bytearray(AHEAD - len(self._ahead)) if segments is None else bytearray()
        try:
            count = os.readv(self._input, [ahead] if segments is None else segments)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            if error.errno == errno.EIO and self._in_background():
                self._not_before = self._clock() + BACKGROUND_SECONDS
                return
            count = 0
        if not count:
            self._input_open = False
            self._say("Failed to get console input, ignoring console.")
            if self._terminal:
                self._terminal.restore()
            return
        if segments is None:
            self._ahead += ahead[:count]
            read = bytes(ahead[: min(count, LONGEST_REPORT)])
        else:
            read = bytes(segments[0][: min(count, LONGEST_REPORT)])
        if self._buffer is not None:
            self._give_buffer(self._buffer[0], count)
        if count == 1 and read == INTERRUPT_KEY:
            self._count_interrupt()
        elif not _is_cursor_report(read):
            self._interrupts.clear()

    def _count_interrupt(self) -> None:
        now = self._clock()
        self._interrupts = [*self._interrupts[-2:], now]
        if len(self._interrupts) == 3 and now - self._interrupts[0] <= INTERRUPTS_WITHIN:
            self._interrupts.clear()
            self.notifier.quit()

    def _in_background(self) -> bool:
        try:
            return os.tcgetpgrp(self._input) != os.getpgrp()
        except OSError:
            return False

    # Output

    def _next_chain(self) -> bool:
        """Take the next output chain to write; False where there is none."""
        chain = self.queues[OUTPUT_QUEUE].pop()
        if chain is None:
            return False
        head, readable, writable = chain
        if writable:
            raise RingError(f"{self.queues[OUTPUT_QUEUE].name}: descriptor {head}: Input buffers in output queue?")
        self._head = head
        self._segments = skip(readable, 0)
        return True

    def _write_some(self, segments: Sequence[memoryview | bytearray]) -> int:
        """Write the beginning of `segments` without waiting; gives how many bytes went, 0 where none can now."""
        if not self._output_open:
            return sum(map(len, segments))
        poll = select.poll()
        poll.register(self._output, select.POLLOUT)
        if not poll.poll(0):
            return 0
        room = CHUNK
        few: list[memoryview | bytearray] = []
        for segment in segments[:IOV_MAX]:
            few.append(segment if len(segment) <= room else memoryview(segment)[:room])
            room -= len(few[-1])
            if not room:
                break
        try:
            count = os.writev(self._output, few)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            # A full disk may have room again; a reader that went away does not come back.
            self._output_open = error.errno in _MENDABLE
            if not self._output_failed:
                self._say(f"Failed to write console output ({error.strerror}), it is discarded.")
            self._output_failed = True
            return sum(map(len, segments))
        self._output_failed = False
        return count

    def _write(self) -> bool:
        """Write what can be written now, in a bout of bounded length; False where nothing more can be done now."""
        used = 0
        try:
            for _ in range(BATCH):
                if self._tail:
                    count = self._write_some([self._tail])
                    del self._tail[:count]
                elif self._segments:
                    count = self._write_some(self._segments)
                    self._segments = skip(self._segments, count)
                elif self._head >= 0:
                    self.queues[OUTPUT_QUEUE].push(self._head, 0)
                    self._head = -1
                    used += 1
                    continue
                elif self._live and self._next_chain():
                    continue
                else:
                    self._blocked = False
                    return False
                if not count:
                    self._blocked = True
                    return False
            return True
        finally:
            if used:
                self.notifier.used(OUTPUT_QUEUE)

    # As every device

    def serve(self) -> bool:
        """Look at both rings."""
        self._live = self._hungry = True
        self._give_ahead()
        return not self._blocked and self._write()

    def wants(self) -> Sequence[tuple[int, int]]:
        """Input while there is room for it, output while something waits to be written."""
        wanted = []
        if self._wants_input():
            wanted.append((self._input, select.POLLIN))
        if self._blocked:
            wanted.append((self._output, select.POLLOUT))
        return wanted

    def ready(self, descriptor: int, events: int) -> None:
        """Read once, write a while."""
        if descriptor == self._input and events & ~select.POLLOUT and self._wants_input():
            self._read()
        if descriptor == self._output and events & ~select.POLLIN and self._blocked:
            # More to write than fits a bout is the same as having to wait: messages come first.
            self._blocked = self._write() or self._blocked

    @property
    def busy(self) -> bool:
        """Whether there is output that is not written yet."""
        return bool(self._tail or self._segments or self._head >= 0)

    def stop(self) -> None:
        """Read no more."""
        self._input_open = False

    def reset(self) -> None:
        """Forget the guest's buffers; what it had given out to be written still is."""
        self._keep_output()
        self._live = self._hungry = False
        self._buffer = None
        self._head = -1
        self._segments = []
        self._blocked = bool(self._tail)
        super().reset()

    def _keep_output(self) -> None:
        try:
            while True:
                for segment in self._segments:
                    self._tail += segment[: max(0, TAIL - len(self._tail))]
                if not self._live or len(self._tail) >= TAIL or not self._next_chain():
                    return
        except RingError:
            pass  # what a ring holds that is being reset is no error any more

    def close(self) -> None:
        """Give the terminal its modes back, unless somebody has already."""
        if self._terminal:
            self._terminal.restore(only_if_raw=True)
        while self._owned:
            os.close(self._owned.pop())


def _unblocked(fd: int, access: int) -> int:
    """A descriptor of our own for the pipe or terminal `fd`, one that does not block; else `fd` itself."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE not in (access, os.O_RDWR):
            return fd
        if stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd):
            return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        pass
    return fd


def _make(options: Options) -> Device:
    if len(options.queues) != QUEUES:
        raise LgmpError(f"a console has {QUEUES} rings, --queue was given {len(options.queues)} times")
    input_fd = options.number("input-fd") if "input-fd" in options.own else 0
    output_fd = options.number("output-fd") if "output-fd" in options.own else 1
    terminal = None
    if "restore-termios" in options.own:
        try:
            terminal = RawTerminal.from_argument(input_fd, options.own["restore-termios"])
        except ValueError as error:
            raise LgmpError(f"--restore-termios: {error}") from error
    return Console(input_fd, output_fd, terminal=terminal)


def _is_cursor_report(read: bytes) -> bool:
    """Whether this is a cursor position report and nothing else."""
    return read[:2] == b"\x1b[" and read[-1:] == b"R" and read[2:-1].replace(b";", b"").isdigit()


def main() -> None:
    """Serve a console: `python -m workers.console --help` says how."""
    from workers.runtime import run  # noqa: PLC0415  the device above is of use without a process around it

    run(
        "console",
        _make,
        {
            "input-fd=": "what is typed comes from there; 0 without it",
            "output-fd=": "what the guest says goes there; 1 without it",
            "restore-termios=": "the modes to give the terminal back at the end, as of `stty -g`",
        },
    )


if __name__ == "__main__":
    main()
