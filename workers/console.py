"""A virtio console on two descriptors: what is typed goes to the guest, what the guest says comes out whole.

Output is never lost and never out of order, whatever the descriptor does: a pipe that is full, a terminal that ^S has
stopped. What cannot be written yet is kept, and the driver gets a buffer back only when all of it is written.
Three ^C within about a second, each read by itself, ask for the end of the guest. On a terminal they are seen even when
the guest takes no input (any more, or yet): what is typed meanwhile waits here, in order.

A successor goes on exactly where this process is killed, whichever instruction that is before; what that takes lies in
the device's state, 1024 bytes of the control page. But:

- The kill may come after a write and before what it wrote is noted: those bytes, CHUNK at most, are written again.
- What is read goes into the state first, over bytes of 0xFF: so a successor sees what a read has brought that nobody
  lived to count, but for bytes of 0xFF at its very end (which are in no text that is UTF-8); those are lost.
- What a reset has left unwritten, since nobody took it, is lost with the process; and the count of ^C begins anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from time import monotonic

from lgmp.control import BYTES_IN, BYTES_OUT, ERRORS
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
# The most that is read at once, and the size of the place where it is held until the guest has it, in bytes.
HELD = 512
# What a reset leaves unwritten is kept up to this many bytes.
TAIL = 1 << 20
# How long a terminal is left alone whose foreground is another's, in seconds.
BACKGROUND_SECONDS = 1.0
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# The device's state, as u64; each is stored in one piece, so there is no half of one to be found.
_FLAGS = 0  # _INPUT_ENDED, _OUTPUT_FAILED: each is set before the user is told
_PROGRESS = 1  # of the output chain that is being written: its head plus 1, how many of its bytes are (48 bits)
_HOLDING = 2  # what is held of the input: where it begins, how much, how much of what is being done, what that is
_WORDS_BYTES = 24
# Behind them: the input that is held, HELD bytes in a circle.
_HELD_OFFSET = 512
_INPUT_ENDED = 1
_OUTPUT_FAILED = 2
# What is being done with the input, 16 bits: nothing, a read, or (a head plus 1) giving it to the guest.
_NOTHING = 0
_READING = 0xFFFF
_FILLER = b"\xff"
_DONE_MASK = (1 << 48) - 1


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
        self._live = False
        self._hungry = False  # whether the guest may have a buffer for input
        self._not_before = 0.0  # when to look at a terminal in the background again
        self._buffer: tuple[int, list[memoryview]] | None = None  # a buffer taken from the guest, still empty
        self._interrupts: list[float] = []
        self._tail = bytearray()  # output of before a reset
        self._head = -1  # the output chain that is being written
        self._done = 0  # how many bytes of it are written
        self._segments: list[memoryview] = []  # what is left of it
        self._carried = -1  # the output chain that a predecessor had begun to write
        self._interrupted = -1  # the one that was half written when the rings were taken away
        self._blocked = False
        self._look_at_state()

    # What a successor goes by

    def _look_at_state(self) -> None:
        self._words = self.state[:_WORDS_BYTES].cast("Q")
        self._held = self.state[_HELD_OFFSET : _HELD_OFFSET + HELD]
        self._start, self._count, under_way, what = _unpack(self._words[_HOLDING])
        if what == _READING:
            # Killed in or after the read: what is no filler any more was read.
            read = b"".join(self._place(self._start + self._count, under_way)).rstrip(_FILLER)
            self._note(self._start, self._count + len(read))

    def _note(self, start: int, count: int, under_way: int = 0, what: int = _NOTHING) -> None:
        """Note what is held of the input from now on, and what is being done."""
        self._start = start % HELD
        self._count = count
        self._words[_HOLDING] = self._start | count << 16 | under_way << 32 | what << 48

    def _place(self, start: int, count: int) -> list[memoryview]:
        """The `count` bytes from `start` on of the circle in which input is held."""
        start %= HELD
        first = self._held[start : start + count]
        return [first, self._held[: count - len(first)]] if len(first) < count else [first]

    def take_over(self) -> None:
        """What a predecessor held of the input is there again, whether or not a driver is."""
        self._look_at_state()
        if self._words[_FLAGS] & _INPUT_ENDED:
            self._end_input()

    def resume(self) -> None:
        """Go on with the input that was being given, and in the middle of the output chain that was being written."""
        self._live = self._hungry = True
        start, count, under_way, what = _unpack(self._words[_HOLDING])
        if what != _NOTHING:
            given = what - 1 not in self.queues[INPUT_QUEUE].heads_in_flight()
            self._note(start + under_way, count - under_way) if given else self._note(start, count)
        head = (self._words[_PROGRESS] >> 48) - 1
        # The progress of a chain that is not in flight is that of the last one.
        self._carried = head if head in self.queues[OUTPUT_QUEUE].heads_in_flight() else -1
        if self._carried >= 0:
            self._interrupted = -1

    # Input

    def _wants_input(self) -> bool:
        if not self._input_open or self._clock() < self._not_before:
            return False
        if self._live and self._hungry:
            return True
        return self._input_is_terminal and self._count < AHEAD

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

    def _give_held(self) -> None:
        """Hand over what is held, as far as the guest has buffers for it."""
        while self._count:
            segments = self._take_buffer()
            if segments is None or self._buffer is None:
                return
            head = self._buffer[0]
            done = min(self._count, sum(map(len, segments)))
            data = b"".join(self._place(self._start, done))
            at = 0
            for segment in segments:
                part = data[at : at + len(segment)]
                segment[: len(part)] = part
                at += len(part)
            # Whoever finds this note sees by the ring whether the guest has got it: the chain is in flight, or is not.
            self._note(self._start, self._count, done, head + 1)
            self._give_buffer(head, done)
            self._note(self._start + done, self._count - done)
            self.statistics[BYTES_IN] += done

    def _room(self) -> int:
        """How many bytes may be read now: what the guest has room for, from a terminal some ahead."""
        if not self._count and (segments := self._take_buffer()) is not None:
            return min(HELD, sum(map(len, segments)))
        return AHEAD - self._count if self._input_is_terminal else 0

    def _read(self) -> None:
        """Read what is there, once, and hand it over."""
        self._give_held()
        room = self._room()
        if room <= 0:
            return
        place = self._place(self._start + self._count, room)
        for piece in place:
            piece[:] = _FILLER * len(piece)
        self._note(self._start, self._count, room, _READING)
        try:
            count = os.readv(self._input, place)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            if error.errno == errno.EIO and self._in_background():
                self._not_before = self._clock() + BACKGROUND_SECONDS
                return
            count = 0
        self._note(self._start, self._count + count)
        if not count:
            self._words[_FLAGS] |= _INPUT_ENDED
            self._say("Failed to get console input, ignoring console.")
            self._end_input()
            return
        read = b"".join(place)[: min(count, LONGEST_REPORT)]
        self._give_held()
        if count == 1 and read == INTERRUPT_KEY:
            self._count_interrupt()
        elif not _is_cursor_report(read):
            self._interrupts.clear()

    def _end_input(self) -> None:
        self._input_open = False
        if self._terminal:
            self._terminal.restore()

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
        done = 0
        interrupted = self._interrupted
        if self._carried >= 0:
            # It is the oldest in flight, so the one that comes now.
            done = self._words[_PROGRESS] & _DONE_MASK
            self._carried = -1
        elif interrupted < 0:
            # Before another is in flight, for which it could be taken.
            self._words[_PROGRESS] = 0
        chain = self.queues[OUTPUT_QUEUE].pop()
        if chain is None:
            return False
        head, readable, writable = chain
        if interrupted >= 0:
            # A ring that was stopped was given its chain back, so it comes first again.
            self._interrupted = -1
            if head == interrupted:
                done = self._words[_PROGRESS] & _DONE_MASK
        if writable:
            raise RingError(f"{self.queues[OUTPUT_QUEUE].name}: descriptor {head}: Input buffers in output queue?")
        self._head = head
        self._done = done
        self._segments = skip(readable, done)
        return True

    def _write_some(self, segments: Sequence[memoryview | bytearray]) -> int:
        """Write the beginning of `segments` without waiting; gives how many bytes went, 0 where none can now."""
        if not self._output_open:
            self.statistics[ERRORS] += 1
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
            if not self._words[_FLAGS] & _OUTPUT_FAILED:
                self._words[_FLAGS] |= _OUTPUT_FAILED
                self._say(f"Failed to write console output ({error.strerror}), it is discarded.")
            self.statistics[ERRORS] += 1
            return sum(map(len, segments))
        if self._words[_FLAGS] & _OUTPUT_FAILED:
            self._words[_FLAGS] &= ~_OUTPUT_FAILED
        return count

    def _write(self) -> bool:
        """Write what can be written now, in a bout of bounded length; False where nothing more can be done now."""
        used = written = 0
        try:
            for _ in range(BATCH):
                if self._tail:
                    count = self._write_some([self._tail])
                    del self._tail[:count]
                elif self._segments:
                    count = self._write_some(self._segments)
                    self._done += count
                    self._words[_PROGRESS] = self._head + 1 << 48 | self._done
                    self._segments = skip(self._segments, count)
                    written += count
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
            self.statistics[BYTES_OUT] += written
            if used:
                self.notifier.used(OUTPUT_QUEUE)

    # As every device

    def serve(self) -> bool:
        """Look at both rings."""
        self._live = self._hungry = True
        self._give_held()
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

    def suspend(self) -> None:
        """Forget the guest's buffers. How much of its output is written is in `state`."""
        self._live = self._hungry = False
        self._buffer = None
        if self._head >= 0:
            self._interrupted = self._head
        self._head = self._carried = -1
        self._segments = []
        self._blocked = bool(self._tail)

    def reset(self) -> None:
        """Forget the guest's buffers; what it had given out to be written still is."""
        self._keep_output()
        self.suspend()
        self._interrupted = -1
        super().reset()

    def _keep_output(self) -> None:
        try:
            while True:
                for segment in self._segments:
                    self._tail += segment[: max(0, TAIL - len(self._tail))]
                    self.statistics[BYTES_OUT] += len(segment)
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


def _unpack(holding: int) -> tuple[int, int, int, int]:
    """The four numbers of 16 bits that are in _HOLDING."""
    return holding & 0xFFFF, holding >> 16 & 0xFFFF, holding >> 32 & 0xFFFF, holding >> 48


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
    if options.queue_count != QUEUES:
        raise LgmpError(f"a console has {QUEUES} rings, not {options.queue_count}")
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
