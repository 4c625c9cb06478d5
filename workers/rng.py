"""A virtio entropy source on a file: buffers come in, random bytes go straight into them.

Each buffer gets what one read gives, at least a byte. Where the file has nothing yet the buffer waits; where it has
come to its end, or fails, the buffers wait for ever: bytes that were given once are never given again.

Where this process is killed with a buffer that is filled and not given back yet, its successor fills it anew, with what
the file has then: what was read is lost, not used twice.
"""

from __future__ import annotations

import os
import select

from lgmp.control import BYTES_IN, ERRORS
from lgmp.errors import LgmpError, say
from lgmp.virtio.ring import RingError
from lgmp.virtio.rng import QUEUES, REQUEST_QUEUE
from workers.device import BATCH, IOV_MAX, Device

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.runtime import Options

# A buffer is given this many bytes at most: a read of the kernel's generator is not to keep messages waiting.
MOST = 1 << 16

# The first byte of the device's state: whether the source has come to its end, set before the user is told.
_ENDED = 0


class Rng(Device):
    """An entropy source. One queue of writable buffers (virtio 1.0, section 5.4)."""

    def __init__(self, fd: int, *, source: str, name: str = "rng0", say: Callable[[str], None] = say) -> None:
        """Read from `fd`, which `source` names to the user; it may block, since it is read when it is ready."""
        super().__init__()
        self.fd = fd
        self.source = source
        self.name = name
        self._say = say
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._open = True
        self._live = False
        self._buffer: tuple[int, list[memoryview]] | None = None  # a buffer taken from the guest, still empty

    def take_over(self) -> None:
        """A source that has ended for a predecessor is not tried again."""
        if self.state[_ENDED]:
            self._open = False

    def serve(self) -> bool:
        """Fill what buffers there are, as long as the file has something."""
        self._live = True
        return self._fill()

    def _fill(self) -> bool:
        """Fill at most BATCH buffers; True where there may be more to fill at once."""
        total = used = 0
        try:
            for _ in range(BATCH):
                if not self._open or not self._take_buffer() or not self._poll.poll(0):
                    return False
                count = self._read()
                if count >= 0:
                    used += 1
                    total += count
            return True
        finally:
            if used:
                self.statistics[BYTES_IN] += total
                self.notifier.used(REQUEST_QUEUE)

    def _take_buffer(self) -> bool:
        if self._buffer is not None:
            return True
        queue = self.queues[REQUEST_QUEUE]
        chain = queue.pop()
        if chain is None:
            return False
        head, readable, writable = chain
        if readable:
            raise RingError(f"{queue.name}: descriptor {head}: Output buffers in rng?")
        self._buffer = head, _at_most(writable, MOST)
        return True

    def _read(self) -> int:
        """Fill the buffer with one read and give it back; gives how many bytes, -1 where there were none to be had."""
        assert self._buffer is not None
        head, segments = self._buffer
        count = 0
        if segments:  # one without room for a byte goes back as it came
            try:
                count = os.readv(self.fd, segments)
            except (BlockingIOError, InterruptedError):
                return -1
            except OSError as error:
                self._give_up(f"cannot read {self.source}: {error.strerror or error}")
                return -1
            if not count:
                self._give_up(f"{self.source} has come to its end")
                return -1
        self.queues[REQUEST_QUEUE].push(head, count)
        self._buffer = None
        return count

    def _give_up(self, why: str) -> None:
        self._open = False
        self.state[_ENDED] = 1
        self.statistics[ERRORS] += 1
        self._say(f"{self.name}: {why}; the guest gets no more random bytes from it")

    def wants(self) -> Sequence[tuple[int, int]]:
        """The file, while a buffer waits for it."""
        return ((self.fd, select.POLLIN),) if self._open and self._buffer is not None else ()

    def ready(self, descriptor: int, events: int) -> None:  # noqa: ARG002
        """Fill a batch of buffers. Where there are more, one is taken, so that the file is wanted again."""
        if self._live and self._fill():
            self._take_buffer()

    def stop(self) -> None:
        """Read no more."""
        self._open = False

    def suspend(self) -> None:
        """Forget the guest's buffer."""
        self._live = False
        self._buffer = None

    def reset(self) -> None:
        """As in `suspend`, with the ring."""
        self.suspend()
        super().reset()


def _at_most(segments: list[memoryview], room: int) -> list[memoryview]:
    """The first `room` bytes of `segments`, those without any left out, no more of them than one read takes."""
    cut: list[memoryview] = []
    for segment in segments:
        if not room or len(cut) == IOV_MAX:
            break
        if segment:
            cut.append(segment[:room])
            room -= len(cut[-1])
    return cut


def _make(options: Options) -> Device:
    if options.queue_count != QUEUES:
        raise LgmpError(f"an entropy source has {QUEUES} ring, not {options.queue_count}")
    if "source-fd" not in options.own:
        raise LgmpError("an entropy source needs --source-fd")
    source = options.arguments[0] if options.arguments else "its source"
    return Rng(options.number("source-fd"), source=source, name=options.name)


def main() -> None:
    """Serve an entropy source: `python -m workers.rng --help` says how."""
    from workers.runtime import run  # noqa: PLC0415  the device above is of use without a process around it

    run("rng", _make, {"source-fd=": "the open file that random bytes come from"})


if __name__ == "__main__":
    main()
