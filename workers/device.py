"""What a device is to whoever runs it: rings in, used elements out, and perhaps descriptors it waits for.

A device knows nothing of processes, message queues or buses. It is given its virtqueues and a Notifier, and is
called when its rings may hold something (`serve`) or when a descriptor it wants is ready (`ready`). Nothing in it may
wait for anything but its own file. workers/runtime.py runs a device in a process; a test runs it in a loop.
"""

from __future__ import annotations

from time import monotonic

from lgmp.control import BYTES_IN, STATE_BYTES, STATISTICS
from lgmp.errors import LgmpError, say
from lgmp.virtio.ids import VIRTIO_RING_F_INDIRECT_DESC
from lgmp.virtio.ring import RingError, Virtqueue

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Protocol

    class Notifier(Protocol):
        """Whom a device tells what its driver or its user is to know."""

        def used(self, queue: int) -> None:
            """Used elements were added to ring `queue`."""

        def quit(self) -> None:
            """The user asked for the end of the guest."""


# How many requests are served before the driver is told of them and messages are looked at.
BATCH = 32
# readv(2) and its like take this many segments at most (limits.h).
IOV_MAX = 1024


class RequestError(LgmpError):
    """A request broke a rule of its device; fatal to that until its reset. Where it was is for the caller to add.

    `{head}` in the message stands for the number of the request's first descriptor.
    """

    def in_ring(self, name: str, head: int) -> RingError:
        """The same, for the request `head` of the ring `name`."""
        return RingError(f"{name}: descriptor {head}: {str(self).replace('{head}', str(head))}")


class Complaints:
    """Says what goes wrong, at most once every `seconds`, with the number of complaints it kept to itself."""

    def __init__(
        self, say: Callable[[str], None] = say, seconds: float = 5.0, clock: Callable[[], float] = monotonic
    ) -> None:
        """`say` takes the line; `clock` gives seconds."""
        self._say = say
        self._seconds = seconds
        self._clock = clock
        self._next = clock()
        self._kept = 0

    def __call__(self, text: str) -> None:
        """Say `text`, or count it."""
        now = self._clock()
        if now < self._next:
            self._kept += 1
            return
        if self._kept:
            text += f" (and {self._kept} more such lines)"
        self._next = now + self._seconds
        self._kept = 0
        self._say(text)


def skip(segments: Iterable[memoryview], count: int) -> list[memoryview]:
    """What is left of `segments` after their first `count` bytes; empty segments are left out."""
    left: list[memoryview] = []
    for segment in segments:
        size = len(segment)
        if count >= size:
            count -= size
        elif count:
            left.append(segment[count:])
            count = 0
        else:
            left.append(segment)
    return left


class Device:
    """What every device has in common; by itself a device that does nothing."""

    def __init__(self) -> None:
        """A device without rings; `attach` gives it some."""
        self.queues: Sequence[Virtqueue] = ()
        self.notifier: Notifier
        # Counted for people, by the indexes of lgmp.control: in whole batches, as each count costs something.
        self.statistics = memoryview(bytearray(8 * STATISTICS)).cast("Q")
        # What a successor of this process needs, besides the requests in flight, to go on where this one was killed.
        self.state = memoryview(bytearray(STATE_BYTES))

    def attach(
        self,
        queues: Sequence[Virtqueue],
        notifier: Notifier,
        *,
        statistics: memoryview | None = None,
        state: memoryview | None = None,
    ) -> None:
        """Give the device its rings and whom to tell; once, before anything else is called.

        `statistics` (u64) and `state` (bytes) lie in its control page; without one they are the device's own.
        """
        self.queues = queues
        self.notifier = notifier
        if statistics is not None:
            self.statistics = statistics
        if state is not None:
            self.state = state
        self.take_over()

    def take_over(self) -> None:
        """`state` is there now: mind what a predecessor has left in it, whether or not a driver is at work."""

    def resume(self) -> None:
        """Go on in the place of a process that was killed, as `state` tells; before the first `serve`.

        What that one had taken and not given back is popped again from the rings, oldest first.
        """

    def accept(self, features: int) -> None:
        """The driver accepted these feature bits (as a 64-bit mask)."""
        indirect = bool(features >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        for queue in self.queues:
            queue.indirect = indirect

    def serve(self) -> bool:
        """The driver says that its rings hold something: do what can be done now, at most BATCH requests a ring.

        Gives True where there may be more to do at once. Raises RingError where the driver broke a rule.
        """
        return False

    def wants(self) -> Sequence[tuple[int, int]]:
        """The descriptors the device waits for now, each with its events as for poll(2)."""
        return ()

    def ready(self, descriptor: int, events: int) -> None:
        """A descriptor that was wanted is ready for `events`, or broken. Do what can be done now; no `serve` follows.

        Raises RingError where the driver broke a rule.
        """

    @property
    def busy(self) -> bool:
        """Whether something that was taken from the driver is still to be done."""
        return False

    def stop(self) -> None:
        """Take in nothing new from outside from now on."""

    def suspend(self) -> None:
        """The rings are somebody else's for a while: forget what was taken from them and not given back.

        `resume` follows when they are there again, perhaps as other objects and elsewhere; those chains are popped once
        more, oldest first, as after the death of this process.
        """
        rings, self.queues = self.queues, ()
        try:
            self.reset()
        finally:
            self.queues = rings

    def reset(self) -> None:
        """The driver reset the device: forget what it asked for, and leave its rings alone until the next `serve`."""
        for queue in self.queues:
            queue.reset()

    def close(self) -> None:
        """Undo what must not outlive the device. May be called twice."""


class RequestDevice(Device):
    """A device whose every chain is a request that is answered at once: a disk, an entropy source."""

    def handle(self, queue: int, readable: list[memoryview], writable: list[memoryview]) -> int:
        """Answer one request on ring `queue`; gives the number of bytes written to `writable`. May change both lists.

        Raises RequestError where the request is none.
        """
        raise NotImplementedError

    def serve(self) -> bool:
        """Answer what is in the rings."""
        handle = self.handle
        more = False
        for number, queue in enumerate(self.queues):
            pop = queue.pop
            push = queue.push
            head = -1
            total = 0
            try:
                for _ in range(BATCH):
                    chain = pop()
                    if chain is None:
                        break
                    head, readable, writable = chain
                    written = handle(number, readable, writable)
                    push(head, written)
                    total += written
                else:
                    more = True
            except RequestError as error:
                raise error.in_ring(queue.name, head) from error
            if head >= 0:
                self.statistics[BYTES_IN] += total
                self.notifier.used(number)
        return more
